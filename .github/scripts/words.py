"""Outcomes as Markdown, for the job's summary and for a comment. Texts of others are escaped: they are data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import house  # noqa: F401 (puts perf on the path)
from outcomes import INCONCLUSIVE, NOT_SLOWER, RUN, SLOWER, UNMEASURED, WORST_FIRST, Outcome

from perf.report.results import read_session
from perf.report.summary import markdown_summary
from perf.report.text import markdown, markdown_table
from perf.runs.saved_run import BaselineError

LIMIT = 60_000  # GitHub takes 65,536 characters
TITLES = {
    UNMEASURED: "could not measure - this says nothing about the speed of the change",
    SLOWER: "SLOWER",
    INCONCLUSIVE: "INCONCLUSIVE - neither slower nor the same for certain",
    NOT_SLOWER: "not slower",
}


def text(found: Sequence[tuple[Outcome, Path | None]]) -> str:
    """The worst first: a line that says how it is, a table of all, then the verdicts of each. With each outcome its run."""
    if not found:
        return f"# perf: {TITLES[UNMEASURED]}\n\nNothing was measured.\n"
    ranked = sorted(found, key=lambda one: WORST_FIRST.index(one[0].kind))
    parts = [f"# perf: {TITLES[ranked[0][0].kind]}\n"]
    rows = [[markdown(one.label), markdown(one.series), f"**{one.kind}**", _why(one)] for one, _ in ranked]
    parts.append(markdown_table(["machine", "set", "outcome", "why"], rows, numeric_from=4))
    commits = list(
        dict.fromkeys(one.sha[:12] + (f" against {one.against[:12]}" if one.against else "") for one, _ in ranked)
    )
    parts.append(f"Commit {', '.join(commits)}.\n")
    for one, run in ranked:
        if run is not None:
            parts.append(f"## {markdown(one.label)}, {markdown(one.series)}\n")
            parts.append(_of_run(run))
    whole = "\n".join(parts)
    return whole if len(whole) <= LIMIT else _cut(whole)


def _why(one: Outcome) -> str:
    words = list(one.reasons)
    words += [f"missing: {', '.join(one.missing)}"] if one.missing else []
    words += [f"new: {', '.join(one.new)}"] if one.new else []
    return markdown("; ".join(words)[:500])


def _of_run(run: Path) -> str:
    try:
        session, results = read_session(run)
    except BaselineError as error:
        return markdown(str(error).rpartition("/")[2]) + "\n"
    return markdown_summary([session], results).replace("## perf: ", "", 1)


def _cut(whole: str) -> str:
    kept = whole[:LIMIT].rpartition("\n")[0]
    closing = "\n</details>\n" * (kept.count("<details>") - kept.count("</details>"))
    return f"{kept}\n{closing}\nThe rest is in the report.\n"


def runs_of(folder: Path, one: Outcome) -> Path | None:
    """The run beside an outcome, where it has one that can be read."""
    return folder / RUN if one.has_run else None
