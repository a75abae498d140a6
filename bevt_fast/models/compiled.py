"""torch.compile for what a residual branch computes token by token: LayerNorm and qkv, LayerNorm and MLP.

A graph sees tokens as rows, (M, C), and weights as arguments. So all blocks of a width share two graphs, clips and
images alike, and M, which the dropped samples decide, is a dynamic size. What has the shape of a grid (window
attention, padding), the choice of samples and the residual sum stay outside.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_fast.errors import MachineError
from bevt_fast.models.mlp import MLP

GRAPHS = 64  # of one function: a width, dtype, autocast or frozen weight each, and sizes where a backend asks for them


class Compiled:
    """The parts of a block under torch.compile; `backend` by its name. Parameters are read outside their modules'
    forward, which ZeRO-3 cannot gather.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self.backend = backend

    def projected(self, x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
        """linear(norm(x)): (..., C) -> (..., C')."""
        return self._run(_projected, x, norm.weight, norm.bias, linear.weight, linear.bias)

    def mixed(self, x: Tensor, norm: nn.LayerNorm, mlp: MLP) -> Tensor:
        """mlp(norm(x)): (..., C) -> (..., C)."""
        weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return self._run(_mixed, x, norm.weight, norm.bias, *weights)

    def _run(self, function: Callable[..., Tensor], x: Tensor, *weights: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) > 1:  # torch holds sizes of 0 and 1 for constants, and refuses to be told otherwise
            torch._dynamo.mark_dynamic(rows, 0)
        return _compiled(function, self.backend)(rows, *weights).unflatten(0, x.shape[:-1])


def is_wanted() -> bool:
    """In training alone: what is not differentiated runs once, and is not worth graphs of its own."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def require_compiler(device: torch.device) -> None:
    """Compile something small. Raises MachineError where that cannot be done, in one sentence."""
    number = float(time.time_ns() % 999_983)  # a new program: no cache has it
    try:
        torch.compile(lambda x: x * number + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        needs = "a C++ compiler" if device.type == "cpu" else "Triton and a C compiler"
        raise MachineError(
            f"train.compile needs {needs} that torch can use here ({reason}); install one (g++, or the one that the "
            "variable CXX names), or leave train.compile out"
        ) from error


def _projected(x: Tensor, gain: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, x.shape[-1:], gain, offset), weight, bias)


def _mixed(
    x: Tensor, gain: Tensor, offset: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    return F.linear(F.gelu(_projected(x, gain, offset, weight1, bias1)), weight2, bias2)


@functools.cache
def _compiled(function: Callable[..., Tensor], backend: str) -> Callable[..., Tensor]:
    """One for all models of the process."""
    import torch._dynamo as dynamo

    settings: Any = dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS)
    compiler = functools.partial(_keep_little, dynamo.lookup_backend(backend))
    return torch.compile(function, backend=compiler, dynamic=False, fullgraph=True)


def _keep_little(compiler: Callable[..., Any], graph: Any, inputs: Any) -> Any:
    """Of LayerNorm and GELU keep the input and make the result again, as uncompiled blocks do."""
    import torch._functorch.config as settings

    change: Any = {"ban_recompute_materialized_backward": False, "ban_recompute_used_far_apart": False}
    with settings.patch(change):  # pyright: ignore
        return compiler(graph, inputs)
