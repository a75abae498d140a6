"""What a kernel file answers to one of its own cases: outputs and every gradient, by the kernels, in plain torch and in
float64. Knows nothing of any particular kernel.
"""

import copy
import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import bevt_kernels
from bevt_kernels import exactness, runtime

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def modules() -> dict[str, Any]:
    """Every file of the package by name. Functions of the same name hide them from attribute access."""
    found = pkgutil.iter_modules(bevt_kernels.__path__)
    return {
        info.name: importlib.import_module(f"bevt_kernels.{info.name}")
        for info in found
        if not info.name.startswith("__")
    }


def kernel_files() -> dict[str, Any]:
    """The files that open with a reference."""
    return {name: module for name, module in modules().items() if hasattr(module, "reference")}


def public(name: str) -> Callable[..., Any]:
    return getattr(modules()[name], name)


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels started within, however a file holds `launch`."""
    real, started = runtime.launch, []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        started.append(getattr(kernel, "__name__", str(kernel)))
        real(kernel, *arguments, **constants)

    with mock.patch.object(runtime, "launch", launch):
        holders = [module for module in modules().values() if vars(module).get("launch") is real]
        for module in holders:
            setattr(module, "launch", launch)  # noqa: B010
        try:
            yield started
        finally:
            for module in holders:
                setattr(module, "launch", real)  # noqa: B010


class Answer(NamedTuple):
    """Outputs and gradients, by name. A gradient that autograd does not give is None."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]

    def named(self) -> dict[str, Tensor]:
        return self.outputs | {name: value for name, value in self.gradients.items() if value is not None}


def arguments_of(module: Any, case: Any, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    return module.inputs(case, dtype, torch.device(device), torch.Generator(device).manual_seed(seed))


def leaves(arguments: tuple[Any, ...]) -> dict[str, Tensor]:
    """Everything that wants a gradient."""
    found: dict[str, Tensor] = {}
    for place, argument in enumerate(arguments):
        if isinstance(argument, nn.Module):
            wanted = {name: value for name, value in argument.named_parameters() if value.requires_grad}
            found |= {f"argument {place}.{name}": value for name, value in wanted.items()}
        elif isinstance(argument, Tensor) and argument.requires_grad:
            found[f"argument {place}"] = argument
    return found


def changed(arguments: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """New leaves with other values, dtypes or strides; modules are copied, and only their dtype follows `change`."""
    made = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            value = change(argument.detach())
            made.append(value.requires_grad_(argument.requires_grad))
        elif isinstance(argument, nn.Module):
            parameters = list(argument.parameters())
            made.append(copy.deepcopy(argument).to(change(parameters[0].detach()).dtype))
        else:
            made.append(argument)
    return tuple(made)


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return changed(arguments, lambda x: x.double() if x.is_floating_point() else x)


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        return {"output": result}
    return {f"output {place}": value for place, value in enumerate(result)}


def upstream_for(outputs: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Random gradients for the differentiable outputs, in their dtype."""
    made = {}
    for name, value in outputs.items():
        if value.requires_grad:
            draw = torch.Generator(value.device).manual_seed(seed)
            made[name] = torch.randn(value.shape, generator=draw, device=value.device).to(value.dtype)
    return made


def answer(function: Callable[..., Any], arguments: tuple[Any, ...], upstream: dict[str, Tensor] | None) -> Answer:
    """Run `function` and, where `upstream` gives gradients of outputs, its backward pass."""
    outputs = outputs_of(function(*arguments))
    wanted = leaves(arguments)
    if not upstream or not wanted:
        return Answer(outputs, dict.fromkeys(wanted))
    differentiable = [outputs[name] for name in upstream]
    given = [gradient.to(out.dtype) for gradient, out in zip(upstream.values(), differentiable)]
    gradients = torch.autograd.grad(differentiable, list(wanted.values()), given, allow_unused=True)
    return Answer({name: value.detach() for name, value in outputs.items()}, dict(zip(wanted, gradients)))


class Answers(NamedTuple):
    """One case in one dtype, three times, with the same inputs and the same gradients from above."""

    name: str
    module: Any
    case: Any
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    upstream: dict[str, Tensor]
    fused: Answer
    eager: Answer
    truth: Answer
    launches: list[str]

    def fused_again(self, arguments: Any = None, upstream: Any = None) -> Answer:
        """The fused answer to other arguments or other gradients from above."""
        arguments = self.arguments if arguments is None else arguments
        return fused_answer(self.name, arguments, self.upstream if upstream is None else upstream)


def fused_answer(name: str, arguments: tuple[Any, ...], upstream: dict[str, Tensor] | None) -> Answer:
    """What the kernels answer, which must leave alone what they were given."""
    given = [x for x in arguments if isinstance(x, Tensor)] + list((upstream or {}).values())
    given += [x for part in arguments if isinstance(part, nn.Module) for x in part.parameters()]
    before = [x.detach().clone() for x in given]
    with bevt_kernels.implementation("fused"):
        made = answer(public(name), arguments, upstream)
    for value, kept in zip(given, before):
        exactness.assert_same_bits(f"{name}: an input after the call", value.detach(), kept)
    return made


def answers(name: str, case: Any, dtype: torch.dtype, device: str) -> Answers:
    return _kept(name, case, dtype, device) if case.small else _answers(name, case, dtype, device)


def _answers(name: str, case: Any, dtype: torch.dtype, device: str) -> Answers:
    module = modules()[name]
    arguments = arguments_of(module, case, dtype, device)
    upstream = upstream_for(outputs_of(module.reference(*arguments)))
    eager = answer(module.reference, arguments, upstream)
    truth = answer(module.reference, doubled(arguments), upstream)
    with counted_launches() as launches:
        fused = fused_answer(name, arguments, upstream)
    return Answers(name, module, case, dtype, arguments, upstream, fused, eager, truth, launches)


_kept = functools.cache(_answers)


def assert_law(made: Answers, fused: Answer) -> None:
    """ARCHITECTURE 6, the first two rungs, for every output and every gradient."""
    truth, eager = made.truth.named(), made.eager.named()
    assert fused.named().keys() == eager.keys()
    for name, value in fused.named().items():
        if value.is_floating_point():
            assert value.isfinite().all() or not eager[name].isfinite().all(), f"{made.name}: {name} is not finite"
        if getattr(made.module, "RETURNS_IDS", False):
            _assert_choice(f"{made.name}: {name}", value, eager[name], made.arguments)
        elif getattr(made.module, "MOVES_ONLY", False) or not value.is_floating_point():
            exactness.assert_same_bits(f"{made.name}: {name}", value, eager[name])
        else:
            exactness.assert_as_exact_as_torch(f"{made.name}: {name}", value, eager[name], truth[name])


def _assert_choice(name: str, fused: Tensor, eager: Tensor, arguments: tuple[Any, ...]) -> None:
    """An argmax over a linear layer: the ids where the mask asks for them, and zeros elsewhere."""
    features, weight, bias, mask = (*doubled(arguments), None, None)[:4]  # a file may leave the last two out
    assert isinstance(features, Tensor) and isinstance(weight, Tensor)
    mask = torch.ones_like(fused, dtype=torch.bool) if mask is None else mask
    scores = nn.functional.linear(features[mask], weight, bias)
    exactness.assert_choice_as_exact_as_torch(name, fused[mask], eager[mask], scores)
    assert not fused[~mask].any(), f"{name}: an id where nothing was asked"


# -- other strides -----------------------------------------------------------------------------------------------------


def every_second_sample(x: Tensor) -> Tensor:
    wide = _wide(x, (2 * x.shape[0], *x.shape[1:]))
    wide[::2] = x
    return wide[::2]


def slice_of_a_wider_tensor(x: Tensor) -> Tensor:
    """An odd offset, too: no row begins at a multiple of 16 bytes."""
    wide = _wide(x, (*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3))
    view = wide[..., 1:-1, 1:-2]
    view.copy_(x)
    return view


def batch_inside(x: Tensor) -> Tensor:
    """The batch is the innermost axis but one in memory."""
    return x.movedim(0, -2).contiguous().movedim(-2, 0)


def expanded_over_the_batch(x: Tensor) -> Tensor:
    """Every sample the first one, with stride 0."""
    return x[:1].expand_as(x)


def _wide(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, torch.nan if x.is_floating_point() else True, dtype=x.dtype, device=x.device)


LAYOUTS = (every_second_sample, slice_of_a_wider_tensor, batch_inside)


def without_batch(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch is the first axis of the first argument and of everything that is not a float (masks, targets)."""
    made = []
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and (place == 0 or not argument.is_floating_point()):
            argument = argument.detach()[:0].requires_grad_(argument.requires_grad)
        made.append(argument)
    return tuple(made)


def small_cases(module: Any) -> list[Any]:
    return [case for case in getattr(module, "CASES", []) if getattr(case, "small", False)]


def is_a_case(case: Any) -> bool:
    return dataclasses.is_dataclass(case) and hasattr(case, "small") and bool(str(case))
