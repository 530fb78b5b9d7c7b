"""`--benchmark-compare-fail` end to end: a plain threshold that needs no history."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from inner_session import ONE, SDPA, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode


def test_compare_fail_as_documented(inner):
    """Exceeding the threshold fails the test with its reason and without a traceback."""
    inner.store(1)
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    result = inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%", "--junitxml=junit.xml")
    assert result.ret == ExitCode.SLOWER, inner.output
    result.assert_outcomes(failed=1)
    inner.prints(f"{SDPA}: Field 'median' has failed PercentageRegressionCheck: ", "Performance has regressed:")
    inner.prints_no("Traceback", "INTERNALERROR")
    assert ElementTree.parse(inner.path / "junit.xml").getroot().find("testsuite").get("failures") == "1"
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:30%").ret == 0


def test_compare_fail_finds_the_configuration_in_an_older_session(inner):
    """The newest session may be of another set."""
    inner.store(1)
    assert inner.run("--benchmark-save=other", what=("--attention=mha", "--steps=2")).ret == 0
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == ExitCode.SLOWER, inner.output
    inner.prints(f"{SDPA}: Field 'median' has failed PercentageRegressionCheck: ")


def test_run_that_compare_fail_refused_is_no_baseline(inner):
    both = ("--attention=mha", *ONE)
    inner.store(1, what=both)
    inner.machine.offset, inner.machine.slow = 1.0, dict.fromkeys((SDPA, "tiny-mha-plms2-b1"), 1.2)
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:5%", "--benchmark-save=slow")
    assert inner.run(*gate, what=both).ret == ExitCode.SLOWER
    assert set(inner.last()["perf"]["regressed"]) == {SDPA, "tiny-mha-plms2-b1"}
    assert inner.run(*gate, "-x", what=both).ret == ExitCode.SLOWER
    assert inner.last()["perf"]["partial"] == "1 measured, but not reported"


def test_compare_fail_of_a_plain_benchmark(inner):
    (inner.path / "suite" / "test_plain.py").write_text(
        "from perf.plugin.benchmark_bridge import ReplayClock\nimport pytest\nclock = ReplayClock()\n"
        "@pytest.mark.benchmark(timer=clock)\n"
        "def test_plain(benchmark, seconds=(0.1, 0.1)):\n"
        "    clock.load(seconds)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
    )
    assert inner.run("--benchmark-save=a").ret == 0
    test = inner.path / "suite" / "test_plain.py"
    test.write_text(test.read_text().replace("(0.1, 0.1)", "(0.2, 0.2) "))
    result = inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert result.ret == ExitCode.SLOWER, inner.output
    inner.prints("test_plain", "Performance has regressed:")
    inner.prints_no("Traceback", "INTERNALERROR")


def test_compare_fail_ignores_the_overhead_of_the_harness(inner):
    test = inner.path / "suite" / "test_own.py"
    test.write_text(
        "from perf.plugin.benchmark_bridge import OVERHEAD, ReplayClock\nimport pytest\nclock = ReplayClock()\n"
        "@pytest.mark.benchmark(timer=clock, group=OVERHEAD)\n"
        "def test_own(benchmark, seconds=(0.1, 0.1)):\n"
        "    clock.load(seconds)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
    )
    assert inner.run("--benchmark-save=a").ret == 0
    test.write_text(test.read_text().replace("(0.1, 0.1)", "(0.2, 0.2) "))
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == 0, inner.output
    inner.prints_no("Performance has regressed")


def test_repeated_compare_fail_applies_all(inner):
    inner.store(1)
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    both = ("--benchmark-compare-fail=median:5%", "--benchmark-compare-fail=median:50%")
    for repeated in (both, both[::-1]):
        assert inner.run("--benchmark-compare", *repeated).ret == ExitCode.SLOWER, inner.output
    loose = ("--benchmark-compare-fail=median:50%", "--benchmark-compare-fail", "min:60%", "max:60%")
    assert inner.run("--benchmark-compare", *loose).ret == 0, inner.output


def test_compare_fail_of_addopts_applies_too(inner, monkeypatch):
    inner.store(1)
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    monkeypatch.setenv("PYTEST_ADDOPTS", "--benchmark-compare-fail=median:5%")
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:50%").ret == ExitCode.SLOWER, inner.output


def test_fractional_compare_fail_as_in_pytest_benchmark(inner):
    inner.store(1)
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:2.5%").ret == ExitCode.REFUSED
    inner.prints("Could not parse value: 'median:2.5%'")


PLAIN = (
    "from perf.plugin.benchmark_bridge import ReplayClock\nimport pytest\nclock = ReplayClock()\n"
    "@pytest.mark.benchmark(timer=clock)\n"
    "def test_plain(benchmark):\n"
    "    clock.load([SECONDS] * 2)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
)
GATE = ("--benchmark-compare", "--benchmark-compare-fail=median:5%")


def plain(inner, seconds: float):
    """Write the plain benchmark of this duration; a file of another size, which Python's cache notices."""
    file = inner.path / "suite" / "test_plain.py"
    file.write_text(f"SECONDS = {seconds}\n{PLAIN}# {'x' * int(1000 * seconds)}\n")
    return "suite/test_plain.py"


def test_plain_benchmarks_alone_are_compared_natively(inner):
    """A file of plain benchmarks is a baseline of plain benchmarks, and of no configuration."""
    test = plain(inner, 0.1)
    assert inner.run(test, "--benchmark-save=plain").ret == 0
    assert inner.run(test, *GATE).ret == 0, inner.output
    inner.prints_no("there is no baseline", "foreign")
    plain(inner, 0.2)
    assert inner.run(test, *GATE).ret == ExitCode.SLOWER, inner.output
    inner.prints("Performance has regressed:", "test_plain")
    assert inner.run(test, "--benchmark-compare=plain", GATE[1]).ret == ExitCode.SLOWER, inner.output
    assert inner.run(*GATE).ret == ExitCode.REFUSED, inner.output
    inner.prints("there is no baseline in", "0001_plain.json: a plain pytest-benchmark file")
    assert inner.run("--benchmark-compare").ret == 0
    inner.prints("perf: there is no baseline in")


def test_plain_benchmark_beside_a_configuration_is_compared_natively(inner):
    """Each with its newest baseline: the session without the plain benchmark does not hide the older one."""
    test = plain(inner, 0.1)
    assert inner.run("--benchmark-save=both").ret == 0
    plain(inner, 0.3)
    assert inner.run(test, "--benchmark-save=plain").ret == 0
    assert inner.run("suite/test_measured.py", "--benchmark-save=session").ret == 0
    plain(inner, 0.31)
    assert inner.run(*GATE).ret == 0, inner.output
    inner.prints(f"{SDPA}: INCONCLUSIVE", "against 0003_session")
    plain(inner, 0.4)
    assert inner.run(*GATE).ret == ExitCode.SLOWER, inner.output
    regressed = [line for line in inner.output.splitlines() if "has failed PercentageRegressionCheck" in line]
    assert len(regressed) == 1 and "test_plain (0002_plai" in regressed[0], inner.output
    assert inner.run("--benchmark-compare=0001", GATE[1]).ret == ExitCode.SLOWER, inner.output
    inner.prints("test_plain (0001_both", f"{SDPA}: INCONCLUSIVE")


def test_ratio_between_sessions_names_its_unit_beside_the_raw_one(inner):
    inner.store(2)
    inner.machine.offset = 1.1 * inner.machine.offset
    assert inner.run("--benchmark-compare", "--benchmark-save=a", launches=6).ret == 0
    verdict = inner.last()["benchmarks"][0]["extra_info"]["verdict"]
    seconds = [run["benchmarks"][0]["stats"]["median"] for run in map(json.loads, map(_text, inner.saved()))]
    assert abs(verdict["raw_ratio"] / (seconds[2] / seconds[1]) - 1) < 0.002
    assert abs(verdict["ratio"]["estimate"] - 1) < 0.01 < abs(verdict["raw_ratio"] - 1)
    inner.prints(f"in reference workloads, raw {100 * (verdict['raw_ratio'] - 1):+.1f} %, against 0002_nightly")


def _text(path) -> str:
    return path.read_text(encoding="utf-8")
