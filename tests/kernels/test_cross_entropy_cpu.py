"""Masked cross-entropy in rows: as exact as the reference, of loss, accuracy and every gradient."""

import pytest
import torch
from torch import nn

import bevt_kernels
from bevt_kernels import cross_entropy_cpu, masked_cross_entropy
from bevt_kernels.exactness import assert_as_exact_as_torch

WIDTH, VOCABULARY = 24, 70


def case(rows: int, dtype: torch.dtype, bias: bool = True, scale: float = 1.0) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    features = scale * torch.randn(rows, WIDTH)
    return features.to(dtype).requires_grad_(), head.to(dtype)


def answers(rows: int, dtype: torch.dtype, **how: float) -> list[torch.Tensor]:
    features, head = case(rows, dtype, **how)  # type: ignore[arg-type]
    torch.manual_seed(1)
    targets, mask = torch.randint(VOCABULARY, (rows,)), torch.rand(rows) < 0.8
    loss, accuracy = masked_cross_entropy(features, head, targets, mask)
    (3 * loss).backward()
    assert features.grad is not None
    return [loss, accuracy, features.grad, *(p.grad for p in head.parameters() if p.grad is not None)]


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"scale": 30.0}], ids=["plain", "no bias", "large"])
@pytest.mark.parametrize("rows", [cross_entropy_cpu.ROWS + 1, 3 * cross_entropy_cpu.ROWS])
def test_as_exact_as_torch(rows: int, how: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = cross_entropy_cpu.ScoredRows.forward
    monkeypatch.setattr(cross_entropy_cpu.ScoredRows, "forward", lambda *a: calls.append(1) or plain(*a))
    ours = answers(rows, torch.float32, **how)
    assert calls == [1]
    with bevt_kernels.implementation("reference"):
        eager, truth = answers(rows, torch.float32, **how), answers(rows, torch.float64, **how)
    assert calls == [1] and len(ours) == len(eager)
    for name, mine, theirs, true in zip(("loss", "accuracy", "dx", "dw", "db"), ours, eager, truth):
        assert_as_exact_as_torch(name, mine, theirs, true.double())
    assert all(torch.equal(a, b) for a, b in zip(ours, answers(rows, torch.float32, **how)))


def test_nothing_hidden_is_zero_with_a_graph() -> None:
    features, head = case(600, torch.float32)
    nothing = torch.zeros(600, dtype=torch.bool)
    loss, accuracy = masked_cross_entropy(features, head, torch.zeros(600, dtype=torch.int64), nothing)
    loss.backward()
    assert loss == 0 and accuracy == 0 and features.grad is not None and not features.grad.any()


def test_a_frozen_head_and_a_wrong_target() -> None:
    features, head = case(600, torch.float32)
    head.requires_grad_(False)
    targets = torch.zeros(600, dtype=torch.int64)
    masked_cross_entropy(features, head, targets)[0].backward()
    assert features.grad is not None and head.weight.grad is None
    with torch.no_grad():
        assert not masked_cross_entropy(features, head, targets)[0].requires_grad
    targets[3] = VOCABULARY
    with pytest.raises(ValueError, match="V = 70"):
        masked_cross_entropy(features, head, targets)
