"""The stem's LayerNorm, then one learnt vector in place of every hidden token (SPEC 1.2, 1.3).

Legend: B samples, (t, h, w) token grid of width C, (t, gh, gw) mask grid whose cells cover whole blocks of tokens,
M tokens in all.

The norm comes first: the mask token itself is not normalised (SPEC X16).

The eager path transposes the convolution's channels-first output, writes the norm, an expanded mask and the result.
Here every token is read once, through the strides it has, and written once; a hidden token is not even read. The
backward pass computes the statistics again from the row it has on chip anyway, and sums the parameters' gradients in
two stages of fixed order: one partial sum for each program, then the partial sums, both in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _masked_embedding_kernels as kernels
from . import runtime

NAME = "masked_embedding"


# 1. The specification.


def reference(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask_token: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `masked_embedding`, in plain torch."""
    tokens = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps)
    if mask is None or mask_token is None:
        return tokens
    rows, columns = tokens.shape[-3] // mask.shape[-2], tokens.shape[-2] // mask.shape[-1]
    hidden = mask.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    return torch.where(hidden[..., None], mask_token.reshape(-1).to(tokens.dtype), tokens)


# 2. The Triton kernels: _masked_embedding_kernels.py.


# 3. Autograd: allocate, launch, save.

WIDEST = 4096  # channels; a program holds whole rows
# Chosen by machine code, not by a clock: 32 elements a thread need the fewest instructions an element (16 take half as
# many again, for the sums), and 4 warps leave room for three programs of the backward pass on a multiprocessor.
TILE = 4096  # elements, padding included
WARPS = 4
PROGRAMS = 2048  # of the backward pass at most: a few rounds of any GPU, and few partial sums


def _refusal(tokens: Tensor, norm_weight: Tensor, norm_bias: Tensor, mask_token: Tensor | None) -> str | None:
    """Why the kernels cannot take these arguments; None if they can."""
    for tensor in (tokens, norm_weight, norm_bias, mask_token):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"there is no kernel for {tensor.dtype}"
    if tokens.shape[-1] > WIDEST:
        return f"the kernels take at most {WIDEST} channels, got {tokens.shape[-1]}"
    if math.prod(tokens.shape[:-1]) >= 2**31:
        return f"the kernels take less than 2**31 tokens, got {math.prod(tokens.shape[:-1])}"
    return None


def _out_dtype(tokens: Tensor) -> torch.dtype:
    """CUDA's autocast runs layer_norm in float32; the CPU's leaves it alone."""
    widened = tokens.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    return torch.float32 if widened else tokens.dtype


def _merged(shape: Sequence[int], *strides: Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Token axes (the channels' left out) as four: as many of the last ones as possible become one axis.

    Args:
        shape: three or four sizes. strides: of each tensor that shares the axes.
    Returns:
        Four sizes, and four strides for each tensor; axes that are not needed have size 1.
    """
    axes: list[tuple[int, list[int]]] = []  # last axis first
    for size, *steps in reversed(list(zip(shape, *strides))):
        if size == 1:
            continue
        if axes and all(step == axes[-1][0] * inner for step, inner in zip(steps, axes[-1][1])):
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, steps))
    # 0, not any other number: Triton then knows that the offsets keep their alignment
    axes += [(1, [0] * len(strides))] * (4 - len(axes))
    axes.reverse()
    return [size for size, _ in axes], [[steps[i] for _, steps in axes] for i in range(len(strides))]


def _configuration(tokens: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Compile-time constants and warps, the same on every chip. 32 rows of the stem's 128 channels are whole sectors of
    memory along either axis.
    """
    C = tokens.shape[-1]
    BLOCK_C = runtime.power_of_2(max(16, C))
    BLOCK_M = max(1, min(32, TILE // BLOCK_C))
    # plain where nothing hides, so that other grids do not compile again
    H = W = CELL_H = CELL_W = 1
    if mask is not None:
        H, W = tokens.shape[-3:-1]
        CELL_H, CELL_W = H // mask.shape[-2], W // mask.shape[-1]
    return {
        "C": C,
        "HIDES": mask is not None,
        "H": H,
        "W": W,
        "CELL_H": CELL_H,
        "CELL_W": CELL_W,
        # rows of a tile that surely lie in one cell together
        "RUN": math.gcd(CELL_W, BLOCK_M),
        "BLOCK_M": BLOCK_M,
        "BLOCK_C": BLOCK_C,
        "num_warps": WARPS,
        "num_stages": 1,
    }


def _walk(rows: int, *tensors: Tensor) -> tuple[int, list[int]]:
    """How many tiles of so many rows there are; the strides of each tensor and the sizes, as the kernels take them."""
    sizes, steps = _merged(tensors[0].shape[:-1], *(tensor.stride()[:-1] for tensor in tensors))
    strides = [stride for tensor, outer in zip(tensors, steps) for stride in (*outer, tensor.stride(-1))]
    return math.prod(sizes[:3]) * runtime.cdiv(sizes[3], rows), [*strides, *sizes[1:]]


def _bytes(mask: Tensor | None, otherwise: Tensor) -> Tensor:
    """The mask as Triton reads it; where there is none, any tensor may stand for it."""
    return otherwise if mask is None else mask.contiguous().view(torch.uint8)


def _forward(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask_token: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    out = tokens.new_empty(tokens.shape, dtype=dtype)
    constants = _configuration(tokens, mask)
    tiles, walk = _walk(constants["BLOCK_M"], tokens)
    token = norm_weight if mask_token is None else mask_token.reshape(-1)
    runtime.launch(
        kernels.masked_embedding_fwd,
        (tiles,),
        *(tokens, _bytes(mask, norm_weight), norm_weight.contiguous(), norm_bias.contiguous(), token, out),
        *walk,
        eps,
        **constants,
    )
    return out


def _gradients(tokens: Tensor, wants_tokens: bool, wants_sums: bool) -> tuple[Tensor, Tensor]:
    """Room for dx, in the layout of a dense x, and for the sums of the three parameters; empty what is not wanted."""
    dx = torch.empty_like(tokens) if wants_tokens else tokens.new_empty(0)
    return dx, tokens.new_empty((3, tokens.shape[-1]) if wants_sums else (0,), dtype=torch.float32)


def _backward(
    grad: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    wants_tokens: bool,
    wants_sums: bool,
) -> tuple[Tensor, Tensor]:
    dx, sums = _gradients(tokens, wants_tokens, wants_sums)
    constants = _configuration(tokens, mask)
    tiles, walk = _walk(constants["BLOCK_M"], tokens, dx if wants_tokens else tokens)
    programs = min(tiles, PROGRAMS)
    partial = tokens.new_empty((programs, *sums.shape), dtype=torch.float32)
    runtime.launch(
        kernels.masked_embedding_bwd,
        (programs,),
        *(grad.contiguous(), tokens, _bytes(mask, norm_weight), norm_weight.contiguous(), dx, partial),
        *walk,
        tiles,
        eps,
        WANTS_X=wants_tokens,
        WANTS_SUMS=wants_sums,
        **constants,
    )
    return dx, partial.sum(dim=0) if wants_sums else sums


_op = torch.library.custom_op(f"{runtime.NAMESPACE}::masked_embedding", _forward, mutates_args=())
_op_backward = torch.library.custom_op(f"{runtime.NAMESPACE}::masked_embedding_backward", _backward, mutates_args=())


@_op.register_fake
def _(tokens, mask, norm_weight, norm_bias, mask_token, eps, dtype):
    return tokens.new_empty(tokens.shape, dtype=dtype)


@_op_backward.register_fake
def _(grad, tokens, mask, norm_weight, eps, wants_tokens, wants_sums):
    return _gradients(tokens, wants_tokens, wants_sums)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, mask, norm_weight, norm_bias, mask_token, ctx.eps, _ = inputs
    ctx.save_for_backward(tokens, mask, norm_weight)
    ctx.parameters = [(p.shape, p.dtype) if p is not None else None for p in (norm_weight, norm_bias, mask_token)]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tokens, mask, norm_weight = ctx.saved_tensors
    wants_tokens, _, *wants = ctx.needs_input_grad[:5]
    dx, sums = _op_backward(grad, tokens, mask, norm_weight, ctx.eps, wants_tokens, any(wants))
    parameters: list[Tensor | None] = [
        sums[i].reshape(kind[0]).to(kind[1]) if wanted else None
        for i, (wanted, kind) in enumerate(zip(wants, ctx.parameters))
    ]
    return dx if wants_tokens else None, None, *parameters, None, None


_op.register_autograd(_differentiate, setup_context=_keep)

# 4. The public function.


def masked_embedding(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask_token: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every token, then put the mask token where the mask is True.

    Args:
        tokens: (B, t, h, w, C), or (B, h, w, C) for images. Any strides.
        mask: (B, t, gh, gw) or (B, gh, gw) bool, True = hidden; h and w are multiples of gh and gw. None hides nothing.
        norm_weight, norm_bias: (C,).
        mask_token: C values of any shape; None only where the mask is None.
    Returns:
        The shape of tokens, in the dtype that `layer_norm` gives (float32 under CUDA's autocast). The fused result is
        contiguous; the gradient of dense tokens has their layout.
    Raises:
        ValueError: a mask whose cells do not cover the token grid, or a mask without a mask token; other ranks, widths,
            dtypes or devices.
    """
    _check(tokens, mask, norm_weight, norm_bias, mask_token, eps)
    if runtime.fused(NAME, tokens.device, _refusal(tokens, norm_weight, norm_bias, mask_token)):
        token = None if mask is None else mask_token
        return _op(tokens, mask, norm_weight, norm_bias, token, eps, _out_dtype(tokens))
    return reference(tokens, mask, norm_weight, norm_bias, mask_token, eps)


def _check(
    tokens: Tensor, mask: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, mask_token: Tensor | None, eps: float
) -> None:
    runtime.expect_tensors(NAME, tokens=tokens, norm_weight=norm_weight, norm_bias=norm_bias)
    optional = {"mask": mask, "mask_token": mask_token}
    runtime.expect_tensors(NAME, **{name: x for name, x in optional.items() if x is not None})
    if not isinstance(eps, int | float) or not eps >= 0:
        raise ValueError(f"{NAME}: eps is {eps!r}, expected a number of at least 0")
    if tokens.ndim not in (4, 5):
        raise ValueError(
            f"{NAME}: tokens are (B, t, h, w, C) or (B, h, w, C), got {tokens.ndim} axes {tuple(tokens.shape)}"
        )
    if not tokens.is_floating_point():
        raise ValueError(f"{NAME}: the tokens are {tokens.dtype}, not floating-point numbers")
    width = tokens.shape[-1]
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor.shape != (width,):
            raise ValueError(f"{NAME}: {name} is {tuple(tensor.shape)}, but the tokens have {width} channels")
    dtypes = {norm_weight.dtype, norm_bias.dtype}
    fits = len(dtypes) == 1 and dtypes <= {tokens.dtype, torch.float32}
    if not fits and not torch.is_autocast_enabled(tokens.device.type):
        raise ValueError(
            f"{NAME}: norm_weight is {norm_weight.dtype} and norm_bias {norm_bias.dtype}; both must be "
            f"of the tokens' dtype {tokens.dtype} or torch.float32"
        )
    _check_mask(tokens, mask, mask_token)
    others = {"mask": mask, "norm_weight": norm_weight, "norm_bias": norm_bias, "mask_token": mask_token}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != tokens.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}, but the tokens are on {tokens.device}")


def _check_mask(tokens: Tensor, mask: Tensor | None, mask_token: Tensor | None) -> None:
    if mask is not None:
        if mask_token is None:
            raise ValueError(f"{NAME}: a mask needs a mask token to put in place of the hidden tokens")
        if mask.dtype is not torch.bool:
            raise ValueError(f"{NAME}: the mask is {mask.dtype}, not torch.bool (True = hidden)")
        # an empty mask grid would divide by zero
        same_outside = (
            mask.ndim == tokens.ndim - 1 and mask.shape[:-2] == tokens.shape[:-3] and 0 not in mask.shape[-2:]
        )
        if not same_outside or tokens.shape[-3] % mask.shape[-2] or tokens.shape[-2] % mask.shape[-1]:
            raise ValueError(
                f"{NAME}: the mask {tuple(mask.shape)} does not divide the tokens {tuple(tokens.shape[:-1])}"
            )
    if mask_token is None:
        return
    width = tokens.shape[-1]
    if mask_token.numel() != width:
        raise ValueError(
            f"{NAME}: the mask token has {mask_token.numel()} values, but the tokens have {width} channels"
        )
    if not mask_token.is_floating_point():
        raise ValueError(f"{NAME}: the mask token is {mask_token.dtype}, not floating-point numbers")


# 5. Where it is meant to run.


@dataclass(frozen=True, kw_only=True)
class Case:
    """`layout` is how the tokens lie in memory; a convolution leaves channels first."""

    grid: tuple[int, ...]  # (B, [t,] h, w)
    cells: tuple[int, int] | None  # (gh, gw)
    width: int
    layout: str = "channels first"  # or "channels last", or "sliced": a part of a larger grid of more channels
    share: float = 0.4  # of the cells that is hidden
    small: bool = False

    def __str__(self) -> str:
        hidden = (
            "no mask" if self.cells is None else f"{self.share:.0%} of {'x'.join(map(str, self.cells))} cells hidden"
        )
        return f"{'x'.join(map(str, self.grid))} tokens of {self.width}, {self.layout}, {hidden}"


CASES = [
    Case(grid=(8, 8, 56, 56), cells=(14, 14), width=128),  # Swin-B, clips
    Case(grid=(64, 56, 56), cells=(14, 14), width=128, share=0.5),  # Swin-B, images
    Case(grid=(8, 8, 56, 56), cells=(14, 14), width=96),  # Swin-T
    Case(grid=(8, 8, 56, 56), cells=None, width=128),  # fine-tuning
    Case(grid=(8, 8, 56, 56), cells=(14, 14), width=128, layout="channels last"),
    Case(grid=(2, 2, 8, 12), cells=(2, 3), width=128, small=True),
    Case(grid=(3, 8, 8), cells=(2, 2), width=96, layout="channels last", small=True),
    Case(grid=(1, 2, 3, 6), cells=(3, 2), width=37, layout="sliced", small=True),
    Case(grid=(2, 8, 8), cells=(2, 2), width=12, share=0.0, small=True),
    Case(grid=(2, 8, 8), cells=(2, 2), width=12, share=1.0, small=True),
    Case(grid=(1, 2, 4, 4), cells=None, width=1024, layout="channels last", small=True),
    Case(grid=(0, 2, 8, 8), cells=(2, 2), width=16, small=True),
]


def inputs(case: Case, dtype: torch.dtype, device: Any, generator: torch.Generator | None = None) -> tuple[Any, ...]:
    """The arguments of one call: tokens with a mean and a deviation of their own, a mask, parameters."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    batch, *grid = case.grid
    tokens = _room(case, dtype, device).copy_(2 * draw(*case.grid, case.width) + 0.5).requires_grad_()
    mask = None
    if case.cells is not None:
        mask = torch.rand((batch, *grid[:-2], *case.cells), generator=generator, device=device) < case.share
    return tokens, mask, leaf(1 + 0.2 * draw(case.width)), leaf(draw(case.width)), leaf(draw(1, 1, case.width))


def rehearse(case: Case, dtype: torch.dtype) -> None:
    """The host side of one forward and backward pass, on meta tensors."""
    tokens, mask, weight, bias, token = inputs(case, dtype, "meta")
    out = _forward(tokens, mask, weight, bias, token if case.cells else None, 1e-5, dtype)
    _backward(out, tokens, mask, weight, 1e-5, wants_tokens=True, wants_sums=True)


def _room(case: Case, dtype: torch.dtype, device: Any) -> Tensor:
    """Uninitialised tokens in the layout of a case."""
    batch, *grid = case.grid
    if case.layout == "channels first":
        return torch.empty(batch, case.width, *grid, dtype=dtype, device=device).movedim(1, -1)
    if case.layout == "channels last":
        return torch.empty(*case.grid, case.width, dtype=dtype, device=device)
    room = torch.empty(*(size + 1 for size in case.grid), case.width + 3, dtype=dtype, device=device)
    return room[(*(slice(1, None) for _ in case.grid), slice(1, case.width + 1))]
