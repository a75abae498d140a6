"""What can be wrong with a file of the data: a BadFile, of a kind that says what may be done about it."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import av

from bevt_fast.data.packed import File, Packed, is_empty

KINDS = ("missing", "empty", "unreadable", "no_video", "truncated", "too_short", "corrupt", "io", "crash")
# reading again may help with these, and with no other fault
PASSING_FAULTS = {"io"}
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}

Read = TypeVar("Read")


class BadFile(Exception):
    """A file that cannot be used, for a reason of one of KINDS."""

    def __init__(self, kind: str, path: File, reason: str):
        super().__init__(kind, str(path), reason)  # plain arguments, so that it travels between processes
        self.kind, self.path, self.reason = kind, str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.reason}"


@contextlib.contextmanager
def faults(path: File, kind: str) -> Iterator[None]:
    """Turns every failure to read `path` into a BadFile, of kind `kind` where nothing more is known."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe, or read a device, could take for ever
            raise BadFile("unreadable", path, "not a regular file")
        yield
    except BadFile:
        raise
    except FileNotFoundError:
        raise BadFile("missing", path, "no such file") from None
    except Exception as error:  # FFmpeg and Pillow raise a dozen unrelated classes on damaged files
        if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
            raise  # FFmpeg's own says that a damaged file claims more than any memory holds
        if is_empty(path):
            raise BadFile("empty", path, "0 bytes") from None
        if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
            kind = "io"
        elif "truncated" in str(error).lower():  # Pillow's word
            kind = "truncated"
        raise BadFile(kind, path, f"{type(error).__name__}: {error}".split("; last error log")[0]) from None


def or_bad(read: Callable[..., Read], *arguments: Any) -> Read | BadFile:
    """`read(*arguments)`, or the BadFile it raises."""
    try:
        return read(*arguments)
    except BadFile as error:
        return error


def twice(read: Callable[[], Read]) -> Read:
    """`read()`, once more after a second where the fault may pass (NEEDS D15)."""
    try:
        return read()
    except BadFile as error:
        if error.kind not in PASSING_FAULTS:
            raise
        time.sleep(1.0)
        return read()


def read_bytes(path: File) -> bytes:
    """The content of a file, read once more after a second where the fault may pass: no hiccup of the storage may
    decide which decoder's pixels a sample has. Raises OSError.
    """
    try:
        return _content(path)
    except OSError as error:
        if error.errno not in PASSING_ERRORS:
            raise
        time.sleep(1.0)
        return _content(path)


def _content(path: File) -> bytes:
    if isinstance(path, Packed):
        return path.read_bytes()
    with open(path, "rb") as file:
        return file.read()
