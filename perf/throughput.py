"""Throughput of several replicas of one configuration, one per device: `torchrun --nproc-per-node 8 -m perf.throughput`.

A cycle runs each replica alone, one after the other, then all at once after a barrier. The scaling efficiency is the
images/s of all at once over the sum of those alone, both of the same cycle.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from perf.analysis.paired import ratio_of_effects
from perf.analysis.statistics import Interval
from perf.analysis.verdicts import ExitCode
from perf.commands import Parser
from perf.configurations.configuration import Configuration, UnknownChoice, usual
from perf.configurations.sets import cross
from perf.plugin.options import MATRIX
from perf.runs.storage import why_unwritable, write_atomically

SCHEMA = 1
MIN_CYCLES = 2  # of an interval


class Group(Protocol):
    """The processes of torchrun."""

    rank: int
    size: int

    def barrier(self) -> None:
        """Wait for all replicas."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every replica, by rank."""


class GlooGroup:
    """A group over sockets: nothing that is exchanged is on a device. Waiting processes sleep."""

    def __init__(self, timeout_seconds: float):
        from torch import distributed

        self._distributed = distributed
        distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def barrier(self) -> None:
        """Wait for all replicas."""
        self._distributed.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every replica, by rank."""
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the group."""
        self._distributed.destroy_process_group()


@dataclass(frozen=True)
class Cycle:
    """Seconds of a round by rank: of each replica alone, and of all at once."""

    alone: tuple[float, ...]
    together: tuple[float, ...]


@dataclass(frozen=True)
class Throughput:
    """Measured cycles of replicas that make `batch` images in a round."""

    batch: int
    cycles: tuple[Cycle, ...]

    def images_per_second(self) -> Interval:
        """Of all replicas together; a round ends with its slowest replica."""
        replicas = len(self.cycles[0].together)
        return ratio_of_effects([math.log(replicas * self.batch / max(cycle.together)) for cycle in self.cycles])

    def efficiency(self) -> Interval:
        """Images/s together over the sum of images/s alone, by cycle: 1 where the replicas do not slow each other."""
        return ratio_of_effects(
            [
                math.log(len(cycle.together) / max(cycle.together) / math.fsum(1 / seconds for seconds in cycle.alone))
                for cycle in self.cycles
            ]
        )

    def median_seconds(self, rank: int) -> tuple[float, float]:
        """Median seconds of a round of one replica, alone and together."""
        alone = statistics.median(cycle.alone[rank] for cycle in self.cycles)
        return alone, statistics.median(cycle.together[rank] for cycle in self.cycles)

    def slowest(self) -> int:
        """The rank with the longest rounds together."""
        return max(range(len(self.cycles[0].together)), key=lambda rank: self.median_seconds(rank)[1])


class ReplicasFailed(RuntimeError):
    """A line for each replica that failed. Every rank raises it, so that none waits for another."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))


def gather_outcomes(group: Group, work: Callable[[], Any]) -> list[Any]:
    """What `work` returned on each rank. Raises ReplicasFailed if it raised on any."""
    value, problem = None, None
    try:
        value = work()
    except Exception as error:  # of another class in each version of torch
        problem = f"replica {group.rank} on {platform.node()}: {type(error).__name__}: {' '.join(str(error).split())}"
    outcomes = group.gather((value, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        raise ReplicasFailed(problems)
    return [value for value, _ in outcomes]


def measure(group: Group, round_seconds: Callable[[], float], cycles: int) -> list[Cycle]:
    """Run the cycles after one warm-up round of each replica, in which the first calls compile. Every rank returns all.

    Raises ReplicasFailed on all ranks.
    """
    gather_outcomes(group, round_seconds)
    measured = []
    for _ in range(cycles):
        alone = []
        for rank in range(group.size):
            seconds = gather_outcomes(group, lambda rank=rank: round_seconds() if rank == group.rank else None)
            alone.append(seconds[rank])
        group.barrier()
        measured.append(Cycle(tuple(alone), tuple(gather_outcomes(group, round_seconds))))
    return measured


class Replica:
    """A loaded configuration on this process's device. Raises what loading raises, and ValueError for a wrong image."""

    def __init__(self, configuration: Configuration, rank: int, threads: int | None):
        import torch

        from perf.worker import images, server
        from perf.worker.clock import wall_clock
        from perf.worker.engines import open_engine

        device = configuration.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if threads:
            torch.set_num_threads(threads)
        self.clock, self.examine = wall_clock, images.examine
        self.engine = open_engine(configuration.as_dict(), device)
        self.facts = {**server.torch_facts(device), "host": platform.node(), "rank": rank}
        self.seed = configuration.seed + rank * configuration.batch  # images of their own

    def round_seconds(self) -> float:
        """Wall seconds of one round, whose image is then examined."""
        self.engine.prepare(self.seed)
        gc.collect()
        begin = self.clock()
        output = self.engine.round(self.seed)
        seconds: float = self.clock() - begin
        image = self.examine(output, None)
        if not image["finite"] or image["constant"]:
            raise ValueError(f"wrong image: {'constant' if image['finite'] else 'not finite'}")
        return seconds


def parser() -> Parser:
    """Options: those that describe a configuration, as in `pytest perf`, and those of this measurement."""
    result = Parser(
        prog="torchrun --nproc-per-node N -m perf.throughput",
        description="Measure N replicas of one configuration: images/s together, scaling efficiency, slowest replica.",
        allow_abbrev=False,
    )
    for option, field, read, help in MATRIX:
        result.add_argument(option, dest=field, type=read, metavar=field.upper(), help=help)
    help = f"rounds of each replica alone and of all at once, at least {MIN_CYCLES} (default: 10)"
    result.add_argument("--cycles", type=int, default=10, metavar="N", help=help)
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads of each replica (default: torch's)")
    result.add_argument(
        "--timeout", type=float, default=1800, help="seconds to wait for the slowest replica (default: 1800)"
    )
    result.add_argument("--output", type=Path, metavar="FILE", help="write all rounds as JSON")
    return result


def configuration_of(arguments: argparse.Namespace) -> Configuration:
    """The configuration of the options. Raises UnknownChoice."""
    values = {field: getattr(arguments, field) for _, field, *_ in MATRIX}
    model = usual(values["model"] or "tiny")
    (configuration,) = cross([model], {field: [value] for field, value in values.items() if value is not None})
    return configuration


def report(throughput: Throughput, configuration: Configuration, replicas: Sequence[dict]) -> list[str]:
    """Lines for the terminal. replicas: facts of each, by rank."""
    rate, efficiency, slowest = throughput.images_per_second(), throughput.efficiency(), throughput.slowest()
    devices = ", ".join(sorted({str(facts["name"] or facts["device"]) for facts in replicas}))
    alone, together = throughput.median_seconds(slowest)
    others = [throughput.median_seconds(rank)[1] for rank in range(len(replicas))]
    behind = 100 * (together / statistics.median(others) - 1)
    return [
        f"{configuration.id}: {len(replicas)} replicas on {devices}, {len(throughput.cycles)} cycles",
        f"images/s together: {rate.estimate:.4g} [{rate.low:.4g}, {rate.high:.4g}]",
        f"scaling efficiency: {efficiency.estimate:.3f} [{efficiency.low:.3f}, {efficiency.high:.3f}]",
        f"slowest replica: {slowest} on {replicas[slowest]['host']}, {together:.4g} s a round together, "
        f"{behind:.1f} % above the median replica, {alone:.4g} s alone",
    ]


def as_json(throughput: Throughput, configuration: Configuration, replicas: Sequence[dict]) -> dict[str, Any]:
    """All rounds, for other programs. Intervals are [estimate, low, high] at 95 %."""
    rate, efficiency = throughput.images_per_second(), throughput.efficiency()
    return {
        "schema": SCHEMA,
        "configuration": configuration.as_dict(),
        "replicas": list(replicas),
        "images_per_second": [rate.estimate, rate.low, rate.high],
        "scaling_efficiency": [efficiency.estimate, efficiency.low, efficiency.high],
        "slowest_rank": throughput.slowest(),
        "seconds_alone": [list(cycle.alone) for cycle in throughput.cycles],
        "seconds_together": [list(cycle.together) for cycle in throughput.cycles],
    }


def main(argv: list[str] | None = None) -> int:
    """Run one replica; rank 0 prints and writes for all. Returns its exit status (perf.analysis.verdicts.ExitCode)."""
    options = parser()
    arguments = options.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        options.error("start it with torchrun, one process per device: torchrun --nproc-per-node 2 -m perf.throughput")
    if arguments.cycles < MIN_CYCLES:
        options.error(f"--cycles {arguments.cycles}: at least {MIN_CYCLES}, for an interval")
    writes = os.environ.get("RANK", "0") == "0" and arguments.output is not None
    if writes and (reason := why_unwritable(arguments.output)):
        options.error(f"--output {arguments.output}: {reason}")
    try:
        configuration = configuration_of(arguments)
    except UnknownChoice as error:
        options.error(str(error))
    group = GlooGroup(arguments.timeout)
    try:
        return _measure_and_report(group, configuration, arguments)
    finally:
        group.close()


def _measure_and_report(group: GlooGroup, configuration: Configuration, arguments: argparse.Namespace) -> int:
    loaded: list[Replica] = []

    def load() -> dict[str, Any]:
        loaded.append(Replica(configuration, group.rank, arguments.threads))
        return loaded[0].facts

    try:
        replicas = gather_outcomes(group, load)
        cycles = measure(group, loaded[0].round_seconds, arguments.cycles)
    except ReplicasFailed as error:
        if group.rank == 0:
            print(error, file=sys.stderr)
        return ExitCode.FAILED
    finally:
        for replica in loaded:
            with contextlib.suppress(Exception):  # it has no effect on what was measured
                replica.engine.release()
    throughput = Throughput(configuration.batch, tuple(cycles))
    if group.rank == 0:
        print("\n".join(report(throughput, configuration, replicas)))
        if arguments.output is not None:
            write_atomically(arguments.output, as_json(throughput, configuration, replicas))
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(main())
