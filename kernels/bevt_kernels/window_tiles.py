"""Window attention by tiles of scores, forward: windows of any size (the backward is window_tiles_backward.py).

A program owns one strip of `tile` queries of one head of one window and walks along the keys. Its addresses come from a
table of token numbers, which holds roll and partition; the bias of the pair of tiles is a vector load that becomes the
accumulator of q k^T (see relative_bias.py), so the loop holds no compare and no index arithmetic.

Numbers: scores s = (q.k + bias * width**0.5) * c with c = width**-0.5 * log2(e), p = 2**(s - m). Log-sum-exps are in
base 2.

Keys of another region are 100 lower. Tiles that hold nothing else come last; when the running maxima of the strip show
that all their weights are below 2**-40 (`NEGLIGIBLE`: then a whole window of them is below a float32 rounding) they are
skipped; the kernel notes in `seen` whether one was not, and the backward reads it.
"""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import window_geometry as geometry
from ._window_parts import (
    LN_2,
    LOG2_E,
    _fragment,
    _kind,
    _load,
    _load_t,
    _power,
    _scores,
    _store,
    _store_lse,
    _visible,
    is_wide,
    lse_planes,
    padded_width,
    registers,
    scales,
    stages,
    strides,
    warps,
)
from .relative_bias import bias_tiles
from .runtime import Inner, capability, cdiv, launch, power_of_2, tl, triton
from .window_geometry import Plan

NEGLIGIBLE = -40.0
# windows that run side by side before the next strip: three programs on each of an H100's 132 multiprocessors
GROUP = 396


@triton.jit
def _place(pid, group, strips, nH) -> Any:
    """Program number -> (window, strip, head): windows run fastest inside a group, so neighbours share a bias strip."""
    per = group * strips * nH
    rest = pid % per
    return (pid // per) * group + rest % group, rest // group % strips, rest // group // strips


@triton.jit
def _attend(
    k_ptr, v_ptr, token_ptr, bias_ptr, begin, masked, separated, stride_s, q, m, total, acc, c,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the running softmax: BLOCK keys from slot `begin` on."""
    rows = tl.load(token_ptr + begin + tl.arange(0, BLOCK)).to(tl.int64) * stride_s
    kt = _load_t(k_ptr, rows, D, DP)
    v = _load(v_ptr, rows, D, DP)
    bias = _fragment(bias_ptr + begin * TILE, masked, separated, TILE, BLOCK, WIDE, MASKED)
    x = _scores(q, kt, bias, c)
    return _weigh(x, v, m, total, acc, c)


@triton.jit
def _weigh(x, v, m, total, acc, c):
    largest = tl.max(x, 1)
    if v.dtype != tl.float32:
        largest *= c
    m_new = tl.maximum(m, largest)
    alpha = tl.exp2((m - m_new) * LOG2_E) if v.dtype == tl.float32 else tl.exp2(m - m_new)
    p = _power(x, m_new[:, None], c, v.dtype == tl.float32)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, total * alpha + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows", "group"])
def _forward(
    qkv_ptr,  # (B, S, 3, nH, D) by strides
    token_ptr,  # (nW, RS) int32
    kind_ptr,  # (nW,) int32
    span_ptr,  # (kinds, RS/TILE, 2) int32
    bias_ptr,  # (kinds, nH, RS/TILE, TILE*RS)
    out_ptr,  # (B, S, nH, D)
    rest_ptr,  # (B, S, nH, D): what rounding took from the output; 16 bits only
    lse_ptr,  # (planes, B*nW, nH, RS) float32, base 2; +inf where a slot is padding
    seen_ptr,  # (B*nW, nH, RS/TILE) int32: a key of another region counts
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
    group,
    N: tl.constexpr,
    RS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_KIND: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
):
    STRIPS: tl.constexpr = RS // TILE
    window, strip, head = _place(tl.program_id(0), group, STRIPS, nH)  # pyright: ignore[reportGeneralTypeIssues]
    if window < total_windows:
        b = (window // nW).to(tl.int64)
        token_ptr += window % nW * RS
        kind, masked = _kind(kind_ptr, window % nW, MASKED_KIND)  # pyright: ignore[reportGeneralTypeIssues]
        span_ptr += kind * (STRIPS * 2)
        qkv_ptr += b * stride_b + head.to(tl.int64) * stride_h
        k_ptr = qkv_ptr + stride_p
        v_ptr = k_ptr + stride_p
        bias_ptr += ((kind * nH + head) * STRIPS + strip).to(tl.int64) * (TILE * RS)

        offs = strip * TILE + tl.arange(0, TILE)
        token = tl.load(token_ptr + offs).to(tl.int64)
        q = _load(qkv_ptr, token * stride_s, D, DP)
        m = tl.full((TILE,), -float("inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, DP), tl.float32)

        lo, hi = 0, FULL
        if MASKED:
            lo, hi = _visible(span_ptr, strip, BLOCK, FULL)
        for j in range(lo, hi):
            m, total, acc = _attend(
                k_ptr, v_ptr, token_ptr, bias_ptr, j * BLOCK, masked, separated, stride_s, q, m, total, acc, c,
                D, DP, TILE, BLOCK, WIDE, MASKED,
            )  # fmt: skip
        if TAIL > 0:
            m, total, acc = _attend(
                k_ptr, v_ptr, token_ptr, bias_ptr, FULL * BLOCK, masked, separated, stride_s, q, m, total, acc, c,
                D, DP, TILE, TAIL, WIDE, MASKED,
            )  # fmt: skip
        if MASKED:
            seen = 0
            # the maxima only grow, so what was negligible stays so; a padding slot sees nobody
            if q.dtype == tl.float32:
                limit = m + NEGLIGIBLE * LN_2
            else:
                limit = (m + NEGLIGIBLE) / c
            limit = tl.where(offs < N, limit, float("inf"))
            for i in tl.range(0, FULL - (hi - lo), num_stages=1):
                j = tl.where(i < lo, i, i + hi - lo)
                rows = tl.load(token_ptr + j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64) * stride_s
                bias = _fragment(bias_ptr + j * (TILE * BLOCK), masked, separated, TILE, BLOCK, WIDE, MASKED)
                x = _scores(q, _load_t(k_ptr, rows, D, DP), bias, c)
                if tl.max(tl.where(x > limit[:, None], 1, 0)) > 0:
                    seen = 1
                    m, total, acc = _weigh(x, _load(v_ptr, rows, D, DP), m, total, acc, c)
            tl.store(seen_ptr + (window * nH + head).to(tl.int64) * STRIPS + strip, seen)

        exists = offs < N
        here = b * S * nH * D + head * D
        out = acc / total[:, None]
        _store(out_ptr + here, token * (nH * D), out, exists, D, DP)
        if q.dtype != tl.float32:
            out -= out.to(q.dtype).to(tl.float32)
            _store(rest_ptr + here, token * (nH * D), out, exists, D, DP)
        lse_ptr += (window * nH + head).to(tl.int64) * RS
        _store_lse(lse_ptr, offs, total_windows * nH, m, total, exists, RS, q.dtype == tl.float32)


def forward(qkv: Tensor, table: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, t, h, w, nH, d), the log-sum-exps (planes, B*nW, nH, RS) and `seen` (B*nW, nH, RS/tile)."""
    batch, *grid, _, heads, width = qkv.shape
    windows = batch * len(plan.token)
    out = torch.empty(batch, *grid, heads, width, dtype=qkv.dtype, device=qkv.device)
    rest = torch.empty_like(out) if qkv.dtype != torch.float32 else out.new_empty(0)
    lse = torch.empty(lse_planes(qkv.dtype), windows, heads, plan.slots, dtype=torch.float32, device=qkv.device)
    seen = torch.empty(windows, heads, plan.slots // plan.tile, dtype=torch.int32, device=qkv.device)
    wide = is_wide(qkv.dtype, table.dtype)
    steps = forward_walk(qkv, wide, plan)
    c, _, separated = scales(width, qkv.dtype)
    launch(
        _forward,
        programs(plan, windows, heads),
        qkv, plan.token, plan.kind, plan.span, bias_tiles(table, plan, width, qkv.dtype), out, rest, lse, seen,
        c, separated, *strides(qkv), prod(grid), len(plan.token), heads, windows, group(windows),
        **constants(plan, width, wide, steps),
        NEGLIGIBLE=NEGLIGIBLE,
        **registers(qkv, {100: 168}),
        num_warps=warps(qkv),
        num_stages=stages(qkv, {80: 2, 90: 2}),
        inner=inner(plan, steps, 4 * width),
    )  # fmt: skip
    return out, lse, seen, rest


class Walk(NamedTuple):
    """The slots that a program meets: whole blocks, then one of 16, 32, ... slots for what remains."""

    block: int
    full: int  # whole blocks
    tail: int  # 0 where nothing remains


def forward_walk(qkv: Tensor, wide: bool, plan: Plan) -> Walk:
    """That of the forward, which the backward must know to meet the same pairs."""
    chip = capability(qkv.device)
    block = plan.tile if qkv.shape[6] > 32 or (chip < 90 and wide) else 2 * plan.tile
    # on sm_100 the code that skips regions takes the registers
    return walk(plan, block // 2 if plan.masked and chip >= 100 else block)


def walk(plan: Plan, block: int) -> Walk:
    """Over a window's tokens. A block of more than a tile gives way to the tile where it would pad by over a tenth."""
    choices = []
    for size in dict.fromkeys((block, min(block, plan.tile))):
        full, rest = divmod(plan.tokens_per_window, size)
        tail = max(16, power_of_2(rest)) if rest else 0
        choices.append(Walk(size, full + 1, 0) if tail >= size else Walk(size, full, tail))
    covered = [choice.block * choice.full + choice.tail for choice in choices]
    return choices[0] if covered[0] <= 1.1 * covered[-1] else choices[-1]


def group(windows: int) -> int:
    return min(GROUP, max(windows, 1))


def programs(plan: Plan, windows: int, heads: int) -> tuple[int]:
    return (cdiv(windows, group(windows)) * group(windows) * (plan.slots // plan.tile) * heads,)


def constants(plan: Plan, width: int, wide: bool, steps: Walk) -> dict[str, int | bool]:
    return {
        "N": plan.tokens_per_window, "RS": plan.slots, "D": width, "DP": padded_width(width), "TILE": plan.tile,
        "BLOCK": steps.block, "FULL": steps.full, "TAIL": steps.tail, "WIDE": wide, "MASKED": plan.masked,
        "MASKED_KIND": geometry.MASKED_KIND,
    }  # fmt: skip


def inner(plan: Plan, steps: Walk, flops: float) -> Inner:
    walked = plan.slots * (steps.block * steps.full + steps.tail)
    return Inner(plan.tile * steps.block, flops, walked / plan.tokens_per_window**2)
