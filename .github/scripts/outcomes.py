"""The outcome of one measurement. `could not measure` and `slower` are never confused.

The measuring machine writes an outcome as JSON; the publishing machine validates it as strictly as a saved run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from workflow import NAME, SHA, Refusal, annotate, fleet, read_json

from perf.analysis.verdicts import Decision, ExitCode, Verdict
from perf.runs.baselines import Choice, candidates, judge
from perf.runs.saved_run import BaselineError, SavedRun, read

SCHEMA = 1
NOT_SLOWER, SLOWER, INCONCLUSIVE, UNMEASURED = "not slower", "slower", "inconclusive", "could not measure"
STATUS = {ExitCode.OK: NOT_SLOWER, ExitCode.SLOWER: SLOWER, ExitCode.INCONCLUSIVE: INCONCLUSIVE}
WORST_FIRST = (UNMEASURED, SLOWER, INCONCLUSIVE, NOT_SLOWER)
FILE, RUN = "outcome.json", "run.json"
PYTEST_FAILURES = {
    1: "an image failed its check, or a configuration could not be measured",
    2: "the session was interrupted",
    3: "internal error of pytest",
    4: "the command line or the baseline was refused",
    5: "no configuration was selected",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one series on one machine.

    exit_code: of pytest or perf.analysis.verdicts.ExitCode. missing: configurations of the baseline that were not measured. new:
    configurations without a baseline. against: the other commit of a paired session.
    """

    label: str
    series: str
    sha: str
    exit_code: int
    reasons: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    against: str | None = None
    has_run: bool = False

    @property
    def status(self) -> str:
        """One of WORST_FIRST, from the exit code."""
        return STATUS.get(self.exit_code, UNMEASURED)

    def failed(self, reason: str) -> Outcome:
        """Return this outcome as `could not measure`, with one more reason. A failing exit code is preserved."""
        code = self.exit_code if self.status == UNMEASURED else int(ExitCode.FAILED)
        return replace(self, exit_code=code, reasons=(*self.reasons, reason))

    def write(self, folder: Path) -> None:
        """Write the outcome beside its run."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1), encoding="utf-8")


def _matches(pattern):
    return lambda value: isinstance(value, str) and pattern.fullmatch(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and len(text) < 1000 for text in value)


VALID = {
    "label": _matches(NAME),
    "series": _matches(NAME),
    "sha": _matches(SHA),
    "exit_code": lambda value: type(value) is int,
    "reasons": _texts,
    "missing": _texts,
    "new": _texts,
    "against": lambda value: value is None or _matches(SHA)(value),
    "has_run": lambda value: type(value) is bool,
}


def load(folder: Path) -> Outcome:
    """Read the outcome in a folder. Raises Refusal for anything that `Outcome.write` does not write."""
    document = read_json(folder / FILE)
    if document.pop("schema", None) != SCHEMA or document.keys() != VALID.keys():
        raise Refusal(f"{FILE}: is no outcome of this version")
    for key, valid in VALID.items():
        if not valid(document[key]):
            raise Refusal(f"{FILE}: the value of {key} is invalid")
    return Outcome(**{key: tuple(value) if isinstance(value, list) else value for key, value in document.items()})


def collect(artifacts: Path, sha: str) -> Iterator[tuple[Outcome, Path | None]]:
    """Yield the outcomes under `LABEL/SERIES`, each with its folder.

    An invalid outcome is `could not measure` for `sha`, without a folder: its run is not used.
    """
    known = fleet()
    for path in sorted(artifacts.glob(f"*/*/{FILE}")):
        folder, series = path.parent, path.parent.name
        label = folder.parent.name
        if label not in known or not NAME.fullmatch(series) or folder.is_symlink():
            annotate("warning", f"ignored: {label}/{series}: no machine of the fleet")
            continue
        try:
            outcome = load(folder)
            if (outcome.label, outcome.series) != (label, series):
                raise Refusal(f"{FILE}: belongs to {outcome.label} {outcome.series}")
            yield outcome, folder
        except Refusal as refusal:
            yield Outcome(label, series, sha, ExitCode.FAILED, (f"invalid outcome: {refusal}",)), None


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return the worst exit code: could not measure, slower, inconclusive, not slower."""
    worst = min(outcomes, key=lambda outcome: WORST_FIRST.index(outcome.status), default=None)
    return ExitCode.FAILED if worst is None or worst.status == UNMEASURED else worst.exit_code


def history(folder: Path, run: SavedRun) -> Choice:
    """Return the stored sessions under `folder` that are of the run's machine and older than the run."""
    machine, start = run.machine, run.started_unix_seconds or 0.0
    choice = candidates(folder, machine, machine["clock"], machine["threads"], machine["isolated"])
    return replace(choice, history=tuple(old for old in choice.history if (old.started_unix_seconds or 0.0) < start))


def check(outcome: Outcome, folder: Path, baselines: Path | None) -> Outcome:
    """Validate an outcome against its saved run in `folder`. A contradiction with the exit code is a failure.

    baselines: the stored sessions of the series, of which no configuration may be missing; None for a paired session.
    """
    path = folder / RUN
    try:
        if path.is_symlink() or not path.is_file():
            raise BaselineError("no saved run")
        run = read(path)
        judgement = judge(run, history(baselines, run) if baselines else Choice(), margin=0.01)
    except BaselineError as error:
        return replace(outcome, has_run=False).failed(without_path(error, path))
    outcome = replace(outcome, missing=judgement.missing, new=judgement.new, has_run=True)
    if judgement.missing:
        outcome = outcome.failed("configurations of the baseline were not measured")
    verdicts = {decision.verdict for decision in decisions(run)}
    if run.invalid:
        return outcome.failed(f"the session is invalid: {run.invalid}")
    if outcome.status != UNMEASURED and Verdict.INVALID in verdicts:
        return outcome.failed("a verdict is INVALID")
    if outcome.status in (NOT_SLOWER, INCONCLUSIVE) and (run.regressed or Verdict.SLOWER in verdicts):
        reasons = (*outcome.reasons, f"the run has the verdict SLOWER, but exit code {outcome.exit_code}")
        return replace(outcome, exit_code=ExitCode.SLOWER, reasons=reasons)
    return outcome


def decisions(run: SavedRun) -> list[Decision]:
    """Return the verdicts stored in a run."""
    return [benchmark.decision for benchmark in run.benchmarks if benchmark.decision is not None]


def without_path(error: Exception, path: Path) -> str:
    """Return the message without the path of the file, which is one of this job alone."""
    return str(error).replace(f"{path}: ", "")
