"""Window attention by tiles of scores: windows of any size, forward and backward.

A program owns one strip of `tile` queries (or keys) of one head of one window and walks along the other side. Its
addresses come from a table of token numbers, which holds roll and partition; the bias of the pair of tiles is a vector
load that becomes the accumulator of q k^T (see relative_bias.py), so the loop holds no compare and no index arithmetic.

Numbers: scores s = (q.k + bias * width**0.5) * c with c = width**-0.5 * log2(e), p = 2**(s - m). Log-sum-exps are in
base 2. With dP = dO v^T and delta = rowsum(dO * O): dS = p * (dP - delta), dQ = width**-0.5 dS k,
dK = width**-0.5 dS^T q, dBias = dS. dS is computed three times (for dK and dV, for dQ, for dBias) rather than stored or
added atomically.

Keys of another region are 100 lower. Tiles that hold nothing else come last; when the running maxima of the strip show
that all their weights are below 2**-40 (`NEGLIGIBLE`: then a whole window of them is below a float32 rounding) they are
skipped; the forward notes in `seen` whether one was not, and the backward reads it.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from . import window_bias_gradient
from . import window_geometry as geometry
from ._window_parts import (
    _attended,
    _fragment,
    _load,
    _load_share,
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
def _place(pid, GROUP, strips, nH) -> Any:
    """Program number -> (window, strip, head): windows run fastest inside a group, so neighbours share a bias strip."""
    per = GROUP * strips * nH
    rest = pid % per
    return (pid // per) * GROUP + rest % GROUP, rest // GROUP % strips, rest // GROUP // strips


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
    alpha = tl.exp2((m - m_new) * 1.4426950408889634) if v.dtype == tl.float32 else tl.exp2(m - m_new)
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
        kind = tl.load(kind_ptr + window % nW)
        masked = kind >= MASKED_KIND
        kind = kind % MASKED_KIND
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
            lo, hi = _visible(span_ptr, kind, strip, STRIPS, BLOCK, FULL)
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
                limit = m + NEGLIGIBLE * 0.6931471805599453
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


@triton.jit
def _p_and_dp(
    k, v_ptr, rows, bias_ptr, begin, masked, separated, q, do, lse, share, c,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
) -> Any:  # fmt: skip
    v = _load(v_ptr, rows, D, DP)
    bias = _fragment(bias_ptr + begin * TILE, masked, separated, TILE, BLOCK, WIDE, MASKED)
    x = _scores(q, tl.trans(k), bias, c)
    p = _power(x, lse[:, None], c, q.dtype == tl.float32)
    if q.dtype == tl.float32:
        p *= share[:, None]
    return p, tl.dot(do, tl.trans(v), input_precision="ieee")


@triton.jit
def _delta_step(
    k_ptr, v_ptr, token_ptr, bias_ptr, begin, masked, separated, stride_s, q, do, lse, share, c,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """What BLOCK keys add to the rows' sums of p * dP."""
    rows = tl.load(token_ptr + begin + tl.arange(0, BLOCK)).to(tl.int64) * stride_s
    k = _load(k_ptr, rows, D, DP)
    p, dp = _p_and_dp(  # pyright: ignore[reportGeneralTypeIssues]
        k, v_ptr, rows, bias_ptr, begin, masked, separated, q, do, lse, share, c, D, DP, TILE, BLOCK, WIDE, MASKED
    )
    return tl.sum(p * dp, 1)


@triton.jit
def _query_step(
    k_ptr, v_ptr, token_ptr, bias_ptr, begin, masked, separated, stride_s, q, do, lse, share, delta, dq, c,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK keys from slot `begin` on."""
    rows = tl.load(token_ptr + begin + tl.arange(0, BLOCK)).to(tl.int64) * stride_s
    k = _load(k_ptr, rows, D, DP)
    p, dp = _p_and_dp(  # pyright: ignore[reportGeneralTypeIssues]
        k, v_ptr, rows, bias_ptr, begin, masked, separated, q, do, lse, share, c, D, DP, TILE, BLOCK, WIDE, MASKED
    )
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows", "group"])
def _backward_queries(
    qkv_ptr,
    token_ptr,
    kind_ptr,
    span_ptr,
    bias_ptr,
    out_ptr,
    rest_ptr,
    grad_ptr,  # (B, S, nH, D): dO
    lse_ptr,
    seen_ptr,
    delta_ptr,  # (B*nW, nH, RS) float32, written here
    dqkv_ptr,  # (B, S, 3, nH, D): dQ is written here
    c,
    scale,
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
    COARSE: tl.constexpr,
    REST: tl.constexpr,
):
    STRIPS: tl.constexpr = RS // TILE
    window, strip, head = _place(tl.program_id(0), group, STRIPS, nH)  # pyright: ignore[reportGeneralTypeIssues]
    if window < total_windows:
        b = (window // nW).to(tl.int64)
        token_ptr += window % nW * RS
        kind = tl.load(kind_ptr + window % nW)
        masked = kind >= MASKED_KIND
        kind = kind % MASKED_KIND
        qkv_ptr += b * stride_b + head.to(tl.int64) * stride_h
        k_ptr = qkv_ptr + stride_p
        v_ptr = k_ptr + stride_p
        bias_ptr += ((kind * nH + head) * STRIPS + strip).to(tl.int64) * (TILE * RS)

        offs = strip * TILE + tl.arange(0, TILE)
        token = tl.load(token_ptr + offs).to(tl.int64)
        here = b * S * nH * D + head * D
        q = _load(qkv_ptr, token * stride_s, D, DP)
        do = _load(grad_ptr + here, token * (nH * D), D, DP)
        row = (window * nH + head).to(tl.int64) * RS
        lse = tl.load(lse_ptr + row + offs)
        share = _load_share(lse_ptr + row, offs, total_windows * nH, lse, RS, q.dtype == tl.float32)
        if q.dtype == tl.float32:
            # dO * O is the same sum of p * dP, but over terms of either sign: their roundings would show in float32
            delta = tl.zeros((TILE,), tl.float32)
            for j in range(0, FULL):
                delta += _delta_step(
                    k_ptr, v_ptr, token_ptr, bias_ptr, j * BLOCK, masked, separated, stride_s, q, do, lse, share, c,
                    D, DP, TILE, BLOCK, WIDE, MASKED,
                )  # fmt: skip
            if TAIL > 0:
                delta += _delta_step(
                    k_ptr, v_ptr, token_ptr, bias_ptr, FULL * BLOCK, masked, separated, stride_s, q, do, lse, share, c,
                    D, DP, TILE, TAIL, WIDE, MASKED,
                )  # fmt: skip
        else:
            # with the output as it was before its rounding, which alone would put delta off by more than all of torch
            o = _load(out_ptr + here, token * (nH * D), D, DP).to(tl.float32)
            o += _load(rest_ptr + here, token * (nH * D), D, DP).to(tl.float32)
            delta = tl.sum(o * do.to(tl.float32), 1)
        tl.store(delta_ptr + row + offs, delta)
        dq = tl.zeros((TILE, DP), tl.float32)

        lo, hi = 0, FULL
        if MASKED:
            lo, hi = _visible(span_ptr, kind, strip, STRIPS, BLOCK, FULL)
        for j in range(lo, hi):
            dq = _query_step(
                k_ptr, v_ptr, token_ptr, bias_ptr, j * BLOCK, masked, separated, stride_s, q, do, lse, share, delta,
                dq, c, D, DP, TILE, BLOCK, WIDE, MASKED,
            )  # fmt: skip
        if TAIL > 0:
            dq = _query_step(
                k_ptr, v_ptr, token_ptr, bias_ptr, FULL * BLOCK, masked, separated, stride_s, q, do, lse, share,
                delta, dq, c, D, DP, TILE, TAIL, WIDE, MASKED,
            )  # fmt: skip
        if MASKED:
            seen = tl.load(seen_ptr + (window * nH + head).to(tl.int64) * STRIPS + strip) != 0
            first = tl.load(span_ptr + (kind * STRIPS + strip) * 2)
            end = tl.load(span_ptr + (kind * STRIPS + strip) * 2 + 1)
            for i in tl.range(0, FULL - (hi - lo), num_stages=1):
                j = tl.where(i < lo, i, i + hi - lo)
                if seen | _attended(first, end, j * BLOCK, j * BLOCK + BLOCK, COARSE, REST):
                    dq = _query_step(
                        k_ptr, v_ptr, token_ptr, bias_ptr, j * BLOCK, masked, separated, stride_s, q, do, lse, share,
                        delta, dq, c, D, DP, TILE, BLOCK, WIDE, MASKED,
                    )  # fmt: skip

        out = dqkv_ptr + b * S * 3 * nH * D + head * D
        _store(out, token * (3 * nH * D), dq * scale, offs < N, D, DP)


@triton.jit
def _key_step(
    qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, bias_ptr, begin, masked, separated, stride_s, nH, heads, c, k, v,
    dk, dv, RS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """BLOCK queries from slot `begin` on; tiles are (keys, queries), so p and dS go straight into the products."""
    offs = begin + tl.arange(0, BLOCK)
    token = tl.load(token_ptr + offs).to(tl.int64)
    q = _load(qkv_ptr, token * stride_s, D, DP)
    do = _load(grad_ptr, token * (nH * D), D, DP)
    lse = tl.load(lse_ptr + offs)
    delta = tl.load(delta_ptr + offs)
    bias = _fragment(bias_ptr + begin * TILE, masked, separated, TILE, BLOCK, WIDE, MASKED)
    x = _scores(k, tl.trans(q), bias, c)
    p = _power(x, lse[None, :], c, q.dtype == tl.float32)
    if q.dtype == tl.float32:
        p *= _load_share(lse_ptr, offs, heads, lse, RS, True)[None, :]
    dp = tl.dot(v, tl.trans(do), input_precision="ieee")
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    return tl.dot(ds, q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows", "group"])
def _backward_keys(
    qkv_ptr,
    token_ptr,
    kind_ptr,
    span_ptr,
    bias_ptr,  # transposed tiles: keys are rows
    grad_ptr,
    lse_ptr,
    seen_ptr,
    delta_ptr,
    dqkv_ptr,  # dK and dV are written here
    c,
    scale,
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
    COARSE: tl.constexpr,
    REST: tl.constexpr,
):
    STRIPS: tl.constexpr = RS // TILE
    window, strip, head = _place(tl.program_id(0), group, STRIPS, nH)  # pyright: ignore[reportGeneralTypeIssues]
    if window < total_windows:
        b = (window // nW).to(tl.int64)
        token_ptr += window % nW * RS
        kind = tl.load(kind_ptr + window % nW)
        masked = kind >= MASKED_KIND
        kind = kind % MASKED_KIND
        qkv_ptr += b * stride_b + head.to(tl.int64) * stride_h
        bias_ptr += ((kind * nH + head) * STRIPS + strip).to(tl.int64) * (TILE * RS)
        grad_ptr += b * S * nH * D + head * D
        lse_ptr += (window * nH + head).to(tl.int64) * RS
        delta_ptr += (window * nH + head).to(tl.int64) * RS

        offs = strip * TILE + tl.arange(0, TILE)
        token = tl.load(token_ptr + offs).to(tl.int64)
        k = _load(qkv_ptr + stride_p, token * stride_s, D, DP)
        v = _load(qkv_ptr + 2 * stride_p, token * stride_s, D, DP)
        dk = tl.zeros((TILE, DP), tl.float32)
        dv = tl.zeros((TILE, DP), tl.float32)

        lo, hi = 0, FULL
        if MASKED:
            lo, hi = _visible(span_ptr, kind, strip, STRIPS, BLOCK, FULL)
        for j in range(lo, hi):
            dk, dv = _key_step(
                qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, bias_ptr, j * BLOCK, masked, separated, stride_s, nH,
                total_windows * nH, c, k, v, dk, dv, RS, D, DP, TILE, BLOCK, WIDE, MASKED,
            )  # fmt: skip
        if TAIL > 0:
            dk, dv = _key_step(
                qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, bias_ptr, FULL * BLOCK, masked, separated, stride_s,
                nH, total_windows * nH, c, k, v, dk, dv, RS, D, DP, TILE, TAIL, WIDE, MASKED,
            )  # fmt: skip
        if MASKED:
            seen_ptr += (window * nH + head).to(tl.int64) * STRIPS
            for i in tl.range(0, FULL - (hi - lo), num_stages=1):
                j = tl.where(i < lo, i, i + hi - lo)
                queries = j * BLOCK // TILE
                first = tl.load(span_ptr + (kind * STRIPS + queries) * 2)
                end = tl.load(span_ptr + (kind * STRIPS + queries) * 2 + 1)
                attended = _attended(first, end, strip * TILE, strip * TILE + TILE, COARSE, REST)
                if (tl.load(seen_ptr + queries) != 0) | attended:
                    dk, dv = _key_step(
                        qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, bias_ptr, j * BLOCK, masked, separated,
                        stride_s, nH, total_windows * nH, c, k, v, dk, dv, RS, D, DP, TILE, BLOCK, WIDE, MASKED,
                    )  # fmt: skip

        out = dqkv_ptr + b * S * 3 * nH * D + head * D
        _store(out + nH * D, token * (3 * nH * D), dk * scale, offs < N, D, DP)
        _store(out + 2 * nH * D, token * (3 * nH * D), dv, offs < N, D, DP)


def forward(qkv: Tensor, table: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (B, t, h, w, nH, d), the log-sum-exps (planes, B*nW, nH, RS) and `seen` (B*nW, nH, RS/tile)."""
    batch, *grid, _, heads, width = qkv.shape
    windows = batch * len(plan.token)
    out = torch.empty(batch, *grid, heads, width, dtype=qkv.dtype, device=qkv.device)
    rest = torch.empty_like(out) if qkv.dtype != torch.float32 else out.new_empty(0)
    lse = torch.empty(lse_planes(qkv.dtype), windows, heads, plan.slots, dtype=torch.float32, device=qkv.device)
    seen = torch.empty(windows, heads, plan.slots // plan.tile, dtype=torch.int32, device=qkv.device)
    wide = is_wide(qkv.dtype, table.dtype)
    blocks = _forward_blocks(qkv, wide, plan)
    launch(
        _forward,
        _grid(plan, windows, heads),
        qkv,
        plan.token,
        plan.kind,
        plan.span,
        bias_tiles(table, plan, width, qkv.dtype),
        out,
        rest,
        lse,
        seen,
        scales(width, qkv.dtype)[0],
        scales(width, qkv.dtype)[2],
        *strides(qkv),
        prod(grid),
        len(plan.token),
        heads,
        windows,
        min(GROUP, max(windows, 1)),
        **_shape(plan, width, wide, blocks),
        NEGLIGIBLE=NEGLIGIBLE,
        **registers(qkv),
        num_warps=warps(qkv),
        num_stages=stages(qkv, {80: 2, 90: 2}),
        inner=_inner(plan, width, blocks, 4 * width),
    )
    return out, lse, seen, rest


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    rest: Tensor,
    plan: Plan,
    table_too: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv (contiguous) and of the table (zero if not `table_too`)."""
    batch, *grid, _, heads, width = qkv.shape
    windows = batch * len(plan.token)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse[0])
    wide = is_wide(qkv.dtype, table.dtype)
    tiles = bias_tiles(table, plan, width, qkv.dtype)
    coarse, full, _ = _forward_blocks(qkv, wide, plan)
    forward_walk = {"COARSE": coarse, "REST": coarse * full}
    c, scale, separated = scales(width, qkv.dtype)
    place = (prod(grid), len(plan.token), heads)
    geometry_ = (plan.token, plan.kind, plan.span)
    order = (windows, min(GROUP, max(windows, 1)))
    # sm_80 keeps a tile's operands in registers, where two of 64 x 64 do not fit
    narrow = capability(qkv.device) < 90 and qkv.dtype != torch.float32
    blocks = _blocks(plan, plan.tile // 2 if narrow else plan.tile)
    launch(
        _backward_queries,
        _grid(plan, windows, heads),
        qkv, *geometry_, tiles, out, rest, grad, lse, seen, delta, dqkv,
        c, scale, separated, *strides(qkv), *place, *order,
        **_shape(plan, width, wide, blocks),
        **forward_walk,
        **registers(qkv),
        num_warps=warps(qkv),
        num_stages=stages(qkv, {90: 2}),
        inner=_inner(plan, width, blocks, 6 * width),
    )  # fmt: skip
    if qkv.dtype == torch.float32 or (narrow and width > 32):
        blocks = _blocks(plan, 16)
    else:
        blocks = _blocks(plan, plan.tile)
    launch(
        _backward_keys,
        _grid(plan, windows, heads),
        qkv, *geometry_, bias_tiles(table, plan, width, qkv.dtype, transposed=True), grad, lse, seen, delta, dqkv,
        c, scale, separated, *strides(qkv), *place, *order,
        **_shape(plan, width, wide, blocks),
        **forward_walk,
        num_warps=warps(qkv),
        num_stages=stages(qkv, {90: 2}),
        inner=_inner(plan, width, blocks, 8 * width),
    )  # fmt: skip
    if not table_too:
        return dqkv, torch.zeros_like(table)
    return dqkv, window_bias_gradient.gradient(grad, qkv, table, lse, seen, delta, tiles, plan, forward_walk)


def _forward_blocks(qkv: Tensor, wide: bool, plan: Plan) -> tuple[int, int, int]:
    """The blocks of the forward, which the backward must know to meet the same pairs."""
    chip = capability(qkv.device)
    block = plan.tile if qkv.shape[6] > 32 or (chip < 90 and wide) else 2 * plan.tile
    # on sm_100 the code that skips regions takes the registers
    return _blocks(plan, block // 2 if plan.masked and chip >= 100 else block)


def _blocks(plan: Plan, block: int) -> tuple[int, int, int]:
    """(BLOCK, FULL, TAIL): whole blocks and a last one of 16, 32, ... slots that cover a window's tokens.

    A block of more than a tile gives way to the tile where it would pad by over a tenth.
    """
    choices = []
    for size in dict.fromkeys((block, min(block, plan.tile))):
        full, rest = divmod(plan.tokens_per_window, size)
        tail = max(16, power_of_2(rest)) if rest else 0
        choices.append((size, full + 1, 0) if tail >= size else (size, full, tail))
    covered = [size * full + tail for size, full, tail in choices]
    return choices[0] if covered[0] <= 1.1 * covered[-1] else choices[-1]


def _grid(plan: Plan, windows: int, heads: int) -> tuple[int]:
    group = min(GROUP, max(windows, 1))
    return (cdiv(windows, group) * group * (plan.slots // plan.tile) * heads,)


def _shape(plan: Plan, width: int, wide: bool, blocks: tuple[int, int, int]) -> dict[str, int | bool]:
    return {
        "N": plan.tokens_per_window, "RS": plan.slots, "D": width, "DP": padded_width(width), "TILE": plan.tile,
        "BLOCK": blocks[0], "FULL": blocks[1], "TAIL": blocks[2], "WIDE": wide, "MASKED": plan.masked,
        "MASKED_KIND": geometry.MASKED_KIND,
    }  # fmt: skip


def _inner(plan: Plan, width: int, blocks: tuple[int, int, int], flops: float) -> Inner:
    walked = plan.slots * (blocks[0] * blocks[1] + blocks[2])
    return Inner(plan.tile * blocks[0], flops, walked / plan.tokens_per_window**2)
