"""Change points of stored sessions: on synthetic series with known steps, of stored runs, and of hosted runners."""

from __future__ import annotations

import random

import pytest
from saved_runs import document, put, store

from perf.__main__ import main
from perf.analysis.verdicts import ExitCode
from perf.runs import history
from perf.runs.baselines import candidates, why_foreign
from perf.runs.saved_run import parse, read

SDPA = "tiny-sdpa-b1"


@pytest.fixture(autouse=True)
def _ruptures(request):
    if "without" not in request.node.name:
        pytest.importorskip("ruptures", reason="the extra `history` brings ruptures")


def synthetic(draw: random.Random, count: int, step: float, outliers: float) -> tuple[list[float], int]:
    """(values with 1 % noise and a step, the index of the step); outliers are slower by up to 20 %."""
    at = draw.randrange(5, count - 4)
    values = [
        draw.lognormvariate(0, 0.01)
        * (1 + step * (n >= at))
        * (1 + abs(draw.gauss(0, 0.08)) * (draw.random() < outliers))
        for n in range(count)
    ]
    return values, at


@pytest.mark.parametrize("outliers", [0.0, 0.05])
def test_known_steps_are_found_and_nothing_else(outliers):
    """docs/statistics.md has the rates in hundreds of series."""
    draw, series = random.Random(1), 25
    same = [history.change_indices(synthetic(draw, 20, 0.0, outliers)[0]) for _ in range(series)]
    assert sum(map(bool, same)) <= 2, same
    for step in (0.05, -0.05):
        cases = [synthetic(draw, 20, step, outliers) for _ in range(series)]
        found = [any(abs(point - at) <= 1 for point in history.change_indices(values)) for values, at in cases]
        assert sum(found) >= 0.85 * series, (step, sum(found))


def test_steps_in_series_without_noise():
    pytest.importorskip("ruptures")
    assert history.change_indices([1.0] * 8) == []
    assert history.change_indices([1.0] * 4 + [1.1] * 4) == [4]
    assert history.change_indices([1.0] * 4 + [1.005] * 4) == [], "below the smallest margin"
    assert history.change_indices([1.0] * 4 + [1.1] * 4 + [1.0] * 4) == [4, 8]
    assert history.change_indices([1.0] * 2 + [1.1] * 3) == [], "too few sessions"


def night(number: int, slow: float = 1.0) -> dict:
    """A session of its own commit, on a machine whose speed differs from night to night."""
    made = document(number, {SDPA: slow}, offset=random.Random(number).lognormvariate(0, 0.1), noise=0.002)
    made["commit_info"] = {"id": f"{number:02d}" * 20}
    made["perf"].update(partial=None, invalid=None, regressed=[])
    return made


@pytest.fixture
def nights(tmp_path):
    """Sixteen nights; the configuration is 6 % slower from the tenth on."""
    for number in range(1, 17):
        store(tmp_path, night(number, 1.06 if number >= 10 else 1.0), number)
    return tmp_path


def test_change_is_named_with_its_commits(nights, capsys):
    assert main(["history", str(nights)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "from 00" in line]
    assert f"{SDPA}: SLOWER +6." in line
    assert "from 0010_nightly on, commits 090909090909..101010101010 (9 sessions before, 7 after)" in line


def test_change_of_software_is_named(nights):
    runs = []
    for number in range(1, 17):
        made = night(number, 0.9 if number >= 10 else 1.0)
        made["machine_info"]["stack"]["torch"] = "2.15.0" if number >= 10 else "2.14.0"
        runs.append(read(store(nights, made, number)))
    (series,) = [series for series in history.series_of(runs) if series.id == SDPA]
    (change,) = history.find_changes(series)
    assert change.software == ["torch 2.14.0 to 2.15.0"] and 0.88 < change.ratio < 0.92
    assert str(change).startswith("FASTER -")


def test_two_machines_are_two_histories(nights):
    runs = [read(path) for path in sorted(nights.iterdir())]
    others = [parse({**night(number), "machine_info": {"stack": {"name": "other"}}}, nights) for number in range(1, 17)]
    assert len(history.series_of([*runs, *others])) == 2 * len(history.series_of(runs))


def test_left_out_runs_are_printed(nights, capsys):
    changes = {
        17: put("perf", "partial", "interrupted"),
        18: put("perf", "invalid", "invalid_rounds 30 %"),
        19: put("machine_info", "stack", "hosted", True),
    }
    for number, change in changes.items():
        made = night(number)
        change(made)
        store(nights, made, number)
    store(nights, night(20), 20).write_text("{")
    store(nights, night(16, 1.06), 21)  # a copy
    assert main(["history", str(nights)]) == 0
    out, err = capsys.readouterr()
    assert "7 after" in out
    for reason in (
        "0017_nightly.json: partial",
        "0018_nightly.json: invalid",
        "of a hosted runner",
        "0020_nightly.json",
    ):
        assert reason in err


def test_history_without_runs(tmp_path, capsys):
    pytest.importorskip("ruptures")
    assert main(["history", str(tmp_path)]) == ExitCode.REFUSED
    assert "no saved run in" in capsys.readouterr().err


def test_without_ruptures_the_command_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("perf.runs.history.is_available", lambda: False)
    assert main(["history", str(tmp_path)]) == ExitCode.REFUSED
    assert 'pip install "sd-perf[history]"' in capsys.readouterr().err


def test_sessions_of_hosted_runners_are_never_compared_without_ruptures(tmp_path, monkeypatch):
    from perf.machine.nvml import NoTelemetry
    from perf.machine.stack import stack

    made = night(1)
    made["machine_info"]["stack"]["hosted"] = True
    hosted = read(store(tmp_path, made, 1))
    assert "hosted runner" in why_foreign(hosted.machine, hosted.machine)
    ((_, reason),) = candidates(tmp_path, hosted.machine, "cpu", 1).refused
    assert reason.startswith("foreign: ") and "hosted runner" in reason
    for environment, value in (("github-hosted", True), ("self-hosted", False), (None, None)):
        monkeypatch.delenv("RUNNER_ENVIRONMENT", raising=False)
        if environment:
            monkeypatch.setenv("RUNNER_ENVIRONMENT", environment)
        assert stack("cpu", NoTelemetry("a test"))["hosted"] is value


@pytest.mark.report
def test_history_chart_has_the_change_point(nights):
    pytest.importorskip("matplotlib")
    from perf.report import build

    report = build.gather(sorted(nights.iterdir()))
    marked = [(chart.title, text) for chart in report.charts if chart.section == "History" for _, text in chart.marks]
    ((title, text),) = marked
    (change,) = report.changes
    assert title.startswith(SDPA) and text.startswith("+6.") and change.commits == "090909090909..101010101010"
