"""Wire format between a session and its workers: JSON lines, the protocol version and the kinds of error.

A request is one line {"op": ..., ...}. A response is one line, {"ok": {...}} or {"error": {"kind", "message"}}.
"""

from __future__ import annotations

import re

PROTOCOL = 2  # 1: before the examination of an output was a request of its own
# Kinds of error that a worker reports itself; a launch adds `died`, `hung` and `invalid_response`, and the session
# `wrong_image` (a failed image check).
KINDS = ("unavailable", "usage", "out_of_memory", "bad_image", "failed")
NO_REFERENCE = "its engine has no `reference(configuration)`"  # a user's own need not have one
MAX_MESSAGE_CHARACTERS = 2000


class WorkerError(Exception):
    """An error response of a worker, or no valid response. kind: see KINDS."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def parse_response(response: object) -> dict:
    """The content of a response. Raises WorkerError for an error, and ValueError for an invalid response."""
    if isinstance(response, dict) and isinstance(response.get("ok"), dict):
        return response["ok"]
    error = response.get("error") if isinstance(response, dict) else None
    if isinstance(error, dict) and error.get("kind") in KINDS and isinstance(error.get("message"), str):
        raise WorkerError(error["kind"], one_line(error["message"])[:MAX_MESSAGE_CHARACTERS])
    raise ValueError("invalid response")


def one_line(text: str) -> str:
    """Text on one line, without control characters such as terminal colours."""
    plain = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())
