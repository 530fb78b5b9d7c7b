"""`--perf-trace DIR`: one round of each configuration under torch's profiler, outside the timed ones.

The worker writes what torch gives (a Chrome trace for Perfetto or chrome://tracing, and on CUDA a memory snapshot for
pytorch.org/memory_viz), the round's first picture, and marks the round for Nsight with an NVTX range. The trace's time is
summed by class of kernel. torch is imported where a round is traced, so that reading and summing need none.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from perf.analysis.trace_sums import ROUND, time_by_class

TRACE_SEED = 500_000  # no timed round has it


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
