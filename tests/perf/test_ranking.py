"""The order of results, and the line about the fastest one."""

from __future__ import annotations

import math
import random

from perf.analysis.ranking import Entry, fastest_lines, paired, ranked, sort_by_seconds, work_of
from perf.analysis.statistics import Interval


def entry(id: str, seconds: float, noise: float = 0.0, **changes) -> Entry:
    """An entry with 4 launches of 8 rounds; all entries share a wander of 20 %, as rounds that alternate do."""
    shared, own = random.Random(1), random.Random(id)
    rounds = [[seconds * math.exp(shared.gauss(0, 0.2) + own.gauss(0, noise)) for _ in range(8)] for _ in range(4)]
    fields = {"rounds": rounds, "work": (), "text": f"{seconds} s", **changes}
    return Entry(id, seconds, **fields)


def ids(entries) -> list[str]:
    return [each.id for each in entries]


def test_the_fastest_comes_first_and_invalid_results_last():
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert sort_by_seconds(seconds, seconds.__getitem__) == ["b", "c", "a"]
    entries = [entry("a", 3.0), entry("b", 1.0, why_not="INVALID"), entry("c", 2.0, why_not="approximate")]
    assert ids(ranked(entries)) == ["c", "a", "b"]


def test_the_order_follows_paired_ratios_and_not_absolute_times():
    """A disturbed launch moves the median of one side; the speed-up beside it comes from pairs."""
    slow, quick = entry("slow", 1.1), entry("quick", 1.0)
    assert paired(slow, quick).estimate > 1.09
    misleading = Entry("quick", 1.2, quick.rounds, (), "1.2 s")
    assert ids(ranked([slow, misleading])) == ["quick", "slow"]


def test_rounds_are_paired_by_their_cycle():
    """An invalid round leaves its cycle empty; the rounds after it belong to their own cycles."""
    shared = [1.0, 1.5, 2.0, 3.0, 5.0, 8.0]
    quick, slow = [shared] * 3, [[2 * seconds for seconds in shared]] * 3
    gaps = [[None, *launch[1:]] for launch in slow]
    ratio = paired(Entry("slow", 2.0, gaps, (), ""), Entry("quick", 1.0, quick, (), ""))
    assert math.isclose(ratio.estimate, 2.0)


def test_fastest_only_where_the_interval_excludes_no_change():
    speedup = Interval(2.0, 1.9, 2.1)
    quick = entry("quick", 1.0, 0.01, speedup=speedup, against="original")
    assert fastest_lines([entry("slow", 1.2, 0.01), quick]) == [
        "fastest here: quick, 1.0 s an image, 2.00x original [1.90, 2.10]"
    ]
    (line,) = fastest_lines([entry("one", 1.0, 0.05), entry("two", 1.01, 0.05)])
    assert " are within " in line and "neither is shown to be the fastest" in line
    assert fastest_lines([quick]) == []  # faster than nothing
    (line,) = fastest_lines([Entry("a", 1.0, [[1.0]], (), "1 s"), Entry("b", 2.0, [[2.0]], (), "2 s")])
    assert "gives no interval" in line


def test_approximate_and_invalid_results_are_never_the_fastest():
    entries = [
        entry("a", 1.0, why_not="approximate"),
        entry("b", 0.5, why_not="INVALID"),
        entry("c", 2.0),
        entry("d", 3.0),
    ]
    assert fastest_lines(entries)[0].startswith("fastest here: c,")


def test_different_work_is_ranked_apart():
    small, large = {"height": 256, "steps": 20}, {"height": 512, "steps": 20}
    works = work_of(small), work_of(large)
    assert works[0] != works[1] and work_of({**small, "attention": "mha"}) == works[0]
    entries = [
        entry("large-slow", 9.0, work=works[1]),
        entry("small-slow", 2.0, work=works[0]),
        entry("large-quick", 8.0, work=works[1]),
        entry("small-quick", 1.0, work=works[0]),
    ]
    assert ids(ranked(entries)) == ["large-quick", "large-slow", "small-quick", "small-slow"]
    assert [line.split(",")[0] for line in fastest_lines(entries)] == [
        "fastest here: large-quick",
        "fastest here: small-quick",
    ]
