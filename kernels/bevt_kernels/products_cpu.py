"""Matrix products of a CPU, by oneDNN where torch's BLAS leaves half of the processor idle.

Whatever another maker's processor has, MKL uses vectors of 256 bits on all but Intel's. With those of 512 bits, which
oneDNN uses on either, an AMD EPYC (Zen 5, 2 threads, MKL 2024.2) makes 310 to 420 instead of 160 to 190 GFLOP/s of
large float32 products. Which of the two multiplies depends on the machine and the shapes alone, so two runs give equal
bits.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import runtime
from .runtime import cdiv

BLOCKS = (1568, 392)  # rows at a time: for every number of rows oneDNN makes and keeps a program of its own, of 0.7 MiB
TERMS = 256  # summed one after the other: MKL sums in pieces too, and one long sum errs up to 4 times as much
TOKENS = 196  # the same in sums over tokens, for which there are no programs for what is left over either
WORTH_IT = 1 << 20  # multiplications: with fewer, calling oneDNN takes longer than is won
FEWEST = 1 << 17  # numbers of a weight whose gradient, a sum over many tokens, is worth it
MOST = 1 << 22  # with more, the sums of pieces take memory, and the time that is won
TRANSPOSED = 1 << 18  # numbers of a weight that are soon brought into another order


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; nothing to differentiate. x: (M, K), weight: (N, K), bias: (N,) -> (M, N), in `out` if it
    is given.
    """
    if serves(x, weight, bias):
        return _in_blocks(x, weight, bias, out)
    if out is None:
        return F.linear(x, weight, bias)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b: (M, K), (K, N) -> (M, N)."""
    if serves(a, b.T):
        return linear(a, b.T, out=out)
    return a @ b if out is None else torch.mm(a, b, out=out)


def weight_gradient(grad: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
    """grad.T @ x, of `linear`'s result (M, N) and x (M, K): (N, K) in one piece, added to `total` if it is given."""
    outputs, inputs = grad.shape[1], x.shape[1]
    if not FEWEST <= outputs * inputs <= MOST or len(grad) != len(x) or not _worth_it(grad, x.T):
        return grad.T @ x if total is None else total.addmm_(grad.T, x)
    if outputs > inputs and outputs * inputs <= TRANSPOSED:
        made = _summed(x, grad).T  # oneDNN shares out the columns
        return made.contiguous() if total is None else total.add_(made)
    made = _summed(grad, x)
    return made if total is None else total.add_(made)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    """`linear`, so many rows at a time; a few that are left over are MKL's."""
    terms = weight.shape[1]
    step = 16 * cdiv(cdiv(terms, cdiv(terms, TERMS)), 16)
    pieces = [slice(first, first + step) for first in range(0, terms, step)]
    weights = [_dense(weight[:, piece]) for piece in pieces]

    def block(rows: Tensor) -> Tensor:
        made = _added(rows[:, pieces[0]], weights[0], None, bias)
        for piece, w in zip(pieces[1:], weights[1:]):
            made = _added(rows[:, piece], w, made, None)
        return made

    if out is None:
        if len(x) in BLOCKS:
            return block(x)
        out = x.new_empty(len(x), len(weight))
    first = 0
    for rows in BLOCKS:
        while len(x) - first >= rows:
            out[first : first + rows] = block(x[first : first + rows])
            first += rows
    if len(x) - first >= BLOCKS[-1] // 2:  # one block more, of which some rows are there already
        out[-BLOCKS[-1] :] = block(x[-BLOCKS[-1] :])
    elif first < len(x):
        rest, place = x[first:], out[first:]
        torch.mm(rest, weight.T, out=place) if bias is None else torch.addmm(bias, rest, weight.T, out=place)
    return out


def _summed(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b, so many rows at a time."""
    whole = len(a) // TOKENS * TOKENS
    made = None if whole == len(a) else a[whole:].T @ b[whole:]
    for first in range(0, whole, TOKENS):
        rows = slice(first, first + TOKENS)
        made = _added(a[rows].T, _dense(b[rows].T), made, None)
    return a.new_zeros(a.shape[1], b.shape[1]) if made is None else made


def _added(x: Tensor, weight: Tensor, total: Tensor | None, bias: Tensor | None) -> Tensor:
    """x @ weight.T + total; + bias where there is no total."""
    if total is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, total, weight, None, "add")


def _dense(weight: Tensor) -> Tensor:
    """One whose rows or columns follow each other: for others oneDNN takes 200 times as long and more."""
    return weight if weight.is_contiguous() or weight.T.is_contiguous() else weight.contiguous()


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether oneDNN makes `linear` of these. Not of shapes that do not fit: torch says what is wrong with them, oneDNN
    would multiply as many columns as the weight has.
    """
    fits = x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1]
    return fits and (bias is None or bias.shape == weight.shape[:1]) and _worth_it(x, weight, bias)


def _worth_it(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if runtime.simulated() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu") or not quicker():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if any(t.dtype != torch.float32 or type(t) not in (torch.Tensor, torch.nn.Parameter) for t in operands):
        return False
    return runtime.cpu_way(x.device) and len(x) >= BLOCKS[-1] and x.numel() * len(weight) >= WORTH_IT


def quicker() -> bool:
    """Whether this machine's products are oneDNN's, and torch's use of oneDNN is on."""
    return torch.backends.mkldnn.enabled and _left_to_mkl()


@functools.cache
def _left_to_mkl() -> bool:
    """Whether MKL would multiply here with half of what the processor has."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and _maker() not in ("", "GenuineIntel")


def _maker() -> str:
    """As Linux names it; nothing where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
