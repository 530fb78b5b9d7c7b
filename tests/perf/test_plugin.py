"""`pytest perf` end to end on a synthetic machine: partial runs, failures, options, and two real measurements."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from inner_session import ORIGINAL, SDPA, STRICT, TWO, inner_fixture, machine_fixture, watched_by  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.launch.process import ROOT, Interpreter
from perf.plugin import benchmark_bridge
from perf.runs import saved_run
from perf.session.lock import DeviceLock


def partial(inner) -> str | None:
    """Why the last saved run is not the whole suite."""
    return inner.last()["perf"]["partial"]


# --- partial runs


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "original"),
        ("--deselect", f"suite/test_measured.py::test_txt2img[{SDPA}]"),
        (f"suite/test_measured.py::test_txt2img[{ORIGINAL}]",),
        ("-m", "matrix", "-k", "original"),
    ],
    ids=["-k", "--deselect", "node id", "-m with -k"],
)
def test_partial_run_is_marked_and_never_chosen(inner, arguments):
    assert inner.run("--benchmark-save=part", *arguments, what=TWO).ret == 0, inner.output
    assert [one["extra_info"]["configuration"]["id"] for one in inner.last()["benchmarks"]] == [ORIGINAL]
    assert partial(inner) in ("deselected 1", "selected by test id", "narrowed by more than -m")
    inner.prints(f"partial run ({partial(inner)}): never chosen as a baseline")
    assert inner.run("--benchmark-compare", what=TWO).ret == 0
    inner.prints("there is no baseline in", f"0001_part.json: partial: {partial(inner)}")


@pytest.mark.parametrize("arguments", [(), ("-m", "matrix"), ("-k", "steps or plms2"), ("suite",)], ids=str)
def test_the_whole_suite_is_not_partial(inner, arguments):
    """-m selects a complete suite, and -k may exclude tests that the default set excludes too."""
    assert inner.run("--benchmark-save=whole", *arguments, what=TWO).ret == 0
    assert partial(inner) is None
    assert len(inner.last()["benchmarks"]) == 2


@pytest.mark.parametrize("steps, printed", [(4, True), (5, False)])
def test_shares_of_the_stages_at_few_steps(inner, steps, printed):
    inner.run("--benchmark-save=a", launches=2, what=(f"--steps={steps}", "--sampler=euler", "--scale=1"))
    line = f"tiny-sdpa-euler{steps}-unguided-b1: text 10.0 %, unet 70.0 %, vae 20.0 %, other 0.0 % of a round"
    (inner.prints if printed else inner.prints_no)(line)


@pytest.mark.report
@pytest.mark.slow
def test_the_last_line_names_the_page_of_the_result(inner):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    printed = inner.run("--perf-report=report", what=TWO).outlines
    assert [line for line in printed if line][-1] == "perf: report of 1 session: report/index.html"
    assert (inner.path / "report" / "index.html").is_file()


def test_function_without_a_configuration_runs_the_default_set(inner):
    inner.run("suite/test_measured.py::test_txt2img", "--benchmark-save=a", what=TWO).assert_outcomes(passed=2)
    assert partial(inner) is None


def test_ids_of_other_tests_do_not_change_the_selection(inner):
    other = inner.path / "suite" / "test_other.py"
    other.write_text("import pytest\n@pytest.mark.parametrize('n', [1])\ndef test_other(n): pass\n")
    inner.run("suite/test_other.py::test_other[1]", "suite/test_measured.py").assert_outcomes(passed=2)


def test_parameter_configuration_of_other_tests_is_ignored(inner):
    other = inner.path / "suite" / "test_other.py"
    other.write_text(
        "import pytest\n@pytest.mark.parametrize('configuration', [1, 2])\ndef test_other(configuration): pass\n"
    )
    inner.run("--benchmark-save=a").assert_outcomes(passed=3)
    assert partial(inner) is None


def test_interrupted(inner):
    """Ctrl-C saves a partial run; --perf-resume measures the rest and completes it to a baseline."""
    inner.machine.interrupt_after = 8  # after a reference image and two launches of three rounds
    result = inner.run("--benchmark-save=cut", what=TWO)
    assert result.ret == pytest.ExitCode.INTERRUPTED, inner.output
    assert partial(inner) == "interrupted"
    rounds = [len(one["stats"]["data"]) for one in inner.last()["benchmarks"]]
    assert sum(rounds) < 8
    inner.machine.interrupt_after, before = None, inner.machine.rounds
    assert inner.run("--benchmark-save=rest", "--perf-resume", what=TWO).ret == 0, inner.output
    inner.prints("perf: resuming from")
    assert partial(inner) is None
    assert [len(one["stats"]["data"]) for one in inner.last()["benchmarks"]] == [4, 4]
    # Of 12 rounds 8 were measured, and 2 processes warm up again.
    assert inner.machine.rounds - before <= 6, "measured rounds were repeated"
    assert inner.run("--benchmark-compare", what=TWO).ret == 0
    inner.prints("against 0002_rest")
    for _ in range(2):  # resumes the run before
        assert inner.run("--benchmark-save=again", "--perf-resume", what=TWO).ret == 0, inner.output
    started = [json.loads(path.read_text())["perf"]["started_unix_seconds"] for path in inner.saved()]
    assert started[0] == started[1] < started[2] == started[3], "a resumed run is the same session"


def test_interrupted_before_the_first_round(inner):
    inner.machine.interrupt_after = 1
    assert inner.run("--benchmark-save=cut").ret == pytest.ExitCode.INTERRUPTED
    inner.prints(f"INVALID {SDPA}: interrupted before its first round")
    assert not inner.saved()


def test_resume_with_other_options_is_refused(inner):
    inner.machine.interrupt_after = 5
    inner.run(launches=2)
    assert inner.run("--perf-resume", launches=3).ret == ExitCode.FAILED
    inner.prints("was started with other launches: 2, now 3")


# --- failures


def test_wrong_image_invalidates_the_timing(inner):
    inner.machine.wrong = {SDPA}
    result = inner.run("--benchmark-save=a", what=TWO)
    assert result.ret == ExitCode.FAILED
    result.assert_outcomes(passed=1, failed=1)
    inner.prints(f"INVALID {SDPA}: wrong_image: latents: relative error 0.5 against the fp32 reference")
    inner.prints_no("was not used at all", "Traceback")
    assert [one["extra_info"]["configuration"]["id"] for one in inner.last()["benchmarks"]] == [ORIGINAL]
    assert partial(inner) == "1 failed"


@pytest.mark.parametrize("arguments", [(), STRICT], ids=["plain", "-W error"])
def test_session_without_valid_rounds(inner, arguments):
    inner.machine.wrong = {SDPA}
    result = inner.run("--benchmark-save=a", "--benchmark-json=out.json", *arguments)
    assert result.ret == ExitCode.FAILED, inner.output
    result.assert_outcomes(failed=1)
    inner.prints_no("INTERNALERROR", "Traceback")
    assert not inner.saved() and not (inner.path / "out.json").exists()


def test_unavailable_is_a_skip_with_its_reason(inner):
    inner.machine.refused = {SDPA: ("unavailable", "sdpa needs torch 2.0")}
    result = inner.run("--benchmark-save=a", "-ra", what=TWO)
    assert result.ret == 0
    result.assert_outcomes(passed=1, skipped=1)
    inner.prints("SKIPPED", "sdpa needs torch 2.0")
    assert partial(inner) is None


def test_dying_worker_fails_its_configuration_only(inner):
    inner.machine.refused = {SDPA: ("died", "the worker was ended by SIGKILL")}
    result = inner.run(what=TWO)
    assert result.ret == ExitCode.FAILED
    result.assert_outcomes(passed=1, failed=1)
    inner.prints(f"INVALID {SDPA}: died: the worker was ended by SIGKILL")


def test_missing_gpu_is_one_line_and_a_usage_error(inner):
    inner.machine.no_device = "torch 2.15.0 of python sees no CUDA device"
    result = inner.run("--device=cuda", what=TWO)
    assert result.ret == ExitCode.REFUSED, inner.output
    assert inner.output.count("sees no CUDA device") == 1 and inner.machine.rounds == 0
    inner.prints("perf: nothing can be measured: torch 2.15.0 of python sees no CUDA device")
    inner.prints_no("Traceback", "INTERNALERROR", "ERROR")


def test_failing_reference_image(inner):
    """Without a reference image the timing is kept, and the run is no baseline."""
    inner.machine.refused = {ORIGINAL: ("out_of_memory", "out of memory at a peak of 1 GiB")}
    assert inner.run("--benchmark-save=a").ret == 0
    inner.prints(f"{SDPA}: its output was not checked: out of memory")
    assert partial(inner) == "1 without a reference image"
    assert inner.last()["benchmarks"][0]["extra_info"]["image"]["verdict"] == "unchecked"


def test_device_locked_by_another_session(inner, tmp_path):
    with DeviceLock("cpu", tmp_path / "locks"):
        result = inner.run(what=TWO)
    assert result.ret == ExitCode.REFUSED
    assert inner.output.count("cpu is being measured by pid") == 1 and inner.machine.rounds == 0
    inner.prints_no("Traceback", "INTERNALERROR", "ERROR")


def test_too_many_invalid_rounds(inner, monkeypatch):
    """Every first attempt is throttled: the rounds are repeated, and the session is INVALID."""
    watched_by(monkeypatch, lambda attempt: "throttled: hw_slowdown" if attempt % 2 == 0 else None)
    assert inner.run("--benchmark-save=a").ret == ExitCode.FAILED
    inner.prints("4 of 8 rounds were invalid and measured again", "INVALID session: invalid_rounds 50 %")
    assert inner.last()["perf"]["invalid_rounds"] == 4
    assert saved_run.read(inner.saved()[-1]).why_no_candidate.startswith("invalid: invalid_rounds")


def test_first_round_that_stays_invalid(inner, monkeypatch):
    """The saved image is still the checked one of round 0."""
    watched_by(monkeypatch, lambda attempt: "throttled: hw_slowdown" if attempt < 4 else None)
    inner.run("--benchmark-save=a", launches=1)
    info = inner.last()["benchmarks"][0]["extra_info"]
    assert info["launches"][0]["invalid"] == {"0": "throttled: hw_slowdown"}
    assert info["image"]["latent_relative_error"] == 1e-6
    assert saved_run.read(inner.saved()[-1]).by_id[SDPA].launches[0] == tuple(
        inner.last()["benchmarks"][0]["stats"]["data"]
    )


# --- options of pytest and pytest-benchmark


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("-n1",), ("-n2", "--dist=each"), ("-n1", "--benchmark-disable")], ids=str)
def test_xdist_is_refused(inner, arguments):
    """pytest-benchmark alone would silently disable the benchmarks."""
    pytest.importorskip("xdist")
    assert inner.run(*arguments).ret == ExitCode.REFUSED, inner.output
    inner.prints("perf: measurements cannot run in parallel: leave out -n")
    inner.prints_no("INTERNALERROR")


def test_xdist_runs_other_tests(inner):
    pytest.importorskip("xdist")
    (inner.path / "test_other.py").write_text("def test_other(): pass\n")
    result = inner.run("-n1", "test_other.py")
    assert result.ret == 0, inner.output
    result.assert_outcomes(passed=1)


def test_disabled_calls_each_target_once(inner, monkeypatch):
    monkeypatch.setattr("perf.session.workers.InProcessLaunch", lambda environment: inner.machine(Interpreter()))
    arguments = ("--benchmark-disable", "--benchmark-save=a", "--benchmark-compare", "--benchmark-compare-fail=min:1%")
    assert inner.run(*arguments, what=TWO).ret == 0, inner.output
    assert not inner.saved()
    assert inner.machine.rounds == 2 * 2 + 1, "one round and its warm-up each, and a reference"


def test_benchmark_only_and_skip(inner):
    (inner.path / "suite" / "test_other.py").write_text("def test_other(): pass\n")
    inner.run("--benchmark-only").assert_outcomes(passed=1, skipped=1)
    rounds = inner.machine.rounds
    inner.run("--benchmark-skip").assert_outcomes(passed=1, skipped=1)
    assert inner.machine.rounds == rounds


@pytest.mark.parametrize("by", ["group", "fullname", "func", "param", "param:configuration"])
def test_group_by(inner, by):
    assert inner.run(f"--benchmark-group-by={by}", what=TWO).ret == 0
    shown = {"group": "tiny, batch 1", "param": f"'{SDPA}'", "param:configuration": f"'configuration={SDPA}'"}
    inner.prints(shown.get(by, "test_txt2img"))


def test_without_pytest_benchmark_other_tests_run(inner):
    (inner.path / "test_other.py").write_text("def test_other(): pass\n")
    result = inner.pytester.runpytest_inprocess("-p", "no:benchmark", "test_other.py")
    result.assert_outcomes(passed=1)


def test_private_names_of_pytest_benchmark(inner):
    """The private names that perf.plugin.benchmark_bridge uses: a renaming release fails here first."""
    seen = {}

    class Look:
        @pytest.hookimpl(tryfirst=True)  # before perf.plugin.hooks replaces them
        def pytest_sessionstart(self, session):
            seen["session"] = benchmark_bridge.benchmark_session(session.config)
            seen["plain"] = seen["session"].storage

    assert inner.run("--benchmark-save=good").ret == 0
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%", plugins=[Look()]).ret == 0
    session, plain = seen["session"], seen["plain"]
    assert session is not None and type(session).__module__ == "pytest_benchmark.session"
    assert plain._next_num == "0002" and plain.get("").is_dir() and plain.path.is_dir()
    assert callable(plain.load) and type(plain).save is not None
    for name in ("save_json", "check_regressions", "handle_saving"):
        assert callable(getattr(type(session), name))
    assert session.json is None and session.performance_regressions == []
    assert callable(session.logger.error) and callable(session.logger.info)
    ((stored),) = session.compared_mapping.values()
    (benchmark,) = stored.values()
    assert benchmark["stats"]["median"] > 0 and benchmark["extra_info"]["configuration"]["id"] == SDPA
    (check,) = session.compare_fail
    assert check.fails({"median": 2.0}, {"median": 1.0}) and not check.fails({"median": 1.0}, {"median": 1.0})
    from pytest_benchmark.fixture import BenchmarkFixture

    assert "_mode" in BenchmarkFixture.__init__.__code__.co_names


# --- real measurements


@pytest.mark.slow
def test_real_measurement_in_this_process(inner):
    """The tiny model over one step, with a checked image and a warning about launch variance."""
    # pytester removes modules that an inner run imports first, and torch cannot be imported twice.
    import torch

    import perf.worker.engines.sd  # noqa: F401

    result = inner.run(
        "--perf-inprocess", "--benchmark-save=a", launches=1, rounds=1, what=("--attention=original", "--steps=1")
    )
    assert result.ret == 0, inner.output
    inner.prints("one process: launch variance is not in the interval")
    info = inner.last()["benchmarks"][0]["extra_info"]
    assert info["image"]["verdict"] == "right" and 0 < info["flops_fraction"] < 1
    assert info["facts"]["torch"] == torch.__version__ and inner.last()["perf"]["isolated"] is False


@pytest.mark.nightly
def test_real_measurement_in_a_fresh_process(inner, tmp_path):
    """One launch through pipes; the pytest process itself never imports torch."""
    (inner.path / "conftest.py").write_text(
        'pytest_plugins = ["perf.plugin"]\nimport sys\n\n'
        "def pytest_unconfigure():\n    print('torch imported:', 'torch' in sys.modules)\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "suite",
        "--attention=original",
        "--steps=1",
        "--perf-launches=1",
        "--perf-rounds=1",
    ]
    environment = {**Interpreter().variables(), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--benchmark-save=a", "--device=cpu", "-s"],
        cwd=inner.path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 launch of 1 round, in turns" in done.stdout and "torch imported: False" in done.stdout
    assert saved_run.read(inner.saved()[-1]).by_id.keys() == {"tiny-original-plms1-b1"}
    assert str(ROOT) not in json.dumps(inner.last()["perf"])
