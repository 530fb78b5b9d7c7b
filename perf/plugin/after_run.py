"""`pytest perf --perf-report DIR`: the report of the run that has just ended, with the stored sessions for its history."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from perf.runs.saved_run import BaselineError
from perf.runs.storage import saved_runs_in, write_atomically


def write(
    document: dict | None, folder: Path, storage: Path | None, traces: Path | None, say: Callable[[str], None]
) -> None:
    """Write run.json and its report into a folder. What prevents it is said: a report is no reason for a run to fail.

    document: the run as it is saved, None where nothing was measured. storage: the folder of stored sessions, if any. traces: of
    `--perf-trace`, whose pictures are shown.
    """
    if document is None:
        say("perf: no report: nothing was measured")
        return
    missing = [name for name in ("matplotlib", "plotly") if importlib.util.find_spec(name) is None]
    try:
        run = folder / "run.json"
        write_atomically(run, document)
        if missing:
            say(f'perf: {run} is written, but no report: pip install "sd-perf[report]" brings {" and ".join(missing)}')
            return
        from perf.report import build

        stored = [path for path in saved_runs_in(storage) if path.resolve() != run.resolve()] if storage else []
        started = document.get("perf", {}).get("started_unix_seconds")
        report = build.gather(
            [run, *_others(stored, started)], pictures_folder=traces / "pictures" if traces else None, say=say
        )
        written = build.write(report, folder, say=say)
    except (BaselineError, OSError, ValueError) as error:
        say(f"perf: no report: {error}")
        return
    say(f"perf: report of {len(report.sessions)} session(s): {written[0]}")


def _others(paths: list[Path], started: float | None) -> list[Path]:
    """Stored sessions but for this one, which may have been saved a moment ago; damaged ones are left out."""
    from perf.runs.saved_run import read

    found = []
    for path in paths:
        try:
            if read(path).started_unix_seconds != started:
                found.append(path)
        except BaselineError:
            continue
    return found
