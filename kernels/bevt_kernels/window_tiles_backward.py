"""Window attention by tiles of scores, backward (layouts and log-sum-exps as in window_tiles.py).

With dP = dO v^T and delta = rowsum(dO * O): dS = p * (dP - delta), dQ = width**-0.5 dS k, dK = width**-0.5 dS^T q,
dBias = dS. A program owns a strip of queries and walks along the keys (dQ), or the other way round (dK and dV); the
table's gradient is window_bias_gradient.py. So dS is computed three times, rather than stored or added atomically.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from . import window_bias_gradient
from ._window_parts import (
    _attended,
    _fragment,
    _kind,
    _load,
    _load_share,
    _power,
    _scores,
    _store,
    _visible,
    is_wide,
    registers,
    scales,
    stages,
    strides,
    warps,
)
from .relative_bias import bias_tiles
from .runtime import capability, launch, tl, triton
from .window_geometry import Plan
from .window_tiles import _place, constants, forward_walk, group, inner, programs, walk


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
        kind, masked = _kind(kind_ptr, window % nW, MASKED_KIND)  # pyright: ignore[reportGeneralTypeIssues]
        span_ptr += kind * (STRIPS * 2)
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
            lo, hi = _visible(span_ptr, strip, BLOCK, FULL)
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
            for i in tl.range(0, FULL - (hi - lo), num_stages=1):
                j = tl.where(i < lo, i, i + hi - lo)
                if seen | _attended(span_ptr, strip, j * BLOCK, j * BLOCK + BLOCK, COARSE, REST):
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
        kind, masked = _kind(kind_ptr, window % nW, MASKED_KIND)  # pyright: ignore[reportGeneralTypeIssues]
        span_ptr += kind * (STRIPS * 2)
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
            lo, hi = _visible(span_ptr, strip, BLOCK, FULL)
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
                attended = _attended(span_ptr, queries, strip * TILE, strip * TILE + TILE, COARSE, REST)
                if (tl.load(seen_ptr + queries) != 0) | attended:
                    dk, dv = _key_step(
                        qkv_ptr, token_ptr, grad_ptr, lse_ptr, delta_ptr, bias_ptr, j * BLOCK, masked, separated,
                        stride_s, nH, total_windows * nH, c, k, v, dk, dv, RS, D, DP, TILE, BLOCK, WIDE, MASKED,
                    )  # fmt: skip

        out = dqkv_ptr + b * S * 3 * nH * D + head * D
        _store(out + nH * D, token * (3 * nH * D), dk * scale, offs < N, D, DP)
        _store(out + 2 * nH * D, token * (3 * nH * D), dv, offs < N, D, DP)


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
    forward = forward_walk(qkv, wide, plan)
    met = {"COARSE": forward.block, "REST": forward.block * forward.full}
    c, scale, separated = scales(width, qkv.dtype)
    sizes = (prod(grid), len(plan.token), heads, windows, group(windows))
    # sm_80 keeps a tile's operands in registers, where two of 64 x 64 do not fit
    exact = qkv.dtype == torch.float32
    narrow = capability(qkv.device) < 90 and not exact
    steps = walk(plan, plan.tile // 2 if narrow or (exact and width > 32) else plan.tile)
    launch(
        _backward_queries,
        programs(plan, windows, heads),
        qkv, plan.token, plan.kind, plan.span, tiles, out, rest, grad, lse, seen, delta, dqkv,
        c, scale, separated, *strides(qkv), *sizes,
        **constants(plan, width, wide, steps),
        **met,
        **registers(qkv, {100: 168}),
        num_warps=warps(qkv),
        num_stages=stages(qkv, {90: 2}),
        inner=inner(plan, steps, 6 * width),
    )  # fmt: skip
    if exact or (narrow and width > 32):
        steps = walk(plan, 16)
    else:
        steps = walk(plan, plan.tile // 2 if narrow and plan.masked else plan.tile)
    tiles_t = bias_tiles(table, plan, width, qkv.dtype, transposed=True)
    launch(
        _backward_keys,
        programs(plan, windows, heads),
        qkv, plan.token, plan.kind, plan.span, tiles_t, grad, lse, seen, delta, dqkv,
        c, scale, separated, *strides(qkv), *sizes,
        **constants(plan, width, wide, steps),
        **met,
        **registers(qkv, {80: 255}),
        num_warps=warps(qkv),
        num_stages=stages(qkv, {90: 2}),
        inner=inner(plan, steps, 8 * width),
    )  # fmt: skip
    if not table_too:
        return dqkv, torch.zeros_like(table)
    return dqkv, window_bias_gradient.gradient(grad, qkv, table, lse, seen, delta, tiles, plan, met)
