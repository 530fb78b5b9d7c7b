"""What the shared options, the environment and the config choose together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from sd import options, txt2img
from sd.optimise import DEFAULT_ATTENTION
from sd.yaml_config import CONFIGS


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
        (["--attention", "sdpa", "--sdpa-kernels", "flash,math"], {}, {"sdpa_kernels": ("flash", "math")}),
        (["--attention", "sdpa", "--disable_cudnn"], {}, {"sdpa_kernels": ("math", "mem_efficient", "flash")}),
        ([], {"USE_XFORMERS": "False"}, {"attention": "original"}),
        ([], {"USE_XFORMERS": "0"}, {"attention": "original"}),
        ([], {"USE_XFORMERS": ""}, {"attention": DEFAULT_ATTENTION}),
        ([], {"USE_XFORMERS": "True"}, {"attention": "xformers"}),
        (["--attention", "mha"], {"USE_XFORMERS": "True"}, {"attention": "mha"}),
        (["--config", "native.yaml"], {}, {"attention": "mha"}),
        (["--config", "native.yaml"], {"USE_XFORMERS": "False"}, {"attention": "mha"}),
        (["--config", "native.yaml", "--attention", "original"], {}, {"attention": "original"}),
        # the three published flags choose among the three kernels that torch 2.0 had
        (["--config", "native.yaml", "--disable_mem_efficient", "--disable_flash"], {}, {"sdpa_kernels": ("math",)}),
        (["--config", "native.yaml", "--disable_math", "--disable_flash"], {}, {"sdpa_kernels": ("mem_efficient",)}),
        (["--config", "native.yaml", "--disable_flash"], {}, {"sdpa_kernels": ("math", "mem_efficient")}),
    ],
)
def test_what_the_options_and_the_environment_choose(argv, environ, expected, capsys):
    text = (CONFIGS / "tiny.yaml").read_text().replace("use_checkpoint: False", "use_native_mha: True")
    Path("native.yaml").write_text(text)
    chosen = options.setup(txt2img.parser().parse_args(["--device", "cpu", *argv]), environ)
    assert {key: getattr(chosen.optimisations, key) for key in expected} == expected
    assert chosen.device == torch.device("cpu")


@pytest.mark.parametrize("available, device, precision", [(False, "cpu", "full"), (True, "cuda", "autocast")])
def test_device_and_precision_follow_the_machine(monkeypatch, available, device, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    chosen = options.setup(txt2img.parser().parse_args([]), {})
    assert (chosen.device.type, chosen.optimisations.precision) == (device, precision)


def test_importing_or_installing_packages_chooses_nothing(monkeypatch):
    """The environment is read by the command, not at import, and what happens to import does not matter."""
    monkeypatch.setitem(sys.modules, "xformers", object())
    monkeypatch.setitem(sys.modules, "xformers.ops", object())
    args = txt2img.parser().parse_args([])
    assert options.choose_attention(args, {}, False)[0] == DEFAULT_ATTENTION
    monkeypatch.setenv("USE_XFORMERS", "perhaps")
    assert txt2img.main(["--device", "cpu"]) == 2
