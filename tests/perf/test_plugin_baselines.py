"""`--benchmark-compare` end to end: missing, damaged and foreign baselines, verdicts and saving."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from inner_session import ONE, ORIGINAL, SDPA, STRICT, TWO, fill_disk_for, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.launch.process import Interpreter
from perf.runs import saved_run

STORED = 8


def verdict(document: dict, id: str = SDPA) -> dict:
    """The verdict on a configuration in a saved run."""
    infos = [benchmark["extra_info"] for benchmark in document["benchmarks"]]
    (saved,) = (info["verdict"] for info in infos if info["configuration"]["id"] == id)
    return saved


# --- missing and damaged baselines


@pytest.mark.parametrize("arguments", [(), STRICT, ("-q",)], ids=["plain", "-W error", "-q"])
def test_missing_baseline_is_a_notice(inner, arguments):
    assert inner.run("--benchmark-compare", *arguments).ret == 0, inner.output
    inner.prints("perf: there is no baseline in", "save one with --benchmark-autosave")
    inner.prints_no("fastest here")  # of a single configuration


@pytest.mark.parametrize("arguments", [("--benchmark-compare-fail=median:5%",), ("--perf-strict",)])
def test_missing_baseline_of_a_gate_is_a_usage_error(inner, arguments):
    assert inner.run("--benchmark-compare", *arguments).ret == ExitCode.REFUSED
    inner.prints("there is no baseline in", "save one with --benchmark-autosave")
    assert inner.machine.rounds == 0


@pytest.mark.parametrize("option", ["--benchmark-compare-fail=median:5%", "--perf-strict"])
def test_gate_without_a_comparison_is_a_usage_error(inner, option):
    assert inner.run(option).ret == ExitCode.REFUSED
    inner.prints("needs --benchmark-compare: there is nothing to compare with")
    assert inner.machine.rounds == 0


def _spoil(change):
    def spoil(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return spoil


DAMAGE = {
    "truncated": (lambda text: text[: len(text) // 2], "is not JSON"),
    "empty": (lambda text: "", "is empty"),
    "nan": (lambda text: text.replace('"median": 0.', '"median": NaN, "x": 0.', 1), "NaN is no number of JSON"),
    "no machine_info": (_spoil(lambda document: document.pop("machine_info")), "machine_info is missing"),
    "no rounds": (_spoil(lambda document: document["benchmarks"][0]["stats"].pop("data")), "has no rounds"),
    "newer schema": (_spoil(lambda document: document["perf"].update(schema=2)), "this version reads 1"),
    "other bytes": (lambda text: "\x00\x01" * 99, "is not JSON"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_baseline_is_refused(inner, kind):
    damage, reason = DAMAGE[kind]
    assert inner.run("--benchmark-save=good").ret == 0
    (path,) = inner.saved()
    path.write_text(damage(path.read_text()))
    assert inner.run("--benchmark-compare").ret == 0, inner.output
    inner.prints("there is no baseline in", f"{path.name}: ", reason)
    inner.prints_no("INTERNALERROR", "(too_few_sessions)")
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == ExitCode.REFUSED
    assert inner.run("--benchmark-compare=0001").ret == ExitCode.REFUSED
    inner.prints(reason)


def test_damaged_newest_run_falls_back_to_an_older_one(inner):
    inner.store(2)
    newest = inner.saved()[-1]
    newest.write_text("")
    assert inner.run("--benchmark-compare").ret == 0
    inner.prints(f"{SDPA}: INCONCLUSIVE", "against 0001_nightly (too_few_sessions)")


@pytest.mark.parametrize("compare", ["suite", "suite/test_measured.py", "suite/test_measured.py::test_txt2img"])
def test_compare_that_consumed_the_test_path(inner, compare):
    assert inner.run("--benchmark-compare", compare).ret == ExitCode.REFUSED
    inner.prints(f"took '{compare}' for the name of a saved run", f"pytest {compare} --benchmark-compare")
    assert inner.machine.rounds == 0


@pytest.mark.parametrize("name", ["0042", "/no/such/run.json", "a**b", "[", "nothing*"])
def test_missing_named_run(inner, name):
    assert inner.run(f"--benchmark-compare={name}").ret == ExitCode.REFUSED, inner.output
    inner.prints(f"--benchmark-compare={name}: no saved run in")
    inner.prints_no("INTERNALERROR")


def test_storage_that_cannot_be_listed(inner):
    (inner.path / "file").write_text("")
    assert inner.run("--benchmark-compare", "--benchmark-storage=file://file").ret == ExitCode.REFUSED
    inner.prints("cannot be listed")
    assert inner.run("--benchmark-storage=file://file").ret == ExitCode.FAILED
    inner.prints("the journal cannot be written")


# --- other machines, folders and test names


def _elsewhere(path) -> None:
    document = json.loads(path.read_text())
    document["machine_info"]["stack"]["torch"] = "1.12.1"
    path.write_text(json.dumps(document))


def test_foreign_baseline(inner):
    """Skipped and listed by default; refused if named; INCONCLUSIVE verdicts with --perf-foreign."""
    (path,) = inner.store(1)
    _elsewhere(path)
    assert inner.run("--benchmark-compare").ret == 0
    inner.prints("there is no baseline in", "0001_nightly.json: foreign: torch 1.12.1, here")
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == ExitCode.REFUSED
    assert inner.run("--benchmark-compare=0001").ret == ExitCode.REFUSED
    inner.prints("was measured elsewhere: torch 1.12.1, here", "--perf-foreign compares anyway")
    inner.machine.slow[SDPA] = 2.0
    assert inner.run("--benchmark-compare=0001", "--perf-foreign").ret == 0, inner.output
    inner.prints(f"{SDPA}: INCONCLUSIVE", "against 0001_nightly (foreign_machine)")


def test_other_clock_or_threads_are_foreign(inner, monkeypatch):
    inner.store(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert inner.run("--benchmark-compare", "--perf-clock=wall").ret == 0
    inner.prints("foreign: clock cpu, here wall; threads 1, here 2")


@pytest.mark.parametrize("scheme", ["file://", ""])
def test_storage_outside_of_the_working_directory(inner, tmp_path_factory, scheme):
    """pytest-benchmark alone fails with a traceback; a path without `file://` is a folder too."""
    folder = tmp_path_factory.mktemp("elsewhere")
    storage = f"--benchmark-storage={scheme}{folder}"
    assert inner.run("--benchmark-save=a", storage).ret == 0
    assert len(inner.saved(folder)) == 1 and not inner.saved()
    assert sorted(path.name for path in folder.iterdir() if path.name in ("journal", "references")) == [
        "journal",
        "references",
    ]
    assert inner.run("--benchmark-compare", storage).ret == 0, inner.output
    inner.prints(f"{SDPA}: INCONCLUSIVE", "against 0001_a (too_few_sessions)")
    inner.prints_no("machine_info is different", "INTERNALERROR")


def test_renamed_test_is_compared_by_its_configuration(inner):
    inner.store(STORED)
    test = inner.path / "suite" / "test_measured.py"
    test.with_name("test_renamed.py").write_text(test.read_text().replace("test_txt2img", "test_other"))
    test.unlink()
    assert inner.run("--benchmark-compare", launches=6).ret == 0
    inner.prints(f"{SDPA}: SAME", "test_other", "(0008_nightly)", "(NOW)")
    inner.machine.slow[SDPA] = 1.5
    result = inner.run("--benchmark-compare=0001", "--benchmark-compare-fail=median:20%", launches=2)
    assert result.ret == ExitCode.SLOWER, inner.output


def test_run_from_the_folder_of_the_tests(inner, monkeypatch):
    inner.store(STORED)
    monkeypatch.chdir(inner.path / "suite")
    inner.machine.slow[SDPA] = 1.05
    assert inner.run(".", "--benchmark-compare", launches=6).ret == ExitCode.SLOWER, inner.output
    inner.prints(f"{SDPA}: SLOWER", "against 8 sessions up to 0008_nightly (beyond_margin)")
    assert not (inner.path / "suite" / ".benchmarks").exists()


# --- verdicts


def test_unchanged_is_the_same(inner):
    inner.store(STORED)
    assert inner.run("--benchmark-compare", "--benchmark-save=now", launches=6).ret == 0, inner.output
    inner.prints(f"{SDPA}: SAME", "against 8 sessions up to 0008_nightly (within_margin)", "1 comparison, margin 1.0 %")
    assert verdict(inner.last())["verdict"] == "SAME"
    assert inner.last()["perf"]["regressed"] == []


def test_slowdown_of_5_percent_has_one_wording_everywhere(inner):
    inner.store(STORED, what=TWO)
    inner.machine.slow[SDPA] = 1.05
    result = inner.run("--benchmark-compare", "--benchmark-save=now", "--junitxml=junit.xml", launches=6, what=TWO)
    assert result.ret == ExitCode.SLOWER, inner.output
    result.assert_outcomes(passed=1, failed=1)
    saved = verdict(inner.last())
    assert (saved["verdict"], saved["reason"], saved["against"]) == (
        "SLOWER",
        "beyond_margin",
        "8 sessions up to 0008_nightly",
    )
    assert saved["ratio"]["estimate"] == pytest.approx(1.05, abs=0.01), inner.output
    assert verdict(inner.last(), ORIGINAL)["verdict"] == "SAME"
    decision = str(saved_run.read(inner.saved()[-1]).by_id[SDPA].decision)
    inner.prints(f"{SDPA}: {decision}")
    suite = ElementTree.parse(inner.path / "junit.xml").getroot().find("testsuite")
    assert (suite.get("failures"), suite.get("errors")) == ("1", "0")
    case = next(one for one in suite.iter("testcase") if SDPA in one.get("name"))
    assert [one.get("value") for one in case.iter("property")] == [decision]
    assert case.find("failure").get("message") == f"Failed: {SDPA}: {decision}"


@pytest.mark.slow
def test_regressed_run_is_never_a_baseline(inner):
    """A regressed run is saved and marked; the next run is compared with the sessions before it."""
    inner.store(STORED)
    inner.machine.slow[SDPA] = 1.05
    for _ in range(2):
        result = inner.run("--benchmark-compare", "--benchmark-save=slow", launches=6)
        assert result.ret == ExitCode.SLOWER, inner.output
        inner.prints("against 8 sessions up to 0008_nightly (beyond_margin)")
        assert inner.last()["perf"]["regressed"] == [SDPA]
    assert len(inner.saved()) == STORED + 2
    inner.run("--benchmark-compare=0009")
    inner.prints(f"perf: the baseline 0009_slow.json is regressed: {SDPA}")


def test_few_sessions_warn_only(inner):
    inner.store(5)
    inner.machine.slow[SDPA] = 1.5
    assert inner.run("--benchmark-compare", launches=6).ret == 0
    inner.prints(f"{SDPA}: INCONCLUSIVE +", "(too_few_sessions)")


def test_strict_exits_21_when_inconclusive(inner):
    inner.store(2)
    assert inner.run("--benchmark-compare", "--perf-strict", launches=6).ret == ExitCode.INCONCLUSIVE
    inner.prints("(too_few_sessions)")


def test_strict_exits_0_with_a_verdict(inner):
    inner.store(STORED)
    assert inner.run("--benchmark-compare", "--perf-strict", launches=6).ret == 0, inner.output


def test_drift_bars_the_session_from_the_baselines_and_from_a_verdict_against_them(inner):
    inner.store(STORED)
    inner.machine.drift, inner.machine.rounds = 0.2, -16  # it begins in the last third
    result = inner.run("--benchmark-compare", "--benchmark-save=now", launches=12)
    assert result.ret == 0, inner.output
    inner.prints("drifted: anchor_drift ", f"{SDPA}: INCONCLUSIVE", "(anchor_drift")
    assert verdict(inner.last())["verdict"] == "INCONCLUSIVE"
    assert inner.last()["perf"]["invalid"] is None
    assert inner.last()["perf"]["drifted"].startswith("anchor_drift ")
    inner.machine.drift = 0.0
    assert inner.run("--benchmark-compare", launches=6).ret == 0
    inner.prints("against 8 sessions up to 0008_nightly")


def test_missing_and_new_configurations_are_listed(inner):
    """Missing are those of the newest session with the same options; another selection lacks others by intent."""
    both = ("--attention=mha", *ONE)
    inner.store(1, what=both)
    assert inner.run("--benchmark-save=other", what=("--attention=original", "--steps=2")).ret == 0
    inner.machine.refused = {"tiny-mha-plms2-b1": ("unavailable", "not here")}
    assert inner.run("--benchmark-compare", what=both).ret == 0
    inner.prints("in the baseline, but not measured: tiny-mha-plms2-b1")
    assert inner.run("--benchmark-compare", what=("--attention=xformers", *ONE)).ret == 0
    assert "but not measured" not in inner.output


@pytest.mark.slow
def test_missing_configuration_fails_a_strict_run(inner):
    """It may have stopped working; a run narrowed by -k lacks configurations intentionally."""
    both = ("--attention=mha", *ONE)
    inner.store(STORED, what=both)
    inner.machine.refused = {"tiny-mha-plms2-b1": ("unavailable", "not here")}
    assert inner.run("--benchmark-compare", "--perf-strict", what=both, launches=6).ret == ExitCode.FAILED
    inner.prints("in the baseline, but not measured: tiny-mha-plms2-b1")
    assert inner.run("--benchmark-compare", what=both, launches=6).ret == 0
    inner.machine.refused = {}
    assert inner.run("--benchmark-compare", "--perf-strict", "-k", "sdpa", what=both, launches=6).ret == 0, inner.output


def test_a_strict_run_in_which_nothing_could_be_measured_fails(inner):
    inner.store(STORED)
    inner.machine.refused = {SDPA: ("unavailable", "not here")}
    assert inner.run("--benchmark-compare", "--perf-strict").ret == ExitCode.FAILED, inner.output
    assert inner.run("--benchmark-compare").ret == 0


def test_a_session_is_not_compared_with_a_stored_copy_of_itself(inner):
    inner.store(STORED)
    inner.machine.slow = {SDPA: 1.05}
    assert inner.run("--benchmark-autosave", launches=6).ret == 0, inner.output
    assert inner.run("--perf-resume", "--benchmark-compare", launches=6).ret == ExitCode.SLOWER, inner.output
    inner.prints("nothing is left to measure", f"against {STORED} sessions up to 000{STORED}_")
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:3%")
    assert inner.run("--perf-resume", *gate, launches=6).ret == ExitCode.SLOWER, inner.output


def test_a_copy_of_the_session_alone_is_no_baseline(inner):
    assert inner.run("--benchmark-autosave", launches=6).ret == 0, inner.output
    strict = ("--perf-resume", "--benchmark-compare", "--perf-strict")
    assert inner.run(*strict, launches=6).ret == ExitCode.INCONCLUSIVE, inner.output
    inner.prints(f"{SDPA}: INCONCLUSIVE", "(no_baseline)")


@pytest.mark.parametrize("option", ["--perf-aa", "--perf-against=HEAD"])
def test_one_verdict_for_each_configuration(inner, option):
    assert inner.run("--benchmark-compare", option).ret == ExitCode.REFUSED
    inner.prints(f"--benchmark-compare and {option.partition('=')[0]}: a session has one verdict")
    assert inner.machine.rounds == 0


def test_strict_needs_a_folder_of_sessions(inner):
    storage = "--benchmark-storage=elasticsearch+http://localhost/a"
    assert inner.run(storage, "--benchmark-compare", "--perf-strict").ret == ExitCode.REFUSED
    inner.prints("--perf-strict: --benchmark-storage is no folder")


def test_benchmarks_without_a_configuration_are_not_missing(inner):
    """Benchmarks of the harness itself are no part of a session."""
    inner.store(STORED)
    for path in inner.saved():
        document = json.loads(path.read_text())
        document["benchmarks"].append({**document["benchmarks"][0], "name": "test_clock", "fullname": "test_clock"})
        document["benchmarks"][-1]["extra_info"] = {}
        path.write_text(json.dumps(document))
    assert inner.run("--benchmark-compare", "--perf-strict", launches=6).ret == 0, inner.output
    inner.prints_no("but not measured")


# --- saving


def test_full_disk_when_the_run_is_saved(inner, monkeypatch):
    fill_disk_for(monkeypatch, ".json")
    assert inner.run("--benchmark-save=a").ret == ExitCode.FAILED
    inner.prints("the run was not saved: ", "No space left on device")
    inner.prints_no("Traceback", "INTERNALERROR")
    assert not inner.saved()
    (journal,) = inner.storage.glob("journal/*.jsonl")
    assert json.loads(journal.read_text().splitlines()[-1])["event"] == "end"
    monkeypatch.undo()


def test_full_disk_takes_precedence_over_slower(inner, monkeypatch):
    inner.store(STORED)
    inner.machine.slow[SDPA] = 1.05
    fill_disk_for(monkeypatch, "_now.json")
    result = inner.run("--benchmark-compare", "--benchmark-save=now", launches=6)
    assert result.ret == ExitCode.FAILED
    inner.prints(f"{SDPA}: SLOWER", "the run was not saved: ")


def test_benchmark_json_that_cannot_be_written_does_not_lose_the_save(inner, monkeypatch):
    fill_disk_for(monkeypatch, "out.json")
    assert inner.run("--benchmark-save=a", "--benchmark-json=out.json").ret == ExitCode.FAILED
    inner.prints("out.json was not written: ")
    inner.prints_no("Traceback", "INTERNALERROR")
    assert len(inner.saved()) == 1


def test_benchmark_json_is_the_saved_run(inner):
    assert inner.run("--benchmark-save=a", "--benchmark-json=out.json").ret == 0
    written = json.loads((inner.path / "out.json").read_text())
    assert (written["benchmarks"], written["perf"]) == (inner.last()["benchmarks"], inner.last()["perf"])
    assert saved_run.read(inner.path / "out.json").by_id.keys() == {SDPA}


def test_saved_runs_are_read_by_pytest_benchmark_itself(inner):
    inner.store(2)
    command = [sys.executable, "-m", "pytest_benchmark", "--storage", f"file://{inner.storage}", "compare", "--csv"]
    environment = Interpreter().variables()  # the conftest there loads the plugin
    done = subprocess.run(command, capture_output=True, text=True, cwd=inner.path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"test_txt2img[{SDPA}] (0001_nightly)" in done.stdout and "(0002_nightly)" in done.stdout
