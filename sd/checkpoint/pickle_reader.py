"""The pickles of torch files, read without running them: a small machine that knows the opcodes and calls nothing.

A pickle is a program whose opcodes name Python objects and call them; `pickle.Unpickler`, however restricted, still
calls and still sets attributes. Here no name is ever imported: a name is a `Global`, a piece of text, and "calling" one
is a lookup in CALLS, whose few functions build dicts, tuples and descriptions of tensors. Names of libraries whose
objects real checkpoints carry along (callbacks, hyper-parameters, numbers) become `Inert`; every other name is refused.
The result is the same on every torch, of which torch.load(weights_only=True) is only in the newer ones.

Opcodes: the documentation of CPython's pickletools. Files: torch/serialization.py.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass

import torch

from sd.errors import CheckpointError

# Real files stay below 2 MB; without a limit a file could be all index and no weights.
MAX_PICKLE_BYTES = 256 << 20

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPE_NAMES = tuple(str(dtype).partition(".")[2] for dtype in STORAGE_DTYPES.values())

# Packages whose objects training frameworks leave in checkpoints. Nothing of theirs is imported or run.
INERT_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "numpy", "torchmetrics")
_INERT_BUILTINS = (
    "bool bytearray bytes complex dict float frozenset int list long object range set slice str tuple unicode"
)
INERT_NAMES = {
    ("argparse", "Namespace"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("copy_reg", "_reconstructor"),
    ("copyreg", "_reconstructor"),
    ("_codecs", "encode"),
    ("datetime", "datetime"),
    ("datetime", "timedelta"),
    ("typing", "Any"),
    ("torch", "device"),
    *(("torch", name) for name in DTYPE_NAMES),
    # Python 3.13 writes the second name.
    *((m, name) for m in ("pathlib", "pathlib._local") for name in "Path PosixPath PurePosixPath WindowsPath".split()),
    *((module, name) for module in ("builtins", "__builtin__") for name in _INERT_BUILTINS.split()),
}


@dataclass(frozen=True)
class Global:
    """A name that the file mentions; text, never an object."""

    module: str
    name: str

    def __str__(self):
        return f"{self.module}.{self.name}"


class Inert:
    """What a harmless call would have made; it takes every state and keeps none."""

    def __init__(self, made_by: Global):
        self.made_by = made_by


@dataclass(frozen=True)
class Storage:
    """A storage that the file holds elsewhere, under `key`."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage; offset, size and stride in elements, checked to lie inside it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Mark:
    pass


_MARK = _Mark()


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"its pickle is damaged ({what})")


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _ordered_dict(args):
    result = {}
    if args:
        if len(args) != 1 or type(args[0]) is not list:
            raise _damaged("an OrderedDict of something else than pairs")
        for pair in args[0]:
            if type(pair) not in (tuple, list) or len(pair) != 2:
                raise _damaged("an OrderedDict of something else than pairs")
            result[_key(pair[0])] = pair[1]
    return result


def _tensor(args):
    if not 4 <= len(args) <= 7:
        raise _damaged("a tensor with a wrong number of arguments")
    storage, offset, size, stride = args[:4]
    if type(storage) is not Storage or type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise _damaged("a tensor without a storage, size and stride")
    if len(size) > 32 or not _is_count(offset) or not all(_is_count(number) for number in (*size, *stride)):
        raise _damaged("a tensor of an impossible size")
    elements, last = 1, offset
    for length, step in zip(size, stride):
        elements *= length
        last += (length - 1) * step
    # A view may not repeat elements either: a stride of 0 would let a small file ask for any amount of memory.
    if elements and (last >= storage.numel or elements > storage.numel):
        raise _damaged("a tensor that reaches outside its storage")
    return PickledTensor(storage, offset, size, stride)


def _parameter(args):
    if not args or type(args[0]) is not PickledTensor:
        raise _damaged("a parameter that is not a tensor")
    return args[0]


def _from_type(args):  # a tensor or parameter with attributes of its own: (function, class, arguments, state)
    if len(args) != 4 or type(args[0]) is not Global or type(args[2]) is not tuple:
        raise _damaged("a tensor subclass without its function and arguments")
    return _call(args[0], args[2], nested=True)


def _size(args):
    if len(args) != 1 or type(args[0]) not in (tuple, list):
        raise _damaged("a torch.Size of something else than numbers")
    return tuple(args[0])


CALLS = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _size,
}
# Names that stand for themselves: the classes of storages in persistent ids, torch.Tensor in _rebuild_from_type_v2.
QUIET_NAMES = {
    *((module, name) for name in STORAGE_DTYPES for module in ("torch", "torch.cuda")),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}


def _inert(module: str, name: str) -> bool:
    # A dotted name would reach through a module to what it imported (protocol 4), so it is no class of its package.
    return (module, name) in INERT_NAMES or (module.split(".")[0] in INERT_PACKAGES and name.isidentifier())


def _global(module, name) -> Global:
    if type(module) is not str or type(name) is not str:
        raise _damaged("a name that is no text")
    if (module, name) in CALLS or (module, name) in QUIET_NAMES or _inert(module, name):
        return Global(module, name)
    raise CheckpointError(
        f"it asks to import {f'{module}.{name}'[:200]!r}, which no checkpoint needs, and was not loaded: "
        f"do not trust it; take the weights as .safetensors from their author"
    )


def _call(function, args, nested: bool = False):
    if type(function) is not Global or type(args) is not tuple:
        raise _damaged("a call of something that is no function")
    handler = CALLS.get((function.module, function.name))
    if handler is not None and not (nested and handler is _from_type):  # no recursion as deep as the file likes
        return handler(args)
    if _inert(function.module, function.name):
        return Inert(function)
    raise _damaged(f"a call of {function}")


_PLAIN_KEYS = (str, int, float, bool, bytes, type(None), Global, Inert)


def _key(value):
    # Only what hashes without recursion: hashing tuples nested a million deep would overflow the C stack.
    if type(value) in _PLAIN_KEYS or (type(value) is tuple and all(type(item) in _PLAIN_KEYS for item in value)):
        return value
    raise _damaged("a dict with a key that is no text or number")


def _persistent(pid) -> Storage:
    if (
        type(pid) is not tuple
        or len(pid) not in (5, 6)
        or pid[0] != "storage"
        or (len(pid) == 6 and pid[5] is not None)
    ):
        raise _damaged("a reference that is no storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    if type(kind) is not Global or kind.name not in STORAGE_DTYPES or type(key) is not str or not _is_count(numel):
        raise _damaged("a storage without type, key and length")
    return Storage(STORAGE_DTYPES[kind.name], key, numel)


def _build(target, state) -> None:
    # The attributes of dicts (`_metadata` of a state dict) and of inert objects do not matter here.
    if type(target) not in (dict, Inert, PickledTensor):
        raise _damaged("attributes for something that has none")


def _append(target, items) -> None:
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Inert:
        raise _damaged("items for something that is no list")


def _set_items(target, items) -> None:
    if len(items) % 2:
        raise _damaged("a key without a value")
    if type(target) is dict:
        for key, value in zip(items[::2], items[1::2]):
            target[_key(key)] = value
    elif type(target) is not Inert:
        raise _damaged("keys for something that is no dict")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = set(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    """Stack and memo of one pickle."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def pop(self):
        value = self.stack.pop()
        if value is _MARK:
            raise _damaged("a mark in the place of a value")
        return value

    def top(self):
        if self.stack[-1] is _MARK:
            raise _damaged("a mark in the place of a value")
        return self.stack[-1]

    def pop_to_mark(self) -> list:
        items = []
        while self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    def pop_some(self, count: int) -> tuple:
        return tuple(self.pop() for _ in range(count))[::-1]

    def step(self, name: str, arg) -> None:
        """Do one opcode. Raises CheckpointError for what is refused, LookupError where the stack or memo is short."""
        stack = self.stack
        if name in _LITERALS:
            # LONG4 may hold millions of digits, and nothing here is larger than a byte count.
            if type(arg) is int and arg.bit_length() > 256:
                raise _damaged("a number of an impossible size")
            stack.append(arg)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(arg)] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self.memo[int(arg)])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(self.pop_some(_TUPLES[name]))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "LIST":
            stack.append(self.pop_to_mark())
        elif name == "DICT":
            items, target = self.pop_to_mark(), {}
            _set_items(target, items)
            stack.append(target)
        elif name == "APPEND":
            value = self.pop()
            _append(self.top(), [value])
        elif name == "APPENDS":
            items = self.pop_to_mark()
            _append(self.top(), items)
        elif name == "SETITEM":
            items = self.pop_some(2)
            _set_items(self.top(), items)
        elif name == "SETITEMS":
            items = self.pop_to_mark()
            _set_items(self.top(), items)
        elif name in ("EMPTY_SET", "FROZENSET"):
            if name == "FROZENSET":
                self.pop_to_mark()
            stack.append(Inert(Global("builtins", "set")))
        elif name == "ADDITEMS":
            self.pop_to_mark()
            if type(self.top()) is not Inert:
                raise _damaged("items for something that is no set")
        elif name == "GLOBAL":
            stack.append(_global(*arg.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_global(*self.pop_some(2)))
        elif name == "INST":
            args = tuple(self.pop_to_mark())
            stack.append(_call(_global(*arg.split(" ", 1)), args))
        elif name == "OBJ":
            function, *args = self.pop_to_mark()
            stack.append(_call(function, tuple(args)))
        elif name in ("REDUCE", "NEWOBJ"):
            function, args = self.pop_some(2)
            stack.append(_call(function, args))
        elif name == "NEWOBJ_EX":
            function, args, _ = self.pop_some(3)
            stack.append(_call(function, args))
        elif name == "BUILD":
            state = self.pop()
            _build(self.top(), state)
        elif name == "BINPERSID":
            stack.append(_persistent(self.pop()))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            stack.append(self.top())
        elif name not in ("PROTO", "FRAME"):
            # EXT1..4 look names up in a registry of the process, PERSID and buffers are not used by torch.
            raise CheckpointError(
                f"its pickle uses {name}, which no checkpoint needs, and was not loaded: do not trust it"
            )


def unpickle(data):
    """Read one pickle from `data`, bytes or a file that stands at its beginning and is left at its end.

    Returns dicts, lists, tuples, numbers, text, Inert, Global, Storage and PickledTensor; runs and imports nothing.
    Raises CheckpointError, without a file name, where the pickle is damaged or asks for what no checkpoint needs.
    """
    machine = _Machine()
    try:
        for opcode, arg, position in pickletools.genops(data):
            if position > MAX_PICKLE_BYTES:
                raise _damaged("an index of more than 256 MB")
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, arg)
    except CheckpointError:
        raise
    except (LookupError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise _damaged(f"{type(error).__name__}: {str(error)[:100]}") from None
    raise _damaged("no end")
