"""Traces of a round: how time is summed, and what a worker writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perf import trace
from perf.configurations import Configuration
from perf.launcher import InProcessLaunch, WorkerError
from perf.protocol import Limits, Slot
from perf.report import breakdown, pictures
from perf.worker import Worker


def event(name, ts, dur, cat="kernel", tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


@pytest.mark.parametrize(
    "name, kind",
    [
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "conv"),
        ("void cudnn::winograd_nonfused::winogradForwardData4x4", "conv"),
        ("aten::mkldnn_convolution", "conv"),
        ("ampere_fp16_s16816gemm_fp16_128x64_ldg8_f2f_stages_32x6_nn", "gemm"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "gemm"),
        ("aten::addmm", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128>>", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("void (anonymous namespace)::softmax_warp_forward<c10::Half, float>", "attention"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("triton_red_fused_native_group_norm_silu_3", "norm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "elementwise"),
        ("triton_poi_fused_add_7", "elementwise"),
        ("aten::silu", "elementwise"),
        ("Memcpy DtoH (Device -> Pinned)", "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__half>", "copy"),
        ("aten::copy_", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernel_classes(name, kind):
    assert trace.kernel_class(name) == kind


def test_gpu_time_and_gaps():
    document = {
        "traceEvents": [
            event(trace.ROUND, 100, 1000, "user_annotation"),
            event("gemm", 150, 200),
            event("flash", 300, 200),  # 50 beside the product
            event("Memcpy DtoH", 900, 100, "gpu_memcpy"),
            event("aten::mm", 140, 300, "cpu_op"),  # the host's side of it is not the device's time
            event("gemm", 5000, 100),  # not of this round
            {"ph": "i", "name": "gemm", "ts": 200},
        ]
    }
    found = trace.time_by_class(document)
    assert found == pytest.approx({"gemm": 2e-4, "attention": 2e-4, "copy": 1e-4, trace.GAP: 5.5e-4})


def test_cpu_operators_count_without_those_inside():
    document = {
        "traceEvents": [
            event(trace.ROUND, 0, 1000, "user_annotation"),
            event("aten::conv2d", 100, 400, "cpu_op"),
            event("aten::mkldnn_convolution", 150, 300, "cpu_op"),
            event("aten::copy_", 160, 50, "cpu_op"),
            event("aten::linear", 600, 100, "cpu_op"),
            event("aten::addmm", 600, 100, "cpu_op"),
            event("aten::add", 0, 900, "cpu_op", tid=2),  # a thread that waits for work
        ]
    }
    found = trace.time_by_class(document)
    assert found == pytest.approx({"conv": 3.5e-4, "copy": 0.5e-4, "gemm": 1e-4, trace.GAP: 5e-4})
    assert sum(found.values()) == pytest.approx(1e-3), "each microsecond of the round counts once"


def test_a_trace_without_a_round_is_refused():
    with pytest.raises(ValueError, match="no round"):
        trace.time_by_class({"traceEvents": [event("gemm", 0, 1)]})


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A worker's traced round of the embedded model."""
    folder = tmp_path_factory.mktemp("traced")
    worker, configuration = Worker(), Configuration(attention="original", steps=2)
    for request in (
        {"op": "load", "configuration": configuration.as_dict(), "device": "cpu", "clock": "wall", "threads": 1},
        {"op": "round", "seed": 1},
    ):
        assert "ok" in worker.handle(request)
    return folder, configuration, worker.handle({"op": "trace", "stem": str(folder / configuration.id)})


def test_a_worker_traces_a_round(traced):
    folder, configuration, answered = traced
    found = answered["ok"]
    assert found["file"] == f"{configuration.id}.trace.json" and found["memory_snapshot"] is None
    assert json.loads((folder / found["file"]).read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    seconds = found["seconds"]
    assert {"conv", "gemm", "attention", "norm", "elementwise", "copy", trace.GAP} <= set(seconds)
    assert seconds["conv"] > 0.02 * sum(seconds.values()) and seconds.get("other", 0) < 0.2 * sum(seconds.values())
    assert (folder / found["picture"]).read_bytes().startswith(b"\x89PNG")


def test_pictures_and_kernels_reach_the_report(traced):
    import synthetic_runs
    from test_report import results_of

    folder, configuration, answered = traced
    again = Configuration(attention="sdpa", steps=2)
    traces = {one.id: {"trace": answered["ok"]} for one in (configuration, again)}
    (folder / "pictures" / f"{again.id}.png").write_bytes((folder / answered["ok"]["picture"]).read_bytes())
    ones = results_of(synthetic_runs.document("NVIDIA T4", {configuration: 1.0, again: 1.0}, extra=traces))
    (chart,) = breakdown.kernel_charts(ones)
    assert sum(point.y for series in chart.series for point in series.points) == pytest.approx(
        2 * sum(answered["ok"]["seconds"].values())
    )
    found = pictures.find(ones, folder / "pictures")
    assert [one.result.id for one in found.found] == [configuration.id, again.id] and found.missing is None
    assert found.found[0].difference is None and found.found[1].difference.startswith("data:image/png;base64,")
    assert "2 of 2 configurations have no picture" in pictures.find(ones).missing
    (folder / "pictures" / f"{again.id}.png").write_bytes(b"rubbish")
    assert "cannot be read" in pictures.find(ones, folder / "pictures").missing


def test_what_cannot_be_traced_is_said(tmp_path):
    class Launches:
        def open(self, slot):
            return InProcessLaunch()

        def load_arguments(self, slot):
            raise WorkerError("unavailable", "no such kernel here")

    said: list[str] = []
    assert trace.trace_all(Launches(), [Slot(Configuration())], tmp_path / "a", Limits(), said.append) == {}
    assert said[-1] == "perf: tiny-sdpa-b1 was not traced: no such kernel here" and Path(tmp_path / "a").is_dir()
