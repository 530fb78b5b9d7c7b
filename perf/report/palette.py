"""One look per technique, everywhere: colour, dash, marker and hatch, so that no two differ by colour alone.

Colours are Okabe and Ito's ("Color Universal Design", 2008), but for its black and yellow, which vanish on a dark and on
a white page; more come from Paul Tol's "muted" scheme (2021).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from perf.analysis.verdicts import Verdict

FIXED = {
    "original": "#7a7a7a",
    "original-xformers": "#e69f00",
    "mha-math": "#56b4e9",
    "mha-mem_efficient": "#0072b2",
    "mha-mem_efficient-compile": "#d55e00",
    "mha": "#8a5a2b",
    "sdpa": "#009e73",
    "sdpa-compile": "#cc79a7",
}
MORE = ("#cc6677", "#999933", "#aa4499", "#88aadd", "#dd8a55", "#5f8f3f", "#b59a4a", "#7d6bc4")
DASHES = ("solid", "dash", "dot", "dashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
HATCHES = ("", "/", ".", "x")
VERDICTS = {
    Verdict.SLOWER: ("#d55e00", "triangle-up"),
    Verdict.FASTER: ("#009e73", "triangle-down"),
    Verdict.SAME: ("#7a7a7a", "circle"),
    Verdict.INCONCLUSIVE: ("#e69f00", "diamond"),
    Verdict.INVALID: ("#cc79a7", "x"),
}
STAGES = {"text": "#56b4e9", "unet": "#0072b2", "vae": "#e69f00", "other": "#9a9a9a"}
KERNEL_CLASSES = {
    "conv": "#0072b2",
    "gemm": "#56b4e9",
    "attention": "#d55e00",
    "norm": "#009e73",
    "elementwise": "#cc79a7",
    "copy": "#e69f00",
    "other": "#9a9a9a",
    "launch gap": "#5a5a5a",
}


@dataclass(frozen=True)
class Look:
    """How a technique is drawn; dash and marker by plotly's names, hatch by matplotlib's."""

    colour: str
    dash: str = "solid"
    marker: str = "circle"
    hatch: str = ""


ROOFS = {f"roof {number}": Look("#7a7a7a", dash) for number, dash in enumerate(DASHES, 1)}  # of any dtype, in order
PARTS = {name: Look(colour) for name, colour in {**STAGES, **KERNEL_CLASSES}.items()}


class Palette:
    """Looks by technique. Those of FIXED never change; another one's follows from its name, and moves on only where
    that look is taken by a name before it in the alphabet."""

    def __init__(self, techniques: Iterable[str]):
        names = set(techniques)
        fixed = list(FIXED)
        self._looks = {name: Look(FIXED[name], marker=MARKERS[fixed.index(name)]) for name in fixed}
        taken: set[int] = set()
        combinations = len(MORE) * (len(DASHES) - 1)
        for name in sorted(names - self._looks.keys()):
            start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % combinations
            free = (number % combinations for number in range(start, start + combinations))
            number = next((one for one in free if one not in taken), start)
            taken.add(number)
            kind = 1 + number // len(MORE)
            colour = MORE[number % len(MORE)]
            self._looks[name] = Look(colour, DASHES[kind], MARKERS[number % len(MARKERS)], HATCHES[kind])

        self._looks |= {**PARTS, **ROOFS}

    def __getitem__(self, name: str) -> Look:
        """The look of a technique, or of what all charts have: a stage, a class of kernels, a roof."""
        return self._looks[name]

    def as_dict(self) -> dict[str, dict[str, str]]:
        """Ready for JSON, for the page."""
        return {name: vars(look) for name, look in self._looks.items()}
