"""The MLP of a block; on a CPU, where there are many tokens of few channels, as many at a time as stay in its caches.

A hidden layer is four times as wide as a token. Written whole, read by the GELU and written again, it takes a CPU
longer than the products that make it, up to `NARROW` channels; so there the backward pass makes it once more, a chunk
at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bevt_fast.models.residual import Linear, activated, normalised

NARROW = 256  # channels
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
        if again and _goes_in_chunks(x, weights):
            return _InChunks.apply(x, *weights, *again)  # pyright: ignore[reportReturnType]
        return activated(self.fc1(x, normalised, *again), self.fc2)


def _goes_in_chunks(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    if x.device.type != "cpu" or x.shape[-1] > NARROW or x.numel() <= ROWS * x.shape[-1]:
        return False
    if any(tensor.dtype != torch.float32 for tensor in (x, *weights)) or torch.is_autocast_enabled("cpu"):
        return False
    return not hasattr(weights[0], "ds_id")  # ZeRO-3 gathers a weight for the forward of the module that owns it


class _InChunks(torch.autograd.Function):
    """fc2(gelu(fc1(x))) of x = normalised(source, affine). Chunks follow each other in a fixed order."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, source: Tensor, affine: Tensor
    ) -> Tensor:
        ctx.save_for_backward(w1, b1, w2, source, affine)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for rows, place in zip(x.flatten(0, -2).split(ROWS), out.flatten(0, -2).split(ROWS)):
            torch.addmm(b2, F.gelu(torch.addmm(b1, rows, w1.T)), w2.T, out=place)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        w1, b1, w2, source, affine = ctx.saved_tensors
        of_x, of_w1, of_b1, of_w2, of_b2 = ctx.needs_input_grad[:5]
        grads, sources = grad.flatten(0, -2), source.flatten(0, -2)
        dx = torch.empty_like(grad, memory_format=torch.contiguous_format) if of_x else None
        dw1, db1, dw2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        for start in range(0, len(grads), ROWS):
            part = slice(start, start + ROWS)
            g, x = grads[part], normalised(sources[part], affine)
            h = torch.addmm(b1, x, w1.T)
            if of_w2:
                dw2.addmm_(g.T, F.gelu(h))
            dh = torch.ops.aten.gelu_backward(g @ w2, h)
            if of_w1:
                dw1.addmm_(dh.T, x)
            if of_b1:
                db1 += dh.sum(0)
            if dx is not None:
                torch.mm(dh, w1, out=dx.flatten(0, -2)[part])
        wanted = (dw1 if of_w1 else None, db1 if of_b1 else None, dw2 if of_w2 else None)
        return dx, *wanted, grads.sum(0) if of_b2 else None, None, None
