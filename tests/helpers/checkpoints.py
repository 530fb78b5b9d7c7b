"""Small random models in the layouts of the released files, for tests of loading and converting."""

from __future__ import annotations

import pickle
import zipfile

import torch

from sd.checkpoint import layouts
from sd.checkpoint.networks import expected_shapes
from sd.config.presets import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig
from sd.sampling.schedule import Schedule

UNET = {
    "context_dim": 64,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2, 1),
    "norm_groups": 8,
}
AUTOENCODER = AutoencoderConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8)


def small(kind: str = "openclip", layers: int = 2, **unet) -> ModelConfig:
    """A two-level model of SD2 (openclip) or SD1 (clip) architecture; keyword arguments change its UNetConfig."""
    heads = {"num_head_channels": 8, "use_linear_in_transformer": True} if kind == "openclip" else {"num_heads": 4}
    return ModelConfig(
        f"small-{kind}",
        UNetConfig(**{**UNET, **heads, **unet}),
        TextConfig(kind, width=unet.get("context_dim", 64), layers=layers, vocab_size=50),
        AUTOENCODER,
    )


def random_networks(config: ModelConfig, dtype=torch.float32, seed: int = 0) -> dict:
    """Random weights of {unet, autoencoder, text_encoder} by the names of the modules."""
    generator = torch.Generator().manual_seed(seed)
    return {
        network: {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for network, shapes in expected_shapes(config).items()
    }


def original(config: ModelConfig, dtype=torch.float32, released: bool = True) -> dict:
    """Random weights in the original layout; `released` adds the unused entries of a released file."""
    state = layouts.join_networks(random_networks(config, dtype), config.text.kind)
    if not released:
        return state
    generator = torch.Generator().manual_seed(1)
    if config.text.kind == "openclip":
        blocks = f"{layouts.OPENCLIP}transformer.resblocks."
        first = layouts.with_prefix(state, f"{blocks}0.")
        state.update({f"{blocks}{config.text.layers}.{name}": tensor * 2 for name, tensor in first.items()})
        state[f"{layouts.OPENCLIP}text_projection"] = torch.randn(config.text.width, 8, generator=generator).to(dtype)
        state[f"{layouts.OPENCLIP}logit_scale"] = torch.tensor(4.6)
        state[f"{layouts.OPENCLIP}attn_mask"] = torch.zeros(77, 77)
    else:
        state[f"{layouts.CLIP}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name in (
        "betas",
        "posterior_mean_coef2",
        "sqrt_recipm1_alphas_cumprod",
        "lvlb_weights",
        "logvar",
    ):
        state[name] = torch.rand(1000, generator=generator)
    state["alphas_cumprod"] = Schedule().alphas_cumprod.float()
    state["model_ema.decay"] = torch.tensor(0.9999)
    state["model_ema.num_updates"] = torch.tensor(7)
    state["model_ema.diffusion_modelinput_blocks00weight"] = torch.rand(3, 3, generator=generator)
    state["first_stage_model.loss.logvar"] = torch.zeros(())
    return state


def same(a: dict, b: dict) -> bool:
    """Whether two state dicts have the same names, dtypes, shapes and bits."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def write_pickle(path, data: bytes) -> None:
    """Write a torch zip file with the pickle `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")


class Calls:
    """An object whose pickle calls `function(*args)` in an ordinary unpickler."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def torch_file_calling(path, function, *args, protocol: int = 2, **options) -> None:
    """Write a torch zip file whose state dict calls `function(*args)`."""
    write_pickle(path, pickle.dumps({"state_dict": {"x": Calls(function, *args, **options)}}, protocol=protocol))


def stack_global(module: str, name: str) -> bytes:
    """The start of a pickle that puts a name on the stack."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93"
