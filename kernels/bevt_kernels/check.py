"""Every kernel over its own cases against float64: what `python -m bevt_kernels`, bench/ and the GPU gate print.

A kernel is found by its file: a module of this package with CASES, `inputs`, `reference` and a function of its name.
"""

import copy
import importlib
import inspect
import pkgutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import runtime
from .exactness import errors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# functions that treat the samples of their first argument alike: float64 truth is computed one sample at a time,
# because all of it at once can be larger than a GPU
BY_SAMPLE = ("window_attention",)
PATIENCE = 5  # tries of a case that finds no memory


class Kernel(NamedTuple):
    """A kernel file."""

    name: str
    module: ModuleType

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(self.module, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return self.module.reference

    def cases(self, small: bool = False) -> list[Any]:
        """All cases, or those that a CPU and the interpreter can bear."""
        return [case for case in self.module.CASES if case.small or not small]

    def real(self) -> list[Any]:
        """The cases at real sizes only: what is worth timing on a GPU."""
        return [case for case in self.module.CASES if not case.small]

    def draw(self, case: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
        return self.module.inputs(case, dtype, device, torch.Generator(device).manual_seed(seed))


class Values(NamedTuple):
    """What one call returned: outputs by name, then the gradient of every leaf."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    statistics: frozenset[str]  # outputs without a gradient beside others that have one: shares of a count


class Verdict(NamedTuple):
    """One tensor beside float64: `ok` is the law of exactness.py."""

    tensor: str
    error: float
    torchs_own: float
    bound: float
    ok: bool
    note: str = ""


def kernels(package: str = __package__ or "bevt_kernels") -> list[Kernel]:
    """Every kernel file of the package, window_attention first."""
    folder = str(Path(__file__).parent)
    names = [info.name for info in pkgutil.iter_modules([folder]) if not info.name.startswith("_")]
    modules = {name: importlib.import_module(f".{name}", package) for name in names}
    found = [Kernel(name, module) for name, module in modules.items() if hasattr(module, "CASES")]
    return sorted(found, key=lambda kernel: (kernel.name != "window_attention", kernel.name))


def leaves(reference: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Tensor]:
    """Every tensor among the arguments that wants a gradient, by name; a module's parameters as argument.parameter."""
    found = {}
    for name, argument in zip(inspect.signature(reference).parameters, arguments):
        if isinstance(argument, nn.Module):
            found |= {f"{name}.{part}": p for part, p in argument.named_parameters() if p.requires_grad}
        elif isinstance(argument, Tensor) and argument.requires_grad:
            found[name] = argument
    return found


def evaluate(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arguments: Sequence[Any],
    upstream: dict[str, Tensor] | None = None,
) -> tuple[Values, dict[str, Tensor]]:
    """Outputs and gradients of one call, and the upstream gradients that were used (drawn where none are given).

    Args:
        function: called with `arguments`; `reference` gives the arguments their names.
        upstream: by the name of the output. Outputs without one are not differentiated.
    """
    wanted = leaves(reference, arguments)
    returned = function(*arguments)
    outputs = named(returned)
    if upstream is None:
        upstream = _upstream({name: x for name, x in outputs.items() if x.requires_grad})
    statistics = frozenset(name for name in outputs if upstream and name not in upstream)
    differentiable = [name for name in upstream if name in outputs and outputs[name].requires_grad]
    gradients: dict[str, Tensor | None] = dict.fromkeys(wanted)
    if differentiable and wanted:
        answers = torch.autograd.grad(
            [outputs[name] for name in differentiable],
            list(wanted.values()),
            grad_outputs=[upstream[name] for name in differentiable],
            allow_unused=True,
        )
        gradients = dict(zip(wanted, answers))
    return Values({name: x.detach() for name, x in outputs.items()}, gradients, statistics), upstream


def truth(kernel: Kernel, arguments: Sequence[Any], upstream: dict[str, Tensor]) -> Values:
    """The same in float64: every floating argument and upstream gradient widened exactly."""
    wide = [_widen(argument) for argument in arguments]
    doubles = {name: x.double() for name, x in upstream.items()}
    if kernel.name not in BY_SAMPLE or len(wide[0]) < 2:
        return evaluate(kernel.reference, kernel.reference, wide, doubles)[0]
    outputs: list[dict[str, Tensor]] = []
    firsts: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    for n in range(len(wide[0])):
        sample = wide[0].detach()[n : n + 1].requires_grad_(wide[0].requires_grad)
        slices = {name: x[n : n + 1] for name, x in doubles.items()}
        values, _ = evaluate(kernel.reference, kernel.reference, [sample, *wide[1:]], slices)
        outputs.append(values.outputs)
        for position, (name, gradient) in enumerate(values.gradients.items()):
            assert gradient is not None
            if position == 0 and wide[0].requires_grad:
                firsts.append(gradient)
            else:
                sums[name] = sums[name] + gradient if name in sums else gradient
    gradients: dict[str, Tensor | None] = dict(sums)
    if firsts:
        gradients = {next(iter(leaves(kernel.reference, wide))): torch.cat(firsts), **sums}
    return Values({name: torch.cat([o[name] for o in outputs]) for name in outputs[0]}, gradients, frozenset())


def compare(kernel: Kernel, arguments: Sequence[Any], ours: Values, eager: Values, true: Values) -> list[Verdict]:
    """The law for every output and every gradient of one call."""
    if getattr(kernel.module, "RETURNS_IDS", False):
        return [_choice(arguments, ours, eager)]
    exact_bits = getattr(kernel.module, "MOVES_ONLY", False)
    found = []
    for name, torchs in eager.outputs.items():
        slack = _one_position(arguments) if name in eager.statistics else 0.0
        found.append(_verdict(name, ours.outputs.get(name), torchs, true.outputs[name], exact_bits, slack))
    for name, torchs in eager.gradients.items():
        if torchs is not None:
            found.append(_verdict(f"d {name}", ours.gradients.get(name), torchs, true.gradients[name]))
    return found


class Judge:
    """Holds what a call must be compared with, so that several contenders can be judged by one float64 truth."""

    def __init__(self, kernel: Kernel, arguments: Sequence[Any]) -> None:
        self.kernel, self.arguments = kernel, arguments
        with runtime.implementation("reference"):
            self.eager, self.upstream = evaluate(kernel.reference, kernel.reference, arguments)
        if getattr(kernel.module, "RETURNS_IDS", False):
            self.truth = self.eager  # the choice is judged by its float64 score
        else:
            self.truth = truth(kernel, arguments, self.upstream)

    def judge(self, function: Callable[..., Any], twice: bool = False) -> list[Verdict]:
        """The verdicts on `function`; `twice` also asks for equal bits of a second run."""
        poison(self.arguments)
        values, _ = evaluate(function, self.kernel.reference, self.arguments, self.upstream)
        found = compare(self.kernel, self.arguments, values, self.eager, self.truth)
        if twice:
            again, _ = evaluate(function, self.kernel.reference, self.arguments, self.upstream)
            found.append(_same_bits(values, again))
        return found


def ours(kernel: Kernel, fused: bool = False) -> Callable[..., Any]:
    """The public function; with `fused`, as under implementation("fused")."""

    def call(*arguments: Any) -> Any:
        with runtime.implementation("fused" if fused else "auto"):
            return kernel.function(*arguments)

    return call


def refusal(kernel: Kernel, arguments: Sequence[Any], fused: bool = False) -> str | None:
    """Why the reference would answer this call of the public function; None where the kernels do."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    if device.type == "cpu" and not (fused and runtime.INTERPRETED):
        return "not on a CPU: the kernels need an NVIDIA GPU"
    with listening() as refusals, torch.no_grad():
        ours(kernel, fused=True)(*arguments)  # "fused" makes a refusal loud
    return next(iter(refusals), None)


@contextmanager
def listening() -> Iterator[list[str]]:
    """The reasons for which, within the block, a reference answered instead of a kernel."""
    refusals: list[str] = []
    runtime._warned.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield refusals
    ending = "; the reference answers instead"
    refusals += [str(w.message).removesuffix(ending) for w in said if str(w.message).endswith(ending)]


def check(kernel: Kernel, case: Any, dtype: torch.dtype, device: torch.device, fused: bool) -> list[Verdict]:
    """The verdicts on one case; a case that raises has one verdict that says so."""
    for _ in range(PATIENCE):
        try:
            return _checked(kernel, case, dtype, device, fused)
        except torch.OutOfMemoryError as problem:  # others may be at work on this GPU: let them finish
            said: Exception = problem
            torch.cuda.empty_cache()
            time.sleep(3)
        except Exception as problem:  # the next case must still be heard
            said = problem
            break
    return [Verdict("", float("nan"), float("nan"), float("nan"), False, one_line(said))]


def _checked(kernel: Kernel, case: Any, dtype: torch.dtype, device: torch.device, fused: bool) -> list[Verdict]:
    arguments = kernel.draw(case, dtype, device)
    judge = Judge(kernel, arguments)
    with listening() as refusals:
        # a program of the interpreter runs alone: nothing there could differ
        verdicts = judge.judge(ours(kernel, fused), twice=device.type == "cuda")
    return [v._replace(note=v.note or f"not fused: {refusals[0]}") for v in verdicts] if refusals else verdicts


def one_line(problem: BaseException) -> str:
    """An exception as one line of a table."""
    text = " ".join(str(problem).split()) or "no message"
    return f"{type(problem).__name__}: {text[:300]}"


def sticky(text: str) -> bool:
    """Whether an error leaves the CUDA context unusable, so that only a new process can go on."""
    signs = (
        "illegal memory access", "misaligned address", "device-side assert", "unspecified launch failure",
        "illegal instruction", "hardware stack error", "invalid address space", "an earlier CUDA error",
    )  # fmt: skip
    return any(sign in text for sign in signs)


def poison(arguments: Sequence[Any]) -> None:
    """On a GPU, leave NaN in the memory that the next allocations will get, so that an unwritten element shows."""
    tensor = next((a for a in arguments if isinstance(a, Tensor)), None)
    if tensor is None or tensor.device.type != "cuda":
        return
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(tensor.device)
    count = min(free // 8, 8 * tensor.nbytes + 2**26) // 4
    torch.full((count,), float("nan"), device=tensor.device)


def named(returned: Any) -> dict[str, Tensor]:
    outputs = returned if isinstance(returned, tuple | list) else (returned,)
    names = ["out", *(f"out {n}" for n in range(1, len(outputs)))]
    return {name: x for name, x in zip(names, outputs) if isinstance(x, Tensor)}


def _upstream(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    drawn = {}
    for seed, (name, x) in enumerate(outputs.items(), start=1):
        generator = torch.Generator(x.device).manual_seed(seed)
        drawn[name] = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    return drawn


def _widen(argument: Any) -> Any:
    if isinstance(argument, nn.Module):
        return copy.deepcopy(argument).double()
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.detach().double().requires_grad_(argument.requires_grad)
    return argument


def _verdict(
    name: str, mine: Tensor | None, torchs: Tensor, true: Tensor | None, exact_bits: bool = False, slack: float = 0.0
) -> Verdict:
    nan = float("nan")
    if mine is None or true is None:
        return Verdict(name, nan, nan, nan, False, "missing: None was returned")
    if mine.shape != torchs.shape or mine.dtype != torchs.dtype:
        told = f"{tuple(mine.shape)} {mine.dtype}, the reference's is {tuple(torchs.shape)} {torchs.dtype}"
        return Verdict(name, nan, nan, nan, False, told)
    if exact_bits or not torchs.is_floating_point():
        differ = float((mine != torchs).sum())
        return Verdict(name, differ, 0.0, 0.0, differ == 0, "elements that differ")
    error, torchs_own, bound = errors(mine, torchs, true)
    return Verdict(name, error, torchs_own, bound + slack, error <= bound + slack)  # also false for NaN


def _one_position(arguments: Sequence[Any]) -> float:
    """An accuracy counts hidden positions; where two scores tie but for a rounding, one of them may go either way."""
    hidden = [int(a.sum()) for a in arguments if isinstance(a, Tensor) and a.dtype == torch.bool]
    return 1.0 / max(hidden[0], 1) if hidden else 0.0


def _choice(arguments: Sequence[Any], ours: Values, eager: Values) -> Verdict:
    """For (features, weight, bias, mask) -> ids: what the chosen score lacks to the best, in float64."""
    features, weight, bias, mask = [*arguments, *[None] * (4 - len(arguments))]
    mine, torchs = (values.outputs["out"] for values in (ours, eager))
    if mine.shape != torchs.shape or mine.dtype != torchs.dtype:
        return _verdict("ids", mine, torchs, torchs)
    hidden = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device) if mask is None else mask
    with torch.no_grad():
        rows = features[hidden]
        worst = {"ours": 0.0, "torch": 0.0, "largest": 0.0}
        for chunk, a, b in zip(rows.split(8192), mine[hidden].split(8192), torchs[hidden].split(8192)):
            if not len(chunk):
                continue
            scores = F.linear(chunk.double(), weight.double(), None if bias is None else bias.double())
            best = scores.amax(dim=-1)
            for name, ids in (("ours", a), ("torch", b)):
                lacks = float((best - scores.gather(-1, ids[:, None])[:, 0]).max())
                worst[name] = max(worst[name], lacks)
            worst["largest"] = max(worst["largest"], float(scores.abs().max()))
    bound = 2 * worst["torch"] + torch.finfo(torch.float32).eps * worst["largest"]
    rest = int((mine[~hidden] != 0).sum())
    note = f"{rest} visible positions have an id" if rest else "lacks to the best score"
    return Verdict("ids", worst["ours"], worst["torch"], bound, worst["ours"] <= bound and not rest, note)


def _same_bits(one: Values, two: Values) -> Verdict:
    pairs = [(one.outputs[name], two.outputs[name]) for name in one.outputs]
    pairs += [(a, two.gradients[name]) for name, a in one.gradients.items() if a is not None]
    differ = float(sum(int((a != b).sum()) for a, b in pairs if b is not None))
    return Verdict("a second run", differ, 0.0, 0.0, differ == 0, "elements that differ")
