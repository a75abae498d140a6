"""The Triton kernels of masked_cross_entropy.py, in the order in which they run.

Legend: P positions, of which the list of hidden rows names some; K feature width, V codebook size, VP the same in whole
tiles; SLICE rows are scored and turned at a time, a chunk of rows enters the gradients at once.
"""

from ._hidden_rows import linear_tile, row_of, tile_of
from .runtime import tl, triton


@triton.jit
def score(
    x_ptr,  # (P, K)
    w_ptr,  # (V, K)
    b_ptr,  # (V,)
    targets_ptr,  # (P,) int64
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    logits_ptr,  # (SLICE, V padded to whole tiles), where a gradient is wanted
    sums_ptr,  # (3, parts, SLICE) float32: of each part of a row the maximum and two sums of exps
    first_ptr,  # (parts, SLICE) int32: the lowest column that has the maximum
    hit_ptr,  # (SLICE,) float32: the target's score
    start,
    P,
    slots,
    stride_xm,
    stride_wn,
    K,
    V: tl.constexpr,
    EVEN_K: tl.constexpr,
    SLICE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TILES: tl.constexpr = (V + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(slots, BLOCK_M), TILES, 16)  # pyright: ignore
    count = tl.load(count_ptr) if GATHER else P
    if start + tile_m * BLOCK_M >= count:
        return
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = row_of(start + offs_m, rows_ptr, count, GATHER)
    scores = linear_tile(
        x_ptr,
        w_ptr,
        b_ptr,
        row,
        offs_n,
        stride_xm,
        stride_wn,
        K,
        V,
        EVEN_K,
        HAS_BIAS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    target = tl.load(targets_ptr + row)
    VP: tl.constexpr = TILES * BLOCK_N
    if PARTS == 1:
        _score_part(scores, tile_n, logits_ptr, sums_ptr, first_ptr, hit_ptr, target, offs_m, V, VP, SLICE, KEEP)
    else:
        # half of the columns at a time: the work on a whole tile would not fit the registers beside it
        halves = tl.permute(tl.reshape(scores, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        _score_part(left, tile_n * 2, logits_ptr, sums_ptr, first_ptr, hit_ptr, target, offs_m, V, VP, SLICE, KEEP)
        _score_part(right, tile_n * 2 + 1, logits_ptr, sums_ptr, first_ptr, hit_ptr, target, offs_m, V, VP, SLICE, KEEP)


@triton.jit
def _score_part(
    scores,  # (BLOCK_M, columns) float32
    part,
    logits_ptr,
    sums_ptr,
    first_ptr,
    hit_ptr,
    target,  # (BLOCK_M,) int64
    offs_m,
    V: tl.constexpr,
    VP: tl.constexpr,
    SLICE: tl.constexpr,
    KEEP: tl.constexpr,
):
    """What is kept of the columns from `part` times their number on."""
    COLUMNS: tl.constexpr = scores.shape[1]
    ALL: tl.constexpr = VP // COLUMNS * SLICE
    offs_n = tl.arange(0, COLUMNS)
    best = tl.max(scores, 1)
    first = tl.min(tl.where(scores == best[:, None], offs_n[None, :], V), 1)
    hit = tl.sum(tl.where(offs_n[None, :] == (target - part * COLUMNS)[:, None], scores, 0.0), 1)
    # a part whose every score is -inf adds nothing
    peak = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp(scores - peak[:, None]), 1)
    out = part * SLICE + offs_m
    tl.store(sums_ptr + out, best)
    tl.store(sums_ptr + ALL + out, total)
    tl.store(first_ptr + out, first + part * COLUMNS)
    tl.store(hit_ptr + offs_m, hit, mask=(target >= 0) & (target < V) & (target // COLUMNS == part))
    if KEEP:
        rounded = scores.to(logits_ptr.dtype.element_ty)
        tl.store(sums_ptr + 2 * ALL + out, tl.sum(tl.exp(rounded.to(tl.float32) - peak[:, None]), 1))
        at = logits_ptr + offs_m.to(tl.int64)[:, None] * VP + (part * COLUMNS + offs_n)[None, :]
        tl.store(at, rounded)


@triton.jit
def merge(
    sums_ptr,  # (3, parts, SLICE) float32
    first_ptr,  # (parts, SLICE) int32
    hit_ptr,  # (SLICE,) float32
    targets_ptr,  # (P,) int64
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    norm_ptr,  # (2, SLICE) float32: a row's maximum, and one over the sum of exps of what its rounded logits lack to it
    loss_ptr,  # (P / ROWS,) float64: sums over ROWS rows
    right_ptr,  # (P / ROWS,) int32
    start,
    P,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    SLICE: tl.constexpr,
    GATHER: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    count = tl.load(count_ptr) if GATHER else P
    begin = start + tl.program_id(0) * ROWS
    if begin >= count:
        return
    offs_m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    rounded = tl.zeros((ROWS,), tl.float32)
    first = tl.full((ROWS,), V, tl.int32)
    for p in range(0, PARTS, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)
        at = part[:, None] * SLICE + offs_m[None, :]
        real = part[:, None] < PARTS
        best = tl.load(sums_ptr + at, mask=real, other=float("-inf"))
        highest = tl.maximum(peak, tl.max(best, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(peak - base)
        weight = tl.exp(best - base[None, :])
        sums = tl.load(sums_ptr + PARTS * SLICE + at, mask=real, other=0.0)
        total = total * shrink + tl.sum(sums * weight, 0)
        if KEEP:
            sums = tl.load(sums_ptr + 2 * PARTS * SLICE + at, mask=real, other=0.0)
            rounded = rounded * shrink + tl.sum(sums * weight, 0)
        column = tl.load(first_ptr + at, mask=real, other=V)
        lowest = tl.min(tl.where(best == highest[None, :], column, V), 0)
        # an earlier part has the lower columns, so it wins a tie
        first = tl.where(highest > peak, lowest, tl.minimum(first, lowest))
        peak = highest
    if KEEP:
        tl.store(norm_ptr + offs_m, peak)
        tl.store(norm_ptr + SLICE + offs_m, 1.0 / rounded)
    row = row_of(start + offs_m, rows_ptr, count, GATHER)
    target = tl.load(targets_ptr + row)
    inside = (target >= 0) & (target < V)
    hit = tl.load(hit_ptr + offs_m, mask=inside, other=float("nan"))
    counted = start + offs_m < count
    # the two scores first: beside a large one, the logarithm of a sure answer would be rounded away
    losses = tl.where(counted, peak - hit + tl.log(total), 0.0)
    right = counted & (first == target)
    tl.store(loss_ptr + begin // ROWS, tl.sum(losses.to(tl.float64), 0))
    tl.store(right_ptr + begin // ROWS, tl.sum(right.to(tl.int32), 0))


@triton.jit
def turn(
    logits_ptr,  # (SLICE, VP), becomes softmax minus one-hot
    norm_ptr,  # (2, SLICE) float32
    targets_ptr,  # (P,) int64
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    columns_ptr,  # (P / STRIP, VP) float32: sums over the rows of a strip, the bias's gradient in parts
    start,
    P,
    VP: tl.constexpr,
    SLICE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STRIP: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    count = tl.load(count_ptr) if GATHER else P
    begin = start + tl.program_id(1) * STRIP
    if begin >= count:
        return
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    # up to PAD rows beyond the last become zeros, so that whole tiles of rows can enter the weight's gradient
    rows = tl.minimum(tl.cdiv(count - begin, PAD) * PAD, STRIP)
    for r in range(0, rows, BLOCK_M):
        offs_m = tl.program_id(1) * STRIP + r + tl.arange(0, BLOCK_M)
        counted = start + offs_m < count
        target = tl.load(targets_ptr + row_of(start + offs_m, rows_ptr, count, GATHER))
        peak = tl.load(norm_ptr + offs_m, mask=counted, other=0.0)
        share = tl.load(norm_ptr + SLICE + offs_m, mask=counted, other=0.0)
        at = logits_ptr + offs_m.to(tl.int64)[:, None] * VP + offs_n[None, :]
        logits = tl.load(at, mask=counted[:, None], other=float("-inf")).to(tl.float32)
        softmax = tl.exp(logits - peak[:, None]) * share[:, None]
        one_hot = (offs_n[None, :] == target[:, None]) & counted[:, None]
        gradient = (softmax - one_hot.to(tl.float32)).to(logits_ptr.dtype.element_ty)
        tl.store(at, gradient)
        if HAS_BIAS:
            total += tl.sum(gradient.to(tl.float32), 0)
    if HAS_BIAS:
        tl.store(columns_ptr + (begin // STRIP).to(tl.int64) * VP + offs_n, total)


@triton.jit
def gradient_x(
    dz_ptr,  # (slots, VP), zeros in columns beyond V
    w_ptr,  # (V, K)
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    dx_ptr,  # (P, K)
    start,
    P,
    slots,
    stride_wn,
    K: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz @ w, each row to where its features stand."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(slots, BLOCK_M), (K + BLOCK_N - 1) // BLOCK_N, 8)  # pyright: ignore
    count = tl.load(count_ptr) if GATHER else P
    if start + tile_m * BLOCK_M >= count:
        return
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + offs_m.to(tl.int64)[:, None] * VP + offs_v[None, :]
    w_ptrs = w_ptr + offs_v.to(tl.int64)[:, None] * stride_wn + offs_n[None, :]
    dx = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for v in range(0, V, BLOCK_K):
        dz = tl.load(dz_ptrs)
        if (V % BLOCK_K == 0) & (K % BLOCK_N == 0):
            w = tl.load(w_ptrs)
        else:
            w = tl.load(w_ptrs, mask=(offs_v[:, None] < V - v) & (offs_n[None, :] < K), other=0.0)
        dx = tl.dot(dz, w, dx, input_precision="ieee")
        dz_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wn
    row = row_of(start + offs_m, rows_ptr, count, GATHER)
    real = (start + offs_m < count)[:, None] & (offs_n[None, :] < K)
    tl.store(dx_ptr + row[:, None] * K + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=real)


@triton.jit
def gradient_w(
    dz_ptr,  # (slots, VP), zeros in rows beyond the last up to a whole BLOCK_K; VP is whole in BLOCK_M
    x_ptr,  # (P, K)
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    dw_ptr,  # (V, K) float32: read unless start is 0, then written
    start,
    P,
    slots,
    stride_xm,
    K: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw + dz.T @ x over the rows of one chunk. A tile is always the same program's, so the sum has one order."""
    TILES: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    count = tl.load(count_ptr) if GATHER else P
    if (start > 0) & (start >= count):
        return
    offs_v = (tl.program_id(0) // TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_K)
    dz_ptrs = dz_ptr + offs_r.to(tl.int64)[:, None] * VP + offs_v[None, :]
    at = dw_ptr + offs_v.to(tl.int64)[:, None] * K + offs_n[None, :]
    real = (offs_v[:, None] < V) & (offs_n[None, :] < K)
    # the sum so far comes first: after the product there would be no registers to hold it
    dw = tl.load(at, mask=real & (start > 0), other=0.0)
    for r in range(0, tl.minimum(count - start, slots), BLOCK_K):
        dz = tl.load(dz_ptrs)
        # the last row stands in for those beyond it, against the zeros of dz
        row = row_of(start + r + offs_r, rows_ptr, count, GATHER)
        x_ptrs = x_ptr + row[:, None] * stride_xm + offs_n[None, :]
        if K % BLOCK_N == 0:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_n[None, :] < K, other=0.0)
        dw = tl.dot(tl.trans(dz), x, dw, input_precision="ieee")
        dz_ptrs += BLOCK_K * VP
    tl.store(at, dw, mask=real)


@triton.jit
def gradient_b(
    columns_ptr,  # (P / STRIP, VP) float32
    count_ptr,  # (1,) int32
    db_ptr,  # (V,) float32
    P,
    V: tl.constexpr,
    VP: tl.constexpr,
    GATHER: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    count = tl.load(count_ptr) if GATHER else P
    strips = tl.cdiv(count, STRIP)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for s in range(0, strips, BLOCK_M):
        strip = s + tl.arange(0, BLOCK_M)
        real = (strip[:, None] < strips) & (offs_n[None, :] < V)
        total += tl.load(columns_ptr + strip.to(tl.int64)[:, None] * VP + offs_n[None, :], mask=real, other=0.0)
    tl.store(db_ptr + offs_n, tl.sum(total, 0), mask=offs_n < V)


@triton.jit
def finish(
    loss_ptr,  # (P / ROWS,) float64
    right_ptr,  # (P / ROWS,) int32
    count_ptr,  # (1,) int32
    out_ptr,  # (3,) float32: loss, accuracy, and what the gradients are still to be multiplied by
    P,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.load(count_ptr) if GATHER else P
    parts = tl.cdiv(count, ROWS)
    losses = tl.zeros((BLOCK,), tl.float64)
    right = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, parts, BLOCK):
        part = first + tl.arange(0, BLOCK)
        losses += tl.load(loss_ptr + part, mask=part < parts, other=0.0)
        right += tl.load(right_ptr + part, mask=part < parts, other=0)
    rows = tl.maximum(count, 1).to(tl.float64)
    loss = (tl.sum(losses, 0) / rows).to(tl.float32)
    tl.store(out_ptr, loss)
    tl.store(out_ptr + 1, (tl.sum(right, 0).to(tl.float64) / rows).to(tl.float32))
    # a loss that is not a number must not leave gradients that are
    tl.store(out_ptr + 2, tl.where(loss == loss, (1.0 / rows).to(tl.float32), loss))


@triton.jit
def scale(
    in_ptr,  # (n,)
    out_ptr,  # (n,)
    upstream_ptr,  # () the gradient that arrives
    scale_ptr,  # () float32
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(upstream_ptr).to(tl.float32) * tl.load(scale_ptr)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(in_ptr + offs, mask=offs < n, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=offs < n)
