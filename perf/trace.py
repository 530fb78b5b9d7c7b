"""`--perf-trace DIR`: one round of each configuration under torch's profiler, outside the timed ones.

The worker writes what torch gives (a Chrome trace for Perfetto or chrome://tracing, and on CUDA a memory snapshot for
pytorch.org/memory_viz), the round's first picture, and marks the round for Nsight with an NVTX range. The trace's time is
summed by class of kernel. torch is imported where a round is traced, so that reading and summing need none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

ROUND = "perf round"
TRACE_SEED = 500_000  # no timed round has it
# The first pattern that a name has decides. Kernels of NVIDIA's libraries and of Inductor, and ATen's operators: names are
# no contract, so that what is not known is `other` and not hidden. The products of a written-out attention are `gemm`.
CLASSES = (
    ("attention", r"flash|fmha|attention|softmax|efficient_attn"),
    (
        "copy",
        r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|aten::(?:cat|clone|contiguous|to|_to_|pin_memory|index)|catarray",
    ),
    ("conv", r"conv|fprop|winograd|implicit_gemm|dgrad"),
    ("gemm", r"gemm|cublas|nvjet|splitk|aten::(?:mm|bmm|addmm|baddbmm|matmul|linear|einsum)|matmul|mkl_linear"),
    ("norm", r"norm|welford|rowwisemoments|aten::(?:var|std)"),
    (
        "elementwise",
        r"elementwise|triton_poi|cpp_fused|silu|gelu|sigmoid|aten::(?:add|sub|mul|div|exp|sin|cos|pow|sqrt|rsub|neg|clamp|"
        r"round|fill_|zero_|where|lerp|addcmul|normal_|chunk|upsample)",
    ),
)
PATTERNS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in CLASSES)
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
CPU_CATEGORIES = ("cpu_op", "operator")
GAP = "launch gap"


def kernel_class(name: str) -> str:
    """The class of a kernel or operator by its name, `other` where it is not known."""
    return next((kind for kind, pattern in PATTERNS if pattern.search(name)), "other")


def time_by_class(trace: Mapping) -> dict[str, float]:
    """Seconds of a Chrome trace's round by class of kernel, and under `launch gap` those in which nothing computed.

    On a GPU these are its kernels and copies; kernels that run beside each other count fully, so that the sum may pass the
    round. On a CPU they are operators without those called inside them, of the thread that ran the round. Raises
    ValueError for a trace without the range of a round.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and "dur" in event]
    ranges = [event for event in events if event.get("name") == ROUND]
    if not ranges:
        raise ValueError("the trace has no round")
    whole = max(ranges, key=lambda event: event["dur"])
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    inside = [event for event in events if begin <= event["ts"] < end]
    kernels = [event for event in inside if str(event.get("cat", "")).lower() in GPU_CATEGORIES]
    if kernels:
        timed = [(event["name"], event["dur"]) for event in kernels]
        busy = _union((event["ts"], min(event["ts"] + event["dur"], end)) for event in kernels)
    else:
        operators = [event for event in inside if str(event.get("cat", "")).lower() in CPU_CATEGORIES]
        timed = _self_times(event for event in operators if event.get("tid") == whole.get("tid"))
        busy = sum(duration for _, duration in timed)
    found: dict[str, float] = {}
    for name, duration in timed:
        kind = kernel_class(name)
        found[kind] = found.get(kind, 0.0) + duration / 1e6
    return {**found, GAP: max(0.0, whole["dur"] - busy) / 1e6}


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

    The engine has made a round already, so that nothing is compiled or chosen in this one.
    """
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    trace, memory = Path(f"{stem}.trace.json"), None
    remembering = on_cuda and _remember(torch)
    with torch.profiler.profile(activities=activities) as profiler:
        if on_cuda:
            torch.cuda.nvtx.range_push(ROUND)
        with torch.profiler.record_function(ROUND):
            output = engine.round(TRACE_SEED)
            if on_cuda:
                torch.cuda.synchronize()
        if on_cuda:
            torch.cuda.nvtx.range_pop()
    if remembering:
        memory = Path(f"{stem}.memory.pickle")
        torch.cuda.memory._dump_snapshot(str(memory))
        torch.cuda.memory._record_memory_history(enabled=None)
    profiler.export_chrome_trace(str(trace))
    with open(trace, encoding="utf-8", errors="replace") as file:
        seconds = time_by_class(json.load(file))
    return {
        "seconds": seconds,
        "file": trace.name,
        "memory_snapshot": memory and memory.name,
        "picture": _picture(output, Path(stem)),
    }


def _remember(torch) -> bool:
    """Start recording allocations; False where this torch cannot (before 2.1)."""
    if not hasattr(torch.cuda.memory, "_dump_snapshot"):
        return False
    try:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
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
