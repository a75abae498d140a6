"""Sources of small real files, a Loader on them, and what its pictures should be."""

import json
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from bevt_fast import config as configuration
from bevt_fast.config import Config
from bevt_fast.data import pipeline_reference
from bevt_fast.data.loader import Loader
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sources import Frames, Source
from tests.data import media

FRAMES = 40  # of a video, unless it says otherwise


def given(stream: str = "clips", batch: int = 2, size: int = 64, **data: Any) -> Config:
    """A configuration of one stream: whole pictures of short side `size`, no flip, no jitter."""
    mask = {"name": "tube" if stream == "clips" else "blockwise", "options": {"ratio": 0.5, "min_block": 2}}
    view = {"size": size, "short_side": [size, size], "flip": 0.0}
    section = {"source": {"name": "x"}, "mask": mask, "batch": batch, "micro_batch": batch, "view": view}
    values = {
        stream: section,
        "seed": 3,
        "output": "unused",
        "tokenizer": {"name": "x"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
        "data": {"workers": 0} | data,
    }
    return configuration.parse(Config, values, "test")


def clips(folder: Path, *names: str, count: int = 8, stride: int = 3, min_frames: int = 2) -> Source:
    """A source of videos; by default their clips span 24 frames."""
    return Source(
        name="videos", root=folder, paths=list(names), frames=Frames(count=count, stride=stride), min_frames=min_frames
    )


def images(folder: Path, *names: str) -> Source:
    """A source of images."""
    return Source(name="pictures", root=folder, paths=list(names))


def read(config: Config, source: Source, batches: int) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """The pictures of so many batches, each (B, [T,] S, S, 3) uint8, and the records of bad files. The Loader survives
    them without a worker's death.
    """
    stream = "images" if source.frames is None else "clips"
    with closing(Loader(config, {stream: source})) as loader:
        found = [getattr(next(loader), stream).pixels for _ in range(batches)]
        assert loader.restarts == 0
        return [shown(pixels) for pixels in found], loader.bad_files


def shown(pixels: torch.Tensor) -> np.ndarray:
    """What the encoder sees as pictures, channels last."""
    pictures = pipeline_reference.denormalise(pixels)
    return np.ascontiguousarray(pictures.movedim(1, -1).numpy())


def drawn(config: Config, source: Source, batches: int) -> list[Any]:
    """The draws of the places of these batches, in order, as if every file were good."""
    from bevt_fast.data import sampling

    reader = StreamReader(config, "images" if source.frames is None else "clips", source)
    count = batches * reader.split["micro_batch"]
    places = [sampling.place(config.seed, reader.key, position, len(source)) for position in range(count)]
    return [reader.draw(place.epoch, place.index, place.index) for place in places]


def numbers(clip: np.ndarray, draw: Any, golden: Callable[[int], np.ndarray], frames: int = FRAMES) -> list[int]:
    """Which frame each picture of a clip is: that whose original, `golden(k)`, looks most like it in the same crop.

    Fails where even that looks different: half of a damaged picture is not the right picture.
    """
    originals, _ = pipeline_reference.clip_views(
        np.stack([golden(k) for k in range(frames)]), draw.crop, draw.crop.size // 2
    )
    found = []
    for picture in clip:
        distances = np.abs(originals.astype(int) - picture).mean(axis=(1, 2, 3))
        found.append(int(distances.argmin()))
        # lossy coding of these pictures costs 2 to 8 grey levels, another frame 25 and more
        assert distances.min() < 14, distances.min()
    return found


def plain(size: tuple[int, int] = (64, 96), rotation: int = 0) -> Callable[[int], np.ndarray]:
    """The original of a frame of `media.video`, as it is to be shown."""
    return lambda k: np.rot90(media.picture(k, *size), rotation // 90)


def cut(path: Path, share: float = 0.6) -> Path:
    """Cuts a file off."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def coded_frames(path: Path) -> list[bytes]:
    """The packets of a video, in decoding order."""
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def flip_frames(path: Path) -> Path:
    """Flips three bits in every packet of a video, past its head."""
    rng, content = np.random.RandomState(0), bytearray(path.read_bytes())
    for coded in coded_frames(path):
        start = content.index(coded)
        for place in start + rng.randint(len(coded) // 4, len(coded), 3):
            content[place] ^= 1 << rng.randint(8)
    path.write_bytes(content)
    return path


def flip(path: Path, seed: int = 0, every: int = 200) -> Path:
    """Flips a bit in about every `every`-th byte, past the first and before the last tenth of a file."""
    rng, content = np.random.RandomState(seed), bytearray(path.read_bytes())
    first, last = len(content) // 10, len(content) * 9 // 10
    for place in rng.randint(first, last, max((last - first) // every, 1)):
        content[place] ^= 1 << rng.randint(8)
    path.write_bytes(content)
    return path


def spoil(path: Path, packet: int) -> Path:
    """Overwrites the first half of one packet of a video with zeros."""
    content = bytearray(path.read_bytes())
    coded = coded_frames(path)[packet]
    position, size = content.index(coded), len(coded) // 2
    content[position : position + size] = bytes(size)
    path.write_bytes(content)
    return path


def pipe(path: Path) -> Path:
    """A named pipe nobody writes to: whoever opens it to read waits for ever."""
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    return path


def quarantined(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's quarantine.jsonl."""
    path = output / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Kind by file name."""
    return {Path(record["path"]).name: record["kind"] for record in records}
