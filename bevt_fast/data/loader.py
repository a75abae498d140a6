"""Two endless streams paired into joint batches, read ahead by worker processes.

A worker is given the number of a micro-batch and returns it whole, as bytes; the training process makes numbers of them
on its device. Which process reads what changes no batch: that is decided in `reader.py`.
"""

import contextlib
import functools
import gc
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from bevt_fast.config import Config, Data
from bevt_fast.data import pipeline_reference
from bevt_fast.data.batch import Clips, Images, JointBatch
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError, UserError

MAX_RESTARTS = 3  # of a stream's worker pool (NEEDS F08)

logger = logging.getLogger(__name__)


class Loader:
    """An endless iterator of JointBatch, one a micro-batch, starting exactly at `first_step`: pixels on `device`, masks
    on the CPU.

    `sources` maps "clips" and "images" to a Source or None. `heldout=True` reads sources of samples never trained on:
    always the same views, without augmentation.
    """

    def __init__(
        self,
        config: Config,
        sources: Mapping[str, Source | None],
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        first_step: int = 0,
        heldout: bool = False,
    ):
        self.waited = 0.0  # seconds spent waiting for data; the reader sets it back to 0
        self.device = torch.device(device)
        self._records: list[dict[str, Any]] = []
        self._feeds: dict[str, _Feed] = {}
        for name in ("clips", "images"):
            source = sources.get(name)
            if source is None or getattr(config, name) is None:
                continue
            if not len(source):
                raise DataError(f"{name}: the source {source.name!r} has no files")
            reader = StreamReader(config, name, source, rank=rank, world_size=world_size, heldout=heldout)
            first = first_step * reader.accumulation
            self._feeds[name] = _Feed(reader, first, config.data, pin=self.device.type == "cuda")

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> JointBatch:
        start = time.perf_counter()
        items = {name: feed.next() for name, feed in self._feeds.items()}
        self.waited += time.perf_counter() - start
        for item in items.values():
            self._records += item["bad"]
            for codec in item["left_to_pyav"]:
                _warn(f"DALI does not decode {codec} here: PyAV reads such files, on the CPU")
        return JointBatch(
            images=self._images(items["images"]) if "images" in items else None,
            clips=self._clips(items["clips"]) if "clips" in items else None,
        )

    @property
    def bad_files(self) -> list[dict[str, Any]]:
        """The records of bad files since this was last read: reading hands them over and forgets them."""
        records, self._records = self._records, []
        return records

    @property
    def restarts(self) -> int:
        """How many times a pool of workers was rebuilt because one of them died."""
        return sum(feed.restarts for feed in self._feeds.values())

    def close(self) -> None:
        """Ends the worker processes. The loader gives no batch afterwards."""
        for feed in self._feeds.values():
            feed.close()

    def _images(self, item: dict[str, Any]) -> Images:
        pixels, token_pixels = (item[k].to(self.device, non_blocking=True) for k in ("pixels", "token_pixels"))
        normalised = pipeline_reference.normalise(pixels).contiguous()
        return Images(normalised, pipeline_reference.map_pixels(token_pixels).contiguous(), item["mask"])

    def _clips(self, item: dict[str, Any]) -> Clips:
        pixels, token_pixels = (item[k].to(self.device, non_blocking=True) for k in ("pixels", "token_pixels"))
        normalised = pipeline_reference.normalise(pixels).transpose(1, 2).contiguous()  # (B, 3, T, H, W)
        return Clips(normalised, pipeline_reference.map_pixels(token_pixels).contiguous(), item["mask"])


@functools.cache
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


class _Feed:
    """The worker pool of one stream: items in order, rebuilt where it stands if a worker is killed."""

    def __init__(self, reader: StreamReader, first: int, data: Data, pin: bool):
        self.reader, self.position, self.data, self.pin = reader, first, data, pin
        self.restarts = 0
        self._items: Iterator[Any] | None = None
        self._workers: list[Any] = []

    def next(self) -> dict[str, Any]:
        """The next item. Raises DataError for an error meant for the user, or after too many killed workers."""
        while True:
            if self._items is None:
                self._start()
            try:
                item = next(self._items)  # type: ignore[arg-type]
            except (RuntimeError, OSError, EOFError) as error:  # the last two: a dead worker's batch cannot be fetched
                if not multiprocessing.connection.wait([worker.sentinel for worker in self._workers], timeout=1.0):
                    raise  # an error inside a worker, not its death
                self._restart(error)
                continue
            self.position += 1
            if isinstance(item, UserError):
                raise item
            return item

    def close(self) -> None:
        self._items = None  # the iterator ends its workers when it goes
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()  # workers are deaf to SIGTERM
            worker.join()
        self._workers = []

    def _start(self) -> None:
        several = self.data.workers > 0
        loader = DataLoader(
            self.reader,
            batch_size=None,
            sampler=_From(self.position),
            num_workers=self.data.workers,
            prefetch_factor=self.data.prefetch if several else None,
            collate_fn=_as_it_is,
            pin_memory=self.pin,
            worker_init_fn=_settle if several else None,
            # its own generator: the loader must not draw from the one that dropout uses
            generator=torch.Generator(),
        )
        # a decoder with threads that is garbage here must not be freed in a worker: it would wait for threads for ever
        gc.collect()
        before = set(multiprocessing.active_children())
        with _sigchld_unchanged():
            self._items = iter(loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]

    def _restart(self, error: Exception) -> None:
        self.close()
        self.restarts += 1
        if self.restarts > MAX_RESTARTS:
            raise DataError(
                f"{self.reader.name}: a loader process died {self.restarts} times ({_first_line(error)}); "
                "if memory or /dev/shm ran out, lower data.workers or data.prefetch"
            ) from None


class _From(Iterable[int]):
    """All numbers from `first`."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_it_is(item: Any) -> Any:
    return item


def _settle(worker: int) -> None:
    """In a new worker: one thread, and signals left to the trainer, which ends its workers when it has saved."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def _sigchld_unchanged() -> Iterator[None]:
    """torch's handler would raise wherever the trainer is when a worker dies; `_Feed.next` finds out by itself."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
