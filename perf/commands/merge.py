"""`python -m perf merge`: the saved runs of many machines in one folder. Needs neither torch nor pytest.

A fleet's runs come from as many folders as it has machines. They are laid out as one storage, a folder per device and
stack, which `python -m perf report` and the choice of baselines read at any depth. Every run is validated first, and kept
byte for byte. Nothing in a file decides where it goes but the names of device and stack, as far as they can be in a name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import suppress
from pathlib import Path

from perf.analysis.verdicts import ExitCode
from perf.runs.baselines import NUMBERED
from perf.runs.saved_run import BaselineError, SavedRun, content_of, document_in, load, parse, shown
from perf.runs.storage import of_another_kind, save_numbered, saved_runs_in, storage_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `merge`."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="saved runs, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where they go; may exist")


def run(args: argparse.Namespace) -> int:
    """Join runs. Exit status: 0; 1 where some could not be read; 4 where none could, or the folder cannot be written.

    What cannot be read is named and stays where it is. What the folder has already is skipped, so that the same command
    can be given again; another run under a name that is taken gets the next number.
    """
    added = there = refused = passed_over = 0
    folders: dict[Path, dict[str, Path]] = {}
    try:
        for path in _named(args.runs):
            try:
                content = content_of(path)
                document = document_in(content, path)
                if path not in args.runs and of_another_kind(path, document):
                    passed_over += 1
                    continue
                saved = parse(document, path)
            except BaselineError as error:
                print(f"not taken: {error}", file=sys.stderr)
                refused += 1
                continue
            folder = args.output / storage_name(saved.machine)
            if folder not in folders:
                folders[folder] = _fingerprints(folder)
            known, fingerprint = folders[folder], _fingerprint(document)
            if fingerprint in known:
                there += 1
                continue
            known[fingerprint] = _save(folder, saved, content)
            added += 1
            print(f"{shown(path)} -> {shown(known[fingerprint])}")
    except BaselineError as error:
        print(error, file=sys.stderr)
        return ExitCode.REFUSED
    more = f", {passed_over} JSON files of another kind passed over" if passed_over else ""
    print(f"merge: {added} added, {there} there already, {refused} not taken, of {len(folders)} kinds of machine{more}")
    if not added + there:
        print("merge: no saved run could be read", file=sys.stderr)
        return ExitCode.REFUSED
    return ExitCode.FAILED if refused else ExitCode.OK


def _named(paths: list[Path]) -> list[Path]:
    """The files that were named, and those in the folders that were; each once."""
    return list(dict.fromkeys(one for path in paths for one in (saved_runs_in(path) if path.is_dir() else [path])))


def _save(folder: Path, saved: SavedRun, content: bytes) -> Path:
    """The run under its own number and label where that is free. The name is the file's, never one that stands in it."""
    numbered = NUMBERED.fullmatch(saved.path.name)
    label = saved.path.stem.partition("_")[2] if numbered else saved.path.stem
    return save_numbered(folder, label, content.decode("utf-8"), int(numbered[1]) if numbered else None)


def _fingerprints(folder: Path) -> dict[str, Path]:
    """What a folder holds already; a file of another kind is none of our affair, and is not overwritten."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        with suppress(BaselineError):
            found[_fingerprint(load(path))] = path
    return found


def _fingerprint(document: object) -> str:
    """Alike for documents that say the same, however they are written down."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
