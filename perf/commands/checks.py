"""Checks of a machine's fitness for measuring: from facts to one line each, without torch or pytest."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from perf.commands.torch_probe import CompileTrial, StackFacts, runs_on
from perf.machine.facts import CpuFacts, cpu_facts
from perf.machine.nvml import GpuFacts
from perf.machine.stack import package_version
from perf.machine.telemetry import THROTTLE_REASONS
from sd.choices import cpp_compiler, why_no_inductor

OK, WARNING, BUSY, CANNOT = "ok", "warning", "busy", "cannot"
GIB = 1 << 30
LOAD_PER_CORE, BUSY_LOAD_PER_CORE = 0.25, 1.0  # at 1 a measurement shares its core
STEAL_FRACTION = 0.01  # the smallest margin of a verdict
MEMORY_BYTES, MEMORY_LEAST_BYTES = 8 * GIB, GIB  # SD2 in fp32 during loading; the tiny model
DISK_BYTES, DISK_LEAST_BYTES = GIB, GIB // 16
SWAP_BYTES = GIB // 16  # more than long-idle services leave in swap
TEMPERATURE_CELSIUS, TEMPERATURE_HEADROOM_CELSIUS = 75, 15
CLOCK_SECONDS = 1e-6
FAST_CLOCKSOURCES = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
PYTEST_BENCHMARK = Version("5.1")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    `status` is ok, warning, busy (of the load) or cannot; `advice` is empty if nothing needs to be done.
    """

    name: str
    status: str
    fact: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.name:<17} {self.fact}{'; ' + self.advice if self.advice else ''}"


def _check(name: str, passed: bool, fact: str, advice: str = "", failure: str = WARNING) -> Check:
    """An ok line without advice if the check passed, else a line with the status `failure` and the advice."""
    return Check(name, OK, fact) if passed else Check(name, failure, fact, advice)


def _unreadable(name: str, advice: str = "") -> Check:
    return Check(name, WARNING, "unreadable", advice)


def no_gpu_check(reason: str, stack: StackFacts, required: bool) -> Check:
    """The line that replaces gpu_checks where NVML finds no GPU."""
    if stack.device:
        return Check("gpu", WARNING, f"{stack.device}, unseen by NVML: {reason}", "no clocks, no joules, no throttling")
    if required:
        return Check("gpu", CANNOT, f"none: {reason}", "install the driver, or choose --device cpu")
    return Check("gpu", WARNING, f"none: {reason}", "only the CPU can be measured")


def gpu_checks(gpu: GpuFacts) -> list[Check]:
    """The state of the GPU as NVML reports it."""
    total = "" if gpu.memory_bytes is None else f", {gpu.memory_bytes / GIB:.0f} GiB"
    used = "" if gpu.memory_used_bytes is None else f" ({gpu.memory_used_bytes / GIB:.1f} used)"
    cuda = "" if gpu.cuda_driver is None else f", CUDA up to {_dotted(gpu.cuda_driver)}"
    return [
        Check("gpu", OK, f"{gpu.name or 'name unreadable'}, {gpu.uuid or 'UUID unreadable'}{total}{used}"),
        _check("driver", bool(gpu.driver), f"{gpu.driver or 'unreadable'}{cuda}"),
        _persistence(gpu),
        _clocks(gpu),
        _power_limit(gpu),
        _temperature(gpu),
        _throttling(gpu),
        _processes(gpu),
        _mig(gpu),
    ]


def _persistence(gpu: GpuFacts) -> Check:
    if gpu.persistence_mode is None:
        return _unreadable("persistence")
    fact = "on" if gpu.persistence_mode else "off: every process reloads the driver"
    return _check("persistence", gpu.persistence_mode, fact, "sudo nvidia-smi -pm 1")


def _clocks(gpu: GpuFacts) -> Check:
    """NVML does not report locked clocks (-lgc); the current clock event reasons only hint at them."""
    fact = f"SM {gpu.sm_clock_mhz or '?'} of {gpu.sm_clock_max_mhz or '?'} MHz"
    if "applications_clocks_setting" in (gpu.clocks_event_reasons or ()):
        return Check("clocks", OK, f"{fact}, held by a lock or an applications clock")
    application, default = gpu.application_sm_clock_mhz, gpu.application_sm_clock_default_mhz
    if application is not None and default is not None and application != default:
        return Check("clocks", OK, f"{fact}, applications clock {application} MHz (default {default})")
    advice = "steadier with sudo nvidia-smi -lgc MHZ, undone with -rgc"
    return Check("clocks", WARNING, f"{fact}, free as far as NVML reports", advice)


def _power_limit(gpu: GpuFacts) -> Check:
    limit, default = gpu.power_limit_watts, gpu.power_limit_default_watts
    if limit is None:
        return _unreadable("power limit")
    if default is None or limit >= default:
        return Check("power limit", OK, f"{limit:.0f} W")
    advice = f"sudo nvidia-smi -pl {default:.0f}, or compare only with runs at this limit"
    return Check("power limit", WARNING, f"{limit:.0f} W, below the card's {default:.0f} W", advice)


def _temperature(gpu: GpuFacts) -> Check:
    celsius, slowdown = gpu.temperature_celsius, gpu.temperature_slowdown_celsius
    if celsius is None:
        return _unreadable("temperature")
    limit = TEMPERATURE_CELSIUS if slowdown is None else slowdown - TEMPERATURE_HEADROOM_CELSIUS
    fact = f"{celsius} °C" + ("" if slowdown is None else f", slows down at {slowdown} °C")
    return _check("temperature", celsius < limit, fact, "let it cool, and check fans and airflow")


def _throttling(gpu: GpuFacts) -> Check:
    reasons = gpu.clocks_event_reasons
    if reasons is None:
        return _unreadable("throttling", "throttled rounds will not be noticed")
    throttled = sorted(reasons & THROTTLE_REASONS)
    fact = ", ".join(throttled or sorted(reasons)) or "nothing holds the clocks"
    return _check("throttling", not throttled, fact, "every round would be INVALID: cooling, power supply", CANNOT)


def _processes(gpu: GpuFacts) -> Check:
    if gpu.compute_pids is None:
        return _unreadable("processes", "foreign processes on the GPU will not be noticed")
    pids = ", ".join(map(str, sorted(gpu.compute_pids)))
    fact = f"the GPU is in use by pid {pids}" if pids else "no compute process on the GPU"
    return _check("processes", not pids, fact, "every round would be INVALID: end them", CANNOT)


def _mig(gpu: GpuFacts) -> Check:
    if gpu.is_mig_instance:
        return Check("mig", WARNING, "a MIG instance", "no joules, and its neighbours share power and clocks")
    if gpu.mig_mode:
        fact = "on: the GPU as a whole computes nothing"
        return Check("mig", WARNING, fact, "name an instance in CUDA_VISIBLE_DEVICES")
    return Check("mig", OK, "off" if gpu.mig_mode is False else "not on this model")


def stack_checks(stack: StackFacts, gpu: GpuFacts | None) -> list[Check]:
    """Compatibility of torch, the driver, the GPU, Triton and xFormers. `gpu` is None for a session on the CPU."""
    if stack.torch is None and stack.torch_error is None:
        return [Check("torch", CANNOT, stack.error or f"not in Python {stack.python}", "install torch there")]
    if not stack.torch_imported:
        fact = f"{stack.torch or 'torch'} does not import: {stack.torch_error or stack.error}"
        return [Check("torch", CANNOT, fact, "reinstall it")]
    build = f"CUDA {stack.cuda}" if stack.cuda else f"ROCm {stack.hip}" if stack.hip else "CPU only"
    checks = [Check("torch", OK, f"{stack.torch} ({build}) on Python {stack.python}")]
    if gpu is not None and (gpu.name or stack.device):
        checks += [*_cuda(stack, gpu), _triton(stack)]
    checks.append(_xformers(stack))
    if stack.error:
        checks.append(Check("imports", WARNING, f"Triton or xFormers did not import: {stack.error}"))
    return checks


def _cuda(stack: StackFacts, gpu: GpuFacts) -> list[Check]:
    driver = gpu.cuda_driver
    if stack.cuda and driver and int(stack.cuda.split(".")[0]) > driver[0]:  # minor versions are compatible
        fact = f"torch is built for CUDA {stack.cuda}, the driver ends at {_dotted(driver)}"
        return [Check("cuda", CANNOT, fact, "install a newer driver, or a torch for an older CUDA")]
    if not stack.device:
        reason = stack.cuda_warning or "no reason given"
        return [Check("cuda", CANNOT, f"torch sees no GPU ({reason})", "see torch above")]
    cudnn = "no cuDNN" if stack.cudnn is None else f"cuDNN {stack.cudnn}"
    checks = [Check("cuda", OK, f"torch sees {stack.device}, {cudnn}")]
    if not stack.hip and stack.capability:
        code = " ".join(stack.arch_list) or "nothing"
        fact = f"compute capability {_dotted(stack.capability)}, torch has code for {code}"
        runs, advice = runs_on(stack.capability, stack.arch_list), "install a torch that is built for this GPU"
        checks.append(_check("architecture", runs, fact, advice, CANNOT))
    return checks


def _triton(stack: StackFacts) -> Check:
    error = stack.triton_error or (None if stack.triton else "not installed")
    return _check("triton", error is None, error or stack.triton, "compiled configurations cannot run on the GPU")


def _xformers(stack: StackFacts) -> Check:
    if stack.xformers is None:
        return Check("xformers", WARNING, "not installed", "its configurations are skipped; pip install xformers")
    for line in stack.xformers_requires:
        try:
            requirement = Requirement(line)
            compatible = requirement.specifier.contains(stack.torch, prereleases=True)
        except (InvalidRequirement, InvalidVersion):
            continue
        if requirement.name == "torch" and not compatible:
            fact = f"{stack.xformers} is built for {requirement}, and this is torch {stack.torch}"
            return Check("xformers", WARNING, fact, "install the xformers of this torch")
    if stack.xformers_error:
        return Check("xformers", WARNING, f"{stack.xformers} does not import: {stack.xformers_error}")
    return Check("xformers", OK, f"{stack.xformers}, compatible with torch {stack.torch}")


def compiler_check() -> Check:
    """Presence of the C++ compiler that inductor calls, and of the headers that its code includes."""
    reason = why_no_inductor()
    return _check(
        "c++ compiler", reason is None, reason or str(cpp_compiler()), "nothing is compiled for the CPU without it"
    )


def compile_check(trial: CompileTrial) -> Check:
    """Result of compiling a small function."""
    if trial.error:
        return Check("torch.compile", WARNING, trial.error, "compiled configurations cannot run")
    return Check("torch.compile", OK, f"a small function in {trial.seconds:.1f} s, cold")


def cpu_checks(before: CpuFacts, after: CpuFacts) -> list[Check]:
    """Load and limits of the CPU, from the facts before and after the examination of torch."""
    return [
        _check("cpu", bool(before.name), f"{before.name or 'name unreadable'}, {before.cores or '?'} cores"),
        _governor(before),
        _load(before),
        _steal(before, after),
        _cpu_limit(before),
        _memory(before),
        _swap(before),
    ]


def _governor(cpu: CpuFacts) -> Check:
    if cpu.governors is None:
        return Check("governor", WARNING, "unreadable, as in virtual machines", "the host controls the frequency")
    advice = "sudo cpupower frequency-set -g performance"
    return _check("governor", cpu.governors == ("performance",), ", ".join(cpu.governors), advice)


def _load(cpu: CpuFacts) -> Check:
    load, cores = cpu.load_average_1_minute, cpu.cores
    if load is None or not cores:
        return _unreadable("load")
    fact = f"{load:.2f} on {cores} cores in the last minute"
    failure = BUSY if load >= BUSY_LOAD_PER_CORE * cores else WARNING
    return _check("load", load <= LOAD_PER_CORE * cores, fact, "end other processes, or wait", failure)


def _steal(before: CpuFacts, after: CpuFacts) -> Check:
    if None in (before.steal_seconds, after.steal_seconds) or after.cpu_seconds <= before.cpu_seconds:
        return _unreadable("steal")
    fraction = (after.steal_seconds - before.steal_seconds) / (after.cpu_seconds - before.cpu_seconds)
    fact = f"{fraction:.1%} of the CPU time went to other machines"
    return _check("steal", fraction <= STEAL_FRACTION, fact, "use CPU time as the clock, or a dedicated machine")


def _cpu_limit(cpu: CpuFacts) -> Check:
    if cpu.cgroup_cpus is None:
        return Check("cpu limit", OK, "none")
    fact = f"the container may use {cpu.cgroup_cpus:g} CPUs"
    if cpu.cores is None or cpu.cgroup_cpus >= cpu.cores:
        return Check("cpu limit", OK, fact)
    advice = f"torch would start {cpu.cores} threads: OMP_NUM_THREADS={math.ceil(cpu.cgroup_cpus)}"
    return Check("cpu limit", WARNING, f"{fact} of {cpu.cores}", advice)


def _memory(cpu: CpuFacts) -> Check:
    available = cpu.memory_available_bytes
    if available is None:
        return _unreadable("memory")
    fact = f"{available / GIB:.1f} GiB available"
    if available < MEMORY_LEAST_BYTES:
        return Check("memory", CANNOT, fact, "not even the tiny model fits: end other processes")
    return _check("memory", available >= MEMORY_BYTES, fact, "full-size models may not fit")


def _swap(cpu: CpuFacts) -> Check:
    if cpu.swap_used_bytes is None:
        return _unreadable("swap")
    fact = f"{cpu.swap_used_bytes / GIB:.1f} GiB in use"
    return _check("swap", cpu.swap_used_bytes <= SWAP_BYTES, fact, "memory was short: end other processes")


def suite_checks(storage: Path) -> list[Check]:
    """The needs of the suite itself: storage for its runs, a clock, pytest-benchmark, git."""
    git = shutil.which("git")
    advice = "saved runs will not name their commit; --perf-against needs it"
    return [_storage(storage), _clock(), _pytest_benchmark(), _check("git", bool(git), git or "none", advice)]


def _storage(storage: Path) -> Check:
    folder = storage.absolute()
    while not folder.exists() and folder != folder.parent:  # the first saved run creates it
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check("storage", CANNOT, f"{folder} is not a writable folder", "choose another --storage")
    free = shutil.disk_usage(folder).free
    failure = WARNING if free >= DISK_LEAST_BYTES else CANNOT
    advice = "free some space: runs, journals and compile caches grow"
    return _check("storage", free >= DISK_BYTES, f"{free / GIB:.1f} GiB free for {storage}", advice, failure)


def _clock() -> Check:
    readings = [time.perf_counter() for _ in range(1000)]
    steps = [later - earlier for earlier, later in itertools.pairwise(readings) if later > earlier]
    step = max(min(steps, default=1.0), time.get_clock_info("perf_counter").resolution)
    source = cpu_facts().clocksource
    fact = f"steps of {step * 1e9:.0f} ns, source {source or 'unreadable'}"
    fast = step <= CLOCK_SECONDS and (source is None or source in FAST_CLOCKSOURCES)
    return _check("clock", fast, fact, "boot with clocksource=tsc if the CPU has a stable one")


def _pytest_benchmark() -> Check:
    version = package_version("pytest-benchmark")
    if version is None:
        return Check("pytest-benchmark", CANNOT, "not installed", f"pip install 'pytest-benchmark>={PYTEST_BENCHMARK}'")
    recent = Version(version) >= PYTEST_BENCHMARK
    return _check("pytest-benchmark", recent, version, f"needs {PYTEST_BENCHMARK} or later", CANNOT)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
