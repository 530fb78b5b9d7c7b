"""Charts over sessions: the ratios of each session with their verdicts, and the trend of stored sessions."""

from __future__ import annotations

from collections.abc import Sequence

from perf.report.charts import Chart, Point, Series, bar_each, groups, short_id, stamp, unit
from perf.report.palette import STACKS
from perf.report.results import Result, newest
from perf.report.text import joined_name
from perf.runs import history as stored
from perf.runs.history import ChangePoint


def history_charts(results: Sequence[Result], points: Sequence[ChangePoint] = ()) -> list[Chart]:
    """One chart for each configuration and machine with at least two sessions of known time; a line for each stack."""
    charts = []
    dated = sorted((result for result in results if result.session.started), key=lambda result: result.session.order)
    for members in groups(dated, lambda result: (result.session.device, result.work, result.batch, result.id)).values():
        first, sessions = members[0], len({result.session.started for result in members})
        if sessions < 2:
            continue
        stacks = groups(members, lambda result: (result.session.identity, result.torch))
        charts.append(
            Chart(
                name=joined_name("history", first.session.machine, first.work_name, first.id),
                section="History",
                title=f"{first.id} on {first.session.machine}, {sessions} sessions",
                summary=f"Seconds per image over {sessions} sessions of {len(stacks)} software stacks, with verdicts.",
                x_label="start of the session, UTC",
                y_label=f"{unit(members)} per image",
                series=tuple(
                    Series(_stack_name(stack), f"stack {number % len(STACKS)}", tuple(map(_point, stack)))
                    for number, stack in enumerate(stacks.values())
                ),
                scale="time",
                zero=False,
                marks=_marks(members, points),
                filled=True,
            )
        )
    return charts


def _stack_name(members: Sequence[Result]) -> str:
    """The versions that may change within a history."""
    facts = members[0].session.facts
    names = {"driver": "driver", "cuda": "CUDA"}
    return ", ".join(
        [f"torch {members[0].torch}", *(f"{name} {facts[key]}" for key, name in names.items() if facts.get(key))]
    )


def _marks(members: Sequence[Result], points: Sequence[ChangePoint]) -> tuple[tuple[float, str], ...]:
    """(Unix seconds, change) half-way before each change point of the configuration on this machine."""
    runs = {id(result.session.saved) for result in members}
    marks = []
    for point in points:
        before, after = (point.series.runs[index] for index in (point.index - 1, point.index))
        if point.series.id == members[0].id and id(after) in runs:
            middle = ((before.started_unix_seconds or 0.0) + (after.started_unix_seconds or 0.0)) / 2
            marks.append((middle, f"{100 * (point.ratio - 1):+.1f} %"))
    return tuple(sorted(marks))


def change_points(results: Sequence[Result]) -> list[ChangePoint]:
    """The change points of all configurations; none without `ruptures`.

    Sessions of hosted runners and runs that cannot be trusted are no points of a history (perf.runs.history).
    """
    if not stored.is_available():
        return []
    runs = {id(result.session.saved): result.session.saved for result in results}
    return [change for series in stored.series_of(runs.values()) for change in stored.find_changes(series)]


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
                title=f"{machine}, {name}{stamp(members)}: against {against}",
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
    commit = (session.commit or "unknown")[:10]
    parts = [
        f"{session.name}, torch {session.torch}, commit {commit}, {result.interval_name}",
        session.stamp,
        result.reason,
    ]
    verdict = (
        None if result.verdict == "SAME" else result.verdict
    )  # most sessions are: their rings would hide the others
    note = "; ".join(filter(None, parts))
    return Point(session.started, result.seconds_per_image, *result.interval, result.facets, note, verdict=verdict)
