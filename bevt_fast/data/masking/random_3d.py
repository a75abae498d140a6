"""Random-3D masking: an exact share of the cells of a clip or image, all equally likely (paper Table 8, SPEC 2.4)."""

import functools
import math
import random

import numpy as np

from bevt_fast.config import Section
from bevt_fast.data.masking import Masking, blockwise


class Options(Section):
    """`ratio` of all cells of the clip or image to hide."""

    ratio: blockwise.Ratio = 0.5


def sample(*, grid: tuple[int, int], target: int, rng: random.Random, steps: int | None = None) -> np.ndarray:
    """One mask: bool, (steps, *grid), or `grid` where `steps` is None; exactly `target` cells are True = hidden."""
    shape = grid if steps is None else (steps, *grid)
    cells = math.prod(shape)
    mask = np.zeros(cells, dtype=bool)
    mask[rng.sample(range(cells), target)] = True
    return mask.reshape(shape)


def build(options: Options) -> Masking:
    """Random-3D masks of clips, (steps, *grid), and of images, `grid`."""
    return functools.partial(_draw, options)


def _draw(options: Options, grid: tuple[int, int], steps: int | None, rng: random.Random) -> np.ndarray:
    cells = grid[0] * grid[1] * (1 if steps is None else steps)
    return sample(grid=grid, steps=steps, target=round(options.ratio * cells), rng=rng)
