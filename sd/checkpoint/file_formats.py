"""Files that hold tensors: which kind a file is, where its tensors lie, and reading them into memory once.

Three kinds are read: .safetensors, torch's zip files and torch's files from before 1.6. Each gives an index of
`TensorAt` first, all of it checked against the size of the file, so that a caller reads only what it needs and a
damaged file is refused before memory is spent. Bytes go straight from the file into the tensor that is returned.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sd.checkpoint.pickle_reader import MAX_PICKLE_BYTES, PickledTensor, unpickle
from sd.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
FOREIGN = {  # how other files begin, and what to do with them
    b"version https://git-lfs": "is a git-lfs pointer, not the file itself: run `git lfs pull` where it came from",
    b"GGUF": "is a GGUF file: take the original .safetensors of the model",
    b"\x89HDF": "is an HDF5 file: take the .safetensors of the model",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"<": "is a web page, perhaps a login or error page saved in the place of the download: download it again",
    b"\x80": "is a pickle but no torch file: take the model as .safetensors",
}
TORCHSCRIPT = "is a TorchScript archive, a program and not weights: take the model as .safetensors or .ckpt"


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class TensorAt:
    """Where a tensor lies: a storage of `nbytes` at byte `start` of the file, and the view of it, in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """The index of one file: tensors by name, the step count of the training, and the names of what else is in it."""

    path: Path
    tensors: dict[str, TensorAt]
    global_step: int | None = None
    others: tuple[str, ...] = ()


def index(path) -> Contents:
    """The tensors of a file, by its first bytes and not its extension.

    Raises CheckpointError, naming the file and the way out, where it is missing, empty, damaged, or no checkpoint.
    """
    path = Path(path)
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(64)
            if size == 0:
                raise CheckpointError("is empty: download it again")
            if head.startswith(b"PK"):
                return _index_zip(path, file, size)
            if head.startswith(LEGACY_MAGIC):
                return _index_legacy(path, file, size)
            if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES:
                return _index_safetensors(path, file, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; give the path of a .safetensors or .ckpt file, or a diffusers folder"
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    for start, what in FOREIGN.items():
        if head.lstrip().startswith(start):
            raise CheckpointError(f"{path}: {what}")
    raise CheckpointError(
        f"{path}: is neither a .safetensors nor a torch file; give one of these, or a diffusers folder"
    )


def _truncated() -> CheckpointError:
    return CheckpointError("is damaged or was not downloaded to its end: download it again")


def _index_safetensors(path: Path, file, size: int) -> Contents:
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if 8 + length > size:
        raise _truncated()
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError):
        raise _truncated() from None
    if type(header) is not dict:
        raise _truncated()
    metadata = header.pop("__metadata__", None) or {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise _truncated()
    tensors = {}
    for name, entry in header.items():
        if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise _truncated()
        shape, offsets = entry["shape"], entry["data_offsets"]
        if type(shape) is not list or type(offsets) is not list or len(offsets) != 2 or len(shape) > 32:
            raise _truncated()
        if not all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, *offsets)):
            raise _truncated()
        dtype = SAFETENSORS_DTYPES.get(str(entry["dtype"]))
        if dtype is None:
            raise CheckpointError(f"holds {name!r} as {str(entry['dtype'])[:20]}: take the model in fp32, fp16 or bf16")
        begin, end = offsets
        if end - begin != math.prod(shape) * itemsize(dtype) or 8 + length + end > size:
            raise _truncated()
        tensors[name] = TensorAt(dtype, tuple(shape), _contiguous(shape), 0, 8 + length + begin, end - begin)
    step = metadata.get("global_step", "")
    step = int(step) if step.isascii() and step.isdigit() and len(step) < 16 else None
    others = tuple(f"__metadata__.{name}" for name in metadata if name not in ("global_step", "format"))
    return _checked(Contents(path, tensors, step, others), size)


def _contiguous(shape) -> tuple[int, ...]:
    stride, step = [], 1
    for length in reversed(shape):
        stride.append(step)
        step *= max(length, 1)
    return tuple(reversed(stride))


def _index_zip(path: Path, file, size: int) -> Contents:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            indices = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = indices[0][: -len("data.pkl")] if len(indices) == 1 else ""
            if f"{root}constants.pkl" in records or any(name.startswith(f"{root}code/") for name in records):
                raise CheckpointError(TORCHSCRIPT)
            if not indices:
                raise CheckpointError("is a zip file but no torch file: unpack it, or take the model as .safetensors")
            if len(indices) > 1 or records[indices[0]].file_size > MAX_PICKLE_BYTES:
                raise _truncated()
            if f"{root}byteorder" in records and _small(archive, records[f"{root}byteorder"]) != b"little":
                raise CheckpointError("was written on a big-endian machine: take the model as .safetensors")
            loaded = unpickle(_small(archive, records[indices[0]]))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile answers damage with a dozen kinds of exception
        raise _truncated() from error

    starts = {}

    def place(storage):
        if storage.key not in starts:
            info = records.get(f"{root}data/{storage.key}")
            if info is None:
                raise _truncated()
            starts[storage.key] = _record_start(file, info, size), info.file_size
        return starts[storage.key]

    return _from_pickle(path, loaded, place, size)


def _small(archive, info) -> bytes:
    # A compressed record may unpack to any size, so no more than it declares is read.
    if info.flag_bits & 1:
        raise CheckpointError("is an encrypted zip file: take the model as .safetensors")
    with archive.open(info) as record:
        return record.read(info.file_size)


def _record_start(file, info, size: int) -> int:
    """Byte at which the data of a zip record begins; torch stores them uncompressed."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(
            "was packed again with compression, as torch never does: unpack and save it by torch.save"
        )
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise _truncated()
    name, extra = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > size:
        raise _truncated()
    return start


def _index_legacy(path: Path, file, size: int) -> Contents:
    file.seek(0)
    unpickle(file)  # the magic number
    protocol, system = unpickle(file), unpickle(file)
    if protocol != 1001 or type(system) is not dict or system.get("little_endian") is not True:
        raise CheckpointError("is a torch file of an unknown old format: save it again by a newer torch")
    loaded = unpickle(file)
    keys = unpickle(file)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise _truncated()
    found = dict.fromkeys(keys)
    position = file.tell()

    # Each storage follows as a count and its elements; the element size is in the pickle, by key.
    dtypes = {}
    for value in _weights(loaded).values():
        if type(value) is PickledTensor:
            dtypes[value.storage.key] = value.storage.dtype
    for key in keys:
        file.seek(position)
        raw = file.read(8)
        if len(raw) != 8:
            raise _truncated()
        if key not in dtypes:
            # A storage of something beside the state dict; without its type, what follows cannot be found.
            break
        (count,) = struct.unpack("<q", raw)
        nbytes = count * itemsize(dtypes[key])
        if count < 0 or position + 8 + nbytes > size:
            raise _truncated()
        found[key] = position + 8, nbytes
        position += 8 + nbytes

    def place(storage):
        if found.get(storage.key) is None:
            raise CheckpointError(
                "is a torch file of the old format with more than weights in it: save it by a newer torch"
            )
        return found[storage.key]

    return _from_pickle(path, loaded, place, size)


def _weights(loaded) -> dict:
    if type(loaded) is dict and type(loaded.get("state_dict")) is dict:
        return loaded["state_dict"]
    if type(loaded) is dict:
        return loaded
    raise CheckpointError("holds no state dict: take the model as .safetensors")


def _from_pickle(path: Path, loaded, place, size: int) -> Contents:
    tensors = {}
    for name, value in _weights(loaded).items():
        if type(value) is not PickledTensor:
            continue  # numbers and names that were saved beside the weights
        if type(name) is not str:
            raise CheckpointError("holds tensors without names: take the model as .safetensors")
        start, nbytes = place(value.storage)
        if nbytes < value.storage.numel * itemsize(value.storage.dtype):
            raise _truncated()
        tensors[name] = TensorAt(value.storage.dtype, value.size, value.stride, value.offset, start, nbytes)
    step = loaded.get("global_step")
    others = [str(name) for name in loaded if name not in tensors and name not in ("state_dict", "global_step")]
    return _checked(Contents(path, tensors, step if type(step) is int else None, tuple(others)), size)


def _checked(contents: Contents, size: int) -> Contents:
    if not contents.tensors:
        raise CheckpointError("holds no tensors: give the file of a whole model")
    extents = {(at.start, at.nbytes) for at in contents.tensors.values()}
    if sum(nbytes for _, nbytes in extents) > size:  # regions that overlap would let it grow when it is read
        raise _truncated()
    return contents


def read_tensors(contents: Contents, names=None, progress: bool | None = None) -> dict[str, torch.Tensor]:
    """Read the tensors `names` (default all) of an index: each storage once, into memory of its own, on the CPU.

    progress: True shows a bar on stderr, None only on a terminal. Raises CheckpointError where the file is shorter
    than it was.
    """
    names = list(contents.tensors) if names is None else list(names)
    wanted = {name: contents.tensors[name] for name in names}
    storages: dict[tuple[int, int], torch.Tensor] = {}
    users: dict[tuple[int, int], int] = {}
    for at in wanted.values():
        users[at.start, at.nbytes] = users.get((at.start, at.nbytes), 0) + 1
    result = {}
    with (
        open(contents.path, "rb", buffering=0) as file,
        _bar(contents.path.name, sum(n for _, n in users), progress) as bar,
    ):
        # In the order of the file, which is how a disk likes to be read; the result keeps the order of the names.
        for name, at in sorted(wanted.items(), key=lambda item: item[1].start):
            extent = at.start, at.nbytes
            if extent not in storages:
                storages[extent] = _read_bytes(file, at, contents.path, bar)
            try:
                flat = storages[extent][: at.nbytes - at.nbytes % itemsize(at.dtype)].view(at.dtype)
                result[name] = flat.as_strided(at.shape, at.stride, at.offset)
            except RuntimeError:
                raise CheckpointError(f"{contents.path}: {_truncated()}") from None
            users[extent] -= 1
            if not users[extent]:
                del storages[extent]
    return {name: result[name] for name in names}


def _read_bytes(file, at: TensorAt, path: Path, bar) -> torch.Tensor:
    data = torch.empty(at.nbytes, dtype=torch.uint8)
    view, done = memoryview(data.numpy()), 0
    file.seek(at.start)
    while done < at.nbytes:
        try:
            count = file.readinto(view[done : done + (16 << 20)])
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy it to a sound disk") from None
        if not count:
            raise CheckpointError(f"{path}: {_truncated()}")
        done += count
        bar.update(count)
    return data


def _bar(label: str, total: int, progress: bool | None):
    from tqdm import tqdm

    if progress is None:
        progress = sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=f"reading {label}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
        file=sys.stderr,
    )


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a flat .safetensors file."""
    from safetensors.torch import save_file

    seen, state = set(), {}
    for name, tensor in tensors.items():
        state[name] = tensor.clone() if tensor.data_ptr() in seen else _own(tensor)  # tied weights are written twice
        seen.add(tensor.data_ptr())
    path.touch()  # the mode of a new file is what the umask says; to read the umask is to lift it for a moment
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(state, str(path), metadata=metadata)
    os.chmod(path, mode)  # newer safetensors make it readable by its owner alone


def write_ckpt(path: Path, tensors: dict[str, torch.Tensor], global_step: int | None) -> None:
    """Write a torch file as the released ones are: {"state_dict": ..., "global_step": n}."""
    contents = {"state_dict": {name: _own(tensor) for name, tensor in tensors.items()}}
    if global_step is not None:
        contents["global_step"] = global_step
    torch.save(contents, path)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself or, where it is a view, a copy: torch.save writes whole storages, safetensors shares none."""
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() == storage.nbytes():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
