"""`--perf-trace DIR`: one round of each configuration under torch's profiler, outside the timed ones.

The worker writes what torch gives (a Chrome trace for Perfetto or chrome://tracing, and on CUDA a memory snapshot for
pytorch.org/memory_viz), the round's first picture, and marks the round for Nsight with an NVTX range. The trace's time is
summed by class of kernel. torch is imported where a round is traced, so that reading and summing need none.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from perf.kernel_classes import kernel_class

ROUND = "perf round"
TRACE_SEED = 500_000  # no timed round has it
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_CATEGORIES = ("cpu_op", "operator")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
GAP = "launch gap"
LOST_SHARE = 0.01  # of a round's launches, whose kernels the profiler may have lost without making the table wrong


def time_by_class(trace: Mapping, gpu: bool = False) -> dict[str, float]:
    """Seconds of a Chrome trace's round by class of kernel, and under `launch gap` those in which nothing computed.

    On a GPU these are its kernels and copies; kernels that run beside each other count fully, so that the sum may pass the
    round. On a CPU they are operators without those called inside them, of the thread that ran the round. Raises
    ValueError for a trace without the range of a round, and for a GPU's that lacks kernels: operators of the host are
    not its time.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    # The range stands in the trace again, as `gpu_user_annotation`, from its first kernel to its last on each stream.
    ranges = [event for event in events if event.get("name") == ROUND and not _category(event).startswith("gpu")]
    if not ranges:
        raise ValueError("the trace has no round")
    whole = max(ranges, key=lambda event: event["dur"])
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    if gpu:
        kernels = [event for event in events if _category(event) in GPU_CATEGORIES]
        # By overlap: the clocks of the two sides differ by microseconds, and the device waits at both ends of the range.
        kernels = [event for event in kernels if event["ts"] < end and event["ts"] + event["dur"] > begin]
        _require_all(kernels, [event for event in events if begin <= event["ts"] < end])
        timed = [(event["name"], event["dur"]) for event in kernels]
        busy = _union((max(event["ts"], begin), min(event["ts"] + event["dur"], end)) for event in kernels)
    else:
        inside = [event for event in events if begin <= event["ts"] < end and event.get("tid") == whole.get("tid")]
        timed = _self_times(event for event in inside if _category(event) in CPU_CATEGORIES)
        busy = sum(duration for _, duration in timed)
    found: dict[str, float] = {}
    for name, duration in timed:
        kind = kernel_class(name)
        found[kind] = found.get(kind, 0.0) + duration / 1e6
    return {**found, GAP: max(0.0, whole["dur"] - busy) / 1e6}


def _category(event: Mapping) -> str:
    return str(event.get("cat", "")).lower()


def _require_all(kernels: Iterable[Mapping], events: Iterable[Mapping]) -> None:
    """Raise ValueError where launches have no kernel: profilers lose them in silence (pytorch/pytorch, issue 192021)."""
    there = {_correlation(event) for event in kernels} - {None}
    launches = {
        _correlation(event)
        for event in events
        if _category(event) in LAUNCH_CATEGORIES and re.search("LaunchKernel|GraphLaunch", str(event.get("name")))
    } - {None}
    lost = len(launches - there)
    if not there or lost > LOST_SHARE * len(launches):
        raise ValueError(
            f"the profiler lost the kernels of {lost} of {len(launches)} launches on the GPU; trace it again"
        )


def _correlation(event: Mapping) -> object:
    """The number that a launch shares with its kernels; all kernels of a CUDA graph have that of its launch."""
    arguments = event.get("args")
    return arguments.get("correlation") if isinstance(arguments, dict) else None


def _union(spans: Iterable[tuple[float, float]]) -> float:
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def _self_times(events: Iterable[Mapping]) -> list[tuple[str, float]]:
    """(name, duration less that of the events inside) of nested events of one thread, in microseconds."""
    found: list[list] = []
    stack: list[tuple[float, list]] = []
    for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][1][1] -= event["dur"]
        entry = [event["name"], event["dur"]]
        found.append(entry)
        stack.append((event["ts"] + event["dur"], entry))
    return [(name, max(0.0, duration)) for name, duration in found]


# --- in the worker


def record(engine, stem: str) -> dict:
    """Trace one round of an engine into STEM.trace.json; returns what a saved run holds under `trace`.

    The engine has made a round already, so that nothing is compiled or chosen in this one. Raises ValueError where the
    profiler has lost kernels; the files are there all the same.
    """
    import torch

    profile = torch.profiler
    activities = [profile.ProfilerActivity.CPU]
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_cuda:
        activities.append(profile.ProfilerActivity.CUDA)
    trace, memory = Path(f"{stem}.trace.json"), Path(f"{stem}.memory.pickle")
    remembering = False
    # The session's own warm-up: the first events under CUPTI are slow. A session before this one would not do instead, for
    # after an empty one CUPTI has been seen to give no kernels for the rest of the process (CUDA 13, torch 2.13).
    steps = profile.schedule(wait=0, warmup=1, active=1, repeat=1)
    with profile.profile(activities=activities, schedule=steps) as profiler:
        torch.ones(1, device="cuda" if on_cuda else "cpu").add_(1)
        if on_cuda:
            torch.cuda.synchronize()
        profiler.step()
        try:
            remembering = on_cuda and _remember(torch)
            with torch.cuda.nvtx.range(ROUND) if on_cuda else contextlib.nullcontext(), profile.record_function(ROUND):
                output = engine.round(TRACE_SEED)
                if on_cuda:
                    torch.cuda.synchronize()
            if remembering:
                torch.cuda.memory._dump_snapshot(str(memory))
        finally:
            if remembering:
                torch.cuda.memory._record_memory_history(enabled=None)
    profiler.export_chrome_trace(str(trace))
    with open(trace, encoding="utf-8", errors="replace") as file:
        seconds = time_by_class(json.load(file, strict=False), gpu=on_cuda)
    return {
        "seconds": seconds,
        "file": trace.name,
        "memory_snapshot": memory.name if remembering else None,
        "picture": _picture(output, Path(stem)),
    }


def _remember(torch) -> bool:
    """Start recording allocations; False where this torch cannot (before 2.1).

    With Python's frames alone: those of C++ are looked up one by one when the snapshot is written, which takes minutes.
    """
    if not hasattr(torch.cuda.memory, "_dump_snapshot"):
        return False
    try:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)
    except TypeError:
        return False
    return True


def _picture(output, stem: Path) -> str | None:
    if output.images is None:
        return None
    from PIL import Image

    folder = stem.parent / "pictures"
    folder.mkdir(exist_ok=True)
    Image.fromarray(output.images[0].numpy()).save(folder / f"{stem.name}.png")
    return f"pictures/{stem.name}.png"


# --- in the session


def trace_all(launches, slots, folder: Path, limits, say) -> dict[str, dict]:
    """Trace every slot of the working tree in a process of its own; returns `trace` by configuration id.

    launches: as perf.launches.Launches. One that cannot be traced is said and left out. Raises OSError where the folder
    cannot be made.
    """
    from perf.launcher import WorkerError
    from perf.report.text import file_name

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for slot in slots:
        id = slot.configuration.id
        say(f"perf: tracing {id}")
        try:
            with launches.open(slot) as worker:
                worker.ask("load", limits.load, **launches.load_arguments(slot))
                worker.ask("round", limits.first_round, seed=TRACE_SEED + 1)
                found[id] = worker.ask("trace", limits.round, stem=str(folder.absolute() / file_name(id)))
        except WorkerError as error:
            say(f"perf: {id} was not traced: {error}")
    return found
