"""Packages of compile backend `aotinductor`: whose code and weights they run, when they are compiled, and what is refused."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import relative_error, smallest
from torch import nn

from sd import Optimisations
from sd.errors import ConfigError, Unavailable
from sd.features import has
from sd.kernels import avx2
from sd.optimise import aot
from sd.optimise.aot import AheadOfTime, loaded_code
from sd.optimise.compile import Compiler
from sd.optimise.guards import GuardedOnce
from sd.optimise.presets import parse

CPU = torch.device("cpu")
needs_packages = pytest.mark.skipif(not has("aot"), reason="this torch has no such packages")
AHEAD = {"compile": "default", "compile_backend": "aotinductor"}


class Scaling(nn.Module):
    """x * factor + offset + the sum of others."""

    __module__ = "sd.of_a_test"  # layers of others are refused
    attention = "sdpa"

    def __init__(self, factor: float = 2.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((3,), factor), requires_grad=False)
        self.register_buffer("offset", torch.ones(3), persistent=False)

    def scale(self, x, others):
        return x * self.factor + self.offset + sum(others)

    def both(self, x, others):
        return self.scale(x, others), x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


@pytest.fixture
def compiled(monkeypatch, folder):
    """The names of the packages that were compiled; all tests share the folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    names, compile_one = [], aot._compile

    def counted(flat, inputs, folder, name):
        names.append(name)
        return compile_one(flat, inputs, folder, name)

    monkeypatch.setattr(aot, "_compile", counted)
    return names


X, OTHERS = torch.arange(3.0), (torch.ones(3), torch.ones(3))


@needs_packages
@pytest.mark.slow
@pytest.mark.compile
class TestPackages:
    def test_another_object_loads_what_one_compiled_and_reads_its_own_weights(self, compiled, monkeypatch):
        one = Scaling()
        assert AheadOfTime(one.scale, "choice")(X, OTHERS).tolist() == one.scale(X, OTHERS).tolist()
        compiled.clear()
        monkeypatch.setattr(torch.export, "export", None)
        before = dict(loaded_code)
        other = Scaling(5.0)
        call = AheadOfTime(other.scale, "choice")
        assert call(X, OTHERS).tolist() == [3, 8, 13] and not compiled
        assert loaded_code["graphs"] == before["graphs"] + 1
        assert loaded_code["generated_kernels"] == before["generated_kernels"] + 1

    def test_weights_that_change_in_place_and_those_that_are_replaced(self, compiled):
        net = Scaling()
        call = AheadOfTime(net.scale, "choice")
        call(X, OTHERS)
        net.factor.mul_(10)
        net.offset.zero_()
        assert call(X, OTHERS).tolist() == [2, 22, 42]
        net.factor = nn.Parameter(torch.zeros(3), requires_grad=False)
        assert call(X, OTHERS).tolist() == [2, 2, 2]
        net.offset.data = torch.full((3,), 7.0)
        assert call(X, OTHERS).tolist() == [9, 9, 9]
        replaced = weakref.ref(net.factor)
        net.factor = nn.Parameter(torch.ones(3), requires_grad=False)
        assert replaced() is None  # no second copy is kept until the next call

    def test_a_run_compares_the_weights_once(self, compiled):
        net = Scaling()
        ahead, compared = AheadOfTime(net.scale, "choice"), []
        code = ahead.code
        ahead.code = lambda arguments: compared.append(arguments) or code(arguments)
        guarded = GuardedOnce(net.scale, ahead, net)
        for runs in (1, 2):
            call = guarded.of_run(guarded)
            for value in range(4):
                assert call(torch.full((3,), float(value)), OTHERS).tolist() == [2 * value + 3] * 3
            assert len(compared) == runs
        assert guarded(X, OTHERS).tolist() == net.scale(X, OTHERS).tolist() and len(compared) == 3

    def test_what_is_compiled_anew(self, compiled, monkeypatch):
        net = Scaling()
        AheadOfTime(net.scale, "choice")(X, OTHERS)
        compiled.clear()
        call = AheadOfTime(net.scale, "choice")
        other_kind = X.repeat(2, 1).t(), (X[:1],)  # of shape and strides
        pair = Scaling()
        pair.factor, pair.offset = nn.Parameter(torch.ones(2), requires_grad=False), torch.zeros(2)
        assert torch.equal(AheadOfTime(pair.scale, "choice")(*other_kind), pair.scale(*other_kind))
        assert len(compiled) == 1
        assert AheadOfTime(net.scale, "other choice")(X, OTHERS).tolist() == [3, 5, 7]
        assert len(compiled) == 2
        assert torch.equal(AheadOfTime(net.both, "choice")(X, OTHERS)[1], X)
        assert len(compiled) == 3
        net.attention = "original"
        with torch.inference_mode():
            assert call(X, OTHERS).tolist() == [3, 5, 7]
        assert len(compiled) == 4
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        assert call(X, OTHERS).tolist() == [3, 5, 7]
        assert len(compiled) == 5 == len(set(compiled))

    def test_a_damaged_package_is_compiled_again(self, compiled, folder):
        net = Scaling()
        AheadOfTime(net.scale, "damaged")(X, OTHERS)
        (file,) = folder.glob(f"aotinductor/{compiled[0]}-*.pt2")
        file.write_bytes(b"no package")
        assert AheadOfTime(net.scale, "damaged")(X, OTHERS).tolist() == [3, 5, 7]
        assert len(compiled) == 2 and file.stat().st_size > 1000
        assert not [path for path in file.parent.iterdir() if path.suffix != ".pt2"]

    def test_gradients_are_refused(self, compiled):
        net = Scaling()
        call = AheadOfTime(net.scale, "choice")
        with pytest.raises(NotImplementedError, match="choose compile backend inductor"):
            call(X.clone().requires_grad_(), OTHERS)
        net.factor.requires_grad_()
        with pytest.raises(NotImplementedError, match="no backward pass"):
            call(X, OTHERS)
        with torch.no_grad():
            assert call(X, OTHERS).tolist() == [3, 5, 7]
            with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(NotImplementedError, match="autocast"):
                call(X, OTHERS)


class TestIdentity:
    @pytest.mark.parametrize("change", ["class", "hook", "method", "partial", "weight"])
    def test_layers_of_the_user_are_refused(self, change):
        net = Scaling()
        net.layer = nn.Linear(1, 1)
        aot._require_known_layers(net)
        if change == "class":
            net.layer = type("Layer", (nn.Linear,), {})(1, 1)
        elif change == "hook":
            net.layer.register_forward_hook(lambda *_: None)
        elif change == "weight":
            net.layer.weight = type("Weight", (nn.Parameter,), {})(torch.ones(1, 1))
        else:
            net.layer.forward = (lambda x: x) if change == "method" else functools.partial(lambda x, y: x, 1)
        with pytest.raises(ConfigError, match="of layer changes; choose compile backend inductor"):
            aot._require_known_layers(net)

    def test_changes_after_an_image(self):
        net = Scaling()
        net.layer, net.activation = nn.Linear(1, 1), nn.SiLU()
        ahead = AheadOfTime(net.scale, "choice")
        kinds = ahead.contents.kinds
        net.activation = nn.GELU()
        assert aot._Contents(net).kinds != kinds
        net.layer.register_forward_hook(lambda *_: None)
        with pytest.raises(ConfigError, match="of layer changes"):
            ahead.code((X, OTHERS))

    @needs_packages
    def test_methods_that_this_project_replaces_are_known(self):
        model = smallest(Optimisations(**AHEAD, separate_bias=True, compile_text_encoder="default"))
        for network in (model.unet, model.text_encoder):
            aot._require_known_layers(network)

    def test_what_the_contents_notice(self):
        net = Scaling()
        net.layer, net.absent = nn.Linear(1, 1), None
        net.register_buffer("later", None)

        def notices(change) -> bool:
            contents = aot._Contents(net)
            assert len(contents.weights()) == len(contents.names)
            change()
            return contents.weights() is None

        assert not notices(lambda: net.factor.mul_(2))
        assert notices(lambda: setattr(net, "layer", nn.Linear(1, 1)))
        assert notices(lambda: setattr(net, "later", torch.ones(1)))
        assert notices(lambda: setattr(net, "later", None))
        assert notices(lambda: net.register_parameter("new", nn.Parameter(torch.ones(1))))
        assert notices(lambda: net.layer.register_forward_pre_hook(lambda *_: None))
        assert notices(lambda: net.to(torch.float64))

    def test_the_folder(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        aot.cache_folder.cache_clear()
        try:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
            assert aot._folder() == tmp_path / "mine" / "aotinductor"
            for unset in (
                "",
                f"{tempfile.gettempdir()}/torchinductor_someone",
            ):  # torch's own, set after its first compilation
                monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", unset)
                assert aot._folder() == tmp_path / "sd-perf"
            (tmp_path / "file").write_text("")
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
            with pytest.raises(ConfigError, match=r"TORCHINDUCTOR_CACHE_DIR .*file: cannot be used"):
                aot._folder()
        finally:
            aot.cache_folder.cache_clear()

    @needs_packages
    def test_settings_of_inductor(self, monkeypatch):
        before = aot._settings()
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
        assert aot._settings() == before
        from torch._inductor import config

        assert aot._settings() == before
        for change in ({"cpp.enable_kernel_profile": True}, {"post_grad_custom_pre_pass": lambda graph: None}):
            with config.patch(change):
                assert aot._settings() != before
        monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
        assert aot._settings() != before


class TestChoice:
    @pytest.mark.parametrize(
        "fields",
        [
            {"compile_scope": "blocks"},
            {"compile_scope": "step"},
            {"compile": "max-autotune"},
            {"packed": True, "channels_last": True},
            {"quantisation": "int8"},
            {"precision": "autocast"},
            {"inductor": ("conv_1x1_as_mm",)},
            {"compile": "none"},
        ],
        ids=str,
    )
    def test_what_excludes_it(self, fields):
        with pytest.raises(ConfigError, match="aotinductor"):
            Optimisations(**{**AHEAD, **fields})

    @needs_packages
    @pytest.mark.parametrize(
        "text, backend",
        [
            ("fast", "aotinductor"),
            ("fast,channels_last", "aotinductor"),
            ("fast,compile_autoencoder", "aotinductor"),
            *((f"fast,{name}", "inductor") for name in ("packed", "compile_step", "max-autotune", "freezing", "int8")),
            ("fast,autocast", "inductor"),
        ],
    )
    def test_fast_with_other_techniques(self, monkeypatch, text, backend):
        fast = replace(Optimisations.none(), **AHEAD, avx2_layers=True, avx2_attention=True, channels_last=True)
        monkeypatch.setattr(Optimisations, "fast", classmethod(lambda *_: fast))
        assert parse(text, CPU).compile_backend == backend
        assert parse("fast,whole_norms", CPU).compile_backend == "inductor"  # refused by the device
        assert parse("fast", CPU, {"compile": "none"}).compile_backend == "inductor"

    @pytest.mark.skipif(not has("aot") or not avx2.run_here(), reason="fast is without packages here")
    def test_fast(self, monkeypatch):
        monkeypatch.setattr("sd.optimise.avx2_layers.beat_packed", lambda dtype=torch.float32: True)
        fast = Optimisations.fast("cpu", narrow=True)
        assert (fast.avx2_layers, fast.compile_backend) == (True, "aotinductor")
        monkeypatch.setattr("sd.optimise.optimisations.has", lambda name: name != "aot")
        assert Optimisations.fast("cpu", narrow=True).compile_backend == "inductor"

    @pytest.mark.skipif(has("aot"), reason="this torch has packages")
    def test_an_older_torch_refuses_by_name(self):
        with pytest.raises(Unavailable, match=r"aotinductor needs AOTInductor packages|needs torch\.compile"):
            Compiler("default", "aotinductor").require(CPU)


FIRST_IMAGE = """
import sys
from models import smallest
from sd import Optimisations
from sd.optimise import aot
compiled = dict.fromkeys(("compile", "compile_autoencoder", "compile_text_encoder"), "default")
model = smallest(Optimisations(compile_backend="aotinductor", cache_time_embeddings=True, **compiled))
model.txt2img("a red circle", steps=2)
print(aot.loaded_code["graphs"], "torch._dynamo" in sys.modules)
"""


@needs_packages
@pytest.mark.nightly
@pytest.mark.compile
def test_images_of_a_second_process_need_no_compiler(tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests / "helpers"), str(tests.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def first_image() -> list[str]:
        command = [sys.executable, "-c", FIRST_IMAGE]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert [first_image(), first_image()] == [["3", "True"], ["3", "False"]]
    assert len([*tmp_path.glob("aotinductor/*.pt2")]) == 3


@needs_packages
@pytest.mark.nightly
@pytest.mark.compile
@pytest.mark.parametrize("fields", [{"channels_last": True, "fused_qkv": True}, {"feature_caching": 2}], ids=str)
def test_error_of_an_image(fields):
    caches = dict.fromkeys(("cache_context_kv", "cache_time_embeddings", "shared_guidance"), True)
    others = {"compile_autoencoder": "default", "compile_text_encoder": "default"}
    expected = smallest(Optimisations(feature_caching=fields.get("feature_caching", 1)))
    model = smallest(Optimisations(**{**AHEAD, **others, **caches, **fields}))
    options = {"prompt": "a red circle", "steps": 5, "scale": 4.0}
    before = loaded_code["graphs"]
    ours, theirs = model.txt2img(**options), expected.txt2img(**options)
    assert loaded_code["graphs"] >= before + 3
    assert relative_error(ours.latents, theirs.latents) <= 2e-5
    assert (ours.images.int() - theirs.images.int()).abs().max() <= 1
