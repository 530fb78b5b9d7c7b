"""Markdown for CI job summaries and pull-request comments: the verdict first, the table folded.

Standard library only: a job summary is also written where nothing could be installed.
"""

from __future__ import annotations

from collections.abc import Sequence

from perf.analysis import ranking
from perf.analysis.verdicts import Verdict
from perf.report import tables
from perf.report.charts import groups
from perf.report.results import Result, SavedSession, entry_of
from perf.report.text import interval_seconds, markdown, markdown_table

WORST_FIRST = (Verdict.INVALID, Verdict.SLOWER, Verdict.INCONCLUSIVE, Verdict.FASTER, Verdict.SAME)


def judged(session: SavedSession, results: Sequence[Result]) -> list[Result]:
    """The results of a session, the worst verdict first, then the larger change."""
    order = {verdict.value: place for place, verdict in enumerate(WORST_FIRST)}

    def key(result: Result):
        ratio = result.benchmark.decision.ratio if result.benchmark.decision else None
        return order.get(result.verdict or "", len(order)), -abs((ratio.estimate if ratio else 1.0) - 1)

    return sorted((result for result in results if result.session is session), key=key)


def headline(session: SavedSession, results: Sequence[Result]) -> str:
    """The verdicts of a session in one line."""
    if session.saved.invalid:
        return f"INVALID session: {session.saved.invalid}"
    verdicts = [result.verdict for result in results if result.session is session]
    counts = [(verdict.value, verdicts.count(verdict.value)) for verdict in WORST_FIRST]
    if not any(count for _, count in counts):
        return f"{len(verdicts)} configurations measured, none compared with a baseline"
    return ", ".join(f"{count} {name}" for name, count in counts if count) + f" of {len(verdicts)}"


def _verdict_table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        failure = result.benchmark.image_failure
        reason = f"wrong_image {failure}" if failure else result.reason
        time = interval_seconds(result.seconds_per_image, *result.interval)
        marks = ", ".join(mark for mark in result.marks if mark != "INVALID")
        rows.append([markdown(result.id), f"**{result.verdict}**", markdown(time), marks, markdown(reason)])
    return markdown_table(["configuration", "verdict", "per image [interval]", "marks", "reason"], rows, numeric_from=5)


def _result_tables(results: Sequence[Result]) -> list[str]:
    """One table for each work, since times of different work are not comparable; titled if there are several."""
    works = groups(results, lambda result: ranking.work_of(result.benchmark.configuration))
    parts = []
    for members in works.values():
        rows = [[markdown(cell) for cell in row] for row in tables.result_rows(members)]
        title = f"{markdown(members[0].work_name)}:\n\n" if len(works) > 1 else ""
        parts.append(title + markdown_table(list(tables.COLUMNS), rows, numeric_from=3))
    return parts


def fastest(results: Sequence[Result]) -> str | None:
    """The fastest configuration with a valid, exact image for each work, or that none is shown to be."""
    return "; ".join(ranking.fastest_lines(map(entry_of, results))) or None


def markdown_summary(sessions: Sequence[SavedSession], results: Sequence[Result], refused: Sequence[str] = ()) -> str:
    """The summary of the last session; other sessions are counted."""
    if not sessions:
        return "## perf: no saved run could be read\n\n" + "".join(f"- {markdown(line)}\n" for line in refused)
    last = max(sessions, key=lambda session: session.order)
    members = judged(last, results)
    alarming = [result for result in members if result.verdict in ("INVALID", "SLOWER")]
    others = [result for result in members if result.verdict and result not in alarming]
    line = fastest(members)
    facts = [("device", last.facts.get("name")), ("driver", last.facts.get("driver")), ("torch", last.torch)]
    facts += [("clock", last.facts.get("clock")), ("commit", last.commit), ("session", last.name)]
    folded = ([_verdict_table(others)] if others else []) + _result_tables(members)
    parts = [
        f"## perf: {markdown(headline(last, results))}\n",
        f"**Synthetic**: {markdown(last.synthetic)}\n" if last.synthetic else "",
        _verdict_table(alarming) if alarming else "",
        f"**drifted**: {markdown(last.saved.drifted)}: absolute times are approximate.\n" if last.saved.drifted else "",
        f"Partial run ({markdown(last.saved.partial)}): never a baseline by itself.\n" if last.saved.partial else "",
        *(
            f"- {markdown(result.id)}: {markdown(str(result.counts))}\n"
            for result in members
            if result.counts and result.counts.changes
        ),
        markdown(line[0].upper() + line[1:]) + ".\n" if line else "",
        ", ".join(f"{name} {markdown(str(value))}" for name, value in facts if value is not None) + "\n",
        f"<details><summary>All {len(members)} configurations</summary>\n\n" + "\n".join(folded) + "\n</details>\n",
        f"{len(sessions) - 1} older or other sessions stand in the report.\n" if len(sessions) > 1 else "",
        *(f"- not read: {markdown(line)}\n" for line in refused),
    ]
    return "\n".join(filter(None, parts))


def markdown_of(report) -> str:
    """The summary of a build.Report."""
    return markdown_summary(report.sessions, report.results, report.refused)
