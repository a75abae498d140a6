"""Who answers a call: the fused kernels on an NVIDIA GPU, on a CPU a function's own way for it if it has one, elsewhere
the reference; or whom `implementation` names.

Every kernel is started through `launch`, so that `compile_check` can see exactly what a GPU would be given: under
`recording` the host side of a kernel runs on meta tensors, and what it would launch is written down instead.
"""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference answers everything

    class _Missing:
        """Stands in for `triton` and `tl`, so that a kernel file can be read where nothing will launch it."""

        def constexpr(self, value: Any) -> Any:
            return value

        def jit(self, function: Any = None, **_options: Any) -> Any:
            return function if function is not None else lambda function: function

    triton = tl = cast(Any, _Missing())
    AVAILABLE = False
else:
    AVAILABLE = True

INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from . import interpreter

    interpreter.correct()
    interpreter.patch_language_once()

OLDEST = (8, 0)  # compute capability: bf16 products and asynchronous copies
Implementation = Literal["auto", "reference", "fused"]

# operators are registered under the package's own name, so that a copy in another project does not take their place
NAMESPACE = (__package__ or "bevt_kernels").replace(".", "_")
Function = TypeVar("Function", bound=Callable[..., Any])

_implementation: Implementation = "auto"
_warned: set[str] = set()
_launches: "list[Launch] | None" = None
_target = 0
_one_at_a_time = threading.Lock()  # the interpreter keeps the place in the grid of one program for the whole process


class Inner(NamedTuple):
    """What one pass of a kernel's hot loop computes; `compile_check` divides its instructions by it."""

    scores: int  # elements of the tile, padding included
    flops: float  # useful FLOP per useful element
    waste: float  # padded over useful elements


class Launch(NamedTuple):
    """One kernel start, as a GPU would have been given it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    inner: Inner | None


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """The smallest power of two that is not below `least`."""
    return 1 << max(least - 1, 0).bit_length()


def constant(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler (2 s) for this one attribute."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def implementation(name: Implementation) -> Iterator[None]:
    """Choose who answers within the block, in every thread: "reference", "fused", or "auto" (the default).

    "auto" asks the kernels wherever they can run, and on a CPU the function's own way for it. "fused" asks the kernels
    too, on a CPU under Triton's interpreter (TRITON_INTERPRET=1); what they cannot do falls back to the reference with
    one warning.
    """
    global _implementation
    if name not in ("auto", "reference", "fused"):
        raise ValueError(f"implementation: expected 'auto', 'reference' or 'fused', got {name!r}")
    before, _implementation = _implementation, name
    try:
        yield
    finally:
        _implementation = before


def fused(function: str, device: torch.device, refusal: str | None = None) -> bool:
    """Whether the kernels answer this call of `function`; `refusal` says why they cannot, if they cannot.

    Where somebody might have expected them, and only there, one warning gives the reason.
    """
    if _implementation == "reference":
        return False
    missing = _missing(device.type, device.index)
    if missing is None and refusal is None and not torch.compiler.is_compiling() and _transformed():
        refusal = "the kernels know neither the transforms of torch.func nor forward-mode gradients"
    if missing is None and refusal is None:
        return True
    if _implementation == "fused" or (device.type == "cuda" and missing is None):
        warn_once(f"{function}: {missing or refusal}; the reference answers instead")
    return False


def cpu_way(device: torch.device) -> bool:
    """Whether a function's own way for a CPU answers this call, rather than its reference, once no kernel does."""
    transformed = not torch.compiler.is_compiling() and _transformed()
    return _implementation == "auto" and device.type == "cpu" and not transformed


def warn_once(text: str) -> None:
    """The same sentence is said once per process."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=2)


def simulated() -> bool:
    """Whether torch is tracing, or a mode (fake tensors, a tracer) stands in for tensors: values cannot be read, and
    what is made is of no use afterwards.
    """
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _transformed() -> bool:
    """Whether torch.func (grad, vmap, jvp) or forward-mode differentiation is at work; torch would say so badly or, for
    a forward-mode gradient, answer 0.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


@constant
def _missing(device: str, index: int | None) -> str | None:
    """Why no kernel can run on this device; None if they can."""
    if not AVAILABLE:
        return "Triton is not installed"
    if device == "cpu" and INTERPRETED:
        return None if _implementation == "fused" else "the interpreter is only for implementation('fused')"
    if device != "cuda" or torch.version.hip:
        return f"the kernels need an NVIDIA GPU, not a tensor on {device!r}"
    found = torch.cuda.get_device_capability(index)
    if found < OLDEST:
        return f"the kernels need compute capability {OLDEST[0]}.{OLDEST[1]}, this GPU has {found[0]}.{found[1]}"
    return None


def capability(device: torch.device) -> int:
    """80, 90 or 100: what a kernel's configuration is chosen by.

    Consumer GPUs (8.6, 8.9, 12.0) multiply as an A100 does, from registers, and take its configurations; they have less
    shared memory, and `compile_check` holds those configurations to it.
    """
    if _launches is not None:
        return _target
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100, 11: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    inner: Inner | None = None,
    **constants: Any,
) -> None:
    """Start `kernel` with positional arguments and named compile-time constants; a grid with a zero starts nothing."""
    if _launches is not None:
        _launches.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages, inner))
        return
    if 0 in grid:
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda":
        # Triton launches on the current device, which need not be the tensors'
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)
    else:
        with _one_at_a_time:
            kernel[grid](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def expect_tensors(function: str, **given: Any) -> None:
    """Refuse arguments that are not dense tensors."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{function}: {name} is of type {type(value).__name__}, expected a torch.Tensor")
        if value.layout is not torch.strided or value.is_nested:
            raise ValueError(f"{function}: {name} is a sparse or nested tensor, expected a dense one")


@contextmanager
def recording(target: int) -> Iterator[list[Launch]]:
    """Write launches down instead of starting them, as for a GPU of compute capability `target` (80, 90, 100)."""
    global _launches, _target
    before = _launches, _target
    _launches, _target = [], target
    try:
        yield _launches
    finally:
        _launches, _target = before
