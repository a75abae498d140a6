"""Random-frame masking, for clips: one blockwise mask at scattered time steps (paper Table 8, SPEC 2.4).

As many steps as a tube has. Drawn in the order mask, number of steps, positions.
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
    """One mask: bool, (steps, *grid), True = hidden; steps drawn without replacement share one blockwise mask."""
    plane = blockwise.sample(grid=grid, target=target, min_block=min_block, rng=rng)
    count = rng.randint(*blockwise.hidden_steps(steps, length))
    mask = np.zeros((steps, *grid), dtype=bool)
    mask[rng.sample(range(steps), count)] = plane
    return mask


def build(options: Options) -> Masking:
    """Random-frame masks of clips, (steps, *grid). The masking raises ConfigError when it is asked for an image."""
    return blockwise.build_for_clips("random_frame", sample, options)
