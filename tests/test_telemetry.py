"""The GPU around a round: what is read, what is null, and what makes a round invalid. NVML itself is faked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from fake_nvml import GPU_IS_LOST, LIBRARY_NOT_FOUND, MIG_UUID, NOT_SUPPORTED, UUID, FakeNvml, NVMLError

from perf import nvml
from perf.machine import GpuFacts, gpu_facts
from perf.nvml import NoTelemetry, in_initial_pid_namespace, open_device, open_visible_device
from perf.telemetry import (
    Counters,
    Monitor,
    RoundTelemetry,
    Sample,
    foreign_pids,
    invalid_reason,
    summarise,
)

ROOT = Path(__file__).parent.parent
NEVER = 3600.0  # seconds between two samples: the thread takes its first one and no other
CLEAN = RoundTelemetry(seconds=2.0, throttle_reasons=(), foreign_pids=())


@pytest.fixture
def install(monkeypatch):
    """Make a FakeNvml the module that `import pynvml` gives, on a machine that numbers processes as its host does."""
    monkeypatch.setattr("perf.telemetry.in_initial_pid_namespace", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(changes: dict | None = None, init_error: int | None = None) -> FakeNvml:
        library = FakeNvml(changes, init_error)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        return library

    return put


class Steps:
    """A clock that moves on by a second at each reading."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def watched(library: FakeNvml, during=lambda: None, allowed_pids=(), uuid: str | None = UUID) -> RoundTelemetry:
    """A round of a fake GPU, in which `during` happens after the first sample."""
    monitor = Monitor(open_device(uuid), NEVER, Steps())
    sampled = threading.Event()
    library.on_read = lambda name: sampled.set() if name.startswith("CurrentClocks") else None  # the last of a sample
    monitor.start(allowed_pids)
    assert sampled.wait(10)
    during()
    return monitor.stop()


# --- opening


def test_the_suite_without_nvml_imports_neither_torch_nor_pytest():
    modules = "telemetry, nvml, machine, stack, checks, doctor, lock"
    code = f"import sys; from perf import {modules}; print(sorted({{'torch', 'pytest', 'pynvml'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # what an import of it then finds is ImportError
    device = open_device(None)
    assert isinstance(device, NoTelemetry) and "nvidia-ml-py cannot be imported" in device.reason


def test_a_missing_driver_is_a_reason_and_all_else_works(install):
    install(init_error=LIBRARY_NOT_FOUND)
    device = open_device(UUID)
    assert device == NoTelemetry("no NVIDIA driver answers (NVML Shared Library Not Found)")
    assert gpu_facts(device) == GpuFacts()
    clock = Steps()
    monitor = Monitor(device, clock=clock)
    monitor.start([1])
    round_ = monitor.stop()
    assert round_ == RoundTelemetry(seconds=1.0)
    assert invalid_reason(round_) is None


@pytest.mark.parametrize("uuid", [UUID, UUID.removeprefix("GPU-"), None])
def test_open_by_uuid_with_and_without_its_prefix_and_by_index(install, uuid):
    library = install()
    device = open_device(uuid)
    assert device.uuid() == UUID and library.users == 1
    device.close()
    device.close()
    assert library.users == 0
    assert device.uuid() is None


@pytest.mark.parametrize("uuid, index, words", [("GPU-0", 0, "GPU-0 (Not Found)"), (None, 7, "no device 7")])
def test_an_unknown_device_is_a_reason_and_nvml_is_let_go(install, uuid, index, words):
    library = install()
    device = open_device(uuid, index)
    assert isinstance(device, NoTelemetry) and words in device.reason
    assert library.users == 0


@pytest.mark.parametrize(
    "visible, index, uuid",
    [
        (None, 0, UUID),
        ("0", 0, UUID),
        ("1,0", 1, UUID),
        (f"5, {UUID}", 1, UUID),
        (MIG_UUID, 0, MIG_UUID),
        ("", 0, None),
        ("-1", 0, None),
        ("-1,0", 1, None),
        ("0", 1, None),
    ],
)
def test_cuda_visible_devices_is_followed(install, monkeypatch, visible, index, uuid):
    install()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    device = open_visible_device(index)
    assert isinstance(device, NoTelemetry) if uuid is None else device.uuid() == uuid


def test_names_and_numbers_are_those_of_the_library():
    """What the fake takes for granted: the functions that perf.nvml calls exist, and its numbers are NVML's."""
    pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    called = set(re.findall(r"nvml(?:Device|System)[A-Z]\w+|nvmlInit|nvmlShutdown", Path(nvml.__file__).read_text()))
    later = {"nvmlDeviceGetTemperatureV"}  # than the oldest library that is allowed; there is a second name for it
    assert len(called) > 25 and [name for name in called - later if not hasattr(pynvml, name)] == []
    assert (nvml.CLOCK_SM, nvml.CLOCK_MEMORY) == (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM)
    assert nvml.TEMPERATURE_GPU == pynvml.NVML_TEMPERATURE_GPU
    assert nvml.TEMPERATURE_THRESHOLD_SLOWDOWN == pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    for name, policy in nvml.VIOLATION_POLICIES.items():
        assert policy == getattr(pynvml, f"NVML_PERF_POLICY_{name.upper()}")
    for bit, name in nvml.CLOCKS_EVENT_REASONS.items():
        constant = f"nvmlClocksThrottleReason{name.title().replace('_', '')}"
        assert getattr(pynvml, constant, bit) == bit  # the last two are new
    assert nvml.LOST.keys() == {
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
    }


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


def test_rounds_do_not_run_into_each_other(install):
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


def test_what_is_not_supported_is_null_and_makes_nothing_invalid(install):
    library = install()
    library.state.clear()
    monitor = Monitor(open_device(UUID), NEVER, Steps())
    monitor.start([1])
    round_ = monitor.stop()
    assert round_ == RoundTelemetry(seconds=round_.seconds) and round_.seconds > 0
    assert invalid_reason(round_) is None
    facts = gpu_facts(open_device(UUID))
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
def test_one_missing_read_leaves_the_others(install, missing, field):
    library = install({missing: NVMLError(NOT_SUPPORTED)})
    round_ = watched(library)
    assert getattr(round_, field) is None
    others = {"temperature_celsius", "memory_clock_mhz", "throttle_reasons", "violation_nanoseconds", "foreign_pids"}
    others -= {field} | ({"memory_clock_mhz"} if missing == "ClockInfo" else set())
    assert all(getattr(round_, other) is not None for other in others)


def test_one_unsupported_policy_is_null_among_the_others(install):
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
def test_older_drivers_are_asked_by_the_older_names(install, old, new, field):
    library = install()
    library.state[old] = library.state.pop(new)
    assert getattr(watched(library), field) == {"temperature_celsius": 55}.get(field, ())


def test_a_lost_gpu_is_an_error_and_is_asked_no_more(install):
    library = install()

    def lose():
        for name in library.state:
            library.state[name] = NVMLError(GPU_IS_LOST)
        library.reads.clear()

    round_ = watched(library, lose)
    assert sum(library.reads.values()) == 1
    assert round_.joules is None and round_.error == "GPU is lost"
    assert invalid_reason(round_) == "device lost: GPU is lost"


def test_a_driver_that_blocks_holds_the_round_up_no_longer_than_that(install, monkeypatch):
    monkeypatch.setattr("perf.telemetry.JOIN_SECONDS", 0.01)
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
    assert invalid_reason(round_) == "device lost: NVML does not answer"


@pytest.mark.parametrize("after, changed", [(700_000, False), (695_000, False), (500_000, True), (900_000, True)])
def test_a_power_limit_that_moved_is_invalid(install, after, changed):
    library = install()
    round_ = watched(library, lambda: library.state.update(EnforcedPowerLimit=after))
    assert invalid_reason(round_) == ("throttled: power_limit_changed" if changed else None)


def test_a_mig_instance_has_its_gpus_clocks_but_not_its_energy(install):
    library = install({"ComputeRunningProcesses_v3": [4]})
    device = open_device(MIG_UUID)
    facts = gpu_facts(device)
    assert facts.is_mig_instance and facts.uuid == MIG_UUID and facts.name == "NVIDIA H200 MIG 1g.18gb"
    round_ = watched(library, allowed_pids=[4], uuid=MIG_UUID)
    assert round_.sm_clock_mhz == 1980 and round_.temperature_celsius == 55 and round_.throttle_reasons == ()
    assert round_.joules is None and round_.joules_source is None and round_.power_watts is None
    assert round_.foreign_pids == ()


def test_reasons_that_no_name_is_known_for_are_kept_and_harmless(install):
    round_ = watched(install({"CurrentClocksEventReasons": 0x100000 | 0x2}))
    assert round_.throttle_reasons == ("applications_clocks_setting", "unknown_0x100000")
    assert invalid_reason(round_) is None


# --- strangers


@pytest.mark.parametrize(
    "listed, allowed, living, same_numbering, foreign",
    [
        ([10, 11], [10, 11], 2, True, set()),
        ([10, 99], [10], 1, True, {99}),
        ([99], [10], 1, True, {99}),
        ([], [10], 1, True, set()),
        ([10, 99], [10], 1, False, {99}),  # the driver translates: one of ours is listed
        ([70001], [10], 1, False, set()),  # it does not: ours, under the host's number
        ([70001, 70002], [10], 1, False, {70002}),
        ([70001, 70002], [10, 11], 1, False, {70002}),  # one of ours has ended
        ([70001], [], 0, False, {70001}),
    ],
)
def test_foreign_pids(listed, allowed, living, same_numbering, foreign):
    assert foreign_pids(listed, allowed, living, same_numbering) == foreign


def test_a_stranger_makes_the_round_invalid_even_when_it_has_left(install):
    library = install({"ComputeRunningProcesses_v3": [1234, 5, 99]})
    round_ = watched(library, lambda: library.state.update(ComputeRunningProcesses_v3=[5]), allowed_pids=[5])
    assert round_.foreign_pids == (99, 1234)
    assert invalid_reason(round_) == "shared with pid 99, 1234"


def test_in_a_container_only_living_workers_excuse_a_process(install, monkeypatch):
    monkeypatch.setattr("perf.telemetry.in_initial_pid_namespace", lambda: False)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    library = install({"ComputeRunningProcesses_v3": [4_200_001]})
    assert watched(library, allowed_pids=[os.getpid()]).foreign_pids == ()
    assert watched(library, allowed_pids=[ended.pid]).foreign_pids == (4_200_001,)


def test_the_pid_namespace_is_read(monkeypatch):
    for link, initial in (("pid:[4026531836]", True), ("pid:[4026532459]", False)):
        monkeypatch.setattr("perf.nvml.os.readlink", lambda path, link=link: link)
        assert in_initial_pid_namespace() is initial


# --- the summary, on series with known answers


def samples(watts, period=0.02):
    return [Sample(seconds=i * period, power_watts=value) for i, value in enumerate(watts)]


def test_without_an_energy_counter_power_is_integrated_and_said_so():
    ramp = samples([100.0, 200.0, 300.0])
    round_ = summarise(Counters(0.0), Counters(0.05), ramp)
    assert round_.joules == pytest.approx(200.0 * 0.05) and round_.joules_source == "power_samples"
    assert round_.power_watts == pytest.approx(200.0)


def test_uneven_samples_weigh_by_time():
    uneven = [Sample(0.0, power_watts=100.0), Sample(0.9, power_watts=100.0), Sample(1.0, power_watts=300.0)]
    assert summarise(Counters(0.0), Counters(1.0), uneven).power_watts == pytest.approx(0.9 * 100 + 0.1 * 200)


@pytest.mark.parametrize("watts", [[], [400.0], [None, None, None], [None, 400.0, None]])
def test_too_few_samples_give_no_joules(watts):
    round_ = summarise(Counters(0.0), Counters(1.0), samples(watts))
    assert round_.joules is None and round_.joules_source is None and round_.power_watts is None


@pytest.mark.parametrize("begin, end", [(5000.0, 3.0), (5000.0, 5000.0), (None, 5.0), (5.0, None)])
def test_an_energy_counter_that_was_reset_or_stands_still_is_none(begin, end):
    round_ = summarise(Counters(0.0, begin), Counters(1.0, end), samples([100.0, 100.0]))
    assert (round_.joules, round_.joules_source) == (100.0, "power_samples")


def test_a_violation_counter_that_ran_backwards_is_null():
    begin, end = Counters(0.0, None, {"power": 9, "thermal": 1}), Counters(1.0, None, {"power": 3, "thermal": 4})
    assert summarise(begin, end, []).violation_nanoseconds == {"power": None, "thermal": 3}


# --- the verdict on a round


@pytest.mark.parametrize(
    "reasons, invalid",
    [
        ((), None),
        (("gpu_idle", "applications_clocks_setting", "display_clock_setting"), None),
        (("sw_power_cap", "board_limit", "reliability"), None),
        (("sw_thermal_slowdown",), "throttled: sw_thermal_slowdown"),
        (
            ("gpu_idle", "hw_slowdown", "hw_thermal_slowdown", "sw_power_cap"),
            "throttled: hw_slowdown, hw_thermal_slowdown",
        ),
        (("hw_power_brake_slowdown",), "throttled: hw_power_brake_slowdown"),
        (("sync_boost",), "throttled: sync_boost"),
        (None, None),
    ],
)
def test_which_reasons_invalidate(reasons, invalid):
    assert invalid_reason(replace(CLEAN, throttle_reasons=reasons)) == invalid


@pytest.mark.parametrize(
    "policy, milliseconds, invalid",
    [
        ("thermal", 1, None),  # of 2 s: cannot have cost more than 0.05 %
        ("thermal", 15, "throttled: thermal violation for 15 ms"),
        ("sync_boost", 15, "throttled: sync_boost violation for 15 ms"),
        ("power", 2000, None),
        ("low_utilization", 2000, None),
        ("total_app_clocks", 2000, None),
        ("thermal", None, None),
    ],
)
def test_violations_count_what_falls_between_two_samples(policy, milliseconds, invalid):
    nanoseconds = None if milliseconds is None else milliseconds * 10**6
    assert invalid_reason(replace(CLEAN, violation_nanoseconds={policy: nanoseconds})) == invalid


def test_all_that_is_wrong_is_said_in_one_line():
    bad = replace(CLEAN, throttle_reasons=("hw_slowdown",), foreign_pids=(7,), error="GPU is lost")
    assert invalid_reason(bad) == "device lost: GPU is lost; throttled: hw_slowdown; shared with pid 7"


def test_this_machine_whatever_it_has():
    """With a driver and without: a round is watched, nothing is 0 that was not read, and the facts are consistent."""
    device = open_visible_device()
    monitor = Monitor(device)
    monitor.start([os.getpid()])
    round_ = monitor.stop()
    assert round_.seconds > 0 and round_.joules != 0
    assert json.loads(json.dumps(round_.as_dict())) == round_.as_dict()
    assert (gpu_facts(device).uuid is None) == isinstance(device, NoTelemetry)
