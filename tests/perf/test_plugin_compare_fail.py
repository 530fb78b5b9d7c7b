"""`--benchmark-compare-fail` end to end: a plain threshold, without a history, that is never in silence about nothing."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from inner_session import ONE, SDPA, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode


def test_compare_fail_as_documented(inner):
    """A plain threshold needs no history; what crosses it is a failed test with words, and no traceback."""
    inner.store(1)
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    result = inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%", "--junitxml=junit.xml")
    assert result.ret == ExitCode.SLOWER, inner.output
    result.assert_outcomes(failed=1)
    inner.says(f"{SDPA}: Field 'median' has failed PercentageRegressionCheck: ", "Performance has regressed:")
    inner.silent("Traceback", "INTERNALERROR")
    assert ElementTree.parse(inner.path / "junit.xml").getroot().find("testsuite").get("failures") == "1"
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:30%").ret == 0


def test_compare_fail_finds_the_configuration_in_an_older_session(inner):
    """The newest one may be of another set."""
    inner.store(1)
    assert inner.run("--benchmark-save=other", what=("--attention=mha", "--steps=2")).ret == 0
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == ExitCode.SLOWER, inner.output
    inner.says(f"{SDPA}: Field 'median' has failed PercentageRegressionCheck: ")


def test_what_compare_fail_refused_is_no_baseline(inner):
    both = ("--attention=mha", *ONE)
    inner.store(1, what=both)
    inner.machine.offset, inner.machine.slow = 1.0, dict.fromkeys((SDPA, "tiny-mha-plms2-b1"), 1.2)
    gate = ("--benchmark-compare", "--benchmark-compare-fail=median:5%", "--benchmark-save=slow")
    assert inner.run(*gate, what=both).ret == ExitCode.SLOWER
    assert set(inner.last()["perf"]["regressed"]) == {SDPA, "tiny-mha-plms2-b1"}
    assert inner.run(*gate, "-x", what=both).ret == ExitCode.SLOWER
    assert inner.last()["perf"]["partial"] == "1 measured, but not reported"


def test_compare_fail_of_a_benchmark_that_is_not_ours(inner):
    (inner.path / "suite" / "test_plain.py").write_text(
        "from perf.worker.clock import ReplayClock\nimport pytest\nclock = ReplayClock()\n"
        "@pytest.mark.benchmark(timer=clock)\n"
        "def test_plain(benchmark, seconds=(0.1, 0.1)):\n"
        "    clock.load(seconds)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
    )
    assert inner.run("--benchmark-save=a").ret == 0
    test = inner.path / "suite" / "test_plain.py"
    test.write_text(test.read_text().replace("(0.1, 0.1)", "(0.2, 0.2) "))
    result = inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%")
    assert result.ret == ExitCode.SLOWER, inner.output
    inner.says("test_plain", "Performance has regressed:")
    inner.silent("Traceback", "INTERNALERROR")


def test_compare_fail_leaves_the_harness_s_own_microseconds_alone(inner):
    test = inner.path / "suite" / "test_own.py"
    test.write_text(
        "from perf.plugin.benchmark_bridge import OVERHEAD\nfrom perf.worker.clock import ReplayClock\nimport pytest\nclock = ReplayClock()\n"
        "@pytest.mark.benchmark(timer=clock, group=OVERHEAD)\n"
        "def test_own(benchmark, seconds=(0.1, 0.1)):\n"
        "    clock.load(seconds)\n    benchmark.pedantic(clock.advance, rounds=2)\n"
    )
    assert inner.run("--benchmark-save=a").ret == 0
    test.write_text(test.read_text().replace("(0.1, 0.1)", "(0.2, 0.2) "))
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:5%").ret == 0, inner.output
    inner.silent("Performance has regressed")


def test_compare_fail_given_twice_and_in_half_percents_is_as_in_pytest_benchmark(inner):
    inner.store(1)
    inner.machine.offset, inner.machine.slow[SDPA] = 1.0, 1.2
    last_wins = ("--benchmark-compare-fail=median:5%", "--benchmark-compare-fail=median:50%")
    assert inner.run("--benchmark-compare", *last_wins).ret == 0, inner.output
    assert inner.run("--benchmark-compare", *last_wins[::-1]).ret == ExitCode.SLOWER
    assert inner.run("--benchmark-compare", "--benchmark-compare-fail=median:2.5%").ret == ExitCode.REFUSED
    inner.says("Could not parse value: 'median:2.5%'")
