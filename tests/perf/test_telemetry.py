"""GPU telemetry of a round through a fake NVML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from fake_nvml import (
    GPU_IS_LOST,
    MIG_UUID,
    NOT_SUPPORTED,
    UUID,
    FakeNvml,
    NVMLError,
    Steps,
    install_fixture,  # noqa: F401
)

from perf.machine.nvml import GpuFacts, NoTelemetry, open_device, open_visible_device
from perf.machine.telemetry import (
    Monitor,
    RoundTelemetry,
    invalid_reason,
)

NEVER = 3600.0  # seconds between two samples: the thread takes its first one and no other


def watched(library: FakeNvml, during=lambda: None, allowed_pids=(), uuid: str | None = UUID) -> RoundTelemetry:
    """A round of a fake GPU, in which `during` happens after the first sample."""
    monitor = Monitor(open_device(uuid), NEVER, Steps())
    sampled = threading.Event()
    library.on_read = lambda name: sampled.set() if name.startswith("CurrentClocks") else None  # the last of a sample
    monitor.start(allowed_pids)
    assert sampled.wait(10)
    during()
    return monitor.stop()


# --- a round


def test_a_round_of_a_busy_gpu(install):
    library = install()

    def work():
        library.state["TotalEnergyConsumption"] += 1_300_000
        library.state["ViolationStatus"][0] += 700_000_000
        library.state["TemperatureV"] = {0: 61}
        library.state["CurrentClocksEventReasons"] = 0x4 | 0x1
        library.state["ClockInfo"] = {1: 1800, 2: 3201}

    round_ = watched(library, work)
    assert round_.joules == 1300.0 and round_.joules_source == "energy_counter"
    assert round_.power_watts == 1300.0 / round_.seconds
    assert round_.sm_clock_mhz == (1980 + 1800) / 2 and round_.memory_clock_mhz == 3201
    assert round_.temperature_celsius == 61
    assert round_.throttle_reasons == ("gpu_idle", "sw_power_cap")
    assert round_.violation_nanoseconds["power"] == 700_000_000 and round_.violation_nanoseconds["thermal"] == 0
    assert round_.foreign_pids == () and round_.error is None
    assert invalid_reason(round_) is None  # capped by its power limit, as every large GPU at full load
    assert json.loads(json.dumps(round_.as_dict())) == round_.as_dict()


def test_the_thread_samples_during_the_round(install):
    library = install()
    monitor = Monitor(open_device(UUID), period_seconds=1e-4)
    enough = threading.Event()
    library.on_read = lambda name: enough.set() if library.reads.get("ClockInfo", 0) >= 2 * 60 else None
    monitor.start()
    assert enough.wait(10)
    assert library.reads["ComputeRunningProcesses_v3"] >= 1 + 2  # at the start, and at each 25th sample
    monitor.stop()
    reads = dict(library.reads)
    assert not any(thread.name == "perf-telemetry" for thread in threading.enumerate())
    assert library.reads == reads


def test_rounds_are_independent(install):
    library = install()
    monitor = Monitor(open_device(UUID), NEVER)
    with pytest.raises(RuntimeError, match="start"):
        monitor.stop()
    monitor.start()
    with pytest.raises(RuntimeError, match="stop"):
        monitor.start()
    library.state["CurrentClocksEventReasons"] = 0x40
    assert "hw_thermal_slowdown" in monitor.stop().throttle_reasons
    library.state["CurrentClocksEventReasons"] = 0
    monitor.start()
    assert monitor.stop().throttle_reasons == ()


def test_unsupported_readings_are_none_and_valid(install):
    library = install()
    library.state.clear()
    monitor = Monitor(open_device(UUID), NEVER, Steps())
    monitor.start([1])
    round_ = monitor.stop()
    assert round_ == RoundTelemetry(seconds=round_.seconds) and round_.seconds > 0
    assert invalid_reason(round_) is None
    facts = open_device(UUID).facts()
    assert facts == GpuFacts(driver="580.65.06", cuda_driver=(13, 0))


@pytest.mark.parametrize(
    "missing, field",
    [
        ("TemperatureV", "temperature_celsius"),
        ("ClockInfo", "sm_clock_mhz"),
        ("CurrentClocksEventReasons", "throttle_reasons"),
        ("ViolationStatus", "violation_nanoseconds"),
        ("ComputeRunningProcesses_v3", "foreign_pids"),
    ],
)
def test_one_missing_reading_does_not_affect_others(install, missing, field):
    library = install({missing: NVMLError(NOT_SUPPORTED)})
    round_ = watched(library)
    assert getattr(round_, field) is None
    others = {"temperature_celsius", "memory_clock_mhz", "throttle_reasons", "violation_nanoseconds", "foreign_pids"}
    others -= {field} | ({"memory_clock_mhz"} if missing == "ClockInfo" else set())
    assert all(getattr(round_, other) is not None for other in others)


def test_one_unsupported_policy_is_none(install):
    library = install({"ViolationStatus": {0: 0, 1: 5, 2: (1 << 64) - 1}})
    violations = watched(library).violation_nanoseconds
    assert violations["power"] == 0 and violations["thermal"] == 0
    assert violations["sync_boost"] is None and violations["reliability"] is None


@pytest.mark.parametrize(
    "old, new, field",
    [
        ("CurrentClocksThrottleReasons", "CurrentClocksEventReasons", "throttle_reasons"),
        ("Temperature", "TemperatureV", "temperature_celsius"),
        ("ComputeRunningProcesses_v2", "ComputeRunningProcesses_v3", "foreign_pids"),
    ],
)
def test_older_drivers_are_read_by_their_function_names(install, old, new, field):
    library = install()
    library.state[old] = library.state.pop(new)
    assert getattr(watched(library), field) == {"temperature_celsius": 55}.get(field, ())


def test_a_lost_gpu_is_an_error_and_is_not_read_again(install):
    library = install()

    def lose():
        for name in library.state:
            library.state[name] = NVMLError(GPU_IS_LOST)
        library.reads.clear()

    round_ = watched(library, lose)
    assert sum(library.reads.values()) == 1
    assert round_.joules is None and round_.error == "GPU is lost"
    assert invalid_reason(round_) == "device lost: GPU is lost"


def test_a_blocked_driver_delays_the_round_by_a_limited_time(install, monkeypatch):
    monkeypatch.setattr("perf.machine.telemetry.JOIN_SECONDS", 0.01)
    library = install()
    monitor = Monitor(open_device(UUID), NEVER)
    blocked, free = threading.Event(), threading.Event()

    def block(name):
        if threading.current_thread().name == "perf-telemetry":
            blocked.set()
            free.wait(10)

    library.on_read = block
    monitor.start()
    assert blocked.wait(10)
    round_ = monitor.stop()
    free.set()
    assert invalid_reason(round_) == "device lost: NVML does not respond"


@pytest.mark.parametrize("after, changed", [(700_000, False), (695_000, False), (500_000, True), (900_000, True)])
def test_a_changed_power_limit_is_invalid(install, after, changed):
    library = install()
    round_ = watched(library, lambda: library.state.update(EnforcedPowerLimit=after))
    assert invalid_reason(round_) == ("throttled: power_limit_changed" if changed else None)


def test_a_mig_instance_has_its_gpus_clocks_but_not_its_energy(install):
    library = install({"ComputeRunningProcesses_v3": [4]})
    device = open_device(MIG_UUID)
    facts = device.facts()
    assert facts.is_mig_instance and facts.uuid == MIG_UUID and facts.name == "NVIDIA H200 MIG 1g.18gb"
    round_ = watched(library, allowed_pids=[4], uuid=MIG_UUID)
    assert round_.sm_clock_mhz == 1980 and round_.temperature_celsius == 55 and round_.throttle_reasons == ()
    assert round_.joules is None and round_.joules_source is None and round_.power_watts is None
    assert round_.foreign_pids == ()


def test_unknown_reasons_are_stored_and_valid(install):
    round_ = watched(install({"CurrentClocksEventReasons": 0x100000 | 0x2}))
    assert round_.throttle_reasons == ("applications_clocks_setting", "unknown_0x100000")
    assert invalid_reason(round_) is None


# --- foreign processes


def test_a_foreign_process_invalidates_the_round_even_if_it_has_ended(install):
    library = install({"ComputeRunningProcesses_v3": [1234, 5, 99]})
    round_ = watched(library, lambda: library.state.update(ComputeRunningProcesses_v3=[5]), allowed_pids=[5])
    assert round_.foreign_pids == (99, 1234)
    assert invalid_reason(round_) == "shared with pid 99, 1234"


def test_a_workers_child_is_not_foreign(install):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        library = install({"ComputeRunningProcesses_v3": [os.getpid(), child.pid, os.getppid()]})
        assert watched(library, allowed_pids=[os.getpid()]).foreign_pids == (os.getppid(),)
    finally:
        child.communicate(b"\n")


def test_in_a_container_only_live_workers_account_for_processes(install, monkeypatch):
    monkeypatch.setattr("perf.machine.telemetry.in_initial_pid_namespace", lambda: False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    library = install({"ComputeRunningProcesses_v3": [4_200_001]})
    assert watched(library, allowed_pids=[os.getpid()]).foreign_pids == ()
    assert watched(library, allowed_pids=[ended.pid]).foreign_pids == (4_200_001,)


def test_this_machine():
    """With and without a driver: a round is monitored, unreadable values are not 0, and the facts are consistent."""
    device = open_visible_device()
    monitor = Monitor(device)
    monitor.start([os.getpid()])
    round_ = monitor.stop()
    assert round_.seconds > 0 and round_.joules != 0
    assert json.loads(json.dumps(round_.as_dict())) == round_.as_dict()
    assert (device.facts().uuid is None) == isinstance(device, NoTelemetry)
