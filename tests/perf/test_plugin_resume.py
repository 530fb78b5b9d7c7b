"""Unfinished sessions: kept, announced, resumed by their plan or name, dropped by name."""

from __future__ import annotations

import pytest
from inner_session import ONE, ORIGINAL, SDPA, TWO, inner_fixture, machine_fixture  # noqa: F401

from perf.__main__ import main
from perf.analysis.verdicts import ExitCode
from perf.session import journal

OTHER = ("--attention=original", "--steps=2")


def interrupt(inner, what=ONE, rounds: int = 5) -> journal.Recorded:
    """Run a session and end it by Ctrl-C after some rounds; the first of them is the reference image."""
    inner.machine.interrupt_after = inner.machine.rounds + rounds
    assert inner.run(what=what).ret == pytest.ExitCode.INTERRUPTED, inner.output
    inner.prints("perf: interrupted; the same command with --perf-resume measures the missing rounds")
    inner.machine.interrupt_after = None
    return journal.unfinished(inner.storage / "journal")[-1]


def test_next_run_says_how_to_go_on(inner):
    cut = interrupt(inner)
    assert inner.run(what=OTHER).ret == 0
    inner.prints(f"perf: unfinished session {cut.name} (started ", f"2 rounds, {SDPA})", f"--perf-resume={cut.name}")
    assert inner.run("--perf-resume").ret == 0, inner.output
    assert inner.run(what=OTHER).ret == 0
    inner.prints_no("unfinished")


def test_unfinished_session_outlives_any_number_of_complete_ones(inner):
    cut = interrupt(inner)
    for _ in range(journal.KEPT + 2):
        assert inner.run(what=OTHER).ret == 0
    assert len(list((inner.storage / "journal").glob("*.jsonl"))) == journal.KEPT + 2  # and the last complete one
    before = inner.machine.rounds
    assert inner.run("--perf-resume", "--benchmark-save=a").ret == 0, inner.output
    assert inner.machine.rounds - before < 6 and len(inner.last()["benchmarks"][0]["stats"]["data"]) == 4
    inner.prints(f"perf: resuming from {cut.path} with 2 measured rounds")


def test_resume_finds_the_session_with_this_plan(inner):
    """Neither the newest session nor the newest unfinished one."""
    mine = interrupt(inner, rounds=6)
    others = interrupt(inner, OTHER, rounds=4)
    assert inner.run(what=("--attention=mha", "--steps=2")).ret == 0
    assert inner.run("--perf-resume").ret == 0, inner.output
    inner.prints(f"perf: resuming from {mine.path}")
    assert [recorded.name for recorded in journal.unfinished(inner.storage / "journal")] == [others.name]
    assert inner.run("--perf-resume", what=("--attention=mha", "--steps=3")).ret == ExitCode.FAILED
    inner.prints("was started with other slots", "give the same options")


def test_resume_prefers_a_session_with_rounds(inner):
    """The command may have been repeated without --perf-resume, and interrupted before its first round."""
    mine = interrupt(inner)
    inner.machine.interrupt_after = inner.machine.rounds
    assert inner.run().ret == pytest.ExitCode.INTERRUPTED
    inner.machine.interrupt_after = None
    assert inner.run("--perf-resume").ret == 0, inner.output
    inner.prints(f"perf: resuming from {mine.path}")


def test_resume_with_another_loading_is_refused(inner):
    interrupt(inner, what=TWO, rounds=6)
    assert inner.run("--perf-resume", "--perf-loading=single", what=TWO).ret == ExitCode.REFUSED, inner.output
    inner.prints("--perf-loading single: the session to resume began with all")
    assert inner.run("--perf-resume", "--perf-loading=all", what=TWO).ret == 0, inner.output


def test_resume_by_name(inner):
    first, second = interrupt(inner), interrupt(inner)
    assert inner.run(f"--perf-resume={first.name}").ret == 0, inner.output
    inner.prints(f"perf: resuming from {first.path}")
    assert inner.run(f"--perf-resume={second.name}", what=OTHER).ret == ExitCode.FAILED
    inner.prints(f"{second.path} was started with other slots: ['{SDPA}'], now ['{ORIGINAL}']")
    assert inner.run("--perf-resume=19990101").ret == ExitCode.FAILED
    inner.prints("no session has the name 19990101 in ", f"there are: {first.name}, {second.name}")
    assert inner.run("--perf-resume=2").ret == ExitCode.FAILED
    inner.prints("several sessions have the name 2 in ")


def test_resume_that_consumed_the_test_path(inner):
    assert inner.run("--perf-resume", "suite").ret == ExitCode.REFUSED
    inner.prints("'suite' is no name of a session; write --perf-resume=NAME, or put suite before it")


def test_unfinished_command_lists_and_drops(inner, capsys):
    storage = ("--storage", str(inner.path / ".benchmarks"))
    assert main(["unfinished", *storage]) == 0
    assert "no unfinished session" in capsys.readouterr().out
    cut = interrupt(inner)
    capsys.readouterr()
    assert main(["unfinished", *storage]) == 0
    assert f"{cut.path.parent}: {cut}" in capsys.readouterr().out
    assert main(["unfinished", *storage, "--drop", "19990101"]) == ExitCode.REFUSED
    assert f"no session has the name 19990101 in {inner.path / '.benchmarks'}" in capsys.readouterr().err
    with journal.Journal(cut.path, after=journal.read(cut.path)):
        assert journal.unfinished(cut.path.parent) == []
        assert main(["unfinished", *storage, "--drop", cut.name]) == ExitCode.REFUSED
        assert "its session is running" in capsys.readouterr().err
        with pytest.raises(journal.JournalError, match="its session is running"):
            journal.Journal(cut.path, after=journal.read(cut.path))
    assert main(["unfinished", *storage, "--drop", cut.name]) == 0
    assert f"dropped {cut.name}" in capsys.readouterr().out and not cut.path.exists()


def test_session_without_a_measured_round_is_not_unfinished(inner):
    inner.machine.interrupt_after = 2
    assert inner.run().ret == pytest.ExitCode.INTERRUPTED
    inner.machine.interrupt_after = None
    assert inner.run().ret == 0
    inner.prints_no("unfinished session")
