"""The nearest entry of a codebook: a linear layer and its argmax, without the logits (SPEC 3.1, 3.4).

Legend: P positions, K feature width, V codebook size.

A program scores one tile of hidden rows against one tile of the codebook and keeps of every row the largest score and
the lowest id that has it: V / 128 pairs a row instead of V scores. Scores are compared in float32 as they come out of
the product, so the choice is the finer one where the reference rounds its logits first. The list of hidden rows is made
on the device, and the host never waits for its length.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products_cpu, runtime
from ._hidden_rows import Product, hidden_rows, linear_tile, refusal, row_of, tile_of
from .runtime import cdiv, launch, power_of_2, tl, triton

NAME = "codebook_argmax"
RETURNS_IDS = True
IDS_ON_A_CPU = 1024  # scored at a time: of 8192 ids the scores take as much memory as a frame of the tokenizer


# 1. The specification.


def reference(features: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The specification of `codebook_argmax`, in plain torch."""
    if mask is None:
        return F.linear(features, weight, bias).argmax(dim=-1)
    ids = torch.zeros(features.shape[:-1], dtype=torch.long, device=features.device)
    ids[mask] = F.linear(features[mask], weight, bias).argmax(dim=-1)
    return ids


# 2. The Triton kernels.


@triton.jit
def _choose(
    x_ptr,  # (P, K)
    w_ptr,  # (V, K)
    b_ptr,  # (V,)
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    best_ptr,  # (parts, P) float32
    first_ptr,  # (parts, P) int32
    P,
    stride_xm,
    stride_wn,
    K,
    V: tl.constexpr,
    EVEN_K: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(P, BLOCK_M), (V + BLOCK_N - 1) // BLOCK_N, 16)  # pyright: ignore
    count = tl.load(count_ptr) if GATHER else P
    if tile_m * BLOCK_M >= count:
        return
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = row_of(offs_m, rows_ptr, count, GATHER)
    scores = linear_tile(
        x_ptr, w_ptr, b_ptr, row, offs_n, stride_xm, stride_wn, K, V, EVEN_K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K
    )
    if PARTS == 1:
        _choose_part(scores, tile_n, best_ptr, first_ptr, offs_m, P, V)
    else:
        # half of the columns at a time: the work on a whole tile would not fit the registers beside it
        left, right = tl.split(tl.permute(tl.reshape(scores, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _choose_part(left, tile_n * 2, best_ptr, first_ptr, offs_m, P, V)
        _choose_part(right, tile_n * 2 + 1, best_ptr, first_ptr, offs_m, P, V)


@triton.jit
def _choose_part(scores, part, best_ptr, first_ptr, offs_m, P, V: tl.constexpr):
    COLUMNS: tl.constexpr = scores.shape[1]
    best = tl.max(scores, 1)
    first = tl.min(tl.where(scores == best[:, None], tl.arange(0, COLUMNS)[None, :], V), 1)
    at = part.to(tl.int64) * P + offs_m
    tl.store(best_ptr + at, best, mask=offs_m < P)
    tl.store(first_ptr + at, first + part * COLUMNS, mask=offs_m < P)


@triton.jit
def _merge(
    best_ptr,  # (parts, P) float32
    first_ptr,  # (parts, P) int32
    rows_ptr,  # (P,) int32
    count_ptr,  # (1,) int32
    ids_ptr,  # (P,) int64
    P,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    count = tl.load(count_ptr) if GATHER else P
    if tl.program_id(0) * BLOCK_M >= count:
        return
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    first = tl.full((BLOCK_M,), V, tl.int32)
    for p in range(0, PARTS, BLOCK_P):
        part = p + tl.arange(0, BLOCK_P)
        at = part.to(tl.int64)[:, None] * P + offs_m[None, :]
        real = (part[:, None] < PARTS) & (offs_m[None, :] < count)
        best = tl.load(best_ptr + at, mask=real, other=float("-inf"))
        highest = tl.maximum(peak, tl.max(best, 0))
        column = tl.load(first_ptr + at, mask=real, other=V)
        lowest = tl.min(tl.where(best == highest[None, :], column, V), 0)
        # an earlier part has the lower columns, so it wins a tie
        first = tl.where(highest > peak, lowest, tl.minimum(first, lowest))
        peak = highest
    row = row_of(offs_m, rows_ptr, count, GATHER)
    # a row without a number in it has no best score; its id must still be one
    tl.store(ids_ptr + row, tl.minimum(first, V - 1).to(tl.int64), mask=offs_m < count)


# 3. Allocate and launch. There is nothing to differentiate.


def product(dtype: torch.dtype, capability: int, width: int, vocabulary: int) -> Product:
    """The tile by dtype, chip and codebook. From machine code (no spill, shared memory), not from a stopwatch."""
    if dtype == torch.float32 or width % 16:
        return Product(64, 64, 32, 4, 2)
    if capability == 90 and vocabulary % 256 == 0:
        return Product(128, 256, 64, 8, 3)
    return Product(128, 128, 64, 8, 3)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """(P, K), (V, K), (V,), (P,) -> (P,) int64."""
    (positions, width), vocabulary = x.shape, len(weight)
    tile = product(x.dtype, runtime.capability(x.device), width, vocabulary)
    tiles, cut = cdiv(vocabulary, tile.n), max(tile.n // 128, 1)
    ids = torch.empty(positions, dtype=torch.int64, device=x.device)
    rows, count = (ids, ids) if mask is None else hidden_rows(mask)
    if mask is not None:
        ids.zero_()
    best = torch.empty(tiles * cut, positions, dtype=torch.float32, device=x.device)
    first = torch.empty(tiles * cut, positions, dtype=torch.int32, device=x.device)
    constants: dict[str, Any] = {"V": vocabulary, "GATHER": mask is not None}
    launch(
        _choose,
        (cdiv(positions, tile.m) * tiles,),
        *(x, weight, weight if bias is None else bias, rows, count, best, first),
        *(positions, x.stride(0), weight.stride(0), width),
        **tile.launch(waste=tiles * tile.n / vocabulary),
        **constants,
        **{"EVEN_K": width % tile.k == 0, "HAS_BIAS": bias is not None, "PARTS": cut},
    )
    launch(
        _merge,
        (cdiv(positions, 32),),
        *(best, first, rows, count, ids, positions),
        num_warps=4,
        **constants,
        PARTS=tiles * cut,
        BLOCK_M=32,
        BLOCK_P=min(64, power_of_2(tiles * cut)),
    )
    return ids


_op = torch.library.custom_op(f"{runtime.NAMESPACE}::codebook_argmax", _forward, mutates_args=())


@_op.register_fake
def _(x, weight, bias, mask):
    return torch.empty(x.shape[0], dtype=torch.int64, device=x.device)


# 4. The public function.


def codebook_argmax(features: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The id with the largest score at every hidden position; of equal scores the first.

    Args:
        features: (..., K), any strides; no copy is made of rows that lie evenly apart, each in one piece.
        weight: (V, K). bias: (V,) or None.
        mask: (...) bool, True = hidden. None asks for every position.
    Returns:
        (...) int64; 0 where the mask is False. Not differentiable. Which id a row of NaN gets is not promised.
    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, tensors of several dtypes or devices.
    """
    _check(features, weight, bias, mask)
    if not runtime.fused(NAME, features.device, refusal(features)):
        if runtime.cpu_way(features.device) and not runtime.simulated() and products_cpu.quicker():
            return _on_cpu(features, weight, bias, mask)
        return reference(features, weight, bias, mask)
    tensors = features.detach().reshape(-1, features.shape[-1]), weight.detach()
    device = features.device.type
    if torch.is_autocast_enabled(device):
        tensors = tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    x, w = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)
    b = None if bias is None else bias.detach().to(w.dtype)
    return _op(x, w, b, None if mask is None else mask.reshape(-1)).reshape(features.shape[:-1])


def _on_cpu(features: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    rows = features.reshape(-1, features.shape[-1]) if mask is None else features[mask]
    best, chosen = rows.new_full((len(rows), 1), -torch.inf), torch.zeros(len(rows), 1, dtype=torch.long, device="cpu")
    for first in range(0, len(weight), IDS_ON_A_CPU):
        some = slice(first, first + IDS_ON_A_CPU)
        scores = products_cpu.linear(rows, weight[some], None if bias is None else bias[some])
        ids = scores.argmax(dim=-1, keepdim=True)
        top = scores.gather(1, ids)
        chosen, best = torch.where(top > best, ids + first, chosen), torch.maximum(top, best)
    if mask is None:
        return chosen.view(features.shape[:-1])
    return torch.zeros_like(mask, dtype=torch.long).masked_scatter_(mask, chosen)


def _check(features: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    optional = {"bias": bias, "mask": mask}
    given = {"features": features, "weight": weight, **{name: x for name, x in optional.items() if x is not None}}
    runtime.expect_tensors(NAME, **given)
    if features.ndim == 0 or weight.ndim != 2 or not weight.numel() or features.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: expected features (..., K) and a weight (V, K), got {tuple(features.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not features.is_floating_point():
        raise ValueError(f"{NAME}: the features are {features.dtype}, not floating-point numbers")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: the weight {tuple(weight.shape)} has no bias {tuple(bias.shape)}")
    if mask is not None and (mask.shape != features.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"{NAME}: features have positions {tuple(features.shape[:-1])}, but the mask is {tuple(mask.shape)} of "
            f"{mask.dtype}, not torch.bool"
        )
    devices = sorted({str(tensor.device) for tensor in given.values()})
    if len(devices) > 1:
        raise ValueError(f"{NAME}: all tensors must be on one device, got {', '.join(devices)}")
    if features.is_meta and mask is not None:
        raise ValueError(f"{NAME}: on the meta device nobody knows what is hidden; give no mask")
    dtypes = sorted({str(tensor.dtype) for tensor in given.values() if tensor is not mask})
    if len(dtypes) > 1 and not torch.is_autocast_enabled(features.device.type):
        raise ValueError(f"{NAME}: features, weight and bias must have one dtype, got {', '.join(dtypes)}")


# 5. Where it is meant to run.


@dataclass(frozen=True, kw_only=True)
class Case:
    positions: int
    hidden: float | None  # the share of positions that are hidden; None: no mask
    width: int = 2048
    vocabulary: int = 8192
    bias: bool = True
    small: bool = False

    def __str__(self) -> str:
        hidden = "all" if self.hidden is None else f"hidden{self.hidden:g}"
        return f"P{self.positions}-{hidden}-K{self.width}-V{self.vocabulary}" + ("" if self.bias else "-nobias")


CASES = [
    Case(positions=64 * 196, hidden=0.5),  # DALL-E's last layer on BEVT's images, 14 x 14 cells, half of them hidden
    Case(positions=8 * 16 * 196, hidden=0.375),  # on its clips: tubes of 4 to 8 of 8 time steps
    Case(positions=64 * 196, hidden=None),
    Case(positions=64 * 196, hidden=None, width=48, vocabulary=8192),  # patches of 4 x 4 pixels against centroids
    Case(positions=37, hidden=None, width=48, vocabulary=100, small=True),
    Case(positions=180, hidden=0.8, width=80, vocabulary=512, small=True),
    Case(positions=150, hidden=0.0, width=32, vocabulary=128, small=True),
    Case(positions=90, hidden=0.5, width=36, vocabulary=300, bias=False, small=True),
]


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Features, weight, bias and mask."""
    options: dict[str, Any] = {"device": device, "generator": generator}
    features = torch.randn(case.positions, case.width, **options).to(dtype)
    weight = (torch.randn(case.vocabulary, case.width, **options) * 2 / case.width**0.5).to(dtype)
    bias = (torch.randn(case.vocabulary, **options) / 2).to(dtype) if case.bias else None
    mask = None if case.hidden is None else torch.rand(case.positions, **options) < case.hidden
    return features, weight, bias, mask


def rehearse(case: Case, dtype: torch.dtype) -> None:
    x = torch.empty(case.positions, case.width, dtype=dtype, device="meta")
    weight = x.new_empty(case.vocabulary, case.width)
    bias = x.new_empty(case.vocabulary) if case.bias else None
    mask = None if case.hidden is None else x.new_empty(case.positions, dtype=torch.bool)
    _forward(x, weight, bias, mask)
