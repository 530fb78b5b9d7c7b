"""--perf-a and --perf-b, end to end: two configurations compared as two commits are."""

from __future__ import annotations

import sys

import pytest
from inner_session import ORIGINAL, SDPA, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.session import journal

A, B = "--perf-a=--attention sdpa", "--perf-b=--attention original"
STEPS = ("--steps=2",)


def test_slower_side_is_found(inner):
    inner.machine.slow[SDPA] = 1.05
    result = inner.run(A, B, "--benchmark-save=a", launches=6, what=STEPS)
    assert result.ret == ExitCode.SLOWER, inner.output
    result.assert_outcomes(failed=1)
    inner.prints(f"{SDPA}: SLOWER +5.", f"against {ORIGINAL} (beyond_margin)")
    (saved,) = inner.last()["benchmarks"]
    paired = saved["extra_info"]["paired"]
    assert (paired["variant"], paired["name"], len(paired["launches"])) == ("b", ORIGINAL, 6)
    assert saved["extra_info"]["verdict"]["against"] == ORIGINAL
    assert inner.last()["perf"]["regressed"] == [], "another configuration is no earlier state"
    assert (
        inner.run(
            *(f"--perf-{x}={y}" for x, y in (("a", "--attention original"), ("b", "--attention sdpa"))),
            launches=6,
            what=STEPS,
        ).ret
        == 0
    )
    inner.prints(f"{ORIGINAL}: FASTER -4.", f"against {SDPA} (beyond_margin)")


def test_equal_sides_are_the_same(inner):
    assert inner.run(A, B, launches=6, what=STEPS).ret == 0, inner.output
    inner.prints(f"{SDPA}: SAME", f"against {ORIGINAL}")


def test_common_options_are_crossed(inner):
    assert inner.run(A, B, launches=6, what=(*STEPS, "--batch=1", "--batch=2")).ret == 0, inner.output
    for batch in (1, 2):
        inner.prints(f"tiny-sdpa-plms2-b{batch}: SAME", f"against tiny-original-plms2-b{batch}")


def test_sides_with_another_interpreter(inner):
    """Two versions of torch; here both labels are this Python."""
    sides = (f"--perf-a=--perf-python new={sys.executable}", f"--perf-b=--perf-python old={sys.executable}")
    assert inner.run(*sides, launches=6, what=STEPS).ret == 0, inner.output
    inner.prints("tiny-sdpa-plms2-new-b1: SAME", "against tiny-sdpa-plms2-old-b1")


def test_failing_second_side_fails_the_run(inner):
    inner.machine.refused = {ORIGINAL: ("unavailable", "not here")}
    assert inner.run(A, B, what=STEPS).ret == ExitCode.FAILED
    inner.prints(f"INVALID {SDPA}@b: unavailable: not here")


def test_wrong_image_of_the_second_side_fails_the_run(inner):
    inner.machine.wrong = {"tiny-mha-plms2-b1"}
    assert inner.run(A, "--perf-b=--attention mha", what=STEPS).ret == ExitCode.FAILED
    inner.prints(f"INVALID {SDPA}@b: wrong_image")


def test_resumed_only_with_the_same_second_side(inner):
    inner.machine.interrupt_after = 8
    assert inner.run(A, B, what=STEPS).ret == pytest.ExitCode.INTERRUPTED
    inner.machine.interrupt_after = None
    assert inner.run(A, "--perf-b=--attention mha", "--perf-resume", what=STEPS).ret == ExitCode.FAILED
    inner.prints("was started with other configurations: {'attention': 'original'")
    assert inner.run(A, B, "--perf-resume", what=STEPS).ret == 0, inner.output
    assert journal.unfinished(inner.storage / "journal") == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((A,), "--perf-b is missing: --perf-a and --perf-b are the two sides of one comparison"),
        ((A, "--perf-b= "), "--perf-b: the value is empty; is a variable unset?"),
        (
            (A, A.replace("-a=", "-b=")),
            "--perf-a and --perf-b are both tiny-sdpa-b1; --perf-aa compares it with itself",
        ),
        ((A, "--perf-b=--attention flash3"), "--perf-b: argument --attention: 'flash3': choose from"),
        ((A, "--perf-b=--perf-launches 3"), "--perf-b: unrecognized arguments: --perf-launches 3"),
        ((A, "--perf-b=mha"), "--perf-b: unrecognized arguments: mha"),
        ((A, "--perf-b=--ckpt 'a"), "No closing quotation"),
        ((A, "--perf-b=--ckpt absent.ckpt"), "--ckpt: absent.ckpt: there is no such file"),
        ((A, "--perf-b=--batch 1 --batch 2"), "batch has several values; a side is one configuration"),
        ((A, B, "--perf-aa"), "both give every configuration a second label: choose one"),
        ((A, B, "--attention=mha", "--attention=sdpa", "--batch=1"), None),
        ((A, f"--perf-b=--perf-python x={sys.executable}", "--perf-inprocess"), "--perf-inprocess has one interpreter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_usage_errors(inner, arguments, message):
    result = inner.run(*arguments, what=())
    if message is None:  # both values are replaced by the sides, and one comparison is left
        assert result.ret == 0, inner.output
        return
    assert result.ret == ExitCode.REFUSED, inner.output
    inner.prints(message)
    inner.prints_no("Traceback", "INTERNALERROR")
    assert inner.machine.opened == []
