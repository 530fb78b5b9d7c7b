"""What to run: frozen configurations with a string id, and the named sets of them. Imports neither torch nor pytest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from sd import choices
from sd.choices import APPROXIMATE, PRESETS

PROMPT = "A photo"  # of the published experiment, like the seed, the sampler and the steps below


CHOICES = {
    "model": choices.MODELS,
    "engine": ("sd", "diffusers"),
    "workload": ("txt2img", "text", "unet", "vae"),
    "attention": choices.ATTENTION,
    "sdpa_kernels": choices.SDPA_KERNELS,
    "compile": choices.COMPILE_MODES,
    "compile_scope": choices.COMPILE_SCOPES,
    "precision": choices.PRECISIONS,
    "sampler": choices.SAMPLERS,
    "device": ("cpu", "cuda"),
}


class UnknownChoice(ValueError):
    """A field of a configuration with a value that nothing here knows; the message lists those there are."""


@dataclass(frozen=True)
class Configuration:
    """One way of making a picture.

    sdpa_kernels: those allowed, empty for all. height, width: pixels, 0 for the model's own. device: None is the
    machine's own. interpreter: the label of another Python (`--perf-python`), None for this one. checkpoint: a file or
    folder of weights; without one `tiny` has its embedded weights and the others seeded random ones, which cost the same
    time. config: a YAML file in the original layout, when the weights do not say enough. optimise: what `--optimise` of the
    command lines takes: a preset (`fast`, `original`, `none`), which then decides on attention, precision and compile,
    or names of techniques, which are added to them; with commas between.
    """

    model: str = "tiny"
    engine: str = "sd"
    workload: str = "txt2img"
    attention: str = "sdpa"
    sdpa_kernels: tuple[str, ...] = ()
    compile: str = "none"
    compile_scope: str = "unet"
    precision: str = "full"
    optimise: str = ""
    batch: int = 1
    steps: int = 50
    sampler: str = "plms"
    scale: float = 7.5
    height: int = 0
    width: int = 0
    device: str | None = None
    interpreter: str | None = None
    checkpoint: str | None = None
    config: str | None = None
    prompt: str = PROMPT
    seed: int = 1

    def __post_init__(self) -> None:
        kernels = CHOICES["sdpa_kernels"]
        for name, known in CHOICES.items():
            value = getattr(self, name)
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if one not in known and not (name == "device" and one is None):
                    raise UnknownChoice(f"{name.replace('_', '-')} {one!r}: choose from {', '.join(known)}")
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise UnknownChoice(f"{name} {getattr(self, name)}: must be at least 1")
        # One order and one spelling, so that equal configurations are equal.
        chosen = tuple(kernel for kernel in kernels if kernel in self.sdpa_kernels)
        if self.attention not in ("mha", "sdpa") or chosen == kernels:
            chosen = ()
        object.__setattr__(self, "sdpa_kernels", chosen)
        if self.preset and self.engine == "sd":
            usual = {
                "attention": "sdpa",
                "sdpa_kernels": (),
                "precision": usual_precision(self.model),
                "compile": "none",
            }
            for name, value in usual.items():
                object.__setattr__(self, name, value)
        if self.compile == "none":
            object.__setattr__(self, "compile_scope", "unet")

    @property
    def preset(self) -> str | None:
        """The preset with which `optimise` begins, if any."""
        return preset_of(self.optimise)

    @property
    def approximate(self) -> bool:
        """Whether its picture is another one by intent."""
        return is_approximate(self.optimise)

    @property
    def id(self) -> str:
        """Such as `sd2-mha-mem_efficient-compile-b1`: parts at their usual values are left out.

        Attention by xFormers is `original-xformers`, as the published experiment names it: its first code with that kernel.
        """
        parts = [self.model] if self.checkpoint is None else [self.model, PurePath(self.checkpoint).stem]
        if self.engine != "sd":
            parts.append(self.engine)
        if self.workload != "txt2img":
            parts.append(self.workload)
        parts += technique({field.name: getattr(self, field.name) for field in fields(self)})
        if (self.sampler, self.steps) != ("plms", 50):
            parts.append(f"{self.sampler}{self.steps}")
        if self.height or self.width:
            parts.append(f"{self.height or 'native'}x{self.width or 'native'}")
        parts += [part for part in (self.device, self.interpreter) if part]
        return "-".join([*parts, f"b{self.batch}"])

    def __str__(self) -> str:
        return self.id

    def as_dict(self) -> dict[str, Any]:
        """All fields and the id, ready for JSON."""
        return {**asdict(self), "sdpa_kernels": list(self.sdpa_kernels), "id": self.id}

    def reference(self) -> Configuration:
        """What this one's pictures are compared with: fp32, original attention, nothing compiled, one image at a time."""
        return replace(
            self,
            engine="sd",
            attention="original",
            sdpa_kernels=(),
            compile="none",
            precision="full",
            optimise="",
            batch=1,
        )


def preset_of(optimise: str) -> str | None:
    """The preset with which what `--optimise` takes begins, if any."""
    first = optimise.split(",")[0]
    return first if first in PRESETS else None


def is_approximate(optimise: str) -> bool:
    """Whether what `--optimise` takes names a technique that changes the picture."""
    return not set(optimise.split(",")).isdisjoint(APPROXIMATE)


def technique(values: Mapping[str, Any]) -> list[str]:
    """How a picture is made, as parts of a name: attention, kernels, optimisations, compile mode, precision.

    values: the fields of a configuration by name, also of one from a file with values that nothing here knows.
    """
    ours, preset = values["engine"] == "sd", preset_of(values["optimise"])
    parts = []
    if not preset or not ours:  # a preset of ours has its attention in it
        xformers = ours and values["attention"] == "xformers"
        parts += ["original-xformers" if xformers else values["attention"], *values["sdpa_kernels"]]
    if values["optimise"]:
        parts.append(("preset-" if preset else "") + values["optimise"].replace(",", "+"))
    if values["compile"] != "none":
        parts.append("compile" if values["compile"] == "default" else f"compile-{values['compile']}")
        if values["compile_scope"] != "unet":
            parts.append(values["compile_scope"])
    if values["precision"] != usual_precision(values["model"]):
        parts.append(values["precision"])
    return parts


def from_dict(values: dict[str, Any]) -> Configuration:
    """The inverse of `as_dict`; raises UnknownChoice for a field that there is not."""
    known = {field.name for field in fields(Configuration)}
    unknown = sorted(set(values) - known - {"id"})
    if unknown:
        raise UnknownChoice(f"a configuration has no field {', '.join(unknown)}")
    values = {name: value for name, value in values.items() if name in known}
    return Configuration(**{**values, "sdpa_kernels": tuple(values.get("sdpa_kernels", ()))})


def usual_precision(model: str) -> str:
    """The published experiment ran under autocast; the embedded model is a CPU's, where fp32 is what computes."""
    return "full" if model == "tiny" else "autocast"


def usual(model: str) -> Configuration:
    """The configuration from which options start: PyTorch's own attention on `model` as it is usually run."""
    return Configuration(model=model, precision=usual_precision(model))
