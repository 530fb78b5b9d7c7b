"""Interrupts while a command line imports torch, which takes seconds."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process with status 130 and no traceback.

    Imports have nothing to undo, and libraries may turn a KeyboardInterrupt in the middle of theirs into another error.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return

    def end(*_: object) -> None:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    former = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
