"""The order of results, and the line about the fastest one."""

from __future__ import annotations

from perf.analysis.ranking import fastest_line, sort_by_seconds
from perf.analysis.statistics import Interval


def test_invalid_results_are_last():
    seconds = {"a": 3.0, "b": 1.0, "c": 2.0}
    assert sort_by_seconds(seconds, seconds.__getitem__) == ["b", "c", "a"]
    assert sort_by_seconds(seconds, seconds.__getitem__, lambda id: id == "b") == ["c", "a", "b"]


def test_fastest_line_has_the_speedup_where_it_is_known():
    assert fastest_line("sd2-sdpa-b1", "1.20 s") == "fastest here: sd2-sdpa-b1, 1.20 s an image"
    bounded = fastest_line("a", "1 s", Interval(2.0, 1.9, 2.1), "b")
    assert bounded == "fastest here: a, 1 s an image, 2.00x b [1.90, 2.10]"
    assert fastest_line("a", "1 s", Interval.point(2.0)) == "fastest here: a, 1 s an image, 2.00x original"
