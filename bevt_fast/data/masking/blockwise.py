"""Blockwise masking, for images: rectangles of random area and aspect hide until the target is met (SPEC 2.1, BEiT).

Every draw comes from `uniform` and `randint` of one `random.Random`, in the order area, aspect, top, left, so the same
generator gives the same mask as any other program that follows SPEC 2.1. The other strategies start from this mask and
share its options.
"""

import functools
import math
import random
from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from bevt_fast.config import Positive, Section
from bevt_fast.data.masking import Masking
from bevt_fast.errors import ConfigError

ASPECT = (0.3, 1 / 0.3)  # height / width of a block; SPEC 2.1

Ratio = Annotated[float, Field(gt=0, lt=1)]


class Options(Section):
    """`ratio` of the cells to hide (Table 8: 0.4 to 0.7, 78 to 137 of 196); `min_block`, the least area of a block."""

    ratio: Ratio = 0.5
    min_block: Positive = 16


class ClipOptions(Options):
    """For strategies that hide some time steps of a clip: `length` is the range of their share (SPEC 2.3)."""

    length: tuple[float, float] = (0.5, 1.0)

    @model_validator(mode="after")
    def _length_is_a_range(self) -> "ClipOptions":
        low, high = self.length
        if not 0 < low <= high <= 1:
            raise ValueError(f"length must be a range [low, high] with 0 < low <= high <= 1, got {low}, {high}")
        return self


def sample(
    *,
    grid: tuple[int, int],
    target: int,
    min_block: int,
    rng: random.Random,
    max_block: int | None = None,
    aspect: tuple[float, float] = ASPECT,
    attempts: int = 10,
) -> np.ndarray:
    """One mask of SPEC 2.1: bool, shape `grid`, True = hidden; never more than `target` cells, often a few less.

    A block has at most `max_block` cells (None: `target`). Stops when no block fits within `attempts` tries.
    """
    mask = np.zeros(grid, dtype=bool)
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    left_over = target
    while left_over > 0:
        room = min(left_over, target if max_block is None else max_block)
        added = _add_block(mask, room, min_block, log_aspect, attempts, rng)
        if not added:
            break
        left_over -= added
    return mask


def _add_block(
    mask: np.ndarray, room: int, min_block: int, log_aspect: tuple[float, float], attempts: int, rng: random.Random
) -> int:
    """Hides one more rectangle, in place; returns how many cells are new, 1 to `room`, or 0 if no attempt fitted."""
    rows, columns = mask.shape
    for _ in range(attempts):
        # where room < min_block the interval is reversed, which uniform allows
        area = rng.uniform(min_block, room)
        ratio = math.exp(rng.uniform(*log_aspect))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        # strict: a block across the whole grid is refused
        if height >= rows or width >= columns:
            continue
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = mask[top : top + height, left : left + width]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= room:
            block[...] = True
            return new
    return 0


def hidden_cells(ratio: float, grid: tuple[int, int]) -> int:
    """Cells to hide in one plane: `ratio` of the grid, rounded half to even."""
    return round(ratio * grid[0] * grid[1])


def hidden_steps(steps: int, length: tuple[float, float]) -> tuple[int, int]:
    """Smallest and largest number of hidden time steps: shares of `steps` rounded down, at least one (SPEC 2.3)."""
    low = max(int(length[0] * steps), 1)
    return low, max(min(int(length[1] * steps), steps), low)


def build(options: Options) -> Masking:
    """Blockwise masks of images, shape `grid`. The masking raises ConfigError when it is asked for a clip."""
    return functools.partial(_draw, options)


def build_for_clips(name: str, sample: Callable[..., np.ndarray], options: ClipOptions) -> Masking:
    """Masks (steps, *grid) drawn by the `sample` of strategy `name`. The masking raises ConfigError for an image."""
    return functools.partial(_draw_clip, name, sample, options)


def _draw(options: Options, grid: tuple[int, int], steps: int | None, rng: random.Random) -> np.ndarray:
    if steps is not None:
        raise ConfigError("blockwise masking is for images and knows no time steps; give clips.mask the name 'tube'")
    return sample(grid=grid, target=hidden_cells(options.ratio, grid), min_block=options.min_block, rng=rng)


def _draw_clip(
    name: str,
    sample: Callable[..., np.ndarray],
    options: ClipOptions,
    grid: tuple[int, int],
    steps: int | None,
    rng: random.Random,
) -> np.ndarray:
    if steps is None:
        raise ConfigError(f"{name} masking is for clips, it hides time steps; give images.mask the name 'blockwise'")
    target = hidden_cells(options.ratio, grid)
    return sample(steps=steps, grid=grid, target=target, min_block=options.min_block, length=options.length, rng=rng)
