"""Wire format between a session and its workers: JSON lines, protocol version and error kinds."""

from __future__ import annotations

import re

PROTOCOL = 1


# Kinds of error that are an answer rather than a defect; see `error_kind`.
KINDS = ("unavailable", "usage", "out_of_memory", "bad_image", "failed")


LONGEST_MESSAGE = 2000


class WorkerError(Exception):
    """A launch that gave no answer, or an error as its answer.

    kind: one of perf.worker.server.KINDS, or `died`, `hung`, `rubbish` of the process, or `wrong_picture` of what it made.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_answer(answer) -> dict:
    """The content of an answer. Raises WorkerError for an error, and ValueError for what is no answer."""
    if isinstance(answer, dict) and isinstance(answer.get("ok"), dict):
        return answer["ok"]
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, dict) and error.get("kind") in KINDS and isinstance(error.get("message"), str):
        raise WorkerError(error["kind"], one_line(error["message"])[:LONGEST_MESSAGE])
    raise ValueError("no answer")


def one_line(text: str) -> str:
    """Text on one line and without control characters, such as a terminal's colours."""
    plain = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())
