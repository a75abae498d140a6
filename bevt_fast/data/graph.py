"""The GPU's data path: workers draw and read bytes, DALI decodes and cuts on the training device, a thread runs ahead.

A worker prepares everything that needs no GPU: draws, masks, the file's bytes, and decoded pictures where DALI does not
take the file. A thread of the training process feeds them to `pipeline.DaliCrops`, on a CUDA stream of its own, so that
batch n + 1 is decoded while step n computes. Which sample stands where, and which substitute where a file is bad, is
decided by `reader.py` as everywhere. With DALI's CPU operators the same lines run on a CPU.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from bevt_fast.config import Config
from bevt_fast.data import pipeline
from bevt_fast.data.faults import BadFile, or_bad
from bevt_fast.data.pipeline import DaliCrops
from bevt_fast.data.reader import Draw, Slot, StreamReader
from bevt_fast.data.sampling import Place
from bevt_fast.data.sources import Source

THREADS = 8  # of a decoding pipeline on a GPU: an H100 has 7 video decoders
LARGE = ("encoded", "pictures")  # the inputs that travel in shared memory


class Prepared(NamedTuple):
    """One sample, ready for the graph: its inputs by name, as in `pipeline.build`."""

    slot: Slot
    drawn: Draw
    inputs: dict[str, np.ndarray]


class Pool(Protocol):
    """Where the items of a reader come from, in order."""

    def start(self) -> None: ...
    def next(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class GraphReader(StreamReader):
    """A stream whose items are prepared samples: `samples` for `unpack`, besides `bad` and `busy`."""

    def __init__(self, config: Config, stream: str, source: Source, *, device: torch.device, **where: Any):
        super().__init__(config, stream, source, **where)
        self.device = device

    def item(self, places: Sequence[Place], bad: list[dict[str, Any]]) -> dict[str, Any]:
        slots = [Slot(place, place.index) for place in places]
        return {"samples": pack(self.fill(slots, lambda some: [or_bad(self.prepare, slot) for slot in some], bad))}

    def prepare(self, slot: Slot) -> Prepared:
        """Draws the sample and reads its file. Raises BadFile."""
        drawn = self.draw(*slot.place, slot.file)
        with contextlib.suppress(OSError):  # PyAV finds the words for a file that cannot be read
            if self.dali is not None and self._is_for_dali(slot.file):
                return Prepared(slot, drawn, self.dali.inputs(self._job(drawn, slot.file)))
        return self.decoded(slot, drawn)

    def decoded(self, slot: Slot, drawn: Draw) -> Prepared:
        """The sample with pictures that PyAV or Pillow decoded. Raises BadFile."""
        inputs = pipeline.view_inputs(self.kind, drawn.crop, self.order)
        return Prepared(slot, drawn, {"pictures": self.pictures(drawn, slot.file), **inputs})

    def _is_for_dali(self, file: int) -> bool:
        takes = pipeline.takes_on_gpu if self.device.type == "cuda" else pipeline.takes
        found = self._probed(file)
        if not takes(found):
            self._left_to_pyav.add(found.codec)
            return False
        path = self.source.file(file)
        size = os.stat(path).st_size if isinstance(path, str) else 0  # what is packed with others is small
        return size <= pipeline.LARGEST_FILE


def pack(samples: Sequence[Prepared]) -> tuple[list[tuple[Prepared, str, tuple[int, ...]]], Tensor]:
    """The samples without their large inputs, and those in one tensor, which processes share instead of copying."""
    small, large = [], []
    for slot, drawn, inputs in samples:
        (name,) = (name for name in LARGE if name in inputs)
        rest = {key: value for key, value in inputs.items() if key != name}
        small.append((Prepared(slot, drawn, rest), name, inputs[name].shape))
        large.append(torch.from_numpy(inputs[name]).flatten())
    return small, torch.cat(large)


def unpack(packed: tuple[list[tuple[Prepared, str, tuple[int, ...]]], Tensor]) -> list[Prepared]:
    """What was packed; the large inputs are views."""
    samples, shared = packed
    ends = np.cumsum([int(np.prod(shape)) for _, _, shape in samples])
    large = np.split(shared.numpy(), ends[:-1])
    return [
        sample._replace(inputs={name: array.reshape(shape), **sample.inputs})
        for (sample, name, shape), array in zip(samples, large)
    ]


class GraphFeed:
    """Items with a finished `batch` on the device, made ahead of time by a thread from what the workers prepared."""

    def __init__(self, reader: GraphReader, pool: Pool, finish: Callable[[Tensor, Tensor], Any], ahead: int):
        """`finish` makes the batch of crops (B, [T,] S, S, 3) uint8 and masks; `ahead` finished ones are kept."""
        self.reader, self.pool, self.finish = reader, pool, finish
        on_gpu = reader.device.type == "cuda"
        size, batch = reader.view.size, reader.split["micro_batch"]
        self.crops = DaliCrops(reader.kind, size, batch, reader.device, THREADS if on_gpu else 1)
        self.stream = torch.cuda.Stream(reader.device) if on_gpu else None
        self._made: queue.Queue[dict[str, Any] | BaseException] = queue.Queue(ahead)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def next(self) -> dict[str, Any]:
        """The next item. Raises what the workers or the thread raised."""
        if self._thread is None:
            self.pool.start()  # here and not in the thread: signals are the main thread's
            self._thread = threading.Thread(target=self._run, name=f"data {self.reader.name}", daemon=True)
            self._thread.start()
        item = self._made.get()
        if isinstance(item, BaseException):
            raise item
        if self.stream is not None:
            for tensor in item["batch"]:
                if (
                    tensor is not None and tensor.is_cuda
                ):  # its memory is not given away before the step that uses it is through
                    tensor.record_stream(torch.cuda.current_stream(self.reader.device))
        return item

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=30)
        self.pool.close()

    def _run(self) -> None:
        # current streams are a thread's own; without a GPU this context does nothing
        with torch.no_grad(), torch.cuda.stream(self.stream):
            while not self._over.is_set():
                try:
                    made = self._make(self.pool.next())
                except BaseException as error:  # it is the training thread's to raise
                    made = error
                while not self._over.is_set():
                    with contextlib.suppress(queue.Full):
                        self._made.put(made, timeout=0.1)
                        break
                if isinstance(made, BaseException):
                    return

    def _make(self, item: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        ready = {sample.slot: sample for sample in unpack(item.pop("samples"))}
        cut = self.reader.fill(list(ready), lambda slots: self._cut(slots, ready), item["bad"])
        crops, masks = zip(*cut)
        batch = self.finish(torch.stack(crops), torch.from_numpy(np.stack(masks)))
        if self.stream is not None:
            self.stream.synchronize()  # so that nobody has to wait for this stream, and DALI's memory is its own again
        return item | {"batch": batch, "cutting": time.perf_counter() - start}

    def _cut(self, slots: Sequence[Slot], ready: dict[Slot, Prepared]) -> "list[tuple[Tensor, np.ndarray] | BadFile]":
        """Crop and mask of each slot: of what the worker prepared, or of what is prepared here for a substitute."""
        samples = [ready.pop(slot, None) or or_bad(self.reader.prepare, slot) for slot in slots]
        cut = self._crops(samples)
        for k, (sample, crop) in enumerate(zip(samples, cut)):
            if isinstance(sample, Prepared) and isinstance(crop, str):
                # DALI decodes from the file's beginning, so damage before the clip ends it: PyAV has the last word
                samples[k] = or_bad(self.reader.decoded, sample.slot, sample.drawn)
                cut[k : k + 1] = self._crops(samples[k : k + 1])
        return [
            (crop, sample.drawn.mask) if isinstance(sample, Prepared) and isinstance(crop, Tensor) else crop
            for sample, crop in zip(samples, cut)
        ]  # type: ignore[return-value]

    def _crops(self, samples: "Sequence[Prepared | BadFile]") -> "list[Tensor | str | BadFile]":
        good = [sample for sample in samples if isinstance(sample, Prepared)]
        crops = iter(self.crops([sample.inputs for sample in good]))
        return [next(crops) if isinstance(sample, Prepared) else sample for sample in samples]
