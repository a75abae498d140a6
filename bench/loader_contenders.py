"""Who can read the same frames of the same files into the same batches: ours, and what people write by hand.

A contender is given a `Workload` and a number of workers and yields batches (pixels, token pixels) on the device. All
of them read the samples that our draws name, so a difference is one of speed, or one of colours that `bench/loader.py`
measures.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bevt_fast.config import Config
from bevt_fast.data import pipeline, pipeline_reference, sampling
from bevt_fast.data.loader import Loader
from bevt_fast.data.reader import Draw, StreamReader
from bevt_fast.data.sources import Source

OURS, PLAIN = "ours, PyAV", "plain PyAV DataLoader"


class CannotRun(Exception):
    """Says why a contender is left out."""


@dataclass(frozen=True)
class Workload:
    """One stream to read: `config` with PyAV and no workers, and what the samples are."""

    stream: str  # clips or images
    config: Config
    source: Source
    device: torch.device

    def draws(self, count: int) -> list[tuple[Path, Draw]]:
        """File and draw of the first `count` samples."""
        reader, n = StreamReader(self.config, self.stream, self.source), len(self.source)
        places = [sampling.place(reader.seed, self.stream, position, n) for position in range(count)]
        return [(Path(self.source.path(place.index)), reader.draw(*place, place.index)) for place in places]


class Batches(NamedTuple):
    """An endless iterator, and what ends its workers."""

    next: Callable[[], tuple[Tensor, Tensor]]
    close: Callable[[], None]


class Contender(NamedTuple):
    """`open(workload, workers, count)` gives batches of at least `count` samples, or raises CannotRun."""

    name: str
    open: Callable[[Workload, int, int], Batches]
    streams: tuple[str, ...] = ("clips", "images")
    note: str = ""
    same: bool = True  # whether it is to read the same frames as ours


Other = Callable[[Workload], Source]  # other files for a workload; raises CannotRun


class Others(NamedTuple):
    """A workload's files written once more, a list of them in which a tenth is bad, and what `verify` leaves of it."""

    transcoded: Other
    damaged: Other
    verified: Other


def contenders(others: Others) -> list[Contender]:
    """Everybody."""

    def ours_on(other: Other) -> Callable[[Workload, int, int], Batches]:
        def open_it(workload: Workload, workers: int, count: int) -> Batches:
            return _ours("pyav")(replace(workload, source=other(workload)), workers, count)

        return open_it

    return [
        Contender(OURS, _ours("pyav")),
        Contender("ours, DALI on the CPU", _ours("dali"), note="DALI decodes VP8, VP9, MJPEG and JPEG without a GPU"),
        Contender("ours, DALI on the GPU", _ours("dali", on_gpu=True)),
        Contender(
            "ours, PyAV, phase-split files",
            ours_on(others.transcoded),
            ("clips",),
            "other files: transcoded beforehand",
            False,
        ),
        Contender("ours, PyAV, a tenth damaged", ours_on(others.damaged), note="a list with bad files", same=False),
        Contender("ours, PyAV, after verify", ours_on(others.verified), note="what verify leaves of that list"),
        Contender(PLAIN, _plain(_pyav), ("clips",)),
        Contender("plain OpenCV DataLoader", _plain(_opencv), ("images",)),
        Contender("torchcodec DataLoader", _plain(_torchcodec, "torchcodec"), ("clips",)),
        Contender("decord DataLoader", _plain(_decord, "decord"), ("clips",)),
    ]


def _ours(decoder: str, on_gpu: bool = False) -> Callable[[Workload, int, int], Batches]:
    def open_it(workload: Workload, workers: int, count: int) -> Batches:
        if on_gpu and workload.device.type != "cuda":
            raise CannotRun("needs an NVIDIA GPU, and torch sees none here")
        if problem := pipeline.lacking(workload.device) if decoder == "dali" else None:
            raise CannotRun(problem)
        if decoder == "dali" and not on_gpu and workload.device.type == "cuda":
            raise CannotRun("is measured without a GPU only: with one DALI decodes there")
        data = workload.config.data.model_copy(update={"decoder": decoder, "workers": workers})
        config = workload.config.model_copy(update={"data": data})
        loader = Loader(config, {workload.stream: workload.source}, device=workload.device)

        def following() -> tuple[Tensor, Tensor]:
            part = getattr(next(loader), workload.stream)
            return part.pixels, part.token_pixels

        return Batches(following, loader.close)

    return open_it


def _plain(decode: Callable[[Path, list[int]], list[np.ndarray]], library: str = "") -> Any:
    def open_it(workload: Workload, workers: int, count: int) -> Batches:
        if library and importlib.util.find_spec(library) is None:
            raise CannotRun(f"{library} is not installed")
        with _reason_of(library):
            importlib.import_module(library or "av")
        batch = getattr(workload.config, workload.stream).micro_batch
        data = _Plain(workload.draws(count), decode, sampling.jitter_order(workload.config.seed))
        pinned = workload.device.type == "cuda"
        loader = DataLoader(
            data, batch, num_workers=workers, pin_memory=pinned, prefetch_factor=2 if workers else None,
            worker_init_fn=_one_thread if workers else None,
        )  # fmt: skip
        batches: list[Iterator[Any]] = [iter(loader)]

        def following() -> tuple[Tensor, Tensor]:
            pixels, token_pixels = next(batches[0])
            there = workload.device
            return pixels.to(there, non_blocking=True), token_pixels.to(there, non_blocking=True)

        return Batches(following, batches.clear)

    return open_it


@contextlib.contextmanager
def _reason_of(library: str):
    try:
        yield
    except Exception as problem:  # torchcodec raises whatever its libraries lack
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise CannotRun(f"{library} cannot be imported: {lines[0][:150]}") from None


class _Plain(Dataset):
    """SPEC 5.3 as one writes it the first time: each sample decoded, resized, cropped, flipped and normalised."""

    def __init__(self, draws: list[tuple[Path, Draw]], decode: Callable[[Path, list[int]], list[np.ndarray]], order):
        self.draws, self.decode, self.order = draws, decode, order

    def __len__(self) -> int:
        return len(self.draws)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        path, drawn = self.draws[number]
        crop, pictures = drawn.crop, []
        for frame in self.decode(path, drawn.frames or [0]):
            picture = cv2.resize(frame, (crop.width, crop.height), interpolation=cv2.INTER_CUBIC)
            if crop.jitter is not None:
                picture = pipeline_reference.jitter(picture, crop.jitter, self.order)
            picture = picture[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
            pictures.append(np.ascontiguousarray(picture[:, ::-1] if crop.flip else picture))
        half = (crop.size // 2, crop.size // 2)
        small = np.stack([cv2.resize(picture, half, interpolation=cv2.INTER_LANCZOS4) for picture in pictures])
        mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (pipeline_reference.MEAN, pipeline_reference.STD))
        pixels = (torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() - mean) / std
        token_pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255 * 0.8 + 0.1
        return (pixels, token_pixels) if drawn.frames else (pixels[:, 0], token_pixels[0])


def _pyav(path: Path, frames: list[int]) -> list[np.ndarray]:
    wanted, found = set(frames), {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                found[number] = frame.to_ndarray(format="rgb24")
            if len(found) == len(wanted):
                break
    return [found[number] for number in frames]


def _opencv(path: Path, frames: list[int]) -> list[np.ndarray]:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if picture is None:
        raise OSError(f"{path} is no image")
    return [cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)] * len(frames)


def _torchcodec(path: Path, frames: list[int]) -> list[np.ndarray]:
    decoders = importlib.import_module("torchcodec.decoders")
    decoder = decoders.VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1)
    return list(decoder.get_frames_at(indices=frames).data.numpy())


def _decord(path: Path, frames: list[int]) -> list[np.ndarray]:
    return list(importlib.import_module("decord").VideoReader(str(path), num_threads=1).get_batch(frames).asnumpy())


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
