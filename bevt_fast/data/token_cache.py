"""Targets kept on disk: the token ids of K repeatable views of every sample of a stream.

With `data.views` K the views of a pass repeat those of K passes before, so what the tokenizer says of them can be asked
once (`python bevt_fast/prepare.py tokens`). A cache is a directory with three files for each stream:

    STREAM.json   what the ids depend on (the parts), compared with the run's own before it starts
    STREAM.npy    a row for each view, at index * K + view; read and written row by row, never as a whole
    STREAM.done   a byte for each CHUNK rows: 1 when all are written and on the disk

A row holds the ids, the file they were read from (not the sample's own where that is bad), a CRC-32 of the pixels the
encoder sees, and a digest of all this, its place and the parts. So a row that a killed writer has half written, one of
another cache and one with a flipped bit are told from a whole one wherever they are met: when the row is read. And a
sample that has changed since shows other pixels than its row was made from, and is tokenized in training instead.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bevt_fast.errors import DataError

FORMAT = 1
CHUNK = 256  # rows that one writer claims, and that are called done together
MAKE_ANEW = "remove that file and run `python bevt_fast/prepare.py tokens` again, which keeps every row that fits"
UNKNOWN = -1  # the id of every cell of a view the cache cannot answer for

Parts = dict[str, Any]  # what ids depend on, by name; JSON values


def row_type(cells: tuple[int, ...], vocab_size: int) -> np.dtype:
    """One row: `cells` are (g, g) of an image, (T, g, g) of a clip."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
    return np.dtype([("digest", "<u8"), ("file", "<u4"), ("pixels", "<u4"), ("ids", ids, cells)])


def checksum(pixels: np.ndarray) -> int:
    """Of what the encoder sees of a sample, uint8, C-contiguous."""
    return zlib.crc32(np.ascontiguousarray(pixels).data)


class TokenCache:
    """The finished cache of one stream, for reading; made by `open_cache`. The process that reads opens the file."""

    def __init__(self, path: Path, stream: str, views: int, key: bytes, row: np.dtype, command: str):
        self.path, self.views, self.row = path / f"{stream}.npy", views, row
        self._key, self._command = key, command
        self._file: int | None = None
        self._start = 0

    def ids(self, epoch: int, index: int, file: int, pixels: np.ndarray) -> np.ndarray:
        """The ids (cells) int64 of sample `index` in pass `epoch`, read as `pixels` from `file` (an index as well).

        All UNKNOWN where the row was made from another file or other pixels. Raises DataError for a damaged row.
        """
        number = index * self.views + epoch % self.views
        row = self._read(number)[0]
        if int(row["file"]) != file or int(row["pixels"]) != checksum(pixels):
            return np.full(row["ids"].shape, UNKNOWN, np.int64)
        return row["ids"].astype(np.int64)

    def _read(self, number: int) -> np.ndarray:
        try:
            if self._file is None:
                self._file, self._start = os.open(self.path, os.O_RDONLY), _start(self.path)
            # not mapped into memory: a file that is cut short under a run would end it by a signal
            rows = _rows(self._file, self._start, number, 1, self.row)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path} cannot be read: {error}; {_again(self._command)}") from None
        if not _whole(rows, number, self._key)[0]:
            raise DataError(f"{self.path} is damaged: row {number} is not as it was written; {_again(self._command)}")
        return rows


def open_cache(path: str | Path, stream: str, parts: Parts, cells: tuple[int, ...], vocab_size: int) -> TokenCache:
    """The cache of one stream, if it is whole and was made of `parts`. Raises DataError that says what differs, or how
    it is completed. Rows are checked when they are read.
    """
    path = Path(path)
    header = _header(path, stream)
    if header is None:
        raise DataError(
            f"data.token_cache: {path} holds no cache of {stream}; make it with `python bevt_fast/prepare.py tokens "
            f"--config FILE --out {path}`, or leave the key out"
        )
    _require_same(path, header["parts"], parts)
    count, row = parts["files"] * parts["data.views"], row_type(cells, vocab_size)
    command = str(header.get("command", ""))
    _require_length(path / f"{stream}.npy", count, row, command)
    try:
        done = (path / f"{stream}.done").read_bytes()
    except OSError:
        done = b""
    if len(done) != math.ceil(count / CHUNK) or done.count(1) != len(done):
        share = min(done.count(1) * CHUNK / count, 0.99)
        raise DataError(f"data.token_cache: {path} is not finished ({share:.0%} of {stream}); `{command}` completes it")
    return TokenCache(path, stream, parts["data.views"], _key(parts), row, command)


class CacheWriter:
    """The cache of one stream, being written; any number of processes at once may, on any machines that share locks.

    A chunk belongs to the process that holds the lock on its byte of STREAM.done, and to nobody when that process ends.
    """

    def __init__(
        self, path: str | Path, stream: str, parts: Parts, cells: tuple[int, ...], vocab_size: int, command: str
    ):
        """Raises DataError if `path` holds a cache of other parts, or cannot be written."""
        self.path, self.stream, self.count = Path(path), stream, parts["files"] * parts["data.views"]
        self.row, self._key = row_type(cells, vocab_size), _key(parts)
        self.chunks = math.ceil(self.count / CHUNK)
        self._seen: set[int] = set()  # chunks that are whole, as this process has seen
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._start = self._create_or_mend(parts, command)
            self._rows = os.open(self.path / f"{stream}.npy", os.O_RDWR)
            self._done = os.open(self.path / f"{stream}.done", os.O_RDWR)
        except OSError as error:
            raise DataError(f"cannot write a token cache to {self.path}: {error.strerror or error}") from None

    def missing(self) -> Iterator[tuple[int, int, list[int]]]:
        """Each chunk that this process can claim: its number, how many rows it has, and the numbers of those it lacks
        or that are damaged.

        Looks once at every row, also of chunks that are done. The caller writes the rows and calls `finish`.
        """
        for chunk in range(self.chunks):
            if chunk in self._seen:
                continue
            try:
                fcntl.lockf(self._done, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, chunk)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                continue  # another process is at it
            first = chunk * CHUNK
            rows = _rows(self._rows, self._start, first, min(CHUNK, self.count - first), self.row)
            lacking = [first + k for k, whole in enumerate(_whole(rows, first, self._key)) if not whole]
            yield chunk, len(rows) - len(lacking), lacking

    def write(self, numbers: list[int], ids: np.ndarray, files: list[int], pixels: list[int]) -> None:
        """Rows by number: ids (n, cells), indices of the files they were read from, and `checksum` of the pixels."""
        rows = np.zeros(len(numbers), self.row)
        rows["ids"], rows["file"], rows["pixels"] = ids, files, pixels
        for k, number in enumerate(numbers):
            rows["digest"][k] = _digest(rows[k], number, self._key)
            if os.pwrite(self._rows, rows[k].tobytes(), self._start + number * self.row.itemsize) != self.row.itemsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def finish(self, chunk: int) -> None:
        """All rows of the chunk are written: on the disk first, then called done."""
        os.fdatasync(self._rows)
        os.pwrite(self._done, b"\x01", chunk)
        fcntl.lockf(self._done, fcntl.LOCK_UN, 1, chunk)
        self._seen.add(chunk)

    def is_complete(self) -> bool:
        """Whether every chunk is done, by this process or by another."""
        return os.pread(self._done, self.chunks, 0).count(1) == self.chunks

    def close(self) -> None:
        """Lets go of the files and of every claim."""
        os.close(self._rows)
        os.close(self._done)

    def _create_or_mend(self, parts: Parts, command: str) -> int:
        """Files of the right length and kind, the header last: without it there is no cache. Returns where the rows
        start; those of a file that was cut short are missing.
        """
        rows, done = (self.path / f"{self.stream}.{ending}" for ending in ("npy", "done"))
        header = _header(self.path, self.stream)
        if header is not None:
            _require_same(self.path, header["parts"], parts)
        try:
            start = _start(rows)
            size = rows.stat().st_size
        except (OSError, ValueError):
            start, size = _write_start(rows, self.row, self.count), 0
        whole = header is not None and size == start + self.count * self.row.itemsize
        if not whole or not done.exists() or done.stat().st_size != self.chunks:
            done.write_bytes(bytes(self.chunks))
            os.truncate(rows, start + self.count * self.row.itemsize)
            aside = self.path / f".{self.stream}.json"
            aside.write_text(json.dumps({"parts": parts, "command": command}, indent=1) + "\n")
            os.replace(aside, self.path / f"{self.stream}.json")
        return start


def _header(path: Path, stream: str) -> dict[str, Any] | None:
    """What STREAM.json says; None where there is none. Raises DataError for one that is not such a header."""
    file = path / f"{stream}.json"
    try:
        values = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read: {error}; {MAKE_ANEW}") from None
    if not isinstance(values, dict) or not isinstance(values.get("parts"), dict):
        raise DataError(f"{file} is not that of a token cache; {MAKE_ANEW}")
    return values


def _require_same(path: Path, there: Parts, here: Parts) -> None:
    names = [*here, *(name for name in there if name not in here)]
    differences = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]
    if differences:
        raise DataError(
            f"the token cache {path} was made of something else: {'; '.join(differences)}; name another directory, "
            "make a cache for this run with `python bevt_fast/prepare.py tokens`, or take the change back"
        )


def _require_length(file: Path, count: int, row: np.dtype, command: str) -> None:
    """Raises DataError unless the file has exactly `count` rows of this type."""
    try:
        expected = _start(file) + count * row.itemsize
        found = file.stat().st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}; {_again(command)}") from None
    if found != expected:
        raise DataError(
            f"{file} has {found:,} bytes where {expected:,} are expected, so it was cut short or is another file; "
            f"{_again(command)}"
        )


def _start(file: Path) -> int:
    """Where the rows begin. Raises ValueError for another kind of file."""
    with open(file, "rb") as opened:
        if np.lib.format.read_magic(opened) != (1, 0):
            raise ValueError("it is of another version of the .npy format")
        np.lib.format.read_array_header_1_0(opened)
        return opened.tell()


def _write_start(file: Path, row: np.dtype, count: int) -> int:
    """The header of a .npy file of `count` rows, leaving what follows; returns where the rows begin."""
    with open(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as opened:
        described = {"descr": np.lib.format.dtype_to_descr(row), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(opened, described)
        return opened.tell()


def _rows(file: int, start: int, first: int, count: int, row: np.dtype) -> np.ndarray:
    data = os.pread(file, count * row.itemsize, start + first * row.itemsize)
    if len(data) != count * row.itemsize:
        raise ValueError(f"it ends within row {first + len(data) // row.itemsize}")
    return np.frombuffer(data, row)


def _whole(rows: np.ndarray, first: int, key: bytes) -> list[bool]:
    return [int(row["digest"]) == _digest(row, first + k, key) for k, row in enumerate(rows)]


def _digest(row: np.void, number: int, key: bytes) -> int:
    hasher = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=key)
    hasher.update(row.tobytes()[8:])
    return int.from_bytes(hasher.digest(), "little")


def _key(parts: Parts) -> bytes:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def _again(command: str) -> str:
    return f"`{command}` mends it"
