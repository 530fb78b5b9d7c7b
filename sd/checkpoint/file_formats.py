"""File formats of tensors: index a .safetensors file or a torch file, and read its tensors into memory once.

Three formats are read: .safetensors, torch's zip files, and torch's files from before version 1.6. Each gives a FileIndex
first, checked against the size of the file, so that a caller reads only the tensors it needs and a damaged file is rejected
before memory is allocated. Bytes go straight from the file into the returned tensor.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sd.checkpoint.pickle_reader import MAX_PICKLE_BYTES, PickledTensor, Storage, unpickle
from sd.errors import CheckpointError, listed, printable

MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors format
READ_BYTES = 16 << 20  # per call, between updates of the progress bar
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
UNSUPPORTED_FORMATS = {  # first bytes of the file
    b"version https://git-lfs": "is a git-lfs pointer: run `git lfs pull` in its repository",
    b"GGUF": "is a GGUF file: use the original .safetensors of the model",
    b"\x89HDF": "is an HDF5 file: use the .safetensors of the model",
    b"\x1f\x8b": "is compressed with gzip: unpack it first",
    b"7z\xbc\xaf": "is a 7z archive: unpack it first",
    b"{": "is JSON, perhaps an error message instead of the download: download it again",
    b"<": "is a web page, perhaps a login or error page instead of the download: download it again",
    b"Rar!": "is a RAR archive: unpack it first",
    b"\x80": "is a pickle but no torch file: use the .safetensors of the model",
}
SETTINGS_FILES = {  # by the end of the name
    (".json",): "is a file of settings: give the folder of the model, with unet, vae and text_encoder in it",
    (".yaml", ".yml"): "is a file of settings: pass it as --config, and the weights as --ckpt",
}
TORCHSCRIPT = "is a TorchScript archive, which is a program: use the .safetensors or .ckpt of the model"
DAMAGED = "is damaged or its download is incomplete: download it again"
COMPRESSED = "was packed again with compression, unlike torch's files: unpack it and save it with torch.save"


MAX_ERROR_BYTES = 1 << 16  # of a text that a server sends instead of a file
_TEXT = bytes(range(32, 127)) + b"\t\r\n"
_REPOSITORY = re.compile(r"\w[\w.-]*/(?!.*\.[A-Za-z]+$)\w[\w.-]*")  # of Hugging Face: OWNER/NAME, and no file
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # of at least two letters: C:/ is a path


def itemsize(dtype: torch.dtype) -> int:
    """Bytes per element."""
    return torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class TensorEntry:
    """Location of a tensor: a storage of `nbytes` at byte `start` of the file, and the view of it, in elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    start: int
    nbytes: int

    @property
    def extent(self) -> tuple[int, int]:
        """Start and length of the storage in the file, in bytes."""
        return self.start, self.nbytes


@dataclass(frozen=True)
class FileIndex:
    """Tensors of one file by name, the step count of its training, its other entries, and the metadata of .safetensors."""

    path: Path
    tensors: dict[str, TensorEntry]
    global_step: int | None = None
    others: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    file_format: str = "safetensors"


def require_path(path: str | Path) -> Path:
    """Return a path of a checkpoint. Raises CheckpointError for empty text and for an address of the web."""
    if not str(path) or (isinstance(path, str) and not path.strip()):
        raise CheckpointError(f"{path!r}: is an empty path; give a .safetensors or .ckpt file, or a diffusers folder")
    if match := _ADDRESS.match(str(path)):
        raise CheckpointError(
            f"{path}: is an address ({match[1]}), and nothing is downloaded: download it, and give its path"
        )
    return Path(path)


def _missing(path: Path) -> str:
    message = f"{path}: no such file; give the path of a .safetensors or .ckpt file, or a diffusers folder"
    if not _REPOSITORY.fullmatch(path.as_posix()) or path.parent.exists():
        return message
    return f"{message}; if this is a repository of Hugging Face, download a file of it: hf download {path} FILE --local-dir ."


def index(path: str | Path) -> FileIndex:
    """Index the tensors of a file, whose format is detected from its first bytes and not from its extension.

    Raises CheckpointError, naming the file and a remedy, if it is missing, empty, damaged, or not a checkpoint.
    """
    path = require_path(path)
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            head = file.read(64)
            _check(size > 0, "is empty: download it again")
            if head.startswith(b"PK"):
                return _index_zip(path, file, size)
            if head.startswith(LEGACY_MAGIC):
                return _index_legacy(path, file, size)
            if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER_BYTES:
                return _index_safetensors(path, file, size)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except FileNotFoundError:
        raise CheckpointError(_missing(path)) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); check the path and its permissions"
        ) from None
    for suffixes, reason in SETTINGS_FILES.items():
        _check(Path(path).suffix.lower() not in suffixes, f"{path}: {reason}")
    content = _without_byte_order_mark(head).lstrip()
    for start, reason in UNSUPPORTED_FORMATS.items():
        _check(not content.startswith(start), f"{path}: {reason}")
    if size < MAX_ERROR_BYTES and b" " in content and content.isascii() and not content.translate(None, _TEXT):
        excerpt = printable(content.decode("ascii").strip())
        raise CheckpointError(
            f"{path}: is text, perhaps an error instead of the download ({excerpt}): download it again"
        )
    raise CheckpointError(
        f"{path}: is neither a .safetensors nor a torch file; give one of these, or a diffusers folder"
    )


def _without_byte_order_mark(head: bytes) -> bytes:
    """The first bytes of a text in UTF-8, without the mark that some servers and editors write before it."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if head.startswith(mark):
            return head[len(mark) :].decode(encoding, errors="ignore").encode()
    return head


def _check(condition: bool, message: str = DAMAGED) -> None:
    if not condition:
        raise CheckpointError(message)


# --- .safetensors


def _index_safetensors(path: Path, file: IO[bytes], size: int) -> FileIndex:
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    _check(8 + length <= size)
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(DAMAGED) from None
    _check(type(header) is dict)
    metadata = header.pop("__metadata__", None) or {}
    _check(type(metadata) is dict and all(type(value) is str for value in metadata.values()))
    tensors = {name: _safetensors_entry(name, entry, 8 + length, size) for name, entry in header.items()}
    step = metadata.get("global_step", "")
    global_step = int(step) if step.isascii() and step.isdigit() and len(step) < 16 else None
    others = tuple(f"__metadata__.{name}" for name in metadata if name not in ("global_step", "format"))
    return _check_total(FileIndex(path, tensors, global_step, others, metadata), size)


def _safetensors_entry(name: str, entry: Any, data_start: int, size: int) -> TensorEntry:
    _check(type(entry) is dict and {"dtype", "shape", "data_offsets"} <= entry.keys())
    shape, offsets = entry["shape"], entry["data_offsets"]
    _check(type(shape) is list and len(shape) <= 32 and type(offsets) is list and len(offsets) == 2)
    _check(all(type(number) is int and 0 <= number < 1 << 62 for number in (*shape, *offsets)))
    dtype = SAFETENSORS_DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise CheckpointError(f"stores {name!r} as {str(entry['dtype'])[:20]}: use the model in fp32, fp16 or bf16")
    begin, end = offsets
    _check(end - begin == math.prod(shape) * itemsize(dtype) and data_start + end <= size)
    return TensorEntry(dtype, tuple(shape), _contiguous_stride(shape), 0, data_start + begin, end - begin)


def _contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(length, 1) for length in shape[axis + 1 :]) for axis in range(len(shape)))


# --- torch files

Place = Callable[[Storage], tuple[int, int]]  # extent of a storage in the file


def _index_zip(path: Path, file: IO[bytes], size: int) -> FileIndex:
    try:
        with zipfile.ZipFile(file) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
            root = pickles[0][: -len("data.pkl")] if len(pickles) == 1 else ""
            script = f"{root}constants.pkl" in records or any(name.startswith(f"{root}code/") for name in records)
            _check(not script, TORCHSCRIPT)
            _check(bool(pickles), "is a zip file but no torch file: unpack it, or use the .safetensors of the model")
            _check(len(pickles) == 1 and records[pickles[0]].file_size <= MAX_PICKLE_BYTES)
            # A small compressed file could become gigabytes of objects.
            _check(records[pickles[0]].compress_type == zipfile.ZIP_STORED, COMPRESSED)
            order = records.get(f"{root}byteorder")
            _check(order is None or order.file_size <= len("little"))
            big_endian = order is not None and _read_record(archive, order) != b"little"
            _check(not big_endian, "was written on a big-endian machine: use the .safetensors of the model")
            loaded = unpickle(_read_record(archive, records[pickles[0]]))
    except CheckpointError:
        raise
    except Exception as error:  # zipfile reports damage with a dozen exception types
        raise CheckpointError(DAMAGED) from error

    def place(storage: Storage) -> tuple[int, int]:
        info = records.get(f"{root}data/{storage.key}")
        if info is None:
            raise CheckpointError(DAMAGED)
        return _record_start(file, info, size), info.file_size

    return _index_pickle(path, loaded, place, size)


def _read_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    # A compressed record may unpack to any size, so no more than its declared size is read.
    _check(not info.flag_bits & 1, "is an encrypted zip file: use the .safetensors of the model")
    with archive.open(info) as record:
        return record.read(info.file_size)


def _record_start(file: IO[bytes], info: zipfile.ZipInfo, size: int) -> int:
    """Byte at which the data of a zip record begins; torch stores records uncompressed."""
    stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
    _check(stored, COMPRESSED)
    file.seek(info.header_offset)
    header = file.read(30)
    _check(len(header) == 30 and header[:4] == b"PK\x03\x04")
    name, extra = struct.unpack("<HH", header[26:30])
    start: int = info.header_offset + 30 + name + extra
    _check(start + info.file_size <= size)
    return start


def _index_legacy(path: Path, file: IO[bytes], size: int) -> FileIndex:
    file.seek(0)
    unpickle(file)  # the magic number
    protocol, system = unpickle(file), unpickle(file)
    supported = protocol == 1001 and type(system) is dict and system.get("little_endian") is True
    _check(supported, "is a torch file of an unknown old format: save it again with a newer torch")
    loaded, keys = unpickle(file), unpickle(file)
    _check(type(keys) is list and all(type(key) is str for key in keys))
    # Each storage follows as a count and its elements; the element size is in the pickle, by key.
    tensors = [value for value in _state_dict(loaded).values() if type(value) is PickledTensor]
    dtypes = {tensor.storage.key: tensor.storage.dtype for tensor in tensors}
    extents: dict[str, tuple[int, int]] = {}
    position = file.tell()
    for key in keys:
        file.seek(position)
        raw = file.read(8)
        _check(len(raw) == 8)
        if key not in dtypes:
            break  # a storage outside the state dict: its element size, and so the next position, is unknown
        (count,) = struct.unpack("<q", raw)
        extents[key] = position + 8, count * itemsize(dtypes[key])
        position = sum(extents[key])
        _check(count >= 0 and position <= size)

    def place(storage: Storage) -> tuple[int, int]:
        _check(storage.key in extents, "is an old torch file with more than weights in it: save it with a newer torch")
        return extents[storage.key]

    return _index_pickle(path, loaded, place, size)


def _state_dict(loaded: Any) -> dict[Any, Any]:
    if type(loaded) is dict:
        # Some tools wrap a file a second time. A textual-inversion embedding has its vectors in a dict of their own.
        state: dict[Any, Any] = loaded
        for key in ("state_dict", "state_dict", "string_to_param"):
            nested = state.get(key)
            state = nested if type(nested) is dict else state
        return state
    raise CheckpointError("contains no state dict: use the .safetensors of the model")


def _index_pickle(path: Path, loaded: Any, place: Place, size: int) -> FileIndex:
    tensors, state = {}, _state_dict(loaded)
    for name, value in state.items():
        if type(value) is not PickledTensor:
            continue  # numbers and names that were saved beside the weights
        _check(type(name) is str, "contains tensors without names: use the .safetensors of the model")
        start, nbytes = place(value.storage)
        _check(nbytes >= value.storage.numel * itemsize(value.storage.dtype))
        tensors[name] = TensorEntry(value.storage.dtype, value.size, value.stride, value.offset, start, nbytes)
    step = loaded.get("global_step")
    step = step if type(step) is int else None
    embedding = "string_to_param" in loaded and not tensors
    _check(not embedding, "is a textual inversion embedding in a form that cannot be read: save it as .safetensors")
    nested = [
        name[:40] if type(name) is str else type(name).__name__
        for name, value in state.items()
        if not tensors and _has_tensors(value)
    ]
    _check(
        not nested,
        f"has its tensors in the entries {listed(nested)}, as trainers and extensions of models save them: "
        f"save the entry of a whole model as a file, or give such a file",
    )
    known = {*tensors, "state_dict", "string_to_param", "global_step"}
    others = tuple(name for name in loaded if type(name) is str and name not in known)
    return _check_total(FileIndex(path, tensors, step, others, file_format="torch"), size)


def _has_tensors(value: Any) -> bool:
    return type(value) is dict and any(type(tensor) is PickledTensor for tensor in value.values())


def _check_total(file_index: FileIndex, size: int) -> FileIndex:
    _check(bool(file_index.tensors), "contains no tensors: give the file of a whole model")
    extents = {entry.extent for entry in file_index.tensors.values()}
    _check(sum(nbytes for _, nbytes in extents) <= size)  # overlapping regions would multiply the memory when read
    return file_index


# --- reading


def read_tensors(
    file_index: FileIndex, names: Iterable[str] | None = None, progress: bool | None = None
) -> dict[str, Tensor]:
    """Read the tensors `names` (default all) of an index, each storage once, into memory of its own on the CPU.

    progress: True shows a bar on stderr, None only on a terminal. Raises CheckpointError if the file is now shorter.
    """
    from tqdm import tqdm

    path = file_index.path
    names = list(file_index.tensors if names is None else names)
    entries = {name: file_index.tensors[name] for name in names}
    users = Counter(entry.extent for entry in entries.values())
    storages: dict[tuple[int, int], Tensor] = {}
    tensors = {}
    bar = tqdm(
        total=sum(nbytes for _, nbytes in users),
        desc=f"reading {path.name}",
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not (sys.stderr.isatty() if progress is None else progress),
        file=sys.stderr,
    )
    with open(path, "rb", buffering=0) as file, bar:
        # Sequential reads are the fastest; the result keeps the order of the names.
        for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
            if entry.extent not in storages:
                storages[entry.extent] = _read_storage(file, entry, path, bar.update)
            try:
                flat = storages[entry.extent][: entry.nbytes - entry.nbytes % itemsize(entry.dtype)].view(entry.dtype)
                tensors[name] = flat.as_strided(entry.shape, entry.stride, entry.offset)
            except RuntimeError:
                raise CheckpointError(f"{path}: {DAMAGED}") from None
            users[entry.extent] -= 1
            if not users[entry.extent]:
                del storages[entry.extent]
    return {name: tensors[name] for name in names}


def shapes_of(
    file_index: FileIndex, names: Iterable[str] | None = None, progress: bool | None = None
) -> dict[str, Tensor]:
    """Tensors of the same names, shapes and dtypes on the meta device, without reading the file; like `read_tensors`."""
    entries = {name: file_index.tensors[name] for name in (file_index.tensors if names is None else names)}
    return {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in entries.items()}


def _read_storage(file: io.FileIO, entry: TensorEntry, path: Path, update: Callable[[int], object]) -> Tensor:
    data = torch.empty(entry.nbytes, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    file.seek(entry.start)
    while done < entry.nbytes:
        try:
            count = file.readinto(view[done : done + READ_BYTES]) or 0
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); copy it to another disk") from None
        _check(count > 0, f"{path}: {DAMAGED}")
        done += count
        update(count)
    return data


# --- writing


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file with the mode of the umask; tied weights are written twice."""
    from safetensors.torch import save_file

    seen, state = set(), {}
    for name, tensor in tensors.items():
        state[name] = tensor.clone() if tensor.data_ptr() in seen else _own(tensor)
        seen.add(tensor.data_ptr())
    path.touch()  # reading the umask would mean changing it for a moment, so the mode is read from a new file
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(state, str(path), metadata=metadata)
    os.chmod(path, mode)  # newer safetensors make the file readable by its owner alone


def write_ckpt(path: Path, tensors: dict[str, Tensor], global_step: int | None) -> None:
    """Write a torch file like the released ones: {"state_dict": ..., "global_step": n}."""
    contents: dict[str, Any] = {"state_dict": {name: _own(tensor) for name, tensor in tensors.items()}}
    if global_step is not None:
        contents["global_step"] = global_step
    torch.save(contents, path)


def _own(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is a view: torch.save writes whole storages, safetensors shares none."""
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    if tensor.is_contiguous() and tensor.numel() * tensor.element_size() == storage.nbytes():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
