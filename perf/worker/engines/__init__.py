"""Open the engine of a configuration: our own model, diffusers, or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from perf.worker.engines.interface import Fields, Output, output_of
from perf.worker.wire import NO_REFERENCE, WorkerError

PRECISIONS = ("full", "autocast", "fp16", "bf16")


class LoadedEngine:
    """An engine with the defaults of what it leaves out (perf.worker.engines.interface.Engine)."""

    def __init__(self, engine: Any, fields: Fields):
        self.engine, self.fields = engine, fields
        self._round = getattr(engine, "round", engine)
        if not callable(self._round):
            raise WorkerError("usage", f"{fields.values['engine']}: {engine!r} has no function `round(seed)`")
        self.precision: str = getattr(engine, "precision", None) or fields.values["precision"]
        if self.precision not in PRECISIONS:
            raise WorkerError(
                "usage",
                f"{fields.values['engine']}: its precision {self.precision!r} is none of {', '.join(PRECISIONS)}",
            )
        self.chosen_layers: str | None = getattr(engine, "chosen_layers", None)
        self.compiles: bool = getattr(engine, "compiles", fields.values["compile"] != "none")
        self.config = getattr(engine, "config", None)

    def round(self, seed: int) -> Output:
        """One call of the workload. Its output is complete in host memory, so that a device has finished."""
        returned = self._round(seed)
        return output_of(returned, getattr(self.engine, "stages", None) or {})

    def prepare(self, seed: int) -> None:
        """Make the state from which a round starts; untimed."""
        if hasattr(self.engine, "prepare"):
            self.engine.prepare(seed)

    def kernels(self) -> dict[str, list[str]]:
        """Attention kernels that ran, by network; empty where they are not observed."""
        return self.engine.kernels() if hasattr(self.engine, "kernels") else {}

    @property
    def releases(self) -> bool:
        """Whether the engine has something to release."""
        return hasattr(self.engine, "release")

    def release(self) -> None:
        """Release what outlives the process, such as a server or temporary files."""
        if self.releases:
            self.engine.release()


def open_engine(
    configuration: Mapping[str, Any], device: str, folder: str | None = None, function: Any = None
) -> LoadedEngine:
    """The loaded engine of a configuration (fields of perf.configurations.configuration.Configuration).

    folder: where the modules of the user's own engine are. function: the round itself, for the test of a user's suite.
    Raises what loading raises.
    """
    fields = Fields({**configuration, "device": device})
    if function is not None:
        return LoadedEngine(function, fields)
    constructor = _constructor(configuration["engine"], configuration["workload"], folder)
    if isinstance(constructor, ModuleType):
        constructor.load(fields)
        return LoadedEngine(constructor, fields)
    return LoadedEngine(constructor(fields), fields)


def _constructor(name: str, workload: str, folder: str | None) -> Any:
    """The class, function or module that opens an engine. Raises WorkerError."""
    if workload == "train" and name in ("sd", "diffusers"):
        from perf.worker.engines.training import TrainingEngine

        return TrainingEngine
    if name == "sd":
        from perf.worker.engines.sd import SDEngine

        return SDEngine
    if name == "diffusers":
        from perf.worker.engines.diffusers import DiffusersEngine

        return DiffusersEngine
    module, _, attributes = name.partition(":")
    target: Any = _module(module, folder)
    for attribute in filter(None, attributes.split(".")):
        if attribute == "reference" and not hasattr(target, attribute):
            raise WorkerError("unavailable", NO_REFERENCE)
        if not hasattr(target, attribute):
            raise WorkerError("usage", f"--engine {name}: {module} has no {attribute}")
        target = getattr(target, attribute)
    if isinstance(target, ModuleType) and not (hasattr(target, "load") and hasattr(target, "round")):
        raise WorkerError(
            "usage", f"--engine {name}: {module} has no `load(configuration)` and `round(seed)`; name a class"
        )
    return target


def _module(name: str, folder: str | None) -> ModuleType:
    """The user's module, imported from `folder` or from the environment; a file by its path."""
    if folder and folder != sys.path[0]:
        sys.path.insert(0, folder)  # perf is imported already, so that a folder `perf` of the user does not replace it
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):  # a package that the module itself needs
                raise
            raise WorkerError("usage", f"--engine {name}: there is no module {name} in {folder} or installed") from None
    path = Path(folder or "", name)
    if not path.is_file():  # in another commit
        raise WorkerError("usage", f"--engine {name}: there is no file {path}")
    if str(path.parent) != sys.path[0]:
        sys.path.insert(0, str(path.parent))  # as for a script, for the modules beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # of a path that ends in .py
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_code_of(top: str, tree: str) -> None:
    """Raise WorkerError if a module that another commit has in `tree`, its files, was imported from elsewhere.

    From the working tree `top`, or from an installation of it: both sides of a comparison would run the same code.
    """
    ours = [
        os.path.dirname(os.path.realpath(sys.modules[name].__file__ or ""))
        for name in ("perf", "sd")
        if name in sys.modules
    ]
    for name, module in list(sys.modules.items()):
        if "." in name or not getattr(module, "__file__", None):
            continue
        file = os.path.realpath(module.__file__)
        if file.startswith(tuple(folder + os.sep for folder in (tree, *ours))):
            continue
        places = [os.path.join(tree, *folder, name) for folder in ((), ("src",))]
        known = [path for place in places for path in (f"{place}.py", os.path.join(place, "__init__.py"))]
        if file.startswith(top + os.sep):
            known.append(tree + file[len(top) :])
        if any(map(os.path.isfile, known)):
            raise WorkerError(
                "usage",
                f"--perf-against: {name} was imported from {file} and not from the other commit, so both sides would run "
                "the same code: uninstall it, and put the folder that contains it on PYTHONPATH",
            )


def where(error: BaseException, folder: str) -> str:
    """` (file.py, line 3)`: the last frame of an error in the user's folder, for a message of one line; else nothing."""
    place, frame = "", error.__traceback__
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if file.startswith(folder + os.sep) and "site-packages" not in file:
            place = f" ({os.path.relpath(file, folder)}, line {frame.tb_lineno})"
        frame = frame.tb_next
    return place
