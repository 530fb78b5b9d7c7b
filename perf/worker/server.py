"""Worker: one configuration in its own process, which answers requests of the session (perf.worker.wire).

The process may be any interpreter that `sd` runs on. What libraries print goes to stderr, so the pipe carries responses
only. A worker computes only during a request, so it never works while another worker is timed.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any, ClassVar

from perf.worker import clock
from perf.worker.wire import PROTOCOL, WorkerError

atexit.register(gc.unfreeze)  # some libraries report what is left out of collections at exit as leaked
OPERATIONS = ("ping", "probe", "load", "prepare", "round", "examine", "count", "trace", "write_reference", "release")
RATE_DTYPES = {"cuda": ("float32", "float16", "bfloat16"), "cpu": ("float32",)}  # of the matmul rates of `probe`


class Worker:
    """State of a worker: at most one engine. Also used without a process of its own (perf.launch.in_process).

    alive: the workers of this process.
    """

    alive: ClassVar[weakref.WeakSet[Worker]] = weakref.WeakSet()

    def __init__(self, function: Any = None) -> None:
        """function: the round of the only engine that can be loaded, instead of the one that a configuration names."""
        self.alive.add(self)
        self.function = function
        self.engine: Any = None
        self.configuration: Any = None
        self.reference_workload: Any = None
        self.output: Any = None
        self.clock = clock.wall_clock
        self.compiled: Counter[str] = Counter()  # compile_counts of this worker's loads and rounds
        self.graphs_after_first: int | None = None
        self.own: dict[str, Any] = {}
        self.busy_loop: BusyLoop | None = None

    def handle(self, request: dict) -> dict:
        """The response to one request; an exception becomes an error response."""
        try:
            request = dict(request)
            operation = request.pop("op")
            if operation not in OPERATIONS:
                raise WorkerError("usage", f"a worker has no operation {operation!r}")
            return {"ok": getattr(self, operation)(**request)}
        except Exception as error:
            return {"error": self._error(error)}

    def answer(self, line: str) -> dict:
        """The response to a request as a line of JSON."""
        return self.handle(json.loads(line))

    def ping(self) -> dict:
        """No work: the cost of a round trip."""
        return {}

    def load(
        self,
        configuration: dict,
        device: str,
        clock: str,
        threads: int | None,
        slowdown: float = 0.0,
        own: dict | None = None,
        observe: bool = True,
    ) -> dict:
        """Import torch, load the model, allocate the reference workload. configuration: fields, validated by the session.

        own: of an engine of the user's own: the working directory, the `folder` with its modules, and the `given` fields,
        which the engine must read; of another commit also `tree`: the root of the repository, and the files of that commit.
        observe: whether the engine may profile a call to learn its attention kernels, which `trace` excludes.
        """
        begin = time.perf_counter()
        collect_garbage(every_object=True)  # also what an earlier worker of this process has left
        torch = _torch(device, threads)

        from perf.worker import reference_workload
        from perf.worker.clock import CLOCKS, cpu_clock_with_children, synchronize
        from perf.worker.engines import open_engine

        self.clock, self.own = CLOCKS[clock], own or {}
        if self.own:
            os.chdir(self.own["directory"])
            self.clock = cpu_clock_with_children if clock == "cpu" else self.clock
        self.configuration = SimpleNamespace(**configuration)
        loading = time.perf_counter()
        with self._compiling():
            self.engine = open_engine(configuration, device, self.own.get("folder"), self.function)
        if not observe and hasattr(self.engine.engine, "stop_observing"):
            self.engine.engine.stop_observing()
        self.busy_loop = BusyLoop(slowdown, self.clock) if slowdown else None
        if self.busy_loop and not self.own:
            self.engine.engine.after_step = self.busy_loop
        synchronize()
        end = time.perf_counter()
        self.reference_workload = reference_workload.ReferenceWorkload(torch.device(device))
        self.reference_workload()  # its first call allocates
        return {
            "import_seconds": loading - begin,  # includes the start of the device
            "load_seconds": end - loading,
            "anchor": self.reference_workload.name,
            "precision": self.engine.precision,
            "layers": self.engine.chosen_layers,
            "compiles": self.engine.compiles,
            "releases": self.engine.releases,
            "sd": os.path.dirname(os.path.abspath(sys.modules["sd"].__file__ or "")) if "sd" in sys.modules else None,
            "facts": torch_facts(device),
            "pid": os.getpid(),
        }

    def prepare(self, seed: int) -> dict:
        """Make the state from which the next round starts, and collect the garbage of earlier ones."""
        self.output = None
        self.engine.prepare(seed)
        collect_garbage()
        if self.graphs_after_first is not None:
            leave_objects_out()
        if clock.uses_cuda():
            sys.modules["torch"].cuda.reset_peak_memory_stats()
        return {}

    def round(self, seed: int) -> dict:
        """Time one round. The session observes the device during this request, which therefore does nothing else."""
        if self.busy_loop:
            self.busy_loop.start()
        with self._compiling():
            started = time.time()
            wall, begin = time.perf_counter(), self.clock()
            output = self.engine.round(seed)
            if self.busy_loop and not self.busy_loop.steps:  # the workload has no steps to slow down
                self.busy_loop(1, 1)
            seconds = self.clock() - begin
            wall = time.perf_counter() - wall
        self.output = output
        self._require_read_fields()
        if self.graphs_after_first is None:
            if "tree" in self.own:
                from perf.worker.engines import require_code_of

                require_code_of(*self.own["tree"])
            self.graphs_after_first = self.compiled["graphs"]
        timed_by_events = clock.uses_cuda() and output.stages and not self.own
        return {
            "started_unix_seconds": started,
            "seconds": seconds,
            "wall_seconds": wall,
            "device_seconds": sum(output.stages.values()) if timed_by_events else None,
            "stages": output.stages,
            "unet_calls": output.unet_calls,
            "work": self._work(output.unet_calls),
            "peak_bytes": self._peak_bytes(),
            "kernels": self.engine.kernels(),
            "compile": {
                **{name: self.compiled[name] for name in ("graphs", "graph_breaks")},
                "recompiles": self.compiled["graphs"] - self.graphs_after_first,
            },
        }

    def examine(self, check: list[str] | None = None) -> dict:
        """Time the reference workload and examine the output of the last round. check: reference files, one per image."""
        from perf.worker import images

        return {
            "anchor_seconds": self.reference_workload.seconds(self.clock),
            "image": images.examine(self.output, check),
        }

    def count(self, seed: int) -> dict:
        """Exact counts of one more round, untimed, and of the kernels that the compiler has generated."""
        from perf.worker import counts

        self.output = None
        self.engine.prepare(seed)
        return {**counts.of_round(self.engine, seed), "generated_kernels": self.compiled["generated_kernels"]}

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """Add what torch.compile does in this context to `compiled`; other workers may share the process."""
        before = compile_counts()
        yield
        self.compiled.update({name: count - before[name] for name, count in compile_counts().items()})

    def write_reference(self, path: str) -> dict:
        """Store the output of the last round as a reference."""
        from perf.worker import images

        images.write(self.output, path, whole=bool(self.own))
        return {"path": path}

    def release(self) -> dict:
        """Let the engine release what outlives this process."""
        self.engine.release()
        return {}

    def trace(self, stem: str, seed: int) -> dict:
        """Profile one more round into files whose names begin with `stem`."""
        from perf.worker import profiler

        self.engine.prepare(seed)
        return profiler.record(self.engine, stem, seed)

    def probe(self, device: str, clock: str, threads: int | None, configurations: list[dict] | None = None) -> dict:
        """Facts of this torch and device, and the device's peak rates: matmul FLOP/s by dtype, copy bytes/s.

        configurations: of our own model; unknown or contradictory techniques are an error here, before anything is measured.
        """
        torch = _torch(device, threads)

        from perf.worker.clock import CLOCKS
        from perf.worker.reference_workload import copy_bytes_per_second, matmul_flops_per_second

        for configuration in configurations or []:
            require_consistent(configuration, device)
        where, read_clock = torch.device(device), CLOCKS[clock]
        rates = {
            name: matmul_flops_per_second(where, getattr(torch, name), read_clock) for name in RATE_DTYPES[where.type]
        }
        copy_rate = copy_bytes_per_second(where, read_clock)
        return {**torch_facts(device), "matmul_flops_per_second": rates, "copy_bytes_per_second": copy_rate}

    def _require_read_fields(self) -> None:
        """Raise WorkerError for an option that the user's engine ignores: two ids would name the same measurement."""
        unread = [name for name in self.own.get("given", ()) if name not in self.engine.fields.read]
        if unread:
            name = unread[0]
            raise WorkerError(
                "usage",
                f"{self.configuration.engine} does not read configuration.{name}, so --{name.replace('_', '-')} has no "
                "effect: leave it out, or use the field in the engine",
            )

    def _peak_bytes(self) -> dict[str, int | None]:
        """Peak memory of the round, without the tensors of the reference workload."""
        peaks = peak_bytes()
        if sum(worker.engine is not None for worker in Worker.alive) > 1:  # whose models are in the process's peak
            return dict.fromkeys(peaks)
        if peaks["allocated"] is not None:
            peaks["allocated"] -= self.reference_workload.bytes
        return peaks

    def _work(self, unet_calls: int) -> dict[str, int] | None:
        from perf.analysis import flops

        if self.engine.config is None:
            return None
        item_bytes = 4 if self.engine.precision == "full" else 2  # autocast computes in fp16 or bf16
        shape = self.configuration, self.engine.config, unet_calls
        return {"flops": flops.of_round(*shape), "minimum_bytes": flops.minimum_bytes_of_round(*shape, item_bytes)}

    def _error(self, error: Exception) -> dict:
        kind = error_kind(error)
        message = " ".join(str(error).split())[:2000] or type(error).__name__
        if kind == "out_of_memory":
            message = self._out_of_memory(error)
        elif kind == "failed":
            message = f"{type(error).__name__}: {message}{self._where(error)}"
        return {"kind": kind, "message": message}

    def _where(self, error: Exception) -> str:
        if not self.own:
            return ""
        from perf.worker.engines import where

        return where(error, self.own["folder"])

    def _out_of_memory(self, error: Exception) -> str:
        """Release the model, for what shares this process or device; return the advice."""
        peak = peak_bytes()
        self.engine = self.output = self.reference_workload = None
        _clear_frames(error)
        collect_garbage(every_object=True)
        release_device_memory()
        smaller = self.configuration.batch // 2 if self.configuration else 0
        advice = f"try batch {smaller}" if smaller else "try a smaller image, or precision fp16"
        gibibytes = (peak["allocated"] or peak["rss"] or 0) / 2**30
        return f"out of memory at a peak of {gibibytes:.2f} GiB: {advice}"


def collect_garbage(every_object: bool = False) -> None:
    """Collect garbage. every_object: also among the objects that `leave_objects_out` left out."""
    if every_object:
        gc.unfreeze()
        leave_objects_out.cache_clear()
    gc.collect()


@functools.cache  # once, also for several workers in one process
def leave_objects_out() -> None:
    """Leave what exists now, mostly objects of the libraries, out of further collections of this process.

    To examine them takes 85 ms, most of a round of the embedded model. A timed round follows a collection and has hardly any
    itself: its time did not change.
    """
    gc.freeze()


class BusyLoop:
    """A progress callback that prolongs each sampler step by a fraction: the injected slowdown of the self-test.

    A workload without steps, and an engine that does not report them, are prolonged at the end of the round. clock: waits for
    the device; on a GPU a loop on the host alone would be hidden behind queued work. steps: of the present round.
    """

    def __init__(self, fraction: float, clock: Any):
        self.fraction, self.clock = fraction, clock
        self.start()

    def start(self) -> None:
        """Begin a round."""
        self.last, self.steps = self.clock(), 0

    def __call__(self, step: int, steps: int) -> None:
        self.steps += 1
        end = self.clock()
        end += self.fraction * (end - self.last)
        while self.clock() < end:
            pass
        self.last = self.clock()


def require_consistent(configuration: dict, device: str) -> None:
    """Raise WorkerError if the configuration's techniques are unknown or contradict each other.

    What this machine lacks is left to the load, whose failure does not affect other configurations.
    """
    from perf.worker.engines.sd import optimisations
    from sd.errors import ConfigError

    try:
        optimisations(SimpleNamespace(**configuration), configuration["device"] or device)
    except ConfigError as error:
        raise WorkerError("usage", f"{configuration['id']}: {error}") from None


def _torch(device: str, threads: int | None) -> Any:
    """torch, with `threads` set. Raises WorkerError where `device` is missing."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not torch.cuda.is_available():
        raise WorkerError("unavailable", f"torch {torch.__version__} of {sys.executable} sees no CUDA device")
    return torch


def error_kind(error: Exception) -> str:
    """The kind (perf.worker.wire.KINDS) of an exception."""
    if isinstance(error, WorkerError):
        return error.kind
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out_of_memory"
    names = {base.__name__ for base in type(error).__mro__}  # by name: sd may not be imported
    by_class = {"Unavailable": "unavailable", "BadImage": "bad_image", "SDError": "usage"}
    return next((kind for name, kind in by_class.items() if name in names), "failed")


def torch_facts(device: str) -> dict:
    """Versions of this process, and the device as torch sees it; None where unknown."""
    import torch

    facts = {
        "device": device,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "diffusers": _version("diffusers"),
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
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compile_counts() -> dict[str, int]:
    """Graphs, graph breaks and generated kernels of compiled code in this process so far, also those from its cache."""
    dynamo, metrics = (sys.modules.get(f"torch.{name}") for name in ("_dynamo.utils", "_inductor.metrics"))
    counters = dynamo.counters if dynamo else {"stats": {}, "graph_break": {}}
    packages = getattr(sys.modules.get("sd.optimise.aot"), "loaded_code", {})  # older `sd` has none
    return {
        "graphs": counters["stats"].get("unique_graphs", 0) + packages.get("graphs", 0),
        "graph_breaks": sum(counters["graph_break"].values()),
        "generated_kernels": (metrics.generated_kernel_count if metrics else 0) + packages.get("generated_kernels", 0),
    }


def peak_bytes() -> dict[str, int | None]:
    """Peak memory so far: allocated and reserved of the CUDA device, resident of the process."""
    peaks: dict[str, int | None] = {"allocated": None, "reserved": None, "rss": None}
    if clock.uses_cuda():
        cuda = sys.modules["torch"].cuda
        peaks.update(allocated=cuda.max_memory_allocated(), reserved=cuda.max_memory_reserved())
    try:
        import resource
    except ImportError:  # not on Windows
        return peaks
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return {**peaks, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _clear_frames(error: BaseException | None) -> None:
    """Release the local variables of the frames of an exception, which hold the memory until it is gone."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def release_device_memory() -> None:
    """Return cached device memory after an error; report where the device does not recover."""
    if clock.uses_cuda():
        try:
            sys.modules["torch"].cuda.empty_cache()
        except RuntimeError as error:
            print(f"the device's memory could not be released: {error}", file=sys.stderr)


def _end_with_the_parent() -> None:
    """On Linux, a killed session ends this process, also during a round; elsewhere it ends after the round.

    Otherwise the round would continue beside a resumed session.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(signal.SIGKILL), 0, 0, 0)


def open_pipes() -> tuple[Any, Any]:
    """(requests, responses) of a worker process, after its greeting; output of libraries goes to stderr from now on."""
    _end_with_the_parent()
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not be taken for a response
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # and a library that reads stdin must not take a request
    os.close(nothing)
    respond(responses, {"ok": {"protocol": PROTOCOL, "pid": os.getpid()}})
    return requests, responses


def respond(responses: Any, response: dict) -> None:
    """Send a response."""
    print(json.dumps(response), file=responses, flush=True)


def main() -> None:
    """Answer requests until the pipe closes."""
    requests, responses = open_pipes()
    worker = Worker()
    for line in requests:
        respond(responses, worker.answer(line))
    sys.stderr.flush()
    os._exit(0)  # every response is out; a regular exit of PyTorch takes 0.5 s, with its compiler more than 1 s
