"""pytest hooks and fixtures of the suite. Each hook calls the steps of perf.plugin.state and its sibling modules."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from perf.analysis.verdicts import Decision, ExitCode, Verdict
from perf.configurations.configuration import Configuration
from perf.machine.stack import torch_version
from perf.plugin import benchmark_bridge, options, preflight, selection
from perf.plugin.benchmark_bridge import ReplayClock
from perf.plugin.serve import SERVE, is_worker
from perf.plugin.state import STATE, RunState, create, create_late, evaluate, exit_status, prepare_session, set_storage
from perf.session import record
from perf.session.journal import JournalError
from perf.session.lock import DeviceBusy
from perf.session.run import Session, run
from perf.session.settings import SessionError, SessionRefused

DESELECTED = pytest.StashKey[int]()


def _state(config) -> RunState | None:
    """The state of this run, or None without pytest-benchmark."""
    return config.stash.get(STATE, None)


def pytest_addoption(parser):
    """Define the options of `pytest perf`."""
    options.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Validate the options, before pytest-benchmark reads its own."""
    if is_worker(config) or not (config.pluginmanager.hasplugin("perf.plugin") or options.any_given(config)):
        return
    for line in selection.markers(options.project(config)):
        config.addinivalue_line("markers", line)
    if not hasattr(config.option, "benchmark_save_data"):
        return
    state = config.stash[STATE] = create(config)
    if hasattr(config, "workerinput"):  # a pytest-xdist worker collects but never measures
        return
    set_storage(config, state)
    if not config.option.collectonly:
        prepare_session(config, state)


def pytest_sessionstart(session):
    """Adapt pytest-benchmark's session and print notices, now that both exist."""
    state = _state(session.config)
    if state is None or hasattr(session.config, "workerinput"):
        return
    benchmark_bridge.take_over(session.config)
    benchmark_bridge.compare_plain(session.config, state.comparison.plain)
    for notice in state.comparison.notices:
        session.config.get_terminal_writer().line(f"perf: {notice}", yellow=True)


def pytest_report_header(config):
    """Print the torch version and the device."""
    state = _state(config)
    if state is None:
        return None
    return f"perf: torch {torch_version('__version__') or 'not installed'} on {state.stack['name']}"


def pytest_generate_tests(metafunc):
    """Parametrise tests of a `configuration` with every configuration of every set."""
    state = _state(metafunc.config)
    if state is not None and {"configuration", "perf_session"} <= set(metafunc.fixturenames):
        metafunc.parametrize("configuration", state.parameters)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Keep the selected configurations; drop all of them in a pytest-xdist worker."""
    tests = [item for item in items if selection.test_of(item)]
    if config.getoption("codspeed", False) and (tests or any(map(selection.configuration_of, items))):
        raise pytest.UsageError(
            "--codspeed times a function in this process, and these tests report rounds of other processes: "
            "leave it out, or deselect them"
        )
    state = _state(config)
    if tests and _measures(config):
        options.require_for_own_suite(config)
        if state is None:
            state = create_late(config)
            if DESELECTED in config.stash:
                state.problems.append(f"deselected {config.stash[DESELECTED]}")
            benchmark_bridge.take_over(config)
            for notice in state.comparison.notices:
                config.get_terminal_writer().line(f"perf: {notice}", yellow=True)
    if state is None:
        return
    items[:] = selection.select(config, items, state.values, state.device)
    measuring = [item for item in items if selection.configuration_of(item)]
    if measuring and hasattr(config, "workerinput"):
        config.workeroutput["perf_measuring"] = True
        items[:] = [item for item in items if item not in measuring]
    if measuring and selection.named_tests(config):
        state.problems.append("selected by test id")
    if measuring and state.comparison.missing:
        if state.comparison.gate:
            raise pytest.UsageError(state.comparison.missing)
        config.get_terminal_writer().line(f"perf: {state.comparison.missing}", yellow=True)


def _measures(config) -> bool:
    """Whether benchmarks are timed, in this process."""
    option = config.option
    return not (
        SERVE in config.stash
        or hasattr(config, "workerinput")
        or option.collectonly
        or not hasattr(option, "benchmark_disable")
        or options.disabled(config)
        or getattr(option, "numprocesses", None)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Note that a pytest-xdist worker dropped measurements."""
    state = _state(node.config)
    if state is not None and getattr(node, "workeroutput", {}).get("perf_measuring"):
        state.parallel = True


def pytest_deselected(items):
    """Mark the run as partial if -k or --deselect removed configurations; -m selects another complete suite."""
    state, config = (_state(items[0].config), items[0].config) if items else (None, None)
    if state is None:
        tests = [item for item in items if selection.test_of(item)]
        if tests and (not config.option.markexpr or selection.narrowed(config)):  # others of these may create the state
            config.stash[DESELECTED] = config.stash.get(DESELECTED, 0) + len(tests)
        return
    removed = [item for item in items if selection.configuration_of(item) or selection.test_of(item)]
    removed = selection.select(config, removed, state.values, state.device)
    if removed and not config.option.markexpr:
        state.problems.append(f"deselected {len(removed)}")
    elif removed and selection.narrowed(config):
        state.problems = ["narrowed by more than -m"]


@pytest.fixture(scope="session")
def perf_session(request) -> Session:
    """The measured session; the first test that requests it measures all selected configurations."""
    state = request.config.stash[STATE]
    if state.error:
        pytest.fail(state.error, pytrace=False)
    if state.results is None:
        try:
            session = _measure(request, state)
        except (SessionRefused, DeviceBusy, pytest.UsageError) as error:
            pytest.exit(f"perf: {error}", returncode=ExitCode.REFUSED)
        except (SessionError, JournalError, OSError) as error:
            state.error = str(error)
            pytest.fail(state.error, pytrace=False)
        state.results = evaluate(session, state.comparison)
        copies = set(state.comparison.choice.paths) - set(state.results.choice.paths)
        benchmark_bridge.leave_out(request.config, copies)
    return state.results.session


def _measure(request, state: RunState) -> Session:
    # Not above, as pytest loads this module at every start; and before the rounds, which an error at the end would lose.
    from perf.plugin import after_run, terminal  # noqa: F401

    selected = [selection.configuration_of(item) or selection.test_of(item) for item in request.session.items]
    configurations = list(dict.fromkeys(filter(None, selected)))
    by_id: dict[str, Configuration] = {}
    for configuration in configurations:
        other = by_id.setdefault(configuration.id, configuration)
        if other != configuration:
            raise pytest.UsageError(
                f"two tests are both called {other.id}: {other.engine} and {configuration.engine}; rename one of them"
            )
    if state.settings.against:
        own = {configuration.own for configuration in configurations}
        against = options.complete(state.settings.against, request.config.rootpath, True in own, False in own)
        state.settings = replace(state.settings, against=against)
    if state.folder is None:
        state.folder = Path(tempfile.mkdtemp(prefix="sd-perf-"))
    second = {configuration.id: state.seconds[configuration] for configuration in configurations if state.seconds}
    settings = replace(state.settings, folder=state.folder, margin=state.comparison.margin, second=second)
    writer = request.config.get_terminal_writer()
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        writer.line()
        for recorded in state.unfinished:
            writer.line(
                f"perf: unfinished session {recorded}: the same command with --perf-resume={recorded.name} resumes it, "
                f"and sd-perf unfinished --storage {state.folder} --drop {recorded.name} deletes it",
                yellow=True,
            )
        return run(settings, configurations, lambda line: writer.line(line))


@pytest.fixture
def measured(request, benchmark):
    """`measured(function, *arguments, **keywords)`: as `benchmark`, with rounds of fresh processes that run this test.

    All tests that request it are measured in one session, in turns. Returns the result of one more call.
    """

    def measure(function, /, *arguments, **keywords):
        call = functools.partial(function, *arguments, **keywords)
        config, configuration = request.config, selection.test_of(request.node)
        if SERVE in config.stash:
            config.stash[SERVE](call)
        state = _state(config)
        if state is None or not _measures(config):
            return benchmark(call)  # pytest-benchmark is disabled, and calls once
        if not state.settings.isolated:
            return benchmark.pedantic(call, rounds=state.settings.rounds, warmup_rounds=1)
        clock = ReplayClock()
        benchmark_bridge.set_clock(benchmark, clock)
        _report(request, benchmark, clock, configuration.id, request.getfixturevalue("perf_session"))
        return call()

    return measure


@pytest.fixture
def replayed(request, benchmark, configuration, perf_session):
    """Pass a configuration's recorded rounds to `benchmark`, or skip or fail with the reason why there are none.

    Use `replayed(clock, group)` in a test marked `benchmark(timer=clock)` with a ReplayClock.
    """

    def replay(clock: ReplayClock, group: str) -> None:
        benchmark.group = group
        _report(request, benchmark, clock, configuration.id, perf_session)

    return replay


def _report(request, benchmark, clock: ReplayClock, id: str, session: Session) -> None:
    """Pass recorded rounds to `benchmark`; fail if the configuration is slower or its rounds are invalid."""
    state = request.config.stash[STATE]
    rounds = _rounds(session, id, benchmark)
    state.reported.add(id)
    benchmark.extra_info.update(state.results.infos[id])
    clock.load(rounds)
    benchmark.pedantic(clock.advance, rounds=len(rounds))
    history = state.results.choice.history
    regressions = benchmark_bridge.regressions(request.config, benchmark, id, history)
    if regressions:
        state.regressed.add(id)
    decision = state.results.decisions.get(id)
    if decision is not None:
        # The fixture record_property does the same, and warns with the default family of --junitxml.
        request.node.user_properties.append(("verdict", str(decision)))
    _fail_if_invalid(session, id, decision)
    compared = state.results.counts.get(id)
    if request.config.getoption("perf_fail_on_counts") and not (compared and compared.same):
        failures = [str(compared or "counts are not compared: the baseline lacks this configuration"), *regressions]
        if decision is not None and decision.verdict is Verdict.SLOWER:
            failures.append(str(decision))
        pytest.fail("\n".join(f"{id}: {reason}" for reason in failures), pytrace=False)
    if decision is not None and decision.verdict is Verdict.SLOWER:
        regressions.insert(0, str(decision))
    if regressions:
        state.slower.add(request.node.nodeid)
        pytest.fail("\n".join(f"{id}: {reason}" for reason in regressions), pytrace=False)


def _rounds(session: Session, id: str, benchmark) -> list[float]:
    """Seconds of the valid rounds; skips if the configuration is unavailable and fails if it has none."""
    measured = session.measurements.by_name[id]
    kind, message = measured.failure or (None, None)
    if kind == "unavailable":
        pytest.skip(message)
    seconds = [round["seconds"] for round in measured.rounds()]
    if kind or not seconds:
        benchmark_bridge.leave_unused(benchmark)
        reason = f"{kind}: {message}" if kind else session.why_no_rounds(id)
        pytest.fail(f"INVALID {id}: {reason}", pytrace=False)
    return seconds


def _fail_if_invalid(session: Session, id: str, decision: Decision | None) -> None:
    """Fail if the verdict is INVALID, or if the other side of a comparison could not be measured."""
    variant = session.settings.variant
    other = session.measurements.by_name[f"{id}@{variant}"] if variant else None
    if other is not None and other.failure:
        pytest.fail(f"INVALID {other.slot.name}: {': '.join(other.failure)}", pytrace=False)
    if decision is not None and decision.verdict is Verdict.INVALID:
        pytest.fail(f"{id}: {decision}", pytrace=False)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Collect the failed tests, without those that only were slower."""
    report = (yield).get_result()
    state = _state(item.config)
    if state is None:
        return
    if report.failed and report.nodeid not in state.slower:
        state.failed.add(report.nodeid)
    elif report.passed and report.when == "call":  # a rerun of --reruns
        state.failed.discard(report.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    """Add the stack; remove the current CPU frequency, which would make any two runs look like two machines."""
    for key in ("hz_actual", "hz_actual_friendly"):
        machine_info.get("cpu", {}).pop(key, None)
    state = _state(config)
    if state is not None:
        machine_info["stack"] = state.results.session.stack if state.results else state.stack


@pytest.hookimpl(tryfirst=True, optionalhook=True)  # an installed plugin may be registered before pytest-benchmark
def pytest_benchmark_generate_commit_info(config):
    """The commit of the rootdir, wherever pytest was started."""
    return preflight.commit_info(config)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Suppress pytest-benchmark's own machine comparison; perf.runs.baselines has compared the relevant facts."""
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json):
    """Add the session's data, and write the parameter `configuration` as its id."""
    for benchmark in output_json["benchmarks"]:
        parameters = benchmark["params"] or {}
        if parameters.get("configuration"):  # extra_info has its fields
            benchmark["params"] = {**parameters, "configuration": str(parameters["configuration"])}
    state = _state(config)
    if state is not None and state.results is not None:
        regressed = sorted(state.regressed | state.results.regressed)
        output_json["perf"] = record.perf_block(state.results.session, state.partial, regressed)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Set the exit status."""
    config, state = session.config, _state(session.config)
    if state is not None:
        unsaved, regressed = benchmark_bridge.save_error(config), benchmark_bridge.has_regressed(config)
        strict = config.getoption("perf_strict")
        session.exitstatus = exit_status(state, session.exitstatus, bool(unsaved), regressed, strict)


def pytest_unconfigure(config):
    """Print where the report is, after pytest's own last line; remove the files of the other commit."""
    state = _state(config)
    if state is not None:
        for line in state.closing_lines:
            config.get_terminal_writer().line(line)
        state.cleanup.close()


def pytest_terminal_summary(terminalreporter, config):
    """Print the results table and the lines about its validity; write the report of --perf-report."""
    state = _state(config)
    if state is None:
        return
    if state.parallel:
        terminalreporter.line("perf: measurements cannot run in parallel: leave out -n", red=True)
    if state.results is not None:
        from perf.plugin import after_run, terminal

        terminal.write(terminalreporter, state.results, state.partial)
        if state.results.session.interrupted:
            terminalreporter.line("perf: interrupted; the same command with --perf-resume measures the missing rounds")
        if config.getoption("perf_report"):
            folder, traces = Path(config.getoption("perf_report")), state.results.session.settings.trace
            document = benchmark_bridge.document(config)
            after_run.write(document, folder, state.folder, traces, state.closing_lines.append)
