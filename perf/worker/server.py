"""One configuration in its own process: JSON lines in, JSON lines out.

    python -m perf.worker

Every request is one line {"op": ..., ...} and every answer one line, {"ok": {...}} or {"error": {"kind", "message"}}.
The process may be any interpreter that `sd` runs on; what it prints by itself goes to stderr, so that nothing but
answers is ever on the pipe. A worker does nothing unless it is asked, so that it never works while another one times.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import sys
import time
import traceback

from perf.configurations.configuration import UnknownChoice, from_dict
from perf.worker import clock as clocks
from perf.worker.wire import PROTOCOL


class Worker:
    """What a worker can be asked. It holds at most one engine. Used directly where no process of its own is wanted."""

    def __init__(self):
        self.engine, self.configuration, self.anchor = None, None, None
        self.clock, self.graphs_before, self.graphs_after_first = clocks.wall_clock, compiled_graphs(), None
        self.output = None

    def handle(self, request: dict) -> dict:
        """The answer to one request; errors are answers too."""
        try:
            request = dict(request)
            name = request.pop("op")
            if name not in OPERATIONS:
                raise UnknownChoice(f"a worker knows no {name!r}")
            return {"ok": getattr(self, name)(**request)}
        except Exception as error:
            return {"error": self._describe(error)}

    def load(self, configuration: dict, device: str, clock: str, threads: int | None, slowdown: float = 0.0) -> dict:
        """Import torch, load the model and make the anchor's tensors ready."""
        begin = time.perf_counter()
        import torch

        from perf.worker import reference_workload as anchor
        from perf.worker.engines import open_engine
        from perf.worker.engines.sd import BusyLoop

        if threads:
            torch.set_num_threads(threads)
        if device == "cuda":
            _require_cuda()
        self.clock = clocks.clock(clock)
        self.configuration = from_dict(configuration)
        loading = time.perf_counter()
        busy_loop = BusyLoop(slowdown, self.clock) if slowdown else None
        self.engine = open_engine(self.configuration, device, busy_loop)
        clocks.wait_for_device()
        end = time.perf_counter()
        self.anchor = anchor.Anchor(torch.device(device))
        self.anchor()  # its first call allocates
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        import sd

        return {
            "import_seconds": loading - begin,  # with what a device needs to begin
            "load_seconds": end - loading,
            "anchor": anchor.NAME,
            "precision": self.engine.precision,
            "compiles": self.engine.compiles,
            "sd": os.path.dirname(os.path.abspath(sd.__file__)),
            "facts": torch_facts(device),
            "pid": os.getpid(),
        }

    def round(self, seed: int, check: str | None = None) -> dict:
        """One round and, after it, its anchor; then the picture is hashed and compared, outside of both timed regions.

        check: the reference's file (see perf.worker.images). The garbage of earlier rounds is collected before the clock starts.
        """
        from perf.worker import images
        from perf.worker import reference_workload as anchor

        self.output = None
        gc.collect()
        started = time.time()
        wall, begin = time.perf_counter(), self.clock()
        output = self.engine.round(seed)
        seconds = self.clock() - begin
        wall = time.perf_counter() - wall
        anchors = []
        for _ in range(anchor.REPEATS):
            begin = self.clock()
            self.anchor()
            anchors.append(self.clock() - begin)
        self.output = output
        graphs = {name: count - self.graphs_before[name] for name, count in compiled_graphs().items()}
        if self.graphs_after_first is None:
            self.graphs_after_first = graphs["graphs"]
        return {
            "started_unix_seconds": started,
            "seconds": seconds,
            "wall_seconds": wall,
            "device_seconds": sum(output.stages.values()) if clocks.on_cuda() and output.stages else None,
            "anchor_seconds": sorted(anchors)[len(anchors) // 2],
            "stages": output.stages,
            "unet_calls": output.unet_calls,
            "peak_bytes": peak_bytes(),
            "image": images.examine(output, check),
            "kernels": self.engine.kernels(),
            "compile": {**graphs, "recompiles": graphs["graphs"] - self.graphs_after_first},
        }

    def write_reference(self, path: str) -> dict:
        """Write the last round's output where `check` will find it."""
        from perf.worker import images

        images.write(self.output, path)
        return {"path": path}

    def trace(self, stem: str) -> dict:
        """One more round under the profiler, into files that begin with `stem` (perf.worker.profiler)."""
        from perf.worker import profiler as trace

        return trace.record(self.engine, stem)

    def ping(self) -> dict:
        """Nothing: what a round trip over the pipes costs."""
        return {}

    def probe(self, device: str, clock: str, threads: int | None, optimise: list | None = None) -> dict:
        """What this torch and device are, and the device's ceilings: matrix products in FLOP/s by dtype, a copy in bytes/s.

        optimise: what configurations ask for by that name; what none here knows is an error before anything is measured.
        """
        import torch

        from perf.worker.reference_workload import copy_bytes_per_second, matmul_flops_per_second

        if threads:
            torch.set_num_threads(threads)
        if device == "cuda":
            _require_cuda()
        if optimise:
            from perf.worker.engines.sd import techniques

            for names in optimise:
                techniques(names, device)
        dtypes = ("float32", "float16", "bfloat16") if device == "cuda" else ("float32",)
        rates = {}
        for name in dtypes:
            rates[name] = matmul_flops_per_second(torch.device(device), getattr(torch, name), clocks.clock(clock))
        copied = copy_bytes_per_second(torch.device(device), clocks.clock(clock))
        return {**torch_facts(device), "matmul_flops_per_second": rates, "copy_bytes_per_second": copied}

    def _describe(self, error: Exception) -> dict:
        kind = error_kind(error)
        message = " ".join(str(error).split())[:2000] or type(error).__name__
        if kind == "out_of_memory":
            self.engine = self.output = self.anchor = None  # so that whoever shares this process or device can go on
            _forget_frames(error)
            gc.collect()
            smaller = self.configuration.batch // 2 if self.configuration else 0
            advice = f"try batch {smaller}" if smaller else "try a smaller picture, or precision fp16"
            peak = peak_bytes()
            held = peak["allocated"] or peak["rss"]
            message = f"out of memory at a peak of {(held or 0) / 2**30:.2f} GiB: {advice}"
            release_device_memory()
        elif kind == "failed":
            message = f"{type(error).__name__}: {message}"
        return {"kind": kind, "message": message}


OPERATIONS = ("ping", "probe", "load", "round", "trace", "write_reference")


def _require_cuda() -> None:
    import torch

    from sd.errors import Unavailable

    if not torch.cuda.is_available():
        raise Unavailable(f"torch {torch.__version__} of {sys.executable} sees no CUDA device")


def error_kind(error: Exception) -> str:
    """Which of KINDS an exception is."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out_of_memory"
    if isinstance(error, UnknownChoice):
        return "usage"
    names = {base.__name__ for base in type(error).__mro__}  # `sd` may not even have been imported
    if "Unavailable" in names:
        return "unavailable"
    if "BadImage" in names:
        return "bad_image"
    return "usage" if "SDError" in names else "failed"


def torch_facts(device: str) -> dict:
    """What the torch of this process is, and the device as it sees it; null where it cannot tell."""
    import torch

    facts = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "name": None,
        "uuid": None,
        "memory_bytes": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid = getattr(properties, "uuid", None)  # torch >= 2.3
        facts.update(name=properties.name, memory_bytes=properties.total_memory, uuid=uuid and f"GPU-{uuid}")
    return facts


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiled_graphs() -> dict:
    """How many graphs torch.compile has made in this process, and how often it broke one; zeros where nothing compiled."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return {"graphs": 0, "graph_breaks": 0}
    counters = dynamo.counters
    return {"graphs": counters["stats"].get("unique_graphs", 0), "graph_breaks": sum(counters["graph_break"].values())}


def peak_bytes() -> dict:
    """The most memory held so far: of the CUDA device, allocated and reserved, and of the process."""
    peaks = {"allocated": None, "reserved": None, "rss": None}
    if clocks.on_cuda():
        cuda = sys.modules["torch"].cuda
        peaks.update(allocated=cuda.max_memory_allocated(), reserved=cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:  # not on Windows
        return peaks
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return {**peaks, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions held in which an error came up: else it stays until the error is gone, which is later."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def release_device_memory() -> None:
    """Give cached device memory back, after an error that left it unusable; a poisoned device stays so."""
    if clocks.on_cuda():
        try:
            sys.modules["torch"].cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device's memory could not be released: {error}", file=sys.stderr)


def _end_with_the_launcher() -> None:
    """On Linux: a launcher that is killed takes this process with it, in the middle of a round too.

    Else it would go on with the round, beside the session that is resumed. Elsewhere it ends after the round.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)


def main() -> None:
    """Answer requests until the pipe closes."""
    _end_with_the_launcher()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # nor may a library that asks a question take a request for the reply
    os.close(nothing)
    print(json.dumps({"ok": {"protocol": PROTOCOL, "pid": os.getpid()}}), file=answers, flush=True)
    worker = Worker()
    for line in requests:
        print(json.dumps(worker.handle(json.loads(line))), file=answers, flush=True)
    sys.stderr.flush()
    os._exit(0)  # every answer is out, and taking PyTorch down takes half a second, with its compiler more than one
