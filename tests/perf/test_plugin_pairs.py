"""Two labels in one session, end to end: --perf-aa measures this machine's noise, --perf-against is the pull-request gate."""

from __future__ import annotations

import json
import sys

import pytest
from inner_session import SDPA, SEED, TWO, inner_fixture, machine_fixture  # noqa: F401

from perf.analysis.verdicts import ExitCode
from perf.launch.process import Interpreter
from perf.runs import saved_run
from perf.session.workers import Launches


@pytest.mark.slow
def test_aa_saves_the_noise_and_the_next_comparison_uses_it(inner):
    inner.machine.noise = 0.1
    inner.run("--perf-aa", launches=6, what=TWO)
    document = inner.last()
    assert inner.saved()[-1].name.endswith("_aa.json")
    ratios = document["perf"]["aa"]["ratios"]
    assert len(ratios) == 2 and document["perf"]["regressed"] == []
    noise = max(abs(ratio - 1) for ratio in ratios)
    assert document["perf"]["aa"]["p95"] == pytest.approx(noise) and noise > 0.01, f"seed {SEED}"
    paired = document["benchmarks"][0]["extra_info"]["paired"]
    assert paired["variant"] == "aa" and len(paired["launches"]) == 6
    inner.run("--benchmark-compare", launches=6, what=TWO)
    inner.prints(f"comparisons, margin {100 * noise:.1f} %")
    inner.run("--perf-aa", launches=6, what=TWO)
    inner.prints(f"comparisons, margin {100 * noise:.1f} %")


def test_aa_of_a_quiet_machine_is_the_same(inner):
    assert inner.run("--perf-aa", launches=6).ret == 0, inner.output
    inner.prints(f"{SDPA}: SAME", "against itself (within_margin)")


def test_false_alarm_of_aa_is_no_regression(inner, monkeypatch):
    """Its ratios define the margin, so the run must stay a baseline candidate."""
    opened = Launches.open

    def second_label_is_faster(launches, slot):
        launch = opened(launches, slot)
        launch.factor = 0.9 if slot.variant == "aa" else 1.0
        return launch

    monkeypatch.setattr(Launches, "open", second_label_is_faster)
    result = inner.run("--perf-aa", launches=6)
    assert result.ret == ExitCode.SLOWER, inner.output
    assert inner.last()["perf"]["regressed"] == []
    assert saved_run.read(inner.saved()[-1]).why_no_candidate is None


@pytest.fixture
def other_commit(monkeypatch, inner):
    """A commit `v1` of another folder, without git."""

    class Folder:
        def cleanup(self):
            self.removed = True

    folder = Folder()
    (inner.path / "sd").mkdir()
    commit = ("0123456789ab", Interpreter(sys.executable, inner.path), folder)
    monkeypatch.setattr("perf.plugin.options.other_commit", lambda reference, root: commit)
    return folder


def test_against_a_faster_commit(inner, other_commit):
    inner.machine.base_slow = 1 / 1.05
    result = inner.run("--perf-against=v1", "--benchmark-save=a", launches=6)
    assert result.ret == ExitCode.SLOWER, inner.output
    inner.prints(f"{SDPA}: SLOWER +5.", "against 0123456789ab (beyond_margin)")
    assert other_commit.removed
    perf = inner.last()["perf"]
    assert (perf["against"], perf["regressed"]) == ("0123456789ab", [SDPA])
    paired = inner.last()["benchmarks"][0]["extra_info"]["paired"]
    assert (paired["variant"], paired["name"]) == ("base", "0123456789ab")


def test_a_strict_pair_that_cannot_be_measured_fails(inner, other_commit, monkeypatch):
    inner.machine.refused = {SDPA: ("unavailable", "not here")}
    assert inner.run("--perf-against=v1", launches=6).ret == 0, inner.output
    assert inner.run("--perf-against=v1", "--perf-strict", launches=6).ret == ExitCode.FAILED, inner.output
    opened = Launches.open

    def only_the_other_commit(launches, slot):
        inner.machine.refused = {} if slot.variant else {SDPA: ("unavailable", "not here")}
        return opened(launches, slot)

    monkeypatch.setattr(Launches, "open", only_the_other_commit)
    run = inner.run("--perf-against=v1", "--perf-strict", launches=6, what=TWO)
    assert run.ret == ExitCode.FAILED, inner.output
    inner.prints(f"{SDPA} is not compared: {SDPA}: unavailable: not here")


def test_against_the_same_commit(inner, other_commit):
    assert inner.run("--perf-against=v1", launches=6).ret == 0, inner.output
    inner.prints(f"{SDPA}: SAME")


def test_undecided_pairs_get_further_launches_and_the_report_says_how_many(inner, other_commit):
    inner.machine.base_slow, inner.machine.noise = 1 / 1.015, 0.06
    inner.run("--perf-against=v1", "--benchmark-save=a", launches=None)
    inner.prints("perf: undecided after 8 launches, going on to 12: " + SDPA)
    made = len(inner.last()["benchmarks"][0]["extra_info"]["launches"])
    assert made in (12, 16, 24)
    inner.prints(f"{made} launches of 2 rounds")
    assert inner.last()["perf"]["looks"] == [8, 12, 16, 24]
    assert inner.last()["benchmarks"][0]["extra_info"]["verdict"]["launches"] == made


@pytest.mark.parametrize("noise, most", [(0.0005, 8), (0.06, 24)])
def test_noisy_launches_have_more_rounds(inner, other_commit, noise, most):
    inner.machine.noise = noise
    inner.run("--perf-against=v1", "--benchmark-save=a", launches=3, rounds=None)
    launches = inner.last()["benchmarks"][0]["extra_info"]["launches"]
    made = sorted(len(launch["round_seconds"]) for launch in launches)
    assert made[0] >= 8 and (made[-1] == 8 if most == 8 else 8 < made[-1] <= most), inner.output
    inner.prints(f"3 launches of {made[0]}" + (f" to {made[-1]} rounds" if made[0] < made[-1] else " rounds"))


def test_a_clear_change_ends_at_the_first_look(inner, other_commit):
    inner.machine.base_slow = 1 / 1.05
    assert inner.run("--perf-against=v1", "--benchmark-save=a", launches=None).ret == ExitCode.SLOWER, inner.output
    assert len(inner.last()["benchmarks"][0]["extra_info"]["launches"]) == 8
    inner.prints_no("going on to")


def test_an_inconclusive_pair_says_what_was_detectable(inner, other_commit):
    inner.machine.noise = 0.05
    inner.run("--perf-against=v1", launches=4)
    inner.prints(f"{SDPA}: INCONCLUSIVE", "% was detectable; --perf-launches")


def test_drift_does_not_invalidate_a_pair(inner, other_commit):
    """Both sides of a pair slow down together; only the absolute times are no baseline."""
    inner.machine.base_slow, inner.machine.drift = 1 / 1.05, 0.2
    inner.machine.rounds = -64  # the drift begins in the last third
    result = inner.run("--perf-against=v1", "--benchmark-save=a", launches=12)
    assert result.ret == ExitCode.SLOWER, inner.output
    inner.prints("drifted: anchor_drift ", f"{SDPA}: SLOWER +5.")
    assert inner.last()["perf"]["invalid"] is None
    assert saved_run.read(inner.saved()[-1]).why_no_candidate.startswith("drifted: anchor_drift")


def test_a_control_arm_that_differs_from_its_twin_makes_the_session_invalid(inner, other_commit, monkeypatch):
    opened = Launches.open

    def slow_control(launches, slot):
        launch = opened(launches, slot)
        launch.factor = 1.1 if slot.variant == "control" else 1.0
        return launch

    monkeypatch.setattr(Launches, "open", slow_control)
    result = inner.run("--perf-against=v1", "--benchmark-save=a", launches=6)
    assert result.ret == ExitCode.FAILED, inner.output
    inner.prints(
        "INVALID session: control_arm SLOWER +10.", f"{SDPA}: INVALID against 0123456789ab (control_arm SLOWER"
    )
    perf = inner.last()["perf"]
    assert perf["control"].keys() == {"configuration", "ratio", "launches"}
    assert perf["invalid"].startswith("control_arm SLOWER") and perf["control"]["ratio"]["estimate"] > 1.09
    inner.prints_no("fastest here")


def test_failing_base_commit_fails_the_run(inner, other_commit):
    """Without a comparison the gate must not pass."""
    inner.machine.refused = {f"{SDPA}@base": ("usage", "attention 'sdpa': choose from original, mha")}
    assert inner.run("--perf-against=v1", launches=6).ret == ExitCode.FAILED
    inner.prints(f"INVALID {SDPA}@base: usage: attention 'sdpa': choose from")


def test_against_uses_the_stored_noise(inner, other_commit):
    inner.store(1)
    path = inner.saved()[-1]
    document = json.loads(path.read_text())
    document["perf"]["aa"] = {"comparisons": 1, "p95": 0.04, "ratios": [1.04]}
    path.write_text(json.dumps(document))
    inner.machine.base_slow = 1 / 1.03
    assert inner.run("--perf-against=v1", launches=6).ret == 0, inner.output
    inner.prints("margin 4.0 %")


def test_injected_slowdown_makes_no_baseline(inner):
    assert inner.run("--perf-inject-slowdown=0.05", "--benchmark-save=a").ret == 0
    assert inner.last()["perf"]["partial"] == "slowed down on purpose"
    assert inner.last()["perf"]["injected_slowdown"] == 0.05
