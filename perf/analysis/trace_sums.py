"""Seconds of a profiler trace by class of kernel."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from perf.analysis.kernel_classes import kernel_class

ROUND = "perf round"


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
