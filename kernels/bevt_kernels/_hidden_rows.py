"""What the kernels for hidden positions have in common: the list of hidden rows, and a linear layer on them.

Legend: P positions, K feature width, V codebook size.

The list is made on the device and so is its length: the host never waits to learn how many positions are hidden. It
launches for all P, and programs beyond the length leave at once.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .runtime import Inner, cdiv, launch, tl, triton

BLOCK = 4096
MOST_ROWS = 2**31 - 2 * BLOCK  # a row's number fits an int32, that of a padding row too


def refusal(features: Tensor) -> str | None:
    """Why the kernels cannot take these features (..., K); None if they can."""
    if features.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the kernels compute in float32, bfloat16 and float16, not in {features.dtype}"
    if features.shape[:-1].numel() > MOST_ROWS:
        return f"the kernels take at most {MOST_ROWS} positions, not {features.shape[:-1].numel()}"
    return None


class Product(NamedTuple):
    """How a matrix product is tiled."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int

    def launch(self, waste: float) -> dict[str, Any]:
        """What `launch` is told. `waste`: padded over useful elements."""
        inner = Inner(self.m * self.n, 2 * self.k, waste)
        block = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "inner": inner, **block}


@triton.jit
def _compact(
    mask_ptr,  # (P,) uint8
    rows_ptr,  # (P,) int32, written up to the count
    count_ptr,  # (1,) int32
    P,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    lanes = tl.arange(0, BLOCK)
    # every program counts what stands before it: bytes are few, and no program waits for another
    counts = tl.zeros((BLOCK,), tl.int32)
    for other in range(0, first, BLOCK):
        counts += tl.load(mask_ptr + other + lanes).to(tl.int32)
    before = tl.sum(counts, 0)
    row = first + lanes
    hidden = tl.load(mask_ptr + row, mask=row < P, other=0).to(tl.int32)
    slot = before + tl.cumsum(hidden, 0) - hidden
    tl.store(rows_ptr + slot, row, mask=hidden != 0)
    if first + BLOCK >= P:
        tl.store(count_ptr, before + tl.sum(hidden, 0))


def hidden_rows(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the True entries in ascending order, and how many there are, without a word to the host.

    Args:
        mask: (P,) bool, contiguous.
    Returns:
        (P,) int32, of which only the first `count` are written; (1,) int32.
    """
    positions = mask.numel()
    rows = torch.empty(positions, dtype=torch.int32, device=mask.device)
    count = torch.zeros(1, dtype=torch.int32, device=mask.device)
    blocks = cdiv(positions, BLOCK)
    launch(_compact, (blocks,), mask.view(torch.uint8), rows, count, positions, num_warps=8, BLOCK=BLOCK)
    return rows, count


@triton.jit
def row_of(slot, rows_ptr, count, GATHER: tl.constexpr):
    """The row that stands at a slot of the list, as int64; that of the last one for slots beyond it."""
    slot = tl.minimum(slot, count - 1)
    if GATHER:
        return tl.load(rows_ptr + slot).to(tl.int64)
    return slot.to(tl.int64)


@triton.jit
def tile_of(program, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """Programs that run together share rows and columns: GROUP row tiles take all column tiles in turn."""
    group = program // (GROUP * TILES_N)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = program % (GROUP * TILES_N)
    return group * GROUP + inside % height, inside // height


@triton.jit
def linear_tile(
    x_ptr,  # (P, K)
    w_ptr,  # (V, K)
    b_ptr,  # (V,)
    row,  # (BLOCK_M,) int64
    offs_n,  # (BLOCK_N,) columns of the tile, perhaps beyond V
    stride_xm,
    stride_wn,
    K,  # not a constant: a loop of known length would be unrolled whole
    V: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) float32 scores; -inf in columns beyond V."""
    offs_k = tl.arange(0, BLOCK_K)
    # a column beyond V reads the last one: its scores are thrown away
    column = tl.minimum(offs_n, V - 1)
    x_ptrs = x_ptr + row[:, None] * stride_xm + offs_k[None, :]
    w_ptrs = w_ptr + column.to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs + k)
            w = tl.load(w_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=offs_k[None, :] < K - k, other=0.0)
            w = tl.load(w_ptrs + k, mask=offs_k[:, None] < K - k, other=0.0)
        scores = tl.dot(x, w, scores, input_precision="ieee")
    if HAS_BIAS:
        scores += tl.load(b_ptr + column).to(tl.float32)[None, :]
    if V % BLOCK_N != 0:
        scores = tl.where(offs_n[None, :] < V, scores, float("-inf"))
    return scores
