"""Failures of workers: out of memory and poisoned CUDA contexts, after which the session continues."""

from __future__ import annotations

import os
import time
import weakref

import pytest
from inner_session import ORIGINAL, SDPA, TWO, inner_fixture, machine_fixture  # noqa: F401 (fixtures)
from test_session import A, B, events, fake, measure, summary  # noqa: F401 (fake is a fixture)
from test_worker import TINY, alive, error, loading, real

from perf.analysis.verdicts import ExitCode
from perf.configurations.configuration import Configuration
from perf.launch.process import Interpreter, ProcessLaunch
from perf.worker import clock
from perf.worker import server as worker
from perf.worker.server import Worker
from perf.worker.wire import WorkerError

ILLEGAL = "CUDA error: an illegal memory access was encountered"
# Five heads, 4096 tokens, guidance's eight: 2.7 GB of scores in one piece.
LARGE = Configuration(attention="original", batch=4, steps=2, sampler="ddim", height=512, width=512)
LIMIT = (  # limits the address space to 1 GiB more than the process has
    "import resource; size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30);"
    " resource.setrlimit(resource.RLIMIT_AS, (size, size))"
)


# --- out of memory


def test_out_of_memory_is_reported_with_advice_and_the_run_continues(inner):
    message = "out of memory at a peak of 70.10 GiB: try batch 2"
    inner.machine.refused = {SDPA: ("out_of_memory", message)}
    result = inner.run("--benchmark-save=a", what=TWO)
    assert result.ret == ExitCode.FAILED
    result.assert_outcomes(passed=1, failed=1)
    inner.prints(f"INVALID {SDPA}: out_of_memory: {message}")
    saved = inner.last()
    assert [benchmark["extra_info"]["configuration"]["id"] for benchmark in saved["benchmarks"]] == [ORIGINAL]
    assert saved["perf"]["partial"] == "1 failed"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit is read from Linux's /proc")
def test_worker_recovers_from_out_of_memory_with_a_smaller_configuration():
    """The allocation fails for real, in the middle of a round."""
    options = {"device": "cpu", "clock": "cpu", "threads": 1}
    with ProcessLaunch(Interpreter(), real(LIMIT)) as limited:
        limited.ask("load", 60.0, configuration=LARGE.as_dict(), **options)
        limited.ask("ping", 20.0, what="limit")
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"^out of memory at a peak of \d\.\d\d GiB: try batch 2$") as caught:
                limited.ask("round", 60.0, seed=1)
            assert caught.value.kind == "out_of_memory"
            limited.ask("load", 60.0, configuration=TINY.as_dict(), **options)
            assert limited.ask("round", 60.0, seed=1)["seconds"] > 0
            assert limited.ask("examine", 60.0)["image"]["finite"]
            limited.ask("load", 60.0, configuration=LARGE.as_dict(), **options)


class Held:
    """Object whose lifetime stands for that of a large allocation."""


class Full:
    """Engine whose round runs out of memory while it holds allocations."""

    def __init__(self):
        self.references = []

    def prepare(self, seed: int):
        pass

    def round(self, seed: int):
        """Fail twice, the second time in the handler of the first, as in PyTorch's own retry."""
        first = Held()
        self.references.append(weakref.ref(first))
        try:
            raise RuntimeError("CUDA out of memory")
        except RuntimeError:
            second = Held()
            self.references.append(weakref.ref(second))
            raise RuntimeError("CUDA out of memory. Tried again") from None


def test_allocations_of_the_round_are_freed_before_device_memory_is_released(monkeypatch):
    full, alive_at_release = Worker(), []
    full.engine, full.configuration = Full(), TINY
    references = full.engine.references
    monkeypatch.setattr(
        worker, "release_device_memory", lambda: alive_at_release.append([reference() for reference in references])
    )
    assert error(full, op="round", seed=1)[0] == "out_of_memory"
    assert alive_at_release == [[None, None]]


def test_gpu_out_of_memory_reports_allocated_memory(monkeypatch, capsys):
    """A context that is poisoned, so that its memory cannot be released, does not prevent the response."""
    import torch

    def poisoned():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(clock, "uses_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 71 << 30)
    monkeypatch.setattr(torch.cuda, "empty_cache", poisoned)
    full = Worker()
    full.engine, full.configuration, full.clock = Full(), Configuration(batch=8), time.perf_counter
    assert error(full, op="round", seed=1) == ("out_of_memory", "out of memory at a peak of 70.00 GiB: try batch 4")
    assert "could not be released: CUDA error: device-side assert" in capsys.readouterr().err


# --- an error that poisons the process


def test_poisoned_process_ends_only_its_own_worker(fake, tmp_path):  # noqa: F811
    """The CUDA context ends with its process; every launch has its own process."""
    failure = {"do": "error", "kind": "failed", "message": f"RuntimeError: {ILLEGAL}"}
    fake(at=[{"op": "round", "id": B.id, **failure}])  # every round from the first on, as a poisoned context does
    session, _ = measure(tmp_path)
    result = summary(session)
    assert result["failures"] == {A.id: None, B.id: ("failed", f"RuntimeError: {ILLEGAL}")}
    assert result["seconds"][A.id] == {"0": [0.01, 0.01], "1": [0.01, 0.01]}
    pids = [(event["slot"], event["answer"]["pid"]) for event in events(tmp_path) if event["event"] == "load"]
    assert sorted(slot for slot, _ in pids if not slot.endswith("@control")) == sorted([A.id, B.id, A.id])
    assert len({pid for _, pid in pids}) == len(pids) and not any(alive(pid) for _, pid in pids)


@pytest.mark.gpu
def test_a_poisoned_gpu_context_ends_with_its_worker():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    poison = "import torch; torch.zeros(1, device='cuda')[torch.tensor([9], device='cuda')].cpu()"
    request = loading(device="cuda", clock="wall", threads=None)
    request.pop("op")
    with ProcessLaunch(Interpreter(), real(poison)) as poisoned:
        poisoned.ask("load", 120.0, **request)
        for operation, arguments in (("ping", {"what": 1}), ("round", {"seed": 1})):
            with pytest.raises(WorkerError, match="CUDA error") as caught:
                poisoned.ask(operation, 60.0, **arguments)
            assert caught.value.kind == "failed"
    with ProcessLaunch(Interpreter()) as next_one:
        next_one.ask("load", 120.0, **request)
        next_one.ask("round", 60.0, seed=1)
        assert next_one.ask("examine", 60.0)["image"]["finite"]
