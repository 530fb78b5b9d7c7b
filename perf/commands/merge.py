"""`python -m perf merge`: join the saved runs of many machines in one folder, without torch or pytest.

The result is one storage with a subfolder per device and software stack, which `python -m perf report` and the baseline
selection read at any depth. Every run is validated and copied byte for byte. Only the names of the device and the stack,
reduced to safe characters, decide on the destination.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.report.text import counted
from perf.runs.saved_run import NUMBERED, BaselineError, SavedRun, content_of, document_in, load, parse, shown
from perf.runs.storage import of_another_kind, save_numbered, saved_runs_in, storage_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `merge`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="saved runs, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="destination, new or existing")


def run(args: argparse.Namespace) -> int:
    """Join runs. Exit status: 0; 1 if some runs cannot be read; 4 if none can, or the destination cannot be written.

    Unreadable files are reported and left in place. Runs that the destination already has are skipped, so the command can
    be repeated; a different run under a taken name gets the next number.
    """
    counts: Counter[str] = Counter()
    folders: dict[Path, dict[str, Path]] = {}
    paths = dict.fromkeys(run for path in args.runs for run in (saved_runs_in(path) if path.is_dir() else [path]))
    for path in paths:
        try:
            content = content_of(path)
            document = document_in(content, path)
            if path not in args.runs and of_another_kind(path, document):
                counts["skipped"] += 1
                continue
            saved = parse(document, path)
        except BaselineError as error:
            print(f"not taken: {error}", file=sys.stderr)
            counts["not taken"] += 1
            continue
        folder = args.output / storage_name(saved.machine)
        if folder not in folders:
            folders[folder] = _fingerprints(folder)
        runs, fingerprint = folders[folder], _fingerprint(document)
        if fingerprint in runs:
            counts["present"] += 1
            continue
        try:
            runs[fingerprint] = _save(folder, saved, content)
        except BaselineError as error:
            print(error, file=sys.stderr)
            return ExitCode.REFUSED
        counts["added"] += 1
        print(f"{shown(path)} -> {shown(runs[fingerprint])}")
    skipped = f", {counts['skipped']} other JSON files skipped" if counts["skipped"] else ""
    print(
        f"merge: {counts['added']} added, {counts['present']} already present, {counts['not taken']} not taken, "
        f"{counted(len(folders), 'machine folder')}{skipped}"
    )
    if not counts["added"] + counts["present"]:
        print("merge: no saved run could be read", file=sys.stderr)
        return ExitCode.REFUSED
    return ExitCode.FAILED if counts["not taken"] else ExitCode.OK


def _save(folder: Path, saved: SavedRun, content: bytes) -> Path:
    """Save a run under the number and label of its file name if they are free; never under a name from its content."""
    numbered = NUMBERED.fullmatch(saved.path.name)
    label = saved.path.stem.partition("_")[2] if numbered else saved.path.stem
    return save_numbered(folder, label, content.decode("utf-8"), int(numbered[1]) if numbered else None)


def _fingerprints(folder: Path) -> dict[str, Path]:
    """The runs of a folder by fingerprint, without files that are no JSON."""
    runs = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(BaselineError):
            runs[_fingerprint(load(path))] = path
    return runs


def _fingerprint(document: object) -> str:
    """A hash that does not depend on the formatting of the JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
