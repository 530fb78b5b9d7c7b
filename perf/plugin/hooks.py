"""The pytest side of the suite: options, the session fixture, baselines, verdicts, the summary and exit codes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import Decision, ExitCode, Verdict
from perf.machine.nvml import open_visible_device
from perf.machine.stack import stack, torch_version
from perf.plugin import after_run, options, selection, terminal
from perf.plugin import benchmark_bridge as benchmark_glue
from perf.plugin.baseline_option import choose
from perf.plugin.benchmark_bridge import ReplayClock
from perf.runs import baselines
from perf.runs.storage import storage_name
from perf.session import record
from perf.session.journal import JournalError
from perf.session.lock import DeviceBusy
from perf.session.measurements import INVALID_SHARE_LIMIT
from perf.session.run import Session, run
from perf.session.settings import SessionError, Settings

DEFAULT_STORAGE = "file://./.benchmarks"
STATE = pytest.StashKey["State"]()


class State:
    """What one pytest run knows: the machine, the choice of baselines, and later the measured session."""

    def __init__(self, config):
        self.gpu = open_visible_device()
        self.device = options.machine_device(config, self.gpu)
        self.values = selection.with_interpreters(
            options.given(config), [text.partition("=")[0] for text in config.getoption("perf_python")]
        )
        self.parameters = selection.parameters(self.values, self.device)
        self.stack = stack(self.device, self.gpu)
        self.folder: Path | None = None
        self.settings: Settings | None = None
        self.choice = baselines.Choice()
        self.margin = MARGIN_FLOOR
        self.notices: list[str] = []  # to be said as soon as there is a terminal
        self.parallel = False  # whether a process of pytest-xdist had measurements
        self.session: Session | None = None
        self.error: str | None = None
        self.infos: dict[str, dict] = {}
        self.decisions: dict[str, Decision] = {}
        self.judgement: baselines.Judgement | None = None
        self.problems: list[str] = []  # why the run is not the whole suite
        self.failed: set[str] = set()  # tests that failed for another reason than being slower
        self.slower: set[str] = set()
        self.regressed: set[str] = set()  # configurations that --benchmark-compare-fail found slower
        self.reported: set[str] = set()  # configurations whose test has run
        self.keep: list = []  # what must live as long as the run

    @property
    def partial(self) -> str | None:
        """Why this is not the whole suite, or None."""
        problems = [*self.problems, *([f"{len(self.failed)} failed"] if self.failed else [])]
        if self.session and self.session.interrupted:
            problems.append("interrupted")
        if self.session and self.session.unchecked:
            problems.append(f"{len(self.session.unchecked)} without a reference picture")
        if self.session and self.session.settings.slowdown:
            problems.append("slowed down on purpose")
        unreported = set(self.infos) - self.reported
        if unreported:  # -x, or --maxfail
            problems.append(f"{len(unreported)} measured, but not reported")
        return ", ".join(problems) or None


def pytest_addoption(parser):
    """Options of `pytest perf`."""
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Before pytest-benchmark reads its options: where runs are stored, and which of them is the baseline."""
    for line in selection.markers():
        config.addinivalue_line("markers", line)
    if not hasattr(config.option, "benchmark_save_data"):
        return
    state = config.stash[STATE] = State(config)
    if hasattr(config, "workerinput"):  # a process of pytest-xdist collects as the others do, and measures nothing
        return
    # Summary statistics alone cannot be compared honestly: a save without its rounds is never written.
    config.option.benchmark_save_data = True
    storage = config.option.benchmark_storage
    if storage == DEFAULT_STORAGE:
        state.folder = config.rootpath / ".benchmarks" / storage_name(state.stack)
        config.option.benchmark_storage = f"file://{state.folder}"
    elif storage.startswith("file://") or "://" not in storage:  # a plain path is a folder, to pytest-benchmark too
        state.folder = Path(storage.removeprefix("file://")).absolute()
    if config.getoption("perf_aa") and not config.option.benchmark_save and not config.option.benchmark_autosave:
        config.option.benchmark_save = "aa"
    if not config.option.collectonly:
        # Before anything is collected: what is wrong with the command line must not cost a measurement.
        state.settings = options.settings(config, state.device, state.folder or Path(), MARGIN_FLOOR)
        state.choice, state.margin, state.notices = choose(config, state.folder, state.stack, state.settings)
        reference = config.getoption("perf_against")
        if reference:
            name, interpreter, folder = options.other_commit(reference, config.rootpath)
            state.keep.append(folder)
            state.settings = replace(state.settings, against=(name, interpreter))


def pytest_sessionstart(session):
    """pytest-benchmark has made its session by now, and pytest its terminal."""
    state = session.config.stash.get(STATE, None)
    if state is None or hasattr(session.config, "workerinput"):
        return
    benchmark_glue.take_over(session.config)
    for words in state.notices:
        session.config.get_terminal_writer().line(f"perf: {words}", yellow=True)


def pytest_report_header(config):
    """One line that says what is measured on."""
    state = config.stash.get(STATE, None)
    if state is None:
        return None
    return f"perf: torch {torch_version('__version__') or 'not installed'} on {state.stack['name']}"


def pytest_generate_tests(metafunc):
    """Tests of a `configuration` have one for every configuration of every set."""
    names = metafunc.fixturenames
    if "configuration" in names and "perf_session" in names and STATE in metafunc.config.stash:
        state = metafunc.config.stash[STATE]
        metafunc.parametrize("configuration", state.parameters)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what was not asked for; refuse to measure in parallel."""
    state = config.stash.get(STATE, None)
    if state is None:
        return
    stay = selection.leave_out(config, items, state.values, state.device)
    if len(stay) < len(items):
        items[:] = stay
    measuring = [item for item in items if selection.configuration_of(item)]
    if measuring and hasattr(config, "workerinput"):
        config.workeroutput["perf_measuring"] = True
        items[:] = [item for item in items if item not in measuring]
    if measuring and selection.named_tests(config):
        state.problems.append("selected by test id")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """A process of pytest-xdist has ended: it says whether it left out measurements."""
    state = node.config.stash.get(STATE, None)
    if state is not None and getattr(node, "workeroutput", {}).get("perf_measuring"):
        state.parallel = True


def pytest_deselected(items):
    """A run from which -k or --deselect took configurations is not the whole suite; -m names another suite."""
    if not items or STATE not in items[0].config.stash:
        return
    config = items[0].config
    state = config.stash[STATE]
    taken = [item for item in items if selection.configuration_of(item)]
    taken = selection.leave_out(config, taken, state.values, state.device)
    if taken and not config.option.markexpr:
        state.problems.append(f"deselected {len(taken)}")
    elif taken and any(config.getoption(name, None) for name in ("keyword", "deselect", "lf", "stepwise")):
        state.problems = ["narrowed by more than -m"]


@pytest.fixture(scope="session")
def perf_session(request) -> Session:
    """The measured session of all selected configurations; the first test that asks for it measures them all."""
    config = request.config
    state = config.stash[STATE]
    if state.error:
        pytest.fail(state.error, pytrace=False)
    if state.session is None:
        try:
            state.session = _measure(request, config, state)
        except (SessionError, DeviceBusy, JournalError, OSError) as error:
            state.error = str(error)
            pytest.fail(state.error, pytrace=False)
        _judge(config, state)
    return state.session


def _measure(request, config, state: State) -> Session:
    chosen = list(dict.fromkeys(filter(None, map(selection.configuration_of, request.session.items))))
    if state.folder is None:
        state.folder = Path(tempfile.mkdtemp(prefix="sd-perf-"))
    settings = replace(state.settings, folder=state.folder, margin=state.margin)
    capture = config.pluginmanager.getplugin("capturemanager")
    writer = config.get_terminal_writer()
    with capture.global_and_fixture_disabled():
        writer.line()
        return run(settings, chosen, lambda words: writer.line(words))


def _judge(config, state: State) -> None:
    session = state.session
    good = [slot.configuration.id for slot in session.plan.slots if slot.variant is None]
    good = [id for id in good if session.measurements.by_name[id].failure is None]
    good = [id for id in good if session.measurements.by_name[id].rounds()]
    state.infos = {id: record.extra_info(session, id) for id in good}
    state.decisions = dict(session.decisions)
    if state.choice.newest is not None and state.infos:
        current = record.saved_run(session, state.infos)
        foreign = baselines.why_foreign(state.choice.newest.machine, current.machine)
        state.judgement = (
            baselines.judge_foreign(current, state.choice.newest)
            if foreign
            else baselines.judge(current, state.choice, state.margin)
        )
        for id, decision in state.judgement.decisions.items():
            state.decisions.setdefault(id, decision)
    for id, decision in state.decisions.items():
        if id in state.infos:
            state.infos[id]["verdict"] = decision.as_dict()


def _other_side(session: Session, id: str):
    """What was measured of a configuration's second label in this session, if it has one."""
    return session.measurements.by_name[f"{id}@{session.settings.variant}"] if session.settings.variant else None


@pytest.fixture
def measured(request, benchmark, record_property, configuration, perf_session):
    """Hands a configuration's rounds to `benchmark`, or skips or fails with the reason why there are none.

    Use: `measured(clock, group)` in a test marked `benchmark(timer=clock)` with a ReplayClock: afterwards `benchmark`
    holds the recorded rounds as if they had just been measured.
    """
    state = request.config.stash[STATE]

    def replay(clock: ReplayClock, group: str) -> None:
        one = perf_session.measurements.by_name[configuration.id]
        kind, message = one.failure or (None, None)
        if kind == "unavailable":
            pytest.skip(message)
        rounds = [each["seconds"] for each in one.rounds()]
        if kind or not rounds:
            benchmark_glue.leave_unused(benchmark)
            reason = f"{kind}: {message}" if kind else perf_session.why_no_rounds(configuration.id)
            pytest.fail(f"INVALID {configuration.id}: {reason}", pytrace=False)
        state.reported.add(configuration.id)
        benchmark.group = group
        benchmark.extra_info.update(state.infos[configuration.id])
        clock.load(rounds)
        benchmark.pedantic(clock.advance, rounds=len(rounds))
        regressions = benchmark_glue.regressions(request.config, benchmark, configuration.id, state.choice.history)
        if regressions:
            state.regressed.add(configuration.id)
        decision = state.decisions.get(configuration.id)
        if decision is not None:
            record_property("verdict", str(decision))
        other = _other_side(perf_session, configuration.id)
        if other is not None and other.failure:
            pytest.fail(f"INVALID {other.slot.name}: {': '.join(other.failure)}", pytrace=False)
        if decision is not None and decision.verdict is Verdict.INVALID:
            pytest.fail(f"{configuration.id}: {decision}", pytrace=False)
        if decision is not None and decision.verdict is Verdict.SLOWER:
            regressions.insert(0, str(decision))
        if regressions:
            state.slower.add(request.node.nodeid)
            pytest.fail("\n".join(f"{configuration.id}: {words}" for words in regressions), pytrace=False)

    return replay


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Which tests failed, but for those that were only slower."""
    report = (yield).get_result()
    state = item.config.stash.get(STATE, None)
    if state is not None and report.failed and report.nodeid not in state.slower:
        state.failed.add(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Add the stack; drop the momentary CPU frequency, which makes every two runs look like two machines."""
    for momentary in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(momentary, None)
    state = config.stash.get(STATE, None)
    if state is not None:
        machine_info["stack"] = state.session.stack if state.session else state.stack


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Whether the machines are alike has been asked by perf.runs.baselines, of the facts that matter."""
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json):
    """What the session as a whole was, and whether it may become a baseline."""
    state = config.stash.get(STATE, None)
    for benchmark in output_json["benchmarks"]:
        if (benchmark["params"] or {}).get("configuration"):  # all its fields are in extra_info
            benchmark["params"] = {**benchmark["params"], "configuration": str(benchmark["params"]["configuration"])}
    if state is not None and state.session is not None:
        # Against itself (--perf-aa) nothing regresses: that is this machine's noise, which the margin is made of.
        compared = [] if state.session.settings.aa else [*state.session.decisions.items()]
        compared += state.judgement.decisions.items() if state.judgement else []
        regressed = state.regressed | {id for id, decision in compared if decision.verdict is Verdict.SLOWER}
        output_json["perf"] = record.perf_block(state.session, state.partial, sorted(regressed))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Exit codes (perf.analysis.verdicts.ExitCode): what failed comes before what is slower, and that before what is not known."""
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    if state.parallel:
        session.exitstatus = ExitCode.REFUSED
        return
    unsaved = benchmark_glue.save_error(session.config)
    if unsaved:
        session.exitstatus = ExitCode.FAILED
    slower = state.slower or benchmark_glue.has_regressed(session.config)
    if state.session is not None and state.session.interrupted:
        session.exitstatus = pytest.ExitCode.INTERRUPTED
    elif session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and slower:
        session.exitstatus = ExitCode.FAILED if state.failed or unsaved else ExitCode.SLOWER
    elif session.exitstatus == pytest.ExitCode.OK and state.session is not None:
        thrown, total = state.session.measurements.counts()
        if total and thrown > INVALID_SHARE_LIMIT * total:
            session.exitstatus = ExitCode.FAILED
        elif session.config.getoption("perf_strict"):
            # What is missing, though nobody left it out, may be so because it cannot run any more.
            missing = not state.problems and state.judgement and state.judgement.missing
            undecided = [one for one in state.decisions.values() if one.verdict is Verdict.INCONCLUSIVE]
            session.exitstatus = ExitCode.FAILED if missing else ExitCode.INCONCLUSIVE if undecided else ExitCode.OK


def pytest_unconfigure(config):
    """The other commit's files are needed no longer."""
    state = config.stash.get(STATE, None)
    for folder in state.keep if state is not None else ():
        folder.cleanup()


def pytest_terminal_summary(terminalreporter, config):
    """The table, and what should be known about it."""
    state = config.stash.get(STATE, None)
    if state is not None and state.parallel:
        terminalreporter.line("perf: measurements cannot run beside each other: leave out -n", red=True)
    if state is not None and state.session is not None:
        terminal.write(terminalreporter, state.session, state.infos, state.decisions, state.judgement, state.partial)
        if config.getoption("perf_report"):
            document = benchmark_glue.document(config)
            folder, traces = Path(config.getoption("perf_report")), state.session.settings.trace
            after_run.write(document, folder, state.folder, traces, terminalreporter.write_line)
