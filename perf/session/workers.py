"""Open the worker of each slot: its interpreter, its `sd`, its compile cache and the arguments to load."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from perf.configurations.configuration import Configuration
from perf.launch.in_process import InProcessLaunch
from perf.launch.process import Interpreter, ProcessLaunch
from perf.session.plan import Slot
from perf.session.settings import SessionError, SessionRefused, Settings
from perf.worker.wire import WorkerError

PROBE_SECONDS = 600.0


class Launches:
    """Opens the workers of a session. compile_cache: the folder of torch.compile's caches."""

    def __init__(self, settings: Settings, compile_cache: str):
        self.settings, self.compile_cache = settings, compile_cache
        self.environment: tuple[tuple[str, str], ...] = ()
        if (
            "CUDA_DEVICE_ORDER" not in os.environ
        ):  # NVML's, so that the first GPU of torch is that whose facts are saved
            self.environment = (("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),)
        if sys.dont_write_bytecode:  # otherwise every launch compiles all source files again, which takes seconds
            bytecode = str(Path(compile_cache, "bytecode"))
            self.environment += (("PYTHONDONTWRITEBYTECODE", ""), ("PYTHONPYCACHEPREFIX", bytecode))
        if settings.threads:
            self.environment += tuple((name, str(settings.threads)) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))

    def open(self, slot: Slot, own_process: bool = False):
        """Return the worker of a slot, as a context; own_process: also in a session within one. Raises WorkerError."""
        if not (self.settings.isolated or own_process):
            if self.settings.device == "cuda":  # effective before the first use of CUDA in this process
                os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
            return InProcessLaunch(self._caches(slot.configuration))
        interpreter = self.interpreter(slot)
        if slot.configuration.test:
            folder, test = self._folder(slot), slot.configuration.engine
            arguments = [str(folder), test, *self.settings.pytest_arguments]
            return ProcessLaunch(interpreter, [interpreter.python, "-m", "perf.plugin.serve", *arguments])
        return ProcessLaunch(interpreter)

    def interpreter(self, slot: Slot) -> Interpreter:
        """The interpreter of a slot, with the path of its `sd` and its environment."""
        label = slot.configuration.interpreter
        chosen = self.settings.interpreters[label] if label else Interpreter()
        if slot.variant == "base":
            chosen = Interpreter(chosen.python, self.settings.against[1].source)
        environment = (*chosen.environment, *self.environment, *self._caches(slot.configuration).items())
        return Interpreter(chosen.python, chosen.source, environment, path=self._import_path(slot))

    def _import_path(self, slot: Slot) -> tuple[str, ...]:
        """The folders of the user's own code of another commit, before those of an installation of it."""
        trees = self._trees(slot)
        if trees is None or not slot.configuration.own:
            return ()
        top, tree = trees
        places = [place for folder in (self._folder(slot), tree) for place in (folder, folder / "src")]
        for entry in filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)):
            relative = os.path.relpath(entry, top)
            if not relative.startswith(os.pardir):
                places.append(tree / relative)
        return tuple(dict.fromkeys(str(path) for path in places if path.is_dir()))

    def _caches(self, configuration: Configuration) -> dict[str, str]:
        cache = self._cache_folder(configuration)
        return {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}

    def _cache_folder(self, configuration: Configuration) -> str:
        """The compile cache of a configuration: one for all if the user keeps one, else a folder of its own.

        A configuration's first launch then compiles with a cold cache and the others with a warm one. In a shared folder
        most configurations would start warm, since they have kernels in common.
        """
        if self.settings.compile_cache is not None:
            return self.compile_cache
        return str(Path(self.compile_cache, hashlib.sha256(configuration.id.encode()).hexdigest()[:16]))

    def load_arguments(self, slot: Slot) -> dict:
        """What a slot's worker is asked to load."""
        slowed = self.settings.slowdown if slot.variant is None else 0.0
        return {
            **self._own(slot),
            "configuration": slot.configuration.as_dict(),
            "device": slot.configuration.device or self.settings.device,
            "clock": self.settings.clock,
            "threads": self.settings.threads,
            "slowdown": slowed,
        }

    def _own(self, slot: Slot) -> dict:
        """What the worker of an engine of the user's own needs besides: folders, and the fields that must have an effect."""
        configuration = slot.configuration
        if not configuration.own:
            return {}
        # The engine of a reference may ignore fields, such as the precision.
        given = [] if configuration.engine.endswith((".reference", ":reference")) else configuration.given
        folder = self._folder(slot)
        directory = folder if configuration.test else self.settings.directory
        trees = self._trees(slot)
        other = {"tree": [os.path.realpath(folder) for folder in trees]} if trees else {}
        return {"own": {"directory": str(directory), "folder": str(folder), "given": given, **other}}

    def _folder(self, slot: Slot) -> Path:
        """Where the code of an engine of the user's own is, or the root of the suite of a test."""
        folder = self.settings.rootpath if slot.configuration.test else self.settings.directory
        trees = self._trees(slot)
        return folder if trees is None else trees[1] / os.path.relpath(folder, trees[0])

    def _trees(self, slot: Slot) -> tuple[Path, Path] | None:
        """(root of the repository, all files of the other commit), for a slot of the user's own code of that commit."""
        against = self.settings.against
        return against[1].tree if slot.variant == "base" and against else None

    def probe(self, configurations: list[Configuration]) -> dict:
        """Return the facts of torch and the device, from a process of its own, and validate the techniques.

        Raises SessionError, for unknown or contradictory techniques before anything is measured.
        """
        settings = self.settings
        # An interpreter of the user's has a torch of its own, and training no techniques.
        ours = [
            each.as_dict()
            for each in configurations
            if each.engine == "sd" and each.workload != "train" and not each.interpreter
        ]
        try:
            with self.open(Slot(Configuration())) as worker:
                return worker.ask(
                    "probe",
                    PROBE_SECONDS,
                    device=settings.device,
                    clock=settings.clock,
                    threads=settings.threads,
                    configurations=ours,
                )
        except WorkerError as error:
            refusal = SessionRefused if error.kind in ("unavailable", "usage") else SessionError
            raise refusal(f"nothing can be measured: {error}") from None


@contextlib.contextmanager
def compile_cache(folder: Path | None = None) -> Iterator[str]:
    """Yield the path of the compile cache: `folder`, or a temporary one. Raises SessionError."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        path = str(folder.absolute()) if folder is not None else tempfile.mkdtemp(prefix="sd-perf-compile-")
    except OSError as error:
        raise SessionError(f"the folder of the compile cache cannot be created: {error.strerror}") from None
    try:
        yield path
    finally:
        if folder is None:
            shutil.rmtree(path, ignore_errors=True)
