"""Model, device and optimisations selected by the shared options, the environment and the config."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sd import txt2img
from sd.attention.functions import DEFAULT_ATTENTION
from sd.cli import setup as options
from sd.config.yaml_reader import CONFIGS
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.optimise.compile import CPU_OPTIONS, INDUCTOR_OPTIONS

# The options of inductor that change code for a CPU came with the same version.
needs_cpu_options = pytest.mark.skipif(not has("mode_options"), reason="torch >= 2.1")
ORIGINAL = {"attention": "original", "precision": "autocast", "original_steps": True}


@pytest.fixture(autouse=True)
def _clean(monkeypatch, tmp_path):
    monkeypatch.delenv("USE_XFORMERS", raising=False)
    monkeypatch.delenv("ATTN_PRECISION", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "argv, environ, expected",
    [
        ([], {}, {"attention": DEFAULT_ATTENTION, "precision": "full", "compile": "none"}),
        (["--precision", "autocast"], {}, {"precision": "autocast"}),
        (["--bf16"], {}, {"precision": "bf16"}),
        (["--bf16", "--precision", "bf16"], {}, {"precision": "bf16"}),
        (["--compile"], {}, {"compile": "default"}),
        (["--compile", "--seed", "1"], {}, {"compile": "default"}),
        (["--compile", "reduce-overhead"], {}, {"compile": "reduce-overhead"}),
        (["--attention", "original"], {}, {"attention": "original", "attention_precision": "fp32"}),
        (["--attention", "original"], {"ATTN_PRECISION": "fp16"}, {"attention_precision": "input"}),
        (["--attention", "original", "--attention-precision", "input"], {}, {"attention_precision": "input"}),
        (
            ["--attention", "original", "--attention-precision", "fp32"],
            {"ATTN_PRECISION": "fp16"},
            {"attention_precision": "fp32"},
        ),
        (["--attention", "sdpa", "--sdpa-kernels", "flash,math"], {}, {"sdpa_kernels": ("math", "flash")}),
        (["--attention", "sdpa", "--disable_cudnn"], {}, {"sdpa_kernels": ("math", "mem_efficient", "flash")}),
        ([], {"USE_XFORMERS": "False"}, {"attention": "original"}),
        ([], {"USE_XFORMERS": "0"}, {"attention": "original"}),
        ([], {"USE_XFORMERS": ""}, {"attention": DEFAULT_ATTENTION}),
        ([], {"USE_XFORMERS": "True"}, {"attention": "xformers"}),
        (["--attention", "mha"], {"USE_XFORMERS": "True"}, {"attention": "mha"}),
        (["--config", "native.yaml"], {}, {"attention": "mha"}),
        (["--config", "native.yaml"], {"USE_XFORMERS": "False"}, {"attention": "mha"}),
        (["--config", "native.yaml", "--attention", "original"], {}, {"attention": "original"}),
        # the three published flags select among the three kernels of torch 2.0
        (["--config", "native.yaml", "--disable_mem_efficient", "--disable_flash"], {}, {"sdpa_kernels": ("math",)}),
        (["--config", "native.yaml", "--disable_math", "--disable_flash"], {}, {"sdpa_kernels": ("mem_efficient",)}),
        (["--config", "native.yaml", "--disable_flash"], {}, {"sdpa_kernels": ("math", "mem_efficient")}),
    ],
)
def test_options_and_environment(argv, environ, expected, capsys):
    text = (CONFIGS / "tiny.yaml").read_text().replace("use_checkpoint: False", "use_native_mha: True")
    Path("native.yaml").write_text(text)
    args = txt2img.parser().parse_args(["--device", "cpu", *argv])
    if "--compile" in argv and not has("compile"):
        with pytest.raises(Unavailable, match="compile mode"):
            options.setup(args, environ)
        return
    chosen = options.setup(args, environ)
    assert {key: getattr(chosen.optimisations, key) for key in expected} == expected
    assert chosen.device == torch.device("cpu")


@pytest.mark.parametrize(
    "argv, changed",
    [
        (["--optimise", "none"], {}),
        (["--optimise", "channels_last,fused_qkv"], {"channels_last": True, "fused_qkv": True}),
        (["--optimise", "none,fused_kv"], {"fused_kv": True}),
        (["--optimise", "fused_kv", "--attention", "original"], {"fused_kv": True, "attention": "original"}),
        (["--optimise", "original"], ORIGINAL),
        (["--optimise", "original", "--precision", "full"], {"attention": "original", "original_steps": True}),
        (["--optimise", "feature_caching"], {"feature_caching": 3}),
        (["--optimise", "original,channels_last"], {**ORIGINAL, "channels_last": True}),
        (["--optimise", "fused_qkv,fused_qkv"], {"fused_qkv": True}),
    ],
)
def test_options_override_fields_of_optimise(argv, changed):
    chosen = options.setup(txt2img.parser().parse_args(["--device", "cpu", *argv]), {}).optimisations
    plain = {"attention": DEFAULT_ATTENTION}
    assert {**plain, **chosen.changed()} == {**plain, **changed}


@needs_cpu_options
def test_compiler_options_imply_a_mode():
    def chosen(text):
        return options.setup(txt2img.parser().parse_args(["--device", "cpu", "--optimise", text]), {}).optimisations

    assert chosen("compile_step").changed() == {"compile": "default", "compile_scope": "step"}
    assert chosen("max-autotune-no-cudagraphs,freezing").changed() == {
        "compile": "max-autotune-no-cudagraphs",
        "inductor": ("freezing",),
    }
    assert chosen("conv_1x1_as_mm,freezing").changed() == {
        "compile": "default",
        "inductor": ("conv_1x1_as_mm", "freezing"),
    }
    with pytest.raises(Unavailable, match="conv_1x1_as_mm: mode max-autotune includes it"):
        chosen("max-autotune,conv_1x1_as_mm")
    assert chosen("fast").cache_context_kv


@needs_cpu_options
def test_compiler_option_of_another_network_does_not_compile_the_unet():
    arguments = txt2img.parser().parse_args(["--device", "cpu", "--optimise", "compile_autoencoder,freezing"])
    chosen = options.setup(arguments, {}).optimisations
    assert (chosen.compile, chosen.compile_autoencoder, chosen.inductor) == ("none", "default", ("freezing",))


@pytest.mark.skipif(not has("compile"), reason="torch >= 2.0")
@pytest.mark.parametrize("name", INDUCTOR_OPTIONS)
def test_compiler_option_is_supported_or_refused_by_name(name):
    arguments = txt2img.parser().parse_args(["--device", "cpu", "--optimise", name])
    if name in CPU_OPTIONS and has("mode_options"):
        assert options.setup(arguments, {}).optimisations.inductor == (name,)
    else:
        with pytest.raises(Unavailable, match=f"inductor option {name}: "):
            options.setup(arguments, {})


@pytest.mark.parametrize(
    "text, error, match",
    [
        ("fastest", ConfigError, "choose a preset"),
        ("channels_last,fast", ConfigError, "choose a preset .*, which comes first"),
        ("bf16,fp16", ConfigError, "precision is both"),
        ("cuda_graph_loop", Unavailable, "cuda_graph: needs an NVIDIA GPU"),
        ("tf32", Unavailable, "tf32: needs an NVIDIA GPU"),
        ("fp8", Unavailable, "quantisation fp8: needs"),
        ("original,cache_context_kv", ConfigError, "original_steps"),
    ],
)
def test_optimise_refuses_by_name(text, error, match):
    with pytest.raises(error, match=match):
        options.setup(txt2img.parser().parse_args(["--device", "cpu", "--optimise", text]), {})


@pytest.mark.parametrize("available, device, precision", [(False, "cpu", "full"), (True, "cuda", "autocast")])
def test_default_device_and_precision(monkeypatch, available, device, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    chosen = options.setup(txt2img.parser().parse_args([]), {})
    assert (chosen.device.type, chosen.optimisations.precision) == (device, precision)


def test_installed_packages_do_not_affect_the_choice(monkeypatch):
    """The environment is read by the command and not at import."""
    monkeypatch.setitem(sys.modules, "xformers", object())
    monkeypatch.setitem(sys.modules, "xformers.ops", object())
    args = txt2img.parser().parse_args([])
    assert options.choose_attention(args, {}, False).implementation == DEFAULT_ATTENTION
    monkeypatch.setenv("USE_XFORMERS", "perhaps")
    assert txt2img.main(["--device", "cpu"]) == 2
