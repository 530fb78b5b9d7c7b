"""The compile cache: a second process compiles nothing, and unusable files are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd import txt2img
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.optimise.compile_cache import open_compile_cache, save_compile_cache

TINY = ["--device", "cpu", "--steps", "1"]

# CPU seconds of the first image, the C++ compiler's included: other load on the machine hardly changes them.
FIRST_IMAGE = """
import os, sys
from pathlib import Path
from models import smallest
from sd import Optimisations
from sd.optimise.compile_cache import open_compile_cache, save_compile_cache

directory = Path(sys.argv[1])
open_compile_cache(directory)
model = smallest(Optimisations(compile="default", compile_autoencoder="default", compile_text_encoder="default"))
start = sum(os.times()[:4])
model.txt2img("a red circle", steps=1)
print("SECONDS", sum(os.times()[:4]) - start)
save_compile_cache(directory)
"""


@pytest.mark.nightly
@pytest.mark.compile
@pytest.mark.skipif(not has("compile_cache"), reason="torch >= 2.7")
def test_a_second_process_reaches_its_first_image_five_times_sooner(tmp_path):
    tests = Path(__file__).parents[1]
    environment = {
        **{key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"},
        "PYTHONPATH": os.pathsep.join([str(tests / "helpers"), str(tests.parent)]),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # other processes' CPU time would not be counted
    }

    def first_image() -> float:
        command = [sys.executable, "-c", FIRST_IMAGE, str(tmp_path / "cache")]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return float(run.stdout.split("SECONDS")[1])

    cold, warm = first_image(), first_image()
    assert cold >= 5 * warm, f"{cold:.1f} s cold, {warm:.1f} s warm"
    (file,) = (tmp_path / "cache").glob("torch-compile*.cache")  # of the same content in both processes
    assert file.stat().st_size > 10_000


@pytest.mark.skipif(not has("compile_cache"), reason="torch >= 2.7")
def test_every_shape_keeps_its_portable_file(monkeypatch, tmp_path):
    """A process with batch 8 must not replace the code for batch 1; the same code is the same file."""
    loaded = []
    monkeypatch.setitem(sys.modules, "torch._dynamo", sys)  # as after a compilation
    monkeypatch.setattr("torch.compiler.load_cache_artifacts", lambda content: loaded.append(content) or True)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    for content, keys in ((b"1", ["a"]), (b"8", ["a", "b"]), (b"again", ["a"])):
        info = SimpleNamespace(artifacts={"inductor": keys})
        monkeypatch.setattr("torch.compiler.save_cache_artifacts", lambda result=(content, info): result)
        save_compile_cache(tmp_path)
    open_compile_cache(tmp_path)
    assert sorted(loaded) == [b"8", b"again"]
    loaded.clear()
    (tmp_path / "inductor").mkdir()  # on the machine that wrote them
    open_compile_cache(tmp_path)
    assert not loaded


@pytest.mark.skipif(has("compile_cache"), reason="this torch has the cache")
def test_an_older_torch_refuses_by_name(tmp_path):
    with pytest.raises(Unavailable, match="compile-cache needs"):
        open_compile_cache(tmp_path)


@pytest.mark.skipif(not has("compile_cache"), reason="torch >= 2.7")
class TestRefusals:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch):
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            monkeypatch.setenv(name, "")  # restored by monkeypatch after the test

    def test_an_invalid_cache_file(self, tmp_path):
        (tmp_path / "torch-compile-0.cache").write_bytes(b"not a cache")
        with pytest.raises(ConfigError, match="is no cache of this torch"):
            open_compile_cache(tmp_path)

    def test_a_file_in_place_of_the_directory(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot be used"):
            open_compile_cache(tmp_path / "file")

    def test_a_cache_without_compilation(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert txt2img.main([*TINY, "--compile-cache", "cache"]) == 2
        assert "nothing is compiled" in capsys.readouterr().err
        assert not Path("cache").exists()
