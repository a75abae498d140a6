"""Masked cross-entropy on a CPU: a few hundred rows at a time, the gradients in the forward pass.

The reference keeps (M, V) log-probabilities for the backward pass and makes two gradients as large there. Here the
logits of some rows are made, turned into their gradient where they stand, multiplied, and forgotten; what is kept is as
large as the features and the head. It is the same number of products.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products_cpu import linear, product, weight_gradient

ROWS = 392  # scored at a time, as `products_cpu` multiplies them: 12 MiB of logits of 8192 ids


class ScoredRows(torch.autograd.Function):
    """(rows (M, K), weight (V, K), bias (V,) or None, ids (M,)) -> (mean loss, share of rows best named right)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = ctx.needs_input_grad[:3]
        dx = torch.empty_like(rows) if wanted[0] else None
        dw = torch.zeros_like(weight) if wanted[1] and not len(ids) else None
        db = torch.zeros_like(bias) if wanted[2] and bias is not None else None
        losses, right, count = [], 0, max(len(ids), 1)
        for first in range(0, len(ids), ROWS):
            some = slice(first, first + ROWS)
            x, chosen = rows[some], ids[some, None]
            logits = linear(x, weight, bias)
            right += int((logits.argmax(dim=-1) == ids[some]).sum())
            sums = logits.logsumexp(dim=-1, keepdim=True)
            losses.append((sums - logits.gather(1, chosen)).sum())
            if not any(wanted):
                continue
            logits.sub_(sums).exp_()  # softmax
            logits.scatter_add_(1, chosen, logits.new_full((), -1.0).expand(chosen.shape))
            logits /= count
            if dx is not None:
                product(logits, weight, out=dx[some])
            if wanted[1]:
                dw = weight_gradient(logits, x, dw)
            if db is not None:
                db += logits.sum(dim=0)
        ctx.save_for_backward(*(x for x in (dx, dw, db) if x is not None))
        ctx.wanted = [x is not None for x in (dx, dw, db)]
        loss = torch.stack(losses).sum() / count if losses else rows.new_zeros(())
        accuracy = rows.new_full((), right / count)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = iter(ctx.saved_tensors)
        return *(next(found) * grad if wanted else None for wanted in ctx.wanted), None
