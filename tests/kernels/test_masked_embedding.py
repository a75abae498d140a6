"""The stem's norm and the mask token, cell by cell."""

import pytest
import torch

from bevt_kernels import masked_embedding


@pytest.mark.parametrize("shape, cells", [((2, 3, 8, 4), (2, 3, 2, 1)), ((2, 8, 8), (2, 2, 4)), ((1, 6, 6), (1, 6, 6))])
def test_every_token_of_a_hidden_cell_is_the_mask_token(shape, cells):
    tokens = torch.randn(*shape, 5, dtype=torch.float64)
    weight, bias, mask_token = torch.randn(3, 5, dtype=torch.float64)
    mask = torch.rand(cells) < 0.5
    out = masked_embedding(tokens, mask, weight, bias, mask_token, 1e-5)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        cell = (*place[:-2], place[-2] * cells[-2] // shape[-2], place[-1] * cells[-1] // shape[-1])
        token = tokens[tuple(place)]
        normal = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt() * weight + bias
        torch.testing.assert_close(out[tuple(place)], mask_token if mask[cell] else normal)


def test_hidden_tokens_teach_the_mask_token_and_nothing_else():
    tokens = torch.randn(1, 4, 4, 6, requires_grad=True)
    weight, bias, mask_token = torch.ones(6), torch.zeros(6), torch.randn(1, 1, 6, requires_grad=True)
    mask = torch.zeros(1, 2, 2, dtype=torch.bool)
    mask[0, 0, 1] = True
    upstream = torch.randn(1, 4, 4, 6)
    masked_embedding(tokens, mask, weight, bias, mask_token).backward(upstream)
    assert mask_token.grad is not None and tokens.grad is not None
    torch.testing.assert_close(mask_token.grad[0, 0], upstream[0, :2, 2:].sum(dim=(0, 1)))
    assert (tokens.grad[0, :2, 2:] == 0).all()
    assert (tokens.grad[0, 2:] != 0).any()


def test_no_mask_hides_nothing():
    tokens, weight, bias = torch.randn(2, 4, 4, 6), torch.randn(6), torch.randn(6)
    nothing = torch.zeros(2, 1, 1, dtype=torch.bool)
    hidden = masked_embedding(tokens, nothing, weight, bias, torch.randn(6))
    assert torch.equal(masked_embedding(tokens, None, weight, bias, None), hidden)


def test_wrong_masks_are_named():
    tokens, one = torch.randn(2, 4, 4, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"the mask \(2, 3, 4\) does not divide the tokens \(2, 4, 4\)"):
        masked_embedding(tokens, torch.zeros(2, 3, 4, dtype=torch.bool), one, one, one)
    with pytest.raises(ValueError, match=r"the mask \(1, 2, 2\)"):
        masked_embedding(tokens, torch.zeros(1, 2, 2, dtype=torch.bool), one, one, one)
    with pytest.raises(ValueError, match="needs a mask token"):
        masked_embedding(tokens, torch.zeros(2, 2, 2, dtype=torch.bool), one, one, None)
