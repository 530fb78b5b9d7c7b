"""What to run: frozen configurations with a string id, and the named sets of them. Imports neither torch nor pytest."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path, PurePath
from typing import Any

PROMPT = "A photo"  # of the published experiment, like the seed, the sampler and the steps below


def attention_implementations() -> tuple[str, ...]:
    """The names in sd.attention's FUNCTIONS, the one registry of them: read from its file, since importing takes torch.

    Of the `sd` beside this package: a worker may import another commit's.
    """
    source = (Path(__file__).resolve().parents[1] / "sd" / "attention.py").read_text(encoding="utf-8")
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    named = {ast.unparse(node.targets[0]): node.value for node in assigned}
    registry = named["FUNCTIONS"]
    assert isinstance(registry, ast.Dict), "its keys are the names"
    return tuple(ast.literal_eval(key) for key in registry.keys if key is not None)


CHOICES = {
    "model": ("tiny", "sd1", "sd2", "sd2-v"),
    "engine": ("sd", "diffusers"),
    "workload": ("txt2img", "text", "unet", "vae"),
    "attention": attention_implementations(),
    "sdpa_kernels": ("math", "mem_efficient", "flash", "cudnn"),
    "compile": ("none", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "compile_scope": ("unet", "blocks", "step"),
    "precision": ("full", "autocast", "fp16", "bf16"),
    "sampler": ("ddim", "plms", "dpm_solver", "euler"),
    "device": ("cpu", "cuda"),
}


PRESETS = ("none", "original", "fast")
# Of the techniques that `optimise` takes, those that change the picture: they are measured, and never named the fastest.
APPROXIMATE = ("token_merging", "feature_caching", "int8", "fp8")


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


def cross(configurations: list[Configuration], values: dict[str, list[Any]]) -> list[Configuration]:
    """Every configuration with every combination of the given field values, each once, in order.

    `size` stands for height and width together: (pixels, pixels).
    """
    combinations = [dict(zip(values, choice)) for choice in itertools.product(*values.values())]
    crossed = [_with(configuration, choice) for configuration in configurations for choice in combinations]
    return list(dict.fromkeys(crossed))


def _with(configuration: Configuration, choice: dict[str, Any]) -> Configuration:
    if "size" in choice:
        height, width = choice["size"]
        choice = {**{name: value for name, value in choice.items() if name != "size"}, "height": height, "width": width}
    changed = replace(configuration, **choice)
    usual_before = configuration.precision == usual_precision(configuration.model)
    if "precision" not in choice and usual_before:  # another model brings its own usual precision
        changed = replace(changed, precision=usual_precision(changed.model))
    return changed


def _variants(model: str, choices: Sequence[dict[str, Any]], batches: Sequence[int] = (1,)) -> list[Configuration]:
    return [replace(usual(model), batch=batch, **choice) for batch in batches for choice in choices]


PUBLISHED_FIVE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "xformers"},
    {"attention": "mha", "sdpa_kernels": ("math",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",)},
    {"attention": "mha", "sdpa_kernels": ("mem_efficient",), "compile": "default"},
]
# For two cores and minutes: each attention that a CPU has, and torch.compile.
SMOKE: list[dict[str, Any]] = [
    {"attention": "original"},
    {"attention": "mha"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "compile": "default"},
]
COMPILE_MODES = [{"compile": mode} for mode in CHOICES["compile"]]
# Inductor's options, each alone on top of the mode that tunes: the names of sd.compile.INDUCTOR_OPTIONS.
INDUCTOR_OPTIONS = (
    "conv_1x1_as_mm",
    "coordinate_descent_tuning",
    "coordinate_descent_check_all_directions",
    "no_epilogue_fusion",
    "shape_padding",
    "freezing",
)
INDUCTOR = [
    {"compile": "max-autotune-no-cudagraphs", "optimise": option, "precision": "fp16"}
    for option in ("", *INDUCTOR_OPTIONS)
]
# What is compiled, and what is recorded, as one: the UNet (the preset's own choice), its blocks, the step, the whole loop.
SCOPES = [
    {"optimise": "fast" + more} for more in ("", ",compile_blocks", ",cuda_graph_loop", ",compile_step,cuda_graph_loop")
]
# Our own kernels on top of what inductor makes: whether they beat it is what decides if the preset gets them.
KERNELS = [
    {"optimise": "fast" + more}
    for more in ("", ",triton_group_norm", ",triton_geglu", ",triton_group_norm,triton_geglu")
]
# What changes the picture, each on top of the preset.
APPROXIMATIONS = [{"optimise": ",".join(("fast", *more))} for more in ((), *((name,) for name in APPROXIMATE))]
# From the first code's own loop, each rung with all that the rungs before it have, and the preset at the end.
EXACT = ("channels_last", "fused_qkv", "cache_context_kv", "cache_time_embeddings")
LADDER: list[dict[str, Any]] = [
    {"optimise": "original"},
    {"attention": "original"},
    {"attention": "sdpa"},
    {"attention": "sdpa", "precision": "fp16"},
    *({"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT[: n + 1])} for n in range(len(EXACT))),
    {"attention": "sdpa", "precision": "fp16", "optimise": ",".join(EXACT), "compile": "default"},
    {"optimise": "fast"},
]

SETS: dict[str, list[Configuration]] = {
    # The article's five on SD2; the two rounds of a launch are its --n_iter 2.
    "published": _variants("sd2", PUBLISHED_FIVE, batches=(1, 2, 4)),
    "published_sd1": _variants("sd1", [{"attention": "original"}, {"attention": "mha"}], batches=(2,)),
    # The two exercises that the article leaves to its reader.
    "sd1_compile": _variants("sd1", [PUBLISHED_FIVE[0], *PUBLISHED_FIVE[3:]]),
    "peers": _variants(
        "sd1",
        [
            {"attention": "original"},
            {"optimise": "fast"},
            {"engine": "diffusers", "attention": "xformers", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "fp16"},
            {"engine": "diffusers", "attention": "sdpa", "precision": "bf16", "compile": "max-autotune"},
        ],
    ),
    "ladder": _variants("sd2", LADDER),
    "compile_modes": _variants("sd2", COMPILE_MODES),
    "scopes": _variants("sd2", SCOPES),
    "kernels": _variants("sd2", KERNELS, batches=(1, 8)),
    "inductor": _variants("sd2", INDUCTOR),
    "approximate": _variants("sd2", APPROXIMATIONS),
    "smoke": [replace(usual("tiny"), steps=20, **choice) for choice in SMOKE],
    # Every attention at three batch sizes; the published protocol's question, asked of this machine's own model.
    "batches": _variants("sd2", [{"attention": attention} for attention in CHOICES["attention"]], batches=(1, 2, 4)),
    "stages": [
        replace(usual("tiny"), workload=workload, attention=attention)
        for workload in ("text", "unet", "vae")
        for attention in ("original", "sdpa")
    ],
}
SUMMARIES = {
    "published": "the article's five configurations on SD2, batch 1, 2 and 4",
    "published_sd1": "the companion article's two on SD1, batch 2",
    "sd1_compile": "compile on SD1, the article's first exercise",
    "peers": "diffusers' SD1 with xFormers and PyTorch's attention beside ours, its second",
    "ladder": "one optimisation at a time on SD2",
    "compile_modes": "every mode of torch.compile",
    "scopes": "blocks, the UNet, the step or the whole loop as one",
    "kernels": "our own kernels on top of the preset, at batch 1 and 8",
    "inductor": "the options of torch.compile's code generator, one at a time",
    "approximate": "what changes the picture, one technique at a time on top of the preset",
    "smoke": "the embedded model, for a machine without a GPU",
    "batches": "every attention at batch 1, 2 and 4",
    "stages": "text encoder, one UNet call and VAE decoder by themselves",
}


def suiting(device: str) -> str:
    """The name of the set that is run when nothing is asked for."""
    return "batches" if device == "cuda" else "smoke"
