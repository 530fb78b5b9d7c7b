"""`python -m perf battery`: rates of false alarms and detected slowdowns, and resuming from a file."""

from __future__ import annotations

import json
import math
import random

import pytest

from perf.analysis.statistics import MARGIN_FLOOR
from perf.analysis.verdicts import Verdict
from perf.commands import selftest
from perf.launch.process import ROOT


def _session(draw: random.Random, noise: float, slowdown: float, difference: float = 0.0) -> dict:
    def launches(factor: float) -> list[float]:
        return [0.1 * factor * math.exp(draw.gauss(0, noise)) for _ in range(10)]

    medians = {"plain": launches(1.0), "aa": launches(1 + difference), "slow": launches(1 + slowdown)}
    return {"medians": medians, "drift": 0.001}


@pytest.fixture
def draw(request):
    seed = random.randrange(2**32)
    print(f"random.Random({seed})")
    return random.Random(seed)


def test_quiet_machine(draw, capsys):
    sessions = [_session(draw, 0.002, 0.05) for _ in range(30)]
    same, slow = selftest.judge(sessions[0], 0.05, MARGIN_FLOOR)
    assert (same.verdict, slow.verdict) == (Verdict.SAME, Verdict.SLOWER)
    assert selftest.report(sessions, 0.05) == 0
    assert "0 false alarms in 30 A/A comparisons, 5 % slowdown detected in 30 of 30" in capsys.readouterr().out


def test_missed_slowdowns_fail(draw):
    assert selftest.report([_session(draw, 0.2, 0.05) for _ in range(30)], 0.05) == 1


def test_false_alarms_fail(draw):
    assert selftest.report([_session(draw, 0.002, 0.05, difference=0.1) for _ in range(30)], 0.05) == 1


def test_only_a_battery_with_the_same_options_is_resumed(tmp_path):
    path, header = tmp_path / "battery.json", {"schema": 1, "clock": "cpu", "launches": 6}
    assert selftest._earlier(path, header) == []
    path.write_text(json.dumps({**header, "sessions": [{"medians": {}}]}))
    assert selftest._earlier(path, header) == [{"medians": {}}]
    with pytest.raises(ValueError, match="other launches"):
        selftest._earlier(path, {**header, "launches": 10})
    for damaged in ("", "[]", "{", json.dumps(header)):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="is no battery"):
            selftest._earlier(path, header)


def test_docs_state_the_rates_of_the_stored_battery(capsys):
    stored = json.loads((ROOT / "perf" / "baselines" / "battery_two_cpu_cores.json").read_text(encoding="utf-8"))
    assert selftest.report(stored["sessions"], stored["slowdown"]) == 0
    out = capsys.readouterr().out
    assert "margin 1.00 %: 0 false alarms in 30 A/A comparisons, 5 % slowdown detected in 30 of 30" in out
    assert "margin 1.46 %: 0 false alarms in 30 A/A comparisons, 5 % slowdown detected in 28 of 30" in out
    text = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    assert "| 1 %, the least | 0 of 30 | 30 of 30 |" in text and "| 0 of 30 | 28 of 30 |" in text
    verdicts = [selftest.judge(session, 0.05, 0.01)[0].verdict.value for session in stored["sessions"]]
    same, undecided = verdicts.count("SAME"), verdicts.count("INCONCLUSIVE")
    assert same + undecided == 30 and f"the verdict was SAME in {same} sessions and INCONCLUSIVE in {undecided}" in text
