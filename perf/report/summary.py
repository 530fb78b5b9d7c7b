"""The Markdown of a CI job summary or a pull-request comment: the verdict first, the table folded."""

from __future__ import annotations

from collections.abc import Sequence

from perf.analysis.ranking import fastest_line
from perf.analysis.verdicts import Verdict
from perf.report import tables
from perf.report.results import Result, Session, ranked
from perf.report.text import markdown, markdown_table, span

WORST_FIRST = (Verdict.INVALID, Verdict.SLOWER, Verdict.INCONCLUSIVE, Verdict.FASTER, Verdict.SAME)


def judged(session: Session, results: Sequence[Result]) -> list[Result]:
    """The results of a session, the most alarming first, and the larger change first among equals."""
    order = {verdict.value: place for place, verdict in enumerate(WORST_FIRST)}
    mine = [one for one in results if one.session is session]

    def key(one: Result):
        ratio = one.benchmark.decision.ratio if one.benchmark.decision else None
        return order.get(one.verdict or "", len(order)), -abs((ratio.estimate if ratio else 1.0) - 1)

    return sorted(mine, key=key)


def headline(session: Session, results: Sequence[Result]) -> str:
    """One line that says how it is, of the last session."""
    found = [one.verdict for one in results if one.session is session]
    if session.saved.invalid:
        return f"INVALID session: {session.saved.invalid}"
    counts = [(verdict.value, found.count(verdict.value)) for verdict in WORST_FIRST]
    words = ", ".join(f"{count} {name}" for name, count in counts if count)
    if not words:
        return f"{len(found)} configurations measured, none compared with a baseline"
    return f"{words} of {len(found)}"


def markdown_of_verdicts(ones: Sequence[Result]) -> str:
    """A table of verdicts with their reasons."""
    rows = []
    for one in ones:
        decision = one.benchmark.decision
        reason = f"wrong_image {one.benchmark.image_failure}" if one.benchmark.image_failure else str(decision or "")
        rows.append(
            [
                markdown(one.id),
                f"**{one.verdict}**",
                markdown(span(one.seconds_per_image, *one.interval)),
                markdown(reason),
            ]
        )
    return markdown_table(["configuration", "verdict", "per image [interval]", "why"], rows, numeric_from=4)


def fastest(results: Sequence[Result]) -> str | None:
    """The last line of every summary: the fastest valid configuration that makes the exact picture."""
    there = [one for one in ranked(results) if one.benchmark.image_failure is None and not one.approximate]
    if not there:
        return None
    best = there[0]
    time = span(best.seconds_per_image, *best.interval)
    return fastest_line(best.id, time, best.speedup, best.speedup_against or "original")


def markdown_summary(sessions: Sequence[Session], results: Sequence[Result], refused: Sequence[str] = ()) -> str:
    """The whole text, of the last session; the others are counted."""
    if not sessions:
        return "## perf: no saved run could be read\n\n" + "".join(f"- {markdown(line)}\n" for line in refused)
    last = max(sessions, key=lambda one: (one.started, one.name))
    ones = judged(last, results)
    parts = [f"## perf: {markdown(headline(last, results))}\n"]
    if last.synthetic:
        parts.append(f"**Synthetic**: {markdown(last.synthetic)}\n")
    alarming = [one for one in ones if one.verdict in ("INVALID", "SLOWER")]
    if alarming:
        parts.append(markdown_of_verdicts(alarming))
    others = [one for one in ones if one.verdict and one not in alarming]
    if last.saved.partial:
        parts.append(f"Partial run ({markdown(last.saved.partial)}): never a baseline by itself.\n")
    line = fastest(ones)
    if line:
        parts.append(markdown(line[0].upper() + line[1:]) + ".\n")
    facts = [("device", last.facts.get("name")), ("driver", last.facts.get("driver")), ("torch", last.torch)]
    facts += [("clock", last.facts.get("clock")), ("commit", last.commit), ("session", last.name)]
    parts.append(", ".join(f"{name} {markdown(str(value))}" for name, value in facts if value is not None) + "\n")
    rows = [[markdown(cell) for cell in row] for row in tables.result_rows(ones)]
    inner = [markdown_table(list(tables.COLUMNS), rows, numeric_from=3)]
    if others:
        inner.insert(0, markdown_of_verdicts(others))
    title = f"All {len(ones)} configurations"
    parts.append(f"<details><summary>{title}</summary>\n\n" + "\n".join(inner) + "\n</details>\n")
    if len(sessions) > 1:
        parts.append(f"{len(sessions) - 1} older or other sessions stand in the report.\n")
    parts += [f"- not read: {markdown(line)}\n" for line in refused]
    return "\n".join(parts)


def markdown_of(report) -> str:
    """The summary of a report (perf.report.build.Report)."""
    return markdown_summary(report.sessions, report.results, report.refused)
