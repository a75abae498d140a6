"""What the two window kernels are made of: reading bias tiles and token rows, and how a launch is configured.

Registers, stages and warps come from compile_check's counts (README.md, "what was tried"), not from a clock.
"""

from math import e, log, log2
from typing import Any

import torch
from torch import Tensor

from . import window_geometry as geometry
from .runtime import capability, power_of_2, tl, triton

LOG2_E = tl.constexpr(log2(e))
LN_2 = tl.constexpr(log(2))


@triton.jit
def _fragment(ptr, masked, separated, ROWS: tl.constexpr, COLS: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """A (ROWS, COLS) bias tile, stored in the order of `window_geometry._strips`, as float32."""
    x = tl.load(ptr + tl.arange(0, ROWS * COLS))
    if WIDE:
        y = tl.reshape(x, (COLS // 8, ROWS // 16, 8, 4, 2, 2))
        y = tl.permute(y, (1, 4, 2, 0, 3, 5))
    else:
        y = x.to(tl.float16, bitcast=True).to(tl.float32)
        if MASKED:
            if masked:
                # the mark, float16's lowest bit, is bit 13 of a float32: no number here is subnormal
                foreign = (y.to(tl.int32, bitcast=True) & 0x2000) != 0
                y = tl.where(foreign, y + separated, y)
        y = tl.reshape(y, (COLS // 16, ROWS // 16, 8, 4, 2, 2, 2))
        y = tl.permute(y, (1, 5, 2, 0, 4, 3, 6))
    return tl.reshape(y, (ROWS, COLS))


@triton.jit
def _load(ptr, rows, D: tl.constexpr, DP: tl.constexpr):
    """(len(rows), DP) from row offsets in elements; columns beyond D are 0."""
    offs_d = tl.arange(0, DP)
    if D == DP:
        return tl.load(ptr + rows[:, None] + offs_d[None, :])
    return tl.load(ptr + rows[:, None] + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _load_t(ptr, rows, D: tl.constexpr, DP: tl.constexpr):
    """The transpose of `_load`: (DP, len(rows))."""
    offs_d = tl.arange(0, DP)
    if D == DP:
        return tl.load(ptr + rows[None, :] + offs_d[:, None])
    return tl.load(ptr + rows[None, :] + offs_d[:, None], mask=(offs_d < D)[:, None], other=0.0)


@triton.jit
def _store(ptr, rows, value, exists, D: tl.constexpr, DP: tl.constexpr):
    offs_d = tl.arange(0, DP)
    mask = exists[:, None] & (offs_d < D)[None, :]
    tl.store(ptr + rows[:, None] + offs_d[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kind(kind_ptr, window, MASKED_KIND: tl.constexpr) -> Any:
    """A window's kind, and whether it has several regions."""
    kind = tl.load(kind_ptr + window)
    return kind % MASKED_KIND, kind >= MASKED_KIND


@triton.jit
def _visible(span_ptr, strip, BLOCK: tl.constexpr, FULL: tl.constexpr) -> Any:
    """First and end of the whole blocks that a strip can see; what remains after FULL blocks is always walked."""
    end = tl.minimum((tl.load(span_ptr + strip * 2 + 1) + BLOCK - 1) // BLOCK, FULL)
    return tl.minimum(tl.load(span_ptr + strip * 2) // BLOCK, end), end


@triton.jit
def _attended(span_ptr, strip, begin, stop, COARSE: tl.constexpr, REST: tl.constexpr):
    """Whether a strip met the keys begin ... stop in the forward without asking whether they count: it walks blocks of
    COARSE slots, and all slots from REST on."""
    lo = tl.load(span_ptr + strip * 2) // COARSE * COARSE
    hi = (tl.load(span_ptr + strip * 2 + 1) + COARSE - 1) // COARSE * COARSE
    return ((stop > lo) & (begin < hi)) | (stop > REST)


@triton.jit
def _scores(a, b, bias, c):
    """What `_power` makes p of. In 16 bits a b + bias, from accumulators that start as the bias.

    In float32 that would round every partial sum as coarsely as the largest bias: there it is the logit,
    (a b) c + bias.
    """
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="ieee") * c + bias
    else:
        return tl.dot(a, b, bias, input_precision="ieee")


@triton.jit
def _power(x, m, c, EXACT: tl.constexpr):
    """2**(x c - m) of 16-bit scores, a multiply-add and an exponential. EXACT takes the difference of logits first, so
    that nothing as large as a logit is rounded once more."""
    if EXACT:
        return tl.exp2((x - m) * LOG2_E)
    else:
        return tl.exp2(x * c - m)


@triton.jit
def _store_lse(ptr, offs, heads, m, total, exists, RS: tl.constexpr, EXACT: tl.constexpr):
    """What the backward needs to find p again, with p = 0 at padding slots: the log-sum-exp in base 2.

    EXACT keeps two planes, the maximum and the share 1 / total: a log-sum-exp of 8 is rounded by 5e-7, and that is the
    relative error of a whole row of p, more than float32 allows.
    """
    if EXACT:
        tl.store(ptr + offs, tl.where(exists, m, float("inf")))
        tl.store(ptr + heads.to(tl.int64) * RS + offs, 1.0 / total)
    else:
        tl.store(ptr + offs, tl.where(exists, m + tl.log2(total), float("inf")))


@triton.jit
def _load_share(ptr, offs, heads, like, RS: tl.constexpr, EXACT: tl.constexpr):
    """1 / total of each row where that was kept; unused otherwise."""
    if EXACT:
        return tl.load(ptr + heads.to(tl.int64) * RS + offs)
    else:
        return like


def tile_size(dtype: torch.dtype) -> int:
    """Slots in a strip: a tensor-core product of a warp group has 64 rows; float32 has no tensor cores to feed."""
    return 32 if dtype == torch.float32 else 64


def lse_planes(dtype: torch.dtype) -> int:
    """See `_store_lse`."""
    return 2 if dtype == torch.float32 else 1


def stages(qkv: Tensor, by_capability: dict[int, int]) -> int:
    """Pipeline stages by capability; 1 where nothing is said, and in float32.

    From compile_check's counts (README.md, "what was tried"): with more, sm_100 takes the bias through shared memory,
    and sm_80 reads a tile that is used both plain and transposed element by element.
    """
    return 1 if qkv.dtype == torch.float32 else by_capability.get(capability(qkv.device), 1)


def warps(qkv: Tensor) -> int:
    """Warps of a program: one warp group for a 64-row product. Plain float32 products spread over any number.

    With eight, sm_90 would stack the warps on the rows of a 16-bit product and compute everything twice.
    """
    return 8 if qkv.dtype == torch.float32 else 4


def registers(qkv: Tensor, by_capability: dict[int, int]) -> dict[str, int]:
    """A ceiling of registers where ptxas, left alone, aims at one more program a multiprocessor and spills a little."""
    if qkv.dtype == torch.float32:
        return {"maxnreg": 255}
    ceiling = by_capability.get(capability(qkv.device))
    return {"maxnreg": ceiling} if ceiling else {}


def is_wide(dtype: torch.dtype, table: torch.dtype) -> bool:
    """Whether the bias tiles are float32. A bfloat16 table loses little in a float16 tile, which has two bits more; a
    finer table would lose what its gradient can show."""
    return not dtype == table == torch.bfloat16


def padded_width(width: int) -> int:
    return max(16, power_of_2(width))


def scales(width: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """c (see `_scores`), width**-0.5, and -100 as a 16-bit accumulator holds it."""
    scale = width**-0.5
    return scale * (1.0 if dtype == torch.float32 else log2(e)), scale, geometry.SEPARATED / scale


def strides(qkv: Tensor) -> tuple[int, int, int, int]:
    """Of a sample, a token, q/k/v, a head."""
    return qkv.stride(0), token_stride(qkv) or 0, qkv.stride(4), qkv.stride(5)


def token_stride(qkv: Tensor) -> int | None:
    """What lies between two neighbouring tokens of a sample, (t, h, w) order; None if that is not one number."""
    stride, tokens = None, 1
    for axis in (3, 2, 1):
        if qkv.shape[axis] > 1:
            if stride is None:
                stride = qkv.stride(axis)
            elif qkv.stride(axis) != stride * tokens:
                return None
            tokens *= qkv.shape[axis]
    return stride or 0
