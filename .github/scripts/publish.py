"""Gather what all machines left, render one report of it and of the stored sessions, and write the comment.

ARTIFACTS has a folder a machine, `perf-LABEL/SERIES/{outcome.json,run.json}`, all of it data that others wrote: names are looked
up in the fleet, runs are read by perf.runs.saved_run, and nothing is taken over that does not pass. EXPECTED is a JSON list of
the labels that should have answered: a machine that did not is said to be missing. Everything is written under PUBLISH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import outcomes
import words
from house import NAME, ROOT, Refusal, annotate, fleet, given, main, output, summary
from outcomes import FILE, RUN, Outcome

from perf.analysis.verdicts import ExitCode
from perf.runs.saved_run import BaselineError, SavedRun, load, read
from perf.runs.storage import write_atomically


def gather(artifacts: Path, baselines: Path, runs: Path) -> list[tuple[Outcome, Path | None]]:
    """Each machine's outcomes with their runs, copied to names that are ours. Folders of no machine of the fleet are left."""
    known, found = fleet(), []
    for folder in sorted(artifacts.glob("*/*")):
        label, series = folder.parent.name.partition("-")[2], folder.name
        if label not in known or not NAME.fullmatch(series) or folder.is_symlink() or not (folder / FILE).exists():
            continue
        try:
            one = outcomes.load(folder)
            if (one.label, one.series) != (label, series):
                raise Refusal(f"{FILE}: is of {one.label} {one.series}")
        except Refusal as refusal:
            found.append((_unmeasured(label, series, f"what it left cannot be used: {refusal}"), None))
            continue
        # Judged once more here, by main's own rules: the outcome was written where the reviewed code ran.
        one = outcomes.examine(one, folder, baselines / label / series if one.against is None else None)
        path = None
        if one.has_run:
            path = runs / label / series / f"{one.sha[:12]}.json"
            write_atomically(path, json.dumps(load(folder / RUN)))
        found.append((one, path))
    return found


def _unmeasured(label: str, series: str, reason: str) -> Outcome:
    return Outcome(label, series, given("SHA"), ExitCode.FAILED, reasons=(reason,))


def silent(found: list[tuple[Outcome, Path | None]], expected: list[str]) -> list[tuple[Outcome, None]]:
    """An outcome for every machine that left nothing."""
    heard = {one.label for one, _ in found}
    return [(_unmeasured(label, "-", "it left nothing"), None) for label in expected if label not in heard]


def expected_labels() -> list[str]:
    """The labels that should have answered. Raises Refusal."""
    try:
        labels = json.loads(given("EXPECTED", "[]"))
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(label in fleet() for label in labels):
        raise Refusal("EXPECTED is no list of labels of the fleet")
    return labels


def report(runs: list[Path], baselines: Path, folder: Path) -> bool:
    """Render one page of them and of what is stored. False where there is nothing to show."""
    stored = {path: saved for path in sorted(baselines.rglob("[0-9]*_*.json")) if (saved := _stored(path))}
    known = [(saved.started_unix_seconds, saved.machine) for saved in stored.values()]
    # One that has been promoted since would stand in the report twice.
    fresh = [path for path in runs if ((mine := read(path)).started_unix_seconds, mine.machine) not in known]
    if not stored and not fresh:
        return False
    command = [sys.executable, "-m", "perf", "report", *map(str, [*fresh, *stored]), "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise Refusal(f"the report could not be rendered ({done.returncode})")
    return True


def _stored(path: Path) -> SavedRun | None:
    try:
        return None if path.is_symlink() else read(path)
    except BaselineError as error:
        annotate("warning", f"not in the report: {path.name}: {error}")
        return None


def run() -> int:
    """Write report/, comment.md and the outputs `page` and `exit_code`; the summary has the comment's text."""
    artifacts, baselines = Path(given("ARTIFACTS", "artifacts")), Path(given("BASELINES", "baselines")).absolute()
    folder = Path(given("PUBLISH", "publish")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = gather(artifacts, baselines, folder / "runs")
    found += silent(found, expected_labels())
    text = words.text(found) if found else "# perf\n\nThe report of the stored sessions was rendered anew.\n"
    (folder / "comment.md").write_text(text, encoding="utf-8")
    summary(text)
    page = report([path for _, path in found if path is not None], baselines, folder / "report")
    output("page", "true" if page else "false")
    output("exit_code", str(int(outcomes.exit_code([one for one, _ in found]))) if found else "0")
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(run))
