"""The journal of a session: every round is on disk before the next one starts.

Each event is one JSON line, flushed and synced, so that a kill loses at most the round in progress; `--perf-resume`
continues from it. Every line ends with a checksum of the journal up to that point, which detects changed and missing lines.
Reading stops at the first damaged line and reports it. The journal of an unfinished session is kept until it is resumed
or dropped (`sd-perf unfinished --drop`). A lock on the file marks the journal of a session that runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 2  # 1: before rounds of all configurations alternated
KEPT = 5  # journals of complete sessions; older ones are deleted when a session starts
EVENTS = ("plan", "load", "counts", "round", "failure", "end")
LARGEST_BYTES = 1 << 28
LATEST_SECONDS = 4e9  # a start after the year 2096 is damage
CHECKSUM = ', "crc32": "{:08x}"}}\n'
CHECKSUM_BYTES = len(CHECKSUM.format(0))


class JournalError(Exception):
    """A journal that cannot be written or resumed; the message names the file and the remedy."""


@dataclass(frozen=True)
class Recorded:
    """The readable content of a journal: its plan and events. good_bytes, checksum: of the lines before any damage."""

    path: Path
    plan: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    good_bytes: int
    checksum: int
    damage: str | None

    @property
    def ended(self) -> bool:
        """Whether the session was complete."""
        return bool(self.events) and self.events[-1]["event"] == "end"

    @property
    def rounds(self) -> int:
        """The number of timed rounds, repeated ones included."""
        return sum(event["event"] == "round" and event.get("round") is not None for event in self.events)

    @property
    def name(self) -> str:
        """The name that `--perf-resume` and `sd-perf unfinished --drop` take."""
        return self.path.stem

    def __str__(self) -> str:
        """The name, the start, the progress and the configurations, on one line."""
        started, slots = self.plan.get("started_unix_seconds"), self.plan.get("slots")
        parts = [f"{self.rounds} rounds"]
        if isinstance(started, float) and 0 < started < LATEST_SECONDS:
            parts.insert(0, f"started {time.strftime('%Y-%m-%d %H:%M', time.gmtime(started))} UTC")
        if isinstance(slots, list) and slots:
            parts.append(ascii(str(slots[0]))[1:-1][:100] + (f" and {len(slots) - 1} more" if slots[1:] else ""))
        return f"{self.name} ({', '.join(parts)})"


class Journal:
    """A journal open for appending; a context manager. Raises JournalError if it cannot be written."""

    def __init__(self, path: Path, plan: dict[str, Any] | None = None, after: Recorded | None = None):
        """Create a journal for `plan`, or continue `after` the content read earlier, dropping its damaged end."""
        self.path = path
        self._checksum = after.checksum if after else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "r+b" if after else "xb")  # noqa: SIM115 (open as long as the session)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if after:
                self._file.truncate(after.good_bytes)
                self._file.seek(0, os.SEEK_END)
        except BlockingIOError:
            self._file.close()
            raise JournalError(f"{path}: its session is running; wait for its end") from None
        except OSError as error:
            raise JournalError(f"{path}: the journal cannot be written: {error.strerror}") from None
        if not after:
            try:
                self.write("plan", {"schema": SCHEMA, **(plan or {})})
            except JournalError:
                self.close()
                path.unlink(missing_ok=True)  # otherwise --perf-resume would take it instead of the journal before it
                raise

    def write(self, event: str, content: dict[str, Any]) -> None:
        """Append an event and sync it to disk. Raises JournalError; earlier events stay intact."""
        body = json.dumps({"event": event, **content}, allow_nan=False).encode()[:-1]
        self._checksum = zlib.crc32(body, self._checksum)
        try:
            self._file.write(body + CHECKSUM.format(self._checksum).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(
                f"{self.path}: {error.strerror}; free some space and continue with --perf-resume: earlier rounds are safe"
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # flushing the buffer of a failed write
            self._file.close()


def read(path: Path) -> Recorded:
    """Read a journal up to its first damaged line. Raises JournalError if its plan is unreadable."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise JournalError(f"{path}: too large for a journal; delete it and start again without --perf-resume")
        content = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from None
    events, good, damage, checksum = [], 0, None, 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        body = line[:-CHECKSUM_BYTES]
        after = zlib.crc32(body, checksum)
        event = _event(body + b"}") if line[len(body) :] == CHECKSUM.format(after).encode() else None
        if event is None:
            damage = f"line {number} is damaged; its round and later ones are measured again"
            break
        events.append(event)
        good, checksum = good + len(line), after
    if events and events[0]["event"] == "plan" and events[0].get("schema") == 1:
        raise JournalError(
            f"{path}: is a journal of an earlier version, whose configurations did not alternate round by round; "
            "resume it with that version, or start again without --perf-resume"
        )
    if not events or events[0]["event"] != "plan" or events[0].get("schema") != SCHEMA:
        raise JournalError(f"{path}: no plan of this version; delete it and start again without --perf-resume")
    return Recorded(path, events[0], tuple(events[1:]), good, checksum, damage)


def _event(body: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and event.get("event") in EVENTS else None


def newest(folder: Path) -> Path | None:
    """The newest journal in a folder, or None."""
    return max(folder.glob("*.jsonl"), default=None, key=lambda path: path.name)


def unfinished(folder: Path) -> list[Recorded]:
    """The sessions in a folder with measured rounds and without an end, oldest first; those that run are left out."""
    sessions = []
    for path in sorted(folder.glob("*.jsonl")):
        if is_running(path):
            continue
        with contextlib.suppress(JournalError):
            recorded = read(path)
            if recorded.rounds and not recorded.ended:
                sessions.append(recorded)
    return sessions


def is_running(path: Path) -> bool:
    """Whether a session writes to this journal."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def prune(folder: Path) -> None:
    """Delete all but the newest KEPT journals; those of unfinished and of running sessions stay."""
    stay = {recorded.path for recorded in unfinished(folder)}
    rest = [path for path in sorted(folder.glob("*.jsonl")) if path not in stay and not is_running(path)]
    for path in rest[: -KEPT or None]:
        path.unlink(missing_ok=True)
