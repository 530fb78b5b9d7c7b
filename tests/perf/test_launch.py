"""Worker processes: every outcome is a response or a one-line WorkerError."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from perf.launch import process as launcher
from perf.launch.process import Interpreter, ProcessLaunch
from perf.worker.wire import MAX_MESSAGE_CHARACTERS, PROTOCOL, WorkerError, parse_response

FAKE = Path(__file__).parents[1] / "helpers" / "fake_worker.py"
PROBE = {"device": "cpu", "threads": None}


def command(**script) -> list[str]:
    return [sys.executable, "-I", "-S", str(FAKE), json.dumps(script)]


def at(operation: str = "probe", **mishap) -> list[str]:
    return command(at=[{"op": operation, **mishap}])


def failure(command: list[str], timeout_seconds: float = 20.0) -> WorkerError:
    """The error of a start or of one request, checked to be one printable line."""
    with pytest.raises(WorkerError) as caught, ProcessLaunch(Interpreter(), command) as worker:
        worker.ask("probe", timeout_seconds, **PROBE)
    assert_clear(caught.value)
    return caught.value


def assert_clear(error: WorkerError) -> None:
    message = str(error)
    assert message and message.isprintable() and len(message) <= MAX_MESSAGE_CHARACTERS, repr(message)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Assert that a launch leaves no zombie, child process or open descriptor."""

    def left() -> tuple[set[str], list[str]]:
        children = [
            one.name
            for one in Path("/proc").iterdir()
            if one.name.isdigit() and (fields := stat_of(one.name)) and fields[1] == str(os.getpid())
        ]
        return {f"{fd}:{link}" for fd, link in descriptors()}, children

    before, children = left()
    yield
    after, more = left()
    assert after - before == set()
    assert set(more) - set(children) == set()


def descriptors():
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listed them
            yield fd, os.readlink(f"/proc/self/fd/{fd}")


def stat_of(pid: str) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def test_responses_are_in_order_and_the_context_ends_the_worker():
    with ProcessLaunch(Interpreter(), command()) as worker:
        for threads in range(20):
            assert worker.ask("probe", 20.0, device="cpu", threads=threads)["threads"] == threads
        pid = worker.pid
    assert stat_of(str(pid)) is None
    worker.close()  # again: nothing happens


def test_a_worker_continues_after_an_error_response():
    with ProcessLaunch(
        Interpreter(), at(nth=0, do="error", kind="unavailable", message="no\n such \x1b[31mthing")
    ) as worker:
        with pytest.raises(WorkerError, match=r"^no such thing$") as caught:
            worker.ask("probe", 20.0, **PROBE)
        assert caught.value.kind == "unavailable"
        assert worker.ask("probe", 20.0, **PROBE)["torch"] == "fake"


@pytest.mark.parametrize("operation", ["start", "probe"])
@pytest.mark.parametrize(
    "mishap, kind, message",
    [
        (
            {"do": "signal", "number": 9},
            "died",
            "was ended by SIGKILL (probably by the system for lack of memory, unless you did it)",
        ),
        ({"do": "signal", "number": 11, "words": "\n"}, "died", "was ended by SIGSEGV"),
        ({"do": "signal", "number": 40}, "died", "was ended by signal 40"),
        ({"do": "exit", "status": 3}, "died", "ended with status 3"),
        ({"do": "exit", "status": 0}, "died", "ended with status 0"),
        (
            {"do": "exit", "words": "Traceback\n  File\nRuntimeError: boom\n\n"},
            "died",
            "with status 3: RuntimeError: boom",
        ),
        ({"do": "exit", "words": "9 %\r" * 500 + "\x1b[31mError: red\x1b[0m\x07\n"}, "died", "status 3: Error: red"),
        ({"do": "exit", "words": "x" * 100_000 + "\nlast"}, "died", "status 3: last"),
        ({"do": "exit", "words": "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")}, "died", "status 3: "),
        ({"do": "close", "then": 0.2}, "died", "ended with status 5: the last words"),
        ({"do": "partial"}, "died", "was ended by SIGKILL"),
        ({"do": "print", "text": "loading ...\n"}, "invalid_response", "sent an invalid response: 'loading ...\\n'"),
        ({"do": "print", "text": "\x00\xff\n"}, "invalid_response", "sent an invalid response: '\\x00"),
        ({"do": "print", "text": "\n"}, "invalid_response", "sent an invalid response: '\\n'"),
        ({"do": "print", "text": "[" * 9999 + "\n"}, "invalid_response", "sent an invalid response: '[["),
        ({"do": "print", "text": "9" * 9999 + "\n"}, "invalid_response", "sent an invalid response: '99"),
        (
            {"do": "print", "text": "spam ", "times": 1 << 20},
            "invalid_response",
            "sent an invalid response: 'spam spam",
        ),
        ({"do": "print", "text": '{"ok": {"seconds": NaN}}\n'}, "invalid_response", "sent an invalid response"),
        ({"do": "print", "text": '{"ok": 1}\n'}, "invalid_response", "sent an invalid response"),
        ({"do": "print", "text": '{"error": "x"}\n'}, "invalid_response", "sent an invalid response"),
        (
            {"do": "print", "text": '{"error": {"kind": "new", "message": "x"}}\n'},
            "invalid_response",
            "sent an invalid response",
        ),
    ],
)
def test_every_failure_is_a_one_line_error(operation, mishap, kind, message):
    error = failure(at(operation, **mishap))
    assert (error.kind, message in str(error)) == (kind, True), str(error)


def test_a_response_that_was_not_waited_for_is_not_taken_for_the_next():
    """Ctrl-C may arrive while a round runs; the engine is asked to release what it holds all the same."""
    with ProcessLaunch(Interpreter(), command()) as worker:
        for settled in (0.0, 0.5):  # the response may have arrived, or not
            worker.send("probe", device="cpu", threads=3)
            time.sleep(settled)
            assert worker.ask("probe", 20.0, device="cpu", threads=4)["threads"] == 4


def test_a_hanging_worker_is_killed_in_time():
    begin = time.monotonic()
    error = failure(at(do="hang"), timeout_seconds=0.3)
    assert error.kind == "hung"
    assert time.monotonic() - begin < 10


def test_a_slow_start_is_killed(monkeypatch):
    monkeypatch.setattr(launcher, "START_SECONDS", 0.3)
    assert failure(at("start", do="hang")).kind == "hung"


def test_an_incomplete_line_is_a_hang():
    greeting = f'{{"ok": {{"protocol": {PROTOCOL}}}}}'
    code = f"""import os, time; os.write(1, b'{greeting}\\n{{"ok": '); time.sleep(600)"""
    assert failure([sys.executable, "-I", "-S", "-c", code], timeout_seconds=0.3).kind == "hung"


def test_an_incomplete_line_before_a_response_is_invalid():
    assert failure(at(do="print", text='{"ok": ')).kind == "invalid_response"


def test_a_worker_that_closes_its_pipe_is_killed(monkeypatch):
    monkeypatch.setattr(launcher, "EXIT_SECONDS", 0.2)
    error = failure(at(do="close"))
    assert error.kind == "died"
    assert "closed its pipe without exiting" in str(error) and "SIGKILL" not in str(error)


def test_unsolicited_output_is_not_taken_for_a_response():
    twice = '{"ok": {"torch": "another"}}\n'
    with ProcessLaunch(Interpreter(), at(nth=0, do="print", text=twice)) as worker:
        worker.ask("probe", 20.0, **PROBE)  # cannot be told from the right one, which now is one too many
        deadline = time.monotonic() + 20
        while worker._lines.empty() and time.monotonic() < deadline:
            time.sleep(0.005)
        with pytest.raises(WorkerError, match="invalid response") as caught:
            worker.ask("probe", 20.0, **PROBE)
    assert caught.value.kind == "invalid_response"


@pytest.mark.parametrize("protocol", [None, 0, PROTOCOL + 1, "1", "x" * 5000])
def test_another_protocol_is_rejected(protocol):
    error = failure(command(protocol=protocol))
    assert error.kind == "invalid_response"
    assert "the worker uses protocol" in str(error) and str(error).endswith(f"not {PROTOCOL}") and len(str(error)) < 150


@pytest.mark.parametrize("python", ["no-such-python", "/dev/null", str(FAKE.parent)])
def test_start_failure_names_the_interpreter(python):
    with pytest.raises(WorkerError) as caught:
        ProcessLaunch(Interpreter(python))
    assert_clear(caught.value)
    assert caught.value.kind == "died"
    assert str(caught.value).startswith(f"{python} cannot be started: ")


def test_a_full_temporary_folder_is_a_one_line_error(monkeypatch):
    def full():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(launcher.tempfile, "TemporaryFile", full)
    with pytest.raises(WorkerError, match="cannot be started: No usable temporary directory"):
        ProcessLaunch(Interpreter(), command())


def test_stderr_of_a_wrong_interpreter_is_reported():
    error = failure(["/bin/sh", "-c", "echo not python >&2; exit 2"])
    assert str(error) == "the worker ended with status 2: not python"


@pytest.mark.parametrize("how", ["context", "death"])
def test_children_end_with_the_worker(how, monkeypatch):
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.1)
    mishaps = [{"op": "probe", "nth": 0, "do": "child"}, {"op": "probe", "nth": 1, "do": "signal", "number": 9}]
    with ProcessLaunch(Interpreter(), command(at=mishaps)) as worker:
        child = worker.ask("probe", 20.0, **PROBE)["child"]
        assert stat_of(str(child)) is not None
        if how == "death":  # noticed though the child holds the pipe open
            with pytest.raises(WorkerError, match="was ended by SIGKILL"):
                worker.ask("probe", 20.0, **PROBE)
    deadline = time.monotonic() + 10
    while (fields := stat_of(str(child))) and fields[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not fields or fields[0] == "Z"  # ended; a zombie until whoever inherited it looks


def test_a_kill_between_requests_is_a_one_line_error():
    with ProcessLaunch(Interpreter(), command()) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(WorkerError, match="was ended by SIGKILL"):
            worker.ask("probe", 20.0, **PROBE)


def test_a_closed_pipe_is_a_one_line_error(monkeypatch):
    with ProcessLaunch(Interpreter(), command()) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        worker._reader.join(20)
        assert worker._lines.get() is None  # as if it had died a moment later: the write is what notices
        with pytest.raises(WorkerError, match="was ended by SIGKILL"):
            worker.ask("probe", 20.0, **PROBE)


def test_sigkill_at_random_moments():
    """30 workers, killed during a request, during a response, or in between."""
    kills = 0
    for seed in range(30):
        draw = random.Random(seed)
        answered = threading.Event()
        delay = draw.choice([0.0, 0.005, 0.03, 0.06]) * draw.random()
        try:
            with ProcessLaunch(Interpreter(), command(sleep=0.001)) as worker:
                killer = threading.Timer(delay, os.kill, (worker.pid, signal.SIGKILL))
                killer.start()
                try:
                    for _ in range(100_000):
                        worker.ask("round", 20.0, seed=1)
                        answered.set()
                finally:
                    killer.join()
        except WorkerError as error:
            kills += 1
            assert error.kind == "died", f"seed {seed}: {error}"
            assert "was ended by SIGKILL" in str(error), f"seed {seed}: {error}"
            assert_clear(error)
    assert kills == 30


def test_an_interrupt_leaves_no_process():
    def interrupted():
        with ProcessLaunch(Interpreter(), at(do="hang")) as worker:
            pids.append(worker.pid)
            raise KeyboardInterrupt

    pids = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert stat_of(str(pids[0])) is None


def test_import_path_has_the_source_before_this_tree(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "mine")
    variables = Interpreter(source=tmp_path, environment=(("A", "1"),)).variables()
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), str(launcher.ROOT), "mine"]
    assert variables["A"] == "1"
    assert Interpreter().variables()["PYTHONPATH"].split(os.pathsep) == [str(launcher.ROOT), "mine"]


def test_an_installed_package_is_imported_without_its_neighbours(monkeypatch, tmp_path):
    """Beside it is this interpreter's torch, which another interpreter would import instead of its own."""
    packages = tmp_path / "site-packages"
    for name in ("perf", "sd", "torch"):
        (packages / name).mkdir(parents=True)
    monkeypatch.setattr(launcher, "ROOT", packages)
    monkeypatch.setattr(launcher, "import_root", launcher.import_root.__wrapped__)
    folder = launcher.import_root()
    assert sorted(path.name for path in folder.iterdir()) == ["perf", "sd"]
    assert (folder / "sd").resolve() == packages / "sd"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert str(packages) not in Interpreter().variables()["PYTHONPATH"].split(os.pathsep)


@pytest.mark.parametrize("answer", [None, [], {}, {"ok": []}, {"error": {}}, {"error": {"kind": [], "message": ""}}])
def test_invalid_responses_are_rejected(answer):
    with pytest.raises(ValueError, match="invalid response"):
        parse_response(answer)
