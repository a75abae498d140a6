"""Where the files of a tar shard are, from its headers alone (POSIX ustar and pax, GNU long names).

Plain headers, which are nearly all, are read here, at a fifth of the time; every other one is tarfile's. Nothing is
unpacked, and no header, however large it says it is, is taken into memory beyond a mebibyte.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from bevt_fast.errors import DataError

BLOCK = 512
LARGEST_HEADER = 1024**2  # bytes of a long name or a pax header
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_END = bytes(BLOCK)


class Entry(NamedTuple):
    """A member of a shard: its bytes are `size` from `offset` on. Only a "file" has bytes of its own there."""

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "link", "device", "sparse file"]


class Damaged(Exception):
    """From byte `position` on a shard cannot be followed."""

    def __init__(self, position: int, reason: str):
        super().__init__(position, reason)
        self.position, self.reason = position, reason


def entries(path: Path) -> Iterator[Entry]:
    """The members of a shard in order. Raises Damaged where it is cut or broken; what came before is good.

    Raises DataError for a file that is no tar, a compressed one, or one that cannot be read.
    """
    try:
        with _Headers(io.FileIO(path)) as file:
            _check_first(path, file.read(BLOCK))
            yield from _follow(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror or error}; check the path") from None


class _Headers(io.BufferedReader):
    """A shard of which only headers are read: tarfile would take as much into memory as one says it has."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _check_first(path: Path, head: bytes) -> None:
    for magic, program in COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{path} is compressed, and its images cannot be found in it; unpack it with {program}")
    if len(head) == BLOCK and head != _END:
        try:
            tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise DataError(f"{path} is not a tar shard; name shards like train-{{000000..000146}}.tar") from None


def _follow(file: _Headers, end: int) -> Iterator[Entry]:
    tar = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)), encoding="utf-8")  # for headers that are not plain
    tar.fileobj = file
    position = 0
    while True:
        file.seek(position)
        head = file.read(BLOCK)
        if head == _END:
            return
        if len(head) < BLOCK:
            raise Damaged(position, "it ends without the mark of its end")
        entry = None if tar.pax_headers else _plain(head, position)
        if entry is None:
            file.seek(position)
            entry, following = _by_tarfile(tar, position)
        else:
            following = entry.offset + -(-entry.size // BLOCK) * BLOCK
        if following <= position:
            raise Damaged(position, "its headers lead back")
        if (entry.offset + entry.size if entry.kind == "file" else following) > end:
            raise Damaged(position, f"it ends within {entry.name}")
        yield entry
        position = following


def _plain(head: bytes, position: int) -> Entry | None:
    """The regular file a header describes by itself; None for tarfile to look at."""
    if head[156] not in b"0\0":
        return None
    name = head[:100].partition(b"\0")[0]
    if head[345]:
        if head[257:263] != b"ustar\0":
            return None
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    if not name or name.endswith(b"/"):
        return None
    try:
        size, written = (int(field.strip(b" \0"), 8) for field in (head[124:136], head[148:156]))
    except ValueError:  # a size in base 256, or no header at all
        return None
    # the checksum counts its own field as eight blanks
    if size < 0 or written != sum(head) - sum(head[148:156]) + 8 * 32:
        return None
    return Entry(name.decode("utf-8", "surrogateescape"), position + BLOCK, size, "file")


def _by_tarfile(tar: tarfile.TarFile, position: int) -> tuple[Entry, int]:
    """A member whose header is more than one block, or no file; and where the next header is."""
    try:
        info = tarfile.TarInfo.fromtarfile(tar)
    except (tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
        raise Damaged(position, str(error)) from None
    if info.size < 0:
        raise Damaged(position, "a member of negative size")
    if info.issparse():
        kind = "sparse file"
    elif info.isreg():
        kind = "file"
    elif info.isdir():
        kind = "folder"
    else:
        kind = "link" if info.issym() or info.islnk() else "device"
    return Entry(info.name, info.offset_data, info.size if kind == "file" else 0, kind), tar.offset
