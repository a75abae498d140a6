"""3-D (shifted) window attention with relative position bias, as in Video Swin (Liu et al. 2021, sec. 3.2; SPEC 1.4).

Legend: B clips, (t, h, w) token grid, nH heads of width d, nW windows of N = wt*wh*ww tokens. An image has t = 1.

Everything that depends on geometry alone (which row of the bias table a pair of tokens reads, which pairs a shift must
keep apart) is computed once and kept; what remains per call is roll, partition, two products and a softmax.
"""

from functools import lru_cache
from math import prod
from typing import Literal

import torch
from torch import Tensor

Triple = tuple[int, int, int]
BiasIndex = Literal["true", "official"]

SEPARATED = (
    -100.0
)  # added to the logit of a pair that the shift brought together; finite, as in the official compute_mask


def reference(
    qkv: Tensor,
    bias_table: Tensor,
    window: Triple,
    shift: Triple = (0, 0, 0),
    mask_shift: Triple | None = None,
    bias_index: BiasIndex = "true",
) -> Tensor:
    """The specification of `window_attention`, in plain torch: any device, any floating dtype."""
    batch, *grid, _, _, width = qkv.shape
    used = used_window((grid[0], grid[1], grid[2]), window)
    mask_shift = shift if mask_shift is None else mask_shift
    precise = torch.promote_types(qkv.dtype, torch.float32)

    # autocast would take the logits back to half precision
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = _partition(_roll(qkv, shift, -1), used)  # (B*nW, nH, N, d) each
        logits = (q.to(precise) * width**-0.5) @ k.to(precise).transpose(-2, -1)  # (B*nW, nH, N, N)
        rows = bias_rows(window, used, bias_index, qkv.device)
        logits += bias_table[rows].permute(2, 0, 1).to(precise)
        if any(mask_shift):
            regions = shift_mask((grid[0], grid[1], grid[2]), used, mask_shift, qkv.device, precise)
            logits.view(batch, len(regions), *logits.shape[1:]).add_(regions[:, None])
        out = logits.softmax(dim=-1).to(v.dtype) @ v  # (B*nW, nH, N, d)
    return _roll(_reverse(out, batch, grid, used), shift, 1)


def used_window(grid: Triple, window: Triple) -> Triple:
    """The window after clipping: an axis that is not longer than the window is one window (SPEC 1.4, step 2)."""
    return (min(grid[0], window[0]), min(grid[1], window[1]), min(grid[2], window[2]))


@lru_cache(maxsize=64)
def bias_rows(window: Triple, used: Triple, bias_index: BiasIndex, device: torch.device) -> Tensor:
    """The row of the bias table for every (query, key) of a window: (N, N) int64.

    The table belongs to the nominal `window`. "true" looks up the offset between the two tokens; "official" takes the
    first N rows and columns of the nominal window's matrix, which is another offset once height or width is clipped
    (SPEC X2).
    """
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
        axes = used if bias_index == "true" else window
        places = torch.cartesian_prod(*(torch.arange(size, device=device) for size in axes)).view(-1, 3)
        offset = places[:, None] - places[None, :] + torch.tensor(window, device=device) - 1  # (N, N, 3)
        rows = (offset[..., 0] * (2 * window[1] - 1) + offset[..., 1]) * (2 * window[2] - 1) + offset[..., 2]
        return rows[: prod(used), : prod(used)].contiguous()


@lru_cache(maxsize=64)
def shift_mask(grid: Triple, used: Triple, shift: Triple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where two tokens of a window were neighbours before the roll, else -100: (nW, N, N). The grid is padded."""
    with torch.inference_mode(False):
        labels = torch.zeros(1, *grid, 1, dtype=torch.long, device=device)
        for axis, (length, size, step) in enumerate(zip(grid, used, shift)):
            along = torch.arange(length, device=device)
            label = (along >= length - size).long() + (along >= length - step).long() if step else 0 * along
            labels += label.view([-1 if axis == a - 1 else 1 for a in range(5)]) * 3**axis
        label = _windows(labels, used).reshape(-1, prod(used))  # (nW, N)
        return torch.where(label[:, :, None] == label[:, None, :], 0.0, SEPARATED).to(dtype)


def _roll(x: Tensor, shift: Triple, sign: int) -> Tensor:
    """Roll axes 1, 2, 3 by sign * shift; no copy when nothing moves."""
    axes = [axis for axis in range(3) if shift[axis]]
    return x.roll([sign * shift[axis] for axis in axes], [axis + 1 for axis in axes]) if axes else x


def _windows(x: Tensor, used: Triple) -> Tensor:
    """(B, t, h, w, ...) -> (B, t/wt, h/wh, w/ww, wt, wh, ww, ...), a view."""
    batch, t, h, w, *rest = x.shape
    split = x.view(batch, t // used[0], used[0], h // used[1], used[1], w // used[2], used[2], *rest)
    return split.permute(0, 1, 3, 5, 2, 4, 6, *range(7, split.ndim))


def _partition(qkv: Tensor, used: Triple) -> tuple[Tensor, Tensor, Tensor]:
    """(B, t, h, w, 3, nH, d) -> q, k, v, each (B*nW, nH, N, d); windows and tokens in (t, h, w) order."""
    windows = _windows(qkv, used)
    count, tokens = prod(windows.shape[:4]), prod(used)
    order = (7, 0, 1, 2, 3, 8, 4, 5, 6, 9)  # 3, B, windows, nH, tokens, d
    q, k, v = windows.permute(order).reshape(3, count, qkv.shape[-2], tokens, qkv.shape[-1])
    return q, k, v


def _reverse(out: Tensor, batch: int, grid: list[int], used: Triple) -> Tensor:
    """(B*nW, nH, N, d) -> (B, t, h, w, nH, d)."""
    heads, width = out.shape[1], out.shape[3]
    counts = [length // size for length, size in zip(grid, used)]
    split = out.view(batch, *counts, heads, *used, width)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, *grid, heads, width)


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    window: Triple,
    shift: Triple = (0, 0, 0),
    mask_shift: Triple | None = None,
    bias_index: BiasIndex = "true",
) -> Tensor:
    """Attend within (shifted) windows.

    Args:
        qkv: (B, t, h, w, 3, nH, d). On an axis that is longer than the window, a multiple of it (callers pad).
        bias_table: ((2wt-1)(2wh-1)(2ww-1), nH), for the nominal window.
        window: the nominal window. An axis that is not longer is one window, and its shift must be 0 unless the
            official image path wants otherwise.
        shift: how far the windows are rolled; the pairs that only the roll brought together get -100.
        mask_shift: take the regions of the -100 from this shift instead (SPEC X3); default: `shift`.
        bias_index: "true" offsets, or the "official" rows of a clipped window (SPEC X2).
    Returns:
        (B, t, h, w, nH, d) in the dtype of qkv. Logits and softmax are float32 (float64 for float64 inputs).
    Raises:
        ValueError: a grid that is not a multiple of the window, or a table that belongs to another window.
    """
    grid = (qkv.shape[1], qkv.shape[2], qkv.shape[3])
    used = used_window(grid, window)
    if any(length % size for length, size in zip(grid, used)):
        raise ValueError(f"window_attention: the grid {grid} is not a multiple of the window {window}; pad it first")
    rows = prod(2 * size - 1 for size in window)
    if bias_table.shape != (rows, qkv.shape[5]):
        raise ValueError(
            f"window_attention: the bias table is {tuple(bias_table.shape)} but the window {window} "
            f"with {qkv.shape[5]} heads needs {(rows, qkv.shape[5])}"
        )
    return reference(qkv, bias_table, window, shift, mask_shift, bias_index)
