"""Time of a profiler trace by class of kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from perf.analysis.kernel_classes import kernel_class

Event = Mapping[str, Any]  # of a Chrome trace
ROUND = "perf round"  # the profiler range around a round
GAP = "launch gap"  # the class of time without a kernel
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_CATEGORIES = ("cpu_op", "operator")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
LOST_SHARE = 0.01  # tolerated share of launches whose kernels the profiler lost


def time_by_class(trace: Mapping[str, Any], gpu: bool = False) -> dict[str, float]:
    """The seconds of a Chrome trace's round by class of kernel, with idle time under `launch gap`.

    On a GPU: kernels and copies; concurrent kernels count fully, so that the sum may exceed the round. On a CPU: the self
    time of operators on the thread that ran the round. Raises ValueError for a trace without a round, and for a GPU trace
    that lacks kernels.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    # The range also appears as `gpu_user_annotation`, from its first to its last kernel on each stream.
    ranges = [event for event in events if event.get("name") == ROUND and not _category(event).startswith("gpu")]
    if not ranges:
        raise ValueError("the trace has no round")
    whole = max(ranges, key=lambda event: event["dur"])
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    if gpu:
        kernels = [event for event in events if _category(event) in GPU_CATEGORIES]
        # By overlap: host and device clocks differ by microseconds, and the device is idle at both ends of the range.
        kernels = [event for event in kernels if event["ts"] < end and event["ts"] + event["dur"] > begin]
        _require_all(kernels, [event for event in events if begin <= event["ts"] < end])
        timed = [(event["name"], event["dur"]) for event in kernels]
        busy = _union((max(event["ts"], begin), min(event["ts"] + event["dur"], end)) for event in kernels)
    else:
        inside = [event for event in events if begin <= event["ts"] < end and event.get("tid") == whole.get("tid")]
        timed = _self_times(event for event in inside if _category(event) in CPU_CATEGORIES)
        busy = sum(duration for _, duration in timed)
    seconds: dict[str, float] = {}
    for name, duration in timed:
        label = kernel_class(name)
        seconds[label] = seconds.get(label, 0.0) + duration / 1e6
    return {**seconds, GAP: max(0.0, whole["dur"] - busy) / 1e6}


def _category(event: Event) -> str:
    return str(event.get("cat", "")).lower()


def _require_all(kernels: Iterable[Event], events: Iterable[Event]) -> None:
    """Raise ValueError if launches lack their kernels, which profilers lose silently (pytorch/pytorch, issue 192021)."""
    recorded = {_correlation(event) for event in kernels} - {None}
    launches = {
        _correlation(event)
        for event in events
        if _category(event) in LAUNCH_CATEGORIES and re.search("LaunchKernel|GraphLaunch", str(event.get("name")))
    } - {None}
    lost = len(launches - recorded)
    if not recorded or lost > LOST_SHARE * len(launches):
        raise ValueError(
            f"the profiler lost the kernels of {lost} of {len(launches)} launches on the GPU; trace it again"
        )


def _correlation(event: Event) -> object:
    """The id that a launch shares with its kernels; all kernels of a CUDA graph share that of the graph's launch."""
    arguments = event.get("args")
    return arguments.get("correlation") if isinstance(arguments, dict) else None


def _union(spans: Iterable[tuple[float, float]]) -> float:
    total, last = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total


def _self_times(events: Iterable[Event]) -> list[tuple[str, float]]:
    """(name, duration without nested events) of the events of one thread, in microseconds."""
    self_times: list[list[Any]] = []
    stack: list[tuple[float, list[Any]]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1][0] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][1][1] -= event["dur"]
        entry = [event["name"], event["dur"]]
        self_times.append(entry)
        stack.append((event["ts"] + event["dur"], entry))
    return [(name, max(0.0, duration)) for name, duration in self_times]
