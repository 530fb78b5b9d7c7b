"""Traces of a round: sums of time by class, and the files that a worker writes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch

from perf.analysis.trace_sums import GAP, ROUND, time_by_class
from perf.configurations.configuration import Configuration
from perf.launch.in_process import InProcessLaunch
from perf.report import breakdown, images
from perf.session.plan import Slot
from perf.session.runner import Limits
from perf.session.traces import trace_all
from perf.worker import profiler as trace
from perf.worker.server import Worker
from perf.worker.wire import WorkerError


def event(name, ts, dur, cat="kernel", tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "tid": tid}


def gpu_trace():
    """A round of 1 ms on two streams, with all that Kineto writes beside its kernels; 'X' events as it orders them.

    Stream 7: a convolution at 150-350 and attention at 300-500 on stream 20, 50 us of them beside each other; a graph's
    two kernels at 600-700 and 700-720; the copy to the host at 900-1000.
    """

    def kernel(name, ts, dur, correlation, stream=7, cat="kernel"):
        args = {"device": 0, "context": 1, "stream": stream, "correlation": correlation, "registers per thread": 168}
        return {**event(name, ts, dur, cat, tid=stream), "pid": 0, "args": args}

    def launch(name, ts, correlation, cat="cuda_runtime"):
        return {**event(name, ts, 5, cat), "args": {"cbid": 211, "correlation": correlation}}

    flash = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>"
    return [
        {"ph": "M", "name": "process_name", "ts": 0, "pid": 0, "args": {"name": "python"}},
        {"ph": "X", "cat": "Trace", "ts": 0, "dur": 9000, "name": "PyTorch Profiler (0)", "tid": "PyTorch Profiler"},
        event("ProfilerStep#1", 90, 1100, "user_annotation"),
        event(ROUND, 100, 1000, "user_annotation"),
        event(ROUND, 150, 5000, "gpu_user_annotation", tid=7),  # however long it is: the round is the host's
        event(ROUND, 300, 200, "gpu_user_annotation", tid=20),
        event("aten::mm", 140, 300, "cpu_op"),  # the host's side of a kernel is not the device's time
        launch("cudaLaunchKernel", 141, 1),
        launch("cuLaunchKernelEx", 160, 2, "cuda_driver"),
        launch("cudaGraphLaunch", 560, 3),
        launch("cudaMemcpyAsync", 880, 4),
        event("cudaDeviceSynchronize", 890, 200, "cuda_runtime"),
        kernel("sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", 150, 200, 1),
        kernel(flash, 300, 200, 2, stream=20),
        kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", 600, 100, 3),
        kernel("triton_poi_fused_add_convolution_7", 700, 20, 3),
        kernel("Memcpy DtoH (Device -> Pinned)", 900, 100, 4, cat="gpu_memcpy"),
        kernel("something of the round before", 20, 30, 90),
        kernel("something of the round after", 5000, 100, 91),
        {"ph": "s", "id": 1, "name": "ac2g", "ts": 141, "cat": "ac2g"},
        {"ph": "f", "id": 1, "name": "ac2g", "ts": 150, "cat": "ac2g", "bp": "e"},
        {"ph": "i", "name": "Record Window End", "ts": 9000, "s": "g"},
    ]


def test_gpu_time_by_class_and_launch_gap():
    found = time_by_class({"traceEvents": gpu_trace()}, gpu=True)
    busy = 350 + 120 + 100  # 150 to 500, 600 to 720, 900 to 1000
    expected = {"conv": 2e-4, "attention": 2e-4, "gemm": 1e-4, "elementwise": 2e-5, "copy": 1e-4}
    assert found == pytest.approx({**expected, GAP: (1000 - busy) / 1e6})
    assert sum(found.values()) == pytest.approx(1e-3 + 5e-5), "concurrent kernels count twice, the gap once"


def test_kernel_starting_before_the_round_is_clipped():
    """Host and device clocks are aligned to microseconds only."""
    events = gpu_trace()
    first = next(one for one in events if one.get("cat") == "kernel" and one["ts"] == 150)
    first.update(ts=98, dur=52)
    found = time_by_class({"traceEvents": events}, gpu=True)
    assert found["conv"] == pytest.approx(52e-6)
    assert found[GAP] == pytest.approx((1000 - (50 + 200 + 120 + 100)) / 1e6)


@pytest.mark.parametrize("lost", ["kernel", "everything of CUDA"])
def test_lost_kernels_are_an_error(lost):
    """Kineto drops kernels silently; operators of the host are no substitute."""
    gone = ("kernel",) if lost == "kernel" else ("kernel", "gpu_memcpy", "cuda_runtime", "cuda_driver")
    events = [one for one in gpu_trace() if one.get("cat") not in gone]
    with pytest.raises(ValueError, match=r"lost the kernels of \d of \d launches"):
        time_by_class({"traceEvents": events}, gpu=True)


def test_nested_cpu_operators_count_once():
    document = {
        "traceEvents": [
            event(ROUND, 0, 1000, "user_annotation"),
            event("aten::conv2d", 100, 400, "cpu_op"),
            event("aten::mkldnn_convolution", 150, 300, "cpu_op"),
            event("aten::copy_", 160, 50, "cpu_op"),
            event("aten::linear", 600, 100, "cpu_op"),
            event("aten::addmm", 600, 100, "cpu_op"),
            event("aten::add", 0, 900, "cpu_op", tid=2),  # a thread that waits for work
        ]
    }
    found = time_by_class(document)
    assert found == pytest.approx({"conv": 3.5e-4, "copy": 0.5e-4, "gemm": 1e-4, GAP: 5e-4})
    assert sum(found.values()) == pytest.approx(1e-3), "each microsecond of the round counts once"


def test_trace_without_a_round_is_rejected():
    with pytest.raises(ValueError, match="no round"):
        time_by_class({"traceEvents": [event("gemm", 0, 1)]})


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
    return folder, configuration, worker.handle({"op": "trace", "stem": str(folder / configuration.id), "seed": 5})


def test_a_worker_traces_a_round(traced):
    folder, configuration, answered = traced
    found = answered["ok"]
    assert found["file"] == f"{configuration.id}.trace.json" and found["memory_snapshot"] is None
    assert json.loads((folder / found["file"]).read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    seconds = found["seconds"]
    assert {"conv", "gemm", "attention", "norm", "elementwise", "copy", GAP} <= set(seconds)
    # 0.09 of the round are `other` on an idle machine, and were 0.22 on one with five processes for its two cores.
    assert seconds["conv"] > 0.02 * sum(seconds.values()) and seconds.get("other", 0) < 0.5 * sum(seconds.values())
    assert (folder / found["picture"]).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def cuda_calls(monkeypatch, tmp_path):
    """A fake CUDA device that records its calls in order. Its kernels never reach the trace."""
    found = []
    ones = torch.ones

    @contextlib.contextmanager
    def nvtx_range(name):
        found.append(f"range {name}")
        try:
            yield
        finally:
            found.append("end of range")

    def dump(path):
        found.append("dump")
        Path(path).write_bytes(b"")

    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx_range)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **how: found.append(how), raising=False)
    return found


class Engine:
    def __init__(self, error=None):
        self.error = error

    def round(self, seed):
        if self.error:
            raise self.error


HISTORY = [{"stacks": "python", "max_entries": 100_000}, {"enabled": None}]


def test_cuda_round_has_nvtx_range_and_memory_snapshot(cuda_calls, tmp_path):
    with pytest.raises(ValueError, match="lost the kernels"):
        trace.record(Engine(), str(tmp_path / "x"), 5)
    assert cuda_calls == [HISTORY[0], "range perf round", "end of range", "dump", HISTORY[1]]
    assert {path.name for path in tmp_path.iterdir()} == {"x.trace.json", "x.memory.pickle"}


def test_failed_round_stops_the_memory_history(cuda_calls, tmp_path):
    with pytest.raises(RuntimeError, match="no memory"):
        trace.record(Engine(RuntimeError("no memory")), str(tmp_path / "x"), 5)
    assert cuda_calls == [HISTORY[0], "range perf round", "end of range", HISTORY[1]]


def test_torch_without_memory_snapshots_is_traced_without(cuda_calls, monkeypatch, tmp_path):
    monkeypatch.delattr(torch.cuda.memory, "_dump_snapshot")
    with pytest.raises(ValueError, match="lost the kernels"):
        trace.record(Engine(), str(tmp_path / "x"), 5)
    assert cuda_calls == ["range perf round", "end of range"]


def test_images_and_kernels_reach_the_report(traced):
    import synthetic_runs
    from synthetic_runs import results_of

    folder, configuration, answered = traced
    again = Configuration(attention="sdpa", steps=2)
    traces = {one.id: {"trace": answered["ok"]} for one in (configuration, again)}
    (folder / "pictures" / f"{again.id}.png").write_bytes((folder / answered["ok"]["picture"]).read_bytes())
    ones = results_of(synthetic_runs.document("NVIDIA T4", {configuration: 1.0, again: 1.0}, extra=traces))
    (chart,) = breakdown.kernel_charts(ones)
    assert sum(point.y for series in chart.series for point in series.points) == pytest.approx(
        2 * sum(answered["ok"]["seconds"].values())
    )
    found = images.find(ones, folder / "pictures")
    assert [one.result.id for one in found.found] == [configuration.id, again.id] and found.missing is None
    assert found.found[0].difference is None and found.found[1].difference.startswith("data:image/png;base64,")
    assert "2 of 2 configurations have no image" in images.find(ones).missing
    (folder / "pictures" / f"{again.id}.png").write_bytes(b"not a PNG")
    assert "cannot be read" in images.find(ones, folder / "pictures").missing


def test_untraceable_configuration_is_reported(tmp_path):
    class Launches:
        def open(self, slot, own_process):
            return InProcessLaunch()

        def load_arguments(self, slot):
            raise WorkerError("unavailable", "no such kernel here")

    said: list[str] = []
    assert trace_all(Launches(), [Slot(Configuration())], tmp_path / "a", Limits(), said.append) == {}
    assert said[-1] == "perf: tiny-sdpa-b1 was not traced: no such kernel here" and Path(tmp_path / "a").is_dir()
