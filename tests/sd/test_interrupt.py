"""Ctrl-C while a command line imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW_TORCH = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException as error:  # as libraries do
    raise ImportError("torch failed") from error
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "arguments",
    [
        ["txt2img"],
        ["img2img"],
        ["inpaint"],
        ["depth2img"],
        ["inspect", "tiny"],
        ["convert", "tiny", "a.ckpt", "--to", "original"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_interrupt_gives_one_line_and_no_traceback(arguments, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", f"sd.{arguments[0]}", *arguments[1:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environ, cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "interrupted\n")
