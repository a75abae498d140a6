"""The grids of tokens that windows are cut from: padding, clipped windows, shifts (SPEC 1.4, 1.5)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from bevt_fast.errors import ConfigError

Triple = tuple[int, int, int]


def pad(x: Tensor, sizes: Sequence[int], multiple: Sequence[int], channels_last: bool = True) -> Tensor:
    """Zero-pad the ends of the grid axes to multiples; x itself when nothing is missing."""
    missing = [-size % step for size, step in zip(sizes, multiple)]
    if not any(missing):
        return x
    ends = [amount for size in reversed(missing) for amount in (0, size)]  # F.pad starts at the last axis
    return F.pad(x, [0, 0, *ends] if channels_last else ends)


def window_and_shift(grid: Triple, window: Triple) -> tuple[Triple, Triple]:
    """The used window and shift: an axis no longer than the window is one window, unshifted (SPEC 1.4, step 2)."""
    t, h, w = (min(length, size) for length, size in zip(grid, window))
    dt, dh, dw = (size // 2 if length > size else 0 for length, size in zip(grid, window))
    return (t, h, w), (dt, dh, dw)


def official_image_shift(sides: tuple[int, int], window: Triple) -> Triple:
    """The official image path shifts (and masks) in every stage, clipped or not, and cannot pad (SPEC X3)."""
    if sides[0] % window[1] or sides[1] % window[2]:
        raise ConfigError(
            f"image_attention 'official' needs stages whose sides are multiples of the window {window[1:]}, "
            f"but one is {sides}; use images of {32 * window[1]} x {32 * window[2]} pixels or image_attention 't1'"
        )
    return (0, window[1] // 2, window[2] // 2)
