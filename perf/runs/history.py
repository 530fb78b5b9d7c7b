"""Change points of stored sessions: the sessions from which on a configuration is slower or faster.

The value of a session is its median in units of the reference workload, which cancels changes of the whole machine. The
change points are those of PELT (Killick, Fearnhead and Eckley 2012) with an absolute cost, by the package `ruptures`.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from perf.analysis.statistics import MARGIN_FLOOR
from perf.runs.saved_run import IDENTITY, SavedRun

PACKAGE = "ruptures"  # of the extra `history`
MIN_POINTS = 6
MIN_SEGMENT = 3  # sessions before, between and after change points: two outliers are no change
# Penalty of a change point, times log(n), in units of the noise. docs/statistics.md has its rates on synthetic series.
PENALTY = 2.5
SMALLEST_NOISE = 1e-4  # of the log values; identical values have none
SOFTWARE = ("driver", "torch", "cuda", "cudnn", "triton", "xformers", "python")  # may change within one history
MACHINE = tuple(key for key in IDENTITY if key not in SOFTWARE)


@dataclass(frozen=True)
class Series:
    """The sessions of one configuration on one machine, oldest first. values: medians in reference workloads."""

    machine: str
    id: str
    runs: tuple[SavedRun, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class ChangePoint:
    """The first session of a new level. ratio: of the medians after and before, up to the neighbouring change points."""

    series: Series
    index: int
    ratio: float
    before: int
    after: int

    @property
    def commits(self) -> str:
        """The commit range in git's notation, with `unknown` for a session without one."""
        runs = self.series.runs[self.index - 1], self.series.runs[self.index]
        return "..".join((run.commit or "unknown")[:12] for run in runs)

    @property
    def software(self) -> list[str]:
        """Changed software versions, such as `torch 2.14.0 to 2.15.0`."""
        old, new = (self.series.runs[index].machine for index in (self.index - 1, self.index))
        return [f"{key} {old[key]} to {new[key]}" for key in SOFTWARE if old[key] != new[key]]

    def __str__(self) -> str:
        """For example `SLOWER +5.1 % from 0013_nightly on, commits 0a1b..2c3d (12 sessions before, 8 after)`."""
        word = "SLOWER" if self.ratio > 1 else "FASTER"
        name = self.series.runs[self.index].name
        changed = "".join(f", {change}" for change in self.software)
        return (
            f"{word} {100 * (self.ratio - 1):+.1f} % from {name} on, commits {self.commits}{changed} "
            f"({self.before} sessions before, {self.after} after)"
        )


def is_available() -> bool:
    """Whether the package of the extra `history` is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def why_left_out(run: SavedRun) -> str | None:
    """Why a run is no point of a history, or None. A regressed run is one, since it may be the change."""
    if run.machine["hosted"]:
        return "of a hosted runner, where each job may run on another machine"
    if run.plain or run.partial or run.invalid:
        return run.why_no_candidate
    return None if run.started_unix_seconds else "without a start time"


def series_of(runs: Iterable[SavedRun]) -> list[Series]:
    """One series for each machine and configuration, from the runs that `why_left_out` allows."""
    points: dict[tuple[object, ...], dict[float, tuple[SavedRun, float]]] = {}
    for run in runs:
        if why_left_out(run):
            continue
        machine = tuple(run.machine[key] for key in MACHINE)
        for id, benchmark in run.by_id.items():
            if benchmark.anchored_launch_medians and not benchmark.image_failure:
                median = statistics.median(benchmark.anchored_launch_medians)
                started = run.started_unix_seconds or 0.0  # a copy of a session counts once
                key = (*machine, run.anchor_name, benchmark.precision, id)  # `fast` chooses the precision
                points.setdefault(key, {})[started] = (run, median)
    series = []
    for key, by_start in points.items():
        ordered = [point for _, point in sorted(by_start.items(), key=lambda item: item[0])]
        facts = dict(zip(MACHINE, key))
        name = f"{facts['name']} ({facts['processor']})" if facts["processor"] else str(facts["name"])
        series.append(
            Series(name, str(key[-1]), tuple(run for run, _ in ordered), tuple(value for _, value in ordered))
        )
    return series


def find_changes(series: Series) -> list[ChangePoint]:
    """The change points of a series of MIN_POINTS sessions or more. Needs `ruptures`."""
    bounds = [0, *change_indices(series.values), len(series.values)]
    levels = [statistics.median(series.values[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return [
        ChangePoint(series, at, levels[i + 1] / levels[i], at - bounds[i], bounds[i + 2] - at)
        for i, at in enumerate(bounds[1:-1])
    ]


def change_indices(values: Sequence[float]) -> list[int]:
    """Indices of the first values of new levels, in positive values. Steps under the smallest margin are dropped."""
    if len(values) < MIN_POINTS:
        return []
    import numpy
    import ruptures

    logs = [math.log(value) for value in values]
    differences = [abs(after - before) for before, after in itertools.pairwise(logs)]
    # The median of |differences| of normal noise is 0.6745 sqrt(2) standard deviations; steps hardly move it.
    noise = max(statistics.median(differences) / 0.6745 / math.sqrt(2), SMALLEST_NOISE)
    search = ruptures.Pelt(model="l1", min_size=MIN_SEGMENT, jump=1)
    points: list[int] = search.fit_predict(numpy.array(logs) / noise, PENALTY * math.log(len(logs)))[:-1]
    while points:
        bounds = [0, *points, len(logs)]
        levels = [statistics.median(logs[begin:end]) for begin, end in itertools.pairwise(bounds)]
        steps = [abs(after - before) for before, after in itertools.pairwise(levels)]
        smallest = min(range(len(steps)), key=steps.__getitem__)
        if steps[smallest] >= math.log1p(MARGIN_FLOOR):
            break
        del points[smallest]
    return points
