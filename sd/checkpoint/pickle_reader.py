"""Read the pickles of torch files without executing them.

A pickle is a program whose opcodes import Python objects and call them; `pickle.Unpickler`, even when restricted, still
calls and still sets attributes. This reader interprets the opcodes itself and imports nothing: a name becomes a `Global`,
which is text, and a call is a lookup in CALLS, whose few functions build dicts, tuples and descriptions of tensors. Names
of libraries whose objects real checkpoints contain (callbacks, hyper-parameters, numbers) become `Inert`; every other name
is rejected. The result is the same on every torch version; torch.load(weights_only=True) exists only in the newer ones.

Opcodes: CPython's pickletools. File structure: torch/serialization.py.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

from sd.errors import CheckpointError

# Real files stay below 2 MiB; without a limit a file could consist of an index alone.
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
# dtypes of newer torch versions, whose tensors are pickled without a storage class of their own.
NEW_DTYPE_NAMES = (
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 uint16 uint32 uint64"
).split()

# Packages whose objects training frameworks leave in checkpoints. They are neither imported nor executed.
INERT_PACKAGES = (
    "pytorch_lightning lightning lightning_fabric omegaconf numpy torchmetrics diffusers transformers ldm sgm"
).split()
# Names of tensors that are refused, and what these are; and packages of quantised ones.
_OTHER_TENSORS = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without its data",
    **{f"{name}Storage": "a quantised tensor" for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
    **{f"Complex{name}Storage": "complex numbers" for name in ("Float", "Double")},
}
_QUANTISERS = ("torchao", "bitsandbytes", "optimum", "quanto", "hqq", "auto_gptq", "gptqmodel")
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
    *(("torch", name) for name in (*DTYPE_NAMES, *NEW_DTYPE_NAMES)),
    # Containers of the embeddings that textual inversion trains.
    *(("torch.nn.modules.container", name) for name in ("ParameterDict", "ParameterList")),
    # Python 3.13 writes the second name.
    *((m, name) for m in ("pathlib", "pathlib._local") for name in "Path PosixPath PurePosixPath WindowsPath".split()),
    *((module, name) for module in ("builtins", "__builtin__") for name in _INERT_BUILTINS.split()),
}


@dataclass(frozen=True)
class Global:
    """A name in the pickle; text, never an object."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """Placeholder for the result of a harmless call; it discards every state."""


@dataclass(frozen=True)
class Storage:
    """A storage that the file holds elsewhere, under `key`; `numel` in elements."""

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


_MARK, _USED = object(), object()
MOST_DIMENSIONS = 32


def _damaged(fault: str) -> CheckpointError:
    return CheckpointError(f"its pickle is damaged ({fault})")


def _check(condition: bool, fault: str) -> None:
    if not condition:
        raise _damaged(fault)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    fault = "an OrderedDict of something other than pairs"
    _check(not args or (len(args) == 1 and type(args[0]) is list), fault)
    pairs = args[0][:] if args else []
    if args:  # each list makes one, or a small file that names a long list many times could fill the memory
        args[0][:] = [_USED]
    result = {}
    for pair in pairs:
        _check(type(pair) in (tuple, list) and len(pair) == 2, fault)
        result[_key(pair[0])] = pair[1]
    return result


def _tensor(args: tuple[Any, ...]) -> PickledTensor:
    _check(4 <= len(args) <= 7, "a tensor with a wrong number of arguments")
    storage, offset, size, stride = args[:4]
    typed = type(storage) is Storage and type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    _check(typed, "a tensor without a storage, size and stride")
    counts = (
        len(size) <= MOST_DIMENSIONS and _is_count(offset) and all(_is_count(number) for number in (*size, *stride))
    )
    _check(counts, "a tensor of an impossible size")
    elements, last = 1, offset
    for length, step in zip(size, stride):
        elements *= length
        last += (length - 1) * step
    # A view must not repeat elements either: a stride of 0 would let a small file allocate any amount of memory.
    inside = not elements or (last < storage.numel and elements <= storage.numel)
    _check(inside, "a tensor that reaches outside its storage")
    return PickledTensor(storage, offset, size, stride)


def _tensor_of_new_dtype(args: tuple[Any, ...]) -> PickledTensor:
    dtype = args[6] if len(args) > 6 else None
    _check(type(dtype) is Global, "a tensor without a dtype")
    raise CheckpointError(f"stores a tensor as {dtype}: use the model in fp32, fp16 or bf16")


def _parameter(args: tuple[Any, ...]) -> PickledTensor:
    _check(bool(args) and type(args[0]) is PickledTensor, "a parameter that is not a tensor")
    tensor: PickledTensor = args[0]
    return tensor


def _from_type(args: tuple[Any, ...]) -> Any:
    """A tensor or parameter with attributes; args: (function, class, arguments, state)."""
    typed = len(args) == 4 and type(args[0]) is Global and type(args[2]) is tuple
    _check(typed, "a tensor subclass without its function and arguments")
    return _call(args[0], args[2], nested=True)


def _size(args: tuple[Any, ...]) -> tuple[Any, ...]:
    sizes = len(args) == 1 and type(args[0]) in (tuple, list) and len(args[0]) <= MOST_DIMENSIONS
    _check(sizes, "a torch.Size of something other than a few numbers")
    return tuple(args[0])


CALLS: dict[tuple[str, str], Callable[[tuple[Any, ...]], Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_new_dtype,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _size,
}
# Names that may be mentioned but not called: storage classes in persistent ids, torch.Tensor in _rebuild_from_type_v2.
UNCALLED_NAMES = {
    *((module, name) for name in STORAGE_DTYPES for module in ("torch", "torch.cuda")),
    ("torch.storage", "UntypedStorage"),
    ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
}


def _is_inert(module: str, name: str) -> bool:
    # A dotted name (protocol 4) could reach through a module to the modules that it imports.
    return (module, name) in INERT_NAMES or (module.split(".")[0] in INERT_PACKAGES and name.isidentifier())


def _global(module: Any, name: Any) -> Global:
    _check(type(module) is str and type(name) is str, "a name that is not text")
    if (module, name) in CALLS or (module, name) in UNCALLED_NAMES or _is_inert(module, name):
        return Global(module, name)
    quantised = "quantised weights" if module.split(".")[0] in _QUANTISERS else None
    if contents := _OTHER_TENSORS.get(name) if module in ("torch", "torch._utils") else quantised:
        raise CheckpointError(f"contains {contents} ({f'{module}.{name}'[:200]}): use the model in fp32, fp16 or bf16")
    if module.startswith("torch.nn.modules."):
        raise CheckpointError(
            f"contains {f'{module}.{name}'[:200]!r}, a pickled module instead of weights, and it was not loaded: "
            f"save module.state_dict(), or get the weights as .safetensors from their author"
        )
    raise CheckpointError(
        f"its pickle imports {f'{module}.{name}'[:200]!r}, which no checkpoint needs, and it was not loaded: "
        f"do not trust it; get the weights as .safetensors from their author"
    )


def _call(function: Any, args: Any, nested: bool = False) -> Any:
    _check(type(function) is Global and type(args) is tuple, "a call of something that is not a function")
    handler = CALLS.get((function.module, function.name))
    if handler is not None and not (nested and handler is _from_type):  # the file must not choose a recursion depth
        return handler(args)
    _check(_is_inert(function.module, function.name), f"a call of {function}")
    return Inert()


_PLAIN_KEYS = (str, int, float, bool, bytes, type(None), Global, Inert)


def _key(value: Any) -> Any:
    # Only types that hash without recursion: hashing tuples nested a million deep would overflow the C stack.
    plain = type(value) in _PLAIN_KEYS or (type(value) is tuple and all(type(item) in _PLAIN_KEYS for item in value))
    _check(plain, "a dict with a key that is not text or a number")
    return value


def _persistent(pid: Any) -> Storage:
    well_formed = type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage" and pid[5:] in ((), (None,))
    _check(well_formed, "a reference that is not a storage")
    storage_class, key, numel = pid[1], pid[2], pid[4]
    dtypes = {**STORAGE_DTYPES, "UntypedStorage": torch.uint8}
    known = type(storage_class) is Global and storage_class.name in dtypes
    _check(known and type(key) is str and _is_count(numel), "a storage without type, key and length")
    return Storage(dtypes[storage_class.name], key, numel)


class _Machine:
    """Stack and memo of one pickle. Too short a stack or memo raises LookupError."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def top(self) -> Any:
        _check(self.stack[-1] is not _MARK, "a mark in place of a value")
        return self.stack[-1]

    def pop(self) -> Any:
        value = self.top()
        self.stack.pop()
        return value

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        self.stack.pop()
        return items[::-1]

    def pop_many(self, count: int) -> tuple[Any, ...]:
        return tuple(self.pop() for _ in range(count))[::-1]

    def pop_call(self) -> Any:
        function, *args = self.pop_to_mark()
        return _call(function, tuple(args))

    def pop_set(self) -> Inert:
        self.pop_to_mark()
        return Inert()

    def store(self, key: int) -> None:
        self.memo[key] = self.top()


def _extend(items: list[Any], target: Any) -> None:
    _check(type(target) in (list, Inert), "items for something that is not a list")
    if type(target) is list:
        target.extend(items)


def _add(items: list[Any], target: Any) -> None:
    _check(type(target) is Inert, "items for something that is not a set")


def _set_items(items: list[Any] | tuple[Any, ...], target: Any) -> Any:
    _check(len(items) % 2 == 0, "a key without a value")
    _check(type(target) in (dict, Inert), "keys for something that is not a dict")
    if type(target) is dict:
        target.update((_key(key), value) for key, value in zip(items[::2], items[1::2]))
    return target


def _build(state: Any, target: Any) -> None:
    # The attributes of dicts (`_metadata` of a state dict), inert objects and tensors are not needed.
    _check(type(target) in (dict, Inert, PickledTensor), "attributes for something that has none")


def _literal(machine: _Machine, arg: Any) -> Any:
    # LONG4 may hold millions of digits, and no number in a checkpoint is larger than a byte count.
    _check(type(arg) is not int or arg.bit_length() <= 256, "a number of an impossible size")
    return arg


_LITERALS = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
).split()
# Opcodes that push the value which the function returns for (machine, argument of the opcode).
_PUSHES: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(_LITERALS, _literal),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda m, arg: m.memo[int(arg)]),
    "MARK": lambda m, _: _MARK,
    "DUP": lambda m, _: m.top(),
    "NONE": lambda m, _: None,
    "NEWTRUE": lambda m, _: True,
    "NEWFALSE": lambda m, _: False,
    "EMPTY_LIST": lambda m, _: [],
    "EMPTY_DICT": lambda m, _: {},
    "EMPTY_TUPLE": lambda m, _: (),
    "EMPTY_SET": lambda m, _: Inert(),
    "TUPLE1": lambda m, _: m.pop_many(1),
    "TUPLE2": lambda m, _: m.pop_many(2),
    "TUPLE3": lambda m, _: m.pop_many(3),
    "TUPLE": lambda m, _: tuple(m.pop_to_mark()),
    "LIST": lambda m, _: m.pop_to_mark(),
    "FROZENSET": lambda m, _: m.pop_set(),
    "DICT": lambda m, _: _set_items(m.pop_to_mark(), {}),
    "GLOBAL": lambda m, arg: _global(*arg.split(" ", 1)),
    "STACK_GLOBAL": lambda m, _: _global(*m.pop_many(2)),
    "INST": lambda m, arg: _call(_global(*arg.split(" ", 1)), tuple(m.pop_to_mark())),
    "OBJ": lambda m, _: m.pop_call(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: _call(*m.pop_many(2))),
    "NEWOBJ_EX": lambda m, _: _call(*m.pop_many(3)[:2]),
    "BINPERSID": lambda m, _: _persistent(m.pop()),
}
# Opcodes that change the machine and push nothing.
_CHANGES: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), lambda m, arg: m.store(int(arg))),
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    "MEMOIZE": lambda m, _: m.store(len(m.memo)),
    "APPEND": lambda m, _: _extend([m.pop()], m.top()),
    "APPENDS": lambda m, _: _extend(m.pop_to_mark(), m.top()),
    "SETITEM": lambda m, _: _set_items(m.pop_many(2), m.top()),
    "SETITEMS": lambda m, _: _set_items(m.pop_to_mark(), m.top()),
    "ADDITEMS": lambda m, _: _add(m.pop_to_mark(), m.top()),
    "BUILD": lambda m, _: _build(m.pop(), m.top()),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.pop_to_mark(),
}


def unpickle(data: bytes | IO[bytes]) -> Any:
    """Read one pickle from bytes, or from a file at its current position, which moves to the end of the pickle.

    Returns dicts, lists, tuples, numbers, text, Inert, Global, Storage and PickledTensor; executes and imports nothing.
    Raises CheckpointError, without a file name, if the pickle is damaged or uses a name or opcode no checkpoint needs.
    """
    machine = _Machine()
    try:
        for opcode, arg, position in pickletools.genops(data):
            _check((position or 0) <= MAX_PICKLE_BYTES, "an index of more than 256 MiB")
            if opcode.name == "STOP":
                return machine.pop()
            if opcode.name in _PUSHES:
                machine.stack.append(_PUSHES[opcode.name](machine, arg))
            elif opcode.name in _CHANGES:
                _CHANGES[opcode.name](machine, arg)
            else:
                # EXT1 to EXT4 look names up in a registry of the process; torch uses neither PERSID nor buffers.
                raise CheckpointError(
                    f"its pickle uses {opcode.name}, which no checkpoint needs, and it was not loaded: do not trust it"
                )
    except CheckpointError:
        raise
    except (LookupError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise _damaged(f"{type(error).__name__}: {str(error)[:100]}") from None
    raise _damaged("no end")
