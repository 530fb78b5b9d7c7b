"""The journal: round trips, and detection of every kind of damage."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from perf.session import journal
from perf.session.journal import Journal, JournalError, Recorded, newest, prune, read

ROOT = Path(__file__).parents[2]
PLAN = {"slots": ["a", "b"], "launches": 2, "rounds": 1}
EVENTS = [
    ("load", {"slot": "a", "launch": 0, "answer": {"load_seconds": 0.25, "facts": {"torch": "1.12"}}}),
    ("round", {"slot": "a", "launch": 0, "round": None, "answer": {"seconds": 1.5}}),
    ("round", {"slot": "a", "launch": 0, "round": 0, "answer": {"seconds": 1.25}, "invalid": None}),
    ("failure", {"slot": "b", "launch": 0, "kind": "died", "message": 'a "worker" \\ é \U0001f600 \x1b'}),
    ("end", {}),
]
WRITTEN = [{"event": event, **content} for event, content in EVENTS]


def written(path: Path, events=EVENTS) -> bytes:
    with Journal(path, PLAN) as book:
        for event, content in events:
            book.write(event, content)
    return path.read_bytes()


@pytest.fixture
def book():
    """(path, content) of a small journal, in memory if possible, since it is written thousands of times."""
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        path = Path(folder) / "journal" / "1.jsonl"
        yield path, written(path)


def prefix(path: Path, content: bytes) -> Recorded | None:
    """Read this content and assert that it is a prefix of the original journal; None if it is rejected."""
    path.write_bytes(content)
    try:
        recorded = read(path)
    except JournalError as error:
        assert re.match(rf"{re.escape(str(path))}: .*without --perf-resume$", str(error)), error
        return None
    assert recorded.plan == {"event": "plan", "schema": journal.SCHEMA, **PLAN}
    assert list(recorded.events) == WRITTEN[: len(recorded.events)]
    assert recorded.ended == (len(recorded.events) == len(WRITTEN))
    return recorded


def test_round_trip(book):
    recorded = prefix(*book)
    assert list(recorded.events) == WRITTEN
    assert (recorded.ended, recorded.damage, recorded.good_bytes) == (True, None, len(book[1]))


def test_every_event_is_synced_before_write_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(journal.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with Journal(tmp_path / "1.jsonl", PLAN) as book:
        for event, content in EVENTS:
            book.write(event, content)
            assert synced[-1] == (tmp_path / "1.jsonl").stat().st_size
    assert len(set(synced)) == 1 + len(EVENTS)


def test_every_line_is_json(book):
    lines = [json.loads(line) for line in book[1].splitlines()]
    assert [line.pop("event") for line in lines] == ["plan", *(event for event, _ in EVENTS)]
    assert all(re.fullmatch("[0-9a-f]{8}", line["crc32"]) for line in lines)


def test_truncation_at_every_byte(book):
    path, content = book
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for length in range(len(content)):
        recorded = prefix(path, content[:length])
        whole = sum(end <= length for end in ends)
        assert (recorded is None) == (whole == 0), f"cut at byte {length}"
        if recorded:
            assert len(recorded.events) == whole - 1, f"cut at byte {length}"
            assert (recorded.damage is None) == (length in ends), f"cut at byte {length}"


def test_a_change_of_any_byte_is_detected(book):
    """Flip one bit of each byte, and replace it by characters that are valid JSON."""
    path, content = book
    for i in range(len(content)):
        for other in {content[i] ^ 1 << (i % 8), ord("7"), ord("\n"), ord("\r"), 0} - {content[i]}:
            recorded = prefix(path, content[:i] + bytes([other]) + content[i + 1 :])
            assert recorded is None or recorded.damage, f"byte {i} became {other}"


def mutated(content: bytes, draw: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    i, j = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    line = draw.randrange(len(lines))
    junk = draw.choice([draw.randbytes(draw.randrange(1, 200)), b"\0" * 4096, b"\n", b"{}\n", b"[" * 5000, b"\xff\xfe"])
    kind = draw.choice(["flip", "insert", "cut", "end", "drop", "repeat", "swap", "overwrite"])
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(draw.randrange(1, 5)):
            flipped[draw.randrange(len(content))] = draw.randrange(256)
        return bytes(flipped)
    if kind == "insert":
        return content[:i] + junk + content[i:]
    if kind == "cut":
        return content[:i] + content[j:]
    if kind == "end":
        return content[:i] + junk
    if kind == "overwrite":
        return content[:i] + junk[: j - i].ljust(j - i, b"\0") + content[j:]
    if kind == "drop":
        return b"".join(lines[:line] + lines[line + 1 :])
    if kind == "repeat":
        return b"".join(lines[: line + 1] + lines[line:])
    draw.shuffle(lines)
    return b"".join(lines)


def test_1000_damaged_journals(book):
    path, content = book
    kept = []
    for seed in range(1000):
        damaged = mutated(content, random.Random(seed))
        try:
            recorded = prefix(path, damaged)
            assert recorded is None or recorded.damage or damaged == content or len(recorded.events) < len(WRITTEN)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {damaged!r}") from error
        kept.append(len(recorded.events) if recorded else None)
    assert set(kept) == {None, *range(len(EVENTS) + 1)}  # the damage was everywhere


def test_missing_and_repeated_lines_are_detected(book):
    path, content = book
    lines = content.splitlines(keepends=True)
    without = prefix(path, b"".join(lines[:2] + lines[3:]))
    twice = prefix(path, b"".join(lines[:2] + lines[1:]))
    assert [len(without.events), len(twice.events)] == [1, 1]
    assert without.damage == twice.damage == "line 3 is damaged; its round and later ones are measured again"


def test_resuming_truncates_the_damage(book):
    path, content = book
    for seed in range(50):
        recorded = prefix(path, mutated(content, random.Random(seed)))
        if recorded is None:
            continue
        with Journal(path, after=recorded) as again:
            for event, body in EVENTS[len(recorded.events) :]:
                again.write(event, body)
        assert prefix(path, path.read_bytes()).ended, f"seed {seed}"
        assert path.read_bytes() == content, f"seed {seed}"


@pytest.mark.parametrize(
    "content, printed",
    [
        (b"", "no plan"),
        (b"\n", "no plan"),
        (b"{}\n", "no plan"),
        (b'{"event": "plan", "schema": 1}\n', "no plan"),  # without its checksum
        (b"\x89PNG\r\n\x1a\n", "no plan"),
    ],
)
def test_other_files_are_rejected(tmp_path, content, printed):
    path = tmp_path / "1.jsonl"
    path.write_bytes(content)
    with pytest.raises(JournalError, match=printed):
        read(path)


def test_a_journal_of_the_first_version_is_rejected_by_name(tmp_path, monkeypatch):
    """Its configurations took turns launch by launch, so its rounds cannot be continued in alternation."""
    path = tmp_path / "1.jsonl"
    monkeypatch.setattr(journal, "SCHEMA", 1)
    written(path)
    monkeypatch.undo()
    with pytest.raises(JournalError, match=r"1\.jsonl: is a journal of an earlier version.* start again without"):
        read(path)


def test_another_schema_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "1.jsonl"
    monkeypatch.setattr(journal, "SCHEMA", 3)
    written(path)
    monkeypatch.undo()
    with pytest.raises(JournalError, match="no plan of this version"):
        read(path)


def test_missing_files_folders_and_large_files_are_rejected(tmp_path):
    with pytest.raises(JournalError, match="No such file"):
        read(tmp_path / "1.jsonl")
    with pytest.raises(JournalError, match="Is a directory"):
        read(tmp_path)
    with open(tmp_path / "2.jsonl", "wb") as file:
        file.truncate(journal.LARGEST_BYTES + 1)
    with pytest.raises(JournalError, match="too large"):
        read(tmp_path / "2.jsonl")


def test_creation_failure_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="the journal cannot be written: "):
        Journal(tmp_path / "file" / "1.jsonl", PLAN)
    written(tmp_path / "1.jsonl")
    with pytest.raises(JournalError, match="cannot be written: File exists"):
        Journal(tmp_path / "1.jsonl", PLAN)


# Runs out of room at sys.argv[2] bytes a file, as on a full disk, and says what came of each write.
FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from perf.session.journal import Journal, JournalError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    with Journal(Path(sys.argv[3]), {"slots": []}) as book:
        for number in range(10_000):
            book.write("round", {"slot": "a", "launch": 0, "number": number, "padding": "x" * int(sys.argv[4])})
            print(number, flush=True)
except JournalError as error:
    print(error)
"""


def fill(path: Path, limit: int, padding: int = 10) -> list[str]:
    """The output until the disk was full."""
    arguments = [sys.executable, "-B", "-S", "-c", FULL, str(ROOT), str(limit), str(path), str(padding)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


def assert_safe(path: Path, printed: list[str], reason: str) -> None:
    assert printed[-1] == (
        f"{path}: {reason}; free some space and continue with --perf-resume: earlier rounds are safe"
    )
    recorded = read(path)
    assert [event["number"] for event in recorded.events][: len(printed) - 1] == list(map(int, printed[:-1]))
    with Journal(path, after=recorded) as again:
        again.write("end", {})
    assert read(path).ended and read(path).damage is None


@pytest.mark.parametrize("limit, padding", [(1000, 10), (4096, 10), (4097, 1), (30_000, 20_000), (100_000, 9000)])
def test_a_file_size_limit_loses_no_written_event(tmp_path, limit, padding):
    path = tmp_path / "1.jsonl"
    assert_safe(path, fill(path, limit, padding), "File too large")


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here; the same is tested with a limit on file size")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_no_written_event(small_disk):
    path = small_disk / "1.jsonl"
    printed = fill(path, 0, padding=3000)
    with pytest.raises(JournalError, match="No space left on device"):
        Journal(small_disk / "2.jsonl", {"padding": "x" * 5000})
    assert newest(small_disk) == path  # the one without a plan does not hide it
    room = read(path)
    os.truncate(path, room.good_bytes)
    assert len(room.events) > 5
    assert printed[-1].startswith(f"{path}: No space left on device; free some space")
    assert [event["number"] for event in room.events][: len(printed) - 1] == list(map(int, printed[:-1]))


def test_a_journal_without_a_plan_is_removed(tmp_path):
    earlier = tmp_path / "1.jsonl"
    written(earlier)
    printed = fill(tmp_path / "2.jsonl", limit=20)
    assert len(printed) == 1 and "File too large" in printed[0]
    assert newest(tmp_path) == earlier


def test_nan_is_rejected(tmp_path):
    with Journal(tmp_path / "1.jsonl", PLAN) as book:
        with pytest.raises(ValueError, match="JSON"):
            book.write("round", {"answer": float("nan")})
        book.write("end", {})
    assert read(tmp_path / "1.jsonl").ended


def test_newest_and_prune(tmp_path):
    assert newest(tmp_path) is None
    for number in range(1, 9):
        (tmp_path / f"2026010{number}-000000-000000000.jsonl").write_text("")
    (tmp_path / "other.txt").write_text("")
    prune(tmp_path)
    left = sorted(path.name[:8] for path in tmp_path.glob("*.jsonl"))
    assert left == ["20260104", "20260105", "20260106", "20260107", "20260108"]
    assert (tmp_path / "other.txt").exists()
    assert newest(tmp_path).name.startswith("20260108")
    prune(tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == journal.KEPT


def test_prune_keeps_unfinished_and_running_sessions(tmp_path):
    names = [f"2026010{number}-000000-000000000" for number in range(1, 10)]
    for name in names:
        with Journal(tmp_path / f"{name}.jsonl", PLAN) as book:
            if name != names[1]:
                book.write("round", {"slot": "a", "launch": 0, "round": 0})
            if name not in names[1:3]:
                book.write("end", {})
    assert [recorded.name for recorded in journal.unfinished(tmp_path)] == [names[2]]
    with Journal(tmp_path / f"{names[0]}.jsonl", after=read(tmp_path / f"{names[0]}.jsonl")):
        prune(tmp_path)
    left = [path.stem for path in sorted(tmp_path.glob("*.jsonl"))]
    assert left == [names[0], names[2], *names[-journal.KEPT :]]


@pytest.mark.parametrize("plan", [{}, {"slots": 3, "started_unix_seconds": "x"}, {"slots": ["\x1b[2J"] * 2}, PLAN])
def test_description_of_any_plan_is_one_printable_line(tmp_path, plan):
    with Journal(tmp_path / "1.jsonl", plan) as book:
        book.write("end", {})
    assert str(read(tmp_path / "1.jsonl")).isprintable()
