"""Throughput of replicas: the order of rounds, the arithmetic, and real replicas on the CPU."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading

import pytest

from perf import throughput
from perf.analysis.verdicts import ExitCode
from perf.launch.process import ROOT
from perf.throughput import Cycle, ReplicasFailed, Throughput, measure

TASK = ("--attention=original", "--steps=1", "--sampler=euler", "--scale=1")


class Threads:
    """A group of threads in place of processes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, shared: list):
        self.rank, self.size, self._barrier, self._shared = rank, size, barrier, shared

    def barrier(self) -> None:
        self._barrier.wait(10)

    def gather(self, value):
        self._shared[self.rank] = value
        self.barrier()
        values = list(self._shared)
        self.barrier()
        return values


def test_replicas_run_alone_in_turn_and_then_together():
    size, cycles, events, lock = 3, 2, [], threading.Lock()
    barrier, shared, results = threading.Barrier(size), [None] * size, [None] * size

    def replica(rank: int) -> None:
        def round_seconds() -> float:
            with lock:
                events.append(("begin", rank))
            with lock:
                events.append(("end", rank))
            return 1.0 + rank

        results[rank] = measure(Threads(rank, size, barrier, shared), round_seconds, cycles)

    threads = [threading.Thread(target=replica, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert results == [[Cycle((1.0, 2.0, 3.0), (1.0, 2.0, 3.0))] * cycles] * size
    both = 2 * size
    phases = [events[start : start + both] for start in range(0, len(events), both)]
    assert len(phases) == 1 + 2 * cycles  # the warm-up
    in_turn = [(what, rank) for rank in range(size) for what in ("begin", "end")]
    for i, phase in enumerate(phases):
        assert sorted(phase) == sorted(in_turn)
        if i % 2 == 1:
            assert phase == in_turn


@pytest.mark.parametrize("failing_round", [0, 1, 2])
def test_an_error_of_one_replica_ends_all(failing_round):
    """Otherwise the others wait for it until the timeout."""
    size, barrier, shared = 2, threading.Barrier(2), [None] * 2
    errors: list = [None] * size

    def replica(rank: int) -> None:
        rounds = itertools.count()

        def round_seconds() -> float:
            if rank == 1 and next(rounds) == failing_round:
                raise MemoryError("no more")
            return 1.0

        try:
            measure(Threads(rank, size, barrier, shared), round_seconds, cycles=2)
        except ReplicasFailed as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=replica, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert errors[0] == errors[1] and errors[0].startswith("replica 1 on ") and "MemoryError: no more" in errors[0]


def cycles(alone, together, noise=(0.99, 1.0, 1.01, 1.0)):
    return Throughput(2, tuple(Cycle(tuple(f * s for s in alone), tuple(f * s for s in together)) for f in noise))


def test_a_machine_without_contention_scales_perfectly():
    efficiency = cycles((1.0, 1.0), (1.0, 1.0)).efficiency()
    assert (efficiency.estimate, efficiency.low, efficiency.high) == pytest.approx((1.0, 1.0, 1.0))


def test_contention_and_a_slow_replica_are_seen():
    """Two replicas that need twice the time together, and one of four that needs 50 % more even alone."""
    halved = cycles((1.0, 1.0), (2.0, 2.0))
    assert halved.efficiency().estimate == pytest.approx(0.5)
    rate = halved.images_per_second()
    assert rate.low < 2.0 < rate.high and rate.estimate == pytest.approx(2.0, rel=1e-3)  # 2 replicas of 2 images in 2 s
    uneven = cycles((1.0, 1.0, 1.5, 1.0), (1.0, 1.0, 1.5, 1.0))
    assert uneven.slowest() == 2 and uneven.median_seconds(2) == pytest.approx((1.5, 1.5))
    # A round ends with the slow replica: 4 / 1.5 images/s of the 3 + 1 / 1.5 that they make alone.
    assert uneven.efficiency().estimate == pytest.approx((4 / 1.5) / (3 + 1 / 1.5))


def torchrun(*arguments: str, replicas: int = 2) -> subprocess.CompletedProcess:
    pytest.importorskip("torch.distributed.run", reason="this torch has no torchrun")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(replicas), "--standalone"]
    return subprocess.run(
        [*command, "-m", "perf.throughput", "--device=cpu", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.slow  # two processes import torch
def test_replicas_on_the_cpu(tmp_path):
    done = torchrun(*TASK, "--cycles=2", f"--output={tmp_path / 'a.json'}")
    assert done.returncode == 0, done
    assert "tiny-original-euler1-unguided-cpu-b1: 2 replicas on cpu, 2 cycles" in done.stdout
    assert done.stdout.count("scaling efficiency: ") == 1  # rank 0 alone prints
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [facts["rank"] for facts in saved["replicas"]] == [0, 1]
    for key in ("seconds_alone", "seconds_together"):
        assert [len(ranks) for ranks in saved[key]] == [2, 2]
        assert all(0 < seconds < 60 for ranks in saved[key] for seconds in ranks)
    rates = [2 / max(ranks) for ranks in saved["seconds_together"]]
    assert saved["images_per_second"][0] == pytest.approx(math.sqrt(math.prod(rates)))


class OneProcess:
    """A group of this process alone. Gloo is tested by the processes of torchrun above."""

    rank, size = 0, 1

    def __init__(self, timeout_seconds: float):
        pass

    def barrier(self) -> None:
        pass

    def gather(self, value):
        return [value]

    def close(self) -> None:
        pass


@pytest.fixture
def one_replica(monkeypatch):
    """This process as the only one of torchrun."""
    pytest.importorskip("torch")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(throughput, "GlooGroup", OneProcess)


def test_one_replica(one_replica, capsys):
    assert throughput.main(["--device=cpu", *TASK, "--cycles=2"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny-original-euler1-unguided-cpu-b1: 1 replicas on cpu, 2 cycles" and len(lines) == 4


def test_a_replica_that_cannot_load_is_named(one_replica, capsys):
    assert throughput.main(["--device=cpu", "--optimise=nonsense"]) == ExitCode.FAILED
    assert "replica 0 on " in (err := capsys.readouterr().err) and "optimise 'nonsense'" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--cycles=1"], "--cycles 1: at least 2, for an interval"),
        (["--batch=0"], "'0' is not a whole number of at least 1"),
        (["--model=sd9"], "'sd9': choose from"),
    ],
)
def test_invalid_options(one_replica, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        throughput.main(arguments)
    assert ended.value.code == ExitCode.REFUSED
    assert message in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_measuring(one_replica, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        throughput.main(["--output", str(tmp_path / "file" / "runs.json")])
    assert ended.value.code == ExitCode.REFUSED and "--output" in capsys.readouterr().err


def test_without_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        throughput.main([])
    assert "start it with torchrun, one process per device" in capsys.readouterr().err
