"""OpenVINO and ONNX Runtime as compile backends: the same images, refused by name where they cannot run."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import peers_table
import pytest
import torch
from models import relative_error, smallest

from perf import test_peers
from sd import Optimisations
from sd.choices import RUNTIMES
from sd.cli.setup import setup
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.optimise import runtimes
from sd.optimise.apply import require_available
from sd.optimise.presets import parse
from sd.txt2img import parser

CPU = torch.device("cpu")


def _run(model, **options):
    return model.txt2img("a red star", **{"steps": 2, "seed": 1, **options})


@pytest.mark.peers
@pytest.mark.parametrize("name", ["openvino", pytest.param("onnxrt", marks=pytest.mark.slow)])
def test_same_images(name):
    for package in runtimes.PACKAGES[name]:
        pytest.importorskip(package)
    model = smallest()
    expected = _run(model), _run(model, scale=1.0)
    chosen = parse("none", CPU, {"compile": "default", "compile_backend": name, "compile_autoencoder": "default"})
    model.optimise(chosen)
    assert relative_error(_run(model).latents, expected[0].latents) <= 1e-5
    images = _run(model).images.int()
    assert (images - expected[0].images.int()).abs().max() <= 1
    converted = vars(model.unet)["denoise"].compiled.converted
    assert len(converted) == 1
    assert relative_error(_run(model, scale=1.0).latents, expected[1].latents) <= 1e-5  # another batch of the UNet
    assert len(converted) == 2
    with pytest.raises(ConfigError, match="other runtimes keep the old weights"):
        model.load_state_dict(model.state_dict())
    model.optimise(Optimisations())
    assert torch.equal(_run(model).latents, expected[0].latents)


@pytest.mark.peers
@pytest.mark.slow
def test_bf16_of_openvino():
    pytest.importorskip("openvino")
    model = smallest()
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        expected = model.unet(x, torch.full((2,), 501.0), context)
        model.optimise(Optimisations(precision="bf16", compile="default", compile_backend="openvino"))
        out = model.unet(x, torch.full((2,), 501.0), context.bfloat16())
    assert out.dtype == torch.bfloat16
    assert 1e-4 < relative_error(out.float(), expected) <= 0.05


@pytest.mark.parametrize("name", RUNTIMES)
def test_refused_by_name(name, monkeypatch):
    chosen = Optimisations(compile="default", compile_backend=name)
    with pytest.raises(Unavailable, match=f"{name}: runs on a CPU here"):
        require_available(chosen, torch.device("cuda"))
    monkeypatch.setattr(runtimes, "PACKAGES", {name: ("no_such_package",)})
    with pytest.raises(Unavailable, match=f"{name}: needs no_such_package, of the extra `peers-cpu`"):
        require_available(chosen, CPU)
    for fields in ({"compile_scope": "blocks"}, {"precision": "autocast"}, {"feature_caching": 2}):
        with pytest.raises(ConfigError, match=f"compile backend {name}"):
            replace(chosen, **fields)
    with pytest.raises(ConfigError, match="choose compile mode default"):
        Optimisations(compile="max-autotune", compile_backend=name)
    with pytest.raises(ConfigError, match="nothing is compiled"):
        Optimisations(compile_backend=name)


@pytest.mark.parametrize("name", ["tensorrt", "cudagraphs"])
def test_backends_of_a_gpu_are_refused_on_a_cpu(name):
    chosen = Optimisations(compile="default", compile_backend=name)
    with pytest.raises(Unavailable, match=f"compile backend {name}: needs an NVIDIA GPU|torch.compile"):
        require_available(chosen, CPU)


@pytest.mark.skipif(find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is installed")
def test_tensorrt_without_its_package_is_refused():
    with pytest.raises(Unavailable, match=r"pip install torch-tensorrt|torch\.compile"):
        require_available(Optimisations(compile="default", compile_backend="tensorrt"), torch.device("cuda"))


def test_half_precision_of_onnxruntime_is_refused():
    with pytest.raises(ConfigError, match="no convolutions in half precision"):
        Optimisations(compile="default", compile_backend="onnxrt", precision="bf16")
    assert parse("fast", CPU, {"compile": "default", "compile_backend": "onnxrt"}).precision == "full"


def test_the_option_implies_compilation(monkeypatch):
    monkeypatch.setattr(runtimes, "PACKAGES", dict.fromkeys(RUNTIMES, ()))
    chosen = setup(parser().parse_args(["--device", "cpu", "--compile-backend", "openvino"]), {}).optimisations
    assert (chosen.compile, chosen.compile_backend) == ("default", "openvino")


def test_the_table_of_peers():
    def benchmark(side, seconds, ratios):
        info = {"flops_fraction": 0.5, **ratios}
        return {"group": "tiny, 1 thread", "params": {"side": side}, "stats": {"median": seconds}, "extra_info": info}

    fast = benchmark("sd-fast", 0.004, {"ratio_to_sd_fast": [1, 1, 1], "ratio_to_openvino_bf16": [2.0, 1.5, 2.5]})
    lines = peers_table.table({"benchmarks": [fast, benchmark("openvino-bf16", 0.002, {})]})
    assert lines[-1] == "| `openvino-bf16` | 2.0 | 2.00 [1.50, 2.50] | 50% |"
    assert "torch" in peers_table.versions()


@pytest.mark.skipif(not has("load_assign"), reason="needs torch >= 2.1: load_state_dict(assign=True)")
def test_peers_with_two_threads_are_also_measured_with_one(monkeypatch):
    monkeypatch.setattr(test_peers, "ROUNDS", 4)
    monkeypatch.setattr(test_peers, "sides_of", lambda name, timed: ["sd"])
    before = torch.get_num_threads()
    try:
        measured = test_peers.measure("tiny", 2, timed=True)
    finally:
        torch.set_num_threads(before)
    assert [*measured] == [("product", 1), ("sd", 1), ("product", 2), ("sd", 2)]
    assert all(len(seconds.wall) == 4 and min(seconds.wall) > 0 for seconds in measured.values())


@pytest.mark.parametrize(
    "seconds, repeat, calls, expected", [(0.02, True, 6, 0.02), (0.1, True, 2, 0.1), (0.02, False, 1, 0.06)]
)
def test_a_side_repeats_its_call_in_a_round_after_a_first_one(monkeypatch, seconds, repeat, calls, expected):
    clock, made = [0.0], []
    monkeypatch.setattr(test_peers.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(test_peers.time, "process_time", lambda: 2 * clock[0])

    def call():
        clock[0] += seconds if made else 0.04 + seconds
        made.append(None)

    monkeypatch.setattr(test_peers, "REPEATED_SECONDS", 0.09)
    timed = test_peers.Seconds([], [])
    timed.add(call, repeat)
    assert len(made) == calls
    assert timed.wall == timed.of_clock(2) == pytest.approx([expected])
    assert timed.cpu == timed.of_clock(1) == pytest.approx([2 * expected])


def test_the_table_of_peers_with_two_threads():
    def benchmark(side, gain):
        info = {
            "flops_fraction": 0.5,
            "gain_over_one_thread": gain,
            "gain_of_product": [1.9, 1.8, 2.0],
            "ratio_to_onnxruntime": [0.5, 0.4, 0.6],
            "ratio_to_sd_fast": [1, 1, 1],
        }
        parameters = {"side": side, "threads": 2}
        return {
            "group": "tiny, 2 threads, wall time",
            "params": parameters,
            "stats": {"median": 0.004},
            "extra_info": info,
        }

    run = {"benchmarks": [benchmark("sd-fast", [1.7, 1.6, 1.8]), benchmark("onnxruntime", [1.5, 1.4, 1.6])]}
    assert peers_table.table(run) == [
        "| tiny, 2 threads, wall time | ms | gain over 1 thread | `sd-fast` / it | of peak |",
        "|---|---|---|---|---|",
        "| `sd-fast` | 4.0 | 1.70 [1.60, 1.80] |  | 50% |",
        "| `onnxruntime` | 4.0 | 1.50 [1.40, 1.60] | 0.50 [0.40, 0.60] | 50% |",
        "| a matrix product | | 1.90 [1.80, 2.00] | | |",
    ]
