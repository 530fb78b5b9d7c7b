"""Errors as users meet them: what is too large is told with the way out, and the rest of the run goes on."""

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
LIMIT = (  # a GiB more than the process has, which the kernel then holds it to
    "import resource; size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30);"
    " resource.setrlimit(resource.RLIMIT_AS, (size, size))"
)


# --- out of memory


def test_out_of_memory_is_reported_with_the_way_out_and_the_run_goes_on(inner):
    told = "out of memory at a peak of 70.10 GiB: try batch 2"
    inner.machine.refused = {SDPA: ("out_of_memory", told)}
    result = inner.run("--benchmark-save=a", what=TWO)
    assert result.ret == ExitCode.FAILED
    result.assert_outcomes(passed=1, failed=1)
    inner.says(f"INVALID {SDPA}: out_of_memory: {told}")
    saved = inner.last()
    assert [one["extra_info"]["configuration"]["id"] for one in saved["benchmarks"]] == [ORIGINAL]
    assert saved["perf"]["partial"] == "1 failed"


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the limit is set as Linux has it")
def test_a_worker_whose_memory_is_limited_says_what_to_try_and_goes_on_with_less():
    """A real refusal of the kernel, in the middle of a real round."""
    how = {"device": "cpu", "clock": "cpu", "threads": 1}
    with ProcessLaunch(Interpreter(), real(LIMIT)) as limited:
        limited.ask("load", 60.0, configuration=LARGE.as_dict(), **how)
        limited.ask("ping", 20.0, what="limit")
        for _ in range(2):
            with pytest.raises(WorkerError, match=r"^out of memory at a peak of \d\.\d\d GiB: try batch 2$") as caught:
                limited.ask("round", 60.0, seed=1)
            assert caught.value.kind == "out_of_memory"
            limited.ask("load", 60.0, configuration=TINY.as_dict(), **how)
            assert limited.ask("round", 60.0, seed=1)["image"]["finite"]
            limited.ask("load", 60.0, configuration=LARGE.as_dict(), **how)


class Held:
    """Stands for a gigabyte."""


class Full:
    """An engine whose round holds memory when there is no more."""

    def __init__(self):
        self.seen = []

    def round(self, seed: int):
        """Out of memory twice: while the first error is dealt with, as in PyTorch's own retry."""
        first = Held()
        self.seen.append(weakref.ref(first))
        try:
            raise RuntimeError("CUDA out of memory")
        except RuntimeError:
            second = Held()
            self.seen.append(weakref.ref(second))
            raise RuntimeError("CUDA out of memory. Tried again") from None


def test_what_the_round_held_is_free_before_the_device_is_asked_to_let_go(monkeypatch):
    full, left = Worker(), []
    full.engine, full.configuration = Full(), TINY
    seen = full.engine.seen
    monkeypatch.setattr(worker, "release_device_memory", lambda: left.append([one() for one in seen]))
    assert error(full, op="round", seed=1)[0] == "out_of_memory"
    assert left == [[None, None]]


def test_a_full_gpu_is_told_by_what_it_had_allocated(monkeypatch, capsys):
    """And one that cannot even let go any more, since an error has poisoned it, costs no answer."""
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


def test_an_error_that_poisons_the_process_ends_that_worker_alone(fake, tmp_path):  # noqa: F811
    """The context of CUDA is lost with its process; every launch has a process of its own."""
    kind = {"do": "error", "kind": "failed", "message": f"RuntimeError: {ILLEGAL}"}
    fake(at=[{"op": "round", "id": B.id, **kind}])  # every round from the first on, as a poisoned context does
    session, _ = measure(tmp_path)
    found = summary(session)
    assert found["failures"] == {A.id: None, B.id: ("failed", f"RuntimeError: {ILLEGAL}")}
    assert found["seconds"][A.id] == {"0": [0.01, 0.01], "1": [0.01, 0.01]}
    pids = [(event["slot"], event["answer"]["pid"]) for event in events(tmp_path) if event["event"] == "load"]
    assert [slot for slot, _ in pids] == [A.id, B.id, A.id]
    assert len({pid for _, pid in pids}) == 3 and not any(alive(pid) for _, pid in pids)


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
        assert next_one.ask("round", 60.0, seed=1)["image"]["finite"]
