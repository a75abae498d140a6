"""Hidden positions only, against the loss of all positions with the visible ones taken out afterwards (SPEC X22)."""

import pytest
import torch
from torch import nn

from bevt_kernels import masked_cross_entropy


def _case(dtype=torch.float64):
    features = torch.randn(2, 3, 4, 6, dtype=dtype, requires_grad=True)
    return features, nn.Linear(6, 11).to(dtype), torch.randint(11, (2, 3, 4)), torch.rand(2, 3, 4) < 0.4


def test_is_the_mean_over_hidden_positions():
    features, head, targets, mask = _case()
    loss, accuracy = masked_cross_entropy(features, head, targets, mask)
    everywhere = -head(features).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    truth = (everywhere * mask).sum() / mask.sum()
    right = (head(features).argmax(-1) == targets) & mask
    assert loss.dtype is accuracy.dtype is torch.float32
    torch.testing.assert_close(loss, truth.float())
    assert accuracy == right.sum() / mask.sum()
    wanted = (features, head.weight, head.bias)
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(truth, wanted)):
        torch.testing.assert_close(ours, theirs)


def test_the_head_sees_hidden_rows_only_and_is_called_as_a_module():
    features, head, targets, mask = _case()
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    masked_cross_entropy(features, head, targets, mask)
    assert len(seen) == 1
    assert torch.equal(seen[0], features[mask])


def test_nothing_hidden_is_zero_with_a_graph():
    features, head, targets, _ = _case()
    loss, accuracy = masked_cross_entropy(features, head, targets, torch.zeros(2, 3, 4, dtype=torch.bool))
    assert loss == 0 and accuracy == 0
    loss.backward()
    for tensor in (features, head.weight, head.bias):
        assert tensor.grad is not None and (tensor.grad == 0).all()


def test_half_logits_are_scored_in_float32():
    features, head, targets, mask = _case(torch.bfloat16)
    loss, _ = masked_cross_entropy(features, head, targets, mask)
    logits = head(features).float()
    everywhere = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(loss, everywhere[mask].mean())


def test_wrong_shapes_are_named():
    features, head, targets, mask = _case()
    with pytest.raises(ValueError, match=r"positions \(2, 3, 4\), but the mask is \(2, 3\)"):
        masked_cross_entropy(features, head, targets, mask[..., 0])
    with pytest.raises(ValueError, match=r"the targets are \(3, 4\)"):
        masked_cross_entropy(features, head, targets[0], mask)
