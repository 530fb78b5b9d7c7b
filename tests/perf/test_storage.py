"""Storage of saved runs: folder names, numbers and atomic writes."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_runs import STACK

from perf.runs import storage
from perf.runs.saved_run import BaselineError
from perf.runs.storage import save_numbered, storage_name, write_atomically

ROOT = Path(__file__).parents[2]


def test_storage_name():
    assert storage_name({**STACK, "name": "NVIDIA H200"}) == "NVIDIA-H200_570.86_torch2.15.0+cu132"
    assert storage_name({"name": "NVIDIA A100", "driver": "525.60", "torch": "1.12.1", "cuda": "11.6"}) == (
        "NVIDIA-A100_525.60_torch1.12.1+cu116"
    )
    cpu = {"name": "AMD EPYC 9654 96-Core", "driver": None, "torch": "2.15.0+cpu", "cuda": None}
    assert storage_name(cpu) == "AMD-EPYC-9654-96-Core_torch2.15.0+cpu"
    assert storage_name({}) == "unknown_torch-unknown"


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "driver", "torch", "cuda"]), st.none() | st.text(max_size=300)))
def test_storage_name_is_safe_on_every_file_system(stack):
    name = storage_name(stack)
    assert 0 < len(name) < 200 and name[0] not in ".-" and name[-1] not in ". "
    assert all(character.isascii() and (character.isalnum() or character in "._+-") for character in name)


def test_write_makes_folders_and_keeps_modes(tmp_path):
    path = tmp_path / "a" / "b" / "run.json"
    umask = os.umask(0o027)
    try:
        write_atomically(path, {"schema": 1})
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o600)
        write_atomically(path, "text")
    finally:
        os.umask(umask)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("text", 0o600)
    assert os.listdir(path.parent) == ["run.json"]


def test_write_through_a_link_and_values_that_json_lacks(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_atomically(tmp_path / "link.json", "text")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "text"
    with pytest.raises(ValueError, match="JSON"):
        write_atomically(tmp_path / "real.json", {"seconds": math.nan})
    assert (tmp_path / "real.json").read_text() == "text"


def test_full_disk_leaves_the_old_file(tmp_path):
    """A real kernel error: a file size limit in a subprocess."""
    path = tmp_path / "run.json"
    path.write_text("old")
    script = (
        "import resource, sys; from perf.runs.storage import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: write_atomically(sys.argv[1], 'x' * 1_000_000)\n"
        "except ValueError as error: print(error)"
    )
    # Without bytecode: Python would keep what the limit cut off, for every later process.
    command = [sys.executable, "-B", "-c", script, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "run.json: cannot be written: File too large; the old content is unchanged" in done.stdout, done
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["run.json"]


def test_killed_writers_leave_whole_files(tmp_path):
    """kill -9 at random moments of a continuously writing process."""
    path = tmp_path / "run.json"
    script = (
        "import sys; from perf.runs.storage import write_atomically; print('ready', flush=True)\n"
        "while True:\n for letter in 'ab': write_atomically(sys.argv[1], letter * 300_000)"
    )
    draw, seen = random.Random(3), set()
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", script, path], cwd=ROOT, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            time.sleep(draw.uniform(0.01, 0.05))  # not waiting for something, but the random moment itself
            writer.send_signal(signal.SIGKILL)
        if path.exists():
            text = path.read_text()
            seen.add(text[:1])
            assert text in ("a" * 300_000, "b" * 300_000)
    assert seen


def test_numbers(tmp_path):
    assert save_numbered(tmp_path / "new", "nightly", {}).name == "0001_nightly.json"
    (tmp_path / "0007_a.json").write_text("{}")
    assert save_numbered(tmp_path, "a b/../c\n", {}).name == "0008_a-b-..-c.json"
    (tmp_path / "9999_a.json").write_text("{}")
    assert save_numbered(tmp_path, "", {}).name == "10000_run.json"
    assert save_numbered(tmp_path, "é", {}).name == "10001_run.json"
    (tmp_path / ".10002.taken").write_text("")  # of a writer that was killed
    assert save_numbered(tmp_path, "x", {}).name == "10003_x.json"
    assert json.loads((tmp_path / "10003_x.json").read_text()) == {}


def test_concurrent_writers_get_distinct_numbers(tmp_path):
    def write(label: str) -> None:
        for _ in range(25):
            save_numbered(tmp_path, label, label)

    writers = [threading.Thread(target=write, args=(label,)) for label in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(int(name[:4]) for name in os.listdir(tmp_path)) == list(range(1, 101))


def test_number_taken_between_listing_and_marking(tmp_path, monkeypatch):
    (tmp_path / "0001_other.json").write_text("{}")
    look, stale = storage._numbers, [set(), set()]  # of files and of markers, as before the other had finished
    monkeypatch.setattr(storage, "_numbers", lambda *place: stale.pop() if stale else look(*place))
    assert save_numbered(tmp_path, "mine", {}).name == "0002_mine.json"


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BaselineError, match="is not a folder"):
        save_numbered(tmp_path / "file", "a", {})
    with pytest.raises(BaselineError, match="cannot be written: Not a directory"):
        save_numbered(tmp_path / "file" / "below", "a", {})
