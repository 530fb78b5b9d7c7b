"""What the GPU did during a round, and whether that makes the round invalid. Imports neither torch nor pytest."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass

from perf.machine.nvml import Device, NoTelemetry, in_initial_pid_namespace

SAMPLE_PERIOD_SECONDS = 0.02
SAMPLES_PER_PID_CHECK = 25  # twice a second: listing the processes takes the driver longer than the other reads
JOIN_SECONDS = 5.0  # NVML blocks while a GPU hangs: a round is not held up longer than this
POWER_LIMIT_TOLERANCE = 0.01

# A power cap (`sw_power_cap`, the policy `power`, `board_limit`) does not make a round invalid. GPU Boost raises the
# clocks until it meets the power limit, so that a large GPU at full load is always capped, most so under the fastest
# configuration, and in every round alike: the cap belongs to the answer "how fast is this on my GPU". What would
# falsify a comparison is another limit, so that a limit which moved is invalid, and the saved run names the limit.
# `reliability` (the voltage limit) is where a cool GPU with power to spare ends up: not a fault either.
THROTTLE_REASONS = {
    "hw_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "sw_thermal_slowdown",
    "sync_boost",  # another GPU of the group decides on this one's clocks
    "power_limit_changed",  # ours, not NVML's: see Monitor
}
THROTTLE_POLICIES = ("thermal", "sync_boost")
# Throttling for a fraction f of a round cannot have cost more than f of its time: this is a tenth of the smallest
# margin of a verdict (1 %). The counters count spells that fall between two samples.
VIOLATION_FRACTION = 0.001


@dataclass(frozen=True)
class Sample:
    """One look at the device; None is what could not be read."""

    seconds: float
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_watts: float | None = None
    temperature_celsius: int | None = None
    throttle_reasons: frozenset[str] | None = None


@dataclass(frozen=True)
class Counters:
    """What only ever grows, at one end of a round."""

    seconds: float
    energy_joules: float | None = None
    violation_nanoseconds: dict[str, int | None] | None = None


@dataclass(frozen=True)
class RoundTelemetry:
    """The device during one round; None is what could not be read.

    The clocks are medians, the temperature is the maximum, the power is the mean. `throttle_reasons` are all that were
    seen, by nvidia-smi's names, harmless ones too. `joules_source` is `energy_counter`, or `power_samples` where the
    card has no counter (P100) and the samples were integrated. The counter moves in steps of tens of milliseconds, so
    that the joules of rounds under a second are coarse. `error` says how NVML ceased to answer.
    """

    seconds: float | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_watts: float | None = None
    temperature_celsius: int | None = None
    joules: float | None = None
    joules_source: str | None = None
    throttle_reasons: tuple[str, ...] | None = None
    violation_nanoseconds: dict[str, int | None] | None = None
    foreign_pids: tuple[int, ...] | None = None
    error: str | None = None

    def as_dict(self) -> dict:
        """All fields, ready for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Monitor:
    """Watches one device, a round at a time: `start`, the round, `stop`.

    The reads run on a thread and in the driver, outside the interpreter's lock. The enforced power limit of the moment
    in which the monitor is made is the one that every round must have: another one is the reason
    `power_limit_changed`. With a NoTelemetry it takes the time and leaves everything else None.
    """

    def __init__(
        self, device: Device | NoTelemetry, period_seconds: float = SAMPLE_PERIOD_SECONDS, clock=time.monotonic
    ):
        self._device = None if isinstance(device, NoTelemetry) else device
        self._period_seconds = period_seconds
        self._clock = clock
        self._power_limit_watts = None if self._device is None else self._device.power_limit_watts()
        self._round: _Round | None = None

    def start(self, allowed_pids: Collection[int] = ()) -> None:
        """Begin a round. `allowed_pids` are the processes that may compute on the device: the workers.

        A process that has just ended may be listed a moment longer: name it too. RuntimeError if a round is running.
        """
        if self._round is not None:
            raise RuntimeError("a round is being watched already: stop() comes first")
        self._round = _Round(self._device, self._clock, self._period_seconds, frozenset(allowed_pids))

    def stop(self) -> RoundTelemetry:
        """End the round that `start` began. RuntimeError without one."""
        if self._round is None:
            raise RuntimeError("no round is being watched: start() comes first")
        ended, self._round = self._round, None
        return ended.finish(self._power_limit_watts)


class _Round:
    """The state of one round, apart, so that a thread stuck in the driver cannot write into the next one's."""

    def __init__(self, device: Device | None, clock, period_seconds: float, allowed_pids: frozenset[int]):
        self._device = device
        self._clock = clock
        self._period_seconds = period_seconds
        self._allowed_pids = allowed_pids
        self._samples: list[Sample] = []
        self._foreign: set[int] | None = None
        self._ended = threading.Event()
        self._thread = None
        if device is None:
            self._begin = Counters(clock())
            return
        self._look_for_strangers()
        violations = device.violation_nanoseconds()
        self._begin = Counters(energy_joules=device.energy_joules(), seconds=clock(), violation_nanoseconds=violations)
        self._thread = threading.Thread(target=self._watch, name="perf-telemetry", daemon=True)
        self._thread.start()

    def finish(self, power_limit_watts: float | None) -> RoundTelemetry:
        device = self._device
        if device is None:
            return RoundTelemetry(seconds=self._clock() - self._begin.seconds)
        energy, seconds = device.energy_joules(), self._clock()  # first: they are the ends of the round
        self._ended.set()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            return RoundTelemetry(seconds=seconds - self._begin.seconds, error="NVML does not answer")
        self._samples.append(self._sample())  # the shortest round has one
        self._look_for_strangers()
        return summarise(
            self._begin,
            Counters(seconds, energy, device.violation_nanoseconds()),
            self._samples,
            foreign_pids=self._foreign,
            power_limit_changed=_moved(power_limit_watts, device.power_limit_watts()),
            error=device.lost,
        )

    def _watch(self) -> None:
        while True:
            self._samples.append(self._sample())
            if len(self._samples) % SAMPLES_PER_PID_CHECK == 0:
                self._look_for_strangers()
            if self._ended.wait(self._period_seconds):
                return

    def _sample(self) -> Sample:
        return Sample(
            seconds=self._clock(),
            sm_clock_mhz=self._device.sm_clock_mhz(),
            memory_clock_mhz=self._device.memory_clock_mhz(),
            power_watts=self._device.power_watts(),
            temperature_celsius=self._device.temperature_celsius(),
            throttle_reasons=self._device.clocks_event_reasons(),
        )

    def _look_for_strangers(self) -> None:
        listed = self._device.compute_pids()
        if listed is not None:
            living = [pid for pid in self._allowed_pids if os.path.exists(f"/proc/{pid}")]
            found = foreign_pids(listed, self._allowed_pids, len(living), in_initial_pid_namespace())
            self._foreign = (self._foreign or set()) | found


def foreign_pids(listed: Collection[int], allowed: Collection[int], living: int, same_numbering: bool) -> set[int]:
    """Those of the `listed` compute processes that are none of the `allowed`, of which so many are `living`.

    In a container many drivers list the host's pids, which are other numbers for the same processes. So where
    `same_numbering` is not certain and no allowed pid is listed, as many processes pass as allowed ones live, and only
    the surplus is foreign (by number it cannot be told which: the highest stand for it). A stranger that comes while a
    worker has no context yet is then missed. Used memory is no help: in a container drivers report 0 for each process
    (NVIDIA/open-gpu-kernel-modules, pull request 614).
    """
    listed, allowed = set(listed), set(allowed)
    if same_numbering or listed & allowed:
        return listed - allowed
    return set(sorted(listed)[living:])


def summarise(
    begin: Counters,
    end: Counters,
    samples: list[Sample],
    foreign_pids: Collection[int] | None = None,
    power_limit_changed: bool = False,
    error: str | None = None,
) -> RoundTelemetry:
    """One round from its two ends and the samples between them. A counter that ran backwards is None."""
    seconds = end.seconds - begin.seconds
    joules, source = _difference(begin.energy_joules, end.energy_joules), "energy_counter"
    mean_watts = _mean_power_watts(samples)
    if not joules:  # no GPU runs on nothing: a counter that stood still, or was reset, is no counter
        joules, source = (None, None) if mean_watts is None else (mean_watts * seconds, "power_samples")
    elif seconds > 0:
        mean_watts = joules / seconds
    reasons = [sample.throttle_reasons for sample in samples if sample.throttle_reasons is not None]
    seen = set().union(*reasons, {"power_limit_changed"} if power_limit_changed else ())
    return RoundTelemetry(
        seconds=seconds,
        sm_clock_mhz=_over(samples, "sm_clock_mhz", statistics.median),
        memory_clock_mhz=_over(samples, "memory_clock_mhz", statistics.median),
        power_watts=mean_watts,
        temperature_celsius=_over(samples, "temperature_celsius", max),
        joules=joules,
        joules_source=source,
        throttle_reasons=tuple(sorted(seen)) if reasons or seen else None,
        violation_nanoseconds=_violations(begin.violation_nanoseconds, end.violation_nanoseconds),
        foreign_pids=None if foreign_pids is None else tuple(sorted(foreign_pids)),
        error=error,
    )


def invalid_reason(telemetry: RoundTelemetry) -> str | None:
    """Why the round's time cannot be trusted, or None. The rules stand beside THROTTLE_REASONS above.

    What could not be read makes no round invalid: on a machine without NVML all rounds are valid.
    """
    reasons = [name for name in telemetry.throttle_reasons or () if name in THROTTLE_REASONS]
    for policy in THROTTLE_POLICIES:
        nanoseconds = (telemetry.violation_nanoseconds or {}).get(policy)
        if nanoseconds and nanoseconds * 1e-9 > VIOLATION_FRACTION * (telemetry.seconds or 0):
            reasons.append(f"{policy} violation for {nanoseconds * 1e-6:.0f} ms")
    parts = []
    if telemetry.error:
        parts.append(f"device lost: {telemetry.error}")
    if reasons:
        parts.append(f"throttled: {', '.join(reasons)}")
    if telemetry.foreign_pids:
        parts.append(f"shared with pid {', '.join(map(str, telemetry.foreign_pids))}")
    return "; ".join(parts) or None


def _moved(before_watts: float | None, after_watts: float | None) -> bool:
    if before_watts is None or after_watts is None:
        return False
    return abs(after_watts - before_watts) > POWER_LIMIT_TOLERANCE * before_watts


def _difference(begin, end):
    return None if begin is None or end is None or end < begin else end - begin


def _violations(begin: dict | None, end: dict | None) -> dict[str, int | None] | None:
    differences = {name: _difference(value, (end or {}).get(name)) for name, value in (begin or {}).items()}
    return differences if any(value is not None for value in differences.values()) else None


def _over(samples: list[Sample], field: str, statistic):
    values = [value for value in (getattr(sample, field) for sample in samples) if value is not None]
    return statistic(values) if values else None


def _mean_power_watts(samples: list[Sample]) -> float | None:
    """Mean over time (trapezoids), because a busy machine samples unevenly. None from less than two samples."""
    points = [(sample.seconds, sample.power_watts) for sample in samples if sample.power_watts is not None]
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return None
    area = sum((t1 - t0) * (p0 + p1) / 2 for (t0, p0), (t1, p1) in itertools.pairwise(points))
    return area / (points[-1][0] - points[0][0])


class Watch:
    """Telemetry around a round; use as `with watch(pid) as watched`."""

    def __init__(self, gpu):
        self.monitor, self.seen = Monitor(gpu), set()
        self.telemetry, self.invalid = None, None

    @contextlib.contextmanager
    def __call__(self, pid: int):
        self.seen.add(pid)  # one that has just ended may be listed a moment longer
        self.telemetry, self.invalid = None, None
        self.monitor.start(self.seen)
        try:
            yield self
        finally:
            telemetry = self.monitor.stop()
            self.telemetry, self.invalid = telemetry.as_dict(), invalid_reason(telemetry)


@dataclass
class _Unwatched:
    telemetry = None
    invalid = None


@contextlib.contextmanager
def no_watch(pid: int):
    """Where there is no telemetry every round is valid."""
    yield _Unwatched()
