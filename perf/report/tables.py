"""The tables: every result, and the article's two with the reader's own runs beside the published ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from perf.report import text
from perf.report.palette import STAGES
from perf.report.published import GPUS, SOURCE, published
from perf.report.results import Result, ranked
from perf.report.spread import Spread

USUAL_REFERENCE = {"sd2": "original-xformers", "sd1": "original"}  # the articles' own
ITERATIONS = 2  # of a published run
STAGE_NAMES = tuple(STAGES)


class UnknownReference(ValueError):
    """A reference row that no table has; the message lists those there are."""


@dataclass(frozen=True)
class Cell:
    """Runtime of a run in seconds, and how much faster than the reference in the same column in percent; None: not run."""

    seconds: float | None
    improvement_percent: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Table:
    """One batch size of one model. columns: (name, is it published); cells[row][column]; iterations: rounds of a run."""

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


def article_tables(results: Sequence[Result], reference: str | None = None) -> list[Table]:
    """The published tables, with a column for each of the reader's machines that did the same work.

    reference: the row that improvements refer to; the articles' own where it is None. A positive improvement is faster:
    100 * (1 - seconds / reference). Raises UnknownReference.
    """
    known = list(dict.fromkeys(cell.technique for cell in published()))
    known += [one.technique for one in results if one.technique not in known]
    if reference is not None and reference not in known:
        raise UnknownReference(f"no row is called {reference!r}: choose from {', '.join(dict.fromkeys(known))}")
    tables = []
    for model in ("sd2", "sd1"):
        for batch in sorted({cell.batch for cell in published() if cell.model == model}):
            tables.append(_table(model, batch, results, reference or USUAL_REFERENCE[model]))
    return tables


def _table(model: str, batch: int, results: Sequence[Result], reference: str) -> Table:
    printed = [cell for cell in published() if (cell.model, cell.batch) == (model, batch)]
    own = [one for one in results if _published_work(one) and (one.model, one.batch) == (model, batch)]
    own = [one for one in own if not one.benchmark.image_failure]
    rows = list(dict.fromkeys([cell.technique for cell in printed] + [one.technique for one in own]))
    gpus = [gpu for gpu in GPUS if any(cell.gpu == gpu for cell in printed)]
    machines = list(dict.fromkeys(own_column(one) for one in own))
    iterations = printed[0].iterations
    of_cell = {(cell.gpu, cell.technique): cell for cell in printed}
    of_own = {(own_column(one), one.technique): one for one in own}
    columns = [[of_cell.get((gpu, row)) for row in rows] for gpu in gpus]
    seconds: list[list[tuple]] = [
        [(cell.seconds if cell else None, None, None) for cell in column] for column in columns
    ]
    as_printed = [[cell.improvement_percent if cell else None for cell in column] for column in columns]
    for machine in machines:
        seconds.append([_own_runtime(of_own.get((machine, row)), iterations or ITERATIONS) for row in rows])
    finished = [_improvements(column, rows, reference) for column in seconds]
    if reference == USUAL_REFERENCE[model]:  # the articles computed theirs from runtimes that they did not round
        finished[: len(gpus)] = [
            [Cell(cell.seconds, printed) for cell, printed in zip(*pair)] for pair in zip(finished, as_printed)
        ]
    return Table(
        model=model,
        batch=batch,
        iterations=iterations,
        reference=reference,
        columns=tuple([(gpu, True) for gpu in gpus] + [(machine, False) for machine in machines]),
        rows=tuple(rows),
        cells=tuple(tuple(column[row] for column in finished) for row in range(len(rows))),
    )


def own_column(result: Result) -> str:
    """The heading of a reader's own machine: device, torch, and whether it is synthetic."""
    return f"{result.session.machine}, torch {result.session.torch}"


def _published_work(result: Result) -> bool:
    return (result.workload, result.steps, result.sampler, result.size) == ("txt2img", 50, "plms", (0, 0))


def _own_runtime(result: Result | None, iterations: int) -> tuple:
    """Runtime of as many rounds as a published run has, with its interval."""
    if result is None:
        return None, None, None
    images = iterations * result.batch
    return (images * result.seconds_per_image, *(images * bound for bound in result.interval))


def _improvements(column: Sequence[tuple], rows: Sequence[str], reference: str) -> list[Cell]:
    base = column[rows.index(reference)][0] if reference in rows else None

    def percent(seconds):
        return None if seconds is None or base is None else 100 * (1 - seconds / base) + 0.0

    return [Cell(seconds, percent(seconds), low, high) for seconds, low, high in column]


def article_markdown(tables: Sequence[Table], title: bool = True) -> str:
    """The tables as Markdown, runtimes and improvements in one cell."""
    parts = ["# The published tables\n"] if title else []
    for table in tables:
        header = ["configuration"]
        header += [text.markdown(name) + (" (published)" if printed else "") for name, printed in table.columns]
        rows = [[text.markdown(name), *map(cell_words, cells)] for name, cells in zip(table.rows, table.cells)]
        parts.append(f"## {text.markdown(table.title)}\n")
        parts.append(text.markdown_table(header, rows))
        parts.append(
            f"In brackets: improvement over {text.markdown(table.reference)} in the same column, positive is faster. "
            f"Published: {SOURCE[table.model]}, averages of 10 launches, printed without intervals"
            + ("" if table.iterations else "; how many images a run made is not printed: own runs made 2 batches")
            + ".\n"
        )
    return "\n".join(parts)


def cell_words(cell: Cell) -> str:
    """Such as `8.0 (-19.4 %)`, with the interval of an own run."""
    if cell.seconds is None:
        return "not run"
    words = f"{cell.seconds:.1f}" if cell.low is None else f"{cell.seconds:.3g} [{cell.low:.3g}, {cell.high:.3g}]"
    return words if cell.improvement_percent is None else f"{words} ({cell.improvement_percent:+.1f} %)"


def article_csv(tables: Sequence[Table]) -> str:
    """The tables as one CSV, a line a cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "model n_samples n_iter configuration gpu origin seconds seconds_low seconds_high reference "
        "improvement_percent".split()
    )
    for table in tables:
        for row, cells in zip(table.rows, table.cells):
            for (name, printed), cell in zip(table.columns, cells):
                if cell.seconds is None:
                    continue
                values = [table.model, table.batch, table.iterations, row, name, "published" if printed else "own"]
                values += [cell.seconds, cell.low, cell.high, table.reference]
                improvement = None if cell.improvement_percent is None else round(cell.improvement_percent, 2)
                writer.writerow([text.csv_cell(value) for value in [*values, improvement]])
    return out.getvalue()


COLUMNS = ("configuration", "machine", "torch", "s/image", "interval of s/image", "images/s", "speed-up", "peak memory")
COLUMNS += ("J/image", "of peak FLOP/s", "PSNR, dB", "verdict", "session")


def result_rows(results: Sequence[Result]) -> list[list[str]]:
    """The cells of COLUMNS as plain text, the fastest first."""
    rows = []
    for one in ranked(results):
        low, high = one.interval
        decision = one.benchmark.decision
        speedup = one.speedup
        against = f" {one.speedup_against}" if one.speedup_against else ""
        verdict = f"INVALID (wrong_image {one.benchmark.image_failure})" if one.benchmark.image_failure else decision
        times = f"{speedup.estimate:.2f}x{against}" if speedup else ""
        if speedup and speedup.bounded:
            times += f" [{speedup.low:.2f}, {speedup.high:.2f}]"
        rows.append(
            [
                one.id,
                one.session.machine,
                one.torch,
                text.seconds(one.seconds_per_image),
                f"{text.seconds(low)} to {text.seconds(high)} ({one.interval_name})",
                f"{1 / one.seconds_per_image:.3g}",
                times,
                text.size(one.peak_bytes),
                text.bounded(one.joules, "{:.1f}") if one.joules else "",
                _of_peak(one),
                "" if one.psnr_db is None else f"{one.psnr_db:.1f}" + (" (approximate)" if one.approximate else ""),
                str(verdict or ""),
                one.session.name,
            ]
        )
    return rows


def _of_peak(one: Result) -> str:
    """The fraction of the ceiling that was reached, with the interval of the time behind it."""
    if one.flops_fraction is None:
        return ""
    least, most = (100 * one.flops_fraction * one.seconds_per_image / bound for bound in reversed(one.interval))
    return f"{100 * one.flops_fraction:.1f} [{least:.1f}, {most:.1f}] %"


def results_csv(results: Sequence[Result]) -> str:
    """Every result with plain numbers and units in the names."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "configuration device torch clock seconds_per_image low high interval batch launches peak_bytes joules_per_image "
        "joules_low joules_high flops_fraction floor_bytes psnr_db latent_relative_error verdict session synthetic".split()
        + [f"{name}_seconds_per_image{bound}" for name in STAGE_NAMES for bound in ("", "_low", "_high")]
    )
    for one in ranked(results):
        low, high = one.interval
        values = [one.id, one.session.facts.get("name"), one.torch, one.session.facts.get("clock")]
        values += [one.seconds_per_image, low, high, one.interval_name, one.batch, len(one.benchmark.launch_medians)]
        values += [one.peak_bytes, *_three(one.joules), one.flops_fraction, one.floor_bytes, one.psnr_db]
        values += [one.latent_relative_error, one.verdict, one.session.name, one.session.synthetic]
        for name in STAGE_NAMES:
            values += _three(one.stages[name].over(one.batch) if name in one.stages else None)
        writer.writerow([text.csv_cell(value) for value in values])
    return out.getvalue()


def _three(found: Spread | None) -> tuple:
    return (found.value, found.low, found.high) if found else (None, None, None)


def stage_rows(results: Sequence[Result]) -> list[tuple[Result, list[str]]]:
    """Seconds per image of each of STAGE_NAMES, with its interval, for those results that have stages."""
    rows = []
    for one in results:
        if one.stages:
            cells = {name: found.over(one.batch) for name, found in one.stages.items()}
            rows.append((one, [text.spread_seconds(cells[name]) if name in cells else "" for name in STAGE_NAMES]))
    return rows


def published_techniques() -> tuple[str, ...]:
    """The techniques of the articles, in their order."""
    return tuple(dict.fromkeys(cell.technique for cell in published()))
