"""Load an untrusted checkpoint into validated state dicts.

`read` reads any file format, `load` validates the result against the networks of a ModelConfig, `materialise` puts it into
a module. Each tensor is read once into memory of its own, which the module then keeps: loading takes the size of the
weights that are used, without a second copy of the model.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import parameterization, read_folder, require_settings
from sd.checkpoint.file_formats import index, read_tensors
from sd.config.presets import INPAINTING_CHANNELS, OTHER_INPUTS, PRESETS, ModelConfig, Parameterization, TextKind
from sd.errors import CheckpointError
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet

LISTED = 10  # names in a message, before "and N more"

_SCHEDULE_BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar "
    "scale_factor global_step epoch lr num_timesteps"
).split()
# Entries of published files that inference does not use.
_IGNORABLE = re.compile(
    "|".join(
        [
            rf"({'|'.join(_SCHEDULE_BUFFERS)})$",
            r"ddim_\w+$",
            r"model_ema\.",
            r"loss\.",
            r"first_stage_model\.(loss|model_ema)\.",
            r"cond_stage_model\.model\.(visual\.|(attn_mask|text_projection|logit_scale)$)",
            r"cond_stage_model\.model\.(input_resolution|context_length|vocab_size)$",
            r"cond_stage_model\.(transformer\.)?(vision_model\.|(visual_projection\.weight|text_projection\.weight|logit_scale)$)",
            r"cond_stage_model\.transformer\.(text_model\.)?embeddings\.position_ids$",
        ]
    )
)
# Weights that only a released OpenCLIP tower has; its last block is trained but not used.
_RELEASED_OPENCLIP = (f"{layouts.OPENCLIP}text_projection", f"{layouts.OPENCLIP}logit_scale")
_FIRST_CONV = f"{layouts.UNET}input_blocks.0.0.weight"
# The second name is of joined matrices, for a context as wide as the block.
_CROSS_KEYS = [
    re.compile(rf"{re.escape(layouts.UNET)}.*\.attn2\.{name}$")
    for name in (r"(to_k\.weight|mha\.k_proj_weight)", r"mha\.in_proj_weight")
]
_BLOCK = re.compile(r"transformer\.resblocks\.(\d{1,4})\.")

_OTHER_MODELS = (  # a name that only this model type has, and its description
    (r"conditioner\.embedders\.", "is a Stable Diffusion XL checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux checkpoint"),
    (r"model\.diffusion_model\.label_emb\.", "has class embeddings, like unCLIP and Stable Diffusion XL"),
    (r".*(\.lora_(up|down|A|B)\.|\.hada_w)", "is a LoRA, which modifies a model"),
    (r"(control_model\.|controlnet_cond_embedding\.)", "is a ControlNet, which extends a model"),
    (r"(string_to_param|emb_params$)", "is a textual inversion embedding"),
    (r"(down_blocks|time_embedding)\.", "is the UNet of a diffusers folder: give the folder itself"),
    (r"(encoder|decoder)\.(down|up|mid|conv_in)", "is an autoencoder alone"),
    (r"text_model\.", "is a text encoder alone"),
)
_FAMILIES = {768: "an SD1", 1024: "an SD2"}  # by the width of the context


@dataclass(frozen=True)
class Checkpoint:
    """A state dict in the original layout, and the metadata of its file."""

    state: dict[str, Tensor]
    global_step: int | None = None
    parameterization: Parameterization | None = None  # only a diffusers folder has it
    others: tuple[str, ...] = ()  # names of entries that are not tensors


def read_checkpoint(
    path: str | Path, progress: bool | None = None, select: Callable[[str], bool] | None = None
) -> Checkpoint:
    """Read a checkpoint like `read`, with its metadata. select: predicate of the names to read; folders are read whole."""
    path = Path(path)
    if path.is_dir():
        predicted = parameterization(path)  # an invalid value is rejected before gigabytes are read
        return Checkpoint(read_folder(path, progress), parameterization=predicted)
    file_index = index(path)
    names = [name for name in file_index.tensors if select is None or select(name)]
    return Checkpoint(read_tensors(file_index, names, progress), file_index.global_step, others=file_index.others)


def read(path: str | Path, progress: bool | None = None) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, by its name in the file, on the CPU in the file's dtype.

    path: a .safetensors or torch file (detected from its content, not its extension; a nested `state_dict` is used), or
    a diffusers folder, which is returned in the original layout. progress: True shows a bar on stderr, None only on a
    terminal. Nothing in the file is executed. Raises CheckpointError naming the file and a remedy.
    """
    return read_checkpoint(path, progress).state


def _list(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


# --- detecting the model


def reject_other_models(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError, naming the model type, unless `state` (original names) is a whole SD1 or SD2 model."""
    for pattern, description in _OTHER_MODELS:
        if any(re.match(pattern, name) for name in state):
            raise CheckpointError(f"{path}: {description}; only whole Stable Diffusion 1 and 2 models can be loaded")
    if _FIRST_CONV not in state:
        raise CheckpointError(f"{path}: has no Stable Diffusion UNet ({_FIRST_CONV} is missing); give a whole model")
    if state[_FIRST_CONV].dim() != 4:
        raise CheckpointError(f"{path}: {_FIRST_CONV} is not a convolution; download the file again")


def _context_width(path: str | Path, state: Mapping[str, Tensor]) -> int:
    for pattern in _CROSS_KEYS:
        for name, tensor in state.items():
            if pattern.match(name) and tensor.dim() == 2:
                return int(tensor.shape[1])
    raise CheckpointError(f"{path}: its UNet has no cross-attention to a prompt; give a text-to-image model")


def _detect(path: str | Path, state: Mapping[str, Tensor]) -> ModelConfig:
    """The preset whose sizes the file has; eps for SD2, since the weights do not show eps or v."""
    width, (channels, inputs) = _context_width(path, state), state[_FIRST_CONV].shape[:2]
    for name in ("sd1", "sd2", "tiny"):
        unet = PRESETS[name].unet
        if (unet.context_dim, unet.model_channels) == (width, channels):
            return PRESETS[name].as_inpainting() if inputs == INPAINTING_CHANNELS else PRESETS[name]
    raise CheckpointError(
        f"{path}: no preset has a context of {width} and {channels} channels; give the config as a YAML file"
    )


def _reject_contradiction(path: str | Path, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    channels, inputs = state[_FIRST_CONV].shape[1], config.unet.in_channels
    if channels != inputs:
        supported = {config.unet.out_channels: "a text-to-image", INPAINTING_CHANNELS: "an inpainting"}
        remedy = "only text-to-image and inpainting models can be loaded"
        if channels in supported:
            remedy = "pass the config of this model, or none"
        raise CheckpointError(
            f"{path}: is of {({**OTHER_INPUTS, **supported}).get(channels, 'another')} model, whose UNet takes {channels} "
            f"channels, not {inputs} as in the config {config.name}: {remedy}"
        )
    width, expected = _context_width(path, state), config.unet.context_dim
    text = layouts.text_kind(state)
    if width != expected or text not in (None, config.text.kind):
        remedies = {768: "pass config='sd1'", 1024: "pass config='sd2' or 'sd2-v'"}
        raise CheckpointError(
            f"{path}: is {_FAMILIES.get(width, 'a custom')} checkpoint (context of {width}, {text or 'no'} text encoder), "
            f"but the config {config.name} describes {_FAMILIES.get(expected, 'a custom')} model (context of {expected}, "
            f"{config.text.kind} text encoder): "
            f"{remedies.get(width, 'pass the YAML file of the model')}, or no config"
        )


def _text_layers(path: str | Path, text: Iterable[str], config: ModelConfig, released: bool) -> int:
    """Number of text blocks that run; 0 in the config means that it depends on the file.

    released: a released OpenCLIP tower, whose last block is not used; of other files (tiny, diffusers) every block is.
    """
    if config.text.layers:
        return config.text.layers
    layers = len({match[1] for match in map(_BLOCK.match, text) if match})
    if released and config.text.kind == "openclip":
        layers -= 1
    if layers < 1:
        raise CheckpointError(f"{path}: its text encoder has no blocks to run; download the file again")
    return layers


# --- networks on the meta device


def meta_device() -> contextlib.AbstractContextManager[Any]:
    """Context manager that makes the current thread build modules of shapes alone, without memory, on every torch."""
    return _shapes_only() if has("device_context") else _meta_empty()


def _shapes_only() -> contextlib.AbstractContextManager[Any]:
    from torch.overrides import TorchFunctionMode  # as a context manager not in torch 1.12

    class ShapesOnly(TorchFunctionMode):
        """Like torch.device("meta"), without initialisers: on meta tensors they import 900 modules."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, name = kwargs or {}, getattr(function, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                return args[0] if args else kwargs["tensor"]
            return function(*args, **({**kwargs, "device": "meta"} if function is torch.empty else kwargs))

    return ShapesOnly()


_EMPTY_LOCK = threading.RLock()


@contextlib.contextmanager
def _meta_empty() -> Iterator[None]:
    """Replace torch.empty, from which all layers of torch.nn allocate, for torch < 2.0.

    Thread-safe: the lock admits one thread at a time, and calls from other threads still allocate memory.
    """
    with _EMPTY_LOCK:
        empty, owner = torch.empty, threading.get_ident()

        def empty_on_meta(*size: Any, **kwargs: Any) -> Tensor:
            if threading.get_ident() == owner:
                kwargs["device"] = "meta"
            return empty(*size, **kwargs)

        torch.empty = empty_on_meta
        try:
            yield
        finally:
            torch.empty = empty


def factories(config: ModelConfig) -> dict[str, Callable[[], nn.Module]]:
    """Constructors of the three networks of a config, by the names under which `load` returns their weights."""
    return {
        "unet": lambda: UNet(config.unet),
        "autoencoder": lambda: Autoencoder(config.autoencoder),
        "text_encoder": lambda: TextEncoder(config.text),
    }


def expected_shapes(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """Shape of every weight of {unet, autoencoder, text_encoder}."""
    with meta_device():
        return {
            network: {name: weight.shape for name, weight in make().state_dict().items()}
            for network, make in factories(config).items()
        }


# --- validating


def _name_in_file(network: str, name: str, kind: TextKind) -> str:
    """Name of a network's weight in the original layout."""
    if network != "text_encoder":
        return layouts.PREFIXES[network] + name
    if kind == "openclip":
        return layouts.OPENCLIP + name
    return layouts.CLIP + next(iter(layouts.openclip_text_to_hf({name: torch.zeros(3)})))


def _validate(path: str | Path, networks: dict[str, layouts.State], rest: Iterable[str], config: ModelConfig) -> None:
    """Remove ignorable entries from `networks`; reject missing and unknown ones, and wrong shapes and dtypes."""
    missing, shapes, dtypes, unknown = [], [], [], [name for name in rest if not _IGNORABLE.match(name)]
    kind = config.text.kind
    for network, expected in expected_shapes(config).items():
        state = networks[network]
        for name, shape in expected.items():
            full = _name_in_file(network, name, kind)
            if name not in state:
                missing.append(full)
            elif state[name].shape != shape:
                shapes.append(f"{full} {tuple(state[name].shape)} instead of {tuple(shape)}")
            elif state[name].dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
                dtypes.append(f"{full} ({str(state[name].dtype)[6:]})")
        for name in [name for name in state if name not in expected]:
            block = _BLOCK.match(name) if network == "text_encoder" and kind == "openclip" else None
            full = _name_in_file(network, name, kind)
            # The last block of a released tower follows those that run.
            if not _IGNORABLE.match(full) and not (block and int(block[1]) == config.text.layers):
                unknown.append(full)
            del state[name]
    faults = {"missing": missing, "of a wrong shape": shapes, "not floating point": dtypes, "unknown": unknown}
    if any(faults.values()):
        summary = "; ".join(f"{len(names)} {fault}: {_list(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(
            f"{path}: its weights do not fit the config {config.name} ({summary}); "
            f"give the config of this model, or download the file again"
        )


def load(
    path: str | Path, config: ModelConfig | None = None, progress: bool | None = None
) -> tuple[ModelConfig, dict[str, layouts.State]]:
    """Read a checkpoint and validate it against a config.

    Returns (config, {"unet": state, "autoencoder": state, "text_encoder": state}); the names and shapes of each state are
    exactly those of UNet, Autoencoder and TextEncoder, the tensors on the CPU in the file's floating dtype.
    config None: sd1, sd2 or tiny, or the inpainting model of one of them, by the sizes in the file; the weights do not
    show eps or v, so SD2 is then loaded as eps unless it is a diffusers folder, whose scheduler has the setting.
    text.layers = 0: the number depends on the file.
    Raises CheckpointError, naming the file and a remedy, unless the file is a whole model of that config.
    """
    used = (*layouts.PREFIXES.values(), layouts.OPENCLIP, layouts.CLIP)
    # A second set of weights (model_ema) and other unused entries are not read.
    checkpoint = read_checkpoint(path, progress, lambda name: name.startswith(used) or not _IGNORABLE.match(name))
    state, predicted = checkpoint.state, checkpoint.parameterization
    reject_other_models(path, state)
    if config is None:
        config = _detect(path, state)
        if config.name == "sd2" and predicted == "v":
            config = PRESETS["sd2-v"]
        elif predicted is not None:
            config = replace(config, parameterization=predicted)
    elif predicted not in (None, config.parameterization):
        raise CheckpointError(
            f"{path}: its scheduler is for a UNet that predicts {predicted}, but the config {config.name} is for "
            f"{config.parameterization}: pass a config with that parameterization, or none"
        )
    _reject_contradiction(path, state, config)
    if Path(path).is_dir():
        require_settings(Path(path), config)
    released = any(name in state for name in _RELEASED_OPENCLIP)
    try:
        networks, rest = layouts.split_networks(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    state.clear()
    layers = _text_layers(path, networks["text_encoder"], config, released)
    config = replace(config, text=replace(config.text, layers=layers))
    _validate(path, networks, rest, config)
    return config, networks


def materialise(
    module_factory: Callable[[], nn.Module],
    state: dict[str, Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build the module of `module_factory` with the tensors of `state` as its weights, without allocating others.

    `state` must contain every weight of the module and is emptied; each tensor is freed once it is on `device` in `dtype`
    (None: unchanged). Tensors that need no conversion are used without a copy. Returns the module in eval mode.
    """
    with meta_device():
        module = module_factory()
    for name in [name for name, _ in module.named_parameters()]:
        tensor = state.pop(name).to(device=device, dtype=dtype).contiguous()
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    assert not state and not list(module.buffers()), "load() returns exactly the parameters of the module"
    return module.eval()
