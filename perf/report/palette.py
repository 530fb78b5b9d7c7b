"""One look per technique in every chart: colour, dash, marker and hatch, so that no two differ by colour alone.

Colours are those of Okabe and Ito ("Color Universal Design", 2008) without black and yellow, which vanish on a dark or a
white page; further colours are from Paul Tol's "muted" scheme (2021). Dashes, markers and hatches are matplotlib's.
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
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
HATCHES = ("", "/", "\\", "x")  # no dots: each is four curves in an SVG
VERDICTS = {
    Verdict.SLOWER: ("#d55e00", "^"),
    Verdict.FASTER: ("#009e73", "v"),
    Verdict.SAME: ("#7a7a7a", "o"),
    Verdict.INCONCLUSIVE: ("#e69f00", "D"),
    Verdict.INVALID: ("#cc79a7", "X"),
}
STAGES = {
    "text": "#56b4e9",
    "encode": "#009e73",
    "unet": "#0072b2",
    "vae": "#e69f00",
    "forward": "#56b4e9",  # of training, which has none of the stages above
    "backward": "#0072b2",
    "optimiser": "#e69f00",
    "average": "#009e73",
    "other": "#9a9a9a",
}
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
    """The style of a technique's bars and lines."""

    colour: str
    dash: str = "-"
    marker: str = "o"
    hatch: str = ""


ROOFS = {f"roof {number}": Look("#7a7a7a", dash) for number, dash in enumerate(DASHES, 1)}  # of any dtype, in order
STACKS = {  # software stacks of a history, in order of first appearance
    f"stack {number}": Look(colour, marker=marker)
    for number, (colour, marker) in enumerate(zip(("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#8a5a2b"), MARKERS))
}
PARTS = {name: Look(colour) for name, colour in {**STAGES, **KERNEL_CLASSES}.items()}


class Palette:
    """Looks by technique, stage, kernel class and roof.

    Techniques of FIXED never change their look. The look of another follows from a hash of its name, and moves on only
    where an alphabetically earlier name has taken it.
    """

    def __init__(self, techniques: Iterable[str]):
        self._looks = {name: Look(FIXED[name], marker=marker) for name, marker in zip(FIXED, MARKERS)}
        taken: set[int] = set()
        combinations = len(MORE) * (len(DASHES) - 1)
        for name in sorted(set(techniques) - FIXED.keys()):
            start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % combinations
            free = (number % combinations for number in range(start, start + combinations))
            number = next((number for number in free if number not in taken), start)
            taken.add(number)
            style, colour = 1 + number // len(MORE), MORE[number % len(MORE)]
            self._looks[name] = Look(colour, DASHES[style], MARKERS[number % len(MARKERS)], HATCHES[style])
        self._looks |= {**PARTS, **ROOFS, **STACKS}

    def __getitem__(self, name: str) -> Look:
        return self._looks[name]
