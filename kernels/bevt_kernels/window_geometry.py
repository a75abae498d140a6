"""Which token, which row of the bias table and which neighbour: all that windows owe to geometry alone.

Legend: (t, h, w) token grid, nW windows of N = wt*wh*ww tokens. A *kind* is a set of windows that the shift mask
divides into the same regions: 1 without a mask, 4 for a shift in height and width, 8 with time. All of it is computed
once, on the CPU, and kept.

A kernel sees a window as RS *slots*, N padded to whole tiles. Within a window the slots are sorted by region, so that
the keys a tile of queries can see are one contiguous range (`span`); a padding slot repeats the token of slot 0.
"""

import functools
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import runtime

Triple = tuple[int, int, int]
BiasIndex = Literal["true", "official"]

# added to the logit of a pair that the shift brought together; finite, as in the official compute_mask
SEPARATED = -100.0
FOREIGN = 1 << 30  # marks such a pair in `Plan.bias`
PADDING = -1  # a key that does not exist
MASKED_KIND = 1 << 16  # marks a window of several regions in `Plan.kind`


class Plan(NamedTuple):
    """One layer's geometry on one device, for tiles of `tile` slots."""

    tokens_per_window: int  # N
    slots: int  # RS
    tile: int
    kinds: int
    masked: bool  # some kind has several regions
    token: Tensor  # (nW, RS) int32: the slot's token in the sample, rolled and partitioned
    kind: Tensor  # (nW,) int32, | MASKED_KIND
    span: Tensor  # (kinds, RS/tile, 2) int32: first and end slot of what a tile can see
    bias: Tensor  # (kinds, RS/tile, tile*RS) int32: table row | FOREIGN, or PADDING; queries are rows, see `_strips`
    bias_t: Tensor  # the same with keys as rows
    row: Tensor  # (used,) int32: the table rows that some pair reads
    entry: Tensor  # pairs sorted by row: places in (kinds, RS/tile, RS/tile, tile, tile), int32
    start: Tensor  # (used + 1,) int32: where a row's entries start
    listed: Tensor  # (nW,) int32: the windows, kind after kind
    first: tuple[int, ...]  # where in `listed` a kind starts; kinds + 1 numbers


def used_window(grid: Triple, window: Triple) -> Triple:
    """The window after clipping: an axis that is not longer than the window is one window (SPEC 1.4, step 2)."""
    return (min(grid[0], window[0]), min(grid[1], window[1]), min(grid[2], window[2]))


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """lru_cache for real tensors only."""
    kept = lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def get(*arguments: Any) -> Tensor:
        return make(*arguments) if runtime.simulated() else kept(*arguments)

    return get


@_kept
def bias_rows(window: Triple, used: Triple, bias_index: BiasIndex, device: torch.device) -> Tensor:
    """The row of the bias table for every (query, key) of a window: (N, N) int64.

    The table belongs to the nominal `window`. "true" looks up the offset between the two tokens; "official" takes the
    first N rows and columns of the nominal window's matrix, which is another offset once height or width is clipped
    (SPEC X2).
    """
    with torch.inference_mode(False):  # a tensor made in inference mode could not serve training later
        axes = used if bias_index == "true" else window
        places = torch.cartesian_prod(*[torch.arange(size, device=device) for size in axes]).view(-1, 3)
        offset = places[:, None] - places[None, :] + torch.tensor(window, device=device) - 1  # (N, N, 3)
        rows = (offset[..., 0] * (2 * window[1] - 1) + offset[..., 1]) * (2 * window[2] - 1) + offset[..., 2]
        return rows[: prod(used), : prod(used)].contiguous()


def regions(grid: Triple, used: Triple, shift: Triple, device: torch.device) -> Tensor:
    """The region of every token of every window, on the rolled grid: (nW, N) int64. The grid is padded."""
    labels = torch.zeros(1, *grid, 1, dtype=torch.long, device=device)
    for axis, (length, size, step) in enumerate(zip(grid, used, shift)):
        along = torch.arange(length, device=device)
        label = (along >= length - size).long() + (along >= length - step).long() if step else 0 * along
        labels += label.view([-1 if axis == a - 1 else 1 for a in range(5)]) * 3**axis
    return windows(labels, used).reshape(-1, prod(used))


@_kept
def shift_mask(grid: Triple, used: Triple, shift: Triple, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where two tokens of a window were neighbours before the roll, else -100: (nW, N, N). The grid is padded."""
    with torch.inference_mode(False):
        label = regions(grid, used, shift, device)
        return torch.where(label[:, :, None] == label[:, None, :], 0.0, SEPARATED).to(dtype)


def roll(x: Tensor, shift: Triple, sign: int) -> Tensor:
    """Roll axes 1, 2, 3 by sign * shift; no copy when nothing moves."""
    axes = [axis for axis in range(3) if shift[axis]]
    return x.roll([sign * shift[axis] for axis in axes], [axis + 1 for axis in axes]) if axes else x


def windows(x: Tensor, used: Triple) -> Tensor:
    """(B, t, h, w, ...) -> (B, t/wt, h/wh, w/ww, wt, wh, ww, ...), a view."""
    batch, t, h, w, *rest = x.shape
    split = x.view(batch, t // used[0], used[0], h // used[1], used[1], w // used[2], used[2], *rest)
    return split.permute(0, 1, 3, 5, 2, 4, 6, *range(7, split.ndim))


@lru_cache(maxsize=128)
def plan(
    grid: Triple,
    window: Triple,
    shift: Triple,
    mask_shift: Triple,
    bias_index: BiasIndex,
    tile: int,
    sort: bool,
    wide: bool,
    device: torch.device,
) -> Plan:
    """The plan of a layer. `sort`: slots go by region; `wide`: 32-bit bias tiles, which lie otherwise in registers."""
    used = used_window(grid, window)
    cpu = torch.device("cpu")
    with torch.inference_mode(False), torch.device(cpu):
        count = prod(used)
        slots = runtime.cdiv(count, tile) * tile
        index = torch.arange(prod(grid)).view(1, *grid, 1)
        token = windows(roll(index, shift, -1), used).reshape(-1, count)  # (nW, N)
        patterns, kind = kinds(grid, used, mask_shift)
        number = len(patterns)
        order = patterns.argsort(dim=1, stable=True) if sort else torch.arange(count).expand(number, -1)
        token = token.gather(1, order[kind])
        token = torch.cat([token, token[:, :1].expand(-1, slots - count)], dim=1)
        label = patterns.gather(1, order)  # (kinds, N), by slot
        several = label.max(dim=1).values > 0

        rows = bias_rows(window, used, bias_index, cpu)
        slot_rows = rows[order[:, :, None], order[:, None, :]]  # (kinds, N, N)
        foreign = label[:, :, None] != label[:, None, :]
        full = torch.zeros(number, slots, slots, dtype=torch.int32)
        full[:, :count, :count] = slot_rows + foreign * FOREIGN
        full[:, :, count:] = PADDING
        queries = _strips(full, tile, wide)
        full[:, count:] = 0
        full = full.mT.contiguous()
        full[:, count:] = PADDING
        keys = _strips(full, tile, wide)

        if not sort:  # slots mean the same in every kind, so the kernel adds over kinds by itself
            slot_rows = slot_rows[:1]
        kind_of = torch.arange(len(slot_rows))[:, None, None]
        query, key = torch.arange(count)[None, :, None], torch.arange(count)[None, None, :]
        tiles = slots // tile
        place = ((kind_of * tiles + query // tile) * tiles + key // tile) * tile**2 + query % tile * tile + key % tile
        by_row = slot_rows.flatten().argsort(stable=True)
        row, entries = slot_rows.unique(return_counts=True)
        start = torch.cat([torch.zeros(1, dtype=torch.long), entries.cumsum(0)])

        listed = kind.argsort(stable=True)
        first = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(kind, minlength=number).cumsum(0)])
        tables = (token, kind + several[kind] * MASKED_KIND, _spans(label, tile))
        tables = (*tables, queries, keys, row, place.flatten()[by_row], start, listed)
        placed = [table.to(torch.int32).contiguous().to(device) for table in tables]
    return Plan._make((count, slots, tile, number, bool(several.any()), *placed, tuple(first.tolist())))


def kinds(grid: Triple, used: Triple, mask_shift: Triple) -> tuple[Tensor, Tensor]:
    """The regions of every kind of window, numbered as they appear, (kinds, N), and each window's kind, (nW,)."""
    # few windows differ, and comparing all pairs of tokens is only for those few
    labels, labelled = torch.unique(regions(grid, used, mask_shift, torch.device("cpu")), dim=0, return_inverse=True)
    patterns, kind = torch.unique(_canonical(labels), dim=0, return_inverse=True)
    return patterns, kind[labelled]


def _canonical(label: Tensor) -> Tensor:
    """Labels renamed 0, 1, 2, ... in the order in which they first appear in a row."""
    same = label[:, :, None] == label[:, None, :]
    first = same.long().argmax(dim=2)  # (nW, N): where this label appears first
    opens = first == torch.arange(label.shape[1])
    return (opens.long().cumsum(dim=1) - 1).gather(1, first)


def _spans(label: Tensor, tile: int) -> Tensor:
    """First and end slot of the regions that a tile of slots touches: (kinds, tiles, 2)."""
    count = label.shape[1]
    spans = []
    for begin in range(0, count, tile):
        part = label[:, begin : begin + tile]
        seen = (label[:, :, None] == part[:, None, :]).any(dim=2).long()
        spans.append(torch.stack([seen.argmax(dim=1), count - seen.flip(1).argmax(dim=1)], dim=1))
    return torch.stack(spans, dim=1)


def _strips(square: Tensor, tile: int, wide: bool) -> Tensor:
    """(kinds, RS, RS) -> (kinds, RS/tile, tile*RS), every strip of rows in the order in which the accumulator of a
    16-row tensor-core tile lies in registers: slabs of 16 columns (8 where an element has 32 bits), 16 bytes a thread.

    A slab does not depend on how many columns a tile has, so tiles of any multiple of 16 columns read the same strip.
    """
    kinds, slots, _ = square.shape
    strips = square.view(kinds, slots // tile, tile, slots)
    if wide:
        split = strips.view(kinds, -1, tile // 16, 2, 8, slots // 8, 4, 2)  # rows: 16s, half, row; columns: 8s, 2s, 1
        return split.permute(0, 1, 5, 2, 4, 6, 3, 7).reshape(kinds, -1, tile * slots)
    split = strips.view(kinds, -1, tile // 16, 2, 8, slots // 16, 2, 4, 2)
    return split.permute(0, 1, 5, 2, 4, 7, 6, 3, 8).reshape(kinds, -1, tile * slots)
