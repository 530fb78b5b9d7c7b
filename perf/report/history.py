"""Against what there was before: each session's ratios with their verdicts, and the trend over stored sessions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from perf.report.charts import Chart, Point, Series, bar_each, groups, short_id, unit
from perf.report.results import Result, newest
from perf.report.text import words_name

WATCHED = (
    ("GPU", lambda one: one.session.facts.get("uuid") or one.session.facts.get("name")),
    ("driver", lambda one: one.session.facts.get("driver")),
    ("torch", lambda one: one.session.torch),
    ("CUDA", lambda one: one.session.facts.get("cuda")),
    ("commit", lambda one: one.session.commit),
)
FEWEST = 2


def history_charts(results: Sequence[Result]) -> list[Chart]:
    """One chart a kind of device, work and batch that has at least two sessions with a known time."""
    charts = []
    known = [one for one in results if one.session.started]
    for members in groups(known, lambda one: (one.session.machine, one.work, one.batch)).values():
        members = sorted(members, key=lambda one: (one.session.started, one.session.name))
        if len({one.session.started for one in members}) < FEWEST:
            continue
        first = members[0]
        series = [
            Series(technique, technique, tuple(map(_point, ones)))
            for technique, ones in groups(members, lambda one: one.technique).items()
        ]
        sessions = len({one.session.started for one in members})
        charts.append(
            Chart(
                name=words_name("history", first.session.machine, first.work_name, f"batch_{first.batch}"),
                section="History",
                title=f"{first.session.machine}: {first.work_name}, batch {first.batch}, {sessions} sessions",
                summary=f"Seconds per image of {len(series)} configurations over {sessions} sessions, with verdicts.",
                x_label="start of the session, UTC",
                y_label=f"{unit(members)} per image",
                series=tuple(series),
                scale="time",
                zero=False,
                marks=changes(members),
            )
        )
    return charts


def comparison_charts(results: Sequence[Result]) -> list[Chart]:
    """By how much each configuration differs from what it was compared with: another commit, itself, stored sessions.

    Each configuration's last one, in a chart a session and reference, with the margin's bounds; ratios without an
    interval are left out.
    """
    charts = []
    compared = [one for one in results if one.benchmark.decision and one.benchmark.decision.ratio]
    compared = newest(one for one in compared if one.benchmark.decision.ratio.bounded)

    def key(one: Result) -> tuple:
        return one.session.identity, one.session.name, one.benchmark.decision.against, one.benchmark.decision.margin

    for (_, name, against, margin), members in groups(compared, key).items():
        first = members[0]
        label = short_id if len({one.model for one in members}) == 1 else (lambda one: one.id)
        points = [_change(one, label(one)) for one in members]
        against = against or "its baseline"
        bounds = ((f"margin {percent:+.1f} %", percent) for percent in (100 * margin, -100 * margin)) if margin else ()
        charts.append(
            Chart(
                name=words_name("comparison", first.session.machine, name, f"against_{against}"),
                section="Comparisons",
                title=f"{first.session.machine}, {name}: against {against}",
                summary=f"Change in time of {len(members)} configurations against {against}, with 95 % intervals.",
                x_label="configuration",
                y_label="change in time, %",
                series=bar_each(zip(members, points)),
                zero=False,
                levels=tuple(bounds),
            )
        )
    return charts


def _change(one: Result, label: str) -> Point:
    """Percent by which it takes more time than what it was compared with."""
    decision = one.benchmark.decision
    ratio = decision.ratio
    change, low, high = (100 * (bound - 1) for bound in (ratio.estimate, ratio.low, ratio.high))
    return Point(label, change, low, high, one.facets, str(decision), verdict=one.verdict)


def _point(one: Result) -> Point:
    low, high = one.interval
    decision = one.benchmark.decision
    words = f"{one.id}, {one.session.name}, torch {one.session.torch}, commit {short(one.session.commit)}, {one.interval_name}"
    if one.benchmark.image_failure:
        words += f"; INVALID (wrong_image {one.benchmark.image_failure})"
    elif decision:
        words += f"; {decision}"
    return Point(one.session.started, one.seconds_per_image, low, high, one.facets, words, verdict=one.verdict)


def short(value: object) -> str:
    """A commit as git shortens it."""
    text = str(value or "unknown")
    return text[:10] if len(text) == 40 else text


def changes(members: Sequence[Result]) -> tuple[tuple[float, str], ...]:
    """(seconds, what changed) between neighbouring sessions, half-way between them. `members` are sorted by time."""
    found = []
    sessions = list({id(one.session): one for one in members}.values())
    for before, after in itertools.pairwise(sessions):
        words = [
            f"{name} {short(value(after))}" for name, value in WATCHED if value(before) != value(after) and value(after)
        ]
        if words:
            found.append(((before.session.started + after.session.started) / 2, ", ".join(words)))
    return tuple(found)
