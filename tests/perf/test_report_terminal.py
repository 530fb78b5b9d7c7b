"""Terminal summary of a run: complete, ranked, and readable at 80 columns without colour."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import synthetic_runs
from rich.console import Console

from perf.analysis.statistics import Interval
from perf.analysis.verdicts import Decision, Verdict
from perf.configurations.configuration import Configuration
from perf.plugin import after_run, terminal
from perf.plugin.state import Results
from perf.session import record
from perf.session.measurements import Measurements
from perf.session.plan import Plan, Slot
from perf.session.run import Session
from perf.session.settings import Settings

TIMES = {
    Configuration(attention="original", steps=20): 0.412,
    Configuration(attention="sdpa", steps=20): 0.301,
    Configuration(attention="sdpa", compile="default", steps=20): 0.2,
}
FASTEST, MIDDLE, SLOWEST = (configuration.id for configuration in reversed(TIMES))

pytestmark = pytest.mark.report


def answer(seconds: float, launch: int) -> dict:
    return {
        "seconds": seconds * (1 + 0.001 * launch),
        "wall_seconds": seconds,
        "device_seconds": None,
        "anchor_seconds": 0.01,
        "started_unix_seconds": 1e9 + launch,
        "stages": {"text": 0.01, "unet": 0.9 * seconds, "vae": 0.02},
        "unet_calls": 21,
        "work": {"flops": 2 * 10**9, "minimum_bytes": 10**8},
        "peak_bytes": {"allocated": None, "reserved": None, "rss": 900 * 2**20},
        "image": {"sha256": "0", "latent_relative_error": 0.0, "psnr_db": 84.0},
        "kernels": {"unet": ["flash"]},
        "compile": {"graphs": 1, "graph_breaks": 0, "recompiles": 0},
    }


def measured(failure: tuple[str, str] | None = None, clock: str = "cpu", times=TIMES, decisions=None) -> Results:
    """Results of a session of a few configurations with constant seconds."""
    slots = tuple(map(Slot, times))
    plan, events = Plan(slots, 6, 1), []
    for slot in slots:
        for launch in range(6):
            place = {"slot": slot.name, "launch": launch}
            load = {
                "import_seconds": 2.0,
                "load_seconds": 1.0,
                "anchor": "a",
                "facts": {"torch": "2.15.0"},
                "precision": "full",
                "compiles": slot.configuration.compile != "none",
            }
            events.append({"event": "load", "answer": load, **place})
            timed = answer(times[slot.configuration], launch)
            events.append({"event": "round", "round": None, "answer": {**timed, "wall_seconds": 9.0}, **place})
            more = {"round": 0, "invalid": None, "telemetry": None, "attempt": 0, "wrong": None}
            events.append({"event": "round", "answer": timed, **more, **place})
    measurements = Measurements(plan, events)
    if failure:
        measurements.by_name[slots[0].name].failure = failure
    settings = Settings("cpu", Path("."), clock=clock, threads=1, launches=6, rounds=1)
    stack = {"matmul_flops_per_second": {"float32": 5e10}}
    session = Session(settings, plan, measurements, stack, 1e9, 60.0, {}, {}, False)
    ids = [slot.configuration.id for slot in slots if measurements.by_name[slot.name].failure is None]
    return Results(session, {id: record.extra_info(session, id) for id in ids}, decisions or {})


def printed(results: Results, width=80, colour=False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    terminal.print_table(console, results)
    return out.getvalue()


def test_every_number_at_80_columns():
    slower = Decision(Verdict.SLOWER, "beyond_margin", Interval(1.062, 1.049, 1.077), 0.01, "0007_nightly")
    same = Decision(Verdict.SAME, "within_margin", Interval(1.001, 0.995, 1.006), 0.01, "0007_nightly")
    text = printed(measured(decisions={FASTEST: slower, MIDDLE: same}))
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert [line.split()[1] for line in lines if line[:3].strip().isdigit()] == [FASTEST, MIDDLE, SLOWEST]
    block = text[text.index(FASTEST) : text.index(MIDDLE)]
    for part in (
        "200 [200, 201] ms",
        "4.99",
        "2.06x [2.06, 2.06]",
        "SLOWER",
        "900 MiB peak memory",
        "% of peak FLOP/s",
        "image 84 dB",
    ):
        assert part in block, part
    assert "+6.2 % [4.9, 7.7] against 0007_nightly (beyond_margin)" in block
    assert "reference" in text[text.index(SLOWEST) :] and "CPU time/image [95 %]" in lines[0]


def test_plain_without_a_terminal_and_coloured_with_one():
    slower = {FASTEST: Decision(Verdict.SLOWER, "beyond_margin", Interval(1.1, 1.05, 1.2), 0.01)}
    assert "\x1b" not in printed(measured(decisions=slower))
    assert "\x1b[1;31mSLOWER" in printed(measured(decisions=slower), colour=True)


def test_one_line_each_where_there_is_room():
    text = printed(measured(), width=200)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == [FASTEST, MIDDLE, SLOWEST]
    assert "verdict" not in text.splitlines()[0], "nothing was compared"


def test_a_failed_configuration_is_invalid_with_its_reason():
    text = printed(measured(("wrong_picture", "picture: 9 dB from the fp32 reference [see log]")))
    assert f"{SLOWEST}  INVALID (wrong_picture: picture: 9 dB from the fp32 reference [see log])" in text
    assert SLOWEST not in printed(measured(("unavailable", "no GPU")))


def test_the_last_line_names_the_fastest():
    last = terminal.lines(measured(), None)[-1]
    assert last == f"fastest here: {FASTEST}, 200 ms an image, 2.06x {SLOWEST} [2.06, 2.06]"


def test_each_work_has_a_table_of_its_own():
    other = Configuration(attention="sdpa", steps=50)
    lines = printed(measured(times={**TIMES, other: 0.6})).splitlines()
    assert [line for line in lines if "not comparable" in line] == [
        "tiny, plms 20 steps: not comparable with the other tables",
        "tiny: not comparable with the other tables",
    ]
    assert f" 1 {other.id}" in lines, "ranked apart"


def test_drifted_session_is_marked_in_each_row(monkeypatch):
    results = measured()
    monkeypatch.setattr(type(results.session.measurements), "drifted", lambda self: "anchor_drift 4.1 %")
    assert printed(results).count("drifted") == printed(results, width=200).count("drifted") == 3


def test_approximate_configuration_is_marked_and_never_the_fastest():
    merging = Configuration(attention="sdpa", optimise="token_merging", steps=20)
    results = measured(times={**TIMES, merging: 0.1})
    lines = printed(results).splitlines()
    first, *_ = (line for line in lines if "image 84 dB" in line)
    assert first.endswith("peak memory, image 84 dB"), "skipped work has no fraction of peak FLOP/s"
    assert f" 1 {merging.id}  approximate" in lines
    assert results.infos[merging.id]["image"]["verdict"] == "approximate"
    assert terminal.lines(results, None)[-1].startswith(f"fastest here: {FASTEST}, ")
    assert "fastest" not in terminal.lines(measured(times={merging: 0.1}), None)[-1]


# --- the report at the end of a run


@pytest.mark.slow
def test_report_after_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    printed: list[str] = []
    storage = tmp_path / "stored"
    nights = synthetic_runs.nightly_runs(3)
    synthetic_runs.write(storage / "Linux-CPython-3.11-64bit", nights, "nightly")  # as pytest-benchmark does
    (storage / "0009_bad.json").write_text("{")
    after_run.write(nights[2], tmp_path / "out", storage, None, printed.append)
    assert printed[-1] == f"perf: report of 3 sessions: {tmp_path / 'out' / 'index.html'}", (
        "not twice the one just saved"
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8")) == nights[2]


def test_error_of_a_report_is_printed(tmp_path, monkeypatch):
    printed: list[str] = []
    after_run.write(None, tmp_path / "out", None, None, printed.append)
    (tmp_path / "file").write_text("")
    after_run.write(synthetic_runs.published_run("T4"), tmp_path / "file", None, None, printed.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    after_run.write(synthetic_runs.published_run("T4"), tmp_path / "out", None, None, printed.append)
    assert printed[0] == "perf: no report: nothing was measured"
    assert printed[1].startswith("perf: no report: ") and "cannot be written" in printed[1]
    assert 'pip install "sd-perf[report]" brings jinja2 and matplotlib' in printed[2]
    assert (tmp_path / "out" / "run.json").exists()
