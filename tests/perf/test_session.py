"""Whole sessions with a fake worker: results, errors, resuming and kills."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fake_worker import SessionRunner

from perf.analysis.counts import compare
from perf.analysis.verdicts import Verdict
from perf.configurations.configuration import Configuration
from perf.launch.process import ROOT, Interpreter
from perf.machine.facts import CpuFacts
from perf.machine.nvml import NoTelemetry
from perf.machine.stack import stack
from perf.runs import fingerprints
from perf.session import journal, loading, record
from perf.session.lock import DeviceBusy, DeviceLock
from perf.session.measurements import MAX_RETRIES
from perf.session.noise import expectation
from perf.session.pairs import Judge, pairs_of
from perf.session.plan import CONTROL, Slot
from perf.session.run import run
from perf.session.runner import Limits
from perf.session.settings import SessionError, SessionRefused, Settings
from perf.session.workers import Launches

FAKE = Path(__file__).parents[1] / "helpers" / "fake_worker.py"
A = Configuration(attention="original", steps=2)
B = Configuration(attention="mha", steps=2)
KILLS = 50
LIMITS = Limits(load=20, first_round=20, round=20)


def command_of(script: dict) -> list[str]:
    return [sys.executable, "-I", "-S", str(FAKE), json.dumps(script)]


def summary(session) -> dict:
    """The measurements of a session without its control arm and times of day."""
    by_name = {name: one for name, one in session.measurements.by_name.items() if one.slot.variant != CONTROL}
    return {
        "seconds": {
            name: {str(n): [one["seconds"] for one in launch.rounds] for n, launch in sorted(measured.launches.items())}
            for name, measured in by_name.items()
        },
        "failures": {name: measured.failure for name, measured in by_name.items()},
        "unchecked": session.unchecked,
        "interrupted": session.interrupted,
        "invalid": session.measurements.invalid(),
    }


def test_configurations_have_separate_compile_caches(tmp_path):
    """Configurations share kernels; a cache that the user keeps is one for all."""

    def caches(settings: Settings) -> list[str]:
        launches = Launches(settings, str(tmp_path))
        found = [dict(launches.interpreter(Slot(one)).environment) for one in (A, B, A)]
        assert all(Path(one["TRITON_CACHE_DIR"]).parent == Path(one["TORCHINDUCTOR_CACHE_DIR"]) for one in found)
        return [one["TORCHINDUCTOR_CACHE_DIR"] for one in found]

    first, other, again = caches(Settings("cpu", tmp_path))
    assert first == again != other and Path(first).parent == Path(other).parent == tmp_path
    assert set(caches(Settings("cpu", tmp_path, compile_cache=tmp_path))) == {str(tmp_path)}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Make every worker a fake one with a script; locks and caches are in the test's folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def become(**script):
        monkeypatch.setattr(Interpreter, "command", lambda self: command_of({"head": str(ROOT), **script}))

    become()
    return become


def settings(folder: Path, **changes) -> Settings:
    return replace(Settings("cpu", folder, launches=2, rounds=2, limits=LIMITS), **changes)


def measure(folder: Path, configurations=(A, B), **changes):
    """(session, logged lines)"""
    logged: list[str] = []
    session = run(settings(folder, **changes), list(configurations), logged.append)
    assert all(line.isprintable() for line in logged)
    return session, logged


def events(folder: Path) -> list[dict]:
    return list(journal.read(journal.newest(folder / "journal")).events)


def test_a_whole_session(fake, tmp_path):
    session, _ = measure(tmp_path)
    found = summary(session)
    assert found["failures"] == {A.id: None, B.id: None}
    assert found["seconds"] == {one.id: {"0": [0.01, 0.01], "1": [0.01, 0.01]} for one in (A, B)}
    assert (session.unchecked, session.decisions, session.interrupted) == ({}, {}, False)
    assert session.stack["matmul_flops_per_second"] == {"float32": 1e9}
    assert session.stack["copy_bytes_per_second"] == 1e8
    loaded = [event["slot"] for event in events(tmp_path) if event["event"] == "load"]
    assert sorted(loaded[:2]) == sorted(loaded[2:]) == sorted([A.id, B.id])
    assert session.plan.loading == "all" and session.control is None  # below 6 launches without pairs
    counted = [event["slot"] for event in events(tmp_path) if event["event"] == "counts"]
    assert sorted(counted) == sorted([A.id, B.id])  # in the first launch only
    plan = journal.read(journal.newest(tmp_path / "journal")).plan
    assert plan["order_seed"] == session.plan.seed and plan["loading"] == "all"
    assert events(tmp_path)[-1] == {"event": "end"}
    assert session.measurements.by_name[B.id].launches[1].rounds[0]["image"]["latent_relative_error"] == 1e-6
    assert not list(tmp_path.glob("sd-perf-compile-*"))


def test_memory_is_estimated_by_the_pixels_of_the_model():
    gib = {
        model: loading.worker_bytes(Configuration(model=model)) / 2**30
        for model in ("tiny", "tiny-inpaint", "sd2", "sd2-v")
    }
    assert gib["tiny"] == gib["tiny-inpaint"] < 1 and gib["sd2"] == pytest.approx(11)
    assert gib["sd2-v"] == pytest.approx(7 + 4 * (768 / 512) ** 4)  # all pairs of its pixels


def test_a_session_of_six_launches_has_a_control_arm(fake, tmp_path):
    session, _ = measure(tmp_path, launches=6)
    loaded = [event["slot"] for event in events(tmp_path) if event["event"] == "load"]
    assert sorted(loaded[:3]) == sorted([A.id, f"{A.id}@{CONTROL}", B.id]) and len(loaded) == 18
    assert session.control.verdict is Verdict.SAME


def test_references_are_made_once_and_shared(fake, tmp_path, capsys):
    assert "rendering 1 reference output with tiny-original-plms2-b1" in _stderr_of(capsys, tmp_path)
    made = list((tmp_path / "references").iterdir())
    assert [path.suffix for path in made] == [".npz"]
    assert "reference" not in _stderr_of(capsys, tmp_path)
    assert "rendering 2 reference outputs" in _stderr_of(capsys, tmp_path, [replace(B, batch=3)])
    assert len(list((tmp_path / "references").iterdir())) == 3


def _stderr_of(capsys, folder: Path, configurations=(A, B)) -> str:
    measure(folder, configurations, launches=1, rounds=1)
    return capsys.readouterr().err


def test_session_without_reference_images_is_unchecked(fake, tmp_path):
    fake(at=[{"op": "write_reference", "do": "error", "kind": "failed", "message": "no room"}])
    session, _ = measure(tmp_path)
    assert session.unchecked == {A.id: "no room", B.id: "no room"}
    assert summary(session)["failures"] == {A.id: None, B.id: None}
    fake()
    session, _ = measure(tmp_path, resume=True)  # what was measured without it stays unchecked
    assert set(session.unchecked) == {A.id, B.id}
    assert "before its reference image" in session.unchecked[B.id]
    missing = replace(A, checkpoint=str(tmp_path / "none.ckpt"))
    session, _ = measure(tmp_path, [missing], launches=1)
    assert session.unchecked == {missing.id: f"{tmp_path / 'none.ckpt'}: No such file or directory"}


def test_a_wrong_reference_image_is_not_stored(fake, tmp_path):
    fake(at=[{"op": "round", "id": A.id, "nth": 0, "do": "change", "image": {"constant": True}}])
    session, _ = measure(tmp_path)
    assert (
        session.unchecked[B.id] == "the reference image is wrong: constant: every pixel of the image has the same value"
    )
    assert list((tmp_path / "references").iterdir()) == []


def test_what_cannot_be_counted_is_measured_all_the_same(fake, tmp_path):
    fake(at=[{"op": "count", "id": B.id, "do": "error", "kind": "failed", "message": "RuntimeError: no dispatch mode"}])
    session, _ = measure(tmp_path)
    assert summary(session)["failures"] == {A.id: None, B.id: None}
    counts = {one.id: record.counts(session.measurements.by_name[one.id]) for one in (A, B)}
    assert counts[A.id]["operators"] and counts[B.id]["operators"] is None
    assert str(compare(counts[B.id], counts[B.id], "0001_a")).endswith("has none (RuntimeError: no dispatch mode)")
    fake(at=[{"op": "count", "id": B.id, "do": "exit"}])
    session, _ = measure(tmp_path)
    assert summary(session)["failures"][B.id][0] == "died"


@pytest.mark.parametrize("name", ["mine.py:round", "mine:round"])
def test_a_session_of_changed_code_is_not_resumed(fake, tmp_path, name):
    """Half of its rounds would be those of the former code."""
    engine = tmp_path / "mine.py"
    engine.write_text("def round(seed): return seed")
    own = Configuration(engine=name)
    measure(tmp_path, [own], directory=tmp_path)
    measure(tmp_path, [own], directory=tmp_path, resume=True)
    engine.write_text("def round(seed): return seed + 1")
    fingerprints.sha256.cache_clear()
    with pytest.raises(SessionError, match=r"was started with other own: \{'mine.py': '"):
        measure(tmp_path, [own], directory=tmp_path, resume=True)


@pytest.mark.parametrize("uuid, refused", [("GPU-1", True), ("GPU-2", False), ("MIG-1", False), (None, False)])
def test_the_gpu_of_torch_is_that_of_the_driver(fake, tmp_path, monkeypatch, uuid, refused):
    """Facts, storage and lock are those of the driver's first GPU, and torch may number them otherwise."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    facts = stack("cpu", NoTelemetry("none"))
    monkeypatch.setattr("perf.session.run.stack", lambda *_: {**facts, "uuid": uuid, "name": "T4"})
    probed = {"matmul_flops_per_second": None, "copy_bytes_per_second": None, "uuid": "GPU-2"}
    monkeypatch.setattr(Launches, "probe", lambda self, configurations: probed)
    message = "torch uses the GPU GPU-2, and the first one of the driver is T4, GPU-1"
    with pytest.raises(SessionRefused, match=message) if refused else contextlib.nullcontext():
        measure(tmp_path, launches=1, rounds=1)
    variables = dict(Launches(settings(tmp_path), "cache").interpreter(Slot(A)).environment)
    assert variables["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" and "CUDA_DEVICE_ORDER" not in os.environ


def test_an_interrupted_trace_leaves_the_session_complete(fake, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("perf.session.traces.file_name", interrupted)
    session, _ = measure(tmp_path, trace=tmp_path / "traces")
    assert not session.interrupted and session.traces == {}
    (tmp_path / "a file").touch()
    session, _ = measure(tmp_path, trace=tmp_path / "a file" / "traces")
    assert not session.interrupted and summary(session)["failures"] == {A.id: None, B.id: None}


@pytest.mark.parametrize("changes, percent", [({"launches": 8}, 2), ({"launches": 8, "aa": True, "looks": (8, 12)}, 4)])
def test_the_first_line_tells_the_visible_difference(changes, percent):
    """A pair must lie beyond the margin, at the level of a look."""
    cpu = CpuFacts(load_average_1_minute=0.1, cores=2)
    line = expectation(cpu, settings(Path(), **changes))
    assert (
        line == f"perf: load 0.1 on 2 cores: after 8 launches, differences under about {percent} % will not be visible"
    )


def test_failed_probe_ends_the_session(fake, tmp_path):
    fake(at=[{"op": "probe", "do": "exit", "words": "ImportError: no torch\n"}])
    with pytest.raises(
        SessionError, match=r"^nothing can be measured: the worker ended with status 3: ImportError: no torch$"
    ):
        measure(tmp_path)


def test_probe_rejects_unknown_techniques(fake, tmp_path):
    """Unknown techniques are rejected before measuring (tests/perf/test_worker.py has the worker's response)."""
    fake(at=[{"op": "probe", "do": "error", "kind": "usage", "message": "optimise 'fsat': choose a preset"}])
    with pytest.raises(SessionError, match=r"^nothing can be measured: optimise 'fsat': choose a preset$"):
        measure(tmp_path)


def test_the_probe_gets_the_configurations_of_our_own_model(tmp_path, monkeypatch):
    asked = {}

    class Worker:
        def ask(self, operation, timeout_seconds, **arguments):
            asked.update(arguments)

    launches = Launches(Settings("cpu", tmp_path), str(tmp_path))
    monkeypatch.setattr(launches, "open", lambda slot: contextlib.nullcontext(Worker()))
    others = [{"engine": "diffusers"}, {"engine": "mine:Engine"}, {"workload": "train"}, {"interpreter": "old"}]
    launches.probe([A, *(replace(A, **fields) for fields in others), B])
    assert [each["id"] for each in asked["configurations"]] == [A.id, B.id]


@pytest.mark.parametrize("kind", ["unavailable", "out_of_memory"])
def test_an_unavailable_configuration_does_not_affect_others(fake, tmp_path, kind):
    fake(at=[{"op": "load", "id": B.id, "do": "error", "kind": kind, "message": "not here"}])
    found = summary(measure(tmp_path)[0])
    assert found["failures"] == {A.id: None, B.id: (kind, "not here")}
    assert found["seconds"] == {A.id: {"0": [0.01, 0.01], "1": [0.01, 0.01]}, B.id: {}}


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 1, 3, 6, 10])
def test_interrupted_session_keeps_its_rounds_and_resumes(fake, tmp_path, monkeypatch, after):
    fake(noise=0.01)
    whole = summary(measure(tmp_path / "whole")[0])
    write, count = journal.Journal.write, iter(range(1000))

    def interrupted(self, event, content):
        write(self, event, content)
        if event != "plan" and next(count) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "write", interrupted)
        session, _ = measure(tmp_path)
    assert session.interrupted
    assert len(events(tmp_path)) == after + 1
    session, logged = measure(tmp_path, resume=True)
    assert summary(session) == whole
    assert any(line.startswith("perf: resuming from ") for line in logged)


def test_configuration_without_rounds_has_a_reason(fake, tmp_path, monkeypatch):
    def stop(self, event, content):
        raise KeyboardInterrupt

    write = journal.Journal.write
    monkeypatch.setattr(journal.Journal, "write", lambda *a: (stop if a[1] == "load" else write)(*a))
    session, _ = measure(tmp_path)
    assert session.why_no_rounds(A.id) == "interrupted before its first round"


def test_resume_rejects_other_options_by_name(fake, tmp_path):
    with pytest.raises(SessionError, match="there is no journal in"):
        measure(tmp_path, resume=True)
    measure(tmp_path)
    other = {
        "slots": ([A], {}),
        "launches": ([A, B], {"launches": 3}),
        "rounds": ([A, B], {"rounds": 1}),
        "clock": ([A, B], {"clock": "cpu"}),
        "threads": ([A, B], {"threads": 1}),
        "slowdown": ([A, B], {"slowdown": 0.05}),
        "configurations": ([A, replace(B, prompt="Another photo")], {}),
    }
    for key, (configurations, changes) in other.items():
        with pytest.raises(SessionError, match=f"was started with other {key}: .* give the same options") as refused:
            measure(tmp_path, configurations, resume=True, **changes)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 500
    assert "{'prompt': 'A photo'}, now {'prompt': 'Another photo'}" in str(refused.value)
    assert summary(measure(tmp_path, resume=True)[0])["seconds"][B.id]["1"] == [0.01, 0.01]


def test_resume_rejects_events_of_other_slots(fake, tmp_path):
    measure(tmp_path)
    path = journal.newest(tmp_path / "journal")
    with journal.Journal(path, after=journal.read(path)) as book:
        book.write("round", {"slot": "another", "launch": 0})
    with pytest.raises(SessionError, match=r"cannot be resumed .* start again without --perf-resume"):
        measure(tmp_path, resume=True)


def test_damaged_journal_is_resumed_with_a_message(fake, tmp_path):
    fake(noise=0.01)
    whole = summary(measure(tmp_path)[0])
    path = journal.newest(tmp_path / "journal")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\0" * 500)
    session, logged = measure(tmp_path, resume=True)
    assert any("is damaged; its round and later ones are measured again" in line for line in logged)
    assert summary(session) == whole
    assert journal.read(path).damage is None


def test_session_resumes_after_a_full_disk(fake, tmp_path, monkeypatch):
    fake(noise=0.01)
    whole = summary(measure(tmp_path / "whole")[0])
    count = iter(range(1000))

    def full(descriptor):
        if next(count) == 7:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "fsync", full)
        with pytest.raises(journal.JournalError, match=r"No space left on device; free some space and continue with"):
            measure(tmp_path)
    assert len(events(tmp_path)) == 7
    assert summary(measure(tmp_path, resume=True)[0]) == whole


def test_a_device_locked_by_another_process_is_rejected(fake, tmp_path, runner):
    with DeviceLock("cpu") as _, pytest.raises(DeviceBusy, match=rf"cpu is being measured by pid {os.getpid()}"):
        measure(tmp_path)
    with DeviceLock("cpu"):
        answer = runner.end(runner.start(tmp_path, {}))
    assert answer["error"] == "DeviceBusy"
    assert f"cpu is being measured by pid {os.getpid()}, since" in answer["message"]
    assert "error" not in runner.end(runner.start(tmp_path, {}))


def test_aa_is_same_and_an_injected_slowdown_is_slower(fake, tmp_path):
    fake(noise=0.001, counter=str(tmp_path / "count"))
    session, _ = measure(tmp_path, [A], aa=True, launches=6)
    assert session.decisions[A.id].verdict is Verdict.SAME
    assert session.decisions[A.id].against == "itself"
    session, _ = measure(tmp_path, [A], aa=True, launches=6, slowdown=0.05)
    assert session.decisions[A.id].verdict is Verdict.SLOWER
    assert session.decisions[A.id].ratio.estimate == pytest.approx(1.05, abs=0.005)


def test_another_commit_alternates_and_gets_further_launches_while_undecided(fake, tmp_path, capsys, monkeypatch):
    # The order of the rounds is fixed, and with it the scripted noise.
    monkeypatch.setattr("perf.session.run.random.randrange", lambda stop: 2)
    other = tmp_path / "other"
    other.mkdir()
    fake(noise=0.01, base=1.0, counter=str(tmp_path / "count"), head=str(ROOT))
    against = ("0123456789ab", Interpreter(source=other))
    session, _ = measure(tmp_path, [A], against=against, launches=6, looks=(6, 12), rounds=1)
    for name in (A.id, f"{A.id}@base"):
        assert sorted(session.measurements.by_name[name].launches) == list(range(12))
    assert session.measurements.by_name[A.id].launches[0].load["sd"] == str(ROOT)
    assert session.measurements.by_name[f"{A.id}@base"].launches[0].load["sd"] == str(other)
    assert f"undecided after 6 launches, going on to 12: {A.id}" in capsys.readouterr().err
    resumed, _ = measure(tmp_path, [A], against=against, launches=6, looks=(6, 12), rounds=1, resume=True)
    assert summary(resumed) == summary(session)
    assert resumed.decisions[A.id].ratio == session.decisions[A.id].ratio
    fake(noise=0.001, base=1 / 1.06, counter=str(tmp_path / "count"))
    session, _ = measure(tmp_path, [A], against=against, launches=6, rounds=1)
    assert session.decisions[A.id].verdict is Verdict.SLOWER
    assert session.decisions[A.id].against == "0123456789ab"
    assert sorted(session.measurements.by_name[A.id].launches) == list(range(6))
    with pytest.raises(SessionError, match="was started with other against"):
        measure(tmp_path, [A], against=("another", against[1]), launches=6, rounds=1, resume=True)


def test_an_invalid_session_has_no_verdict(fake, tmp_path):
    fake(noise=0.001, counter=str(tmp_path / "count"))
    session, _ = measure(tmp_path, [A], aa=True, launches=6, rounds=1)
    for measured in session.measurements.by_name.values():
        measured.discarded = MAX_RETRIES
    judge = Judge(session.plan, pairs_of(session.plan, "aa", lambda id: "itself"), 0.01)
    decision = judge.decisions(session.measurements)[A.id]
    assert (decision.verdict, decision.code) == (Verdict.INVALID, "invalid_rounds")


# --- kills


@pytest.fixture(scope="module")
def runner():
    with SessionRunner([str(ROOT), str(FAKE.parent), str(Path(__file__).parent)]) as started:
        yield started


SCRIPT = {"noise": 0.02, "sleep": 0.002}


@pytest.mark.nightly
def test_sigkill_loses_no_journalled_round(runner, tmp_path):
    """Sessions killed at random moments and resumed until they are complete."""
    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    whole = runner.end(runner.start(tmp_path / "whole", SCRIPT))
    usual = time.monotonic() - begin
    assert whole["failures"] == {A.id: None, B.id: None}
    draw, kills, sessions, journalled_at_a_kill = random.Random(20), 0, 0, set()
    while kills < KILLS:
        folder, known, resume, answer = tmp_path / str(sessions), [], False, None
        folder.mkdir()
        sessions += 1
        while answer is None:
            started = runner.start(folder, SCRIPT, resume)
            killed_at = draw.uniform(0, usual)
            time.sleep(killed_at)
            with contextlib.suppress(ProcessLookupError):  # it has come to its end
                os.kill(started[0], signal.SIGKILL)
            answer = runner.end(started)
            where = f"seed 20, session {sessions}, kill {kills} after {killed_at:.4f} s"
            path = journal.newest(folder / "journal")
            resume = path is not None and path.stat().st_size > 0  # else it was killed before it had begun
            found = events(folder) if resume else []
            assert found[: len(known)] == known, where
            known = found
            if answer is None:
                kills += 1
                journalled_at_a_kill.add(len(known))
        assert "error" not in answer, f"{where}: {answer['message']}"
        assert {key: answer[key] for key in summary_keys(whole)} == {key: whole[key] for key in summary_keys(whole)}, (
            where
        )
        assert all(line.isprintable() for line in answer["logged"]), where
    assert len(journalled_at_a_kill) > 5, "the kills came all at the same moment"


def summary_keys(answer: dict) -> list[str]:
    return [key for key in answer if key != "logged"]


def test_resumed_session_reports_the_stale_lock(runner, tmp_path):
    started = runner.start(tmp_path, {"sleep": 0.2})
    deadline = time.monotonic() + 20
    while not (tmp_path / "journal").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started[0], signal.SIGKILL)
    assert runner.end(started) is None
    answer = runner.end(runner.start(tmp_path, {}, resume=journal.newest(tmp_path / "journal") is not None))
    expected = f"cleared the stale lock of cpu, left by pid {started[0]}, since"
    assert any(expected in line for line in answer["logged"])


@pytest.mark.slow
def test_ctrl_c_at_random_moments_keeps_measured_rounds(runner, tmp_path):
    script = {"noise": 0.02, "sleep": 0.03}
    begin = time.monotonic()
    runner.end(runner.start(tmp_path, script))
    duration = time.monotonic() - begin  # of an undisturbed session, which depends on the load of the machine
    draw, kept = random.Random(3), 0
    for number in range(6):
        folder = tmp_path / str(number)
        folder.mkdir()
        started = runner.start(folder, script)
        time.sleep(draw.uniform(0.2, 0.9) * duration)
        with contextlib.suppress(ProcessLookupError):
            os.kill(started[0], signal.SIGINT)
        answer = runner.end(started)
        if "error" in answer:  # before anything was measured: pytest's own affair
            assert answer["error"] == "KeyboardInterrupt", f"seed 3, number {number}: {answer}"
        elif answer["interrupted"]:
            kept += 1
            there = [event for event in events(folder) if event["event"] == "round" and event["round"] is not None]
            there = [event for event in there if not event["slot"].endswith("@control")]
            in_memory = sum(len(one) for slot in answer["seconds"].values() for one in slot.values())
            assert in_memory <= len(there) <= in_memory + 1, f"seed 3, number {number}"
            assert answer["failures"] == {A.id: None, B.id: None}, f"seed 3, number {number}"
    assert kept
