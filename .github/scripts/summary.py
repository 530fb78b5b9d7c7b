"""Outcomes as Markdown, for a comment and for the summary page of a job. Foreign text is escaped.

As a script it adds the outcomes of this machine to the summary page. It runs on a machine where any earlier step may have failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from outcomes import FILE, INCONCLUSIVE, NOT_SLOWER, RUN, SLOWER, UNMEASURED, WORST_FIRST, Outcome, load
from workflow import Refusal, add_to_summary, main, out_folder

from perf.report.results import read_session
from perf.report.summary import markdown_summary
from perf.report.text import markdown, markdown_table
from perf.runs.saved_run import BaselineError

LIMIT = 60_000  # characters; GitHub's limit is 65,536
TITLES = {
    UNMEASURED: "could not measure - no result for the speed of the change",
    SLOWER: "SLOWER",
    INCONCLUSIVE: "INCONCLUSIVE - a change is neither shown nor excluded",
    NOT_SLOWER: "not slower",
}


def text(outcomes: Sequence[tuple[Outcome, Path | None]]) -> str:
    """Return a title with the worst status, a table of all outcomes, and the verdicts of each run, the worst first."""
    if not outcomes:
        return f"# perf: {TITLES[UNMEASURED]}\n\nNothing was measured.\n"
    ranked = sorted(outcomes, key=lambda pair: WORST_FIRST.index(pair[0].status))
    parts = [f"# perf: {TITLES[ranked[0][0].status]}\n"]
    rows = [[markdown(it.label), markdown(it.series), f"**{it.status}**", _reasons(it)] for it, _ in ranked]
    parts.append(markdown_table(["machine", "set", "outcome", "reason"], rows, numeric_from=4))
    commits = [it.sha[:12] + (f" against {it.against[:12]}" if it.against else "") for it, _ in ranked]
    parts.append(f"Commit {', '.join(dict.fromkeys(commits))}.\n")
    for outcome, run in ranked:
        if run is not None:
            parts += [f"## {markdown(outcome.label)}, {markdown(outcome.series)}\n", _verdicts(run)]
    whole = "\n".join(parts)
    if len(whole) <= LIMIT:
        return whole
    cut = whole[:LIMIT].rpartition("\n")[0]
    closing = "\n</details>\n" * (cut.count("<details>") - cut.count("</details>"))
    return f"{cut}\n{closing}\nThe rest is in the report.\n"


def _reasons(outcome: Outcome) -> str:
    lists = {"missing": outcome.missing, "new": outcome.new}
    named = [f"{name}: {', '.join(ids)}" for name, ids in lists.items() if ids]
    return markdown("; ".join([*outcome.reasons, *named])[:500])


def _verdicts(run: Path) -> str:
    try:
        session, results = read_session(run)
    except BaselineError as error:
        return markdown(str(error).rpartition("/")[2]) + "\n"
    return markdown_summary([session], results).replace("## perf: ", "", 1)


def run() -> int:
    """Write the summary page. Always return 0: the measuring step has already failed where necessary."""
    outcomes = []
    for path in sorted(out_folder().glob(f"*/{FILE}")):
        try:
            outcome = load(path.parent)
        except Refusal as refusal:
            add_to_summary(f"not read: {markdown(str(refusal))}")
        else:
            outcomes.append((outcome, path.parent / RUN if outcome.has_run else None))
    page = text(outcomes)
    add_to_summary(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(run))
