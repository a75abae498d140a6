"""What a residual branch need not compute, and what it need not keep, without changing an answer.

Drop path leaves out the samples that it drops instead of multiplying them by 0. A linear layer behind a LayerNorm or a
GELU keeps what those read, which is kept anyway, and makes its own input again in the backward pass.

Every parameter is read inside the forward of the module that owns it, so that ZeRO-3 can gather it; of a LayerNorm's
two a copy goes along.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from bevt_fast.data.batch import send
from bevt_kernels import products_cpu


class DropPath(nn.Module):
    """Leaves a residual branch out for a random share of the samples, and scales the survivors up to keep the mean.

    Each sample is kept with probability 1 - rate, on its own (Huang et al. 2016). The decisions come from torch's
    generator of the CPU, wherever the samples are: the host knows how many survive without waiting for a GPU.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], few: Sequence[int]) -> Tensor:
        """x + branch(x), over the survivors. x: (B, t, h, w, C); `few`: the steps, rows and columns of one window.

        Where nobody survives the branch still sees one window, times 0: every parameter has a gradient in every
        process.
        """
        if not self.training or self.rate == 0:
            return x + branch(x)
        keep = 1 - self.rate
        survives = torch.empty(len(x), device="cpu").bernoulli_(keep)
        if torch.compiler.is_compiling():  # it would compile anew for every number of survivors
            scale = (survives / keep if keep else survives).to(x.device, x.dtype)
            return x + branch(x) * scale.view(-1, 1, 1, 1, 1)
        rows = survives.nonzero().flatten()
        if not len(rows):
            t, h, w = few
            return x + (0 * branch(x[:1, :t, :h, :w])).sum().to(x.dtype)
        if len(rows) == len(x):
            return torch.add(x, branch(x), alpha=1 / keep)
        rows = send(rows, x.device)
        out = branch(x.index_select(0, rows))
        return x.index_add(0, rows, out.to(x.dtype), alpha=1 / keep)


class Norm(nn.LayerNorm):
    """LayerNorm, and what `Linear` needs to make its result again; nothing where it had better keep it."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., C) -> (..., C), and the arguments of `normalised` or none."""
        # a copy: ZeRO-3 puts the parameters away as soon as this forward returns
        again = (x.detach(), torch.stack([self.weight, self.bias]).detach()) if _recomputes() else ()
        return super().forward(x), again


def normalised(x: Tensor, affine: Tensor) -> Tensor:
    """The result of a `Norm` once more. affine: (2, C), its weight and bias."""
    return F.layer_norm(x, x.shape[-1:], affine[0], affine[1])


class Linear(nn.Linear):
    """A linear layer whose input may be made again in the backward pass instead of being kept."""

    def forward(self, y: Tensor, make: Callable[..., Tensor] | None = None, *sources: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(..., C) -> (..., C'). make(*sources) is y, to the bit; without sources y is kept."""
        if not sources:
            return linear(y, self.weight, self.bias)
        return _Recomputed.apply(y, self.weight, self.bias, make, *sources)  # pyright: ignore[reportReturnType]


def activated(h: Tensor, linear: Linear) -> Tensor:
    """linear(gelu(h)) with the exact GELU; of the two only h is kept."""
    return linear(F.gelu(h), F.gelu, h.detach()) if _recomputes() else linear(F.gelu(h))


def linear(y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y @ weight.T + bias, on a CPU by what multiplies fastest there. y: (..., C), weight: (C', C) -> (..., C')."""
    if y.ndim < 2 or not products_cpu.serves(y.flatten(0, -2), weight, bias):
        return F.linear(y, weight, bias)
    return _Recomputed.apply(y, weight, bias, Tensor.detach, y.detach())  # pyright: ignore[reportReturnType]


class _Recomputed(torch.autograd.Function):
    """y @ weight.T + bias, without y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, bias: Tensor | None, make: Any, *sources: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight, *sources)
        ctx.make, ctx.dtypes = make, (y.dtype, weight.dtype, None if bias is None else bias.dtype)
        return products_cpu.linear(y.flatten(0, -2), weight, bias).view(*y.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *sources = ctx.saved_tensors
        rows, wanted = grad.flatten(0, -2), ctx.needs_input_grad
        dy = dweight = dbias = None
        if wanted[1]:
            # autocast multiplied in the dtype that the gradient has
            y = ctx.make(*sources).flatten(0, -2).to(grad.dtype)
            dweight = products_cpu.weight_gradient(rows, y).to(ctx.dtypes[1])
            del y
        if wanted[2]:
            dbias = rows.sum(0).to(ctx.dtypes[2])
        if wanted[0]:
            dy = products_cpu.product(rows, weight.to(grad.dtype)).view(*grad.shape[:-1], -1).to(ctx.dtypes[0])
        return dy, dweight, dbias, None, *(None for _ in sources)


def _recomputes() -> bool:
    """A compiler decides for itself what it keeps, and transforms of torch do not see into `_Recomputed`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
