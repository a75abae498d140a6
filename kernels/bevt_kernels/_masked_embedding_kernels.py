"""The Triton kernels of masked_embedding.py, forward then backward.

Legend: M tokens in all, C channels; the mask covers planes of (H, W) tokens with cells of (CELL_H, CELL_W).

The token axes that x cannot merge with the last one are `outer`: at most three, of any strides. A program works on
tiles of consecutive tokens of the last, merged axis, so that loads coalesce along the tokens or along the channels,
whichever has stride 1. Row numbers fit int32, addresses do not.
"""

from .runtime import tl, triton


@triton.jit
def _tile(tile, inner, BLOCK_M: tl.constexpr):
    """The outer index of a tile, its places along the inner axis, and its row numbers in logical order."""
    tiles = tl.cdiv(inner, BLOCK_M)
    outer = tile // tiles
    places = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    return outer, places, outer * inner + places


@triton.jit
def _start(outer, size_1, size_2, stride_0, stride_1, stride_2):
    """Offset of an outer index, which counts through (axis 0, axis 1, axis 2)."""
    first = (outer // (size_1 * size_2)).to(tl.int64) * stride_0
    return first + (outer // size_2 % size_1).to(tl.int64) * stride_1 + (outer % size_2).to(tl.int64) * stride_2


@triton.jit
def _offsets(places, offs_c, stride_m, stride_c):
    """Offsets of a tile from the start of its outer index."""
    return places.to(tl.int64)[:, None] * stride_m + offs_c.to(tl.int64)[None, :] * stride_c


@triton.jit
def _load(ptrs, mask):
    """float32 values, 0 where the mask is off."""
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _hidden(
    mask_ptr,
    rows,
    inside,
    H: tl.constexpr,
    W: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    RUN: tl.constexpr,
):
    """Whether each row lies in a hidden cell; mask_ptr is (planes, H / CELL_H, W / CELL_W)."""
    cell_row = rows // (H * W) * (H // CELL_H) + rows // W % H // CELL_H
    cells = cell_row * (W // CELL_W) + rows % W // CELL_W
    return tl.load(mask_ptr + tl.max_constancy(cells, [RUN]), mask=inside, other=0) != 0


@triton.jit
def _normalise(x, valid_c, eps, C: tl.constexpr):
    """float32 rows with 0 in the padding of C -> normalised rows and their reciprocal deviations."""
    centred = tl.where(valid_c[None, :], x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    reciprocal = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    return centred * reciprocal[:, None], reciprocal


@triton.jit
def masked_embedding_fwd(
    x_ptr,  # (axis 0, axis 1, axis 2, inner, C)
    mask_ptr,  # (planes, H / CELL_H, W / CELL_W) uint8
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    token_ptr,  # (C,)
    out_ptr,  # (M, C)
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xm,
    stride_xc,
    size_1,
    size_2,
    inner,
    eps,
    C: tl.constexpr,
    HIDES: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    outer, places, rows = _tile(tl.program_id(0), inner, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues]
    offs_c = tl.arange(0, BLOCK_C)
    inside, valid_c = places < inner, offs_c < C
    mask_mc = inside[:, None] & valid_c[None, :]
    wanted = mask_mc
    if HIDES:
        hidden = _hidden(mask_ptr, rows, inside, H, W, CELL_H, CELL_W, RUN)
        wanted = wanted & (hidden == 0)[:, None]

    x_ptr += _start(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
    x = _load(x_ptr + _offsets(places, offs_c, stride_xm, stride_xc), wanted)
    normal, _ = _normalise(x, valid_c, eps, C)
    weight, bias = _load(weight_ptr + offs_c, valid_c), _load(bias_ptr + offs_c, valid_c)
    out = normal * weight[None, :] + bias[None, :]
    if HIDES:
        out = tl.where(hidden[:, None], _load(token_ptr + offs_c, valid_c)[None, :], out)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask_mc)


@triton.jit
def masked_embedding_bwd(
    grad_ptr,  # (M, C)
    x_ptr,  # (axis 0, axis 1, axis 2, inner, C)
    mask_ptr,  # (planes, H / CELL_H, W / CELL_W) uint8
    weight_ptr,  # (C,)
    dx_ptr,  # as x
    partial_ptr,  # (programs, 3, C) float32: this program's share of dweight, dbias, dtoken
    stride_x0,
    stride_x1,
    stride_x2,
    stride_xm,
    stride_xc,
    stride_d0,
    stride_d1,
    stride_d2,
    stride_dm,
    stride_dc,
    size_1,
    size_2,
    inner,
    tiles,
    eps,
    C: tl.constexpr,
    HIDES: tl.constexpr,
    WANTS_X: tl.constexpr,
    WANTS_SUMS: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CELL_H: tl.constexpr,
    CELL_W: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.arange(0, BLOCK_C)
    valid_c = offs_c < C
    weight = _load(weight_ptr + offs_c, valid_c)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    dtoken = tl.zeros((BLOCK_C,), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        outer, places, rows = _tile(tile, inner, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues]
        inside = places < inner
        mask_mc = inside[:, None] & valid_c[None, :]
        grad = _load(grad_ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :], mask_mc)
        wanted = mask_mc
        if HIDES:
            hidden = _hidden(mask_ptr, rows, inside, H, W, CELL_H, CELL_W, RUN)
            wanted = wanted & (hidden == 0)[:, None]
            if WANTS_SUMS:
                dtoken += tl.sum(tl.where(hidden[:, None], grad, 0.0), axis=0)
            grad = tl.where(hidden[:, None], 0.0, grad)

        offs_x = _offsets(places, offs_c, stride_xm, stride_xc)
        offs_x += _start(outer, size_1, size_2, stride_x0, stride_x1, stride_x2)
        normal, reciprocal = _normalise(_load(x_ptr + offs_x, wanted), valid_c, eps, C)
        if WANTS_SUMS:
            dweight += tl.sum(grad * normal, axis=0)
            dbias += tl.sum(grad, axis=0)
        if WANTS_X:
            scaled = grad * weight[None, :]
            mean = tl.sum(scaled, axis=1) / C
            along = tl.sum(scaled * normal, axis=1) / C
            dx = (scaled - mean[:, None] - normal * along[:, None]) * reciprocal[:, None]
            offs_d = _offsets(places, offs_c, stride_dm, stride_dc)
            offs_d += _start(outer, size_1, size_2, stride_d0, stride_d1, stride_d2)
            tl.store(dx_ptr + offs_d, dx.to(dx_ptr.dtype.element_ty), mask=mask_mc)
    if WANTS_SUMS:
        partial_ptr += tl.program_id(0).to(tl.int64) * 3 * C + offs_c
        tl.store(partial_ptr, dweight, mask=valid_c)
        tl.store(partial_ptr + C, dbias, mask=valid_c)
        tl.store(partial_ptr + 2 * C, dtoken, mask=valid_c)
