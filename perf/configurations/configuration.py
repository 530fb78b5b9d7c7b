"""The configuration of a generation: an immutable dataclass with a string id. Imports neither torch nor pytest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath
from typing import Any

from sd import choices
from sd.choices import APPROXIMATE, OPTIMISE_PRESETS

ENGINES = ("sd", "diffusers")  # of this package; any other is the user's own
# MODULE:NAME, FILE.py:NAME, FILE.py (its functions `load` and `round`), or FILE.py::TEST
OWN_ENGINE = re.compile(r"[^:]+\.py::.+|(?:[^:]+\.py|[A-Za-z_][\w.]*(?=:))(?::[A-Za-z_][\w.]*)?")
OWN_MODEL = "own"  # the model of such an engine, which chooses it itself
# Fields that describe the measurement of an engine, and which no engine needs to read.
OF_THE_SESSION = ("model", "engine", "workload", "device", "interpreter", "prompt", "seed")
REFERENCE = "reference"
EMBEDDED = ("tiny", "tiny-inpaint")  # models whose weights are part of the package
NATIVE_PIXELS = {
    **dict.fromkeys(EMBEDDED, 64),
    **dict.fromkeys(("sd1", "sd2", "sd1-inpaint", "sd2-inpaint", "sd2-depth"), 512),
    "sd2-v": 768,
}  # of a side
PROMPT = "A photo"  # from the published experiment, like the default seed, sampler and steps
CHOICES = {
    "model": tuple(x for x in choices.MODELS if x != "sd2-depth"),  # no workload has a depth image
    "engine": ENGINES,
    "workload": ("txt2img", "inpaint", "text", "unet", "vae", "train"),
    "attention": choices.ATTENTION,
    "sdpa_kernels": choices.SDPA_KERNELS,
    "compile": choices.COMPILE_MODES,
    "compile_scope": choices.COMPILE_SCOPES,
    "compile_backend": tuple(x for x in choices.COMPILE_BACKENDS if x not in choices.DEBUGGING_BACKENDS),
    "precision": choices.PRECISIONS,
    "sampler": choices.SAMPLERS,
    "timestep_spacing": choices.TIMESTEP_SPACINGS,
    "sigmas": choices.SIGMAS,
    "device": ("cpu", "cuda"),
}


class UnknownChoice(ValueError):
    """An invalid value of a configuration's field; the message lists the valid ones."""


@dataclass(frozen=True)
class Configuration:
    """A model with its options, workload and input. Raises UnknownChoice for invalid values.

    sdpa_kernels: allowed kernels, empty for all. height, width: pixels, 0 for the model's native size. device: None for
    the machine's default. interpreter: the label of another Python (`--perf-python`), None for this one. checkpoint: file
    or folder of weights; without one `tiny` has its embedded weights and the other models seeded random ones, which take
    the same time. config: YAML file in the original layout, where the weights do not determine it. optimise: as
    `--optimise`, a comma-separated list: a preset (`fast`, `original`, `none`), which sets attention, precision and
    compile, or techniques to add to them. lora_rank: of a LoRA with seeded random factors that is merged into the UNet's
    attention, 0 for none. timestep_spacing: None for the sampler's own. sigmas: `schedule` or `karras`.
    checkpointing: of the workload `train`, whose steps are updates and whose batch is that of an update.
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
    lora_rank: int = 0
    checkpointing: bool = False
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
    timestep_spacing: str | None = None
    sigmas: str = "schedule"
    compile_backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.own:
            object.__setattr__(self, "model", OWN_MODEL)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if self.own and name in ("engine", "model"):
                continue
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if item not in allowed and not (name in ("device", "timestep_spacing") and item is None):
                    raise UnknownChoice(f"{name.replace('_', '-')} {item!r}: choose from {', '.join(allowed)}")
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise UnknownChoice(f"{name} {getattr(self, name)}: must be at least 1")
        if self.lora_rank < 0:
            raise UnknownChoice(f"lora-rank {self.lora_rank}: must be at least 0")
        # Canonical values of fields without effect, so that equivalent configurations compare equal.
        canonical: dict[str, Any] = {}
        kernels = tuple(kernel for kernel in CHOICES["sdpa_kernels"] if kernel in self.sdpa_kernels)
        unrestricted = self.attention not in ("mha", "sdpa") or kernels == CHOICES["sdpa_kernels"]
        canonical["sdpa_kernels"] = () if unrestricted else kernels
        if self.preset and self.engine == "sd":
            canonical.update(attention="sdpa", sdpa_kernels=(), precision=usual_precision(self.model), compile="none")
        if self.workload == "train":
            unused = ("sampler", "scale", "timestep_spacing", "sigmas")
            canonical.update({name: getattr(Configuration, name) for name in unused})
        else:
            canonical["checkpointing"] = False
        if canonical.get("compile", self.compile) == "none":
            canonical.update(compile_scope="unet", compile_backend="inductor")
        for name, value in canonical.items():
            object.__setattr__(self, name, value)

    @property
    def own(self) -> bool:
        """Whether the engine is the user's own."""
        return is_own(self.engine)

    @property
    def test(self) -> bool:
        """Whether the engine is a test of the user's suite, which requests `measured`."""
        return self.own and "::" in self.engine

    @property
    def given(self) -> list[str]:
        """Fields with another value than the default, which an engine must read to have the effect that the id names."""
        plain = Configuration(engine=self.engine)
        names = [field.name for field in fields(self) if field.name not in OF_THE_SESSION]
        return [name for name in names if getattr(self, name) != getattr(plain, name)]

    @property
    def preset(self) -> str | None:
        """The preset at the start of `optimise`, if any."""
        return preset_of(self.optimise)

    @property
    def compiles(self) -> bool:
        """Whether torch.compile runs, as far as the options tell."""
        names = self.optimise.split(",")
        compiling = {
            "fast",
            "whole_norms",
            "nhwc_norms",
            "separate_bias",
            *choices.COMPILE_MODES,
            *choices.INDUCTOR_OPTIONS,
        } - {"none"}
        return self.compile != "none" or any(name in compiling or name.startswith("compile") for name in names)

    @property
    def approximate(self) -> bool:
        """Whether a technique changes the image by intent."""
        return is_approximate(self.optimise)

    @property
    def id(self) -> str:
        """For example `sd2-mha-mem_efficient-compile-b1`; default values are omitted.

        xFormers attention is `original-xformers`, as in the published experiment: the original code with that kernel.
        An engine of the user's own is FILE.NAME or MODULE.NAME, without the folder of the file.
        """
        parts = [engine_name(self.engine) if self.own else self.model]
        if self.checkpoint is not None:
            parts.append(PurePath(self.checkpoint).stem)
        if self.engine != "sd" and not self.own:
            parts.append(self.engine)
        if self.workload != "txt2img":
            # The models tuned for it are called `sd1-inpaint`, which must differ from this workload of `sd1`.
            parts.append("inpainting" if self.workload == "inpaint" else self.workload)
        parts += technique({field.name: getattr(self, field.name) for field in fields(self)})
        if self.workload == "train":
            parts.append(f"{self.steps}updates")
        elif (self.sampler, self.steps) != ("plms", 50):
            parts.append(f"steps{self.steps}" if self.own and self.sampler == "plms" else f"{self.sampler}{self.steps}")
        parts += sampling(self.timestep_spacing, self.sigmas, self.scale)
        if self.height or self.width:
            parts.append(f"{self.height or 'native'}x{self.width or 'native'}")
        parts += [part for part in (self.device, self.interpreter) if part]
        return "-".join([*parts, *([] if self.own and self.batch == 1 else [f"b{self.batch}"])])

    def __str__(self) -> str:
        return self.id

    def as_dict(self) -> dict[str, Any]:
        """All fields and the id as JSON types."""
        return {**asdict(self), "sdpa_kernels": list(self.sdpa_kernels), "id": self.id}

    def reference(self) -> Configuration:
        """The configuration of the reference image: fp32, original attention, not compiled, batch 1.

        Of an engine of the user's own: the same configuration with the engine's attribute `reference`.
        """
        if self.own:
            return replace(self, engine=f"{self.engine}{'.' if ':' in self.engine else ':'}{REFERENCE}")
        return replace(
            self,
            engine="sd",
            attention="original",
            sdpa_kernels=(),
            compile="none",
            precision="full",
            optimise="",
            checkpointing=False,
            batch=self.batch if self.workload == "train" else 1,  # the loss is that of the whole batch
        )


def images_per_round(values: Mapping[str, Any]) -> int:
    """The images that a round of a configuration with these fields makes, or trains on."""
    return int(values["batch"]) * (int(values["steps"]) if values.get("workload") == "train" else 1)


def is_own(engine: object) -> bool:
    """Whether an engine is the user's own: MODULE:NAME or FILE.py[:NAME]."""
    return isinstance(engine, str) and engine not in ENGINES and OWN_ENGINE.fullmatch(engine) is not None


def engine_name(engine: str) -> str:
    """The name of an engine in ids and tables: `module_engine.Engine` of `examples/module_engine.py:Engine`."""
    module, _, name = engine.partition(":")
    name = re.sub(r"[^\w.\[\],=+-]+", "_", name.lstrip(":").replace("::", "."))  # a part of file names
    return ".".join(filter(None, (PurePath(module).name.removesuffix(".py"), name)))


def preset_of(optimise: str) -> str | None:
    """The preset at the start of an `--optimise` value, if any."""
    first = optimise.split(",")[0]
    return first if first in OPTIMISE_PRESETS else None


def is_reference(fields: Mapping[str, object]) -> bool:
    """Whether speed-ups refer to a configuration with these fields: the original code's attention, eager."""
    reference = {"engine": "sd", "attention": "original", "compile": "none", "optimise": ""}
    return not fields.get("checkpointing") and all(fields.get(field) == value for field, value in reference.items())


def is_approximate(optimise: str) -> bool:
    """Whether an `--optimise` value contains a technique that changes the image."""
    return not set(optimise.split(",")).isdisjoint(APPROXIMATE)


def technique(values: Mapping[str, Any]) -> list[str]:
    """The parts of an id for attention, kernels, optimisations, compile mode and precision.

    values: a configuration's fields by name, possibly from a file with values unknown to this version.
    """
    ours, preset = values["engine"] == "sd", preset_of(values["optimise"])
    parts = []
    unread = is_own(values["engine"]) and values["attention"] == "sdpa" and not values["sdpa_kernels"]  # the defaults
    if (not preset or not ours) and not unread:  # a preset of engine `sd` includes its attention
        xformers = ours and values["attention"] == "xformers"
        parts += ["original-xformers" if xformers else values["attention"], *values["sdpa_kernels"]]
    if values["optimise"]:
        parts.append(("preset-" if preset else "") + values["optimise"].replace(",", "+"))
    if values["lora_rank"]:
        parts.append(f"lora{values['lora_rank']}")
    if values.get("checkpointing"):
        parts.append("checkpointing")
    if values["compile"] != "none":
        parts.append("compile" if values["compile"] == "default" else f"compile-{values['compile']}")
        if values["compile_scope"] != "unet":
            parts.append(values["compile_scope"])
        if values.get("compile_backend", "inductor") != "inductor":  # older files have no such key
            parts.append(values["compile_backend"])
    if values["precision"] != usual_precision(values["model"]):
        parts.append(values["precision"])
    return parts


def sampling(timestep_spacing: str | None, sigmas: str, scale: float) -> list[str]:
    """The parts of an id for what a sampler visits and for the guidance; default values are omitted."""
    parts = [] if timestep_spacing is None else [timestep_spacing]
    parts += [] if sigmas == "schedule" else [sigmas]
    return parts + ([] if scale == 7.5 else ["unguided" if scale == 1.0 else f"scale{scale:g}"])


def name_of_work(model: str, workload: str, sampler: str, steps: int, size: Sequence[int], parts: Sequence[str]) -> str:
    """The work for titles, such as `sd2` or `tiny, ddim 20 steps`; PLMS with 50 steps is left out. parts: by `sampling`."""
    names = ["own engines" if model == OWN_MODEL else model] + ([workload] if workload != "txt2img" else [])
    if workload == "train":
        names.append(f"{steps} updates")
    elif (sampler, steps) != ("plms", 50):
        names.append(f"{sampler} {steps} steps")
    names += parts
    if any(size):
        names.append(f"{size[0] or 'native'}x{size[1] or 'native'} px")
    return ", ".join(names)


def from_dict(values: dict[str, Any]) -> Configuration:
    """The inverse of `as_dict`. Raises UnknownChoice for an unknown field."""
    known = {field.name for field in fields(Configuration)}
    unknown = sorted(set(values) - known - {"id"})
    if unknown:
        raise UnknownChoice(f"a configuration has no field {', '.join(unknown)}")
    values = {name: value for name, value in values.items() if name in known}
    return Configuration(**{**values, "sdpa_kernels": tuple(values.get("sdpa_kernels", ()))})


def usual_precision(model: str) -> str:
    """The default precision: autocast, as in the published experiment; fp32 for the embedded model, which is for CPUs."""
    return "full" if model in (*EMBEDDED, OWN_MODEL) else "autocast"


def usual(model: str) -> Configuration:
    """The default configuration of a model: PyTorch's SDPA at the default precision."""
    return Configuration(model=model, precision=usual_precision(model))
