"""Open room: one masking strategy per file. True = hidden, and therefore predicted.

A part exposes `Options`, `sample(..., rng)` (the drawing itself) and `build(options) -> Masking`; parts share code only
through `blockwise`, the two-dimensional mask that all of them start from.
"""

import random
from typing import Protocol

import numpy as np

from bevt_fast.config import Part, open_part


class Masking(Protocol):
    """Draws one mask. `steps` is None for an image, or the number of time steps (T / 2) of a clip."""

    def __call__(self, grid: tuple[int, int], steps: int | None, rng: random.Random) -> np.ndarray:
        """Returns a bool array, grid for an image, (steps, *grid) for a clip; True = hidden."""
        ...


def build(part: Part) -> Masking:
    """The masking strategy a configuration names."""
    module, options = open_part(__name__, part)
    return module.build(options)
