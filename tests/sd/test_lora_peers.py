"""LoRA and textual inversion against diffusers, peft and transformers, on small models with the same weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lora_files import kohya
from models import relative_error

from sd import StableDiffusion
from sd.checkpoint.diffusers_folder import write_folder
from sd.checkpoint.file_formats import write_safetensors
from sd.config.presets import AutoencoderConfig, ModelConfig, TextConfig, UNetConfig

pytestmark = pytest.mark.peers
BOUND = 1e-5


def _config(kind: str) -> ModelConfig:
    heads = {"num_heads": 4} if kind == "clip" else {"num_head_channels": 8, "use_linear_in_transformer": True}
    # Two residual blocks per level and three levels: the block numbers of the released models.
    unet = UNetConfig(
        context_dim=64, model_channels=32, channel_mult=(1, 2, 2), attention_resolutions=(2, 1), norm_groups=8, **heads
    )
    text = TextConfig(kind, width=64, layers=2)
    return ModelConfig(f"peer-{kind}", unet, text, AutoencoderConfig(channels=16, channel_mult=(1, 2), norm_groups=8))


@pytest.fixture(scope="module", params=["clip", "openclip"])
def pair(request, tmp_path_factory):
    """(our model, diffusers' pipeline) with the same random weights, of SD1's and SD2's architecture."""
    diffusers = pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    pytest.importorskip("peft", reason="the extra `peers` is not installed")
    config = _config(request.param)
    ours = StableDiffusion.random(config)
    folder = tmp_path_factory.mktemp(request.param) / "folder"
    folder.mkdir()
    networks = {name: network.state_dict() for name, network in ours._networks().items()}
    write_folder(folder, networks, config)
    return ours, diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)


def _tokens():
    return torch.randint(0, 49000, (2, 77), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _outputs(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 77, 64, generator=generator)
    times, tokens = torch.tensor([501.0, 20.0]), _tokens()
    return [
        (ours.unet(x, times, context), theirs.unet(x, times, context).sample),
        (ours.text_encoder(tokens), theirs.text_encoder(tokens).last_hidden_state),
    ]


def _compare(pair, path, scale=1.0):
    """Load the file into both, compare UNet and text encoder, and unload it from both."""
    ours, theirs = pair
    before = [mine for mine, _ in _outputs(*pair)]
    ours.load_lora(path, scale)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
        theirs.set_adapters(["a"], [scale])
    errors = []
    for (mine, reference), old in zip(_outputs(*pair), before):
        assert relative_error(mine, old) > 0.01
        errors.append(relative_error(mine, reference))
    ours.unload_lora()
    theirs.unload_lora_weights()
    assert all(torch.equal(mine, old) for (mine, _), old in zip(_outputs(*pair), before))
    print("relative errors of UNet and text encoder:", errors)
    assert max(errors) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_kohya(pair, tmp_path, scale):
    """Every linear layer and convolution that diffusers' conversion of this layout reads, rank 4 and alpha 2."""
    ours, _ = pair
    write_safetensors(tmp_path / "a.safetensors", kohya(ours), {"format": "pt"})
    _compare(pair, tmp_path / "a.safetensors", scale)


@pytest.mark.slow
@pytest.mark.parametrize("alphas", [{"lora_alpha": 4}, {"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 2}}])
def test_files_that_diffusers_saves(pair, tmp_path, alphas):
    import peft
    from diffusers import StableDiffusionPipeline
    from peft.utils import get_peft_model_state_dict

    _, theirs = pair
    unet_targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2", "proj_in"]
    text_targets = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]
    layers, metadata = {}, {}
    for name, network, modules in (
        ("unet", theirs.unet, unet_targets),
        ("text_encoder", theirs.text_encoder, text_targets),
    ):
        network = copy.deepcopy(network)
        chosen = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False, **alphas)
        network.add_adapter(chosen, "saved")
        for parameter in (p for n, p in network.named_parameters() if "lora_" in n):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        layers[f"{name}_lora_layers"] = {
            key: value.clone() for key, value in get_peft_model_state_dict(network, adapter_name="saved").items()
        }
        metadata[f"{name}_lora_adapter_metadata"] = chosen.to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    _compare(pair, tmp_path / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize("form", ["diffusers", "a1111.pt", "a1111.safetensors"])
@torch.no_grad()
def test_textual_inversion(pair, tmp_path, form):
    """Token ids and outputs of the text encoder for a prompt with a word of three vectors."""
    ours, theirs = pair
    vectors, token = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)), f"<{form}>"
    path = tmp_path / ("a.safetensors" if form.endswith("safetensors") else "a.pt")
    if form == "diffusers":
        torch.save({token: vectors}, path)
    elif form == "a1111.pt":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": token}, path)
    else:
        write_safetensors(path, {"emb_params": vectors}, {"format": "pt"})
    prompts = [f"a photo of {token}, in colour", f"{token} and {token}", "a photo"]
    ours.load_embedding(path, token)
    theirs.load_textual_inversion(path.parent, weight_name=path.name, token=token)
    converted = theirs.maybe_convert_prompt(prompts, theirs.tokenizer)
    tokens = theirs.tokenizer(
        converted, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    reference = theirs.text_encoder(tokens).last_hidden_state
    error = relative_error(ours.encode_prompts(prompts), reference)
    print("relative error of the text encoder:", error)
    assert error <= BOUND
    assert relative_error(ours.encode_prompts([prompts[2].replace("photo", "cat")]), reference[2:]) > 0.01
