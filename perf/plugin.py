"""The pytest side of the suite: options, the session fixture, baselines, verdicts, the summary and exit codes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from perf import baselines, benchmark_glue, options, record, selection
from perf.clock import ReplayClock
from perf.journal import JournalError
from perf.lock import DeviceBusy
from perf.machine_stack import stack, torch_version
from perf.nvml import open_visible_device
from perf.protocol import INVALID_SHARE_LIMIT
from perf.report import after_run, terminal
from perf.session import Session, SessionError, run
from perf.statistics import MARGIN_FLOOR
from perf.storage import storage_name
from perf.verdicts import Decision, ExitCode, Verdict

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
        self.stack = stack(self.device, self.gpu)
        self.folder: Path | None = None
        self.choice = baselines.Choice()
        self.comparing = False
        self.session: Session | None = None
        self.error: str | None = None
        self.infos: dict[str, dict] = {}
        self.decisions: dict[str, Decision] = {}
        self.judgement: baselines.Judgement | None = None
        self.problems: list[str] = []  # why the run is not the whole suite
        self.failed: set[str] = set()  # tests that failed for another reason than being slower
        self.slower: set[str] = set()
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
        return ", ".join(problems) or None


def pytest_addoption(parser):
    """Options of `pytest perf`."""
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Before pytest-benchmark reads its options: where runs are stored, and which of them is the baseline."""
    for line in selection.markers():
        config.addinivalue_line("markers", line)
    if not hasattr(config.option, "benchmark_save_data") or hasattr(config, "workerinput"):
        return
    state = config.stash[STATE] = State(config)
    # Summary statistics alone cannot be compared honestly: a save without its rounds is never written.
    config.option.benchmark_save_data = True
    if config.option.benchmark_storage == DEFAULT_STORAGE:
        state.folder = config.rootpath / ".benchmarks" / storage_name(state.stack)
        config.option.benchmark_storage = f"file://{state.folder}"
    elif config.option.benchmark_storage.startswith("file://"):
        state.folder = Path(config.option.benchmark_storage[len("file://") :]).absolute()
    if config.getoption("perf_aa") and not config.option.benchmark_save and not config.option.benchmark_autosave:
        config.option.benchmark_save = "aa"
    if not config.option.collectonly:
        _choose_baseline(config, state)


def _choose_baseline(config, state: State) -> None:
    compare = config.option.benchmark_compare
    state.comparing = bool(compare)
    failing, strict = config.option.benchmark_compare_fail, config.getoption("perf_strict")
    if not compare:
        if failing:
            raise pytest.UsageError(
                "--benchmark-compare-fail needs --benchmark-compare: what should it be compared with?"
            )
        return
    if state.folder is None:
        return  # another kind of storage is pytest-benchmark's own affair
    if isinstance(compare, str) and (Path(compare).is_dir() or compare.endswith(".py")):
        raise pytest.UsageError(
            f"--benchmark-compare took {compare!r} for the name of a saved run; put it first, or write "
            f"--benchmark-compare=NAME: pytest {compare} --benchmark-compare"
        )
    measuring = options.settings(config, state.device, state.folder, MARGIN_FLOOR)
    try:
        state.choice = baselines.candidates(
            state.folder, state.stack, measuring.clock, measuring.threads, measuring.isolated
        )
        named = _named_baseline(config, state, compare, measuring) if isinstance(compare, str) else None
    except baselines.BaselineError as error:
        raise pytest.UsageError(str(error)) from None
    if named is not None:
        others = tuple(run for run in state.choice.history if run.path != named.path)
        state.choice = baselines.Choice((*others, named), state.choice.refused)
    newest = state.choice.newest
    if newest is not None:
        config.option.benchmark_compare = str(newest.path)
        return
    refused = "".join(f"\n  {path.name}: {reason}" for path, reason in state.choice.refused)
    words = f"there is no baseline in {state.folder} for this machine; save one with --benchmark-autosave{refused}"
    if failing or strict:
        raise pytest.UsageError(words)
    config.option.benchmark_compare = []  # pytest-benchmark would take a damaged or foreign one
    config.get_terminal_writer().line(f"perf: {words}", yellow=True)


def _named_baseline(config, state: State, compare: str, measuring) -> baselines.SavedRun:
    """The run that the user named, which may be one that would not be chosen by itself; that is then said."""
    path = Path(compare)
    if not path.is_file():
        found = sorted(state.folder.rglob(f"{compare.rstrip('*')}*.json"))
        if not found:
            raise pytest.UsageError(f"--benchmark-compare={compare}: no saved run in {state.folder} has that name")
        path = found[-1]
    saved = baselines.read(path)
    here = {
        **state.stack,
        "clock": measuring.clock,
        "threads": measuring.threads,
        "isolated": measuring.isolated,
    }
    foreign = baselines.why_foreign(saved.machine, here)
    if foreign and not config.getoption("perf_foreign"):
        raise pytest.UsageError(f"{path}: was measured elsewhere: {foreign}; --perf-foreign compares all the same")
    if saved.why_no_candidate:
        config.get_terminal_writer().line(f"perf: the baseline {path.name} is {saved.why_no_candidate}", yellow=True)
    return saved


def pytest_sessionstart(session):
    """pytest-benchmark has made its session by now."""
    benchmark_glue.write_whole_files(session.config)


def pytest_report_header(config):
    """One line that says what is measured on."""
    state = config.stash.get(STATE, None)
    if state is None:
        return None
    return f"perf: torch {torch_version('__version__') or 'not installed'} on {state.stack['name']}"


def pytest_generate_tests(metafunc):
    """Tests of a `configuration` have one for every configuration of every set."""
    if "configuration" in metafunc.fixturenames and STATE in metafunc.config.stash:
        state = metafunc.config.stash[STATE]
        metafunc.parametrize("configuration", selection.parameters(state.values, state.device))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out what was not asked for; refuse to measure in parallel."""
    state = config.stash.get(STATE, None)
    if state is None:
        return
    stay = selection.leave_out(config, items, state.values, state.device)
    if len(stay) < len(items):
        items[:] = stay
    measuring = any(selection.configuration_of(item) for item in items)
    disabled = config.option.benchmark_disable and not config.option.benchmark_enable
    if measuring and not disabled and config.getoption("numprocesses", None):
        raise pytest.UsageError("measurements cannot run beside each other: leave out -n, or give --benchmark-disable")
    if measuring and any("::" in argument for argument in config.args):
        state.problems.append("selected by test id")


def pytest_deselected(items):
    """A run from which -k or --deselect took configurations is not the whole suite."""
    taken = [item for item in items if selection.configuration_of(item)]
    if taken and not taken[0].config.option.markexpr:
        state = taken[0].config.stash[STATE]
        state.problems.append(f"deselected {len(taken)}")


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
        except (SessionError, DeviceBusy, JournalError, PermissionError) as error:
            state.error = str(error)
            pytest.fail(state.error, pytrace=False)
        _judge(config, state)
    return state.session


def _measure(request, config, state: State) -> Session:
    chosen = list(dict.fromkeys(filter(None, map(selection.configuration_of, request.session.items))))
    if state.folder is None:
        state.folder = Path(tempfile.mkdtemp(prefix="sd-perf-"))
    settings = options.settings(config, state.device, state.folder, state.choice.margin)
    reference = config.getoption("perf_against")
    if reference:
        name, interpreter, folder = options.other_commit(reference, config.rootpath)
        state.keep.append(folder)
        settings = replace(settings, against=(name, interpreter))
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
            else baselines.judge(current, state.choice, state.choice.margin)
        )
        for id, decision in state.judgement.decisions.items():
            state.decisions.setdefault(id, decision)
    for id, decision in state.decisions.items():
        if id in state.infos:
            state.infos[id]["verdict"] = decision.as_dict()


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
            reason = f"{kind}: {message}" if kind else perf_session.why_no_rounds(configuration.id)
            pytest.fail(f"INVALID {configuration.id}: {reason}", pytrace=False)
        benchmark.group = group
        benchmark.extra_info.update(state.infos[configuration.id])
        clock.load(rounds)
        benchmark.pedantic(clock.advance, rounds=len(rounds))
        decision = state.decisions.get(configuration.id)
        if decision is None:
            return
        record_property("verdict", str(decision))
        if decision.verdict is Verdict.SLOWER:
            state.slower.add(request.node.nodeid)
        if decision.verdict in (Verdict.SLOWER, Verdict.INVALID):
            pytest.fail(f"{configuration.id}: {decision}", pytrace=False)

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
    """Whether the machines are alike has been asked by perf.baselines, of the facts that matter."""
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json):
    """What the session as a whole was, and whether it may become a baseline."""
    state = config.stash.get(STATE, None)
    if state is not None and state.session is not None:
        regressed = [id for id, decision in state.decisions.items() if decision.verdict is Verdict.SLOWER]
        output_json["perf"] = record.perf_block(state.session, state.partial, regressed)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Exit codes: see perf.verdicts.ExitCode. What failed comes before what is slower, and that before what is not known."""
    state = session.config.stash.get(STATE, None)
    if state is None:
        return
    if benchmark_glue.save_error(session.config):
        session.exitstatus = ExitCode.FAILED
    if state.session is None:
        return
    if state.session.interrupted:
        session.exitstatus = pytest.ExitCode.INTERRUPTED
    elif session.exitstatus == pytest.ExitCode.TESTS_FAILED and state.slower and not state.failed:
        session.exitstatus = ExitCode.SLOWER
    elif session.exitstatus == pytest.ExitCode.OK:
        thrown, total = state.session.measurements.counts()
        if total and thrown > INVALID_SHARE_LIMIT * total:
            session.exitstatus = ExitCode.FAILED
        elif session.config.getoption("perf_strict"):
            undecided = [one for one in state.decisions.values() if one.verdict is Verdict.INCONCLUSIVE]
            session.exitstatus = ExitCode.INCONCLUSIVE if undecided else ExitCode.OK


def pytest_terminal_summary(terminalreporter, config):
    """The table, and what should be known about it."""
    state = config.stash.get(STATE, None)
    if state is not None and state.session is not None:
        terminal.write(terminalreporter, state.session, state.infos, state.decisions, state.judgement, state.partial)
        if config.getoption("perf_report"):
            document = benchmark_glue.document(config)
            folder, traces = Path(config.getoption("perf_report")), state.session.settings.trace
            after_run.write(document, folder, state.folder, traces, terminalreporter.write_line)
