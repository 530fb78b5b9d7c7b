"""Engines of the user's own: the forms, their outputs, their errors, and the examples."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from inner_session import inner_fixture, machine_fixture  # noqa: F401
from PIL import Image

from perf.analysis.verdicts import ExitCode
from perf.configurations.configuration import PROMPT, Configuration, UnknownChoice, from_dict
from perf.launch.process import ROOT
from perf.session.image_check import image_failure
from perf.worker.clock import cpu_clock, cpu_clock_with_children
from perf.worker.engines import require_code_of
from perf.worker.engines.interface import Output, output_of
from perf.worker.server import Worker
from perf.worker.wire import NO_REFERENCE, WorkerError
from sd import StableDiffusion
from sd.checkpoint import layouts

ENGINES = """
    import subprocess, sys, torch

    class Doubling:
        precision = "full"

        def __init__(self, configuration):
            self.x = torch.ones(configuration.batch, 3) * 2

        def round(self, seed):
            self.stages = {"multiply": 0.5}
            return self.x * seed

        def release(self):
            print("released", file=sys.stderr)

        @staticmethod
        def reference(configuration):
            return lambda seed: torch.ones(configuration.batch, 3) * 2 * seed * Doubling.error

        error = 1.0

    def function(configuration):
        return lambda seed: [torch.zeros(2), torch.ones(3, dtype=torch.int64)]

    def load(configuration):
        global steps
        steps = configuration.steps

    def round(seed):
        return float(steps)

    def broken(configuration):
        raise KeyError("weights")

    def nothing(configuration):
        return lambda seed: None

    def child(configuration):
        code = "x = 0\\nfor i in range(2_000_000): x += i"
        return lambda seed: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout + b"1"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with the user's module mine.py."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(ENGINES))
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "engines.py").write_text(textwrap.dedent(ENGINES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("mine", "package", "package.engines"):
        sys.modules.pop(name, None)


def loaded(folder: Path, engine: str, **fields) -> tuple[Worker, dict]:
    """A worker that was asked to load an engine, and its answer."""
    configuration, worker = Configuration(engine=engine, **fields), Worker()
    own = {"directory": str(folder), "folder": str(folder), "given": configuration.given}
    request = {"configuration": configuration.as_dict(), "device": "cpu", "clock": "cpu", "threads": None, "own": own}
    return worker, worker.handle({"op": "load", **request})


def examined(worker: Worker, *references: str) -> dict:
    """The answer about the output of the last round."""
    return worker.handle({"op": "examine", "check": list(references)})


def test_an_unknown_precision_is_named(folder):
    (folder / "mine.py").write_text(textwrap.dedent(ENGINES).replace('precision = "full"', 'precision = "float16"'))
    _, answer = loaded(folder, "mine.py:Doubling")
    message = "mine.py:Doubling: its precision 'float16' is none of full, autocast, fp16, bf16"
    assert answer["error"] == {"kind": "usage", "message": message}


def test_code_of_another_commit_must_be_imported_from_it(tmp_path, monkeypatch):
    tree, top = tmp_path / "tree", tmp_path / "top"
    for folder in (tree / "src" / "their_package", top / "src" / "their_package", top / "lib"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    (top / "lib" / "their_tool.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tree / "src"), *sys.path])
    importlib.import_module("their_package")
    require_code_of(str(top), str(tree))
    (tree / "lib").mkdir()
    (tree / "lib" / "their_tool.py").write_text("")
    (top / "env").mkdir()
    (top / "env" / "library.py").write_text("")  # of an environment in the repository, which no commit has
    sys.path.insert(0, str(top / "env"))
    importlib.import_module("library")
    # As `python -m perf.worker` in a clone of sd-perf, which is the repository then.
    main = str(ROOT / "perf" / "worker" / "__main__.py")
    monkeypatch.setitem(sys.modules, "__mp_main__", SimpleNamespace(__file__=main))
    require_code_of(str(top), str(tree))
    for path, name in ((top / "src", "their_package"), (top / "lib", "their_tool")):
        sys.modules.pop("their_package", None)
        sys.path.insert(0, str(path))
        importlib.import_module(name)
        with pytest.raises(WorkerError, match=f"{name} was imported from {top}"):
            require_code_of(str(top), str(tree))
        sys.modules.pop(name)


@pytest.mark.parametrize("engine", ["mine.py:Doubling", "package.engines:Doubling", "package/engines.py:Doubling"])
def test_class(folder, engine):
    worker, answer = loaded(folder, engine, batch=2)
    assert answer["ok"]["precision"] == "full" and not answer["ok"]["compiles"] and answer["ok"]["releases"]
    round_ = worker.handle({"op": "round", "seed": 3})["ok"]
    assert round_["stages"] == {"multiply": 0.5} and round_["seconds"] > 0 and round_["work"] is None
    assert worker.output.latents.tolist() == [[6.0] * 3] * 2
    assert not examined(worker)["ok"]["image"]["constant"], "an output that is no image may be constant"
    assert worker.handle({"op": "release"}) == {"ok": {}}


def test_function_and_module(folder):
    worker, _ = loaded(folder, "mine.py:function")
    worker.handle({"op": "round", "seed": 1})
    assert worker.output.latents.tolist() == [[0, 0, 1, 1, 1]]
    worker, answer = loaded(folder, "mine.py", steps=7)
    worker.handle({"op": "round", "seed": 1})
    assert worker.output.latents.tolist() == [7.0] and not answer["ok"]["releases"]


@pytest.mark.parametrize(
    "engine, kind, message",
    [
        ("mine.py:broken", "failed", "KeyError: 'weights' (mine.py, line "),
        ("mine.py:absent", "usage", "--engine mine.py:absent: mine.py has no absent"),
        ("mine:Doubling.reference.more", "usage", "mine has no more"),
        ("nowhere:Engine", "usage", "--engine nowhere: there is no module nowhere in "),
        ("nowhere.py:Engine", "usage", "--engine nowhere.py: there is no file "),
        ("mine.py:function.reference", "unavailable", "its engine has no `reference(configuration)`"),
    ],
)
def test_errors_of_loading(folder, engine, kind, message):
    _, answer = loaded(folder, engine)
    assert answer["error"]["kind"] == kind and message in answer["error"]["message"], answer


def test_module_without_the_functions(folder):
    (folder / "empty.py").write_text("")
    assert (
        "empty.py has no `load(configuration)` and `round(seed)`" in loaded(folder, "empty.py")[1]["error"]["message"]
    )
    sys.modules.pop("empty")


def test_round_without_an_output(folder):
    worker, _ = loaded(folder, "mine.py:nothing")
    error = worker.handle({"op": "round", "seed": 1})["error"]
    assert error["message"].startswith("TypeError: a round returned NoneType: return a tensor, an array")


def test_option_that_the_engine_ignores_is_an_error(folder):
    """Otherwise `--attention sdpa --attention mha` would compare an engine with itself under two names."""
    worker, _ = loaded(folder, "mine.py:Doubling", batch=2, attention="mha")
    error = worker.handle({"op": "round", "seed": 1})["error"]
    assert error["kind"] == "usage"
    assert "does not read configuration.attention, so --attention has no effect" in error["message"]
    worker, _ = loaded(folder, "mine.py:function", attention="sdpa")
    assert "ok" in worker.handle({"op": "round", "seed": 1}), "a default has no part in the id"


@pytest.mark.slow
@pytest.mark.parametrize("error, expected", [(1.0, None), (1.01, "latents: relative error 0.0099")])
def test_own_reference(folder, tmp_path, error, expected):
    reference, _ = loaded(folder, "mine:Doubling.reference", batch=2)
    sys.modules["mine"].Doubling.error = error
    reference.handle({"op": "round", "seed": 5})
    reference.handle({"op": "write_reference", "path": str(tmp_path / "reference.npz")})
    worker, answer = loaded(folder, "mine:Doubling", batch=2)
    worker.handle({"op": "round", "seed": 5})
    image = examined(worker, str(tmp_path / "reference.npz"))["ok"]["image"]
    failure = image_failure(image, answer["ok"]["precision"], "cpu")
    assert failure is None if expected is None else failure.startswith(expected)


def test_reference_of_another_shape(folder, tmp_path):
    reference, _ = loaded(folder, "mine:Doubling", batch=3)
    reference.handle({"op": "round", "seed": 5})
    reference.handle({"op": "write_reference", "path": str(tmp_path / "reference.npz")})
    worker, _ = loaded(folder, "mine:Doubling", batch=2)
    worker.handle({"op": "round", "seed": 5})
    error = examined(worker, str(tmp_path / "reference.npz"))["error"]
    assert "the output has the shape (2, 3), and that of its reference is (3, 3)" in error["message"]


def test_cpu_time_includes_that_of_a_command(folder):
    worker, _ = loaded(folder, "mine.py:child")
    before, before_alone = cpu_clock_with_children(), cpu_clock()
    seconds = worker.handle({"op": "round", "seed": 1})["ok"]["seconds"]
    in_all, alone = cpu_clock_with_children() - before, cpu_clock() - before_alone
    assert in_all - alone > 0.02 and in_all - alone < seconds < in_all


IMAGE = Image.fromarray(np.arange(48, dtype="uint8").reshape(4, 4, 3))


@pytest.mark.parametrize(
    "returned, shape, dtype, images",
    [
        (torch.ones(2, 3, requires_grad=True), (2, 3), torch.float32, False),
        (torch.tensor(4.0), (1,), torch.float32, False),
        (np.ones((2, 2)), (2, 2), torch.float64, False),
        (np.zeros((1, 4, 4, 3), "uint8"), (1, 4, 4, 3), torch.uint8, True),
        (IMAGE, (1, 4, 4, 3), torch.uint8, True),
        ([IMAGE, IMAGE], (2, 4, 4, 3), torch.uint8, True),
        ({"a": torch.ones(2), "b": torch.ones(3)}, (1, 5), torch.float32, False),
        (b"abc", (1, 3), torch.uint8, False),
        ("abc", (1, 3), torch.uint8, False),
        (2, (1,), torch.float32, False),
    ],
)
def test_outputs(returned, shape, dtype, images):
    output = output_of(returned, {})
    assert tuple(output.latents.shape) == shape and output.latents.dtype == dtype
    assert (output.images is not None) == output.varied == images
    assert output_of(output, {}) is output and isinstance(output, Output)


# --- configurations


def test_ids_name_the_engine_and_what_was_changed():
    own = Configuration(engine="some/where/pipeline.py:Fast")
    assert (own.id, own.model, own.given) == ("pipeline.Fast", "own", [])
    assert own.reference().id == "pipeline.Fast.reference"
    assert Configuration(engine="pipeline.py").reference().engine == "pipeline.py:reference"
    changed = Configuration(
        engine="a.b:Fast", attention="mha", precision="fp16", batch=2, steps=20, height=64, width=64
    )
    assert changed.id == "b.Fast-mha-fp16-steps20-64x64-b2".replace("b.Fast", "a.b.Fast")
    assert changed.given == ["attention", "precision", "batch", "steps", "height", "width"]
    assert from_dict(changed.as_dict()) == changed
    for text in ("sdd", "a b:c", "x.py:", "mine:", ":Engine"):
        with pytest.raises(UnknownChoice, match="choose from sd, diffusers"):
            Configuration(engine=text)


# --- sessions


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--engine=sdd"],
            "--engine: 'sdd': choose from sd, diffusers, or name your own as FILE.py:NAME or MODULE:NAME",
        ),
        (["--engine=absent.py:Engine"], "--engine: absent.py: there is no such file"),
        (["--engine=mine:Engine", "--model=sd2"], "--model: mine:Engine is an engine of your own"),
    ],
)
def test_usage_errors(inner, arguments, message):
    assert inner.run(*arguments, what=()).ret == ExitCode.REFUSED, inner.output
    inner.prints(message)
    assert inner.machine.opened == []


def test_engines_are_pairs_baselines_and_speedups_like_any_other(inner):
    (inner.path / "mine.py").write_text(textwrap.dedent(ENGINES))
    two = ("--engine=mine.py:Doubling", "--engine=mine.py:function")
    inner.machine.slow = {"mine.function": 1.5}
    assert inner.run("--benchmark-save=a", what=two, launches=3).ret == 0, inner.output
    saved = {each["extra_info"]["configuration"]["id"]: each["extra_info"] for each in inner.last()["benchmarks"]}
    assert list(saved) == ["mine.Doubling", "mine.function"]
    assert saved["mine.Doubling"]["configuration"]["engine"] == "mine.py:Doubling"
    assert saved["mine.function"]["speedup"]["against"] == "mine.Doubling"
    assert 0.6 < saved["mine.function"]["speedup"]["estimate"] < 0.7 and saved["mine.Doubling"]["speedup"] is None
    assert inner.last()["perf"]["loading"] == "single", "the memory of an unknown engine is an upper estimate"
    sides = ("--perf-a=--engine mine.py:function", "--perf-b=--engine mine.py:Doubling")
    saving = ("--benchmark-save=b", "--perf-loading=all")
    assert inner.run(*sides, *saving, what=(), launches=6).ret == ExitCode.SLOWER, inner.output
    assert inner.last()["perf"]["loading"] == "all"
    inner.prints("mine.function: SLOWER")


def test_engine_without_a_reference_is_a_baseline_all_the_same(inner):
    """Without a reference nothing is compared, and the session reports it; a reference that fails is an error."""
    (inner.path / "mine.py").write_text(textwrap.dedent(ENGINES))
    inner.machine.refused = {"mine.function.reference": ("unavailable", NO_REFERENCE)}
    assert inner.run("--benchmark-save=a", what=("--engine=mine.py:function",)).ret == 0, inner.output
    inner.prints("mine.function: its output was not checked: its engine has no `reference(configuration)`")
    assert inner.last()["perf"]["partial"] is None
    assert inner.last()["benchmarks"][0]["extra_info"]["image"]["verdict"] == "unchecked"
    inner.machine.refused = {"mine.function.reference": ("failed", "KeyError: 'weights' (mine.py, line 3)")}
    assert inner.run("--benchmark-save=a", what=("--engine=mine.py:function",)).ret == 0, inner.output
    assert inner.last()["perf"]["partial"] == "1 without a reference image"


# --- examples


@pytest.mark.parametrize("name", ["diffusers_engine", "stable_diffusion_cpp_engine", "module_engine", "command_engine"])
def test_examples_are_those_of_the_page(name):
    text = (ROOT / "docs" / "your-pipeline.md").read_text(encoding="utf-8")
    _, _, code = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").partition('"""\n\n')
    assert f"```python\n{code}```\n" in text


@pytest.mark.parametrize("batch", [1, 2])
def test_example_of_a_module(batch):
    worker, answer = loaded(ROOT, "examples/module_engine.py:load", batch=batch)
    assert "ok" in answer and "ok" in worker.handle({"op": "round", "seed": 1})
    assert worker.output.latents.shape == (batch, 128, 256)


@pytest.mark.slow
@pytest.mark.peers
def test_example_of_diffusers(tmp_path):
    pytest.importorskip("diffusers", reason="the extra `peers` is not installed")
    from sd.convert import main as convert

    convert(["tiny", str(tmp_path / "tiny"), "--to", "diffusers"])
    fields = {"checkpoint": str(tmp_path / "tiny"), "steps": 2, "batch": 2}
    reference, answer = loaded(ROOT, "examples/diffusers_engine.py:Engine.reference", **fields)
    assert "ok" in answer and "ok" in reference.handle({"op": "round", "seed": 1}), answer
    path = str(tmp_path / "reference.npz")
    reference.handle({"op": "write_reference", "path": path})
    worker, answer = loaded(ROOT, "examples/diffusers_engine.py:Engine", **fields, precision="bf16")
    worker.handle({"op": "round", "seed": 1})
    image = examined(worker, path)["ok"]["image"]
    assert image_failure(image, answer["ok"]["precision"], "cpu") is None
    assert 16 < image["psnr_db"] < 60, "bf16 is close to fp32, and not equal"


@pytest.mark.slow
@pytest.mark.peers
def test_example_of_stable_diffusion_cpp(tmp_path):
    pytest.importorskip("stable_diffusion_cpp", reason="stable-diffusion-cpp-python is not installed")
    model = StableDiffusion.random("sd1")
    networks = {name: getattr(model, name).half().state_dict() for name in ("unet", "autoencoder", "text_encoder")}
    torch.save({"state_dict": layouts.join_networks(networks, "clip")}, tmp_path / "sd1.ckpt")
    del model, networks
    fields = {"checkpoint": str(tmp_path / "sd1.ckpt"), "steps": 2, "sampler": "euler", "height": 64, "width": 64}
    fields["scale"] = 50.0  # with random weights the prompt has little effect
    path, name = str(tmp_path / "reference.npz"), "examples/stable_diffusion_cpp_engine.py:Engine"
    reference, answer = loaded(ROOT, f"{name}.reference", **fields)
    assert "ok" in answer and "ok" in reference.handle({"op": "round", "seed": 1}), answer
    reference.handle({"op": "write_reference", "path": path})
    for prompt, seed, same in ((PROMPT, 1, True), (PROMPT, 2, False), ("a red star", 1, False)):
        worker, answer = loaded(ROOT, name, **fields, prompt=prompt)
        worker.handle({"op": "round", "seed": seed})
        image = examined(worker, path)["ok"]["image"]
        assert (image_failure(image, answer["ok"]["precision"], "cpu") is None) == same, (prompt, seed)


@pytest.mark.nightly
def test_example_of_a_command(tmp_path):
    """In processes of its own, as a user runs it."""
    arguments = ["--perf-launches=1", "--perf-rounds=1", "--steps=2", "--benchmark-json", tmp_path / "saved.json"]
    engine = ["--engine", "examples/command_engine.py:Engine", "--benchmark-storage", tmp_path]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # the console script `txt2img`
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "perf", *engine, *arguments],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "command_engine.Engine-steps2" in done.stdout


@pytest.mark.nightly
def test_engine_of_another_commit(tmp_path):
    """A change of the user's own code is found, with real processes."""

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    code = (
        "import torch\nfrom size import SIZE\n\ndef load(configuration):\n    x = torch.ones(SIZE, SIZE)\n"
        "    return lambda seed: sum((x @ x).sum() for _ in range(20))\n"
    )
    (tmp_path / "engine.py").write_text(code)
    (tmp_path / "size.py").write_text("SIZE = 300\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["perf.plugin"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_mine.py").write_text((ROOT / "perf" / "test_txt2img.py").read_text())
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (tmp_path / "size.py").write_text("SIZE = 400\n")
    command = [sys.executable, "-m", "pytest", "test_mine.py", "--engine=engine.py:load", "--perf-against=HEAD"]
    done = subprocess.run(
        [*command, "--perf-launches=3", "--perf-rounds=4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == ExitCode.SLOWER, done.stdout + done.stderr
    assert "engine.load: SLOWER" in done.stdout
