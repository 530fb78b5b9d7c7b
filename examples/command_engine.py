"""A shell command that writes an image: `pytest perf --engine examples/command_engine.py:Engine`."""

import subprocess
import tempfile
from pathlib import Path

from PIL import Image


class Engine:
    def __init__(self, configuration):
        self.folder, self.steps = tempfile.TemporaryDirectory(), configuration.steps

    def round(self, seed):
        command = f"txt2img --steps {self.steps} --seed {seed} --skip_grid --outdir {self.folder.name}"
        subprocess.run(command.split(), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return Image.open(max(Path(self.folder.name, "samples").glob("*.png")))

    def release(self):
        self.folder.cleanup()
