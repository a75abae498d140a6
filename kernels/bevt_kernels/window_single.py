"""Window attention where one tile holds a whole window (N <= 64, the 7 x 7 windows of an image).

A program owns one head and walks along many windows. Bias and the gradient of the bias stay in registers, the softmax
needs no running maximum, and the backward is one pass: every score is computed once. Numbers and layouts are those of
window_tiles.py, except that slots keep the order of the tokens, so that the bias gradient can be summed over kinds of
windows.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import window_geometry as geometry
from ._window_parts import (
    _fragment,
    _kind,
    _load,
    _load_share,
    _power,
    _scores,
    _store,
    _store_lse,
    is_wide,
    lse_planes,
    padded_width,
    registers,
    scales,
    stages,
    strides,
)
from .relative_bias import bias_tiles, table_gradient
from .runtime import Inner, capability, cdiv, launch, tl, triton
from .window_geometry import Plan

PROGRAMS = 528  # four on each of an H100's 132 multiprocessors; the backward leaves one tile of float32 per program


@triton.jit
def _bias(
    bias_ptr, kind_ptr, window, head, nH, separated, TILE: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
    MASKED_KIND: tl.constexpr,
):  # fmt: skip
    """The bias tile of one head of a window."""
    kind, masked = _kind(kind_ptr, window, MASKED_KIND)  # pyright: ignore[reportGeneralTypeIssues]
    tile_ptr = bias_ptr + (kind * nH + head).to(tl.int64) * (TILE * TILE)
    return _fragment(tile_ptr, masked, separated, TILE, TILE, WIDE, MASKED)


@triton.jit
def _q_k_v(ptr, rows, stride_p, D: tl.constexpr, DP: tl.constexpr) -> Any:
    return _load(ptr, rows, D, DP), _load(ptr + stride_p, rows, D, DP), _load(ptr + 2 * stride_p, rows, D, DP)


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows", "per_program"])
def _forward(
    qkv_ptr,  # (B, S, 3, nH, D) by strides
    token_ptr,  # (nW, TILE) int32
    kind_ptr,  # (nW,) int32
    bias_ptr,  # (kinds, nH, TILE*TILE)
    out_ptr,  # (B, S, nH, D)
    lse_ptr,  # (planes, B*nW, nH, TILE) float32, base 2
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
    per_program,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_KIND: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_KIND: tl.constexpr,
):
    head = tl.program_id(0) % nH
    begin = tl.program_id(0) // nH * per_program
    offs = tl.arange(0, TILE)
    exists = offs < N
    qkv_ptr += head.to(tl.int64) * stride_h
    bias = tl.zeros((TILE, TILE), tl.float32)
    if ONE_KIND:
        bias = _bias(bias_ptr, kind_ptr, 0, head, nH, separated, TILE, WIDE, MASKED, MASKED_KIND)
    for window in range(begin, tl.minimum(begin + per_program, total_windows)):
        b = (window // nW).to(tl.int64)
        token = tl.load(token_ptr + window % nW * TILE + offs).to(tl.int64)
        q, k, v = _q_k_v(  # pyright: ignore[reportGeneralTypeIssues]
            qkv_ptr + b * stride_b, token * stride_s, stride_p, D, DP
        )
        if not ONE_KIND:
            bias = _bias(bias_ptr, kind_ptr, window % nW, head, nH, separated, TILE, WIDE, MASKED, MASKED_KIND)
        x = _scores(q, tl.trans(k), bias, c)
        m = tl.max(x, 1)
        if q.dtype != tl.float32:
            m *= c
        p = _power(x, m[:, None], c, q.dtype == tl.float32)
        total = tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        _store(out_ptr + b * S * nH * D + head * D, token * (nH * D), out, exists, D, DP)
        here = lse_ptr + (window * nH + head).to(tl.int64) * TILE
        _store_lse(here, offs, total_windows * nH, m, total, exists, TILE, q.dtype == tl.float32)


@triton.jit(do_not_specialize=["S", "nW", "nH", "total_windows", "per_program"])
def _backward(
    qkv_ptr,
    token_ptr,
    kind_ptr,
    bias_ptr,  # transposed tiles: keys are rows
    grad_ptr,  # (B, S, nH, D): dO
    lse_ptr,
    dqkv_ptr,  # (B, S, 3, nH, D)
    partial_ptr,  # (groups, nH, TILE, TILE) float32: sums of dS, queries are rows
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
    per_program,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_KIND: tl.constexpr,
    MASKED: tl.constexpr,
    MASKED_KIND: tl.constexpr,
):
    """Tiles are (keys, queries), so p and dS go straight into the products of dV and dK."""
    head = tl.program_id(0) % nH
    group = tl.program_id(0) // nH
    begin = group * per_program
    offs = tl.arange(0, TILE)
    exists = offs < N
    qkv_ptr += head.to(tl.int64) * stride_h
    acc = tl.zeros((TILE, TILE), tl.float32)
    bias = tl.zeros((TILE, TILE), tl.float32)
    if ONE_KIND:
        bias = _bias(bias_ptr, kind_ptr, 0, head, nH, separated, TILE, WIDE, MASKED, MASKED_KIND)
    for window in range(begin, tl.minimum(begin + per_program, total_windows)):
        b = (window // nW).to(tl.int64)
        token = tl.load(token_ptr + window % nW * TILE + offs).to(tl.int64)
        q, k, v = _q_k_v(  # pyright: ignore[reportGeneralTypeIssues]
            qkv_ptr + b * stride_b, token * stride_s, stride_p, D, DP
        )
        here = b * S * nH * D + head * D
        do = _load(grad_ptr + here, token * (nH * D), D, DP)
        row = lse_ptr + (window * nH + head).to(tl.int64) * TILE
        lse = tl.load(row + offs)
        if not ONE_KIND:
            bias = _bias(bias_ptr, kind_ptr, window % nW, head, nH, separated, TILE, WIDE, MASKED, MASKED_KIND)
        x = _scores(k, tl.trans(q), bias, c)
        p = _power(x, lse[None, :], c, q.dtype == tl.float32)
        if q.dtype == tl.float32:
            p *= _load_share(row, offs, total_windows * nH, lse, TILE, True)[None, :]
        out = dqkv_ptr + b * S * 3 * nH * D + head * D
        dv = tl.dot(p.to(do.dtype), do, input_precision="ieee")
        _store(out + 2 * nH * D, token * (3 * nH * D), dv, exists, D, DP)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        # over the sum of p, which the rounding of a large log-sum-exp keeps from being 1; padding slots have none
        delta = tl.sum(p * dp, 0) / tl.maximum(tl.sum(p, 0), 1e-30)
        ds = p * (dp - delta[None, :])
        acc += ds
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, input_precision="ieee")
        _store(out + nH * D, token * (3 * nH * D), dk * scale, exists, D, DP)
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee")
        _store(out, token * (3 * nH * D), dq * scale, exists, D, DP)
    partial_ptr += (group * nH + head).to(tl.int64) * (TILE * TILE)
    tl.store(partial_ptr + offs[None, :] * TILE + offs[:, None], acc)


def forward(qkv: Tensor, table: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output (B, t, h, w, nH, d) and the log-sum-exps (planes, B*nW, nH, tile)."""
    batch, *grid, _, heads, width = qkv.shape
    out = torch.empty(batch, *grid, heads, width, dtype=qkv.dtype, device=qkv.device)
    shape = (lse_planes(qkv.dtype), batch * len(plan.token), heads, plan.tile)
    lse = torch.empty(shape, dtype=torch.float32, device=qkv.device)
    c, _, separated = scales(width, qkv.dtype)
    groups, per_program = _groups(batch * len(plan.token), heads)
    launch(
        _forward,
        (groups * heads,),
        qkv, plan.token, plan.kind, bias_tiles(table, plan, width, qkv.dtype), out, lse, c, separated,
        *strides(qkv), *_sizes(qkv, plan), per_program,
        **_shape(qkv, table, plan),
        **registers(qkv, {100: 168}),
        num_warps=_warps(qkv, plan),
        num_stages=stages(qkv, {80: 2, 90: 2}),
        inner=Inner(plan.tile**2, 4 * width, plan.tile**2 / plan.tokens_per_window**2),
    )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor, qkv: Tensor, table: Tensor, lse: Tensor, plan: Plan, table_too: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv (contiguous) and of the table (zero if not `table_too`)."""
    batch, *_, heads, width = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    c, scale, separated = scales(width, qkv.dtype)
    groups, per_program = _groups(batch * len(plan.token), heads)
    partial = torch.empty(groups, heads, 1, 1, plan.tile, plan.tile, dtype=torch.float32, device=qkv.device)
    launch(
        _backward,
        (groups * heads,),
        qkv, plan.token, plan.kind, bias_tiles(table, plan, width, qkv.dtype, transposed=True), grad, lse,
        dqkv, partial, c, scale, separated, *strides(qkv), *_sizes(qkv, plan), per_program,
        **_shape(qkv, table, plan),
        **registers(qkv, {}),
        num_warps=_warps(qkv, plan),
        num_stages=stages(qkv, {90: 2}),
        inner=Inner(plan.tile**2, 10 * width, plan.tile**2 / plan.tokens_per_window**2),
    )  # fmt: skip
    if not table_too:
        return dqkv, torch.zeros_like(table)
    return dqkv, table_gradient(partial, _all(groups, qkv.device), plan, table)


def _groups(windows: int, heads: int) -> tuple[int, int]:
    """Groups of windows, and windows in each."""
    size = max(1, cdiv(windows * heads, PROGRAMS))
    return cdiv(windows, size), size


@lru_cache(maxsize=128)
def _all(groups: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0, groups], dtype=torch.int32, device="cpu").to(device)


def _warps(qkv: Tensor, plan: Plan) -> int:
    """One for 16 rows of a 16-bit product; plain float32 products need more threads to hold their operands."""
    return plan.tile // (8 if qkv.dtype == torch.float32 else 16)


def _sizes(qkv: Tensor, plan: Plan) -> tuple[int, int, int, int]:
    """S, nW, nH and all windows."""
    tokens = qkv.shape[1] * qkv.shape[2] * qkv.shape[3]
    return tokens, len(plan.token), qkv.shape[5], qkv.shape[0] * len(plan.token)


def _shape(qkv: Tensor, table: Tensor, plan: Plan) -> dict[str, int | bool]:
    # with one kind the bias tile stays in registers; sm_80 has none to spare and loads it for each window
    resident = plan.kinds == 1 and capability(qkv.device) >= 90
    return {
        "N": plan.tokens_per_window, "D": qkv.shape[6], "DP": padded_width(qkv.shape[6]), "TILE": plan.tile,
        "WIDE": is_wide(qkv.dtype, table.dtype), "ONE_KIND": resident, "MASKED": plan.masked,
        "MASKED_KIND": geometry.MASKED_KIND,
    }  # fmt: skip
