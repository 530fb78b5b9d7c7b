"""The pictures that timed rounds are compared with: made once by the fp32 original, and kept by content."""

from __future__ import annotations

from pathlib import Path

from perf.configurations.configuration import Configuration
from perf.runs import fingerprints as weights
from perf.session import image_check
from perf.session.measurements import Measurements
from perf.session.plan import Plan, Slot
from perf.session.settings import SessionError, Settings
from perf.session.workers import Launches
from perf.worker.wire import WorkerError


class References:
    """The pictures that timed rounds are compared with, made once and kept by content."""

    def __init__(self, settings: Settings, launches: Launches, facts: dict):
        self.settings, self.launches, self.facts = settings, launches, facts
        self.folder = settings.folder / "references"
        self.unchecked: dict[str, str] = {}

    def of(self, slot: Slot, seed: int) -> list[str] | None:
        """The files of a round's images, or None where there are none."""
        if slot.configuration.id in self.unchecked:
            return None
        return [str(self._path(slot.configuration, one)) for one in image_check.image_seeds(slot.configuration, seed)]

    def _path(self, configuration: Configuration, seed: int) -> Path:
        label = configuration.interpreter
        torch = self.settings.interpreters[label].python if label else self.facts["torch"]
        origin = {"device": f"{configuration.device or self.settings.device} {self.facts['name']}", "torch": torch}
        return image_check.reference_path(self.folder, configuration, seed, weights.identity(configuration), origin)

    def prepare(self, plan: Plan, say) -> None:
        """Make what is missing, one process a reference configuration."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SessionError(f"{self.folder}: the reference pictures cannot be kept: {error.strerror}") from None
        wanted: dict[Configuration, dict[Path, int]] = {}
        users: dict[Configuration, list[str]] = {}
        for configuration in dict.fromkeys(slot.configuration for slot in plan.slots):
            try:
                paths = {self._path(configuration, seed): seed for seed in _first_round(configuration)}
            except OSError as error:
                self.unchecked[configuration.id] = f"{error.filename}: {error.strerror}"
                continue
            reference = self._reference(configuration)
            users.setdefault(reference, []).append(configuration.id)
            missing = {path: seed for path, seed in paths.items() if not path.exists()}
            wanted.setdefault(reference, {}).update(missing)
        for reference, missing in wanted.items():
            if not missing:
                continue
            say(f"perf: making {len(missing)} reference picture(s) with {reference.id}")
            try:
                self._make(reference, missing)
            except WorkerError as error:
                self.unchecked.update(dict.fromkeys(users[reference], str(error)))

    def _reference(self, configuration: Configuration) -> Configuration:
        """Whose picture is the right one; by this interpreter, unless the weights are random and so its own."""
        reference = configuration.reference()
        if weights.identity(configuration)["kind"] == "random":
            return reference
        return Configuration(**{**vars(reference), "interpreter": None})

    def _make(self, reference: Configuration, missing: dict[Path, int]) -> None:
        slot, limits = Slot(reference), self.settings.limits
        with self.launches.open(slot) as worker:
            arguments = {**self.launches.load_arguments(slot), "slowdown": 0.0}
            worker.ask("load", limits.load, **arguments)
            for path, seed in missing.items():
                examined = worker.ask("round", limits.first_round, seed=seed)["image"]
                wrong = image_check.wrong(examined, "full", arguments["device"])
                if wrong:
                    raise WorkerError("wrong_picture", f"the reference itself is wrong: {wrong}")
                worker.ask("write_reference", 60.0, path=str(path))


def _first_round(configuration: Configuration) -> list[int]:
    return image_check.image_seeds(configuration, configuration.seed)


def unchecked(references: References, measurements: Measurements) -> dict[str, str]:
    """Configurations of which a launch was not compared with a reference, and why."""
    found = dict(references.unchecked)
    for measured in measurements.by_name.values():
        firsts = [launch.rounds[0]["image"] for launch in measured.launches.values() if launch.rounds]
        if any(image["latent_relative_error"] is None for image in firsts):
            id = measured.slot.configuration.id
            found.setdefault(
                id, "measured before its reference picture could be made; start again without --perf-resume"
            )
    return found
