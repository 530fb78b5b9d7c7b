"""Which process a slot's launch is: its Python, its `sd`, and what it is told to load."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from perf.configurations.configuration import Configuration
from perf.launch.in_process import InProcessLaunch
from perf.launch.process import Interpreter, ProcessLaunch
from perf.session.plan import Slot
from perf.session.settings import SessionError, Settings
from perf.worker.wire import WorkerError


class Launches:
    """Opens workers: which interpreter, which `sd`, and what they are told to load."""

    def __init__(self, settings: Settings, compile_cache: str):
        self.settings, self.compile_cache = settings, compile_cache
        self.environment = ()
        if sys.dont_write_bytecode:  # else every launch would compile the same source files once more, for seconds
            bytecode = str(Path(compile_cache, "bytecode"))
            self.environment = (("PYTHONDONTWRITEBYTECODE", ""), ("PYTHONPYCACHEPREFIX", bytecode))
        if settings.threads:
            self.environment += tuple((name, str(settings.threads)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))

    def open(self, slot: Slot):
        """A worker for a slot, as a context."""
        if not self.settings.isolated:
            return InProcessLaunch()
        return ProcessLaunch(self.interpreter(slot))

    def interpreter(self, slot: Slot) -> Interpreter:
        """The Python of a slot, and where its `sd` is."""
        label = slot.configuration.interpreter
        chosen = self.settings.interpreters[label] if label else Interpreter()
        if slot.variant == "base":
            chosen = Interpreter(chosen.python, self.settings.against[1].source)
        compiled = self.compiled(slot.configuration)
        caches = (("TORCHINDUCTOR_CACHE_DIR", compiled), ("TRITON_CACHE_DIR", str(Path(compiled, "triton"))))
        return Interpreter(chosen.python, chosen.source, (*chosen.environment, *self.environment, *caches))

    def compiled(self, configuration: Configuration) -> str:
        """The folder of what torch.compile makes of a configuration.

        Its first launch finds it empty and the others do not: cold and warm, both measured. One folder for all would
        make most of them warm from the start, for they have kernels in common; so it is where the user keeps one.
        """
        if self.settings.compile_cache is not None:
            return self.compile_cache
        return str(Path(self.compile_cache, hashlib.sha256(configuration.id.encode()).hexdigest()[:16]))

    def load_arguments(self, slot: Slot) -> dict:
        """What a slot's worker is asked to load."""
        slowed = self.settings.slowdown if slot.variant is None else 0.0
        return {
            "configuration": slot.configuration.as_dict(),
            "device": slot.configuration.device or self.settings.device,
            "clock": self.settings.clock,
            "threads": self.settings.threads,
            "slowdown": slowed,
        }

    def probe(self, configurations: list[Configuration]) -> dict:
        """What torch and the device are, asked of a process of its own. Raises SessionError.

        So it does for techniques that no configuration of ours can have: a slip of the pen costs no measurement.
        """
        settings = self.settings
        named = {one.optimise for one in configurations if one.optimise and one.engine == "sd"}
        try:
            with self.open(Slot(Configuration())) as worker:
                return worker.ask(
                    "probe",
                    600.0,
                    device=settings.device,
                    clock=settings.clock,
                    threads=settings.threads,
                    optimise=sorted(named),
                )
        except WorkerError as error:
            raise SessionError(f"nothing can be measured: {error}") from None


@contextlib.contextmanager
def compile_cache(kept: Path | None = None):
    """The folder of torch.compile's cache: the one to keep, or a new one for this session. Raises SessionError."""
    try:
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
        folder = str(kept.absolute()) if kept is not None else tempfile.mkdtemp(prefix="sd-perf-compile-")
    except OSError as error:
        raise SessionError(f"no folder for compiled code can be made: {error.strerror}") from None
    try:
        yield folder
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)
