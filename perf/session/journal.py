"""The journal of a session: every round is on the disk before the next one starts.

A JSON line per event, each flushed and synced, so that a kill at any moment loses at most the round in flight;
`--perf-resume` goes on from it. Every line ends with a checksum of the journal up to there, so that a number that changed
on the disk, or a line that is missing, is noticed. A damaged line and what follows it are not read, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
KEPT = 5  # finished or not, older ones are deleted when a session starts
EVENTS = ("plan", "load", "round", "failure", "end")
LARGEST = 1 << 28  # bytes
CHECKSUM = ', "crc32": "{:08x}"}}\n'
CHECKSUM_BYTES = len(CHECKSUM.format(0))


class JournalError(Exception):
    """A journal that cannot be written or gone on from; the message names the file and the way out."""


@dataclass(frozen=True)
class Recorded:
    """What a journal holds: the plan it belongs to, the events after it, and whether something in it was damaged."""

    path: Path
    plan: dict[str, Any]
    events: tuple[dict[str, Any], ...]
    good_bytes: int
    checksum: int
    damage: str | None

    @property
    def ended(self) -> bool:
        """Whether the session came to its end."""
        return any(event["event"] == "end" for event in self.events)


class Journal:
    """An open journal. Use as a context."""

    def __init__(self, path: Path, plan: dict[str, Any] | None = None, after: Recorded | None = None):
        """A new journal for `plan`, or going on `after` what was read, whose damaged end is cut off."""
        self.path = path
        self._checksum = after.checksum if after else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "r+b" if after else "xb")  # noqa: SIM115 (open as long as the session)
            if after:
                self._file.truncate(after.good_bytes)
                self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise JournalError(f"{path}: the journal cannot be written: {error.strerror}") from None
        if not after:
            try:
                self.write("plan", {"schema": SCHEMA, **(plan or {})})
            except JournalError:
                self.close()
                path.unlink(missing_ok=True)  # else it would hide the one before it from --perf-resume
                raise

    def write(self, event: str, content: dict[str, Any]) -> None:
        """Add an event; on the disk when this returns. Raises JournalError, with what was there before still whole."""
        body = json.dumps({"event": event, **content}, allow_nan=False).encode()[:-1]
        self._checksum = zlib.crc32(body, self._checksum)
        try:
            self._file.write(body + CHECKSUM.format(self._checksum).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(
                f"{self.path}: {error.strerror}; free some space and go on with --perf-resume: the rounds before are safe"
            ) from None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more events."""
        with contextlib.suppress(OSError):  # the buffer of a write that failed above
            self._file.close()


def read(path: Path) -> Recorded:
    """A journal as far as it is whole. Raises JournalError where not even its plan can be read."""
    try:
        if path.stat().st_size > LARGEST:
            raise JournalError(f"{path}: is too large for a journal; delete it and start again without --perf-resume")
        content = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path}: {error.strerror}") from None
    events, good, damage, checksum = [], 0, None, 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        body = line[:-CHECKSUM_BYTES]
        after = zlib.crc32(body, checksum)
        event = _event(body + b"}") if line[len(body) :] == CHECKSUM.format(after).encode() else None
        if event is None:
            damage = f"line {number} is damaged; it and what follows is measured again"
            break
        events.append(event)
        good, checksum = good + len(line), after
    if not events or events[0]["event"] != "plan" or events[0].get("schema") != SCHEMA:
        raise JournalError(f"{path}: holds no plan of this version; delete it and start again without --perf-resume")
    return Recorded(path, events[0], tuple(events[1:]), good, checksum, damage)


def _event(body: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and event.get("event") in EVENTS else None


def newest(folder: Path) -> Path | None:
    """The journal of the last session in a folder."""
    return max(folder.glob("*.jsonl"), default=None, key=lambda path: path.name)


def prune(folder: Path) -> None:
    """Delete all but the newest few."""
    for path in sorted(folder.glob("*.jsonl"))[: -KEPT or None]:
        path.unlink(missing_ok=True)
