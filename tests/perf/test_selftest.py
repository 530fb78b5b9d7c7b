"""`python -m perf battery`: rates of false alarms and detected slowdowns, resuming, interference and simulation."""

from __future__ import annotations

import itertools
import json
import math
import operator
import random
import statistics
import time

import pytest
from inner_session import machine_fixture  # noqa: F401
from selection import slow_or_nightly

from perf.__main__ import main
from perf.analysis.paired import LOOKS, launch_effects
from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import ExitCode, Verdict
from perf.commands import interference, selftest, simulate
from perf.launch.process import ROOT
from perf.machine.nvml import NoTelemetry
from perf.runs.fingerprints import source_sha256
from perf.session.noise import LOADED_DEVIATION, QUIET_DEVIATION

LOADS = ("idle", "bursts", "wander", "wander_noisy")
IDLE, BURSTS, WANDER, NOISY = (ROOT / "perf" / "baselines" / f"battery_{load}.json" for load in LOADS)
TEN = (10,)  # a single look
FIVE = (0.05,)


def _session(draw: random.Random, noise: float, slowdown: float, difference: float = 0.0) -> dict:
    def launches(factor: float) -> list[list[float]]:
        return [[0.1 * factor * math.exp(draw.gauss(0, noise))] * 8 for _ in range(10)]

    rounds = {"plain": launches(1.0), "aa": launches(1 + difference), "slow5": launches(1 + slowdown)}
    return {"rounds": rounds, "drift": 0.001, "invalid": None, "seconds": 100.0}


@pytest.fixture
def draw(request):
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    return random.Random(seed)


def test_quiet_machine(draw, capsys):
    sessions = [_session(draw, 0.002, 0.05) for _ in range(40)]
    same, (slow,) = selftest.judge_session(sessions[0], TEN, FIVE, MARGIN_FLOOR)
    assert (same.verdict, slow.verdict) == (Verdict.SAME, Verdict.SLOWER)
    assert selftest.report(sessions, TEN, FIVE) == 0
    out = capsys.readouterr().out
    assert "0 false alarms in 40 A/A comparisons, 5 % slowdown detected in 40 of 40, 0 INVALID" in out
    assert "10 launches a comparison in the median" in out and "100 s a session in the median" in out
    assert "about 100 s a comparison in the median" in out  # three labels, as here


def test_missed_slowdowns_fail(draw):
    assert selftest.report([_session(draw, 0.2, 0.05) for _ in range(40)], TEN, FIVE) == 1


def test_a_smaller_slowdown_is_reported_and_need_not_be_detected(draw, capsys):
    sessions = [_session(draw, 0.002, 0.05) for _ in range(40)]
    for session in sessions:
        session["rounds"]["slow0.1"] = session["rounds"]["plain"]
    assert selftest.report(sessions, TEN, (0.05, 0.001)) == 0
    assert "5 % slowdown detected in 40 of 40, 0.1 % slowdown detected in 0 of 40" in capsys.readouterr().out


def test_false_alarms_fail(draw):
    assert selftest.report([_session(draw, 0.002, 0.05, difference=0.1) for _ in range(40)], TEN, FIVE) == 1


def test_invalid_sessions_fail_and_give_no_verdict(draw, capsys):
    sessions = [_session(draw, 0.002, 0.05) for _ in range(40)]
    for session in sessions[:2]:
        session["invalid"] = "control_arm SLOWER +5.0 %"
    assert selftest.report(sessions, TEN, FIVE) == 1
    assert "detected in 38 of 40, 2 INVALID" in capsys.readouterr().out


def test_only_a_battery_with_the_same_options_is_resumed(tmp_path):
    stack = {"name": "AMD EPYC", "processor": "family 25, model 1", "memory_bytes": 1}
    path, header = tmp_path / "battery.json", {"schema": 2, "clock": "cpu", "looks": [8, 12], "stack": stack}
    assert selftest._earlier(path, header) == []
    path.write_text(json.dumps({**header, "sessions": [{"rounds": {}}]}))
    assert selftest._earlier(path, {**header, "stack": {**stack, "memory_bytes": 2}}) == [{"rounds": {}}]
    with pytest.raises(ValueError, match="other looks"):
        selftest._earlier(path, {**header, "looks": [10]})
    with pytest.raises(
        ValueError, match=r"another machine .*\(processor family 25, model 1, here family 25, model 17\)"
    ):
        selftest._earlier(path, {**header, "stack": {"name": "AMD EPYC", "processor": "family 25, model 17"}})
    for damaged in ("", "[]", "{", json.dumps(header)):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is no battery"):
            selftest._earlier(path, header)


@pytest.fixture
def battery_machine(tmp_path, monkeypatch, machine):
    """The synthetic machine, on which `sd-perf battery` runs."""
    monkeypatch.setattr("perf.session.workers.ProcessLaunch", machine)
    monkeypatch.setattr(selftest, "open_visible_device", lambda: NoTelemetry("a test"))
    monkeypatch.setattr("perf.session.lock.lock_folder", lambda: tmp_path / "locks")
    return machine


@pytest.mark.usefixtures("battery_machine")
def test_a_battery_is_measured_and_resumed(tmp_path, capsys):
    """The code of the sessions on a synthetic machine; the arms slowed by 5 and 3 % are found in both sessions."""
    path = tmp_path / "battery.json"

    def battery(sessions: int) -> int:
        arguments = ["--launches", "6", "--sessions", str(sessions), "--interference", "wander"]
        return main(["battery", "--output", str(path), *arguments])

    assert battery(1) == 0
    assert "1/1: A/A SAME" in capsys.readouterr().out
    first = json.loads(path.read_text(encoding="utf-8"))
    assert list(first["sessions"][0]["rounds"]) == ["plain", "aa", "slow5", "slow3", "control"]
    assert (first["rounds"], first["most_rounds"]) == (8, 24)  # as the gate
    assert first["source"] == {name: source_sha256(ROOT / name) for name in ("sd", "perf")}
    assert battery(2) == 0
    out = capsys.readouterr().out
    assert "1/2" not in out and "2/2: A/A SAME" in out
    assert "5 % slowdown detected in 2 of 2, 3 % slowdown detected in 2 of 2, 0 INVALID" in out
    assert json.loads(path.read_text(encoding="utf-8"))["sessions"][0] == first["sessions"][0]


def test_a_battery_on_a_noisy_machine_has_more_rounds_as_the_gate(tmp_path, battery_machine):
    battery_machine.noise, path = 0.06, tmp_path / "battery.json"
    main(["battery", "--output", str(path), "--launches", "3", "--sessions", "1"])
    rounds = json.loads(path.read_text(encoding="utf-8"))["sessions"][0]["rounds"]
    assert 8 < max(map(len, rounds["plain"])) <= 24


def test_a_decided_label_has_no_seconds_in_further_launches(draw):
    session = _session(draw, 0.002, 0.05)
    session["rounds"]["slow5"] = [*session["rounds"]["slow5"][:5], *([] for _ in range(5))]
    assert list(selftest._comparison_seconds(session, (5, 10))) == pytest.approx([3 * 5 * 100.0 / 25] * 2)
    session["rounds"] = {label: [[]] for label in session["rounds"]}
    assert list(selftest._comparison_seconds(session, TEN)) == []


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["battery", "--output", str(tmp_path / "file" / "battery.json")]) == ExitCode.REFUSED
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", '{"sessions": [{}]}', '{"sessions": []}'])
def test_simulation_refuses_other_files(tmp_path, capsys, content):
    (tmp_path / "a.json").write_text(content)
    assert main(["battery", "--simulate", str(tmp_path / "a.json")]) == ExitCode.REFUSED
    assert "error: " in capsys.readouterr().err
    assert main(["battery", "--simulate", str(tmp_path / "none.json")]) == ExitCode.REFUSED


def test_simulation_of_known_noise():
    noise = [0.01, -0.01, 0.02, -0.015, 0.005] * 4
    null = simulate.simulate(noise, 0.0, LOOKS, 0.01, 200)
    assert null.alarms <= 0.02 and null.share[Verdict.SAME] >= 0.9 and 8 <= null.launches <= 24
    slower = simulate.simulate(noise, 0.05, LOOKS, 0.01, 200)
    assert slower.share[Verdict.SLOWER] >= 0.98 and slower.launches < 10
    assert simulate.simulate(noise, 0.05, LOOKS, 0.01, 200) == slower
    assert sum(null.share.values()) == pytest.approx(1.0)


def test_bursts_work_for_their_share_and_are_equal_in_all_processes():
    schedule = list(itertools.islice(interference.bursts(3), 400))
    assert schedule == list(itertools.islice(interference.bursts(3), 400))
    rest, work = map(sum, zip(*schedule))
    assert work / (rest + work) == pytest.approx(interference.BURST_SHARE, abs=0.04)
    assert max(seconds for _, seconds in schedule) <= interference.BURST_SECONDS


def test_wander_is_slow_and_bounded():
    shares = [interference.wander_share(second, 1) for second in range(600)]
    assert 0 <= min(shares) < 0.2 and 0.6 < max(shares) <= interference.MOST_WORK
    assert max(abs(a - b) for a, b in itertools.pairwise(shares)) < 0.05


def test_interference_ends_with_its_context():
    with pytest.raises(ValueError, match="choose from none, bursts, wander"), interference.interference("storm", 1):
        pass
    import psutil

    before = {child.pid for child in psutil.Process().children()}
    with interference.interference("wander", 1):
        time.sleep(0.1)
        started = {child.pid for child in psutil.Process().children()} - before
        assert started
    assert not started & {child.pid for child in psutil.Process().children()}


@pytest.mark.parametrize("path", [IDLE, BURSTS, WANDER, NOISY], ids=lambda path: path.stem)
def test_docs_state_the_rates_of_the_stored_sessions(path, capsys):
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert selftest.report(stored["sessions"], LOOKS, stored["slowdowns"]) == 0
    out = capsys.readouterr().out.splitlines()[0]
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert out in text, out


@pytest.mark.parametrize(
    "path, row",
    [
        (IDLE, "idle machine"),
        (BURSTS, "beside bursts of load on both cores"),
        (WANDER, "beside load that wanders over minutes"),
    ],
    ids=["idle", "bursts", "wander"],
)
def test_the_readme_states_the_same_counts(path, row):
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    judged = [selftest.judge_session(session, LOOKS, FIVE, MARGIN_FLOOR) for session in sessions]
    alarms = sum(same.verdict in (Verdict.SLOWER, Verdict.FASTER) for same, _ in judged)
    found = sum(slowed.verdict is Verdict.SLOWER for _, (slowed,) in judged)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| {row} | {alarms} of {len(sessions)} | {found} of {len(sessions)} |" in text


@pytest.mark.parametrize(
    "path", slow_or_nightly([IDLE, BURSTS, WANDER, NOISY], lambda path: path == BURSTS), ids=lambda path: path.stem
)
def test_docs_state_the_simulated_rates(path, capsys):
    assert main(["battery", "--simulate", str(path)]) == 0
    out = capsys.readouterr().out
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert out.strip().replace("\n", "\n    ") in text, out


def _pairs(path, rounds: int):
    """Yield, by session and label, [(seconds of the label, of the plain one)] by launch, of its first rounds."""
    for session in json.loads(path.read_text(encoding="utf-8"))["sessions"]:
        plain = session["rounds"]["plain"]
        for label in ("aa", "slow5"):
            both = ((ours[:rounds], theirs[:rounds]) for ours, theirs in zip(session["rounds"][label], plain))
            yield [pair for pair in both if all(pair)]


def test_docs_state_the_deviation_between_launches_without_the_noise_of_rounds():
    """The covariance of the effects of even and odd rounds, of both sides' launches in the idle sessions."""
    products = []
    for pairs in _pairs(IDLE, 24):
        halves = [launch_effects(*zip(*((ours[i::2], theirs[i::2]) for ours, theirs in pairs))) for i in (0, 1)]
        even, odd = ([effect - statistics.fmean(half) for effect in half] for half in halves)
        products += map(operator.mul, even, odd)
    between = math.sqrt(statistics.fmean(products))
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert f"standard deviation of {100 * between:.1f} % without the noise of their rounds" in text


@pytest.mark.parametrize("path, deviation", [(IDLE, QUIET_DEVIATION), (NOISY, LOADED_DEVIATION)], ids=["idle", "noisy"])
def test_the_expected_noise_is_that_of_the_stored_sessions(path, deviation):
    """Pooled over sessions; of a launch of 8 rounds, as those of an ordinary session."""
    effects = [launch_effects(*zip(*pairs)) for pairs in _pairs(path, 8)]
    pooled = sum(statistics.variance(launches) * (len(launches) - 1) for launches in effects)
    assert math.sqrt(pooled / sum(len(launches) - 1 for launches in effects)) == pytest.approx(deviation, abs=5e-4)
