"""Pickles are never executed: contents of real files load, malicious names and calls are rejected by name."""

from __future__ import annotations

import builtins
import collections
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import Calls, same, stack_global, torch_file_calling, write_pickle

from sd.checkpoint.load import read
from sd.checkpoint.pickle_reader import Inert, PickledTensor, unpickle
from sd.errors import CheckpointError


def rejected(path) -> str:
    with pytest.raises(CheckpointError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, f"{os.system.__module__}.system"),
        (subprocess.Popen, ".Popen"),
        (builtins.eval, "builtin"),
        (builtins.exec, "builtin"),
        (builtins.getattr, "builtin"),
        (builtins.open, "open"),
        (builtins.__import__, "__import__"),
        (torch.load, "torch.serialization.load"),
        (pickle.loads, "pickle"),
        (pathlib.Path.unlink, ""),
    ],
)
def test_malicious_call_is_rejected_by_name(tmp_path, function, name, protocol):
    path, created = tmp_path / "model.ckpt", tmp_path / "created"
    try:
        torch_file_calling(path, function, f"touch {created}", protocol=protocol)
    except (pickle.PicklingError, AttributeError, TypeError):
        pytest.skip("Python cannot pickle this call")
    message = rejected(path)
    assert name in message and "do not trust it" in message
    assert not created.exists()


def test_pickle_cannot_create_a_file(tmp_path):
    created = tmp_path / "created"
    data = pickle.dumps({"state_dict": Calls(os.system, f"touch {created}")})
    pickle.loads(data)
    assert created.exists(), "the attack itself must work"
    created.unlink()
    write_pickle(tmp_path / "a.ckpt", data)
    assert "system" in rejected(tmp_path / "a.ckpt")
    assert not created.exists()


def test_legacy_file_cannot_create_a_directory(tmp_path):
    created, path = tmp_path / "created", tmp_path / "a.pt"
    torch.save({"x": Calls(os.mkdir, str(created))}, path, _use_new_zipfile_serialization=False)
    assert "mkdir" in rejected(path)
    assert not created.exists()


def test_state_never_reaches_a_function_or_class(tmp_path):
    # BUILD sets attributes; on an imported function it would change the defaults for the whole process.
    for target in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cpytorch_lightning\nX\n"):
        write_pickle(tmp_path / "a.ckpt", b"\x80\x02" + target + b"}(X\x0c\x00\x00\x00__defaults__)ub.")
        assert "damaged" in rejected(tmp_path / "a.ckpt")
    assert torch._utils._rebuild_tensor_v2.__defaults__ != ()


class Stateful:
    """Creates a file when its state is set."""

    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        pathlib.Path(state["path"]).touch()


def test_setstate_is_not_called(tmp_path):
    created = tmp_path / "created"
    write_pickle(tmp_path / "a.ckpt", pickle.dumps({"x": Stateful(str(created))}))
    assert "Stateful" in rejected(tmp_path / "a.ckpt")
    assert not created.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("collections", "OrderedDict.__init__"),
        ("collections", "_sys.modules"),
        ("pytorch_lightning.callbacks", "os.system"),
        ("numpy", "__builtins__.eval"),
        ("torch", "serialization.os.system"),
        ("torch.hub", "load"),
        ("torch.nn.modules.module", "Module"),
        ("numpyx", "ndarray"),
        ("", ""),
    ],
)
def test_dotted_and_lookalike_names_are_rejected(tmp_path, module, name):
    write_pickle(tmp_path / "a.ckpt", stack_global(module, name) + b").")
    assert f"{module}.{name}" in rejected(tmp_path / "a.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x82\x01.",  # EXT1: a name from a registry of the process
        b"\x80\x02Pos.system\n.",  # PERSID
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id other than a storage
        b"\x80\x02)R.",  # a call of a tuple
        b"\x80\x02}}]s.",  # a list as a key
        b"\x80\x02.",
        b"\x80\x02(.",
        b"",
        b"\x80\x02}",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 8 EB
        b"\x80\x05\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 8 EB
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a frame of 8 EB
        b"\x80\x02\x8b\x00\x00\x01\x00" + b"\x7f" * 65536 + b".",  # a number of 157,000 digits
        b"L" + b"9" * 100_000 + b"L\n.",
        b"\x80\x02" + b"\x85" * 10 + b".",
        b"\x80\x02)" + b"\x85" * 200_000 + b"}" + b"h\x00.",
        b"\x80\x02)" + b"\x85" * 200_000 + b"K\x00s.",
        b"\x80\x02})" + b"\x85" * 200_000 + b"K\x00s.",  # hashing that would overflow the C stack
        b"\x80\x02cos\nsystem\n.",
        b"(S'touch x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch x'\no.",  # OBJ
    ],
)
def test_malformed_pickles_are_rejected(tmp_path, data):
    write_pickle(tmp_path / "a.ckpt", data)
    rejected(tmp_path / "a.ckpt")


@pytest.mark.parametrize("times", [1, 2])
def test_a_list_is_copied_once(tmp_path, times):
    """Copied each time that it is named, a list would let a small file fill the memory."""
    pair = b"(X\x01\x00\x00\x00aK\x01t"
    ordered = b"ccollections\nOrderedDict\n(h\x01tR"
    write_pickle(tmp_path / "a.ckpt", b"\x80\x02](" + pair + b"eq\x01" + ordered * times + b".")
    message = rejected(tmp_path / "a.ckpt")  # once: no tensor is in it
    assert ("an OrderedDict of something other than pairs" in message) is (times == 2)


def test_a_size_of_many_dimensions_is_rejected(tmp_path):
    write_pickle(tmp_path / "a.ckpt", b"\x80\x02ctorch\nSize\n((" + b"K\x01" * 33 + b"ttR.")
    assert "a few numbers" in rejected(tmp_path / "a.ckpt")


def tensor_pickle(offset, size, stride, numel=6) -> bytes:
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + _int(numel) + b"tQ"
    )
    numbers = b"".join(b"(" + b"".join(map(_int, values)) + b"t" for values in (size, stride))
    return (
        b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + _int(offset)
        + numbers
        + b"\x89ccollections\nOrderedDict\n)RtRs."
    )


def _int(value: int) -> bytes:
    return b"I%d\n" % value


@pytest.mark.parametrize(
    ("offset", "size", "stride", "numel"),
    [
        (0, (7,), (1,), 6),
        (1, (6,), (1,), 6),
        (0, (2, 3), (4, 1), 6),
        (0, (10**12,), (0,), 6),  # repeats one element: 4 TB out of 24 bytes
        (0, (2, 3), (3,), 6),
        (-1, (3,), (1,), 6),
        (0, (-3,), (1,), 6),
        (0, (3,), (-1,), 6),
        (0, (10**30,), (1,), 6),
        (0, (1,) * 100, (1,) * 100, 6),
        (0, (6,), (1,), 10**12),
        (0, (6,), (1,), -6),
    ],
)
def test_tensors_outside_their_storage_are_rejected(tmp_path, offset, size, stride, numel):
    path = tmp_path / "a.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(offset, size, stride, numel))
        archive.writestr("archive/data/0", bytes(24))
    rejected(path)


def test_tensor_inside_its_storage_is_read():
    value = unpickle(tensor_pickle(1, (2, 2), (2, 1)))["x"]
    assert type(value) is PickledTensor and value.size == (2, 2) and value.stride == (2, 1) and value.offset == 1


def lightning():
    """A substitute for pytorch_lightning, importable only while the file is written."""
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    modules = {name: types.ModuleType(name) for name in names}

    class ModelCheckpoint:
        def __init__(self):
            self.monitor = "val/loss_simple_ema"

        def __setstate__(self, state):
            raise AssertionError("run")

    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = names[-1], "ModelCheckpoint"
    modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    return modules, ModelCheckpoint


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoint_loads_without_lightning(tmp_path, monkeypatch, zipped):
    modules, ModelCheckpoint = lightning()
    state = collections.OrderedDict(a=torch.randn(2, 3), b=torch.nn.Parameter(torch.randn(4)), c=torch.arange(5))
    state._metadata = {"": {"version": 1}}
    checkpoint = {
        "epoch": 3,
        "global_step": 470000,
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            ModelCheckpoint: {"monitor": "loss", "best_model_score": np.float64(0.25), "current": ModelCheckpoint()},
            "EarlyStopping": {"wait": np.int64(3), "kinds": {1, 2}, "frozen": frozenset("a"), "array": np.zeros(3)},
        },
        "hparams": {"path": pathlib.PurePosixPath("a/b"), "dtype": torch.float16, "device": torch.device("cpu")},
        "counts": collections.defaultdict(int, a=1),
        "state_dict": state,
    }
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        torch.save(checkpoint, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert "pytorch_lightning" not in sys.modules
    loaded = read(tmp_path / "a.ckpt")
    assert same(loaded, {name: tensor.detach() for name, tensor in state.items()})
    assert not loaded["b"].requires_grad and "pytorch_lightning" not in sys.modules


def test_inert_objects_are_not_callable():
    value = unpickle(pickle.dumps({"n": np.float32(1.5)}))["n"]
    assert type(value) is Inert and not callable(value)


def test_nothing_is_imported(tmp_path):
    before = set(sys.modules)
    data = stack_global("lightning.that.is.not.there", "Thing") + b")R\x8c\x01xs."
    with pytest.raises(CheckpointError):
        unpickle(data)
    assert set(sys.modules) == before
