"""Profile one round with torch.profiler, outside the timed rounds (`--perf-trace DIR`).

Written: a Chrome trace (Perfetto, chrome://tracing), on CUDA a memory snapshot (pytorch.org/memory_viz), and the first
image of the round. An NVTX range marks the round for Nsight.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from perf.analysis.trace_sums import ROUND, time_by_class
from perf.worker.engines.interface import Engine, Output


def record(engine: Engine, stem: str, seed: int) -> dict:
    """Profile one round of a warm engine into STEM.trace.json; return the entry `trace` of a saved run.

    Raises ValueError where the profiler lost kernels; the files are written all the same.
    """
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    trace, memory = Path(f"{stem}.trace.json"), Path(f"{stem}.memory.pickle")
    recording = False
    # The warm-up is part of this profiler session, since the first events under CUPTI are slow. Another session before this
    # one does not work: after it CUPTI can give no kernels for the rest of the process (CUDA 13, torch 2.13).
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1)) as profiler:
        torch.ones(1, device="cuda" if on_cuda else "cpu").add_(1)
        if on_cuda:
            torch.cuda.synchronize()
        profiler.step()
        try:
            recording = on_cuda and _record_memory()
            with torch.cuda.nvtx.range(ROUND) if on_cuda else contextlib.nullcontext(), record_function(ROUND):
                output = engine.round(seed)
                if on_cuda:
                    torch.cuda.synchronize()
            if recording:
                torch.cuda.memory._dump_snapshot(str(memory))
        finally:
            if recording:
                torch.cuda.memory._record_memory_history(enabled=None)
    profiler.export_chrome_trace(str(trace))
    with open(trace, encoding="utf-8", errors="replace") as file:
        seconds = time_by_class(json.load(file, strict=False), gpu=on_cuda)
    return {
        "seconds": seconds,
        "file": trace.name,
        "memory_snapshot": memory.name if recording else None,
        "picture": _save_image(output, Path(stem)),
    }


def _record_memory() -> bool:
    """Start recording allocations; False before torch 2.1.

    Python frames only: C++ frames are resolved when the snapshot is written, which takes minutes.
    """
    if not hasattr(torch.cuda.memory, "_dump_snapshot"):
        return False
    try:
        torch.cuda.memory._record_memory_history(stacks="python", max_entries=100_000)
    except TypeError:
        return False
    return True


def _save_image(output: Output, stem: Path) -> str | None:
    if output.images is None:
        return None
    folder = stem.parent / "pictures"
    folder.mkdir(exist_ok=True)
    Image.fromarray(output.images[0].numpy()).save(folder / f"{stem.name}.png")
    return f"pictures/{stem.name}.png"
