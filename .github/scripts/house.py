"""What the workflow scripts share: where things are, how they speak to Actions, and how they read what others wrote.

Imported before anything of `perf`, which it puts on the path: the scripts run on hosted machines where nothing is installed.
Inputs come in environment variables, never in the text of a command, so that no input can become a command.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SHA = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")  # of labels, sets and series: also a safe name of a folder
FLEET = ROOT / ".github" / "perf-fleet.json"
AA = "aa"  # the series of sessions measured against themselves
MAX_BYTES = 1_000_000  # of an event, an outcome and the fleet


class Refusal(Exception):
    """What was asked for cannot be done; the message says why and what to do."""


@dataclass(frozen=True)
class Machine:
    """What a label of the fleet promises. gpu: its exact name; driver: how its version begins; uuids: empty for not pinned yet.

    temperature_below_celsius: warmer than that nothing is started. lock_mhz: the SM clock to lock, None for none.
    """

    gpu: str
    driver: str
    uuids: tuple[str, ...] = ()
    temperature_below_celsius: float = 60.0
    lock_mhz: int | None = None


def main(run: Callable[[], int]) -> int:
    """The exit status of a script: its own, or 4 with one line where it refuses."""
    try:
        return run()
    except Refusal as refusal:
        annotate("error", str(refusal))
        return 4  # perf.analysis.verdicts.ExitCode.REFUSED


def annotate(level: str, words: str) -> None:
    """A line that Actions shows at the top of the run; level: error, warning or notice.

    Escaped as the runner asks for, so that a text of others can start no command of its own.
    """
    escaped = words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    print(f"::{level}::{escaped}", flush=True)


def output(name: str, value: str) -> None:
    """An output of the step. Raises Refusal for a value that would make a second one."""
    if "\n" in value or "\r" in value:
        raise Refusal(f"the output {name} has more than one line")
    print(f"{name}={value}", flush=True)
    _append("GITHUB_OUTPUT", f"{name}={value}\n")


def summary(markdown: str) -> None:
    """Add to the job's summary page."""
    _append("GITHUB_STEP_SUMMARY", markdown.rstrip() + "\n\n")


def _append(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


def given(name: str, default: str | None = None) -> str:
    """An input from the environment. Raises Refusal where it is needed and absent or empty."""
    value = os.environ.get(name, "").strip()
    if value:
        return value
    if default is None:
        raise Refusal(f"the environment variable {name} is not set")
    return default


def out_folder() -> Path:
    """Where a job leaves what it uploads: $OUT, or `perf` in the runner's folder, which it empties before each job."""
    folder = Path(os.environ.get("OUT") or Path(given("RUNNER_TEMP")) / "perf")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> dict:
    """An object in a file of others. Raises Refusal for whatever is not one: absent, a link, too large, no JSON."""
    try:
        if path.is_symlink() or not path.is_file():
            raise Refusal(f"{path.name}: there is no such file")
        if path.stat().st_size > MAX_BYTES:
            raise Refusal(f"{path.name}: is larger than {MAX_BYTES} bytes")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path.name}: cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(f"{path.name}: is not an object")
    return document


def fleet(path: Path = FLEET) -> dict[str, Machine]:
    """The machines by label. Raises Refusal for a file with anything unknown in it: a misspelt limit would be no limit."""
    known = set(Machine.__dataclass_fields__)
    machines = {}
    for label, fields in read_json(path).items():
        if not NAME.fullmatch(label) or not isinstance(fields, dict) or not fields.keys() <= known:
            raise Refusal(f"{path.name}: {label!r} is no label, or has other fields than {', '.join(sorted(known))}")
        if not {"gpu", "driver"} <= fields.keys():
            raise Refusal(f"{path.name}: {label} names no gpu or no driver")
        machines[label] = Machine(**{**fields, "uuids": tuple(fields.get("uuids", ()))})
    if not machines:
        raise Refusal(f"{path.name}: the fleet is empty")
    return machines


def machine(label: str) -> Machine:
    """What the fleet promises of a label. Raises Refusal for an unknown one."""
    machines = fleet()
    if label not in machines:
        raise Refusal(f"the fleet has no machine {label!r}; it has {', '.join(machines)} ({FLEET.name})")
    return machines[label]


def series(name: str, batches: tuple[int, ...] = ()) -> str:
    """The name under which runs of a set are stored: runs at other batches are another suite, and another baseline."""
    return name + ("-b" + "-".join(map(str, batches)) if batches else "")
