"""Images that live inside other files, read where they are: a member of a tar shard is bytes at a place.

A `Packed` stands where a path would: it is opened, read, asked whether it is there, and shown. `decode.py` and
`pipeline.py` read images; everything between a source and them hands on what it was given.
"""

import contextlib
import functools
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np


class Packed(os.PathLike[str], ABC):
    """A file of `size` bytes inside a file. As a path it names both, as <shard>/<member>, where no file is."""

    size: int

    def __fspath__(self) -> str:
        return str(self)

    @abstractmethod
    def open(self) -> BinaryIO:
        """The content, to be read and sought in. Raises OSError."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether the file around it is there and long enough."""

    def read_bytes(self) -> bytes:
        """The content. Raises OSError, also where the file around it has become shorter."""
        with self.open() as opened:
            return opened.read()


File = str | Path | Packed


@contextlib.contextmanager
def opened(file: File) -> Iterator[str | Path | BinaryIO]:
    """What a reader of images takes for `file`: the file itself, or the content of a packed one."""
    if isinstance(file, Packed):
        with file.open() as content:
            yield content
    else:
        yield file


def is_empty(file: File) -> bool:
    """Whether a file is there, and of 0 bytes."""
    if isinstance(file, Packed):
        return file.size == 0
    return os.path.isfile(file) and not os.path.getsize(file)


@dataclass(frozen=True, slots=True)
class Part(Packed):
    """`size` bytes of `file` from `offset` on, under a name of their own."""

    file: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.file}/{self.name}"

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self))

    def exists(self) -> bool:
        return self.file.stat().st_size >= self.offset + self.size if self.file.is_file() else False


@functools.lru_cache(maxsize=4096)
def inside(root: Path, name: str) -> Path:
    """`root` / `name`, for the few files that hold all the others."""
    return root / name


class PackedPaths(Sequence[str], ABC):
    """The names of packed files as a source lists them, made when asked for; `file` says where one is."""

    @abstractmethod
    def __getitem__(self, index: int) -> str: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    @abstractmethod
    def file(self, root: Path, index: int) -> Packed:
        """The packed file of sample `index`."""

    @abstractmethod
    def take(self, indices: np.ndarray) -> "PackedPaths":
        """The names of the samples `indices`, (n,) int64."""


class _Window(io.RawIOBase):
    """The bytes of a `Part`, as a file."""

    def __init__(self, part: Part):
        self._part, self._at = part, 0
        self._file = os.open(part.file, os.O_RDONLY)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(offset + (0, self._at, self._part.size)[whence], 0)
        return self._at

    def readinto(self, buffer) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = min(len(buffer), max(self._part.size - self._at, 0))
        got = os.pread(self._file, wanted, self._part.offset + self._at)
        if wanted and not got:
            raise OSError(f"truncated: {self._part.file} ends within the member")
        buffer[: len(got)] = got
        self._at += len(got)
        return len(got)

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()
