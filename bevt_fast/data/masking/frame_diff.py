"""Frame-diff masking, for clips: the time steps of a tube, a fresh blockwise mask at each (paper Table 8, SPEC 2.4).

Drawn in the order of the tube, then the masks of the later steps: from the same generator both hide the same steps.
"""

import random

import numpy as np

from bevt_fast.data.masking import Masking, blockwise


class Options(blockwise.ClipOptions):
    """As tube: `ratio`, `min_block` and `length`, the range of the share of steps that are hidden in part."""


def sample(
    *,
    steps: int,
    grid: tuple[int, int],
    target: int,
    min_block: int,
    rng: random.Random,
    length: tuple[float, float] = (0.5, 1.0),
) -> np.ndarray:
    """One mask: bool, (steps, *grid), True = hidden; a cyclic run of steps, each with its own blockwise mask."""
    plane = blockwise.sample(grid=grid, target=target, min_block=min_block, rng=rng)
    start = rng.randint(0, steps - 1)
    count = rng.randint(*blockwise.hidden_steps(steps, length))
    mask = np.zeros((steps, *grid), dtype=bool)
    mask[start] = plane
    for step in range(start + 1, start + count):
        mask[step % steps] = blockwise.sample(grid=grid, target=target, min_block=min_block, rng=rng)
    return mask


def build(options: Options) -> Masking:
    """Frame-diff masks of clips, (steps, *grid). The masking raises ConfigError when it is asked for an image."""
    return blockwise.build_for_clips("frame_diff", sample, options)
