"""Tube masking, for clips: one blockwise mask, held over a run of consecutive time steps (SPEC 2.3).

The run is cyclic: a tube that reaches the end of the clip goes on at its beginning.
Drawn in the order mask, start, length.
"""

import random

import numpy as np

from bevt_fast.data.masking import Masking, blockwise


class Options(blockwise.ClipOptions):
    """As blockwise, and `length`, the range of its share of the clip (Table 8: 0.25-0.75, 0.5-1, 0.75-1, 1-1)."""


def sample(
    *,
    steps: int,
    grid: tuple[int, int],
    target: int,
    min_block: int,
    rng: random.Random,
    length: tuple[float, float] = (0.5, 1.0),
) -> np.ndarray:
    """One mask of SPEC 2.3: bool, (steps, *grid), True = hidden; a step is hidden by the common mask or not at all."""
    plane = blockwise.sample(grid=grid, target=target, min_block=min_block, rng=rng)
    start = rng.randint(0, steps - 1)
    count = rng.randint(*blockwise.hidden_steps(steps, length))
    mask = np.zeros((steps, *grid), dtype=bool)
    mask[(start + np.arange(count)) % steps] = plane
    return mask


def build(options: Options) -> Masking:
    """Tube masks of clips, (steps, *grid). The masking raises ConfigError when it is asked for an image."""
    return blockwise.build_for_clips("tube", sample, options)
