"""`--benchmark-compare-fail` end to end: a plain threshold that needs no history."""

from __future__ import annotations

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
