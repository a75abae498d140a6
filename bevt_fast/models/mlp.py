"""The MLP of a block; on a CPU as one function, so that each of its steps finds its operands in the caches.

A hidden layer is four times as wide as a token. Written whole, read by the GELU and written again, it takes a CPU
longer than the products that make it, up to `NARROW` channels; so there it is made as many tokens at a time as stay in
the caches, and once more in the backward pass. With more channels it is kept, and its gradient takes the place of what
it is made from. Its GELU is kept too where that takes less than the weights and their gradients do.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bevt_fast.models.residual import Linear, activated, normalised
from bevt_kernels.products_cpu import linear, product, weight_gradient

NARROW = 128  # channels
ROWS = 1568  # tokens at a time: a hidden layer of 2.3 MiB at 96 channels


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, again: tuple[Tensor, ...] = ()) -> Tensor:
        """(..., C) -> (..., C). `again`: what makes x once more, if it is not to be kept."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        if again and _is_for_cpu(x, weights):
            return _OnCpu.apply(x, *weights, *again)  # pyright: ignore[reportReturnType]
        return activated(self.fc1(x, normalised, *again), self.fc2)


def _is_for_cpu(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    if x.device.type != "cpu" or not x.numel():
        return False
    if x.shape[-1] <= NARROW and x.numel() <= ROWS * x.shape[-1]:
        return False  # all of it stays in the caches
    if any(tensor.dtype != torch.float32 for tensor in (x, *weights)) or torch.is_autocast_enabled("cpu"):
        return False
    return not hasattr(weights[0], "ds_id")  # ZeRO-3 gathers a weight for the forward of the module that owns it


class _OnCpu(torch.autograd.Function):
    """fc2(gelu(fc1(x))) of x = normalised(source, affine). Chunks follow each other in a fixed order."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, source: Tensor, affine: Tensor
    ) -> Tensor:
        kept: list[Tensor] = []
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, places = x.flatten(0, -2), out.flatten(0, -2)
        for part in _parts(rows):
            h = linear(rows[part], w1, b1)
            a = F.gelu(h)
            linear(a, w2, b2, out=places[part])
            if x.shape[-1] > NARROW:
                kept += [h, a] if a.numel() < 2 * (w1.numel() + w2.numel()) else [h]
            del h, a
        ctx.save_for_backward(w1, b1, w2, source, affine, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        w1, b1, w2, source, affine, *kept = ctx.saved_tensors
        of_x, of_w1, of_b1, of_w2, of_b2 = ctx.needs_input_grad[:5]
        grads, sources = grad.flatten(0, -2), source.flatten(0, -2)
        dx = torch.empty_like(grad, memory_format=torch.contiguous_format) if of_x else None
        dw1 = db1 = dw2 = None
        for part in _parts(grads):
            g, x = grads[part], normalised(sources[part], affine)
            h = kept[0] if kept else linear(x, w1, b1)
            if of_w2:
                dw2 = weight_gradient(g, kept[1] if len(kept) > 1 else F.gelu(h), dw2)
            dh = product(g, w2)
            torch.ops.aten.gelu_backward.grad_input(dh, h, grad_input=dh)
            if of_w1:
                dw1 = weight_gradient(dh, x, dw1)
            if of_b1:
                db1 = dh.sum(0) if db1 is None else db1.add_(dh.sum(0))
            if dx is not None:
                product(dh, w1, out=dx.flatten(0, -2)[part])
        return dx, dw1, db1, dw2, grads.sum(0) if of_b2 else None, None, None


def _parts(rows: Tensor) -> Iterator[slice]:
    step = ROWS if rows.shape[1] <= NARROW else len(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))
