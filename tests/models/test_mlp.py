"""The MLP, a chunk of tokens at a time: as exact as two layers, the same bits twice, and no hidden layer is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bevt_fast.models import mlp
from bevt_fast.models.mlp import MLP, ROWS
from bevt_fast.models.residual import Norm, normalised
from bevt_kernels import exactness


class Branch(nn.Module):
    """LayerNorm and MLP, as a block has them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.mlp = Norm(width), MLP(width, hidden)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y, again = self.norm(x)
        return self.mlp(y, again)


def plain(branch: Branch, x: Tensor) -> Tensor:
    net = branch.mlp
    y = normalised(x, torch.stack([branch.norm.weight, branch.norm.bias]))
    return nn.functional.linear(
        nn.functional.gelu(nn.functional.linear(y, net.fc1.weight, net.fc1.bias)), net.fc2.weight, net.fc2.bias
    )


def results(run, branch: Branch, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = run(branch, x)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    wanted = {"x": x, **{name: p for name, p in branch.named_parameters() if p.requires_grad}}
    return {"out": out.detach(), **dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), upstream)))}


def in_chunks(branch: Branch, x: Tensor) -> Tensor:
    assert mlp._goes_in_chunks(x, tuple(branch.mlp.parameters()))
    return branch(x)


@pytest.mark.parametrize("shape", [(1, 2, 30, 30, 8), (3, ROWS // 3 + 1, 12), (2 * ROWS, 16)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_as_exact_as_two_layers_and_gives_the_same_bits_twice(shape, transposed):
    torch.manual_seed(len(shape))
    branch, x = Branch(shape[-1], 3 * shape[-1]), torch.randn(shape)
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    ours = results(in_chunks, branch, x)
    torchs, truth = results(plain, branch, x), results(plain, copy.deepcopy(branch).double(), x.double())
    for name, value in ours.items():
        exactness.assert_as_exact_as_torch(name, value, torchs[name], truth[name])
    for name, value in results(in_chunks, branch, x).items():
        exactness.assert_same_bits(name, value, ours[name])


def test_only_what_is_asked_for_gets_a_gradient():
    branch, x = Branch(8, 16), torch.randn(ROWS + 1, 8)
    whole = results(in_chunks, branch, x)
    for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
        alone = copy.deepcopy(branch).requires_grad_(False)
        alone.get_parameter(name).requires_grad_()
        exactness.assert_same_bits(name, results(in_chunks, alone, x)[name], whole[name])
    frozen = branch.requires_grad_(False)
    exactness.assert_same_bits("x", results(in_chunks, frozen, x)["x"], whole["x"])


def test_the_hidden_layer_is_not_kept():
    branch, x = Branch(8, 32), torch.randn(2 * ROWS, 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        in_chunks(branch, x)
    assert max(kept) == x.numel()


def test_where_it_does_not_pay_or_cannot_be_the_layers_run_one_after_the_other():
    net = MLP(8, 16)
    many, weights = torch.randn(ROWS + 1, 8), tuple(net.parameters())
    assert mlp._goes_in_chunks(many, weights)
    assert not mlp._goes_in_chunks(many[:-1], weights)
    assert not mlp._goes_in_chunks(torch.randn(ROWS + 1, mlp.NARROW + 1), weights)
    assert not mlp._goes_in_chunks(many.double(), weights)
    assert not mlp._goes_in_chunks(many.to("meta"), weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mlp._goes_in_chunks(many, weights)
    net.fc1.weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # as ZeRO-3 marks it
    assert not mlp._goes_in_chunks(many, weights)
