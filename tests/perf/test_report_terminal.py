"""The summary after a run: complete, ranked, and readable at 80 columns without colour."""

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
FASTEST, MIDDLE, SLOWEST = (one.id for one in reversed(TIMES))

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


def session(failure: tuple[str, str] | None = None, clock: str = "cpu", times=TIMES) -> tuple[Session, dict]:
    """A session of a few configurations, as if they had been measured, and its extra_info by id."""
    slots = tuple(map(Slot, times))
    plan, events = Plan(slots, 6, 1), []
    for slot in slots:
        for launch in range(6):
            one = {"slot": slot.name, "launch": launch}
            load = {
                "import_seconds": 2.0,
                "load_seconds": 1.0,
                "anchor": "a",
                "facts": {"torch": "2.15.0"},
                "precision": "full",
                "compiles": slot.configuration.compile != "none",
            }
            events.append({"event": "load", "answer": load, **one})
            made = answer(times[slot.configuration], launch)
            events.append({"event": "round", "round": None, "answer": {**made, "wall_seconds": 9.0}, **one})
            more = {"round": 0, "invalid": None, "telemetry": None, "attempt": 0, "wrong": None}
            events.append({"event": "round", "answer": made, **more, **one})
    measurements = Measurements(plan, events)
    if failure:
        measurements.by_name[slots[0].name].failure = failure
    settings = Settings("cpu", Path("."), clock=clock, threads=1, launches=6, rounds=1)
    stack = {"matmul_flops_per_second": {"float32": 5e10}}
    made = Session(settings, plan, measurements, stack, 1e9, 60.0, {}, {}, False)
    good = [slot.configuration.id for slot in slots if measurements.by_name[slot.name].failure is None]
    return made, {id: record.extra_info(made, id) for id in good}


def printed(made, infos, decisions=None, width=80, colour=False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    terminal.print_table(console, made, infos, decisions or {})
    return out.getvalue()


def test_every_number_at_80_columns():
    slower = Decision(Verdict.SLOWER, "beyond_margin", Interval(1.062, 1.049, 1.077), 0.01, "0007_nightly")
    same = Decision(Verdict.SAME, "within_margin", Interval(1.001, 0.995, 1.006), 0.01, "0007_nightly")
    text = printed(*session(), {FASTEST: slower, MIDDLE: same})
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines), max(lines, key=len)
    assert [line.split()[1] for line in lines if line[:3].strip().isdigit()] == [FASTEST, MIDDLE, SLOWEST]
    block = text[text.index(FASTEST) : text.index(MIDDLE)]
    for part in (
        "200 [200, 201] ms",
        "4.99",
        "2.06x [2.06, 2.06]",
        "SLOWER",
        "900 MiB peak",
        "of peak FLOP/s",
        "picture 84 dB",
    ):
        assert part in block, part
    assert "+6.2 % [4.9, 7.7] against 0007_nightly (beyond_margin)" in block
    assert "reference" in text[text.index(SLOWEST) :] and "CPU time/image [95 %]" in lines[0]


def test_plain_without_a_terminal_and_coloured_with_one():
    slower = {FASTEST: Decision(Verdict.SLOWER, "beyond_margin", Interval(1.1, 1.05, 1.2), 0.01)}
    assert "\x1b" not in printed(*session(), slower)
    assert "\x1b[1;31mSLOWER" in printed(*session(), slower, colour=True)


def test_one_line_each_where_there_is_room():
    text = printed(*session(), width=200)
    assert [line.split()[0] for line in text.splitlines()[1:4]] == [FASTEST, MIDDLE, SLOWEST]
    assert "verdict" not in text.splitlines()[0], "nothing was compared"


def test_a_failed_configuration_is_invalid_with_its_reason():
    made, infos = session(("wrong_picture", "picture: 9 dB from the fp32 reference [see log]"))
    text = printed(made, infos)
    assert f"{SLOWEST}  INVALID (wrong_picture: picture: 9 dB from the fp32 reference [see log])" in text
    assert SLOWEST not in printed(*session(("unavailable", "no GPU")))


def test_the_last_line_names_the_fastest():
    made, infos = session()
    last = terminal.lines(made, infos, {}, None, None)[-1]
    assert last == f"fastest here: {FASTEST}, 200 ms an image, 2.06x {SLOWEST} [2.06, 2.06]"


def test_what_is_approximate_says_so_and_is_never_the_fastest():
    merging = Configuration(attention="sdpa", optimise="token_merging", steps=20)
    made, infos = session(times={**TIMES, merging: 0.1})
    first, *_ = (line for line in printed(made, infos).splitlines() if "picture" in line)
    assert first.endswith("peak, picture 84 dB, approximate"), "no fraction of peak FLOP/s for skipped work"
    assert infos[merging.id]["image"]["verdict"] == "approximate"
    assert terminal.lines(made, infos, {}, None, None)[-1].startswith(f"fastest here: {FASTEST}, ")
    assert "fastest" not in terminal.lines(*session(times={merging: 0.1}), {}, None, None)[-1]


# --- the report at the end of a run


def test_report_after_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    said: list[str] = []
    storage = tmp_path / "stored"
    nights = synthetic_runs.nightly_runs(3)
    synthetic_runs.write(storage / "Linux-CPython-3.11-64bit", nights, "nightly")  # as pytest-benchmark does
    (storage / "0009_bad.json").write_text("{")
    after_run.write(nights[2], tmp_path / "out", storage, None, said.append)
    assert said[-1] == f"perf: report of 3 session(s): {tmp_path / 'out' / 'index.html'}", (
        "not twice the one just saved"
    )
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8")) == nights[2]


def test_what_prevents_a_report_is_said(tmp_path, monkeypatch):
    said: list[str] = []
    after_run.write(None, tmp_path / "out", None, None, said.append)
    (tmp_path / "file").write_text("")
    after_run.write(synthetic_runs.published_run("T4"), tmp_path / "file", None, None, said.append)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    after_run.write(synthetic_runs.published_run("T4"), tmp_path / "out", None, None, said.append)
    assert said[0] == "perf: no report: nothing was measured"
    assert said[1].startswith("perf: no report: ") and "cannot be written" in said[1]
    assert 'pip install "sd-perf[report]" brings jinja2 and matplotlib' in said[2]
    assert (tmp_path / "out" / "run.json").exists()
