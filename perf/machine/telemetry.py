"""GPU telemetry of a timed round, and the rules that invalidate a round. Imports neither torch nor pytest."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass

import psutil

from perf.machine.nvml import Device, NoTelemetry, in_initial_pid_namespace

SAMPLE_PERIOD_SECONDS = 0.02
SAMPLES_PER_PID_CHECK = 25  # twice a second: the driver lists processes more slowly than it reads sensors
JOIN_SECONDS = 5.0  # NVML blocks while a GPU hangs; the longest wait for it at the end of a round
POWER_LIMIT_TOLERANCE = 0.01

# A power cap (`sw_power_cap`, the policies `power` and `board_limit`) does not invalidate a round. GPU Boost raises the
# clocks up to the power limit, so that a large GPU at full load is always capped, in every round alike: the cap belongs to
# the result "how fast is this on my GPU". A changed limit would falsify a comparison and is therefore invalid; saved runs
# contain the limit. `reliability` (the voltage limit) is the normal state of a cool GPU with power to spare.
THROTTLE_REASONS = {
    "hw_slowdown",
    "hw_thermal_slowdown",
    "hw_power_brake_slowdown",
    "sw_thermal_slowdown",
    "sync_boost",  # another GPU of the group limits the clocks
    "power_limit_changed",  # determined by Monitor, not NVML
}
THROTTLE_POLICIES = ("thermal", "sync_boost")
# Throttling for a fraction of a round costs at most that fraction of its time; this is a tenth of the smallest margin of a
# verdict (1 %). The counters include throttling between two samples.
VIOLATION_FRACTION = 0.001


@dataclass(frozen=True)
class Sample:
    """Readings at one moment; None if unreadable."""

    seconds: float
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    power_watts: float | None = None
    temperature_celsius: int | None = None
    throttle_reasons: frozenset[str] | None = None


@dataclass(frozen=True)
class Counters:
    """Monotonic counters at the start or end of a round."""

    seconds: float
    energy_joules: float | None = None
    violation_nanoseconds: dict[str, int | None] | None = None


@dataclass(frozen=True)
class RoundTelemetry:
    """The device during one round; None for unreadable values.

    Clocks are medians, the temperature is the maximum, the power is the mean. throttle_reasons: all observed, by
    nvidia-smi's names, including harmless ones. joules_source: `energy_counter`, or `power_samples` where the card has no
    counter (P100) and samples are integrated. The counter advances in steps of tens of milliseconds, so that the joules
    of rounds under a second are coarse. error: why NVML stopped responding.
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
        """All fields as JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


class Monitor:
    """Samples one device during a round, between `start` and `stop`.

    Readings run on a thread and in the driver, outside the interpreter lock. The enforced power limit at construction must
    hold in every round; a change is the throttle reason `power_limit_changed`. With NoTelemetry only the duration is known.
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
        """Begin a round. Raises RuntimeError during another one.

        allowed_pids: processes that may compute on the device, including recently ended ones, which NVML may still list.
        """
        if self._round is not None:
            raise RuntimeError("a round is already being monitored: call stop() first")
        self._round = _Round(self._device, self._clock, self._period_seconds, frozenset(allowed_pids))

    def stop(self) -> RoundTelemetry:
        """End the round. Raises RuntimeError without one."""
        if self._round is None:
            raise RuntimeError("no round is being monitored: call start() first")
        finished, self._round = self._round, None
        return finished.finish(self._power_limit_watts)


class _Round:
    """The state of one round, separate so that a thread blocked in the driver cannot write into the next round."""

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
        self._check_foreign_processes()
        violations = device.violation_nanoseconds()
        self._begin = Counters(energy_joules=device.energy_joules(), seconds=clock(), violation_nanoseconds=violations)
        self._thread = threading.Thread(target=self._sample_periodically, name="perf-telemetry", daemon=True)
        self._thread.start()

    def finish(self, power_limit_watts: float | None) -> RoundTelemetry:
        device = self._device
        if device is None:
            return RoundTelemetry(seconds=self._clock() - self._begin.seconds)
        energy, seconds = device.energy_joules(), self._clock()  # first, since they end the round
        self._ended.set()
        self._thread.join(JOIN_SECONDS)
        if self._thread.is_alive():
            return RoundTelemetry(seconds=seconds - self._begin.seconds, error="NVML does not respond")
        self._samples.append(self._sample())  # even the shortest round has a sample
        self._check_foreign_processes()
        return summarise(
            self._begin,
            Counters(seconds, energy, device.violation_nanoseconds()),
            self._samples,
            foreign_pids=self._foreign,
            power_limit_changed=_moved(power_limit_watts, device.power_limit_watts()),
            error=device.lost,
        )

    def _sample_periodically(self) -> None:
        while True:
            self._samples.append(self._sample())
            if len(self._samples) % SAMPLES_PER_PID_CHECK == 0:
                self._check_foreign_processes()
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

    def _check_foreign_processes(self) -> None:
        listed = self._device.compute_pids()
        if listed is not None:
            allowed = self._allowed_pids
            # A worker's own children may compute too, such as those in which inductor measures candidates.
            if in_initial_pid_namespace() or allowed & set(listed):  # the ids are those of this namespace
                allowed |= {pid for pid in set(listed) - allowed if _descends_from(pid, allowed)}
            alive = sum(map(psutil.pid_exists, allowed))
            foreign = foreign_pids(listed, allowed, alive, in_initial_pid_namespace())
            self._foreign = (self._foreign or set()) | foreign


def _descends_from(pid: int, ancestors: Collection[int]) -> bool:
    try:
        return any(parent.pid in ancestors for parent in psutil.Process(pid).parents())
    except psutil.Error:  # ended, or of another process namespace
        return False


def foreign_pids(listed: Collection[int], allowed: Collection[int], alive: int, same_pid_namespace: bool) -> set[int]:
    """Return the foreign processes among the `listed` compute processes. alive: number of `allowed` processes that exist.

    In a container many drivers list the host's process ids, which differ from the container's. Unless
    `same_pid_namespace` or an allowed id is listed, as many processes are accepted as allowed ones are alive, and the
    surplus is foreign, represented by the highest ids. A foreign process is then missed while a worker has no context yet.
    Used memory does not help: in a container drivers report 0 for each process (NVIDIA/open-gpu-kernel-modules, pull
    request 614).
    """
    listed, allowed = set(listed), set(allowed)
    if same_pid_namespace or listed & allowed:
        return listed - allowed
    return set(sorted(listed)[alive:])


def summarise(
    begin: Counters,
    end: Counters,
    samples: list[Sample],
    foreign_pids: Collection[int] | None = None,
    power_limit_changed: bool = False,
    error: str | None = None,
) -> RoundTelemetry:
    """Summarise a round from its counters and samples. The difference of a counter that ran backwards is None."""
    seconds = end.seconds - begin.seconds
    joules, source = _difference(begin.energy_joules, end.energy_joules), "energy_counter"
    mean_watts = _mean_power_watts(samples)
    if not joules:  # a counter that stood still or was reset
        joules, source = (None, None) if mean_watts is None else (mean_watts * seconds, "power_samples")
    elif seconds > 0:
        mean_watts = joules / seconds
    reasons = [sample.throttle_reasons for sample in samples if sample.throttle_reasons is not None]
    observed = set().union(*reasons, {"power_limit_changed"} if power_limit_changed else ())
    return RoundTelemetry(
        seconds=seconds,
        sm_clock_mhz=_over(samples, "sm_clock_mhz", statistics.median),
        memory_clock_mhz=_over(samples, "memory_clock_mhz", statistics.median),
        power_watts=mean_watts,
        temperature_celsius=_over(samples, "temperature_celsius", max),
        joules=joules,
        joules_source=source,
        throttle_reasons=tuple(sorted(observed)) if reasons or observed else None,
        violation_nanoseconds=_violations(begin.violation_nanoseconds, end.violation_nanoseconds),
        foreign_pids=None if foreign_pids is None else tuple(sorted(foreign_pids)),
        error=error,
    )


def invalid_reason(telemetry: RoundTelemetry) -> str | None:
    """Why the round is invalid, or None, by the rules at THROTTLE_REASONS.

    Unreadable values do not invalidate a round: without NVML all rounds are valid.
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


@dataclass
class WatchedRound:
    """The saved telemetry of a round, and why it is invalid. Without telemetry every round is valid."""

    telemetry: dict | None = None
    invalid: str | None = None


class Watch:
    """Telemetry around a round: `with watch(pid) as watched` fills `watched` on exit. pid: of the worker."""

    def __init__(self, gpu: Device | NoTelemetry):
        self.monitor, self.worker_pids = Monitor(gpu), set()

    @contextlib.contextmanager
    def __call__(self, pid: int) -> Iterator[WatchedRound]:
        """Monitor one round."""
        self.worker_pids.add(pid)  # NVML may list the earlier ones for a moment after their end
        watched = WatchedRound()
        self.monitor.start(self.worker_pids)
        try:
            yield watched
        finally:
            telemetry = self.monitor.stop()
            watched.telemetry, watched.invalid = telemetry.as_dict(), invalid_reason(telemetry)


@contextlib.contextmanager
def no_watch(pid: int) -> Iterator[WatchedRound]:
    """A round without telemetry."""
    yield WatchedRound()
