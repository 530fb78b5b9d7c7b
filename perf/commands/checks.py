"""What is good enough to measure on: facts in, one line each out. Imports neither torch nor pytest."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from perf.commands.torch_probe import CompileTrial, StackFacts, runs_on
from perf.machine.facts import CpuFacts, cpu_facts
from perf.machine.nvml import GpuFacts
from perf.machine.telemetry import THROTTLE_REASONS

OK, WARNING, CANNOT = "ok", "warning", "cannot"
GIB = 1 << 30
LOAD_PER_CORE = 0.25
STEAL_FRACTION = 0.01  # the smallest margin of a verdict
MEMORY_BYTES, MEMORY_LEAST_BYTES = 8 * GIB, GIB  # SD2 in fp32 on its way to the GPU; the tiny model
DISK_BYTES, DISK_LEAST_BYTES = GIB, GIB // 16
SWAP_BYTES = GIB // 16  # what long-idle services leave there is less
TEMPERATURE_CELSIUS, TEMPERATURE_HEADROOM_CELSIUS = 75, 15
CLOCK_SECONDS = 1e-6
FAST_CLOCKSOURCES = ("tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page")
PYTEST_BENCHMARK = Version("5.1")


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis. `status` is ok, warning or cannot; `advice` is empty where there is nothing to do."""

    name: str
    status: str
    fact: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.name:<17} {self.fact}{'; ' + self.advice if self.advice else ''}"


def no_gpu_check(reason: str, stack: StackFacts, required: bool) -> Check:
    """The line that stands for all of gpu_checks where NVML shows nothing."""
    if stack.device:
        return Check("gpu", WARNING, f"{stack.device}, unseen by NVML: {reason}", "no clocks, no joules, no throttling")
    if required:
        return Check("gpu", CANNOT, f"none: {reason}", "install the driver, or choose --device cpu")
    return Check("gpu", WARNING, f"none: {reason}", "only the CPU can be measured")


def gpu_checks(gpu: GpuFacts) -> list[Check]:
    """What NVML says of the GPU."""
    total = "" if gpu.memory_bytes is None else f", {gpu.memory_bytes / GIB:.0f} GiB"
    used = "" if gpu.memory_used_bytes is None else f" ({gpu.memory_used_bytes / GIB:.1f} used)"
    cuda = "" if gpu.cuda_driver is None else f", CUDA up to {_dotted(gpu.cuda_driver)}"
    return [
        Check("gpu", OK, f"{gpu.name or 'name unreadable'}, {gpu.uuid or 'UUID unreadable'}{total}{used}"),
        Check("driver", OK if gpu.driver else WARNING, f"{gpu.driver or 'unreadable'}{cuda}"),
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
        return Check("persistence", WARNING, "unreadable")
    if gpu.persistence_mode:
        return Check("persistence", OK, "on")
    return Check("persistence", WARNING, "off: the driver is loaded anew by each process", "sudo nvidia-smi -pm 1")


def _clocks(gpu: GpuFacts) -> Check:
    """NVML does not tell locked clocks (-lgc) apart: only the reason of the moment hints at them."""
    fact = f"SM {gpu.sm_clock_mhz or '?'} of {gpu.sm_clock_max_mhz or '?'} MHz"
    if "applications_clocks_setting" in (gpu.clocks_event_reasons or ()):
        return Check("clocks", OK, f"{fact}, held by a lock or an applications clock")
    application, default = gpu.application_sm_clock_mhz, gpu.application_sm_clock_default_mhz
    if application is not None and default is not None and application != default:
        return Check("clocks", OK, f"{fact}, applications clock {application} MHz (default {default})")
    advice = "steadier with sudo nvidia-smi -lgc MHZ, undone with -rgc"
    return Check("clocks", WARNING, f"{fact}, free as far as NVML tells", advice)


def _power_limit(gpu: GpuFacts) -> Check:
    limit, default = gpu.power_limit_watts, gpu.power_limit_default_watts
    if limit is None:
        return Check("power limit", WARNING, "unreadable")
    if default is not None and limit < default:
        advice = f"sudo nvidia-smi -pl {default:.0f}, or compare only with runs at this limit"
        return Check("power limit", WARNING, f"{limit:.0f} W, below the card's {default:.0f} W", advice)
    return Check("power limit", OK, f"{limit:.0f} W")


def _temperature(gpu: GpuFacts) -> Check:
    now, slowdown = gpu.temperature_celsius, gpu.temperature_slowdown_celsius
    if now is None:
        return Check("temperature", WARNING, "unreadable")
    bound = TEMPERATURE_CELSIUS if slowdown is None else slowdown - TEMPERATURE_HEADROOM_CELSIUS
    fact = f"{now} °C" + ("" if slowdown is None else f", slows down at {slowdown} °C")
    if now < bound:
        return Check("temperature", OK, fact)
    return Check("temperature", WARNING, fact, "let it cool, and look at fans and airflow")


def _throttling(gpu: GpuFacts) -> Check:
    if gpu.clocks_event_reasons is None:
        return Check("throttling", WARNING, "unreadable", "throttled rounds will not be noticed")
    throttled = sorted(gpu.clocks_event_reasons & THROTTLE_REASONS)
    if throttled:
        return Check("throttling", CANNOT, ", ".join(throttled), "every round would be INVALID: cooling, power supply")
    return Check("throttling", OK, ", ".join(sorted(gpu.clocks_event_reasons)) or "nothing holds the clocks")


def _processes(gpu: GpuFacts) -> Check:
    if gpu.compute_pids is None:
        return Check("processes", WARNING, "unreadable", "strangers on the GPU will not be noticed")
    if not gpu.compute_pids:
        return Check("processes", OK, "no compute process on the GPU")
    pids = ", ".join(map(str, sorted(gpu.compute_pids)))
    return Check("processes", CANNOT, f"the GPU is in use by pid {pids}", "every round would be INVALID: end them")


def _mig(gpu: GpuFacts) -> Check:
    if gpu.is_mig_instance:
        return Check("mig", WARNING, "a MIG instance", "no joules, and its neighbours share power and clocks")
    if gpu.mig_mode:
        return Check(
            "mig", WARNING, "on: the GPU as a whole computes nothing", "name an instance in CUDA_VISIBLE_DEVICES"
        )
    return Check("mig", OK, "off" if gpu.mig_mode is False else "not on this model")


def stack_checks(stack: StackFacts, gpu: GpuFacts | None) -> list[Check]:
    """Whether torch, the driver, the GPU, Triton and xFormers go together. `gpu` is None where no GPU is wanted."""
    if stack.torch is None and stack.torch_error is None:
        return [Check("torch", CANNOT, stack.error or f"not in Python {stack.python}", "install torch there")]
    if not stack.torch_imported:
        fact = f"{stack.torch or 'torch'} does not import: {stack.torch_error or stack.error}"
        return [Check("torch", CANNOT, fact, "install it anew")]
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
    if stack.cuda and driver and int(stack.cuda.split(".")[0]) > driver[0]:  # within one major, any driver will do
        fact = f"torch is built for CUDA {stack.cuda}, the driver ends at {_dotted(driver)}"
        return [Check("cuda", CANNOT, fact, "a newer driver, or a torch for an older CUDA")]
    if not stack.device:
        return [
            Check("cuda", CANNOT, f"torch sees no GPU ({stack.cuda_warning or 'no reason given'})", "see torch above")
        ]
    cudnn = "no cuDNN" if stack.cudnn is None else f"cuDNN {stack.cudnn}"
    checks = [Check("cuda", OK, f"torch sees {stack.device}, {cudnn}")]
    if stack.hip or not stack.capability:
        return checks
    code = " ".join(stack.arch_list) or "nothing"
    fact = f"compute capability {_dotted(stack.capability)}, torch has code for {code}"
    if runs_on(stack.capability, stack.arch_list):
        return [*checks, Check("architecture", OK, fact)]
    return [*checks, Check("architecture", CANNOT, fact, "install a torch that is built for this GPU")]


def _triton(stack: StackFacts) -> Check:
    if stack.triton is None or stack.triton_error:
        why = stack.triton_error or "not installed"
        return Check("triton", WARNING, why, "compiled configurations cannot run on the GPU")
    return Check("triton", OK, stack.triton)


def _xformers(stack: StackFacts) -> Check:
    if stack.xformers is None:
        return Check("xformers", WARNING, "not installed", "its configurations are skipped; pip install xformers")
    for line in stack.xformers_requires:
        try:
            requirement = Requirement(line)
            fits = requirement.specifier.contains(stack.torch, prereleases=True)
        except (InvalidRequirement, InvalidVersion):
            continue
        if requirement.name == "torch" and not fits:
            fact = f"{stack.xformers} is built for {requirement}, and this is torch {stack.torch}"
            return Check("xformers", WARNING, fact, "install the xformers of this torch")
    if stack.xformers_error:
        return Check("xformers", WARNING, f"{stack.xformers} does not import: {stack.xformers_error}")
    return Check("xformers", OK, f"{stack.xformers}, goes with torch {stack.torch}")


def compiler_check() -> Check:
    """The compiler of C++ that inductor starts, as sd.optimise.compile asks for it."""
    found = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    if found:
        return Check("c++ compiler", OK, found)
    return Check("c++ compiler", WARNING, "none", "compiled configurations cannot run on the CPU; install g++")


def compile_check(trial: CompileTrial) -> Check:
    """Whether a small function compiles."""
    if trial.error:
        return Check("torch.compile", WARNING, trial.error, "compiled configurations cannot run")
    return Check("torch.compile", OK, f"a small function in {trial.seconds:.1f} s, cold")


def cpu_checks(before: CpuFacts, after: CpuFacts) -> list[Check]:
    """Whether the CPU side is quiet, from the facts before and after the look at torch."""
    return [
        Check(
            "cpu", OK if before.name else WARNING, f"{before.name or 'name unreadable'}, {before.cores or '?'} cores"
        ),
        _governor(before),
        _load(before),
        _steal(before, after),
        _cpu_limit(before),
        _memory(before),
        _swap(before),
    ]


def _governor(cpu: CpuFacts) -> Check:
    if cpu.governors is None:
        return Check("governor", WARNING, "unreadable, as in virtual machines", "the host decides on the frequency")
    if cpu.governors == ("performance",):
        return Check("governor", OK, "performance")
    return Check("governor", WARNING, ", ".join(cpu.governors), "sudo cpupower frequency-set -g performance")


def _load(cpu: CpuFacts) -> Check:
    load, cores = cpu.load_average_1_minute, cpu.cores
    if load is None or not cores:
        return Check("load", WARNING, "unreadable")
    fact = f"{load:.2f} on {cores} cores in the last minute"
    if load <= LOAD_PER_CORE * cores:
        return Check("load", OK, fact)
    return Check("load", WARNING, fact, "end what is running, or wait")


def _steal(before: CpuFacts, after: CpuFacts) -> Check:
    if None in (before.steal_seconds, after.steal_seconds) or after.cpu_seconds <= before.cpu_seconds:
        return Check("steal", WARNING, "unreadable")
    fraction = (after.steal_seconds - before.steal_seconds) / (after.cpu_seconds - before.cpu_seconds)
    fact = f"{fraction:.1%} of the CPU time went to other machines"
    if fraction <= STEAL_FRACTION:
        return Check("steal", OK, fact)
    return Check("steal", WARNING, fact, "use CPU time as the clock, or a machine of your own")


def _cpu_limit(cpu: CpuFacts) -> Check:
    if cpu.cgroup_cpus is None:
        return Check("cpu limit", OK, "none")
    fact = f"the container may use {cpu.cgroup_cpus:g} CPUs"
    if cpu.cores is None or cpu.cgroup_cpus >= cpu.cores:
        return Check("cpu limit", OK, fact)
    advice = f"torch would start {cpu.cores} threads: OMP_NUM_THREADS={max(1, int(cpu.cgroup_cpus))}"
    return Check("cpu limit", WARNING, f"{fact} of {cpu.cores}", advice)


def _memory(cpu: CpuFacts) -> Check:
    if cpu.memory_available_bytes is None:
        return Check("memory", WARNING, "unreadable")
    fact = f"{cpu.memory_available_bytes / GIB:.1f} GiB available"
    if cpu.memory_available_bytes < MEMORY_LEAST_BYTES:
        return Check("memory", CANNOT, fact, "not even the tiny model fits: end other processes")
    if cpu.memory_available_bytes < MEMORY_BYTES:
        return Check("memory", WARNING, fact, "full-size models may not fit")
    return Check("memory", OK, fact)


def _swap(cpu: CpuFacts) -> Check:
    if cpu.swap_used_bytes is None:
        return Check("swap", WARNING, "unreadable")
    fact = f"{cpu.swap_used_bytes / GIB:.1f} GiB in use"
    if cpu.swap_used_bytes <= SWAP_BYTES:
        return Check("swap", OK, fact)
    return Check("swap", WARNING, fact, "memory was short: end other processes")


def suite_checks(storage: Path) -> list[Check]:
    """What the suite itself needs: a place for its runs, a clock, pytest-benchmark, git."""
    return [_storage(storage), _clock(), _pytest_benchmark(), _git()]


def _storage(storage: Path) -> Check:
    folder = storage.absolute()
    while not folder.exists() and folder != folder.parent:  # it is made by the first saved run
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check("storage", CANNOT, f"{folder} is no folder that can be written to", "choose another --storage")
    free = shutil.disk_usage(folder).free
    fact = f"{free / GIB:.1f} GiB free for {storage}"
    status = OK if free >= DISK_BYTES else WARNING if free >= DISK_LEAST_BYTES else CANNOT
    return Check("storage", status, fact, "" if status == OK else "make room: runs, journals and compile caches grow")


def _clock() -> Check:
    readings = [time.perf_counter() for _ in range(1000)]
    steps = [later - earlier for earlier, later in itertools.pairwise(readings) if later > earlier]
    step = max(min(steps, default=1.0), time.get_clock_info("perf_counter").resolution)
    source = cpu_facts().clocksource
    fact = f"steps of {step * 1e9:.0f} ns, source {source or 'unreadable'}"
    if step <= CLOCK_SECONDS and (source is None or source in FAST_CLOCKSOURCES):
        return Check("clock", OK, fact)
    return Check("clock", WARNING, fact, "boot with clocksource=tsc where the CPU has a stable one")


def _pytest_benchmark() -> Check:
    try:
        version = metadata.version("pytest-benchmark")
    except metadata.PackageNotFoundError:
        return Check("pytest-benchmark", CANNOT, "not installed", f"pip install 'pytest-benchmark>={PYTEST_BENCHMARK}'")
    if Version(version) < PYTEST_BENCHMARK:
        return Check("pytest-benchmark", CANNOT, version, f"needs {PYTEST_BENCHMARK} or later")
    return Check("pytest-benchmark", OK, version)


def _git() -> Check:
    path = shutil.which("git")
    if path is None:
        return Check("git", WARNING, "none", "saved runs will not name their commit; --perf-against needs it")
    return Check("git", OK, path)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
