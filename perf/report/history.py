"""Charts over sessions: the ratios of each session with their verdicts, and the trend of stored sessions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from perf.report.charts import Chart, Point, bar_each, by_technique, groups, short_id, unit
from perf.report.results import Result, newest
from perf.report.text import joined_name
from perf.runs import history as stored

WATCHED = (
    ("GPU", lambda session: session.facts.get("uuid") or session.facts.get("name")),
    ("driver", lambda session: session.facts.get("driver")),
    ("torch", lambda session: session.torch),
    ("CUDA", lambda session: session.facts.get("cuda")),
    ("commit", lambda session: session.commit),
)


def history_charts(results: Sequence[Result]) -> list[Chart]:
    """One chart per device, work and batch with at least two sessions of known time."""
    charts = []
    dated = sorted((result for result in results if result.session.started), key=lambda result: result.session.order)
    for members in groups(dated, lambda result: (result.session.machine, result.work, result.batch)).values():
        first, sessions = members[0], len({result.session.started for result in members})
        if sessions < 2:
            continue
        series = by_technique(members, _point)
        charts.append(
            Chart(
                name=joined_name("history", first.session.machine, first.work_name, f"batch_{first.batch}"),
                section="History",
                title=f"{first.session.machine}: {first.work_name}, batch {first.batch}, {sessions} sessions",
                summary=f"Seconds per image of {len(series)} configurations over {sessions} sessions, with verdicts.",
                x_label="start of the session, UTC",
                y_label=f"{unit(members)} per image",
                series=series,
                scale="time",
                zero=False,
                marks=tuple(sorted((*changes(members), *change_points(members)))),
            )
        )
    return charts


def comparison_charts(results: Sequence[Result]) -> list[Chart]:
    """Change of each configuration against its reference: another commit, itself, or stored sessions.

    One chart per session and reference, with the last result of each configuration; ratios without an interval are left out.
    """
    charts = []
    compared = [result for result in results if result.benchmark.decision and result.benchmark.decision.ratio]
    compared = newest(result for result in compared if result.benchmark.decision.ratio.bounded)

    def key(result: Result) -> tuple:
        return (
            result.session.identity,
            result.session.name,
            result.benchmark.decision.against,
            result.benchmark.decision.margin,
        )

    for (_, name, against, margin), members in groups(compared, key).items():
        machine, against = members[0].session.machine, against or "its baseline"
        same_model = len({result.model for result in members}) == 1
        points = [_change(result, short_id(result) if same_model else result.id) for result in members]
        percents = (100 * margin, -100 * margin) if margin else ()
        charts.append(
            Chart(
                name=joined_name("comparison", machine, name, f"against_{against}"),
                section="Comparisons",
                title=f"{machine}, {name}: against {against}",
                summary=f"Change in time of {len(members)} configurations against {against}, with 95 % intervals.",
                y_label="change in time, %",
                series=bar_each(zip(members, points)),
                zero=False,
                levels=tuple((f"margin {percent:+.1f} %", percent) for percent in percents),
            )
        )
    return charts


def _change(result: Result, label: str) -> Point:
    """Change in time in percent."""
    decision = result.benchmark.decision
    bounds = (100 * (ratio - 1) for ratio in (decision.ratio.estimate, decision.ratio.low, decision.ratio.high))
    return Point(label, *bounds, result.facets, str(decision), verdict=result.verdict)


def _point(result: Result) -> Point:
    session = result.session
    note = (
        f"{result.id}, {session.name}, torch {session.torch}, commit {_short(session.commit)}, {result.interval_name}"
    )
    note += f"; {result.reason}" if result.reason else ""
    return Point(
        session.started, result.seconds_per_image, *result.interval, result.facets, note, verdict=result.verdict
    )


def _short(value: object) -> str:
    """A commit as git abbreviates it; other values unchanged."""
    text = str(value or "unknown")
    return text[:10] if len(text) == 40 else text


def change_points(members: Sequence[Result]) -> list[tuple[float, str]]:
    """(Unix seconds, change) half-way before each change point of a configuration; none without `ruptures`.

    Sessions of hosted runners and runs that cannot be trusted are no points of a history (perf.runs.history).
    """
    if not stored.is_available():
        return []
    starts = {result.session.started for result in members}
    marks = []
    for series in stored.series_of(result.session.saved for result in members):
        if series.id not in {result.id for result in members}:
            continue
        times = [run.started_unix_seconds or 0.0 for run in series.runs]
        for change in stored.find_changes(series) if starts.issuperset(times) else ():
            text = f"{series.id} {100 * (change.ratio - 1):+.1f} %, {change.commits}"
            marks.append(((times[change.index - 1] + times[change.index]) / 2, text))
    return marks


def changes(members: Sequence[Result]) -> tuple[tuple[float, str], ...]:
    """(Unix seconds, changed values) half-way between neighbouring sessions. `members` are sorted by time."""
    marks = []
    sessions = list({id(result.session): result.session for result in members}.values())
    for before, after in itertools.pairwise(sessions):
        changed = [
            f"{name} {_short(value(after))}"
            for name, value in WATCHED
            if value(before) != value(after) and value(after)
        ]
        if changed:
            marks.append(((before.started + after.started) / 2, ", ".join(changed)))
    return tuple(marks)
