"""Saved runs for tests: variations of the golden run."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

from perf.runs.saved_run import SavedRun, parse

RUNS = Path(__file__).parents[1] / "runs"
GOLDEN = RUNS / "0001_synthetic.json"
DOCUMENT = json.loads(GOLDEN.read_text(encoding="utf-8"))
IDS = ("tiny-original-b1", "tiny-sdpa-b1", "tiny-mha-b1")
STACK = DOCUMENT["machine_info"]["stack"]
INFO = ("benchmarks", 0, "extra_info")


def document(number: int = 1, slow: dict[str, float] | None = None, offset: float = 1.0, noise: float = 0.0) -> dict:
    """The golden run as session `number`: `offset` scales all seconds, the reference workload's too, `slow` single ids."""
    made, draw = copy.deepcopy(DOCUMENT), random.Random(number)
    made["perf"]["started_unix_seconds"] += 86_400.0 * number
    for benchmark in made["benchmarks"]:
        info = benchmark["extra_info"]
        factor = offset * (slow or {}).get(info["configuration"]["id"], 1.0) * draw.gauss(1, noise)
        for launch in info["launches"]:
            launch["round_seconds"] = [seconds * factor for seconds in launch["round_seconds"]]
        info["anchor"] = [[seconds * offset for seconds in launch] for launch in info["anchor"]]
        benchmark["stats"]["data"] = [
            seconds
            for launch in info["launches"]
            for index, seconds in enumerate(launch["round_seconds"])
            if str(index) not in launch["invalid"]
        ]
    return made


def store(folder: Path, made: dict, number: int = 1, label: str = "nightly") -> Path:
    """Write a document as session `number` of a storage."""
    path = folder / f"{number:04d}_{label}.json"
    path.write_text(json.dumps(made), encoding="utf-8")
    return path


def put(*path_and_value):
    """A function that sets the value at a path of a document."""
    *path, key, value = path_and_value

    def change(made):
        for step in path:
            made = made[step]
        made[key] = value

    return change


def parsed(change) -> SavedRun:
    """The golden run after `change(document)`."""
    made = copy.deepcopy(DOCUMENT)
    change(made)
    return parse(made, Path("0001_changed.json"))
