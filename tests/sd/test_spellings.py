"""Checkpoints as other tools write them: each loads the same weights, or is refused by one line that names the cause."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import original, random_networks, same, small, write_pickle

from sd.checkpoint import diffusers_folder, layouts
from sd.checkpoint import load as checkpoint
from sd.checkpoint.contents import describe_prediction, summary
from sd.checkpoint.diffusers_folder import write_folder
from sd.checkpoint.file_formats import write_ckpt, write_safetensors
from sd.checkpoint.load import load
from sd.checkpoint.networks import expected_shapes
from sd.config.presets import PRESETS
from sd.errors import CheckpointError, CheckpointWarning

SD2, SD1 = small("openclip"), small("clip")
NETWORKS = {config.name: random_networks(config) for config in (SD1, SD2)}
VAE, UNET = layouts.AUTOENCODER, layouts.UNET


@pytest.fixture(autouse=True)
def warnings_are_errors(monkeypatch):
    monkeypatch.setattr(diffusers_folder, "write_tokenizer", lambda *_: None)  # takes seconds, and is not read
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        yield


def file(tmp_path: Path, state: dict, metadata: dict | None = None) -> Path:
    write_safetensors(tmp_path / "a.safetensors", state, metadata or {})
    return tmp_path / "a.safetensors"


def renamed(state: dict, *rules: tuple[str, str]) -> dict:
    result = state
    for pattern, new in rules:
        result = {re.sub(pattern, new, name): tensor for name, tensor in result.items()}
    assert result.keys() != state.keys(), rules
    return result


def loads_equal(path: Path, config=SD2, **options) -> None:
    loaded, networks = load(path, config, **options)
    assert loaded == config
    for network, state in NETWORKS[config.name].items():
        assert same(networks[network], state), network


def refused(path, config=SD2, **options) -> str:
    with pytest.raises(CheckpointError) as error:
        load(path, config, **options)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def transformers_names(state: dict, layers: int = 0) -> dict:
    """The text encoder under transformers' names, with repetitions of its first block up to `layers`."""
    text = layouts.with_prefix(state, layouts.OPENCLIP)
    own = {name: tensor for name, tensor in text.items() if name in NETWORKS[SD2.name]["text_encoder"]}
    for layer in range(SD2.text.layers, layers):
        first = layouts.with_prefix(own, "transformer.resblocks.0.")
        own.update({f"transformer.resblocks.{layer}.{name}": tensor * 2 for name, tensor in first.items()})
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(layouts.OPENCLIP)}
    return {**rest, **layouts.add_prefix(layouts.openclip_text_to_hf(own), layouts.CLIP)}


# --- names in single files

STATE = original(SD2)
OPENCLIP = re.escape(layouts.OPENCLIP)
ATTENTION = r"(mid\.attn_1\.)"
NEWER = [
    (ATTENTION + "([qkv])\\.", r"\1to_\2."),
    (ATTENTION + r"proj_out\.", r"\1to_out.0."),
    (ATTENTION + r"norm\.", r"\1group_norm."),
]
OLDER = [
    (ATTENTION + r"q\.", r"\1query."),
    (ATTENTION + r"k\.", r"\1key."),
    (ATTENTION + r"v\.", r"\1value."),
    (ATTENTION + r"proj_out\.", r"\1proj_attn."),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [
        pytest.param([("^first_stage_model", "vae")], id="vae."),
        pytest.param([(f"^{OPENCLIP}", "conditioner.embedders.0.model.")], id="generative-models"),
        pytest.param([("^", "module.")], id="DistributedDataParallel"),
        pytest.param([(f"^{re.escape(UNET)}", f"{UNET}_orig_mod.")], id="torch.compile"),
        pytest.param([(f"^{re.escape(UNET)}", "diffusion_model.")], id="diffusion_model."),
        pytest.param(NEWER, id="attention of newer diffusers"),
        pytest.param(OLDER, id="attention of older diffusers"),
        pytest.param(
            [(f"^{OPENCLIP}ln_final", f"{layouts.OPENCLIP}transformer.text_model.final_layer_norm")],
            id="half-converted text encoder",
        ),
    ],
)
def test_names_of_other_tools_are_read(tmp_path, rules):
    loads_equal(file(tmp_path, renamed(STATE, *rules)))


def test_text_encoder_of_sd2_may_have_names_of_transformers(tmp_path):
    state = transformers_names(STATE)
    loads_equal(file(tmp_path, state))
    loads_equal(file(tmp_path, {name.replace("text_model.", ""): tensor for name, tensor in state.items()}))
    loads_equal(file(tmp_path, transformers_names(STATE, SD2.text.layers + 1)))  # with the block that is not used
    loads_equal(file(tmp_path, renamed(state, ("transformer.text_model", "model.transformer.text_model"))))
    del state[f"{layouts.CLIP}text_model.encoder.layers.1.mlp.fc1.bias"]
    assert "text_model.encoder.layers.1.mlp.fc1.bias" in refused(file(tmp_path, state))


def test_position_ids_among_names_of_openclip_are_ignored(tmp_path):  # as in Waifu Diffusion 1.4
    name = f"{layouts.OPENCLIP}transformer.text_model.embeddings.position_ids"
    loads_equal(file(tmp_path, {**STATE, name: torch.arange(77)[None]}))


def test_full_openclip_tower_under_names_of_transformers_has_23_layers():
    config = replace(SD2, text=replace(SD2.text, layers=0))
    for layers, used in ((24, 23), (23, 23), (2, 2)):
        names = [f"transformer.resblocks.{layer}.ln_1.weight" for layer in range(layers)]
        assert checkpoint._with_text_layers("a", names, config, released=False).text.layers == used


@pytest.mark.parametrize("preset", ["sd1", "sd2"])
def test_width_tells_the_text_encoders_apart(preset):
    config, number = PRESETS[preset], torch.zeros(())
    shapes = {UNET + name: shape for name, shape in expected_shapes(config)["unet"].items()}
    state = {name: number.expand(shape) for name, shape in shapes.items()}
    state[f"{layouts.CLIP}text_model.final_layer_norm.weight"] = number
    assert checkpoint.detect.__module__ == "sd.checkpoint.detect"
    from sd.checkpoint.detect import text_kind

    assert text_kind("a", state) == config.text.kind


def test_pipeline_state_dict_in_names_of_diffusers(tmp_path):
    networks = NETWORKS[SD1.name]
    state = {
        **layouts.add_prefix(layouts.unet_to_diffusers(networks["unet"]), "unet."),
        **layouts.add_prefix(layouts.autoencoder_to_diffusers(networks["autoencoder"]), "vae."),
        **layouts.add_prefix(layouts.openclip_text_to_hf(networks["text_encoder"]), "text_encoder."),
    }
    loads_equal(file(tmp_path, state), SD1)


def test_one_weight_under_two_names_uses_the_original(tmp_path):
    state = {**STATE, "vae.decoder.conv_in.weight": torch.zeros(3)}
    with pytest.warns(CheckpointWarning, match=r"1 entries .*: vae\.decoder\.conv_in\.weight$"):
        loads_equal(file(tmp_path, state))


# --- shapes and precisions


def test_attention_as_matrices_or_convolutions(tmp_path):
    state = {name: w.flatten(1) if re.search(ATTENTION, name) and w.dim() == 4 else w for name, w in STATE.items()}
    assert any(state[name].dim() != STATE[name].dim() for name in state)
    loads_equal(file(tmp_path, state))
    projected = re.compile(r"\.proj_(in|out)\.weight$")
    loads_equal(
        file(
            tmp_path, {n: w[:, :, None, None] if projected.search(n) and w.dim() == 2 else w for n, w in STATE.items()}
        )
    )
    matrix, shape = torch.randn(3, 2), torch.Size([3, 2, 1, 1])
    assert checkpoint._matrix_or_convolution(matrix, shape).shape == shape
    assert checkpoint._matrix_or_convolution(torch.randn(2, 3), shape).shape == (2, 3)
    name = f"{VAE}decoder.mid.attn_1.q.weight"
    assert f"{name} (3, 3, 1, 1)" in refused(file(tmp_path, {**STATE, name: torch.zeros(3, 3)}))


def test_precisions_may_differ_within_one_attention(tmp_path):
    state = original(SD1)
    half = [
        name for name in state if name.endswith(("to_q.weight", "self_attn.v_proj.weight", "self_attn.k_proj.bias"))
    ]
    path = file(tmp_path, {**state, **{name: state[name].half() for name in half}})
    _, networks = load(path, SD1)
    joined = networks["text_encoder"]["transformer.resblocks.0.attn.in_proj_weight"]
    expected = state[f"{layouts.CLIP}text_model.encoder.layers.0.self_attn.v_proj.weight"]
    assert joined.dtype == torch.float32 and torch.equal(joined.chunk(3)[2], expected.half().float())


# --- other entries


def test_entries_outside_the_networks_are_named_and_ignored(tmp_path):
    extra = {"lora_unet_mid.lora_up.weight": torch.zeros(2), "something": torch.zeros(2)}
    with pytest.warns(CheckpointWarning, match="2 entries .*lora_unet_mid.lora_up.weight, something"):
        loads_equal(file(tmp_path, {**STATE, **extra}))


def test_unknown_entries_inside_are_refused_or_ignored_on_request(tmp_path):
    name = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.lora_up.weight"
    path = file(tmp_path, {**STATE, name: torch.zeros(2)})
    message = refused(path)
    assert name in message and "--ignore-unknown-keys" in message
    with pytest.warns(CheckpointWarning, match=re.escape(name)):
        loads_equal(path, ignore_unknown_keys=True)
    missing = file(tmp_path, {n: w for n, w in STATE.items() if n != f"{UNET}out.2.bias"})
    assert f"{UNET}out.2.bias" in refused(missing, ignore_unknown_keys=True)


@pytest.mark.parametrize("marker", ["v_pred", f"{UNET}v_pred"])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_marker_of_the_prediction_type(tmp_path, marker, suffix):
    state, path = {**STATE, marker: torch.empty(0)}, tmp_path / f"a.{suffix}"
    write_ckpt(path, state, 1) if suffix == "ckpt" else write_safetensors(path, state, {})
    message = refused(path)
    assert "predicts v" in message and "no config" not in message
    config = replace(SD2, parameterization="v")
    assert load(path, config)[0] == config
    assert describe_prediction(path, config) == f"predicts v, by its entry {marker}"


@pytest.mark.parametrize(
    ("key", "eps", "v"),
    [
        ("modelspec.prediction_type", "epsilon", "v"),
        ("modelspec.predict_key", "epsilon", "v"),
        ("modelspec.architecture", "stable-diffusion-v2-512", "stable-diffusion-v2-768-v"),
    ],
)
def test_prediction_type_in_metadata(tmp_path, key, eps, v):
    assert f"metadata {key}" in refused(file(tmp_path, STATE, {key: v}))
    path = file(tmp_path, STATE, {key: eps})
    assert describe_prediction(path, SD2) == f"predicts eps, by its metadata {key}"


def test_yaml_beside_a_file_is_named_where_the_prediction_type_is_assumed(tmp_path):
    path = file(tmp_path, STATE)
    described = describe_prediction(path, SD2)
    assert "assumed to predict eps" in described and ".yaml beside" not in described
    path.with_suffix(".yaml").write_text("")
    assert f"--config {path.with_suffix('.yaml')}" in describe_prediction(path, SD2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_noise_schedule_is_reported(tmp_path, dtype):
    alphas = STATE["alphas_cumprod"]
    loads_equal(file(tmp_path, {**STATE, "alphas_cumprod": alphas.to(dtype)}))
    roots = alphas.sqrt() - alphas[-1].sqrt()  # zero terminal SNR (arXiv 2305.08891)
    zero_snr = (roots / roots[0]) ** 2 * alphas[0]
    for other in (zero_snr, alphas[:500], torch.zeros(1000)):
        with pytest.warns(CheckpointWarning, match="alphas_cumprod is of another noise schedule"):
            loads_equal(file(tmp_path, {**STATE, "alphas_cumprod": other.to(dtype).contiguous()}))


def test_zero_terminal_snr_is_refused(tmp_path):
    path = file(tmp_path, {**STATE, "ztsnr": torch.empty(0)})
    assert "ztsnr is of a model with zero terminal SNR" in refused(path)
    with pytest.warns(CheckpointWarning, match="ztsnr asks for zero terminal SNR; the ordinary noise schedule is used"):
        loads_equal(path, ignore_unknown_keys=True)


# --- parts in other files


def without(*networks: str) -> dict:
    removed = tuple({"vae": VAE, "text": "cond_stage_model."}[network] for network in networks)
    return {name: tensor for name, tensor in STATE.items() if not name.startswith(removed)}


def test_missing_parts_are_named_with_their_options(tmp_path):
    message = refused(file(tmp_path, without("vae")))
    assert "has no autoencoder" in message and "pass --vae FILE," in message and "text" not in message.split(":")[1]
    message = refused(file(tmp_path, without("vae", "text")))
    assert (
        "no autoencoder" in message and "no text encoder" in message and "--vae FILE and --text-encoder FILE" in message
    )


@pytest.mark.parametrize("layout", ["original", "prefixed", "diffusers", "whole", "folder", "model folder", "training"])
def test_autoencoder_from_another_file(tmp_path, layout):
    networks = NETWORKS[SD2.name]
    vae, path = networks["autoencoder"], tmp_path / "vae.safetensors"
    if layout.endswith("folder"):
        write_folder(tmp_path / "folder", networks, SD2)
        path = tmp_path / "folder" / ("vae" if layout == "folder" else "")
    else:
        state = {
            "original": vae,
            "prefixed": layouts.add_prefix(vae, VAE),
            "diffusers": layouts.autoencoder_to_diffusers(vae),
            "whole": STATE,
            "training": {**vae, **{name: torch.zeros(1) for name in ("global_step", "loss.logvar", "model_ema.decay")}},
        }[layout]
        write_safetensors(path, state, {})
    loads_equal(file(tmp_path, without("vae")), vae=path)
    replaced = {**STATE, **{name: tensor * 2 for name, tensor in layouts.add_prefix(vae, VAE).items()}}
    loads_equal(file(tmp_path, replaced), vae=path)


@pytest.mark.parametrize("layout", ["openclip", "transformers", "comfyui", "whole", "clip with vision"])
def test_text_encoder_from_another_file(tmp_path, layout):
    text = NETWORKS[SD2.name]["text_encoder"]
    hf = layouts.openclip_text_to_hf(text)
    state = {
        "openclip": text,
        "transformers": hf,
        "comfyui": layouts.add_prefix(hf, "clip_h.transformer."),
        "whole": STATE,
        "clip with vision": {**hf, "vision_model.pre_layrnorm.weight": torch.zeros(2), "logit_scale": torch.zeros(())},
    }[layout]
    write_safetensors(tmp_path / "text.safetensors", state, {})
    loads_equal(file(tmp_path, without("text")), text_encoder=tmp_path / "text.safetensors")


def test_unet_alone_with_both_parts(tmp_path):
    networks = NETWORKS[SD2.name]
    for state in (networks["unet"], layouts.unet_to_diffusers(networks["unet"])):
        write_safetensors(tmp_path / "whole.safetensors", STATE, {})
        path = file(tmp_path, state)
        assert "--vae FILE and --text-encoder FILE" in refused(path)
        loads_equal(path, vae=tmp_path / "whole.safetensors", text_encoder=tmp_path / "whole.safetensors")


def test_wrong_part_is_refused(tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    write_safetensors(wrong, {"x": torch.zeros(2)}, {})
    for option, noun in (("vae", "autoencoder"), ("text_encoder", "text encoder")):
        with pytest.raises(CheckpointError, match=f"wrong.safetensors: contains no {noun}"):
            load(file(tmp_path, STATE), SD2, **{option: wrong})


def test_faults_of_a_part_are_those_of_its_file(tmp_path):
    whole, vae = file(tmp_path, STATE), tmp_path / "vae.safetensors"
    other = {n: w if n != "decoder.conv_in.weight" else w[:, :2] for n, w in NETWORKS[SD2.name]["autoencoder"].items()}
    write_safetensors(vae, other, {})
    with pytest.raises(CheckpointError, match=r"^\S+vae.safetensors: .*1 of a wrong shape: .*decoder.conv_in.weight"):
        load(whole, SD2, vae=vae)


# --- folders of diffusers


def folder(tmp_path: Path, config=SD2, **settings) -> Path:
    path = tmp_path / "folder"
    write_folder(path, NETWORKS[config.name], config)
    scheduler = path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), **settings}))
    return path


def shard(path: Path, suffix: str, parts: int = 3, variant: str = "") -> None:
    """Split the UNet of a folder like diffusers."""
    whole = path / "unet" / "diffusion_pytorch_model.safetensors"
    state = checkpoint.read_tensors(checkpoint.index(whole))
    whole.unlink()
    table, names = {}, list(state)
    for i in range(parts):
        name = f"diffusion_pytorch_model{variant}-{i + 1:05}-of-{parts:05}.{suffix}"
        part = {key: state[key] for key in names[i::parts]}
        torch.save(part, path / "unet" / name) if suffix == "bin" else write_safetensors(path / "unet" / name, part, {})
        table.update(dict.fromkeys(part, name))
    index = f"diffusion_pytorch_model.{suffix}.index{variant}.json"
    (path / "unet" / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


@pytest.mark.parametrize(("suffix", "variant"), [("safetensors", ""), ("bin", ""), ("safetensors", ".fp16")])
def test_shards_are_read(tmp_path, suffix, variant):
    path = folder(tmp_path)
    shard(path, suffix, variant=variant)
    loads_equal(path)


@pytest.mark.parametrize(
    "value", ["missing.safetensors", "../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", 3, None]
)
def test_wrong_shards_are_refused(tmp_path, value):
    path = folder(tmp_path)
    shard(path, "safetensors")
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["conv_in.weight"] = value
    index.write_text(json.dumps(table))
    assert index.name in refused(path)


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_variants_and_bin_files_are_read(tmp_path, variant):
    path = folder(tmp_path)
    for weights in list(path.glob("*/*.safetensors")):
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))
    loads_equal(path)
    for weights in list(path.glob("*/*.safetensors")):
        name = "pytorch_model.bin" if weights.parent.name == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(checkpoint.read_tensors(checkpoint.index(weights)), weights.parent / name)
        weights.unlink()
    loads_equal(path)


def change(settings: Path, **values) -> None:
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **values}))


def test_settings_of_the_parts_that_are_used_are_compared(tmp_path):
    path = folder(tmp_path)
    change(path / "vae" / "config.json", scaling_factor=0.13025)  # of Stable Diffusion XL
    change(path / "text_encoder" / "config.json", num_hidden_layers=1)  # clip skip
    whole = file(tmp_path, STATE)
    for vae in (path, path / "vae"):
        assert_refuses("scaling_factor '0.13025'", whole, vae=vae)
    for text_encoder in (path, path / "text_encoder"):
        assert_refuses("num_hidden_layers '1'", whole, text_encoder=text_encoder)
    assert_refuses("num_hidden_layers '1'", path, vae=whole)
    loads_equal(path, vae=whole, text_encoder=whole)


def assert_refuses(text: str, path: Path, **options) -> None:
    with pytest.raises(CheckpointError, match=text):
        load(path, SD2, **options)


def test_text_encoder_of_a_folder_without_text_model(tmp_path):
    path = folder(tmp_path)
    weights = path / "text_encoder" / "model.safetensors"
    state = checkpoint.read_tensors(checkpoint.index(weights))
    write_safetensors(weights, {name.replace("text_model.", ""): tensor for name, tensor in state.items()}, {})
    loads_equal(path)


def test_folder_without_autoencoder(tmp_path):
    path = folder(tmp_path)
    (path / "vae").rename(tmp_path / "vae")
    assert "pass --vae FILE" in refused(path)
    loads_equal(path, vae=tmp_path / "vae")


@pytest.mark.parametrize(("preset", "channels"), [("sd1", 320), ("sd2", 320), ("tiny", 40)])
def test_prediction_type_of_a_folder_decides(preset, channels):
    from sd.checkpoint.detect import Prediction, detect, reject_contradiction

    config = PRESETS[preset]
    text = f"{layouts.CLIP}text_model.x" if preset == "sd1" else f"{layouts.OPENCLIP}x"
    state = {
        f"{UNET}input_blocks.0.0.weight": torch.empty(channels, 4, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.empty(8, config.unet.context_dim),
        text: torch.empty(1),
    }
    for parameterization in ("eps", "v"):
        recorded = Prediction(parameterization, "scheduler")
        detected = detect("a", state, recorded)
        assert detected.parameterization == parameterization and detected.unet == config.unet
        reject_contradiction("a", state, detected, recorded)
        other = replace(config, parameterization="v" if parameterization == "eps" else "eps")
        with pytest.raises(CheckpointError) as error:
            reject_contradiction("a", state, other, recorded)
        assert "no config" not in str(error.value) and "pass " in str(error.value)
        # Of another architecture: advice on the prediction type would lead to the next error.
        wrong = replace(PRESETS["sd2" if preset == "sd1" else "sd1"], parameterization=other.parameterization)
        with pytest.raises(CheckpointError, match=f"the config {wrong.name} describes"):
            reject_contradiction("a", state, wrong, recorded)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"_class_name": "TCDScheduler"}, "TCDScheduler is not used, and no sampler here is the same"),
        ({"_class_name": "LCMScheduler"}, "select LCMScheduler: --sampler lcm$"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            "euler --timestep-spacing trailing$",
        ),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}, "ddim --timestep-spacing trailing$"),
        ({"_class_name": "DDIMScheduler", "clip_sample": True}, "--sampler ddim, without its clip_sample True$"),
        ({"_class_name": "DDIMScheduler", "set_alpha_to_one": True}, "without its set_alpha_to_one True$"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "without its use_beta_sigmas True$"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace", "use_karras_sigmas": True},
            "--sampler dpm_solver --sigmas karras$",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "--sampler dpm_solver_sde$",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "--sampler dpm_solver, without its final_sigmas_type zero$"),
    ],
)
def test_other_schedulers_are_reported(tmp_path, settings, text):
    path = folder(tmp_path, **settings)
    with pytest.warns(CheckpointWarning, match=text):
        loads_equal(path)


def test_a_default_scheduler_is_only_listed(tmp_path):
    path = folder(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loads_equal(path)
    assert "scheduler: PNDMScheduler: --sampler plms" in summary(path)


# --- messages


def embedding(protocol: int) -> bytes:
    import pickle

    return pickle.dumps({"string_to_token": {"*": 265}, "string_to_param": {}, "name": "style"}, protocol)


def test_textual_inversion_is_named(tmp_path):
    path = tmp_path / "style.pt"
    write_pickle(path, embedding(2))
    assert "textual inversion embedding" in refused(path)
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.zeros(1, 768))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": parameters, "name": "style"}, path)
    assert "textual inversion embedding" in refused(path)
    torch.save({"<style>": torch.zeros(768)}, path)
    assert "textual inversion embedding" in refused(path)
    assert "textual inversion embedding" in refused(file(tmp_path, {"emb_params": torch.zeros(2, 1024)}))


def test_pickled_module_is_named(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "a.pt")
    assert "a pickled module instead of weights" in refused(tmp_path / "a.pt")


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no fp8")
def test_fp8_in_a_torch_file_is_named(tmp_path):
    torch.save({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.ckpt")
    message = refused(tmp_path / "a.ckpt")
    assert "float8_e4m3fn" in message and "fp16 or bf16" in message and "trust" not in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"error": "Repository not found"}', "is JSON"),
        (b'\xef\xbb\xbf{"error": 1}', "is JSON"),
        (b"\xef\xbb\xbf<!DOCTYPE html>", "web page"),
        ("\ufeff<html>".encode("utf-16-le"), "web page"),
        ("\ufeff<html>".encode("utf-16-be"), "web page"),
        (b"Entry not found", "(Entry not found)"),
        (b"Invalid username or password.\n", "(Invalid username or password.)"),
        (b"Rar!\x1a\x07\x00", "RAR"),
    ],
)
def test_failed_downloads_are_named(tmp_path, content, reason):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert reason in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("address", ["https://example.org/a.safetensors", "hf://a/b"])
def test_addresses_and_empty_paths_are_refused(address):
    assert "nothing is downloaded" in refused(address)
    for path in ("", " "):
        with pytest.raises(CheckpointError, match="is an empty path"):
            load(path)
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        load(Path(address))
