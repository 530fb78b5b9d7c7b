"""The order of results from fastest to slowest, and the line about the fastest one. Pure.

Within a session the order follows the paired ratios, as the speed-ups do, so that both agree. Results of different work
(image size, steps, sampler, ...) are never ranked in one list, since their times answer different questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perf.analysis.paired import MIN_LAUNCHES, Rounds, launch_effects, ratio_of_effects
from perf.analysis.statistics import Interval

T = TypeVar("T")
# The fields of a configuration that define the work of an image: results that differ in one of them are not comparable.
WORK = ("workload", "model", "checkpoint", "height", "width", "steps", "sampler", "timestep_spacing", "sigmas", "scale")


@dataclass(frozen=True)
class Entry:
    """A result of one session. seconds, rounds: per image. work: as by `work_of`. why_not: why it cannot be the fastest,
    such as `approximate`, or None. text: the time with its unit and interval.
    """

    id: str
    seconds: float
    rounds: Rounds
    work: tuple[object, ...]
    text: str
    why_not: str | None = None
    is_reference: bool = False
    speedup: Interval | None = None
    against: str = "original"


def work_of(configuration: Mapping[str, object] | None) -> tuple[object, ...]:
    """What an image of a configuration is: two results with equal work may be ranked. Each test of a suite is other work."""
    values = configuration or {}
    test = values.get("engine") if "::" in str(values.get("engine")) else None
    return (*(values.get(field) for field in WORK), test)


def marks(invalid: bool, drifted: bool, approximate: bool) -> tuple[str, ...]:
    """The marks beside a result, the same in the terminal, the saved run, CSV, Markdown and the page."""
    flags = {"INVALID": invalid, "drifted": drifted, "approximate": approximate}
    return tuple(name for name, is_set in flags.items() if is_set)


def sort_by_seconds(
    results: Iterable[T], seconds: Callable[[T], float], invalid: Callable[[T], bool] = lambda result: False
) -> list[T]:
    """Sort results by their seconds per image; invalid ones come last."""
    return sorted(results, key=lambda result: (invalid(result), seconds(result)))


def ranked(entries: Iterable[Entry]) -> list[Entry]:
    """Entries by work, each from the fastest to the slowest by paired ratios; invalid ones come last within their work."""
    return [entry for group in _by_work(entries) for entry in group]


def _by_work(entries: Iterable[Entry]) -> list[list[Entry]]:
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.work, []).append(entry)
    return [_sorted(group) for group in groups.values()]


def _sorted(entries: Sequence[Entry]) -> list[Entry]:
    reference = next((entry for entry in entries if entry.is_reference), entries[0])

    def seconds(entry: Entry) -> float:
        ratio = paired(entry, reference)
        return reference.seconds * ratio.estimate if ratio else entry.seconds

    return sort_by_seconds(entries, seconds, lambda entry: entry.why_not == "INVALID")


def paired(first: Entry, second: Entry) -> Interval | None:
    """Ratio of the seconds of two entries over the launches that both have; None for fewer than 2."""
    effects = launch_effects(first.rounds, second.rounds)
    return ratio_of_effects(effects) if len(effects) >= MIN_LAUNCHES else None


def fastest_lines(entries: Iterable[Entry]) -> list[str]:
    """One line about the fastest exact, valid entry of each work that has several.

    An entry is called the fastest only where the interval of the ratio of the next one to it excludes no change.
    """
    return [_fastest_line(first, second) for first, second in _first_two(entries)]


def fastest_ids(entries: Iterable[Entry]) -> list[str]:
    """Ids of the entries that `fastest_lines` calls the fastest."""
    ratios = ((first.id, paired(second, first)) for first, second in _first_two(entries))
    return [id for id, ratio in ratios if ratio and ratio.low > 1]


def _first_two(entries: Iterable[Entry]) -> list[tuple[Entry, Entry]]:
    """The two fastest exact, valid entries of each work."""
    groups = ([entry for entry in group if entry.why_not is None] for group in _by_work(entries))
    return [(exact[0], exact[1]) for exact in groups if len(exact) > 1]


def _fastest_line(first: Entry, second: Entry) -> str:
    ratio = paired(second, first)
    if ratio is None:
        return f"the fastest is not known: one launch of {first.id} and of {second.id} gives no interval"
    if ratio.low <= 1:
        apart = 100 * max(ratio.high - 1, 1 - ratio.low)
        text = f"{apart:.1f} %" if math.isfinite(apart) and apart < 1000 else "an unknown difference"
        return f"{first.id} and {second.id} are within {text}: neither is shown to be the fastest"
    line = f"fastest here: {first.id}, {first.text} an image"
    if first.speedup is not None:
        bounds = f" [{first.speedup.low:.2f}, {first.speedup.high:.2f}]" if first.speedup.bounded else ""
        line += f", {first.speedup.estimate:.2f}x {first.against}{bounds}"
    return line
