"""The relative position bias on its way into the kernels, and its gradient on the way back to the table.

Forward: table -> tiles in the order in which accumulators lie in registers, one copy per kind of window, so that a tile
is a plain vector load straight into the accumulator of q k^T. Backward: per-group sums of dS -> one gradient per table
row. Both are deterministic: every output element is written by one program, which adds in a fixed order.

In 16-bit models a tile element is float16 whose lowest bit says "this pair belongs to different regions" (`FOREIGN`):
adding -100 before the rounding would cost the bias its precision. In float32 the -100 is simply added.
"""

from math import prod

import torch
from torch import Tensor

from . import window_geometry as geometry
from ._window_parts import is_wide
from .runtime import cdiv, launch, tl, triton
from .window_geometry import Plan

LARGEST = 60000.0  # a finite float16; times 32**-0.5 it is a bias of 10,600
SMALLEST = (
    2.0**-14
)  # float16's smallest normal number, a bias of 1e-5: the mark's place is known in normal numbers only


@triton.jit(do_not_specialize=["elements", "nH", "stride_row", "stride_head"])
def _bias_tiles(
    table_ptr,  # (rows, nH)
    index_ptr,  # (kinds, elements) int32
    tiles_ptr,  # (kinds, nH, elements)
    factor,
    separated,
    elements,
    nH,
    stride_row,
    stride_head,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    PADDING: tl.constexpr,
    FOREIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kind = tl.program_id(1)
    inside = offs < elements
    index = tl.load(index_ptr + kind.to(tl.int64) * elements + offs, mask=inside, other=PADDING)
    exists = index != PADDING
    foreign = exists & ((index & FOREIGN) != 0)
    row = tl.where(exists, index & (FOREIGN - 1), 0)
    for head in range(0, nH):
        bias = tl.load(table_ptr + row.to(tl.int64) * stride_row + head * stride_head).to(tl.float32) * factor
        out = tiles_ptr + (kind * nH + head).to(tl.int64) * elements + offs
        if WIDE:
            bias = tl.where(foreign, bias + separated, bias)
            tl.store(out, tl.where(exists, bias, -float("inf")), mask=inside)
        else:
            finite = bias < float("inf")
            bias = tl.minimum(tl.maximum(bias, -LARGEST), LARGEST)
            bias = tl.where(tl.abs(bias) < SMALLEST, SMALLEST, bias)
            bits = tl.where(exists, bias, -float("inf")).to(tl.float16).to(tl.int16, bitcast=True)
            # rounded to one bit less, which then holds the mark; minus infinity stays itself
            bits = ((bits + 1) & -2) | foreign.to(tl.int16)
            # a diverged table must not be clamped into one that works: infinity makes NaN in the softmax, as NaN does
            bits = tl.where(finite | ~exists, bits, 0x7E00)
            tl.store(out, bits, mask=inside)


@triton.jit(do_not_specialize=["elements", "nH"])
def _sum_groups(
    partial_ptr,  # (groups, nH, elements) float32
    first_ptr,  # (kinds + 1,) int32: the groups of a kind
    sum_ptr,  # (nH, kinds, elements) float32
    elements,
    nH,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    kind = tl.program_id(2)
    inside = offs < elements
    total = tl.zeros((BLOCK,), tl.float32)
    for group in range(tl.load(first_ptr + kind), tl.load(first_ptr + kind + 1)):
        total += tl.load(partial_ptr + (group * nH + head).to(tl.int64) * elements + offs, mask=inside, other=0.0)
    kinds = tl.num_programs(2)
    tl.store(sum_ptr + (head * kinds + kind).to(tl.int64) * elements + offs, total, mask=inside)


@triton.jit(do_not_specialize=["places", "used", "nH"])
def _table_gradient(
    sum_ptr,  # (nH, places) float32
    row_ptr,  # (used,) int32: the rows that have entries
    entry_ptr,  # int32: places, row after row
    start_ptr,  # (used + 1,) int32
    grad_ptr,  # (rows, nH)
    places,
    used,
    nH,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    start = tl.load(start_ptr + offs, mask=offs < used, other=0)
    end = tl.load(start_ptr + offs + 1, mask=offs < used, other=0)
    total = tl.zeros((ROWS, HEADS, BLOCK), tl.float32)
    for begin in range(0, tl.max(end - start, 0), BLOCK):
        entry = start[:, None] + begin + tl.arange(0, BLOCK)[None, :]
        inside = entry < end[:, None]
        place = tl.load(entry_ptr + entry, mask=inside, other=0)
        inside = inside[:, None, :] & (heads < nH)[None, :, None]
        here = sum_ptr + heads.to(tl.int64)[None, :, None] * places + place[:, None, :]
        total += tl.load(here, mask=inside, other=0.0)
    grad = tl.sum(total, 2).to(grad_ptr.dtype.element_ty)
    row = tl.load(row_ptr + offs, mask=offs < used, other=0).to(tl.int64)
    exists = (offs < used)[:, None] & (heads < nH)[None, :]
    tl.store(grad_ptr + row[:, None] * nH + heads[None, :], grad, mask=exists)


def bias_tiles(table: Tensor, plan: Plan, width: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """The bias of every kind of window and head as tiles: (kinds, nH, RS/tile, tile*RS).

    Times width**0.5 for 16-bit kernels, which scale the sum of q k^T and this; as it is for float32 ones, which add it
    to the scaled product (see _window_parts._scores).
    """
    wide = is_wide(dtype, table.dtype)
    factor = 1.0 if dtype == torch.float32 else width**0.5
    index = plan.bias_t if transposed else plan.bias
    heads, elements = table.shape[1], index[0].numel()
    shape = (plan.kinds, heads, index.shape[1], index.shape[2])
    tiles = torch.empty(shape, dtype=torch.float32 if wide else torch.int16, device=table.device)
    block = 4096
    launch(
        _bias_tiles,
        (cdiv(elements, block), plan.kinds),
        table,
        index,
        tiles,
        factor,
        geometry.SEPARATED * factor,
        elements,
        heads,
        table.stride(0),
        table.stride(1),
        LARGEST=LARGEST,
        SMALLEST=SMALLEST,
        PADDING=geometry.PADDING,
        FOREIGN=geometry.FOREIGN,
        WIDE=wide,
        BLOCK=block,
        num_warps=8,
    )
    return tiles


def table_gradient(partial: Tensor, first: Tensor, plan: Plan, like: Tensor) -> Tensor:
    """Gradient of the table from the sums of dS over groups of windows.

    Args:
        partial: (groups, nH, RS/tile, RS/tile, tile, tile) float32, a kind's groups together.
        first: (kinds + 1,) int32, where a kind's groups start.
        like: the table; its shape and dtype are the result's.
    """
    heads, kinds = like.shape[1], len(first) - 1
    elements = prod(partial.shape[2:])
    total = torch.empty(heads, kinds, elements, dtype=torch.float32, device=partial.device)
    block = 4096
    launch(
        _sum_groups,
        (cdiv(elements, block), heads, kinds),
        partial,
        first,
        total,
        elements,
        heads,
        BLOCK=block,
        num_warps=8,
    )
    # rows that no pair of this window reads keep a gradient of 0
    grad = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    used = len(plan.row)
    launch(
        _table_gradient,
        (cdiv(used, 16), cdiv(heads, 4)),
        total,
        plan.row,
        plan.entry,
        plan.start,
        grad,
        kinds * elements,
        used,
        heads,
        ROWS=16,
        HEADS=4,
        BLOCK=64,
        num_warps=4,
    )
    return grad
