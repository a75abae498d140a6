"""The gradient of the bias table, where a window is many tiles (numbers and layouts as in window_tiles_backward.py).

A program owns one pair of tiles of one head and walks over a group of windows of one kind, in which the pair means the
same two sets of tokens; the sum of dS stays in registers and is written once. relative_bias.py adds the groups and
gathers the pairs of a table row, both in a fixed order.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from . import window_geometry as geometry
from ._window_parts import (
    _attended,
    _fragment,
    _load,
    _load_share,
    _load_t,
    _power,
    _scores,
    is_wide,
    padded_width,
    scales,
    stages,
    strides,
    warps,
)
from .relative_bias import table_gradient
from .runtime import Inner, cdiv, launch, tl, triton
from .window_geometry import Plan

PROGRAMS = 1600  # what the bias gradient spreads its windows over: a few waves


@triton.jit
def _bias_step(
    qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, listed_ptr, item, first, count, bias, acc, row, column, head, nH,
    heads, stride_b, stride_s, stride_p, S, c, RS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, nW,
):  # fmt: skip
    """The item-th window of a kind: samples run slowest."""
    w = tl.load(listed_ptr + first + item % count)
    b = (item // count).to(tl.int64)
    query = tl.load(token_ptr + w * RS + row).to(tl.int64)
    key = tl.load(token_ptr + w * RS + column).to(tl.int64)
    q = _load(qkv_ptr + b * stride_b, query * stride_s, D, DP)
    do = _load(grad_ptr + b * S * nH * D, query * (nH * D), D, DP)
    kt = _load_t(qkv_ptr + b * stride_b + stride_p, key * stride_s, D, DP)
    vt = _load_t(qkv_ptr + b * stride_b + 2 * stride_p, key * stride_s, D, DP)
    here = ((b * nW + w) * nH + head) * RS
    lse = tl.load(lse_ptr + here + row)
    delta = tl.load(delta_ptr + here + row)
    x = _scores(q, kt, bias, c)
    p = _power(x, lse[:, None], c, q.dtype == tl.float32)
    if q.dtype == tl.float32:
        p *= _load_share(lse_ptr + here, row, heads, lse, RS, True)[:, None]
    dp = tl.dot(do, vt, input_precision="ieee")
    return acc + p * (dp - delta[:, None])


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows"])
def _backward_bias(
    qkv_ptr,
    token_ptr,
    kind_ptr,
    span_ptr,
    bias_ptr,
    grad_ptr,
    lse_ptr,
    seen_ptr,
    delta_ptr,
    listed_ptr,  # (nW,) int32
    groups_ptr,  # (groups, 5) int32: kind, where it starts in `listed`, its windows, first and end item
    partial_ptr,  # (groups, nH, RS/TILE, RS/TILE, TILE, TILE) float32
    c,
    separated,
    stride_b,
    stride_s,
    stride_p,
    stride_h,
    S,
    nW,
    nH,
    total_windows,
    RS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_KIND: tl.constexpr,
    COARSE: tl.constexpr,
    REST: tl.constexpr,
):
    """One pair of tiles of one head, over a group of windows of one kind: bias and its gradient stay in registers."""
    STRIPS: tl.constexpr = RS // TILE
    pid = tl.program_id(0)
    columns = pid % STRIPS
    strip = pid // STRIPS % STRIPS
    head = pid // (STRIPS * STRIPS) % nH
    group = pid // (STRIPS * STRIPS * nH)
    groups_ptr += group * 5
    kind = tl.load(groups_ptr)
    first = tl.load(groups_ptr + 1)
    count = tl.load(groups_ptr + 2)
    begin = tl.load(groups_ptr + 3)
    end = tl.load(groups_ptr + 4)
    masked = tl.load(kind_ptr + tl.load(listed_ptr + first)) >= MASKED_KIND

    row = strip * TILE + tl.arange(0, TILE)
    column = columns * TILE + tl.arange(0, TILE)
    qkv_ptr += head.to(tl.int64) * stride_h
    grad_ptr += head * D
    tile_ptr = bias_ptr + ((kind * nH + head) * STRIPS + strip).to(tl.int64) * (TILE * RS) + columns * (TILE * TILE)
    bias = _fragment(tile_ptr, masked, separated, TILE, TILE, WIDE, MASKED)
    acc = tl.zeros((TILE, TILE), tl.float32)
    middle = end
    if MASKED:
        span_ptr += kind * (STRIPS * 2)
        attended = _attended(span_ptr, strip, columns * TILE, columns * TILE + TILE, COARSE, REST)
        middle = tl.where(attended, end, begin)
    for item in range(begin, middle):
        acc = _bias_step(
            qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, listed_ptr, item, first, count, bias, acc, row, column,
            head, nH, total_windows * nH, stride_b, stride_s, stride_p, S, c, RS, D, DP, nW,
        )  # fmt: skip
    if MASKED:
        for item in tl.range(middle, end, num_stages=1):
            w = tl.load(listed_ptr + first + item % count)
            place = ((item // count * nW + w).to(tl.int64) * nH + head) * STRIPS + strip
            if tl.load(seen_ptr + place) != 0:
                acc = _bias_step(
                    qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, listed_ptr, item, first, count, bias, acc, row,
                    column, head, nH, total_windows * nH, stride_b, stride_s, stride_p, S, c, RS, D, DP, nW,
                )  # fmt: skip
    partial_ptr += (((group * nH + head) * STRIPS + strip) * STRIPS + columns).to(tl.int64) * (TILE * TILE)
    tl.store(partial_ptr + tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :], acc)


def gradient(
    grad: Tensor, qkv: Tensor, table: Tensor, lse: Tensor, seen: Tensor, delta: Tensor, tiles: Tensor, plan: Plan,
    met: dict[str, int],
) -> Tensor:  # fmt: skip
    """Gradient of the table; `tiles` are its bias tiles with queries as rows, `delta` is rowsum(dO * O), and
    `met` says which pairs the forward met: COARSE and REST (see `_attended`)."""
    batch, heads, width = qkv.shape[0], qkv.shape[5], qkv.shape[6]
    c, _, separated = scales(width, qkv.dtype)
    tokens = qkv.shape[1] * qkv.shape[2] * qkv.shape[3]
    strips = plan.slots // plan.tile
    groups, first = _groups(plan.first, batch, strips * strips * heads, qkv.device)
    partial = torch.empty(
        len(groups), heads, strips, strips, plan.tile, plan.tile, dtype=torch.float32, device=qkv.device
    )
    launch(
        _backward_bias,
        (strips * strips * heads * len(groups),),
        qkv, plan.token, plan.kind, plan.span, tiles, grad, lse, seen, delta, plan.listed, groups, partial,
        c, separated, *strides(qkv), tokens, len(plan.token), heads, batch * len(plan.token),
        RS=plan.slots, D=width, DP=padded_width(width), TILE=plan.tile, WIDE=is_wide(qkv.dtype, table.dtype),
        MASKED=plan.masked, MASKED_KIND=geometry.MASKED_KIND, **met,
        num_warps=warps(qkv),
        num_stages=stages(qkv, {80: 2, 90: 2}),
        inner=Inner(plan.tile**2, 4 * width, plan.slots**2 / plan.tokens_per_window**2),
    )  # fmt: skip
    return table_gradient(partial, first, plan, table)


@lru_cache(maxsize=128)
def _groups(first: tuple[int, ...], batch: int, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The windows of a batch in groups of one kind: (groups, 5) and (kinds + 1,), as `_backward_bias` reads them."""
    items = [(end - begin) * batch for begin, end in pairwise(first)]
    size = max(1, cdiv(sum(items) * programs, PROGRAMS))
    rows, starts = [], [0]
    for kind, count in enumerate(items):
        windows = first[kind + 1] - first[kind]
        rows += [(kind, first[kind], windows, i, min(i + size, count)) for i in range(0, count, size)]
        starts.append(len(rows))
    with torch.inference_mode(False):
        table, start = (torch.tensor(x, dtype=torch.int32, device="cpu").to(device) for x in (rows, starts))
    return table, start
