"""Two losses over the same weights, one after the other: forward and backward of the first, then the second's.

A graph of both keeps what both backward passes need at once. Here the first loss leaves its gradients behind, as many
numbers as there are weights, and gives back everything else before the second begins. No number is computed twice.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Settled:
    """A loss whose gradients are known, of the `parameters` that want any; its graph is gone."""

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        self.value, self.gradients = loss.detach(), list(found)

    def loss(self) -> Tensor:
        """The loss again, for a sum that is differentiated once. Asked for after another loss was computed, its
        gradients come first in the backward pass, and a parameter is done as soon as the other's reaches it.
        """
        return _Known.apply(self, *self.parameters)  # pyright: ignore[reportReturnType]


class _Known(torch.autograd.Function):
    """Gives the gradients that are there."""

    @staticmethod
    def forward(ctx: Any, settled: Settled, *parameters: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.settled = settled
        return settled.value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients, ctx.settled.gradients = ctx.settled.gradients, []
        if not gradients:
            raise RuntimeError("streams in turn: the loss of the first stream can be differentiated once only")
        return None, *(None if known is None else known.mul_(grad.to(known.dtype)) for known in gradients)
