"""Tables of all results, and the article's two tables with own runs beside the published values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from perf.report import text
from perf.report.estimate import Estimate
from perf.report.palette import STAGES
from perf.report.published import GPUS, SOURCE, published
from perf.report.results import Result, ranked

USUAL_REFERENCE = {"sd2": "original-xformers", "sd1": "original"}  # of the articles
ITERATIONS = 2  # rounds of a published run
STAGE_NAMES = tuple(STAGES)
COLUMNS = ("configuration", "machine", "torch", "time per image", "interval", "images/s", "speed-up", "peak memory")
COLUMNS += ("J/image", "of peak FLOP/s", "PSNR, dB", "marks", "verdict", "session")


class UnknownReference(ValueError):
    """A reference row that no table has; the message lists the rows."""


@dataclass(frozen=True)
class Cell:
    """Seconds of a run, None if not run, and the improvement over the reference in the same column in percent."""

    seconds: float | None
    improvement_percent: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return "not run"
        digits = f"{self.seconds:.1f}" if self.low is None else f"{self.seconds:.3g} [{self.low:.3g}, {self.high:.3g}]"
        return digits if self.improvement_percent is None else f"{digits} ({self.improvement_percent:+.1f} %)"


@dataclass(frozen=True)
class Table:
    """One batch size of one model. columns: (name, published); cells[row][column]; iterations: rounds of a run."""

    model: str
    batch: int
    iterations: int | None
    reference: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]

    @property
    def title(self) -> str:
        """Such as `SD2, batch 4: seconds for 2 x 4 images`."""
        images = f"{self.iterations} x {self.batch} images" if self.iterations else f"a run of batch {self.batch}"
        return f"{self.model.upper()}, batch {self.batch}: seconds for {images}"

    @property
    def header(self) -> list[str]:
        """The heading of every column."""
        return ["configuration", *(f"{name} (published)" if printed else name for name, printed in self.columns)]

    @property
    def note(self) -> str:
        """The meaning of the cells."""
        images = "" if self.iterations else "; the images of a run are not printed: own runs made 2 batches"
        return (
            f"In brackets: improvement over {self.reference} in the same column, positive is faster. "
            f"Published: {SOURCE[self.model]}, averages of 10 launches, printed without intervals{images}."
        )


def article_tables(results: Sequence[Result], reference: str | None = None) -> list[Table]:
    """The published tables, with a column for each own machine that did the same work.

    reference: the row that improvements refer to, by default the article's own. A positive improvement is faster:
    100 * (1 - seconds / reference). Raises UnknownReference.
    """
    known = dict.fromkeys([*published_techniques(), *(result.technique for result in results)])
    if reference is not None and reference not in known:
        raise UnknownReference(f"no row is called {reference!r}: choose from {', '.join(known)}")
    return [
        _table(model, batch, results, reference or USUAL_REFERENCE[model])
        for model in ("sd2", "sd1")
        for batch in sorted({cell.batch for cell in published() if cell.model == model})
    ]


def published_techniques() -> tuple[str, ...]:
    """The techniques of the articles, in their order."""
    return tuple(dict.fromkeys(cell.technique for cell in published()))


@dataclass(frozen=True)
class Ratio:
    """A speed-up over the original code on one machine. column: the machine and the work; result: None if published."""

    column: str
    batch: int
    technique: str
    estimate: float
    low: float | None = None
    high: float | None = None
    result: Result | None = None

    def __str__(self) -> str:
        bounds = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.estimate:.2f}x{bounds}"


def ratios(results: Sequence[Result]) -> list[Ratio]:
    """Speed-ups over the original code: of the published SD2 values, then own ones, paired within their session.

    A ratio is comparable between models and machines where seconds are not, so that a run of the embedded model stands
    beside the published GPUs. Own results without a bounded speed-up over `original`, and INVALID ones, are left out.
    """
    own = [result for result in results if result.speedup and result.speedup.bounded and "INVALID" not in result.marks]
    batches = {result.batch for result in own}
    printed = [cell for cell in published() if cell.model == "sd2" and cell.batch in batches and cell.seconds]
    base = {(cell.gpu, cell.batch): cell.seconds for cell in printed if cell.technique == "original"}
    ratios = [
        Ratio(f"{cell.gpu} (published)", cell.batch, cell.technique, base[cell.gpu, cell.batch] / cell.seconds)
        for cell in sorted(printed, key=lambda cell: GPUS.index(cell.gpu))
        if (cell.gpu, cell.batch) in base and cell.technique != "original"
    ]
    for result in own:
        column = f"{result.session.machine}, {result.work_name}, torch {result.torch}"
        bounds = result.speedup.estimate, result.speedup.low, result.speedup.high
        ratios.append(Ratio(column, result.batch, result.technique, *bounds, result))
    return ratios


@dataclass(frozen=True)
class RatioTable:
    """Speed-ups of one batch, with the fields of Table that are printed."""

    title: str
    header: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    note: str = (
        "Time of the original code in the same column over that of the row. Published: computed from the printed seconds of "
        "SD2, without intervals. Own: rounds of both that alternate in one session, with 95 % intervals."
    )


def ratio_tables(results: Sequence[Result]) -> list[RatioTable]:
    """Own machines beside the published GPUs as speed-ups over the original code, a table for each own batch."""
    made, every = [], ratios(results)
    for batch in sorted({ratio.batch for ratio in every}):
        members = [ratio for ratio in every if ratio.batch == batch]
        members.sort(key=lambda ratio: ratio.result is None)  # the reader's machines first
        columns, rows = (tuple(dict.fromkeys(getattr(r, name) for r in members)) for name in ("column", "technique"))
        cells = {(ratio.technique, ratio.column): str(ratio) for ratio in members}
        lines = tuple(tuple(cells.get((row, column), "not run") for column in columns) for row in rows)
        made.append(
            RatioTable(f"Batch {batch}: speed-up over the original code", ("configuration", *columns), rows, lines)
        )
    return made


def _table(model: str, batch: int, results: Sequence[Result], reference: str) -> Table:
    printed = [cell for cell in published() if (cell.model, cell.batch) == (model, batch)]
    own = [
        result
        for result in results
        if (result.work, result.batch) == (printed[0].work, batch) and not result.benchmark.image_failure
    ]
    rows = tuple(dict.fromkeys(result.technique for result in [*printed, *own]))
    iterations = printed[0].iterations
    columns: dict[tuple[str, bool], dict[str, Cell]] = {}
    for cell in sorted(printed, key=lambda cell: GPUS.index(cell.gpu)):
        columns.setdefault((cell.gpu, True), {})[cell.technique] = Cell(cell.seconds, cell.improvement_percent)
    for result in own:
        seconds = (
            (iterations or ITERATIONS) * result.batch * value for value in (result.seconds_per_image, *result.interval)
        )
        middle, low, high = seconds
        stamp = f", {result.session.stamp}" if result.session.stamp else ""
        heading = f"{result.session.machine}, torch {result.session.torch}{stamp}", False
        columns.setdefault(heading, {})[result.technique] = Cell(middle, None, low, high)
    for heading, column in columns.items():
        # The articles computed their improvements from unrounded runtimes: printed values are not computed again.
        if not (heading[1] and reference == USUAL_REFERENCE[model]):
            base = column.get(reference, Cell(None)).seconds
            columns[heading] = {name: _improved(cell, base) for name, cell in column.items()}
    return Table(
        model=model,
        batch=batch,
        iterations=iterations,
        reference=reference,
        columns=tuple(columns),
        rows=rows,
        cells=tuple(tuple(column.get(row, Cell(None)) for column in columns.values()) for row in rows),
    )


def _improved(cell: Cell, base: float | None) -> Cell:
    known = cell.seconds is not None and base is not None
    return replace(cell, improvement_percent=100 * (1 - cell.seconds / base) + 0.0 if known else None)


def article_markdown(tables: Sequence[Table | RatioTable]) -> str:
    """The tables as Markdown, runtimes and improvements in one cell."""
    parts = ["# The published tables\n"]
    for table in tables:
        rows = [[text.markdown(name), *map(str, cells)] for name, cells in zip(table.rows, table.cells)]
        parts.append(f"## {text.markdown(table.title)}\n")
        parts.append(text.markdown_table(list(map(text.markdown, table.header)), rows))
        parts.append(text.markdown(table.note) + "\n")
    return "\n".join(parts)


def _csv(header: str, rows: Iterable[Iterable[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header.split())
    writer.writerows(map(text.csv_cell, row) for row in rows)
    return out.getvalue()


def article_csv(tables: Sequence[Table]) -> str:
    """The tables as CSV, one line per cell."""
    lines = []
    for table in tables:
        for row, cells in zip(table.rows, table.cells):
            for (name, printed), cell in zip(table.columns, cells):
                if cell.seconds is not None:
                    percent = None if cell.improvement_percent is None else round(cell.improvement_percent, 2)
                    origin = "published" if printed else "own"
                    lines.append(
                        (
                            *(table.model, table.batch, table.iterations, row, name, origin),
                            *(cell.seconds, cell.low, cell.high, table.reference, percent),
                        )
                    )
    header = (
        "model n_samples n_iter configuration gpu origin seconds seconds_low seconds_high reference improvement_percent"
    )
    return _csv(header, lines)


def result_rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of COLUMNS as plain text, the fastest first."""
    rows = []
    for result in ranked(results):
        low, high = map(text.seconds, result.interval)
        times = f"{result.speedup.estimate:.2f}x {result.speedup_against or ''}".rstrip() if result.speedup else ""
        if result.speedup and result.speedup.bounded:
            times += f" [{result.speedup.low:.2f}, {result.speedup.high:.2f}]"
        rows.append(
            [
                result.id,
                result.session.machine,
                result.torch,
                text.seconds(result.seconds_per_image),
                f"{low} to {high} ({result.interval_name})",
                f"{1 / result.seconds_per_image:.3g}",
                times,
                text.size(result.peak_bytes),
                joules_text(result.joules),
                of_peak(result),
                "" if result.psnr_db is None else f"{result.psnr_db:.1f}",
                ", ".join(result.marks),
                result.reason,
                result.session.name,
            ]
        )
    return rows


def joules_text(joules: Estimate | None) -> str:
    """Joules with their interval, if known; empty for None."""
    if joules is None:
        return ""
    return f"{joules.value:.1f}" + ("" if joules.low is None else f" [{joules.low:.1f}, {joules.high:.1f}]")


def of_peak(result: Result) -> str:
    """Fraction of peak FLOP/s, with the interval of the time."""
    if result.flops_fraction is None:
        return ""
    low, high = (100 * result.flops_fraction * result.seconds_per_image / bound for bound in reversed(result.interval))
    return f"{100 * result.flops_fraction:.1f} [{low:.1f}, {high:.1f}] %"


def result_record(result: Result) -> dict[str, object]:
    """A result as plain numbers, with units in the names; None for unknown values."""
    session, work = result.session, result.work_name
    joules, decision = _bounds(result.joules), result.benchmark.decision
    ratio = decision.ratio if decision else None
    stages = {name: result.stages[name].per(result.images) if name in result.stages else None for name in STAGE_NAMES}
    return {
        "configuration": result.id,
        "work": work,
        "device": session.facts.get("name"),
        "torch": result.torch,
        "clock": session.facts.get("clock"),
        "seconds_per_image": result.seconds_per_image,
        "low": result.interval[0],
        "high": result.interval[1],
        "interval": result.interval_name,
        "batch": result.batch,
        "launches": len(result.benchmark.launch_medians),
        "speedup": result.speedup.estimate if result.speedup else None,
        "speedup_low": result.speedup.low if result.speedup and result.speedup.bounded else None,
        "speedup_high": result.speedup.high if result.speedup and result.speedup.bounded else None,
        "speedup_against": result.speedup_against,
        "peak_bytes": result.peak_bytes,
        **dict(zip(("joules_per_image", "joules_low", "joules_high"), joules)),
        "flops_fraction": result.flops_fraction,
        "floor_bytes": result.floor_bytes,
        "psnr_db": result.psnr_db,
        "latent_relative_error": result.latent_relative_error,
        "marks": " ".join(result.marks),
        "verdict": result.verdict,
        "ratio": ratio.estimate if ratio else None,
        "ratio_low": ratio.low if ratio and ratio.bounded else None,
        "ratio_high": ratio.high if ratio and ratio.bounded else None,
        "reason": result.reason or None,
        "counts_changes": "; ".join(result.counts.changes) if result.counts else None,
        "invalid": session.saved.invalid,
        "drifted": session.saved.drifted,
        "session": session.name,
        "synthetic": session.synthetic,
        **{
            f"{name}_seconds_per_image{bound}": value
            for name, stage in stages.items()
            for bound, value in zip(("", "_low", "_high"), _bounds(stage))
        },
    }


def results_csv(results: Sequence[Result]) -> str:
    """All results as plain numbers, with units in the names of the columns."""
    records = [result_record(result) for result in ranked(results)]
    return _csv(" ".join(records[0]) if records else "configuration", (record.values() for record in records))


def _bounds(estimate: Estimate | None) -> tuple:
    return (estimate.value, estimate.low, estimate.high) if estimate else (None, None, None)


def stage_table(results: Sequence[Result]) -> tuple[tuple[str, ...], list[tuple[Result, list[str]]]]:
    """(the stages that a result has, seconds per image of each with intervals, for the results with stages)."""
    names = tuple(name for name in STAGE_NAMES if any(name in result.stages for result in results))
    return names, [
        (result, [result.stages[name].per(result.images).seconds() if name in result.stages else "" for name in names])
        for result in results
        if result.stages
    ]
