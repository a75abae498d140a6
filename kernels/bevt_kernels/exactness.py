"""The two promises of these kernels, as assertions: the same bits where bytes only move, as exact as torch elsewhere.

No tolerance is chosen by hand. The bound is the error that PyTorch itself makes in the same dtype against float64, so
it is as tight for float32 as for bfloat16.
"""

import torch
from torch import Tensor


def assert_same_bits(name: str, fused: Tensor, expected: Tensor) -> None:
    """Equal shape, dtype and values (NaN nowhere)."""
    assert fused.dtype == expected.dtype, f"{name}: dtype {fused.dtype}, expected {expected.dtype}"
    assert fused.shape == expected.shape, f"{name}: shape {tuple(fused.shape)}, expected {tuple(expected.shape)}"
    differ = int((fused != expected).sum())
    assert differ == 0, f"{name}: {differ} of {fused.numel()} values differ"


def errors(fused: Tensor, eager: Tensor, truth: Tensor) -> tuple[float, float, float]:
    """Largest errors of the fused and the eager result against float64 truth, and the bound on the former."""
    if not truth.numel():
        return 0.0, 0.0, 0.0
    error, torchs_own = (float((x.double() - truth.double()).abs().max()) for x in (fused, eager))
    one_rounding = torch.finfo(fused.dtype).eps * float(truth.double().abs().max())
    return error, torchs_own, 2 * torchs_own + one_rounding


def assert_as_exact_as_torch(name: str, fused: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The fused error is at most twice the error that PyTorch makes in the same dtype, plus one rounding of the largest
    value.

    Args:
        fused, eager: two results in one dtype; truth: the same in float64.
    """
    assert fused.dtype == eager.dtype, f"{name}: dtype {fused.dtype}, the reference's is {eager.dtype}"
    assert fused.shape == eager.shape, f"{name}: shape {tuple(fused.shape)}, the reference's is {tuple(eager.shape)}"
    error, torchs_own, bound = errors(fused, eager, truth)
    assert error <= bound, f"{name}: error {error:.2e}, torch's own {torchs_own:.2e}"  # also false for NaN


def assert_choice_as_exact_as_torch(name: str, fused: Tensor, eager: Tensor, scores: Tensor) -> None:
    """For an argmax: what the chosen score lacks to the best one, in float64, obeys the same bound.

    Args:
        fused, eager: (M,) int64 choices.
        scores: (M, V) float64 truth. The rounding is one of the largest score in `torch.float32`, in which the choice
            is made.
    """
    if not len(scores):
        return
    best = scores.max(dim=-1).values
    lacks, torchs_own = (float((best - scores.gather(-1, ids[:, None])[:, 0]).max()) for ids in (fused, eager))
    bound = 2 * torchs_own + torch.finfo(torch.float32).eps * float(scores.abs().max())
    assert lacks <= bound, f"{name}: chose a score {lacks:.2e} below the best, torch itself {torchs_own:.2e}"
