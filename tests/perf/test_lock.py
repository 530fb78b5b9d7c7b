"""The device lock between processes, after SIGKILL, and against planted files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from perf.session import lock
from perf.session.lock import DeviceBusy, DeviceLock, file_name, lock_folder

ROOT = Path(__file__).parents[2]
# Takes the lock, starts a child that outlives it, says so, and waits to be killed or for the end of its input.
HOLDER = """
import subprocess, sys
from perf.session.lock import DeviceLock
with DeviceLock(sys.argv[1], sys.argv[2]):
    child = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    sys.stdin.read()
child.kill()
"""
CONTENDER = """
import sys
from perf.session.lock import DeviceBusy, DeviceLock
print("ready", flush=True)
sys.stdin.readline()
try:
    with DeviceLock("gpu", sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except DeviceBusy:
    print("busy", flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path):
    process = start(HOLDER, "GPU-1", tmp_path)
    child = int(process.stdout.readline())
    yield process
    process.kill()
    process.communicate()
    os.kill(child, signal.SIGKILL)


def test_busy_device_names_the_holder_in_one_line(holder, tmp_path):
    with pytest.raises(DeviceBusy) as busy, DeviceLock("GPU-1", tmp_path):
        pass
    message = str(busy.value)
    assert f"GPU-1 is being measured by pid {holder.pid}, since 20" in message
    assert "python" in message and "-c GPU-1" in message and "\n" not in message
    assert busy.value.holder.pid == holder.pid


def test_another_device_is_free(holder, tmp_path):
    with DeviceLock("GPU-2", tmp_path) as held:
        assert held.notice is None


def test_sigkill_releases_the_lock_although_a_child_survives(holder, tmp_path):
    holder.kill()
    holder.wait()
    with DeviceLock("GPU-1", tmp_path) as held:
        assert f"cleared the stale lock of GPU-1, left by pid {holder.pid}, since" in held.notice
    with DeviceLock("GPU-1", tmp_path) as held:
        assert held.notice is None  # released in order: nothing was left


# Killed between fork and exec, as it can be while it starts a worker: the child has the lock until it has its own program.
FORKED = """
import os, sys, time
from perf.session.lock import DeviceLock
with DeviceLock("GPU-1", sys.argv[1]):
    child = os.fork()
    if child == 0:
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    print(child, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("seconds", [0.5, 60])
def test_lock_waits_briefly_for_a_holder_killed_between_fork_and_exec(tmp_path, monkeypatch, seconds):
    process = start(FORKED, tmp_path, seconds)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        if seconds < lock.DEAD_HOLDER_SECONDS:
            with DeviceLock("GPU-1", tmp_path) as held:
                assert f"left by pid {process.pid}, since" in held.notice
        else:
            monkeypatch.setattr(lock, "DEAD_HOLDER_SECONDS", 0.2)
            with pytest.raises(DeviceBusy, match=f"pid {process.pid}"), DeviceLock("GPU-1", tmp_path):
                pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_one_of_many_contenders_gets_the_lock(tmp_path):
    contenders = [start(CONTENDER, tmp_path) for _ in range(6)]
    assert [contender.stdout.readline() for contender in contenders] == ["ready\n"] * 6
    for contender in contenders:
        contender.stdin.write("go\n")
        contender.stdin.flush()
    answers = [contender.stdout.readline() for contender in contenders]
    for contender in contenders:
        contender.communicate("end\n")
    assert sorted(answers) == ["busy\n"] * 5 + ["held\n"]


def test_a_second_lock_in_one_process_is_rejected(tmp_path):
    with DeviceLock("cpu", tmp_path) as held:
        for _ in range(2):
            with pytest.raises(DeviceBusy, match=f"pid {os.getpid()}"), DeviceLock("cpu", tmp_path):
                pass
        assert json.loads(held.path.read_text())["pid"] == os.getpid()
    with DeviceLock("cpu", tmp_path):
        pass


def test_an_exception_releases_it(tmp_path):
    with pytest.raises(ZeroDivisionError), DeviceLock("cpu", tmp_path):
        1 / 0  # noqa: B018
    with DeviceLock("cpu", tmp_path) as held:
        assert held.notice is None


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    read, write = os.pipe()
    lock = DeviceLock("cpu", tmp_path)
    with lock:
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
    try:
        with DeviceLock("cpu", tmp_path) as again:
            assert again.notice is None
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(child, 0)


@pytest.mark.parametrize(
    "content",
    [
        b"malformed",
        b'{"pid": 1',
        b"[1, 2]",
        b"\xff\xfe",
        b'{"pid": 1, "host": "h", "started_unix_seconds": 1e300, "command": "c"}',
        b'{"pid": "x", "host": "h", "started_unix_seconds": 1, "command": "c"}',
        b"[" * 100_000,
    ],
    ids=["text", "truncated", "list", "bytes", "time", "type", "deep"],
)
def test_a_damaged_lock_file_is_cleared_with_a_notice(tmp_path, content):
    (tmp_path / file_name("cpu")).write_bytes(content)
    (tmp_path / file_name("cpu")).chmod(0o600)
    with DeviceLock("cpu", tmp_path) as held:
        assert "left by an unidentified session" in held.notice
        assert json.loads(held.path.read_text())["pid"] == os.getpid()
        held.path.write_bytes(content)  # damaged while it is held
        with pytest.raises(DeviceBusy, match="an unidentified process"), DeviceLock("cpu", tmp_path):
            pass


def test_folder_and_file_are_private(tmp_path):
    with DeviceLock("cpu", tmp_path / "new") as held:
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
        assert held.path.stat().st_mode & 0o777 == 0o600


def test_a_linked_file_is_rejected_and_its_target_unchanged(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "locks"
    folder.mkdir(mode=0o700)
    (folder / file_name("cpu")).symlink_to(victim)
    with pytest.raises(PermissionError, match="lock file"), DeviceLock("cpu", folder):
        pass
    (folder / file_name("gpu")).hardlink_to(victim)
    victim.chmod(0o600)
    with pytest.raises(PermissionError, match="not a regular file"), DeviceLock("gpu", folder):
        pass
    assert victim.read_text() == "precious"


def test_a_linked_or_public_folder_is_rejected(tmp_path):
    (tmp_path / "mine").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    for name in ("link", "dangling", "file"):
        with (
            pytest.raises(PermissionError, match="cannot be used as the lock folder"),
            DeviceLock("cpu", tmp_path / name),
        ):
            pass
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="open to other users"), DeviceLock("cpu", tmp_path / "open"):
        pass
    assert not any((tmp_path / "mine").iterdir())


def test_a_folder_of_another_owner_is_rejected(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    monkeypatch.setattr("perf.session.lock.os.getuid", lambda: os.geteuid() + 1)
    with pytest.raises(PermissionError, match="open to other users"), DeviceLock("cpu", tmp_path):
        pass


def test_different_keys_have_different_file_names(tmp_path):
    keys = ["cpu", "GPU-8f/../../etc", "GPU-8f-..-..-etc", "a b", "a_b", "", ".", "..", "x" * 300, "x" * 301, "ü"]
    names = [file_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert all("/" not in name and not name.startswith(".") and len(name) < 120 for name in names)
    for key in keys:
        with DeviceLock(key, tmp_path) as held:
            assert held.path.parent == tmp_path


def test_the_default_folder_is_the_same_with_and_without_a_login(monkeypatch):
    folder = lock_folder()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/0")
    assert lock_folder() == folder
    assert str(os.getuid()) in folder.name
