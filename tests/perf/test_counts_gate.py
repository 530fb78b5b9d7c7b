"""Exact counts as a gate: compared between sides of a session, stored sessions and files; reported as COUNTS."""

from __future__ import annotations

import json

import pytest
from inner_session import ORIGINAL, SDPA, TWO, inner_fixture, machine_fixture  # noqa: F401
from test_plugin_pairs import other_commit  # noqa: F401

from perf.analysis.counts import compare
from perf.analysis.verdicts import ExitCode
from perf.runs.saved_run import BaselineError, read

OLD = {
    "torch": "2.15.0",
    "operators": {"addmm": 100, "mul": 7},
    "bytes": 2_000_000_000,
    "host_waits": 0,
    "generated_kernels": 3,
    "graphs": 1,
    "graph_breaks": 0,
    "recompiles": 0,
}
FAIL = "--perf-fail-on-counts"


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, "COUNTS unchanged against A"),
        (
            {"operators": {"addmm": 116, "mul": 6, "add": 4}},
            "COUNTS operators 107 -> 126 (addmm +16, add +4, mul -1) against A",
        ),
        # As many operators, but others.
        ({"operators": {"addmm": 99, "mul": 8}}, "COUNTS operators 107 -> 107 (addmm -1, mul +1) against A"),
        ({"bytes": 2_000_000_001}, "COUNTS bytes 2 GB -> 2 GB (+1) against A"),
        ({"host_waits": 51}, "COUNTS host waits 0 -> 51 against A"),
        ({"generated_kernels": 23}, "COUNTS generated kernels 3 -> 23 against A"),
        ({"graph_breaks": 2, "graphs": 3}, "COUNTS graphs 1 -> 3, graph breaks 0 -> 2 against A"),
        ({"recompiles": 1}, "COUNTS recompiles 0 -> 1 against A"),
        ({"torch": "2.11.0"}, "counts are not compared with A: they are of torch 2.15.0, here 2.11.0"),
        ({"precision": "full"}, "COUNTS unchanged against A"),  # files of earlier versions do not tell it
        ({"operators": None}, "COUNTS unchanged against A"),  # not counted by this torch; the others are
    ],
)
def test_what_changed_is_named(changed, expected):
    compared = compare({**OLD, **changed}, OLD, "A")
    assert str(compared) == expected
    assert compared.same is ("unchanged" in expected)


@pytest.mark.parametrize(
    "key, new, old, expected",
    [
        ("precision", "bf16", "full", "they are in precision full, here bf16"),
        ("threads", 2, 64, "they are with 64 threads, here 2"),
        ("device", "cpu", "cuda", "they are of a cuda device, here cpu"),
        ("name", "NVIDIA H200", "NVIDIA H100", "they are of a NVIDIA H100, here NVIDIA H200"),
        ("diffusers", "0.42.1", "0.30.0", "they are of diffusers 0.30.0, here 0.42.1"),
    ],
)
def test_counts_of_other_code_are_not_compared(key, new, old, expected):
    compared = compare({**OLD, key: new, "bytes": 1}, {**OLD, key: old}, "A")
    assert not compared.same and compared.not_compared == expected


@pytest.mark.parametrize("operators", [{}, None])
def test_no_operators_on_both_sides_are_not_equal_counts(operators):
    nothing = {**OLD, "operators": operators, "generated_kernels": 0}
    assert compare(nothing, nothing, "A").not_compared.startswith("this session counted no operators")
    assert compare(OLD, nothing, "A").not_compared.startswith("A counted no operators")


def test_only_the_largest_differences_are_listed():
    names = {f"op{n}": n for n in range(1, 9)}
    text = str(compare({**OLD, "operators": {**OLD["operators"], **names}}, OLD, "A"))
    assert "(op8 +8, op7 +7, op6 +6, op5 +5, op4 +4, op3 +3, 2 more)" in text


@pytest.mark.parametrize("new, old, side", [(None, OLD, "this session"), (OLD, None, "A")])
def test_a_side_without_counts_is_not_the_same(new, old, side):
    compared = compare(new, old, "A")
    assert not compared.same and str(compared) == f"counts are not compared with A: {side} has none"


def test_against_a_commit(inner, other_commit):  # noqa: F811
    inner.machine.more = {"addmm": 16, "mul": 4}
    assert inner.run("--perf-against=v1", "--benchmark-save=a").ret == 0, inner.output
    inner.prints(f"{SDPA}: COUNTS operators 25 -> 45 (addmm +16, mul +4) against 0123456789ab")
    info = inner.last()["benchmarks"][0]["extra_info"]
    assert info["counts"]["operators"] == {"addmm": 36, "add": 5, "mul": 4}
    assert info["counts_comparison"]["changes"] == ["operators 25 -> 45 (addmm +16, mul +4)"]
    result = inner.run("--perf-against=v1", FAIL)
    assert result.ret == ExitCode.FAILED, inner.output
    result.assert_outcomes(failed=1)
    inner.machine.more = {}
    assert inner.run("--perf-against=v1", FAIL).ret == 0, inner.output
    inner.prints("counts of 1 configuration are those of 0123456789ab")


def test_a_single_round_is_enough(inner, other_commit):  # noqa: F811
    inner.machine.more = {"mul": 1}
    assert inner.run("--perf-against=v1", FAIL, launches=1, rounds=1).ret == ExitCode.FAILED, inner.output
    inner.prints(f"{SDPA}: COUNTS operators 25 -> 26 (mul +1) against 0123456789ab")


def test_slower_with_other_counts_is_a_failure(inner, other_commit):  # noqa: F811
    inner.machine.base_slow, inner.machine.more = 1 / 1.05, {"mul": 1}
    assert inner.run("--perf-against=v1", launches=6).ret == ExitCode.SLOWER, inner.output
    assert inner.run("--perf-against=v1", FAIL, launches=6).ret == ExitCode.FAILED, inner.output
    inner.prints(f"{SDPA}: SLOWER +5.")


def test_two_sides_of_options(inner):
    sides = ("--perf-a=--attention original", "--perf-b=--attention sdpa")
    assert inner.run(*sides, FAIL, what=("--steps=2",)).ret == 0, inner.output
    inner.prints(f"counts of 1 configuration are those of {SDPA}")


def test_against_stored_sessions(inner):
    inner.run("--benchmark-save=old", what=TWO)
    assert inner.run("--benchmark-compare", FAIL, what=TWO).ret == 0, inner.output
    inner.prints("counts of 2 configurations are those of 0001_old")
    inner.machine.more = {"mul": 1}
    result = inner.run("--benchmark-compare", FAIL, "--benchmark-save=worse", what=TWO)
    assert result.ret == ExitCode.FAILED, inner.output
    inner.prints(f"{ORIGINAL}: COUNTS operators 25 -> 26 (mul +1) against 0001_old")
    # The run that failed is no baseline: the difference remains visible.
    assert inner.run("--benchmark-compare", FAIL, what=TWO).ret == ExitCode.FAILED, inner.output
    inner.prints("against 0001_old")


def test_a_baseline_without_counts_fails_the_gate(inner):
    inner.run("--benchmark-save=old")
    (path,) = inner.saved()
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["benchmarks"][0]["extra_info"]["counts"]
    path.write_text(json.dumps(document), encoding="utf-8")
    assert inner.run("--benchmark-compare").ret == 0, inner.output
    result = inner.run("--benchmark-compare", FAIL)
    assert result.ret == ExitCode.REFUSED, inner.output
    assert "has no session with counts of this software" in result.stderr.str()


def test_hosted_runners_compare_counts(inner, monkeypatch):
    monkeypatch.setenv("RUNNER_ENVIRONMENT", "github-hosted")
    inner.run("--benchmark-save=old")
    inner.machine.more = {"mul": 1}
    assert inner.run("--benchmark-compare").ret == 0, inner.output
    inner.prints(
        "perf: counts are compared with sessions up to 0001_old", f"{SDPA}: COUNTS operators 25 -> 26 (mul +1)"
    )
    inner.prints_no("SLOWER", "SAME")
    assert inner.run("--benchmark-compare", FAIL).ret == ExitCode.FAILED, inner.output


def test_counts_are_those_of_the_newest_session_that_has_the_configuration(inner):
    inner.run("--benchmark-save=mine")
    inner.run("--benchmark-save=other", what=("--attention=original", "--steps=2"))
    inner.machine.more = {"mul": 1}
    assert inner.run("--benchmark-compare", FAIL).ret == ExitCode.FAILED, inner.output
    inner.prints(f"{SDPA}: COUNTS operators 25 -> 26 (mul +1) against 0001_mine")
    inner.machine.more = {}
    assert inner.run("--benchmark-compare", FAIL).ret == 0, inner.output


def test_nothing_to_compare_with_is_refused(inner):
    result = inner.run(FAIL)
    assert result.ret == ExitCode.REFUSED
    assert f"{FAIL} needs --benchmark-compare" in result.stderr.str()
    assert inner.run("--benchmark-compare", FAIL).ret == ExitCode.REFUSED


def test_compare_of_two_files(inner, capsys):
    inner.run("--benchmark-save=old")
    inner.machine.more = {"mul": 1}
    inner.run("--benchmark-save=new")
    old, new = map(str, inner.saved())
    capsys.readouterr()
    from perf.__main__ import main

    main(["compare", old, new])
    assert f"{SDPA}: COUNTS operators 25 -> 26 (mul +1) against 0001_old" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key, value", [("operators", {"mm": -1}), ("operators", {"\x1b": 1}), ("bytes", "many"), ("torch", None)]
)
def test_damaged_counts_are_refused(inner, key, value):
    inner.run("--benchmark-save=old")
    (path,) = inner.saved()
    document = json.loads(path.read_text(encoding="utf-8"))
    document["benchmarks"][0]["extra_info"]["counts"][key] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BaselineError, match="counts"):
        read(path)
