"""Which sample, which frames, which crop: pure functions of the seed and of where the run is (SPEC 5.2, 5.3, 6.7).

Nothing here keeps a state. A position in a stream's endless order says which pass and which sample it is, and every
other draw comes from a generator keyed by what is drawn, so a resumed run and a run on another number of processes get
the same numbers. The official code repeats its draws every epoch (SPEC X24); our keys hold the epoch.
"""

import functools
import hashlib
import math
import operator
import random
from typing import NamedTuple, SupportsIndex

import numpy as np

from bevt_fast.config import View
from bevt_fast.data.sources import Frames
from bevt_fast.errors import ConfigError, DataError


class Place(NamedTuple):
    """A place in an endless stream: the pass over the data, and the sample (an index into the source)."""

    epoch: int
    index: int


class Crop(NamedTuple):
    """How a picture, or every frame of a clip, is looked at (SPEC 5.3). Lengths in pixels of the resized picture."""

    height: int
    width: int
    top: int
    left: int
    size: int
    flip: bool
    jitter: tuple[float, float, float] | None  # factors of brightness, contrast, saturation


def random_for(*key: SupportsIndex | str) -> random.Random:
    """A generator that depends on `key` alone, on every machine and Python version (SPEC 5.2, seeding note)."""
    return random.Random(int.from_bytes(_digest(key), "big"))


@functools.lru_cache(maxsize=4)  # two streams, each between two passes; 8 bytes a sample
def permutation(seed: int, stream: str, epoch: int, n: int) -> np.ndarray:
    """The order of the `n` samples in one pass (SPEC 5.2: shuffled passes). Returns (n,) int64, read-only."""
    # RandomState, not Generator: NumPy promises never to change its streams (NEP 19)
    key = np.frombuffer(_digest((seed, stream, epoch, "order")), dtype=">u4")
    order = np.random.RandomState(key.astype(np.uint32)).permutation(n).astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def place(seed: int, stream: str, position: int, n: int) -> Place:
    """The sample at `position` >= 0 of the endless stream of `n` samples: a pass visits each once (SPEC 5.2)."""
    if position < 0 or n < 1:
        raise ValueError(f"place: position {position} of a stream of {n} samples does not exist")
    epoch, offset = divmod(position, n)
    return Place(epoch, int(permutation(seed, stream, epoch, n)[offset]))


def micro_batch_positions(
    step: int, micro: int, rank: int, *, accumulation: int, world_size: int, micro_batch: int
) -> range:
    """The stream positions of one micro-batch of one process (SPEC 5.2: the batch is the whole step's).

    All arguments count from 0. With the same batch a step has the same positions for every world size.
    """
    if not (0 <= micro < accumulation and 0 <= rank < world_size):
        raise ValueError(f"micro-batch {micro} of {accumulation} and rank {rank} of {world_size} do not exist")
    first = ((step * accumulation + micro) * world_size + rank) * micro_batch
    return range(first, first + micro_batch)


def clip_frames(total: int, frames: Frames, rng: random.Random) -> list[int]:
    """The `frames.count` frames, each in [0, total), of a training clip of a video (SPEC 6.7, train).

    Interval: a random start, the last possible one included; a video shorter than the span starts at 0 and is looped.
    Uniform: one random frame of each of `count` equal segments, both ends included.
    """
    if frames.mode == "uniform":
        return [first + _below(rng, last - first + 1) for first, last in _segments(total, frames.count)]
    start = _below(rng, max(total - frames.count * frames.stride + 1, 1))
    return _interval(total, frames, start)


def test_clip_frames(total: int, frames: Frames, clips: int = 1) -> list[list[int]]:
    """The frames of the `clips` test clips of a video of `total` frames (SPEC 6.7, test). No randomness.

    Interval: starts spread evenly, all 0 where the video is shorter than the span. Uniform: the middle of each segment,
    of which there is only one choice, so `clips` must be 1 (raises ConfigError).
    """
    if frames.mode == "uniform":
        if clips != 1:
            raise ConfigError(f"uniform frames give one test clip a video, not {clips}; use 1, or the mode 'interval'")
        return [[(first + last) // 2 for first, last in _segments(total, frames.count)]]
    room = max(total - frames.count * frames.stride + 1, 0) / clips
    return [_interval(total, frames, math.floor(clip * room + room / 2)) for clip in range(clips)]


test_clip_frames.__test__ = False  # the name starts as pytest's tests do


def draw_crop(height: int, width: int, view: View, rng: random.Random) -> Crop:
    """Draw the view of a picture of `height` x `width` pixels (SPEC 5.3; rounding as in mmcv's rescaling).

    The last offset of the crop is never used (SPEC X25). Always one random number each for short side, top, left, flip
    and the three jitter factors, so a switch of the view changes no other draw.
    """
    low, high = view.short_side
    short = low + _below(rng, high - low + 1)
    scale = short / min(height, width)
    new_height, new_width = int(height * scale + 0.5), int(width * scale + 0.5)
    top = _below(rng, max(new_height - view.size, 1))
    left = _below(rng, max(new_width - view.size, 1))
    flip = rng.random() < view.flip
    draws = (2 * rng.random() - 1, 2 * rng.random() - 1, 2 * rng.random() - 1)
    jitter = None
    if view.colour_jitter > 0:
        brightness, contrast, saturation = (1 + view.colour_jitter * draw for draw in draws)
        jitter = (brightness, contrast, saturation)
    return Crop(new_height, new_width, top, left, view.size, flip, jitter)


def jitter_order(seed: int) -> tuple[int, int, int]:
    """The order in which brightness (0), contrast (1) and saturation (2) are applied: drawn once a run (SPEC 5.3)."""
    first, second, third = random_for(seed, "jitter order").sample((0, 1, 2), 3)
    return first, second, third


def substitute(seed: int, stream: str, epoch: int, index: int, attempt: int, n: int) -> int:
    """The sample that stands in for the unreadable sample `index`; `attempt` counts the bad stand-ins so far.

    Attempts 0 to n - 2 visit each other sample once, so a good one is found if there is one. Raises DataError when
    there is no other sample.
    """
    others = n - 1
    if others < 1:
        raise DataError(
            f"the only sample of the {stream} cannot be read and there is none to take its place; add files"
        )
    rng = random_for(seed, stream, epoch, index, "substitute")
    start = _below(rng, others)
    stride = 1 + _below(rng, others)
    while math.gcd(stride, others) != 1:  # a stride without a common factor visits every sample
        stride += 1
    other = (start + attempt * stride) % others
    return other + (other >= index)


def _digest(key: tuple[SupportsIndex | str, ...]) -> bytes:
    """32 bytes. Each field carries its type and length, so ("ab", "c") is not ("a", "bc")."""
    hasher = hashlib.blake2b(digest_size=32)
    for field in key:
        text = "s" + field if isinstance(field, str) else f"i{operator.index(field)}"
        encoded = text.encode()
        hasher.update(b"%d:%b" % (len(encoded), encoded))
    return hasher.digest()


def _below(rng: random.Random, n: int) -> int:
    """A uniform integer of [0, n) from exactly one draw; `randrange` may take several."""
    return int(rng.random() * n)


def _interval(total: int, frames: Frames, start: int) -> list[int]:
    """`frames.count` frames from `start`, `frames.stride` apart, looped over the video."""
    if total < 1:
        raise ValueError("a clip cannot be drawn from a video of no frames")
    return [(start + k * frames.stride) % total for k in range(frames.count)]


def _segments(total: int, count: int) -> list[tuple[int, int]]:
    """First and last frame of each of `count` equal segments; round() is half to even, as SPEC 6.7 wants."""
    if total < 1:
        raise ValueError("a clip cannot be drawn from a video of no frames")
    length = (total - 1) / count
    return [(round(length * i), round(length * (i + 1))) for i in range(count)]
