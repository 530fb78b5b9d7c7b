"""Collect the outcomes of all machines, render one report of them and of the stored sessions, and write the comment.

ARTIFACTS has a folder per machine, `LABEL/SERIES/{outcome.json,run.json}`, all of it untrusted data: labels are looked up in
the fleet, and runs are validated by perf.runs.saved_run. EXPECTED is a JSON list of the labels that were measured; a label
without an outcome is reported as missing. All files are written under PUBLISH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from outcomes import RUN, Outcome, check, collect, exit_code
from summary import text
from workflow import ROOT, Refusal, add_to_summary, fleet, main, output, setting

from perf.analysis.verdicts import ExitCode
from perf.runs.saved_run import load
from perf.runs.storage import write_atomically


def gather(artifacts: Path, baselines: Path, runs: Path) -> list[tuple[Outcome, Path | None]]:
    """Return the outcomes of all machines, each with a copy of its run, None for a run that is absent or invalid.

    Every outcome is judged again by the rules of main, because it was written where the reviewed code ran.
    """
    gathered = []
    for outcome, folder in collect(artifacts, setting("SHA")):
        path = None
        if folder is not None:
            stored = None if outcome.against else baselines / outcome.label / outcome.series
            outcome = check(outcome, folder, stored)
        if folder is not None and outcome.has_run:
            path = runs / outcome.label / outcome.series / f"{outcome.sha[:12]}.json"
            write_atomically(path, json.dumps(load(folder / RUN)))
        gathered.append((outcome, path))
    return gathered


def expected_labels() -> list[str]:
    """Return the labels that were measured. Raises Refusal for a label outside the fleet."""
    try:
        labels = json.loads(setting("EXPECTED", "[]"))
    except ValueError:
        labels = None
    if not isinstance(labels, list) or not all(label in fleet() for label in labels):
        raise Refusal("EXPECTED is no list of labels of the fleet")
    return labels


def report(runs: Path, baselines: Path, folder: Path) -> bool:
    """Render one page of new and stored runs. Return False where there is none. Raises Refusal where rendering fails."""
    merged = runs.parent / "merged"  # a promoted session is in both folders, and merge keeps it once

    def perf(*arguments: object) -> int:
        return subprocess.run([sys.executable, "-m", "perf", *map(str, arguments)], cwd=ROOT, check=False).returncode

    if perf("merge", runs, baselines, "--output", merged) == ExitCode.REFUSED:
        return False
    if code := perf("report", merged, "--output", folder):
        raise Refusal(f"the report could not be rendered ({code})")
    return True


def run() -> int:
    """Write report/, comment.md and the outputs `page` and `exit_code`. The summary page has the text of the comment."""
    artifacts, baselines = Path(setting("ARTIFACTS", "artifacts")), Path(setting("BASELINES", "baselines")).absolute()
    folder = Path(setting("PUBLISH", "publish")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    gathered = gather(artifacts, baselines, folder / "runs")
    missing = sorted({*expected_labels()} - {outcome.label for outcome, _ in gathered})
    for label in missing:
        gathered.append((Outcome(label, "-", setting("SHA"), ExitCode.FAILED, ("no artifact",)), None))
    comment = text(gathered) if gathered else "# perf\n\nThe report of the stored sessions was rendered again.\n"
    (folder / "comment.md").write_text(comment, encoding="utf-8")
    add_to_summary(comment)
    output("page", "true" if report(folder / "runs", baselines, folder / "report") else "false")
    output("exit_code", str(int(exit_code(outcome for outcome, _ in gathered))) if gathered else "0")
    return 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main(run))
