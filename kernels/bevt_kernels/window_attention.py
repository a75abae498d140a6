"""3-D (shifted) window attention with relative position bias, as in Video Swin (Liu et al. 2021, sec. 3.2; SPEC 1.4).

Legend: B clips, (t, h, w) token grid, nH heads of width d, nW windows of N = wt*wh*ww tokens. An image has t = 1.

The eager path writes a whole feature map again for each of roll, partition, reverse and roll back, and stores
(B*nW, nH, N, N) scores several times. Here a program computes the addresses of its own tokens, so roll and partition
cost nothing; scores live in registers; the bias reaches them as their starting value; and the table's gradient is
summed over windows without atomics, so two runs give equal bits.

The kernels: window_tiles.py, window_tiles_backward.py, window_bias_gradient.py (any N), window_single.py (one tile),
relative_bias.py (table to tiles, gradient to table), over the tables of window_geometry.py; window_cpu.py answers on a
CPU. README.md derives the bias gradient and lists what was tried.
"""

import operator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import runtime, window_cpu, window_single, window_tiles, window_tiles_backward
from ._window_parts import is_wide, lse_planes, tile_size, token_stride
from .window_geometry import BiasIndex, Plan, Triple, bias_rows, plan, roll, shift_mask, used_window, windows

LARGEST_WINDOW = 4096  # tokens; the geometry's tables grow with the square
WIDEST_HEAD = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# 1. The specification.
def reference(
    qkv: Tensor,
    bias_table: Tensor,
    window: Triple,
    shift: Triple = (0, 0, 0),
    mask_shift: Triple | None = None,
    bias_index: BiasIndex = "true",
) -> Tensor:
    """The specification of `window_attention`, in plain torch: any device, any floating dtype."""
    batch, *grid, _, _, width = qkv.shape
    used = used_window((grid[0], grid[1], grid[2]), window)
    mask_shift = shift if mask_shift is None else mask_shift
    precise = torch.promote_types(qkv.dtype, torch.float32)

    # autocast would take the logits back to half precision
    with _no_autocast(qkv.device.type):
        q, k, v = _partition(roll(qkv, shift, -1), used)  # (B*nW, nH, N, d) each
        logits = (q.to(precise) * width**-0.5) @ k.to(precise).transpose(-2, -1)  # (B*nW, nH, N, N)
        rows = bias_rows(window, used, bias_index, qkv.device)
        logits += bias_table[rows].permute(2, 0, 1).to(precise)
        if any(mask_shift):
            regions = shift_mask((grid[0], grid[1], grid[2]), used, mask_shift, qkv.device, precise)
            logits.view(batch, len(regions), *logits.shape[1:]).add_(regions[:, None])
        out = logits.softmax(dim=-1).to(v.dtype) @ v  # (B*nW, nH, N, d)
    return roll(_reverse(out, batch, grid, used), shift, 1)


def _no_autocast(device: str):
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _partition(qkv: Tensor, used: Triple) -> tuple[Tensor, Tensor, Tensor]:
    """(B, t, h, w, 3, nH, d) -> q, k, v, each (B*nW, nH, N, d); windows and tokens in (t, h, w) order."""
    split = windows(qkv, used)
    count, tokens = prod(split.shape[:4]), prod(used)
    order = (7, 0, 1, 2, 3, 8, 4, 5, 6, 9)  # 3, B, windows, nH, tokens, d
    q, k, v = split.permute(order).reshape(3, count, qkv.shape[-2], tokens, qkv.shape[-1])
    return q, k, v


def _reverse(out: Tensor, batch: int, grid: list[int], used: Triple) -> Tensor:
    """(B*nW, nH, N, d) -> (B, t, h, w, nH, d)."""
    heads, width = out.shape[1], out.shape[3]
    counts = [length // size for length, size in zip(grid, used)]
    split = out.view(batch, *counts, heads, *used, width)
    return split.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, *grid, heads, width)


# 2. The Triton kernels: window_tiles.py and window_single.py. 3. Autograd: allocate, launch, save.
def _plan(
    qkv: Tensor, table: Tensor, window: Triple, shift: Triple, mask_shift: Triple, bias_index: BiasIndex
) -> tuple[bool, Plan]:
    """Whether one tile holds a window, and the layer's plan."""
    grid = (qkv.shape[1], qkv.shape[2], qkv.shape[3])
    tile, tokens = tile_size(qkv.dtype), prod(used_window(grid, window))
    single = tokens <= tile
    if single:
        tile = max(16, runtime.power_of_2(tokens))
    wide = is_wide(qkv.dtype, table.dtype)
    return single, plan(grid, window, shift, mask_shift, bias_index, tile, not single, wide, qkv.device)


def _forward(
    qkv: Tensor, bias_table: Tensor, window: Triple, shift: Triple, mask_shift: Triple, bias_index: BiasIndex
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward needs beside it."""
    single, layer = _plan(qkv, bias_table, window, shift, mask_shift, bias_index)
    qkv = _even(qkv)
    if single:
        out, lse = window_single.forward(qkv, bias_table, layer)
        return out, lse, torch.empty(0, dtype=torch.int32, device=qkv.device), out.new_empty(0)
    return window_tiles.forward(qkv, bias_table, layer)


def _backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    rest: Tensor,
    window: Triple,
    shift: Triple,
    mask_shift: Triple,
    bias_index: BiasIndex,
    table_too: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the table."""
    single, layer = _plan(qkv, bias_table, window, shift, mask_shift, bias_index)
    qkv, grad = _even(qkv), grad.contiguous()
    if single:
        return window_single.backward(grad, qkv, bias_table, lse, layer, table_too)
    return window_tiles_backward.backward(grad, qkv, bias_table, out, lse, seen, rest, layer, table_too)


def _even(qkv: Tensor) -> Tensor:
    """qkv itself if its tokens lie evenly spaced and its last dimension is contiguous; else a copy that does.

    The kernels double the stride from q to k in whatever integer it fits.
    """
    even = qkv.stride(-1) == 1 and token_stride(qkv) is not None and qkv.stride(4) < 2**30
    return qkv if even else qkv.contiguous()


@torch.library.custom_op(f"{runtime.NAMESPACE}::window_attention", mutates_args=())
def _fused(
    qkv: Tensor, bias_table: Tensor, window: list[int], shift: list[int], mask_shift: list[int], bias_index: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(qkv, bias_table, *_typed(window, shift, mask_shift, bias_index))


@torch.library.custom_op(f"{runtime.NAMESPACE}::window_attention_backward", mutates_args=())
def _fused_backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor,
    rest: Tensor,
    window: list[int],
    shift: list[int],
    mask_shift: list[int],
    bias_index: str,
    table_too: bool,
) -> tuple[Tensor, Tensor]:
    geometry = _typed(window, shift, mask_shift, bias_index)
    return _backward(grad, qkv, bias_table, out, lse, seen, rest, *geometry, table_too)


@_fused.register_fake
def _(qkv, bias_table, window, shift, mask_shift, bias_index):
    batch, *grid, _, heads, width = qkv.shape
    tokens = prod(min(length, size) for length, size in zip(grid, window))
    tile = tile_size(qkv.dtype)
    single = tokens <= tile
    slots = max(16, runtime.power_of_2(tokens)) if single else runtime.cdiv(tokens, tile) * tile
    count = batch * (prod(grid) // tokens)
    out = qkv.new_empty(batch, *grid, heads, width)
    lse = qkv.new_empty(lse_planes(qkv.dtype), count, heads, slots, dtype=torch.float32)
    shape = (0,) if single else (count, heads, slots // tile)
    rest = qkv.new_empty(0) if single or qkv.dtype == torch.float32 else torch.empty_like(out)
    return out, lse, qkv.new_empty(shape, dtype=torch.int32), rest


@_fused_backward.register_fake
def _(grad, qkv, bias_table, *_):
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], *output)
    ctx.geometry = inputs[2:]


def _differentiate(ctx, grad, *_):
    table_too = ctx.needs_input_grad[1]
    dqkv, dtable = _fused_backward(grad, *ctx.saved_tensors, *ctx.geometry, table_too)
    return dqkv, dtable if table_too else None, None, None, None, None


_fused.register_autograd(_differentiate, setup_context=_save)


@torch.library.custom_op(f"{runtime.NAMESPACE}::window_attention_cpu", mutates_args=())
def _in_chunks(
    qkv: Tensor, bias_table: Tensor, window: list[int], shift: list[int], mask_shift: list[int], bias_index: str
) -> Tensor:
    grid = (qkv.shape[1], qkv.shape[2], qkv.shape[3])
    with _no_autocast("cpu"):
        return window_cpu.forward(
            qkv, bias_table, window_cpu.layer(grid, *_typed(window, shift, mask_shift, bias_index))
        )


@torch.library.custom_op(f"{runtime.NAMESPACE}::window_attention_cpu_backward", mutates_args=())
def _in_chunks_backward(
    grad: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    window: list[int],
    shift: list[int],
    mask_shift: list[int],
    bias_index: str,
    table_too: bool,
) -> tuple[Tensor, Tensor]:
    grid = (qkv.shape[1], qkv.shape[2], qkv.shape[3])
    layer = window_cpu.layer(grid, *_typed(window, shift, mask_shift, bias_index))
    with _no_autocast("cpu"):
        return window_cpu.backward(grad, qkv, bias_table, layer, table_too)


@_in_chunks.register_fake
def _(qkv, *_):
    return qkv.new_empty(*qkv.shape[:4], *qkv.shape[5:])


@_in_chunks_backward.register_fake
def _(grad, qkv, bias_table, window, shift, mask_shift, bias_index, table_too):
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape if table_too else 0)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.geometry = inputs[2:]


def _differentiate_in_chunks(ctx, grad):
    qkv, table = ctx.saved_tensors
    table_too = ctx.needs_input_grad[1]
    if torch.is_grad_enabled() and not runtime.simulated():  # the gradient is to be differentiated again
        wanted = [x for x, needed in zip((qkv, table), ctx.needs_input_grad) if needed]
        out = reference(qkv, table, *_typed(*ctx.geometry))
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None, None
    dqkv, dtable = _in_chunks_backward(grad, qkv, table, *ctx.geometry, table_too)
    return dqkv, dtable if table_too else None, None, None, None, None


_in_chunks.register_autograd(_differentiate_in_chunks, setup_context=_save_inputs)


def _packet(operator: Any) -> Any:
    return operator._opoverload.overloadpacket


def _flops(qkv, window) -> int:
    """Of scores and weighted sums, as torch's FlopCounterMode counts the reference's."""
    batch, *grid, _, heads, width = qkv
    return 2 * 2 * batch * heads * width * prod(grid) * prod(min(pair) for pair in zip(grid, window))


@register_flop_formula([_packet(_fused), _packet(_in_chunks)])
def _(qkv, table, window, *_, **__):
    return _flops(qkv, window)


# scores that are made again are no further FLOPs
@register_flop_formula(_packet(_fused_backward))
def _(grad, qkv, table, out, lse, seen, rest, window, *_, **__):
    return 2 * _flops(qkv, window)


@register_flop_formula(_packet(_in_chunks_backward))
def _(grad, qkv, table, window, *_, **__):
    return 2 * _flops(qkv, window)


def _typed(window, shift, mask_shift, bias_index) -> tuple[Triple, Triple, Triple, BiasIndex]:
    """What went through the dispatcher as lists."""
    return tuple(window), tuple(shift), tuple(mask_shift), bias_index  # pyright: ignore[reportReturnType]


# 4. The public function.
def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    window: Triple,
    shift: Triple = (0, 0, 0),
    mask_shift: Triple | None = None,
    bias_index: BiasIndex = "true",
) -> Tensor:
    """Attend within (shifted) windows.

    Args:
        qkv: (B, t, h, w, 3, nH, d). On an axis that is longer than the window, a multiple of it (callers pad). Any
            strides; tokens that do not lie evenly spaced, or a last dimension that is not contiguous, cost a copy.
        bias_table: ((2wt-1)(2wh-1)(2ww-1), nH), for the nominal window; any floating dtype.
        window: the nominal window. An axis that is not longer is one window, and its shift must be 0 unless the
            official image path wants otherwise.
        shift: how far the windows are rolled; the pairs that only the roll brought together get -100.
        mask_shift: take the regions of the -100 from this shift instead (SPEC X3); default: `shift`.
        bias_index: "true" offsets, or the "official" rows of a clipped window (SPEC X2).
    Returns:
        (B, t, h, w, nH, d) in the dtype of qkv. Logits and softmax are float32 (float64 for float64 inputs). With
        bfloat16 the kernels round a bias to ten bits, and take one beyond 60,000 d**-0.5 as that: finer than bfloat16
        itself for biases of up to about 25.
        Deterministic: two runs give equal bits, gradients included.
    Raises:
        ValueError: arguments that do not belong together, in one sentence with their names and numbers.
        TypeError: no tensor where one belongs.
    """
    window, shift = _triple("window", window, 1), _triple("shift", shift, 0)
    mask_shift = shift if mask_shift is None else _triple("mask_shift", mask_shift, 0)
    _check(qkv, bias_table, window, shift, mask_shift, bias_index)
    if runtime.fused("window_attention", qkv.device, _refusal(qkv, bias_table, window)):
        return _fused(qkv, bias_table, list(window), list(shift), list(mask_shift), bias_index)[0]
    if runtime.cpu_way(qkv.device) and qkv.dtype in window_cpu.DTYPES and bias_table.dtype in window_cpu.DTYPES:
        return _in_chunks(qkv, bias_table, list(window), list(shift), list(mask_shift), bias_index)
    return reference(qkv, bias_table, window, shift, mask_shift, bias_index)


def _triple(name: str, given: Any, least: int) -> Triple:
    """Three whole numbers of any kind, as ints."""
    try:
        t, h, w = map(operator.index, given)
    except (TypeError, ValueError):
        t = h = w = least - 1
    if min(t, h, w) < least:
        _refuse(f"{name} is {given}, expected three whole numbers of at least {least}")
    return t, h, w


def _check(
    qkv: Tensor, bias_table: Tensor, window: Triple, shift: Triple, mask_shift: Triple, bias_index: BiasIndex
) -> None:
    """Refuse what cannot mean anything."""
    runtime.expect_tensors("window_attention", qkv=qkv, bias_table=bias_table)
    if qkv.ndim != 7 or qkv.shape[4] != 3:
        _refuse(f"qkv is {tuple(qkv.shape)}, expected (B, t, h, w, 3, nH, d)")
    if bias_index not in ("true", "official"):
        _refuse(f"bias_index is {bias_index!r}, expected 'true' or 'official'")
    grid = (qkv.shape[1], qkv.shape[2], qkv.shape[3])
    if min(grid) < 1 or qkv.shape[5] < 1 or qkv.shape[6] < 1:
        _refuse(f"qkv is {tuple(qkv.shape)}; only the batch may be empty")
    used = used_window(grid, window)
    if any(length % size for length, size in zip(grid, used)):
        _refuse(f"the grid {grid} is not a multiple of the window {window}; pad it first")
    for name, triple in (("shift", shift), ("mask_shift", mask_shift)):
        if any(step >= size for step, size in zip(triple, used)):
            _refuse(f"{name} is {triple}, which must be less than the window {used} on every axis")
    rows = prod([2 * size - 1 for size in window])
    if bias_table.shape != (rows, qkv.shape[5]):
        _refuse(
            f"the bias table is {tuple(bias_table.shape)} but the window {window} with {qkv.shape[5]} heads "
            f"needs {(rows, qkv.shape[5])}"
        )
    if not {qkv.dtype, bias_table.dtype} <= {*DTYPES, torch.float64}:
        _refuse(
            f"qkv is {qkv.dtype} and the bias table {bias_table.dtype}; both must be floating point of 16 to 64 bits"
        )
    if qkv.device != bias_table.device:
        _refuse(f"qkv is on {qkv.device} but the bias table is on {bias_table.device}")


def _refuse(sentence: str) -> None:
    raise ValueError(f"window_attention: {sentence}")


def _refusal(qkv: Tensor, bias_table: Tensor, window: Triple) -> str | None:
    """Why the kernels cannot take this; None if they can."""
    if qkv.dtype not in DTYPES or bias_table.dtype not in DTYPES:
        return f"the kernels compute in float32, float16 and bfloat16, not {qkv.dtype} with a {bias_table.dtype} table"
    if qkv.shape[6] > WIDEST_HEAD:
        return f"the kernels take heads of at most {WIDEST_HEAD} channels, not {qkv.shape[6]}"
    tokens = prod(used_window((qkv.shape[1], qkv.shape[2], qkv.shape[3]), window))
    if tokens > LARGEST_WINDOW:
        return f"the kernels take windows of at most {LARGEST_WINDOW:,} tokens, not {tokens:,}"
    # the kernels count windows and heads, and the slots of a sample, in 32 bits; a window has up to 63 slots to spare
    sample = qkv.shape[1:4].numel()
    if max(qkv.shape[0] * sample * qkv.shape[5], sample // tokens * (tokens + 63)) >= 2**31:
        return f"the kernels take less than 2**31 tokens times heads, not {tuple(qkv.shape)}"
    return None


# 5. Where it is meant to run.
@dataclass(frozen=True, kw_only=True)
class Case:
    """One layer. `stage` and `stream` say where Swin-B meets it; `small` is fit for the interpreter."""

    batch: int
    grid: Triple
    window: Triple
    heads: int
    shift: Triple = (0, 0, 0)
    mask_shift: Triple | None = None
    head_dim: int = 32
    bias_index: BiasIndex = "true"
    stream: str = ""
    stage: int = 0
    small: bool = False

    def __str__(self) -> str:
        used = used_window(self.grid, self.window)
        where = f"{self.stream} stage {self.stage}, " if self.stream else ""
        shifted = f", shift {'x'.join(map(str, self.shift))}" if any(self.shift) else ""
        masked = f", mask {'x'.join(map(str, self.mask_shift))}" if self.mask_shift is not None else ""
        grid, size = "x".join(map(str, self.grid)), "x".join(map(str, used))
        index = ", official index" if self.bias_index == "official" else ""
        heads = f"{self.heads} heads of {self.head_dim}"
        return f"{where}{self.batch} x {grid}, window {size}, {heads}{shifted}{masked}{index}"


def _swin_b() -> list[Case]:
    """Every attention of Swin-B at the paper's micro-batch (8 clips and 64 images a GPU), and 32-frame clips."""
    cases = []
    streams = (("clip", 8, 8, (8, 7, 7)), ("image", 64, 1, (8, 7, 7)), ("long clip", 4, 16, (16, 7, 7)))
    for stream, batch, steps, window in streams:
        for stage, (side, heads) in enumerate(zip((56, 28, 14, 7), (4, 8, 16, 32)), start=1):
            grid = (steps, side, side)
            shifts = [(0, 0, 0), (0, 3, 3)] if side > 7 else [(0, 0, 0)]
            for shift in shifts:
                cases.append(
                    Case(batch=batch, grid=grid, window=window, heads=heads, shift=shift, stream=stream, stage=stage)
                )
    # the official image path masks unshifted blocks too, and shifts in the last stage (SPEC X3)
    for shift, side, heads, stage in (((0, 0, 0), 56, 4, 1), ((0, 3, 3), 7, 32, 4)):
        cases.append(
            Case(batch=64, grid=(1, side, side), window=(8, 7, 7), heads=heads, shift=shift, mask_shift=(0, 3, 3),
                 bias_index="official", stream="official image", stage=stage)
        )  # fmt: skip
    return cases


CASES = [
    *_swin_b(),
    Case(batch=8, grid=(2, 56, 56), window=(2, 7, 7), heads=4, shift=(1, 3, 3)),  # N = 98
    Case(batch=4, grid=(14, 56, 56), window=(7, 7, 7), heads=3, shift=(3, 3, 3), head_dim=16),  # MONAI's Swin UNETR
    Case(batch=8, grid=(8, 28, 28), window=(8, 7, 7), heads=4, shift=(4, 3, 3), head_dim=64),
    Case(batch=1, grid=(1, 7, 7), window=(8, 7, 7), heads=1, small=True),
    Case(batch=2, grid=(1, 14, 14), window=(8, 7, 7), heads=2, shift=(0, 3, 3), small=True),
    Case(batch=1, grid=(1, 7, 7), window=(8, 7, 7), heads=1, shift=(0, 3, 3), bias_index="official", small=True),
    Case(batch=2, grid=(2, 3, 4), window=(2, 3, 2), heads=2, shift=(0, 0, 1), head_dim=24, small=True),
    Case(batch=1, grid=(4, 7, 7), window=(2, 7, 7), heads=1, shift=(1, 0, 0), mask_shift=(0, 3, 0), small=True),
    Case(batch=1, grid=(8, 7, 14), window=(8, 7, 7), heads=1, shift=(0, 0, 3), small=True),
    Case(batch=1, grid=(3, 5, 14), window=(3, 5, 7), heads=1, shift=(0, 0, 2), head_dim=64, small=True),
]


def inputs(case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator | None = None):
    """The arguments of `window_attention`: queries and keys of unit variance, biases of a trained table's size."""
    rows = prod(2 * size - 1 for size in case.window)
    qkv = torch.randn(case.batch, *case.grid, 3, case.heads, case.head_dim, device=device, generator=generator)
    table = torch.randn(rows, case.heads, device=device, generator=generator)
    leaves = (qkv.to(dtype).requires_grad_(), table.to(dtype).requires_grad_())
    return *leaves, case.window, case.shift, case.mask_shift, case.bias_index


def rehearse(case: Case, dtype: torch.dtype) -> None:
    """The host side of forward and backward on meta tensors, for `runtime.recording`."""
    qkv, table, window, shift, mask_shift, bias_index = inputs(case, dtype, "meta")
    geometry = (window, shift, shift if mask_shift is None else mask_shift, bias_index)
    with torch.no_grad():
        out, lse, seen, rest = _forward(qkv, table, *geometry)
        _backward(torch.empty_like(out), qkv, table, out, lse, seen, rest, *geometry, True)
