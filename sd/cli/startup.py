"""Parts of the command lines that work without torch, whose import takes seconds: interrupts, options of checkpoints."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

REFUSED = {  # options of the original scripts, with the reason
    "--torchscript": "not supported: use --compile",
    "--ipex": "not supported: PyTorch's own CPU kernels are used; use --precision bf16",
}


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


def add_parts(add: Callable[..., object]) -> None:
    """Add the options for networks from other files, and for unknown weights."""
    add("--vae", metavar="FILE", help="autoencoder, in place of the checkpoint's, if it has one: a file or a folder")
    add("--text-encoder", metavar="FILE", help="text encoder, in place of the checkpoint's: a file or a folder")
    add(
        "--ignore-unknown-keys", action="store_true", help="leave out weights of the checkpoint that belong to no layer"
    )
