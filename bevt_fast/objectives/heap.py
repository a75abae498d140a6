"""Memory that a process has freed and the C library keeps: what comes next could find no place in its gaps."""

import ctypes
import functools
from typing import Any

import torch

WORTH_IT = 2**28  # bytes; to give back less than 256 MiB takes a small step longer than it is worth


class _Info(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def give_back(device: torch.device) -> None:
    """To the system, where it is much and this device's memory. Does nothing with another C library than glibc 2.33 and
    later.
    """
    library = _library() if device.type == "cpu" else None
    if library is not None and library.mallinfo2().fordblks >= WORTH_IT:
        library.malloc_trim(0)


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Info
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (AttributeError, OSError, TypeError):
        return None
    return library
