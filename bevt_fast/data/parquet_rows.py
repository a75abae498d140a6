"""Images in parquet files, as Hugging Face's datasets are stored: any image at any time, nothing unpacked.

A parquet file is read a row group at a time. Groups up to 32 MiB are read whole, and those read last are kept; of
larger ones as much as comes before the image passes by, in small batches. What was read last of all is kept too: a
header and then the picture of the same image are one read. All of it is bounded in bytes, and each process has its own.
"""

import contextlib
import functools
import importlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

from bevt_fast.data.packed import Packed, PackedPaths, inside
from bevt_fast.errors import MachineError

SUFFIX = ".parquet"
LARGEST_GROUP = 32 * 2**20  # bytes of a row group that is read as a whole
GROUPS, CONTENTS = 64 * 2**20, 16 * 2**20  # bytes kept by a process
OPEN = 16  # files
BUFFER = 2**20  # bytes read at once, instead of a whole row group
TOGETHER = 16  # rows of a large group in memory at once

Kept = TypeVar("Kept")


def library() -> Any:
    """pyarrow.parquet. Raises MachineError where it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise MachineError(
            "the source parquet needs pyarrow, and it is not installed: pip install -c constraints.txt pyarrow"
        ) from None


def open_parquet(path: Path) -> Any:
    """A pyarrow ParquetFile without threads of its own, so that processes may fork. Raises OSError or ValueError."""
    options = {"memory_map": False, "pre_buffer": False, "buffer_size": BUFFER, "page_checksum_verification": True}
    return library().ParquetFile(path, **options)


@dataclass(frozen=True, slots=True)
class Row(Packed):
    """The image in one row of a parquet file; `size` is that of the file, or -1: no row's is known before."""

    file_path: Path
    column: str
    row: int
    size: int

    def __str__(self) -> str:
        return f"{self.file_path}/{self.column}/{self.row}"

    @classmethod
    def named(cls, file: str, name: str) -> "Row":
        """The row that prints as `file`/`name`."""
        column, _, row = name.rpartition("/")
        return cls(Path(file), column, int(row), -1)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        return _reader(os.getpid()).content(self)

    def exists(self) -> bool:
        return self.file_path.is_file()


class Rows(PackedPaths):
    """The images of parquet files by number, each named <file>/<column>/<row>."""

    def __init__(self, files: list[tuple[str, int, int]], column: str, picked: np.ndarray | None = None):
        """`files` are names, numbers of rows and bytes; `picked` (n,) int64 are rows of all files, None for every."""
        self._files, self._column, self._picked = files, column, picked
        self._ends = np.cumsum(np.array([rows for _, rows, _ in files], dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._picked is None else len(self._picked)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        (name, _, _), row = self._place(index)
        return f"{name}/{self._column}/{row}"

    def file(self, root: Path, index: int) -> Row:
        (name, _, size), row = self._place(index)
        return Row(inside(root, name), self._column, row, size)

    def take(self, indices: np.ndarray) -> "Rows":
        return Rows(self._files, self._column, indices if self._picked is None else self._picked[indices])

    def _place(self, index: int) -> tuple[tuple[str, int, int], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        row = index if self._picked is None else int(self._picked[index])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self._files[number], row - (int(self._ends[number - 1]) if number else 0)


@functools.lru_cache(maxsize=1)
def _reader(process: int) -> "_Reader":
    """The process's own: a forked one begins anew."""
    return _Reader()


class _Reader:
    """What a process keeps of the parquet files it reads."""

    def __init__(self) -> None:
        self._files: _Recent[_Groups] = _Recent(OPEN, lambda _: 1)
        self._groups: _Recent[Any] = _Recent(GROUPS, lambda column: column.nbytes)
        self._contents: _Recent[bytes] = _Recent(CONTENTS, len)
        self._stream = _Stream((), iter(()))
        self._lock = threading.Lock()

    def content(self, row: Row) -> bytes:
        """The encoded image of a row. Raises OSError."""
        with self._lock, _as_os_errors(row):
            return self._contents.get((row.file_path, row.column, row.row), lambda: self._content(row))

    def _content(self, row: Row) -> bytes:
        file = self._files.get(row.file_path, lambda: _Groups(row.file_path))
        group, within = file.place(row.row)
        key = (row.file_path, row.column, group)
        if file.bytes(group) <= LARGEST_GROUP:
            value = self._groups.get(key, lambda: file.read(group, row.column))[within].as_py()
        else:
            if not self._stream.leads_to(key, within):
                self._stream = _Stream(key, file.stream(group, row.column))
            value = self._stream.value(within)
        if isinstance(value, dict):
            content, beside = value.get("bytes"), value.get("path")
        else:
            content, beside = value, None
        if content is None and beside:
            return _beside(row.file_path, beside).read_bytes()
        if not content:
            raise OSError("no bytes in this row")
        return content


class _Groups:
    """An open parquet file and where its row groups begin."""

    def __init__(self, path: Path):
        self._parquet = open_parquet(path)
        about = self._parquet.metadata
        rows = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
        self._ends = np.cumsum(np.array(rows, dtype=np.int64))

    def place(self, row: int) -> tuple[int, int]:
        """Row group of a row, and its number in there."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group == len(self._ends):
            raise OSError("the file has fewer rows than it had")
        return group, row - (int(self._ends[group - 1]) if group else 0)

    def bytes(self, group: int) -> int:
        """Of all columns, not compressed."""
        return self._parquet.metadata.row_group(group).total_byte_size

    def read(self, group: int, column: str) -> Any:
        """A column of a row group."""
        return self._parquet.read_row_group(group, columns=[column], use_threads=False).column(0)

    def stream(self, group: int, column: str) -> Iterator[Any]:
        """The same in pieces."""
        batches = self._parquet.iter_batches(TOGETHER, row_groups=[group], columns=[column], use_threads=False)
        return (batch.column(0) for batch in batches)


class _Stream:
    """A row group that is too large to be read as a whole, on the way from its first row to its last."""

    def __init__(self, key: tuple, pieces: Iterator[Any]):
        self._key, self._pieces = key, pieces
        self._piece: Sequence[Any] = ()
        self._first = 0

    def leads_to(self, key: tuple, row: int) -> bool:
        """Whether a row of the group `key` is still to come."""
        return self._key == key and row >= self._first

    def value(self, row: int) -> Any:
        """What a row holds."""
        while row >= self._first + len(self._piece):
            self._first += len(self._piece)
            self._piece = ()  # let go of it before the next is read
            try:
                self._piece = next(self._pieces)
            except BaseException:
                self._key = ()  # it leads nowhere any more
                raise
        return self._piece[row - self._first].as_py()


class _Recent(Generic[Kept]):
    """What was asked for last, up to `most` in all."""

    def __init__(self, most: int, size: Callable[[Kept], int]):
        self._most, self._size = most, size
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._total = 0

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """What is kept under `key`, or is made."""
        if key not in self._kept:
            made = make()
            self._kept[key] = made
            self._total += self._size(made)
            while self._total > self._most and len(self._kept) > 1:
                self._total -= self._size(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(key)
        return self._kept[key]


def _beside(file: Path, named: str) -> Path:
    """The image file that a row names instead of holding it, below the parquet file's folder. Raises OSError."""
    folder = os.path.abspath(file.parent)
    path = os.path.abspath(os.path.join(folder, named))
    if "\0" in named or os.path.commonpath([folder, path]) != folder:
        raise OSError(f"it names {named[:200]!r}, which is not below the folder of the parquet file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"it names {named[:200]!r}, which is not a regular file")
    return Path(path)


@contextlib.contextmanager
def _as_os_errors(row: Row) -> Iterator[None]:
    """pyarrow raises ValueError, KeyError and others of its own on damaged files; the storage's own errors stay."""
    try:
        yield
    except (OSError, MemoryError, MachineError):
        raise
    except StopIteration:
        raise OSError("a row group ends before this row") from None
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
