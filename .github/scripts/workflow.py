"""Inputs, outputs and errors of the workflow scripts, and the machines of the fleet.

Import this module before `perf`: it puts the repository on the import path, because hosted machines have nothing installed.
Inputs are environment variables, never part of a command's text, so that no input can become a command.
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
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")  # of labels, sets and series; also a safe folder name
FLEET = ROOT / ".github" / "perf-fleet.json"
AA = "aa"  # the series of sessions that measure a configuration against itself
MAX_BYTES = 1_000_000  # of an event, an outcome and the fleet


class Refusal(Exception):
    """A request that cannot be carried out. The message gives the reason and the remedy."""


@dataclass(frozen=True)
class Machine:
    """The properties that a label of the fleet promises.

    gpu: its exact name. driver: prefix of its version. uuids: empty where none is pinned yet. temperature_below_celsius: upper
    bound for starting a measurement. lock_mhz: SM clock to lock, None for no lock.
    """

    gpu: str
    driver: str
    uuids: tuple[str, ...] = ()
    temperature_below_celsius: float = 60.0
    lock_mhz: int | None = None


def main(run: Callable[[], int]) -> int:
    """Return the exit status of `run`, or 4 (perf.analysis.verdicts.ExitCode.REFUSED) with one line for a Refusal."""
    try:
        return run()
    except Refusal as refusal:
        annotate("error", str(refusal))
        return 4


def annotate(level: str, message: str) -> None:
    """Print an annotation of the Actions run, escaped so that foreign text cannot start a command. level: error or warning."""
    escaped = message.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    print(f"::{level}::{escaped}", flush=True)


def output(name: str, value: str) -> None:
    """Set an output of the step. Raises Refusal for a value of several lines, which could set a second output."""
    if "\n" in value or "\r" in value:
        raise Refusal(f"the output {name} has more than one line")
    print(f"{name}={value}", flush=True)
    _append("GITHUB_OUTPUT", f"{name}={value}\n")


def add_to_summary(markdown: str) -> None:
    """Append Markdown to the summary page of the job."""
    _append("GITHUB_STEP_SUMMARY", markdown.rstrip() + "\n\n")


def _append(variable: str, text: str) -> None:
    if path := os.environ.get(variable):
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)


def setting(name: str, default: str | None = None) -> str:
    """Return an environment variable. Raises Refusal where it has neither a value nor a default."""
    value = os.environ.get(name, "").strip() or default
    if value is None:
        raise Refusal(f"the environment variable {name} is not set")
    return value


def out_folder() -> Path:
    """Return the folder $LABEL in the one that the job uploads, `perf` in the runner's folder, which each job finds empty."""
    folder = Path(setting("RUNNER_TEMP")) / "perf" / setting("LABEL")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_json(path: Path) -> dict:
    """Read a JSON object from an untrusted file. Raises Refusal for an absent, linked, oversized or invalid file."""
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
    """Read the machines by label. Raises Refusal for unknown fields: a misspelt limit would be no limit."""
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
    """Return a machine of the fleet. Raises Refusal for an unknown label."""
    machines = fleet()
    if label not in machines:
        raise Refusal(f"the fleet has no machine {label!r}; it has {', '.join(machines)} ({FLEET.name})")
    return machines[label]


def repository() -> str:
    """Return OWNER/NAME of the repository. Raises Refusal for anything else in GITHUB_REPOSITORY."""
    name = setting("GITHUB_REPOSITORY")
    if name.count("/") != 1 or not all(map(NAME.fullmatch, name.split("/"))):
        raise Refusal("GITHUB_REPOSITORY is not OWNER/NAME")
    return name


def series(name: str, batches: tuple[int, ...] = ()) -> str:
    """Return the name under which runs of a set are stored; other batch sizes are another series with its own baseline."""
    return name + ("-b" + "-".join(map(str, batches)) if batches else "")
