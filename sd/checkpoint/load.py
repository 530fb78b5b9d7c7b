"""An untrusted file in, a validated state dict out.

`read` takes any container apart, `load` holds the result against the networks of a ModelConfig, `materialise` puts it
into a module. Each tensor is read once into memory of its own, which the module then keeps: loading takes the size of
the weights that are used, and no second copy of the model.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sd.checkpoint import layouts
from sd.checkpoint.diffusers_folder import parameterization, read_folder, require_settings
from sd.checkpoint.file_formats import index, read_tensors
from sd.config.presets import PRESETS, ModelConfig
from sd.errors import CheckpointError
from sd.features import has
from sd.models.autoencoder import Autoencoder
from sd.models.text_encoder import TextEncoder
from sd.models.unet import UNet

SHOWN = 10  # names in a message, before "and N more"

_SCHEDULE_BUFFERS = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar "
    "scale_factor global_step epoch lr num_timesteps"
).split()
# What published files hold beside the networks, none of which inference uses.
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
# Weights only a released OpenCLIP tower has; its last block is trained but not used.
_RELEASED_OPENCLIP = (f"{layouts.OPENCLIP}text_projection", f"{layouts.OPENCLIP}logit_scale")
_FIRST_CONV = f"{layouts.UNET}input_blocks.0.0.weight"
_CROSS_KEY = re.compile(rf"{re.escape(layouts.UNET)}.*\.attn2\.(to_k\.weight|mha\.k_proj_weight)$")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")

_OTHER_MODELS = (  # a key that only this kind of file has, and what to say
    (r"conditioner\.embedders\.", "is a Stable Diffusion XL checkpoint"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "is a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "is a Flux checkpoint"),
    (r"model\.diffusion_model\.label_emb\.", "has class embeddings, as unCLIP and Stable Diffusion XL have"),
    (r".*(\.lora_(up|down|A|B)\.|\.hada_w)", "is a LoRA, a change to a model and not a model"),
    (r"(control_model\.|controlnet_cond_embedding\.)", "is a ControlNet, a part added to a model"),
    (r"(string_to_param|emb_params$)", "is a textual inversion embedding, not a model"),
    (r"(down_blocks|time_embedding)\.", "is the UNet of a diffusers folder: give the folder itself"),
    (r"(encoder|decoder)\.(down|up|mid|conv_in)", "is an autoencoder alone"),
    (r"text_model\.", "is a text encoder alone"),
)
_OTHER_CHANNELS = {5: "depth-to-image", 7: "x4 upscaler", 8: "instruct-pix2pix", 9: "inpainting"}


@dataclass(frozen=True)
class Loaded:
    """A state dict in the original layout, and what its file says beside the weights."""

    state: dict[str, torch.Tensor]
    global_step: int | None = None
    parameterization: str | None = None  # only a diffusers folder says it
    others: tuple[str, ...] = ()  # names of what is no tensor


def read_contents(path, progress: bool | None = None, names=None) -> Loaded:
    """As `read`, with what the file says beside its weights. names: a function that says which tensors are wanted."""
    path = Path(path)
    if path.is_dir():
        predicts = parameterization(path)  # refuse before gigabytes are read
        return Loaded(read_folder(path, progress), parameterization=predicts)
    contents = index(path)
    wanted = [name for name in contents.tensors if names is None or names(name)]
    return Loaded(read_tensors(contents, wanted, progress), contents.global_step, others=contents.others)


def read(path, progress: bool | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its name in the file, on the CPU in the file's dtype.

    path: a .safetensors or torch file (its content decides, not its extension), of which a `state_dict` inside is
    taken, or a diffusers folder, which comes back in the original layout. progress: True shows a bar on stderr, None
    only on a terminal. Nothing in the file is executed. Raises CheckpointError naming the file and the way out.
    """
    return read_contents(path, progress).state


def _list(names) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _kind(width: int) -> str:
    return {768: "an SD1", 1024: "an SD2"}.get(width, "a")


def refuse_other_models(path, state) -> None:
    """Raise CheckpointError, by its name, for another kind of model or a part of one; state: by original names."""
    for pattern, what in _OTHER_MODELS:
        if any(re.match(pattern, name) for name in state):
            raise CheckpointError(f"{path}: {what}; only whole Stable Diffusion 1 and 2 models can be loaded")
    if _FIRST_CONV not in state:
        raise CheckpointError(f"{path}: holds no Stable Diffusion UNet ({_FIRST_CONV} is missing); give a whole model")
    if state[_FIRST_CONV].dim() != 4:
        raise CheckpointError(f"{path}: {_FIRST_CONV} is no convolution; take the file again from its source")


def _context_width(path, state) -> int:
    for name, tensor in state.items():
        if _CROSS_KEY.match(name) and tensor.dim() == 2:
            return tensor.shape[1]
    for name, tensor in state.items():  # packed, where the context is as wide as the block
        if name.startswith(layouts.UNET) and name.endswith(".attn2.mha.in_proj_weight") and tensor.dim() == 2:
            return tensor.shape[1]
    raise CheckpointError(f"{path}: its UNet has no cross-attention to a prompt; give a text-to-image model")


def _detect(path, state) -> ModelConfig:
    """The preset whose sizes the file has; eps for SD2, since the weights do not say eps or v."""
    width, channels = _context_width(path, state), state[_FIRST_CONV].shape[0]
    for name in ("sd1", "sd2", "tiny"):
        unet = PRESETS[name].unet
        if (unet.context_dim, unet.model_channels) == (width, channels):
            return PRESETS[name]
    raise CheckpointError(
        f"{path}: no preset has a context of {width} and {channels} channels; give the config as a YAML file"
    )


def _refuse_contradiction(path, state, config: ModelConfig) -> None:
    channels = state[_FIRST_CONV].shape[1]
    if channels != config.unet.in_channels:
        what = _OTHER_CHANNELS.get(channels, "another")
        raise CheckpointError(
            f"{path}: is of {'an' if what[0] in 'aeiou' else 'a'} {what} model, whose UNet takes {channels} channels, "
            f"not {config.unet.in_channels}; only text-to-image models can be loaded"
        )
    width, wanted = _context_width(path, state), config.unet.context_dim
    kind = layouts.text_kind(state)
    if width != wanted or (kind is not None and kind != config.text.kind):
        fitting = {768: "pass config='sd1'", 1024: "pass config='sd2' or 'sd2-v'"}.get(
            width, "pass the model's own YAML file"
        )
        raise CheckpointError(
            f"{path}: is {_kind(width)} checkpoint (context of {width}, {kind or 'no'} text encoder), but the config "
            f"{config.name} describes {_kind(wanted)} model (context of {wanted}, {config.text.kind} text encoder): "
            f"{fitting}, or no config"
        )


def _text_layers(path, text, config: ModelConfig, released: bool) -> int:
    """Number of text blocks that run; 0 in the config means that the file says it.

    A released OpenCLIP tower is known by its text_projection or logit_scale, and its last block is not used; without
    them (tiny, diffusers folders) every block of the file is.
    """
    found = len({match[1] for match in map(_BLOCK.match, text) if match})
    if config.text.layers:
        return config.text.layers
    layers = found - 1 if released and config.text.kind == "openclip" else found
    if layers < 1:
        raise CheckpointError(f"{path}: its text encoder has no blocks to run; take the file again from its source")
    return layers


def meta_device():
    """A context in which modules are made of shapes alone, without memory, on every torch."""
    return _shapes_only() if has("device_context") else _meta_empty()


def _shapes_only():
    from torch.overrides import TorchFunctionMode  # not in torch 1.12

    class ShapesOnly(TorchFunctionMode):
        """As torch.device("meta"), but initialisers do nothing: on meta tensors they import 900 modules."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs, name = kwargs or {}, getattr(function, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                return args[0] if args else kwargs["tensor"]
            return function(*args, **({**kwargs, "device": "meta"} if function is torch.empty else kwargs))

    return ShapesOnly()


@contextlib.contextmanager
def _meta_empty():
    # The layers of torch.nn all take their memory from torch.empty. For one thread at a time.
    empty = torch.empty

    def on_meta(*size, dtype=None, device=None):
        return empty(*size, dtype=dtype, device="meta")

    torch.empty = on_meta
    try:
        yield
    finally:
        torch.empty = empty


def factories(config: ModelConfig) -> dict:
    """The three networks of a config, by the names under which `load` returns their weights: functions to make them."""
    return {
        "unet": lambda: UNet(config.unet),
        "autoencoder": lambda: Autoencoder(config.autoencoder),
        "text_encoder": lambda: TextEncoder(config.text),
    }


def expected_shapes(config: ModelConfig) -> dict[str, dict[str, torch.Size]]:
    """Shape of every weight of {unet, autoencoder, text_encoder}."""
    with meta_device():
        return {
            name: {key: weight.shape for key, weight in make().state_dict().items()}
            for name, make in factories(config).items()
        }


def _name_in_file(network: str, name: str, kind: str) -> str:
    """The name under which the original layout has a weight of a network."""
    if network != "text_encoder":
        return layouts.PREFIXES[network] + name
    if kind == "openclip":
        return layouts.OPENCLIP + name
    return layouts.CLIP + next(iter(layouts.openclip_text_to_hf({name: torch.zeros(3)})))


def _validate(path, networks, rest, config: ModelConfig) -> None:
    """Drop what is known to be ignorable from `networks`; refuse what is missing, of wrong shape or dtype, unknown."""
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
            # One block after those that run: the last of a released tower.
            if not _IGNORABLE.match(full) and not (block and int(block[1]) == config.text.layers):
                unknown.append(full)
            del state[name]
    faults = [
        f"{len(names)} {what}: {_list(names)}"
        for names, what in (
            (missing, "missing"),
            (shapes, "of a wrong shape"),
            (dtypes, "not floating point"),
            (unknown, "unknown"),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{path}: its weights do not fit the config {config.name} ({'; '.join(faults)}); "
            f"give the config that belongs to it, or take the file again from its source"
        )


def load(path, config: ModelConfig | None = None, progress: bool | None = None):
    """Read a checkpoint and hold it against a config.

    Returns (config, {"unet": state, "autoencoder": state, "text_encoder": state}), the names and shapes of each state
    exactly those of UNet, Autoencoder and TextEncoder, the tensors on the CPU in the file's floating dtype.
    config None: sd1, sd2 or tiny by the sizes in the file; eps or v is not in the weights, so SD2 is then taken for
    eps unless it is a diffusers folder, which says. A config with text.layers = 0 takes their number from the file.
    Raises CheckpointError, naming the file and the way out, for anything else than a whole model of that config.
    """
    used = (*layouts.PREFIXES.values(), layouts.OPENCLIP, layouts.CLIP)

    def wanted(name: str) -> bool:  # leaves a second set of weights (model_ema) and what else is never used on the disk
        return name.startswith(used) or not _IGNORABLE.match(name)

    contents = read_contents(path, progress, wanted)
    state = contents.state
    refuse_other_models(path, state)
    if config is None:
        config = _detect(path, state)
        if config.name == "sd2" and contents.parameterization == "v":
            config = PRESETS["sd2-v"]
    elif contents.parameterization not in (None, config.parameterization):
        raise CheckpointError(
            f"{path}: its scheduler says that the UNet predicts {contents.parameterization}, and the config "
            f"{config.name} says {config.parameterization}: pass a config with that parameterization, or none"
        )
    _refuse_contradiction(path, state, config)
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
    module_factory, state: dict[str, torch.Tensor], device="cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """Make the module that `module_factory` returns, with the tensors of `state` as its weights and no other memory.

    `state` must hold every weight of the module and is emptied, each tensor freed once it is on `device` in `dtype`
    (None: as it is). Tensors that need no move are taken over and not copied. Returns the module in eval mode.
    """
    with meta_device():
        module = module_factory()
    for name in [name for name, _ in module.named_parameters()]:
        tensor = state.pop(name).to(device=device, dtype=dtype).contiguous()
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    assert not state and not list(module.buffers()), "load() returns exactly the parameters of the module"
    return module.eval()
