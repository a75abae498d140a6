"""Tensors out of a torch.save file, of which nothing is run: DALL-E's encoder is a pickled module (SPEC 3.1).

A pickle is a program. Two gates stand before this one: its instructions are read through first and any that torch.save
does not write refuses the file; then every name it asks for must be in `_names`, where each name leads to a stand-in
written here, never to the code it names. So neither torch's nor DALL-E's own classes take part, and both formats of
torch.save, the zip archive and the older row of pickles, are read without torch.load.
"""

import io
import math
import pickle
import pickletools
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bevt_fast.errors import DataError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # first two pickles of the older format
_MAX_PROGRAM = 1 << 26  # bytes of pickle; the encoder's is about 50 kB, its tensors lie outside it
_MAX_MEMO = 1 << 20  # a memo index costs memory up to it

_INSTRUCTIONS = frozenset(
    "PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE"
    " BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_DICT EMPTY_LIST EMPTY_SET EMPTY_TUPLE"
    " TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS ADDITEMS SETITEM SETITEMS NEWOBJ REDUCE BUILD BINPERSID".split()
)
_MODULES = frozenset(
    "dall_e.encoder.Encoder dall_e.encoder.EncoderBlock dall_e.utils.Conv2d torch.nn.modules.container.Sequential"
    " torch.nn.modules.activation.ReLU torch.nn.modules.pooling.MaxPool2d torch.nn.modules.linear.Identity".split()
)
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
}
_DAMAGED = (
    AttributeError, EOFError, IndexError, KeyError, MemoryError, OSError, OverflowError, RecursionError, RuntimeError,
    TypeError, UnicodeDecodeError, ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


class Refused(Exception):
    """The file asks for something that no encoder needs."""


class _Module:
    """Stands where a class of DALL-E or torch.nn stood; keeps what was pickled and does nothing."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a module's state is a {type(state).__name__}")
        self.state = state


class _Storage(NamedTuple):
    """A run of `count` numbers that lies elsewhere in the file, by key."""

    key: str
    dtype: torch.dtype
    count: int


class _View(NamedTuple):
    """A tensor as pickled: where in which storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_Data = Callable[[_Storage], bytes]  # the numbers of a storage


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a pickled module (or of a plain state_dict), by name, with the bits they have in the file.

    Raises DataError for a file that is damaged, and for one that asks for anything but tensors: none of it is run.
    """
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            room = file.seek(0, io.SEEK_END)
            file.seek(0)
            views, data = _read_zip(file) if is_zip else _read_rows(file)
            return _tensors(views, data, room)
    except Refused as refusal:
        raise DataError(
            f"{path} asks for {refusal}, which tensors do not need: refused, and nothing of it was run; "
            "take the file from its publisher again, or convert it where you trust it"
        ) from None
    except _DAMAGED as error:
        raise DataError(
            f"{path} is damaged or incomplete ({type(error).__name__}: {str(error)[:100]}); download it again"
        ) from None


def _read_zip(file: io.BufferedReader) -> tuple[dict[str, _View], _Data]:
    """The zip format: one pickle, and an uncompressed entry for every storage."""
    archive = zipfile.ZipFile(file)
    programs = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(programs) != 1:
        raise ValueError("a zip file, but not one that torch.save wrote")
    folder = programs[0].removesuffix("data.pkl")

    def entry(name: str) -> bytes:
        info = archive.getinfo(folder + name)
        # torch.save never compresses, so an entry is at most as large as the file
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the entry {name} is compressed")
        return archive.read(info)

    if f"{folder}byteorder" in archive.namelist() and entry("byteorder") != sys.byteorder.encode():
        raise ValueError("written by a machine of the other byte order")
    views = _views(_unpickle(io.BytesIO(entry("data.pkl"))))
    return views, lambda storage: entry(f"data/{storage.key}")


def _read_rows(file: io.BufferedReader) -> tuple[dict[str, _View], _Data]:
    """The format before torch 1.6: pickles of magic number, version, machine, object and keys; then the storages."""
    if _unpickle(file) != _MAGIC or _unpickle(file) != _PROTOCOL:
        raise ValueError("a pickle, but not one that torch.save wrote")
    machine = _unpickle(file)
    if machine["little_endian"] != (sys.byteorder == "little"):
        raise ValueError("written by a machine of the other byte order")
    views = _views(_unpickle(file))
    widths = {view.storage.key: view.storage.dtype.itemsize for view in views.values()}
    data = {}
    for key in _unpickle(file):
        if key not in widths:
            raise ValueError(f"storage {key} belongs to no tensor")
        (count,) = struct.unpack("<q", file.read(8))
        size = max(count, 0) * widths[key]
        data[key] = file.read(size)
        if len(data[key]) != size:
            raise EOFError("the file ends within a storage")
    return views, lambda storage: data[storage.key]


def _unpickle(file: Any) -> Any:
    """The next pickle of the file, after its instructions have been read through."""
    start = file.tell()
    for instruction, argument, position in pickletools.genops(file):
        if instruction.name not in _INSTRUCTIONS:
            raise Refused(f"the pickle instruction {instruction.name}")
        if instruction.name == "GLOBAL":
            _check(*str(argument).split(" ", 1))
        if instruction.name == "LONG_BINPUT" and not 0 <= int(argument or 0) < _MAX_MEMO:
            raise ValueError("a memo index out of range")
        if position is not None and position - start > _MAX_PROGRAM:
            raise ValueError("the pickle is too long to be that of a module")
    end = file.tell()
    file.seek(start)
    program = file.read(end - start)
    return _Unpickler(io.BytesIO(program)).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        _check(module, name)
        return _names()[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "module":  # (kind, class, file name, source text): the older format carries each class's source
            return pid[1]
        kind, dtype, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise ValueError("an unknown kind of record")
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage that is a part of another")
        return _Storage(key, dtype, _natural(count))


def _check(module: str, name: str) -> None:
    if f"{module}.{name}" not in _names():
        raise Refused(f"{module}.{name}")


def _names() -> dict[str, Any]:
    """Every name a file may use, and the stand-in it gets."""
    # new functions each time: a pickle may set attributes on what it is given, and those must not last
    functions: dict[str, Callable] = {
        "torch._utils._rebuild_tensor_v2": lambda *arguments: _rebuild_tensor(*arguments),
        "torch._utils._rebuild_parameter": lambda view, *_: view,
        "torch.device": lambda *_: None,  # where the tensors were does not matter
    }
    containers = {"collections.OrderedDict": OrderedDict, "__builtin__.set": set, "builtins.set": set}
    return functions | containers | _STORAGES | dict.fromkeys(_MODULES, _Module)


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> _View:
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    return _View(storage, _natural(offset), tuple(map(_natural, shape)), tuple(map(_natural, stride)))


def _natural(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r:.20} where a count was expected")
    return number


def _views(value: Any, prefix: str = "") -> dict[str, _View]:
    """The tensors below a module or a dict of tensors, named as torch's state_dict names them."""
    if isinstance(value, _Module):
        found = {}
        for group in ("_parameters", "_buffers", "_modules"):
            for name, part in value.state.get(group, {}).items():
                found |= {} if part is None else _views(part, f"{prefix}.{name}" if prefix else name)
        return found
    if isinstance(value, dict) and not prefix:
        return {str(name): part for name, part in value.items() if isinstance(part, _View)}
    if isinstance(value, _View):
        return {prefix: value}
    raise ValueError(f"{prefix or 'the file'} is a {type(value).__name__}, not a tensor or a module")


def _tensors(views: dict[str, _View], data: _Data, room: int) -> dict[str, Tensor]:
    """Contiguous tensors, at most `room` bytes of them: what the file holds, however often a storage is named."""
    tensors = {}
    if sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values()) > room:
        raise ValueError("its tensors are larger than the file")
    for name, (storage, offset, shape, stride) in views.items():
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if math.prod(shape) > storage.count or (0 not in shape and last >= storage.count):
            raise ValueError(f"{name} is larger than its storage")
        numbers = data(storage)
        if len(numbers) != storage.count * storage.dtype.itemsize:
            raise ValueError(f"{name} has a storage of another size than it says")
        if not numbers or 0 in shape:
            tensors[name] = torch.empty(shape, dtype=storage.dtype)
            continue
        flat = torch.frombuffer(bytearray(numbers), dtype=storage.dtype)
        tensors[name] = flat.as_strided(shape, stride, offset).clone(memory_format=torch.contiguous_format)
    return tensors
