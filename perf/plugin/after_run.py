"""`pytest perf --perf-report DIR`: write the report of the finished run, with the stored sessions as its history."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from perf.report import build
from perf.report.text import counted
from perf.runs.saved_run import BaselineError, read
from perf.runs.storage import saved_runs_in, write_atomically


def write(
    document: dict | None, folder: Path, storage: Path | None, traces: Path | None, say: Callable[[str], None]
) -> None:
    """Write run.json and its report into a folder. An error is printed and does not fail the run.

    document: the run as it is saved, None if nothing was measured. storage: the folder of stored sessions. traces: the folder
    of `--perf-trace`, whose images are shown.
    """
    if document is None:
        say("perf: no report: nothing was measured")
        return
    run, missing = folder / "run.json", build.missing_packages()
    try:
        write_atomically(run, document)
        if missing:
            say(f'perf: {run} is written, but no report: pip install "sd-perf[report]" brings {" and ".join(missing)}')
            return
        started = document.get("perf", {}).get("started_unix_seconds")
        stored = [path for path in saved_runs_in(storage) if path.resolve() != run.resolve()] if storage else []
        report = build.gather(
            [run, *_other_sessions(stored, started)],
            images_folder=traces / "pictures" if traces else None,
            repository=build.workflow_repository(os.environ),
            say=say,
        )
        written = build.write(report, folder, say=say)
    except (BaselineError, OSError, ValueError) as error:
        say(f"perf: no report: {error}")
        return
    say(f"perf: report of {counted(len(report.sessions), 'session')}: {written[0]}")


def _other_sessions(paths: list[Path], started: float | None) -> list[Path]:
    """Readable stored sessions other than the current one, which may have just been saved."""
    others = []
    for path in paths:
        try:
            if read(path).started_unix_seconds != started:
                others.append(path)
        except BaselineError:
            continue
    return others
