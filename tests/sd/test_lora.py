"""LoRA: layouts, merged weights against dense fp32 products, exact removal, refusals, and no cost when merged."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from checkpoints import small
from counting import Counting, needs_counting
from lora_files import WEIGHTS, factors, kohya, kohya_key
from models import relative_error, smallest
from PIL import Image
from selection import slow_or_nightly

from sd import Optimisations, StableDiffusion
from sd.checkpoint.file_formats import write_safetensors
from sd.checkpoint.lora import Update, targets
from sd.errors import CheckpointError, ConfigError, Unavailable
from sd.features import has
from sd.txt2img import main

OUTPUT = {"kohya": (".lora_down.weight", ".lora_up.weight"), "peft": (".lora_A.weight", ".lora_B.weight")}


def _model(kind="openclip", **fields) -> StableDiffusion:
    return StableDiffusion.random(small(kind), optimisations=Optimisations(**fields))


def _copy(model) -> dict:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def _same(model, state) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(
        own[name].dtype == weight.dtype and torch.equal(own[name], weight) for name, weight in state.items()
    )


def _file(path, state, metadata=None):
    if path.suffix == ".safetensors":
        write_safetensors(path, state, metadata or {})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("kind", ["clip", "openclip"])
def test_merged_weights_are_the_dense_sum(tmp_path, kind, layout, suffix):
    """W + s * alpha / r * up @ down, with another rank and alpha for each key; other weights are unchanged."""
    model, state, expected = _model(kind), {}, {}
    before = _copy(model)
    for i, (module, (name, third)) in enumerate(WEIGHTS.items()):
        name = name if name in before else f"{name}.weight"
        weight = expected.setdefault(name, before[name].double())
        rows = weight if third is None else weight.chunk(3)[third]  # a view: the sum is written into `expected`
        rank, alpha = 1 + i % 5, 0.5 * i
        down, up = factors(rows.shape, rank, i)
        key = kohya_key(module) if layout == "kohya" else module
        state.update({key + end: factor for end, factor in zip(OUTPUT[layout], (down, up))})
        state[f"{key}.alpha"] = torch.tensor(alpha)
        product = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
        rows += 0.7 * alpha / rank * product.reshape(rows.shape)
    model.load_lora(_file(tmp_path / f"lora{suffix}", state), 0.7)
    for name, weight in model.state_dict().items():
        if name in expected:
            assert torch.allclose(weight.double(), expected[name], rtol=1e-6, atol=1e-6), name
        else:
            assert torch.equal(weight, before[name]), name
    assert sum(not torch.equal(before[name], model.state_dict()[name]) for name in expected) >= len(expected) - 1


def test_older_layouts_of_diffusers_and_original_names(tmp_path):
    """Attention processors (with and without `unet.`), lora_linear_layer, and kohya's files with the original's names."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    text = "text_encoder.text_model.encoder.layers.0.self_attn"
    spellings = {
        f"unet.{block}.to_q": [
            (f"unet.{block}.processor.to_q_lora", ".down.weight", ".up.weight"),
            (f"{block}.processor.to_q_lora", ".down.weight", ".up.weight"),
            (f"unet.{block}.to_q.lora", ".down.weight", ".up.weight"),
            ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"),
        ],
        f"unet.{block}.to_out.0": [(f"unet.{block}.processor.to_out_lora", ".down.weight", ".up.weight")],
        f"{text}.v_proj": [
            (f"{text}.to_v_lora", ".down.weight", ".up.weight"),
            (f"{text}.v_proj.lora_linear_layer", ".down.weight", ".up.weight"),
        ],
        f"{text}.out_proj": [(f"{text}.to_out_lora", ".down.weight", ".up.weight")],
    }
    model = _model()
    before = _copy(model)
    for module, keys in spellings.items():
        down, up = factors(targets(before)[module].shape, 3, 0)
        model.load_lora(_file(tmp_path / "a.pt", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}))
        expected = _copy(model)
        assert not torch.equal(targets(expected)[module], targets(before)[module])
        model.unload_lora()
        for key, *ends in keys:
            model.load_lora(_file(tmp_path / "b.pt", {key + end: factor for end, factor in zip(ends, (down, up))}))
            assert _same(model, expected), key
            model.unload_lora()
    assert _same(model, before)


def test_alpha_of_peft_is_in_the_metadata(tmp_path):
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    model = _model()
    before = targets(_copy(model))[module]
    down, up = factors(before.shape, 4, 0)
    for settings, scale in (
        ({}, 1.0),
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn2.to_q": 2}}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ):
        state = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        metadata = {"lora_adapter_metadata": json.dumps(settings)} if settings else {}
        model.load_lora(_file(tmp_path / "a.safetensors", state, metadata))
        merged = targets(model.state_dict())[module]
        assert torch.allclose(merged, before + scale * (up @ down), atol=1e-6), settings
        model.unload_lora()


FIELDS = {
    "plain": {},
    "original": {"attention": "original"},
    "mha": {"attention": "mha"},
    "fused": {"fused_qkv": True, "fused_kv": True},
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16-fused": {"precision": "bf16", "fused_qkv": True},
    "autocast": {"precision": "autocast"},
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_unloading_is_exact(tmp_path, fields):
    model = _model("clip" if fields else "openclip", **fields)
    before = _copy(model)
    first = _file(tmp_path / "a.pt", kohya(model))
    second = _file(tmp_path / "b.pt", kohya(model, seed=1, rank=2, alpha=None))
    for _ in range(2):
        model.load_lora(first, 0.8)
        model.load_lora(second, -1.3)
        assert not _same(model, before)
        model.unload_lora()
        assert _same(model, before)


@pytest.mark.slow
def test_unloading_after_another_optimisation(tmp_path):
    model, untouched = _model(), _model()
    model.load_lora(_file(tmp_path / "a.pt", kohya(model)))
    for fields in ({"attention": "mha"}, {"fused_qkv": True}, {"precision": "bf16"}):
        model.optimise(Optimisations(**fields))
        untouched.optimise(Optimisations(**fields))
    model.unload_lora()
    assert _same(model, untouched.state_dict())


@torch.no_grad()
def test_every_layout_of_the_weights_gives_the_same_output(tmp_path):
    x, times, context = torch.randn(2, 4, 16, 16), torch.full((2,), 501.0), torch.randn(2, 77, 64)
    model = _model(attention="original")
    path = _file(tmp_path / "a.pt", kohya(model))
    without = model.unet(x, times, context)
    model.load_lora(path)
    expected = model.unet(x, times, context)
    assert relative_error(without, expected) > 0.1
    folded = {"folded_projections": True}
    for fields in ({}, {"attention": "mha"}, {"fused_qkv": True, "fused_kv": True}, {"channels_last": True}, folded):
        other = _model(**fields)
        other.load_lora(path)
        assert relative_error(other.unet(x, times, context), expected) <= 1e-5
        other.unload_lora()
        assert relative_error(other.unet(x, times, context), without) <= 1e-5


def test_scale_zero_changes_nothing_and_scales_add(tmp_path):
    model = _model()
    before = _copy(model)
    path = _file(tmp_path / "a.pt", kohya(model))
    model.load_lora(path, 0.0)
    assert _same(model, before)
    model.load_lora(path, 0.25)
    model.load_lora(path, 0.5)
    summed = _copy(model)
    model.unload_lora()
    model.load_lora(path, 0.75)
    assert all(torch.allclose(summed[name], weight, atol=1e-6) for name, weight in model.state_dict().items())


def test_copies_take_the_memory_of_the_changed_weights_alone(tmp_path):
    model = _model()
    module = "unet.down_blocks.0.attentions.0.proj_in"
    weight = targets(model.state_dict())[module]
    down, up = factors(weight.shape, 2, 0)
    model.load_lora(_file(tmp_path / "a.pt", {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}))
    copies = model._merged.originals
    assert {name: (copy.shape, copy.dtype) for name, copy in copies.items()} == {module: (weight.shape, weight.dtype)}
    model.unload_lora()
    assert not copies


PROJECTION = "lora_unet_down_blocks_0_attentions_0_proj_in"
DOWN, UP = torch.ones(2, 32), torch.ones(32, 2)
PAIR = {f"{PROJECTION}.lora_down.weight": DOWN, f"{PROJECTION}.lora_up.weight": UP}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({**PAIR, f"{PROJECTION}.dora_scale": torch.ones(1, 32)}, "is a DoRA file"),
        ({"unet.conv_in.lora_magnitude_vector": torch.ones(32)}, "is a DoRA file"),
        ({f"{PROJECTION}.hada_w1_a": DOWN}, "is a LoHa file"),
        ({f"{PROJECTION}.lokr_w1": DOWN}, "is a LoKr file"),
        ({**PAIR, f"{PROJECTION}.lora_mid.weight": DOWN}, "lora_mid"),
        ({f"{PROJECTION}.oft_blocks": DOWN}, "is a OFT file"),
        ({f"{PROJECTION}.diff": DOWN}, "full difference"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": DOWN}, "Stable Diffusion XL"),
        ({"base_model.model.conv_in.lora_A.weight": DOWN}, "adapter_config.json"),
        (
            {**PAIR, "lora_unet_single_blocks_0.lora_down.weight": DOWN, "bundle_emb.a": DOWN},
            "2 of 4 keys match no weight of this model: lora_unet_single_blocks_0.lora_down.weight, bundle_emb.a;",
        ),
        ({f"lora_unet_x{i}.lora_down.weight": DOWN for i in range(30)}, "30 of 30 keys .* and 20 more"),
        ({f"{PROJECTION}.lora_down.weight": DOWN}, "has no up: the file is incomplete"),
        ({f"{PROJECTION}.alpha": torch.tensor(1.0)}, "has no down and no up"),
        ({**PAIR, f"{PROJECTION}.lora_down.weight": torch.ones(2, 48)}, r"does not fit this model .*\(2, 48\)"),
        ({**PAIR, f"{PROJECTION}.lora_up.weight": torch.ones(32, 3)}, "does not fit this model"),
        ({**PAIR, f"{PROJECTION}.lora_up.weight": torch.ones(2)}, "does not fit this model"),
        ({**PAIR, f"{PROJECTION}.lora_down.weight": DOWN * float("nan")}, "is not finite"),
        ({**PAIR, f"{PROJECTION}.alpha": torch.ones(2)}, "alpha of .* is no number"),
        ({**PAIR, f"{PROJECTION}.alpha": 1.0}, r"proj_in\.alpha is no tensor"),
        ({**PAIR, "unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": DOWN}, "is a second down of"),
    ],
)
def test_other_files_are_refused(tmp_path, state, reason):
    model = _model()
    before = _copy(model)
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{reason}"):
        model.load_lora(_file(tmp_path / "a.pt", state))
    assert _same(model, before) and not model._merged.loras


def test_names_in_the_metadata_are_not_those_of_weights(tmp_path):
    _model().load_lora(_file(tmp_path / "a.safetensors", PAIR, {"diffusers_version": "0.42", "oft_": "1"}))


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ("{", "no readable JSON"),
        ("[]", "no readable JSON"),
        ('{"unet.use_dora": true}', "is a DoRA file"),
        ('{"unet.lora_bias": true}', "biases"),
        ('{"unet.lora_alpha": null}', r"unet\.lora_alpha in lora_adapter_metadata is invalid or too complex"),
        ('{"unet.lora_alpha": NaN}', r"unet\.lora_alpha"),
        ('{"unet.lora_alpha": 4, "unet.alpha_pattern": ["to_q"]}', r"unet\.alpha_pattern"),
        ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": "4"}}', r"unet\.alpha_pattern"),
        ('{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(to_q": 4}}', r"unet\.alpha_pattern"),
        (r'{"unet.lora_alpha": 4, "unet.alpha_pattern": {"(\\w+)+!": 4}}', r"unet\.alpha_pattern"),  # takes hours
    ],
)
def test_unusable_metadata_is_refused(tmp_path, metadata, reason):
    path = _file(tmp_path / "a.safetensors", PAIR, {"lora_adapter_metadata": metadata})
    with pytest.raises(CheckpointError, match=reason):
        _model().load_lora(path)


@pytest.mark.parametrize("earlier", [0, 1])
def test_an_interrupted_merge_leaves_the_weights_and_is_not_merged_twice(tmp_path, monkeypatch, earlier):
    """earlier: files that are merged before."""
    model, state = _model(), {}
    for i, (module, (name, _)) in enumerate(list(WEIGHTS.items())[:2]):
        down, up = factors(_copy(model)[f"{name}.weight"].shape, 2, i)
        state.update({kohya_key(module) + end: factor for end, factor in zip(OUTPUT["kohya"], (down, up))})
    file, dense, calls = _file(tmp_path / "a.pt", state), Update.dense, []

    def interrupted(update, weight):
        calls.append(weight)
        if len(calls) == 2 + earlier:  # the first weight is written
            raise KeyboardInterrupt
        return dense(update, weight)

    for _ in range(earlier):
        model.load_lora(file, 0.5)
    before = _copy(model)
    monkeypatch.setattr(Update, "dense", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.load_lora(file)
    monkeypatch.setattr(Update, "dense", dense)
    assert _same(model, before)
    if not earlier:  # nothing of the attempt is left
        model.load_state_dict({name: weight + 1 for name, weight in before.items()})
        model.load_state_dict(before)
        assert not model._merged.originals
    model.load_lora(file)
    expected = _model()
    for scale in [*[0.5] * earlier, 1.0]:
        expected.load_lora(file, scale)
    assert _same(model, _copy(expected)) and not _same(model, before)


class _Harmful:
    def __reduce__(self):
        return print, ("a pickle was executed",)


def test_pickles_are_not_executed(tmp_path, capsys):
    path = _file(tmp_path / "a.pt", {**PAIR, "x": _Harmful()})
    with pytest.raises(CheckpointError, match="do not trust it"):
        _model().load_lora(path)
    assert "executed" not in capsys.readouterr().out


def test_constant_weights_are_refused(tmp_path):
    model = _model()
    path = _file(tmp_path / "a.pt", PAIR)
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite"):
            model.load_lora(path, scale)
    model.load_lora(path)
    with pytest.raises(ConfigError, match=r"call unload_lora\(\) first"):
        model.load_state_dict(_copy(model))
    model.optimisations = Optimisations(compile="default", inductor=("freezing",))
    for call in (lambda: model.load_lora(path), model.unload_lora):
        with pytest.raises(ConfigError, match=r"freezing, .* keep the old weights; load before optimise\(\)"):
            call()


@needs_counting
@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "mha", "fused", "bf16"])
def test_a_merged_lora_costs_nothing(tmp_path, name):
    """The operators of UNet and text encoder, and the bytes that they move, are those without LoRA."""
    model = _model(**FIELDS[name])
    x, times, context = torch.randn(2, 4, 16, 16), torch.full((2,), 501.0), torch.randn(2, 77, 64)
    tokens = torch.arange(77)[None] % 50

    def count() -> Counting:
        with model.context(), Counting() as counting:
            dtype = model.unet.dtype
            model.unet(x.to(dtype), times, context.to(dtype))
            model.text_encoder(tokens)
        return counting

    without = count()
    model.load_lora(_file(tmp_path / "a.pt", kohya(model)))
    merged = count()
    assert merged.ops == without.ops and merged.bytes == without.bytes and without.total > 100


@pytest.mark.compile
@pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")
@pytest.mark.parametrize("scope", slow_or_nightly(["unet", "blocks", "step"], lambda scope: scope == "blocks"))
def test_a_swap_compiles_nothing(tmp_path, scope):
    import torch._dynamo.utils

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    fields = {"compile": "default", "compile_scope": scope, "compile_backend": "eager"}
    try:
        model = smallest(Optimisations(compile_text_encoder="default", fused_qkv=True, **fields))
    except Unavailable as reason:
        pytest.skip(str(reason))
    plain = smallest()

    def latents(model):
        return model.txt2img("a red star", steps=2).latents

    without = latents(model)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs >= 2  # UNet and text encoder
    for seed in range(2):
        path = _file(tmp_path / "a.pt", kohya(plain, seed=seed, rank=2 + seed))
        for each in (model, plain):
            each.load_lora(path, 0.3)
        merged = latents(model)
        assert relative_error(merged, without) > 1e-3
        assert relative_error(merged, latents(plain)) <= 1e-5
        for each in (model, plain):
            each.unload_lora()
    assert torch.equal(latents(model), without)
    assert counters["stats"]["unique_graphs"] == graphs
    torch._dynamo.reset()


@pytest.mark.slow
def test_command_line(tmp_path, capsys, monkeypatch):
    model = StableDiffusion.tiny()
    first, second = (_file(tmp_path / f"{name}.pt", kohya(model, seed)) for seed, name in enumerate("ab"))
    monkeypatch.chdir(tmp_path)
    arguments = ["--prompt", "a red star", "--steps", "2", "--seed", "1", "--device", "cpu", "--outdir", "out"]
    assert main([*arguments, "--lora", f"{first}:0.01", "--lora", f"{second}:-0.02", "--attention", "mha"]) == 0
    with Image.open(next((tmp_path / "out" / "samples").iterdir())) as image:
        pixels = torch.from_numpy(numpy.array(image))
        assert image.text["lora"] == "a.pt:0.01 b.pt:-0.02"
    model.optimise(Optimisations(attention="mha"))
    model.load_lora(first, 0.01)
    model.load_lora(second, -0.02)
    assert torch.equal(pixels, model.txt2img("a red star", steps=2, sampler="ddim", scale=4.0, seed=1).images[0])
    capsys.readouterr()
    for option in ("missing.pt", "missing.pt:2"):
        assert main([*arguments, "--lora", option]) == 2
        assert "--lora missing.pt: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--lora", f"{first}:much"])
    assert "must be a number" in capsys.readouterr().err
    assert main([*arguments, "--lora", str(_file(tmp_path / "c.pt", {"x.lokr_w1": DOWN}))]) == 2
    assert "is a LoKr file" in capsys.readouterr().err
