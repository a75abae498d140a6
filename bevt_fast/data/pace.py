"""How long training waited for data, and what would help: told from what the reading processes did meanwhile."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

IDLE = 0.8  # a pool of workers that is at work for less of the time than this is not what training waits for
BLOCKED = 0.5  # share of their time in which workers wait for files, from which on storage is to blame
CROWDED = 0.1  # share of their time in which workers wait for a core, from which on there is none to spare

Result = TypeVar("Result")


class Busy(NamedTuple):
    """Seconds a process spent on data."""

    wall: float = 0.0
    cpu: float = 0.0  # computing
    queued: float = 0.0  # ready to compute, while every core was taken

    def plus(self, other: "Busy") -> "Busy":
        return Busy(*(a + b for a, b in zip(self, other)))

    @property
    def blocked(self) -> float:
        """Share of the time in which it neither computed nor could: it waited for files."""
        return max(1 - (self.cpu + self.queued) / self.wall, 0.0) if self.wall else 0.0


class Pace(NamedTuple):
    """One interval between two log lines, of one process."""

    seconds: float  # its length
    waited: float  # of these, for data
    stream: str  # that was waited for most
    busy: Busy  # what this stream's workers, taken together, did
    cutting: float  # seconds in which DALI decoded and cut on the training device
    workers: int  # of each stream
    processes: int  # that read or train on this machine
    cores: int  # of this machine that these may use

    def advice(self) -> str:
        """The likely cause of the waiting and the setting to change, as half a sentence."""
        if not self.workers:
            return "the training process itself reads the files; raise data.workers"
        transcode = "rewrite the files with bevt_fast/prepare.py transcode (near keyframes, small pictures)"
        if self.cutting > IDLE * self.seconds:
            return f"decoding {self.stream} takes all the GPU's decoders give; {transcode}"
        if self.busy.wall < IDLE * self.workers * self.seconds:
            return f"batches of {self.stream} come in bursts while workers stand idle between; raise data.prefetch"
        if self.busy.blocked > BLOCKED:
            return (
                f"the workers of {self.stream} spend {self.busy.blocked:.0%} of their time waiting for storage; put "
                "the files on a faster disk, or raise data.workers so that more is asked of it at once"
            )
        if self.busy.queued < CROWDED * self.busy.wall and self.processes < self.cores:
            needed = math.ceil(self.workers * self.seconds / max(self.seconds - self.waited, 0.1 * self.seconds))
            return (
                f"all workers of {self.stream} are busy and {self.cores - self.processes} of {self.cores} cores are "
                f"free; raise data.workers to {max(min(needed, self.cores), self.workers + 1)}"
            )
        return (
            f"decoding {self.stream} takes all {self.cores} cores; {transcode}, or decode on a GPU with data.decoder "
            '"dali"'
        )


def measured(read: Callable[[], Result]) -> tuple[Result, Busy]:
    """What `read` returns, and what this process did meanwhile."""
    wall, cpu, queued = time.perf_counter(), time.process_time(), _queued()
    result = read()
    return result, Busy(time.perf_counter() - wall, time.process_time() - cpu, _queued() - queued)


def cores() -> int:
    """The cores this process may use: its affinity, or the quota of its container if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, max(int(quota) // int(period), 1))  # "max" is no number: no quota
    return count


class Stopwatch:
    """Adds up the seconds in which `device` had nothing to do because the host waited for data, by stream.

    On a GPU that is not the host's wait: work queued before goes on meanwhile. Two marks in the GPU's queue, one before
    the wait and one after it, are apart by what the GPU stood idle.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def waiting(self, stream: str):
        if self.device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record(torch.cuda.current_stream(self.device))
            yield
            after.record(torch.cuda.current_stream(self.device))
            self._marks.append((stream, before, after))
            return
        start = time.perf_counter()
        yield
        self._add(stream, time.perf_counter() - start)

    def taken(self) -> Mapping[str, float]:
        """The seconds since this was last called, by stream."""
        for stream, before, after in self._marks:
            after.synchronize()
            self._add(stream, before.elapsed_time(after) / 1e3)
        seconds, self._seconds, self._marks = self._seconds, {}, []
        return seconds

    def _add(self, stream: str, seconds: float) -> None:
        self._seconds[stream] = self._seconds.get(stream, 0.0) + seconds


def _queued() -> float:
    """Seconds this process was ready to run and did not; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9
    return 0.0
