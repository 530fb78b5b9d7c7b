"""Random changes of a good checkpoint: it loads equal weights, or one line names the cause; nothing is executed."""

from __future__ import annotations

import contextlib
import os
import warnings
from dataclasses import replace

import pytest
import torch
from checkpoints import Calls, original, random_networks, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sd.checkpoint import layouts
from sd.checkpoint.file_formats import write_safetensors
from sd.checkpoint.load import load
from sd.config.presets import AutoencoderConfig
from sd.errors import CheckpointError, CheckpointWarning

CONFIG = replace(
    small(model_channels=8, context_dim=8, channel_mult=(1,), attention_resolutions=(1,)),
    autoencoder=AutoencoderConfig(channels=8, channel_mult=(1,), num_res_blocks=1, norm_groups=8),
)
STATE = original(CONFIG)
INSIDE = [layouts.UNET, layouts.AUTOENCODER, layouts.OPENCLIP]
# Other spellings of a prefix, and of the attention in the autoencoder.
SPELLINGS = [
    (layouts.AUTOENCODER, "vae."),
    (layouts.OPENCLIP, "conditioner.embedders.0.model."),
    ("mid.attn_1.q.", "mid.attn_1.to_q."),
    ("mid.attn_1.proj_out.", "mid.attn_1.proj_attn."),
    ("", "module."),
]
extra = st.builds(
    str.__add__,
    st.sampled_from(["", *INSIDE, "lora_", "conditioner.", "v_pred", "ztsnr", "model_ema."]),
    st.text("abz.0_é漢-", max_size=8),
)
DTYPES = [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]


def changes_of(names) -> st.SearchStrategy:
    names = st.sampled_from(sorted(names))
    return st.one_of(
        st.tuples(st.just("drop"), names),
        st.tuples(st.just("cast"), names, st.sampled_from(DTYPES)),
        st.tuples(st.just("add"), extra),
        st.tuples(st.just("rename"), names, extra),
        st.tuples(st.just("reshape"), names),
        st.tuples(st.just("call"), extra),
    )


def changed(steps, created, state=STATE) -> dict:
    """Apply the changes to the state dict of a good checkpoint."""
    state = dict(state)
    for action, name, *values in steps:
        if action == "add":
            state[name] = torch.zeros(2)
        elif action == "call":
            state[name] = Calls(os.mkdir, str(created))
        elif isinstance(state.get(name), torch.Tensor):
            if action == "drop":
                del state[name]
            elif action == "cast":
                state[name] = state[name].to(values[0])
            elif action == "rename":
                state[values[0]] = state.pop(name)
            else:
                state[name] = state[name].reshape(-1)
    return state


def spelled(state: dict, spellings) -> dict:
    """Rename like other tools: the weights are the same."""
    for old, new in spellings:
        anywhere = old.startswith("mid")
        state = {
            name.replace(old, new, 1) if anywhere else new + name[len(old) :] if name.startswith(old) else name: value
            for name, value in state.items()
        }
    return state


def check(steps, spellings, suffix, folder) -> None:
    created, path = folder / "created", folder / f"a.{suffix}"
    state = changed(steps, created)
    calls = any(isinstance(value, Calls) for value in state.values())
    if suffix == "safetensors" and not calls:
        write_safetensors(path, spelled(state, spellings), {})
    else:
        torch.save({"state_dict": spelled(state, spellings)}, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckpointWarning)
            _, networks = load(path, CONFIG)
    except CheckpointError as error:
        message = str(error)
        named = [name for _, *names in steps for name in names if isinstance(name, str)]
        inside = (*INSIDE, "v_pred", "ztsnr")  # entries elsewhere are no reason to refuse a file
        causes = [name for name in named if name.startswith(inside)] + ["mkdir"] * calls
        assert message.startswith(f"{path}: ") and "\n" not in message
        message = message[len(str(path)) :]
        assert any(cause in message for cause in causes), message  # other spellings alone are loaded
    else:
        assert not calls
        for network, prefix in zip(("unet", "autoencoder", "text_encoder"), INSIDE):
            for name, loaded in networks[network].items():
                assert loaded.dtype == state[prefix + name].dtype
                assert torch.equal(loaded.flatten(), state[prefix + name].flatten())
    assert not created.exists()


cases = given(
    st.lists(changes_of(STATE), max_size=3),
    st.lists(st.sampled_from(SPELLINGS), unique=True),
    st.sampled_from(["ckpt", "safetensors"]),
)
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


@pytest.mark.slow
@settings(max_examples=60, **COMMON)
@cases
def test_changed_checkpoints(tmp_path_factory, steps, spellings, suffix):
    check(steps, spellings, suffix, tmp_path_factory.getbasetemp())


NETWORKS = random_networks(CONFIG)
PIPELINE = {  # state dict of a pipeline of diffusers
    **layouts.add_prefix(layouts.unet_to_diffusers(NETWORKS["unet"]), "unet."),
    **layouts.add_prefix(layouts.autoencoder_to_diffusers(NETWORKS["autoencoder"]), "vae."),
    **layouts.add_prefix(layouts.openclip_text_to_hf(NETWORKS["text_encoder"]), "text_encoder."),
}


@pytest.mark.slow
@settings(max_examples=25, **COMMON)
@given(st.data(), st.sampled_from([PIPELINE, layouts.original_to_native(STATE)]))
def test_changed_checkpoints_of_other_layouts(tmp_path_factory, data, state):
    folder = tmp_path_factory.getbasetemp()
    steps = data.draw(st.lists(changes_of(state), min_size=1, max_size=3))
    torch.save(changed(steps, folder / "created", state), folder / "a.ckpt")
    for config in (CONFIG, None):
        with warnings.catch_warnings(), contextlib.suppress(CheckpointError):
            warnings.simplefilter("ignore", CheckpointWarning)
            load(folder / "a.ckpt", config)
    assert not (folder / "created").exists()


@pytest.mark.nightly
@settings(max_examples=2000, **COMMON)
@cases
def test_2000_changed_checkpoints(tmp_path_factory, steps, spellings, suffix):
    check(steps, spellings, suffix, tmp_path_factory.getbasetemp())
