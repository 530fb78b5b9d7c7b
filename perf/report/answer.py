"""The answer of a report, for the top of its page: verdict cards, a table for each work, and paired ratios of two rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from markupsafe import Markup

from perf.analysis import ranking
from perf.analysis.verdicts import REASONS, Verdict, percent
from perf.configurations.configuration import is_reference
from perf.report import tables, text
from perf.report.charts import groups
from perf.report.reproduce import command
from perf.report.results import Result, SavedSession, entry_of, ranked
from perf.report.text import counted, counted_range

CARDS = {
    Verdict.SLOWER: "regressions",
    Verdict.FASTER: "improvements",
    Verdict.SAME: "no change",
    Verdict.INCONCLUSIVE: "undecided",
    Verdict.INVALID: "invalid",
}
WIDTH, HEIGHT = 1000, 30  # units of a strip's viewBox; the page stretches it
MOST_TICKS = 5


@dataclass(frozen=True)
class Row:
    """A result in a table of the page. anchor: its id in the document; number: its place in the data of the script."""

    number: int
    anchor: str
    result: Result
    time: str
    strip: Markup
    is_fastest: bool

    @property
    def code(self) -> str:
        """The verdict's code, empty if nothing was compared."""
        return self.result.verdict or ""

    @property
    def marks(self) -> list[str]:
        """The marks that the verdict does not name already."""
        return [mark for mark in self.result.marks if mark != self.code]

    @property
    def change(self) -> str:
        """The compared change in percent with its interval, empty without one or if it is no evidence."""
        decision = self.result.benchmark.decision
        if decision is None or decision.ratio is None or self.code == Verdict.INVALID.value:
            return ""
        ratio = decision.ratio
        bounds = f" [{percent(ratio.low):+.1f}, {percent(ratio.high):+.1f}]" if ratio.bounded else ""
        return f"{percent(ratio.estimate):+.1f}{bounds} %"

    @property
    def time_with_unit(self) -> str:
        """The time with a unit, for a card."""
        return text.interval_seconds(self.result.seconds_per_image)

    @property
    def interval(self) -> str:
        """The time with its interval and the kind of interval."""
        times = text.interval_seconds(self.result.seconds_per_image, *self.result.interval)
        return f"{times} ({self.result.interval_name})"

    @property
    def advice(self) -> str:
        """Why the row is INVALID, or what an undecided comparison could have found and what would find more; else empty."""
        decision = self.result.benchmark.decision
        if self.code == Verdict.INVALID.value:
            image = self.result.benchmark.image_failure
            return (
                f"wrong image: {image}"
                if image
                else self.result.session.saved.invalid or (decision.reason if decision else "")
            )
        return decision.reason.partition(" ")[2] if decision and self.code == Verdict.INCONCLUSIVE.value else ""

    @property
    def memory(self) -> str:
        """Peak memory, empty if unknown."""
        return text.size(self.result.peak_bytes)

    @property
    def is_reference(self) -> bool:
        """Whether speed-ups refer to this row."""
        return is_reference(self.result.benchmark.configuration or {})

    @property
    def counts(self) -> str:
        """What changed in the exact counts, empty if nothing did or they were not compared."""
        return str(self.result.counts) if self.result.counts and self.result.counts.changes else ""

    @property
    def explanation(self) -> str:
        """The verdict in full and the meaning of its reason code."""
        decision = self.result.benchmark.decision
        meaning = f"\n{REASONS[decision.code]}" if decision and not self.result.benchmark.image_failure else ""
        return self.result.reason + meaning


@dataclass(frozen=True)
class WorkTable:
    """The rows of one work in one unit of time. ticks: (percent of the width, label) of the axis of the strips."""

    title: str
    unit: str
    clock: str
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    several_machines: bool


@dataclass(frozen=True)
class Card:
    """The rows with one verdict."""

    code: str
    name: str
    rows: tuple[Row, ...]


def work_tables(results: Sequence[Result]) -> list[WorkTable]:
    """A table for each work, that of the newest session first, each from the fastest image to the slowest."""
    results = sorted(results, key=lambda result: result.session.order, reverse=True)
    numbers, anchors = itertools.count(), set()
    works = groups(ranked(results), lambda result: ranking.work_of(result.benchmark.configuration))
    names = [members[0].work_name for members in works.values()]
    made = []
    for members, name in zip(works.values(), names):
        checkpoint = str((members[0].benchmark.configuration or {}).get("checkpoint") or "")
        title = f"{name}, {checkpoint}" if checkpoint and names.count(name) > 1 else name
        made.append(_work_table(title, members, numbers, anchors))
    return made


def _work_table(title: str, members: Sequence[Result], numbers: Iterable[int], anchors: set[str]) -> WorkTable:
    times = [result.seconds_per_image for result in members]
    factor, unit = text.UNITS[0] if max(times) >= 1 and min(times) >= 0.01 else text.unit_of(min(times))
    digits = max(0, 3 - len(str(int(min(times) / factor))))
    axis = _Axis(members)
    by_session = groups(members, lambda result: id(result.session))
    fastest = {
        (id(session[0].session), winner)
        for session in by_session.values()
        for winner in ranking.fastest_ids(map(entry_of, session))
    }
    rows = []
    for result, number in zip(members, numbers):
        anchor = f"row-{text.file_name(result.id)}"
        anchor = f"{anchor}-{number}" if anchor in anchors else anchor
        anchors.add(anchor)
        is_fastest = (id(result.session), result.id) in fastest
        strip = axis.strip(result)
        rows.append(Row(number, anchor, result, f"{result.seconds_per_image / factor:.{digits}f}", strip, is_fastest))
    clocks = {str(result.session.facts.get("clock") or "unknown clock") for result in members}
    machines = {(result.session.machine, result.torch, result.session.name) for result in members}
    clock = {"cpu": "CPU time", "wall": "wall time"}.get(clocks.pop(), "") if len(clocks) == 1 else "wall or CPU time"
    return WorkTable(title, unit, clock, tuple(rows), axis.ticks(factor), len(machines) > 1)


class _Axis:
    """The common axis of the strips of a table: all medians of launches and intervals, without single slow rounds."""

    def __init__(self, members: Sequence[Result]):
        values = [bound for result in members for bound in result.interval]
        values += [seconds / result.images for result in members for seconds in result.benchmark.launch_medians]
        low, high = min(values), max(values)
        room = 0.04 * (high - low) or 0.04 * high
        self.low, self.high = max(0.0, low - room), high + room

    def at(self, seconds: float) -> int:
        """The place of a time, within the strip."""
        share = (seconds - self.low) / (self.high - self.low)
        return round(WIDTH * min(1.0, max(0.0, share)))

    def ticks(self, factor: float) -> tuple[tuple[float, str], ...]:
        """At most MOST_TICKS round values within the axis, in units of `factor` seconds."""
        low, high = self.low / factor, self.high / factor
        rough = (high - low) / (MOST_TICKS - 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * unit for unit in (1, 2, 5, 10) if power * unit >= rough)
        first = math.ceil(low / step)
        values = itertools.takewhile(lambda value: value <= high, (step * number for number in itertools.count(first)))
        return tuple((100 * (value - low) / (high - low), f"{value:.6g}") for value in values)

    def strip(self, result: Result) -> Markup:
        """An SVG with a dot for every round, launches from top to bottom, over the interval and the median."""
        launches = result.benchmark.launches
        inside, outside = [], []
        for number, rounds in enumerate(launches):
            y = round(HEIGHT * (number + 0.5) / len(launches), 1)
            for seconds in rounds:
                seconds /= result.images
                place = inside if self.low <= seconds <= self.high else outside
                place.append(f"M{self.at(seconds)} {y:g}h0")
        low, high = map(self.at, result.interval)
        median, middle = self.at(result.seconds_per_image), HEIGHT // 2
        paths = {"i": f"M{low} {middle}H{high}", "r": "".join(inside), "o": "".join(outside)}
        paths["m"] = f"M{median} {middle - 9}v18"
        drawn = "".join(f'<path class="{name}" d="{path}"/>' for name, path in paths.items() if path)
        return Markup(
            f'<svg class="strip" aria-hidden="true" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{drawn}</svg>'
        )


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the last session of each machine: those that the cards count."""
    rows, newest = list(rows), {}
    for row in rows:
        session = row.result.session
        if session.order >= newest.get(session.device, session).order:
            newest[session.device] = session
    return [row for row in rows if newest[row.result.session.device] is row.result.session]


def cards(rows: Sequence[Row]) -> list[Card]:
    """A card for every verdict, the larger changes first, and one for the rows without a comparison, if any."""

    def size(row: Row) -> float:
        decision = row.result.benchmark.decision
        return -abs(math.log(decision.ratio.estimate)) if decision and decision.ratio else 0.0

    made = []
    for verdict, name in CARDS.items():
        members = [row for row in rows if row.code == verdict.value]
        made.append(Card(verdict.value, name, tuple(sorted(members, key=size))))
    compared = tuple(row for row in rows if row.counts)
    others = tuple(row for row in rows if not row.code)
    more = [Card("COUNTS", "other counts", compared), Card("", "not compared", others)]
    return [*made, *(card for card in more if card.rows)]


def asked(last: SavedSession, results: Sequence[Result], sessions: int) -> list[str]:
    """What the last session measured, in a few short parts."""
    members = [result for result in results if result.session is last]
    decisions = [result.benchmark.decision for result in members if result.benchmark.decision]
    against = sorted({decision.against or "its baseline" for decision in decisions})
    parts = [
        f"{datetime.fromtimestamp(last.started, timezone.utc):%Y-%m-%d %H:%M} UTC" if last.started else "",
        last.machine,
        f"torch {last.torch}",
        counted(len(members), "configuration"),
        _launches(members) if last.rounds else "",
        f"compared with {', '.join(against[:3])}" if against else "compared with nothing",
        f"{sessions} sessions in this report" if sessions > 1 else "",
    ]
    return [part for part in parts if part]


def _launches(members: Sequence[Result]) -> str:
    """The launches and valid rounds really made, which pairs may have more of than requested."""
    made = [result.benchmark.launches for result in members]
    timed = (len(launch) for launches in made for launch in launches)
    return f"{counted_range(map(len, made), 'launch', 'launches')} of {counted_range(timed, 'round')}"


def pairs(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Ratio of the times of two rows with its interval, by `I-J`: for rows of one work and session, over paired launches."""
    ratios = {}
    for members in groups(rows, lambda row: id(row.result.session)).values():
        entries = [(row.number, entry_of(row.result)) for row in members]
        for (first, ours), (second, theirs) in itertools.combinations(entries, 2):
            ratio = ranking.paired(ours, theirs)
            if ratio is not None:
                ratios[f"{first}-{second}"] = [round(value, 5) for value in (ratio.estimate, ratio.low, ratio.high)]
    return ratios


def details(row: Row) -> list[tuple[str, str]]:
    """The values of a row that its table has no column for."""
    result = row.result
    session, benchmark, joules = result.session, result.benchmark, result.joules
    cold, warm = result.first_call
    values = {
        "verdict": row.explanation,
        "counts": str(result.counts or ""),
        "interval": row.interval,
        "images per second": f"{1 / result.seconds_per_image:.3g}",
        "launches, valid rounds": f"{len(benchmark.launch_medians)}, {sum(map(len, benchmark.launches))}",
        "energy, J per image": tables.joules_text(joules),
        "fraction of peak FLOP/s": tables.of_peak(result),
        "image": _image(result),
        "attention kernels": ", ".join(result.kernels),
        "first call, cold": text.seconds(cold) if cold else "",
        "first call, warm cache": text.seconds(warm) if warm else "",
        "stages": ", ".join(f"{name} {result.stages[name].per(result.images).seconds()}" for name in result.stages),
        "session": session.name,
        "commit": session.commit or "",
        "device": str(session.facts.get("name") or ""),
        "torch": result.torch,
        "driver": str(session.facts.get("driver") or ""),
        "CUDA": str(session.facts.get("cuda") or ""),
        "drifted": session.saved.drifted or "",
        "synthetic": session.synthetic or "",
        "command": command(result),
    }
    return [(name, value) for name, value in values.items() if value]


def _image(result: Result) -> str:
    if result.psnr_db is None:
        return ""
    error = "" if result.latent_relative_error is None else f", latents differ by {result.latent_relative_error:.2g}"
    return f"{result.psnr_db:.1f} dB against {result.image_reference or 'its reference'}{error}"
