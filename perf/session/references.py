"""Reference images: rendered once by the original fp32 code and stored by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from perf.configurations.configuration import Configuration
from perf.launch.process import Interpreter
from perf.report.text import counted
from perf.runs import fingerprints
from perf.session.image_check import image_failure
from perf.session.measurements import Measurements
from perf.session.plan import Slot
from perf.session.runner import Limits, run_round
from perf.session.settings import SessionError
from perf.session.workers import Launches
from perf.worker.wire import NO_REFERENCE, WorkerError

WRITE_SECONDS = 60.0


def image_seeds(configuration: Configuration, seed: int) -> list[int]:
    """The seeds of a round's references: image i has seed + i, at any batch size.

    A loss trace and the output of a user's own engine are compared as a whole.
    """
    if configuration.workload == "train" or configuration.own:
        return [seed]
    return [seed + i for i in range(configuration.batch)]


def reference_path(folder: Path, configuration: Configuration, seed: int, weights: dict, origin: dict) -> Path:
    """The file of one reference image, named by a hash of everything its pixels depend on.

    weights: as perf.runs.fingerprints.identity. origin: `device` and `torch`, on which random weights depend besides
    their seed.
    """
    inputs = {**configuration.reference().as_dict(), "seed": seed, "weights": weights, "format": 1}
    if weights["sha256"] is not None:  # the same content under another path is the same
        inputs.update(checkpoint=None, config=None)
    del inputs["id"], inputs["interpreter"]
    if weights["kind"] == "random":
        inputs["origin"] = {key: origin.get(key) for key in ("device", "torch")}
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:40]}.npz"


@dataclass
class References:
    """The reference images of a session. unchecked: configurations without one, with the reason.

    facts: name and torch version of `device`. interpreters: as in perf.session.settings.Settings. own_folder: of this
    session alone, for references of the user's own engines, whose code is not known to be unchanged.
    """

    folder: Path
    launches: Launches
    device: str
    facts: dict
    interpreters: dict[str, Interpreter]
    limits: Limits
    unchecked: dict[str, str] = field(default_factory=dict)
    own_folder: Path = Path()

    def files(self, slot: Slot, seed: int) -> list[str] | None:
        """The reference files of a round's images, or None if there are none."""
        if slot.configuration.id in self.unchecked:
            return None
        return [str(self._path(slot.configuration, each)) for each in image_seeds(slot.configuration, seed)]

    def prepare(self, slots: Sequence[Slot], log: Callable[[str], None]) -> None:
        """Render the missing reference images, in one process per reference configuration. Raises SessionError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"{self.folder}: the reference images cannot be stored: {error.strerror}") from None
        missing: dict[Configuration, dict[Path, int]] = {}
        users: dict[Configuration, list[str]] = {}
        for configuration in dict.fromkeys(slot.configuration for slot in slots):
            if configuration.test:  # which checks its own result
                self.unchecked[configuration.id] = NO_REFERENCE
                continue
            try:
                seeds = image_seeds(configuration, configuration.seed)
                paths = {self._path(configuration, seed): seed for seed in seeds}
            except OSError as error:
                self.unchecked[configuration.id] = f"{error.filename}: {error.strerror}"
                continue
            reference = self._reference(configuration)
            users.setdefault(reference, []).append(configuration.id)
            absent = {path: seed for path, seed in paths.items() if not path.exists()}
            missing.setdefault(reference, {}).update(absent)
        for reference, paths in missing.items():
            if not paths:
                continue
            log(f"perf: rendering {counted(len(paths), 'reference output')} with {reference.id}")
            try:
                self._render(reference, paths)
            except WorkerError as error:
                self.unchecked.update(dict.fromkeys(users[reference], str(error)))

    def add_unchecked_launches(self, measurements: Measurements) -> None:
        """Add to `unchecked` the configurations with a launch that was not compared with a reference."""
        for measured in measurements.by_name.values():
            first_images = [launch.rounds[0]["image"] for launch in measured.launches.values() if launch.rounds]
            if any(image["latent_relative_error"] is None for image in first_images):
                reason = "measured before its reference image was available; start again without --perf-resume"
                self.unchecked.setdefault(measured.slot.configuration.id, reason)

    def _path(self, configuration: Configuration, seed: int) -> Path:
        label = configuration.interpreter
        torch = self.interpreters[label].python if label else self.facts["torch"]
        device = (configuration.device or self.device, self.facts["name"], self.facts.get("processor"))
        origin = {"device": " ".join(filter(None, device)), "torch": torch}
        folder = self.own_folder if configuration.own else self.folder
        return reference_path(folder, configuration, seed, fingerprints.identity(configuration), origin)

    def _reference(self, configuration: Configuration) -> Configuration:
        """The reference configuration; it runs in this interpreter unless random weights depend on their own one."""
        reference = configuration.reference()
        if fingerprints.identity(configuration)["kind"] in ("random", "own"):
            return reference
        return replace(reference, interpreter=None)

    def _render(self, reference: Configuration, paths: dict[Path, int]) -> None:
        slot = Slot(reference)
        arguments = {**self.launches.load_arguments(slot), "slowdown": 0.0}
        with self.launches.open(slot) as worker:
            worker.ask("load", self.limits.load, **arguments)
            for path, seed in paths.items():
                answer, _ = run_round(worker, self.limits.first_round, seed)
                failure = image_failure(answer["image"], "full", arguments["device"], workload=reference.workload)
                if failure:
                    raise WorkerError("wrong_image", f"the reference image is wrong: {failure}")
                worker.ask("write_reference", WRITE_SECONDS, path=str(path))
