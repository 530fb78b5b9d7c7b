"""What came of one measurement, and how it is said: could not measure and slower are two things, everywhere.

An outcome travels from the machine that measured to the one that publishes, as data: it is read as strictly as a saved run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from house import NAME, SHA, Refusal, read_json

from perf.analysis.verdicts import ExitCode, Verdict
from perf.runs.baselines import Choice, candidates, judge
from perf.runs.saved_run import BaselineError, SavedRun, read

SCHEMA = 1
NOT_SLOWER, SLOWER, INCONCLUSIVE, UNMEASURED = "not slower", "slower", "inconclusive", "could not measure"
KINDS = {ExitCode.OK: NOT_SLOWER, ExitCode.SLOWER: SLOWER, ExitCode.INCONCLUSIVE: INCONCLUSIVE}
WORST_FIRST = (UNMEASURED, SLOWER, INCONCLUSIVE, NOT_SLOWER)
FILE, RUN = "outcome.json", "run.json"
PYTEST_SAYS = {
    1: "a picture was wrong, or a configuration could not be measured",
    2: "it was interrupted",
    3: "pytest failed in itself",
    4: "the command line or the baseline was refused",
    5: "no configuration was selected",
}


@dataclass(frozen=True)
class Outcome:
    """One series on one machine. exit_code: perf.analysis.verdicts.ExitCode; missing: configurations that the baseline has."""

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
    def kind(self) -> str:
        """What the exit code means."""
        return KINDS.get(self.exit_code, UNMEASURED)

    def write(self, folder: Path) -> None:
        """Leave it beside its run."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1), encoding="utf-8")


def load(folder: Path) -> Outcome:
    """The outcome in a folder. Raises Refusal for anything that `write` does not write."""
    document = read_json(folder / FILE)
    if document.pop("schema", None) != SCHEMA or document.keys() != Outcome.__dataclass_fields__.keys():
        raise Refusal(f"{FILE}: is no outcome of this version")
    for key, known in (("label", NAME), ("series", NAME), ("sha", SHA)):
        if not isinstance(document[key], str) or not known.fullmatch(document[key]):
            raise Refusal(f"{FILE}: {key} is not what it should be")
    for key in ("reasons", "missing", "new"):
        texts = document[key]
        if not isinstance(texts, list) or not all(isinstance(one, str) and len(one) < 1000 for one in texts):
            raise Refusal(f"{FILE}: {key} is no list of texts")
        document[key] = tuple(texts)
    against = document["against"]
    if type(document["exit_code"]) is not int or type(document["has_run"]) is not bool:
        raise Refusal(f"{FILE}: exit_code or has_run is not what it should be")
    if against is not None and not (isinstance(against, str) and SHA.fullmatch(against)):
        raise Refusal(f"{FILE}: against is no commit")
    return Outcome(**document)


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """The worst of several: what could not be measured, then what is slower, then what is not known."""
    ranked = sorted(outcomes, key=lambda one: WORST_FIRST.index(one.kind))
    if not ranked or ranked[0].kind == UNMEASURED:
        return ExitCode.FAILED
    return ranked[0].exit_code


def history(folder: Path, run: SavedRun) -> Choice:
    """The stored sessions under a folder that a run may be judged against: of its machine, and older than itself."""
    facts = run.machine
    threads = facts["threads"]
    choice = candidates(
        folder,
        facts,
        str(facts["clock"]),
        int(threads) if isinstance(threads, (int, float)) else None,
        isolated=facts["isolated"] is True,
    )
    begin = run.started_unix_seconds or 0.0
    return replace(choice, history=tuple(one for one in choice.history if (one.started_unix_seconds or 0.0) < begin))


def examine(outcome: Outcome, folder: Path, baselines: Path | None) -> Outcome:
    """An outcome with what pytest's exit code does not say: a configuration that is stored and was not measured fails.

    folder: where its run is, if it has one; baselines: its series, None for a run that is compared in itself. What
    contradicts the exit code is a failure too, whoever wrote it.
    """
    reasons = list(outcome.reasons)
    path = folder / RUN
    if not path.is_file() or path.is_symlink():
        return replace(
            outcome, has_run=False, exit_code=_at_least_failed(outcome), reasons=(*reasons, "it left no run")
        )
    try:
        run = read(path)
        judgement = judge(run, history(baselines, run) if baselines else Choice(), margin=0.01)
    except BaselineError as error:
        said = str(error).replace(f"{path}: ", "")
        return replace(outcome, has_run=False, exit_code=_at_least_failed(outcome), reasons=(*reasons, said))
    code = outcome.exit_code
    if judgement.missing:
        code = _at_least_failed(outcome)
        reasons.append("configurations that are in the baseline were not measured")
    words = {decision.verdict for decision in decisions(run)}
    if run.invalid:
        code, reasons = _at_least_failed(outcome), [*reasons, f"the session is invalid: {run.invalid}"]
    elif code in KINDS and Verdict.INVALID in words:
        code, reasons = ExitCode.FAILED, [*reasons, "a verdict is INVALID"]
    elif KINDS.get(code) in (NOT_SLOWER, INCONCLUSIVE) and (run.regressed or Verdict.SLOWER in words):
        code, reasons = ExitCode.SLOWER, [*reasons, "the run says SLOWER, its exit code did not"]
    return replace(
        outcome, exit_code=code, reasons=tuple(reasons), missing=judgement.missing, new=judgement.new, has_run=True
    )


def _at_least_failed(outcome: Outcome) -> int:
    return outcome.exit_code if outcome.kind == UNMEASURED else int(ExitCode.FAILED)


def decisions(run: SavedRun) -> list:
    """The verdicts that stand in a run."""
    return [one.decision for one in run.benchmarks if one.decision is not None]
