"""State of one `pytest perf` run: machine, options, measured session, verdicts and exit status."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from perf.analysis.counts import CountsComparison
from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import Decision, ExitCode, Verdict
from perf.configurations.configuration import Configuration
from perf.configurations.project import Project
from perf.machine.nvml import open_visible_device
from perf.machine.stack import stack
from perf.plugin import benchmark_bridge, options, preflight, selection, sides
from perf.plugin.baseline_option import Comparison, choose
from perf.runs import baselines
from perf.runs.storage import storage_name
from perf.session import record
from perf.session.journal import Recorded, unfinished
from perf.session.run import Session
from perf.session.settings import Settings
from perf.worker.wire import NO_REFERENCE

DEFAULT_STORAGE = "file://./.benchmarks"


@dataclass(frozen=True)
class Results:
    """A measured session with the saved data and the verdicts of its configurations, by id."""

    session: Session
    infos: dict[str, dict] = field(default_factory=dict)
    decisions: dict[str, Decision] = field(default_factory=dict)
    judgement: baselines.Judgement | None = None  # against stored sessions
    counts: dict[str, CountsComparison] = field(default_factory=dict)
    choice: baselines.Choice = field(default_factory=baselines.Choice)  # without stored copies of this session

    @property
    def not_compared(self) -> dict[str, str]:
        """Configurations without a verdict although the session measures a second side of each, with the reason.

        But for those that are unavailable on both sides, which are skipped.
        """
        measured, variant = self.session.measurements.by_name, self.session.settings.variant
        reasons = {}
        for id in [slot.configuration.id for slot in self.session.plan.own_slots] if variant else []:
            sides = [name for name in (id, f"{id}@{variant}") if name in measured]
            failures = {name: measured[name].failure for name in sides}
            unavailable = [failure is not None and failure.kind == "unavailable" for failure in failures.values()]
            if id not in self.decisions and not all(unavailable):
                failed = [f"{name}: {': '.join(failure)}" for name, failure in failures.items() if failure]
                reasons[id] = "; ".join(failed) or "too few rounds"
        return reasons

    @property
    def regressed(self) -> set[str]:
        """Configurations that are SLOWER; only comparisons with stored sessions and commits count.

        The noise of A/A comparisons defines the margin, and --perf-b is another configuration and no earlier state.
        """
        decisions = [*self.session.decisions.items()] if self.session.settings.against else []
        decisions += self.judgement.decisions.items() if self.judgement else []
        return {id for id, decision in decisions if decision.verdict is Verdict.SLOWER}


def evaluate(session: Session, comparison: Comparison) -> Results:
    """Compute the saved data of every measured configuration and its verdict against the baseline."""
    measured = [session.measurements.by_name[slot.name] for slot in session.plan.slots if slot.variant is None]
    ids = [one.slot.configuration.id for one in measured if one.failure is None and one.rounds()]
    infos = {id: record.extra_info(session, id) for id in ids}
    decisions, judgement = dict(session.decisions), None
    choice = comparison.choice.without(session.started_unix_seconds)  # a resumed session may be stored already
    baseline, counted = comparison.choice.newest, [choice.named] if choice.named else choice.counted
    current = record.saved_run(session, infos) if infos and (baseline or counted) else None
    counts = baselines.compare_counts(current, counted) if current else {}
    counts |= {id: record.compare_counts(session, id) for id in infos if session.settings.variant}
    if baseline is not None and current is not None:
        if baselines.why_foreign(baseline.machine, current.machine):
            judgement = baselines.judge_foreign(current, baseline)
        else:
            judgement = baselines.judge(current, choice, comparison.margin)
        decisions = {**judgement.decisions, **decisions}
    for id, decision in decisions.items():
        if id in infos:
            infos[id]["verdict"] = decision.as_dict()
    for id, info in infos.items():
        info["marks"] = record.marks(session, info, decisions.get(id))
    for id, compared in counts.items():
        infos[id]["counts_comparison"] = compared.as_dict()
    return Results(session, infos, decisions, judgement, counts, choice)


@dataclass
class RunState:
    """The state that the hooks of one pytest run share.

    values: configuration fields set by options. parameters: a pytest.param for every configuration of every set.
    project: the configuration file.
    sides: the options of --perf-a and --perf-b. seconds: the configuration of --perf-b for each one of --perf-a.
    folder: the storage, None if it is no folder. parallel: a pytest-xdist worker collected measurements. error: the
    reason why the session could not be measured. problems: reasons why the run is not the whole suite. failed, slower:
    node ids. regressed: ids found slower by --benchmark-compare-fail. reported: ids whose test has run. unfinished: the
    interrupted sessions of this machine. closing_lines: about the report, printed last.
    """

    device: str
    stack: dict
    values: dict[str, list]
    parameters: list
    project: Project = field(default_factory=Project)
    sides: tuple[sides.Side, sides.Side] | None = None
    seconds: dict[Configuration, Configuration] = field(default_factory=dict)
    folder: Path | None = None
    settings: Settings | None = None
    comparison: Comparison = field(default_factory=Comparison)
    parallel: bool = False
    results: Results | None = None
    error: str | None = None
    problems: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    slower: set[str] = field(default_factory=set)
    regressed: set[str] = field(default_factory=set)
    reported: set[str] = field(default_factory=set)
    unfinished: list[Recorded] = field(default_factory=list)
    closing_lines: list[str] = field(default_factory=list)
    cleanup: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def partial(self) -> str | None:
        """Why this run is not the whole suite, or None."""
        problems = [*self.problems, *([f"{len(self.failed)} failed"] if self.failed else [])]
        if self.results:
            session, unreported = self.results.session, set(self.results.infos) - self.reported
            problems += ["interrupted"] if session.interrupted else []
            unchecked = [id for id, reason in session.unchecked.items() if reason != NO_REFERENCE]
            problems += [f"{len(unchecked)} without a reference image"] if unchecked else []
            problems += ["slowed down on purpose"] if session.settings.slowdown else []
            problems += [f"{len(unreported)} measured, but not reported"] if unreported else []  # -x, --maxfail
        return ", ".join(problems) or None


STATE = pytest.StashKey[RunState]()


def create(config) -> RunState:
    """The state after reading the options. Raises pytest.UsageError for options that cannot work."""
    gpu = open_visible_device()
    device = options.machine_device(config, gpu)
    project = options.project(config)
    labels = [text.partition("=")[0] for text in config.getoption("perf_python")]
    values = selection.with_interpreters(options.matrix_values(config), labels)
    pair = sides.read(config)
    if pair is None:
        return RunState(device, stack(device, gpu), values, selection.parameters(values, device, project), project)
    seconds = sides.pairs(*pair, values, device)
    parameters = [
        pytest.param(first, id=first.id, marks=getattr(pytest.mark, selection.MATRIX)) for first, _ in seconds
    ]
    values = values or {"model": [seconds[0][0].model]}  # options select the set `matrix`
    return RunState(device, stack(device, gpu), values, parameters, project, sides=pair, seconds=dict(seconds))


def set_storage(config, state: RunState) -> None:
    """Set the storage folder and the options of pytest-benchmark that depend on it."""
    config.option.benchmark_save_data = True  # a run without raw rounds cannot be compared
    storage = config.option.benchmark_storage
    if storage == DEFAULT_STORAGE:
        state.folder = config.rootpath / ".benchmarks" / storage_name(state.stack)
        config.option.benchmark_storage = f"file://{state.folder}"
    elif storage.startswith("file://") or "://" not in storage:  # pytest-benchmark reads a plain path as a folder too
        state.folder = Path(storage.removeprefix("file://")).absolute()
    if config.getoption("perf_aa") and not config.option.benchmark_save and not config.option.benchmark_autosave:
        config.option.benchmark_save = "aa"


def create_late(config) -> RunState:
    """The state of a suite that is found to request `measured`, after pytest-benchmark has chosen its storage."""
    state = config.stash[STATE] = create(config)
    state.folder = benchmark_bridge.folder(config)
    benchmark_bridge.save_rounds(config)
    compare = config.option.benchmark_compare
    prepare_session(config, state)
    config.option.benchmark_compare = compare
    return state


def prepare_session(config, state: RunState) -> None:
    """Validate the settings, the baseline and the other commit before collection, so that no error costs a measurement."""
    preflight.check_outputs(config)
    preflight.apply_all_compare_fail(config)
    preflight.name_autosave(config)
    state.settings = options.settings(config, state.device, state.folder or Path(), MARGIN_FLOOR)
    state.settings = replace(state.settings, selection=selection.described(config, state.values))
    if state.sides:
        state.settings = sides.add_interpreters(state.settings, state.sides)
    state.comparison = choose(config, state.folder, state.stack, state.settings)
    margin = max(state.comparison.margin, state.project.margin or 0.0)
    state.comparison = replace(state.comparison, margin=margin)
    if not state.settings.resume and state.folder is not None:
        state.unfinished = unfinished(state.folder / "journal")
    reference = config.getoption("perf_against")
    if reference:
        name, interpreter, folder = options.other_commit(reference, config.rootpath)
        state.cleanup.callback(folder.cleanup)
        state.settings = replace(state.settings, against=(name, interpreter))


def exit_status(state: RunState, status: int, unsaved: bool, regressed: bool, strict: bool) -> int:
    """The exit status (perf.analysis.verdicts.ExitCode) for pytest's own `status`.

    Failures take precedence over SLOWER, and SLOWER over INCONCLUSIVE. unsaved: the run could not be saved. regressed:
    --benchmark-compare-fail found a regression in a benchmark without a configuration.
    """
    if state.parallel:
        return ExitCode.REFUSED
    if unsaved:
        status = ExitCode.FAILED
    results = state.results
    if results and results.session.interrupted:
        return pytest.ExitCode.INTERRUPTED
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and (state.slower or regressed):
        return ExitCode.FAILED if state.failed or unsaved else ExitCode.SLOWER
    if status != pytest.ExitCode.OK or not results:
        return status
    if results.session.invalid:
        return ExitCode.FAILED
    if strict:
        # A configuration that is missing although no option excluded it may have stopped working.
        if not state.problems and results.judgement and results.judgement.missing:
            return ExitCode.FAILED
        # Nothing was compared, or a side of a pair is lacking.
        if results.not_compared or not results.decisions:
            return ExitCode.FAILED
        if any(decision.verdict is Verdict.INCONCLUSIVE for decision in results.decisions.values()):
            return ExitCode.INCONCLUSIVE
    return status
