"""The order of results from fastest to slowest, and the line about the fastest one. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from perf.analysis.statistics import Interval

T = TypeVar("T")


def sort_by_seconds(
    results: Iterable[T], seconds: Callable[[T], float], invalid: Callable[[T], bool] = lambda result: False
) -> list[T]:
    """Sort results by their seconds per image; invalid ones come last."""
    return sorted(results, key=lambda result: (invalid(result), seconds(result)))


def fastest_line(id: str, time: str, speedup: Interval | None = None, against: str = "original") -> str:
    """Name the fastest configuration. time: with its unit. speedup: over the configuration `against`."""
    line = f"fastest here: {id}, {time} an image"
    if speedup is None:
        return line
    bounds = f" [{speedup.low:.2f}, {speedup.high:.2f}]" if speedup.bounded else ""
    return f"{line}, {speedup.estimate:.2f}x {against}{bounds}"
