"""Two endless streams paired into joint batches, read ahead by worker processes.

A worker is given the number of a micro-batch and returns it whole, as bytes; the training process makes numbers of them
on its device. On a GPU with data.decoder "dali" the workers return files instead, and `graph.py` decodes them there.
Which process reads what changes no batch: that is decided in `reader.py`.
"""

import contextlib
import functools
import gc
import itertools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bevt_fast.config import Config, Data
from bevt_fast.data import pace, pipeline, pipeline_reference
from bevt_fast.data.batch import Clips, Images, JointBatch, send, unknown
from bevt_fast.data.graph import GraphFeed, GraphReader
from bevt_fast.data.pace import Busy, Pace
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sources import Source
from bevt_fast.data.token_cache import TokenCache
from bevt_fast.errors import DataError, MachineError, UserError

MAX_RESTARTS = 3  # of a stream's worker pool, besides those that a file is at fault for (NEEDS F08)

logger = logging.getLogger(__name__)


class Loader:
    """An endless iterator of JointBatch, one a micro-batch, starting exactly at `first_step`: pixels on `device`, masks
    on the CPU.

    `sources` maps "clips" and "images" to a Source or None. `heldout=True` reads sources of samples never trained on:
    always the same views, without augmentation. The encoder's pixels are of `dtype`. `in_graph` says whether DALI cuts
    the views on the device; None: on a GPU with data.decoder "dali".
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
        caches: Mapping[str, TokenCache] | None = None,
        dtype: torch.dtype = torch.float32,
        in_graph: bool | None = None,
    ):
        self.device, self.dtype = torch.device(device), dtype
        self.not_cached = 0  # samples whose targets the caches did not have
        self._records: list[dict[str, Any]] = []
        self._feeds: dict[str, Feed | GraphFeed] = {}
        self._busy: dict[str, Busy] = {}
        self._cutting = 0.0
        self._stopwatch = pace.Stopwatch(self.device)
        self._since: float | None = None  # when the interval of `pace` began
        self.data, in_graph = _possible(config, self.device, in_graph)
        config = config.model_copy(update={"data": self.data})
        for name in ("clips", "images"):
            source = sources.get(name)
            if source is None or getattr(config, name) is None:
                continue
            if not len(source):
                raise DataError(f"{name}: the source {source.name!r} has no files")
            where: dict[str, Any] = {"rank": rank, "world_size": world_size, "heldout": heldout}
            if in_graph:
                reader = GraphReader(config, name, source, device=self.device, **where)
                pool = Feed(reader, first_step * reader.accumulation, self.data, pin=False)
                finish = functools.partial(self._batch, name)
                self._feeds[name] = GraphFeed(reader, pool, finish, self.data.prefetch)
                continue
            reader = StreamReader(config, name, source, **where)
            reader.token_views = self.device.type == "cpu"  # a GPU has the same bits sooner
            reader.take_targets_from((caches or {}).get(name))
            pin = self.device.type == "cuda"
            self._feeds[name] = Feed(reader, first_step * reader.accumulation, self.data, pin)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> JointBatch:
        items = self._items()
        batches: dict[str, Any] = {name: item.get("batch") or self._batch(name, **item) for name, item in items.items()}
        return JointBatch(images=batches.get("images"), clips=batches.get("clips"))

    def _items(self) -> dict[str, dict[str, Any]]:
        """The next item of each stream, and what came with it written down."""
        items = {}
        for name, feed in self._feeds.items():
            with self._stopwatch.waiting(name):
                items[name] = feed.next()
        for name, item in items.items():
            self._records += item["bad"]
            self._busy[name] = self._busy.get(name, Busy()).plus(item["busy"])
            self._cutting += item.get("cutting", 0.0)
            for codec in item["left_to_pyav"]:
                _warn(f"DALI does not decode {codec} here: PyAV reads such files, on the CPU")
        if self._since is None:  # workers start and caches fill once: no figure of the training
            self.pace()
        return items

    @property
    def bad_files(self) -> list[dict[str, Any]]:
        """The records of bad files since this was last read: reading hands them over and forgets them."""
        records, self._records = self._records, []
        return records

    @property
    def restarts(self) -> int:
        """How many times a pool of workers was rebuilt because one of them died."""
        return sum(_pool(feed).restarts for feed in self._feeds.values())

    def pace(self) -> Pace:
        """What was waited for data since this was last asked, and why; the first batch does not count."""
        now, waited = time.perf_counter(), self._stopwatch.taken()
        stream = max(waited, key=lambda name: waited[name]) if waited else next(iter(self._feeds), "")
        trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = Pace(
            seconds=now - (now if self._since is None else self._since),
            waited=sum(waited.values()),
            stream=stream,
            busy=self._busy.get(stream, Busy()),
            cutting=self._cutting,
            workers=self.data.workers,
            processes=trainers * (1 + self.data.workers * len(self._feeds)),
            cores=pace.cores(),
        )
        self._since, self._busy, self._cutting = now, {}, 0.0
        return found

    def close(self) -> None:
        """Ends the worker processes. The loader gives no batch afterwards."""
        for feed in self._feeds.values():
            feed.close()

    def _batch(
        self,
        name: str,
        pixels: Tensor,
        mask: Tensor,
        token_pixels: Tensor | None = None,
        known: Tensor | None = None,
        **_: Any,
    ) -> Images | Clips:
        """Bytes (B, [T,] S, S, 3) as numbers on the device; token pixels of those samples alone that no cache knows."""
        pixels = pixels.to(self.device, non_blocking=True)
        if token_pixels is None:
            missing = ... if known is None else send(unknown(known), self.device)
            token_pixels = pipeline_reference.half_token_view(pixels[missing])
        if known is not None:
            self.not_cached += len(token_pixels)
        token_pixels = pipeline_reference.map_pixels(token_pixels.to(self.device, non_blocking=True))
        if name == "images":
            return Images(pipeline_reference.normalise(pixels).to(self.dtype), token_pixels, mask, known)
        return Clips(pipeline_reference.normalise(pixels, channels=-4).to(self.dtype), token_pixels, mask, known)


def _pool(feed: "Feed | GraphFeed") -> Any:
    return feed.pool if isinstance(feed, GraphFeed) else feed


def _possible(config: Config, device: torch.device, in_graph: bool | None) -> tuple[Data, bool]:
    """The data section this machine can do, and whether DALI cuts the views; says once what it cannot do."""
    if config.data.decoder != "dali":
        return config.data, False
    wanted = device.type == "cuda" if in_graph is None else in_graph
    problem = pipeline.lacking(device)
    if problem is None:
        # cached ids belong to the very pixels the workers cut, and a GPU's are not the same bits
        return config.data, wanted and config.data.token_cache is None
    _warn(f"{problem}; until then the workers decode on the CPU")
    with contextlib.suppress(MachineError):
        pipeline.require()
        return config.data, False
    return config.data.model_copy(update={"decoder": "pyav"}), False


@functools.cache
def _warn(sentence: str) -> None:
    logger.warning("%s", sentence)


class Feed:
    """The worker pool of one stream: items in order, rebuilt where it stands if a worker is killed."""

    def __init__(self, reader: StreamReader, first: int, data: Data, pin: bool):
        self.reader, self.position, self.data, self.pin = reader, first, data, pin
        self.restarts = 0
        self._unexplained = 0  # deaths that no file is known to be at fault for
        self._items: Iterator[Any] | None = None
        self._workers: list[Any] = []

    def next(self) -> dict[str, Any]:
        """The next item. Raises DataError for an error meant for the user, or after too many killed workers."""
        while True:
            if self._items is None:
                self.start()
            try:
                item = next(self._items)  # type: ignore[arg-type]
            except (RuntimeError, OSError, EOFError) as error:  # the last two: a dead worker's batch cannot be fetched
                if not any_dead(self._workers):
                    raise
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

    def start(self) -> None:
        """Forks the workers; they read from where the stream stands."""
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
        self.reader.crashes.watch(self.data.workers)
        self._items, self._workers = fork(loader)

    def _restart(self, error: Exception) -> None:
        dead = {w.pid for w in self._workers if w.exitcode not in (None, -signal.SIGKILL)}
        self.close()
        self.restarts += 1
        # a file that is found out explains this death and the one before
        self._unexplained += -1 if self.reader.crashes.blame(dead) else 1
        if self._unexplained > MAX_RESTARTS:
            raise DataError(
                f"{self.reader.name}: a loader process died {self.restarts} times ({first_line(error)}); "
                "if memory or /dev/shm ran out, lower data.workers or data.prefetch"
            ) from None


class _From(Iterable[int]):
    """All numbers from `first`."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _as_it_is(item: Any) -> Any:
    return item


def _settle(worker: int) -> None:
    """In a new worker: one thread, and signals left to the trainer, which ends its workers when it has saved."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def fork(loader: DataLoader) -> tuple[Iterator[Any], list[BaseProcess]]:
    """The items of a loader, and the workers it has forked to read them."""
    # a decoder with threads that is garbage here must not be freed in a worker: it would wait for threads for ever
    gc.collect()
    gc.freeze()  # else a worker's first whole collection writes to every object it inherited: its own copy of each page
    try:
        with _sigchld_unchanged():
            items = iter(loader)
    finally:
        gc.unfreeze()
    # its own list, private as it is: multiprocessing.active_children() forgets a worker that is dead already
    return items, list(getattr(items, "_workers", ()))


def any_dead(workers: list[BaseProcess]) -> bool:
    """Whether what `fork`'s items raised is a worker's death, not an error inside one: the death may come later."""
    return bool(multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1.0))


@contextlib.contextmanager
def _sigchld_unchanged() -> Iterator[None]:
    """torch's handler would raise wherever the trainer is when a worker dies; whoever takes its items finds out."""
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
