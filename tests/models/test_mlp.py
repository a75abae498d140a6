"""The MLP of a CPU: as exact as two layers, the same bits twice; of few channels no hidden layer is kept."""

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


def on_cpu(branch: Branch, x: Tensor) -> Tensor:
    assert mlp._is_for_cpu(x, tuple(branch.mlp.parameters()))
    return branch(x)


@pytest.mark.parametrize(
    "shape", [(1, 2, 30, 30, 8), (3, ROWS // 3 + 1, 12), (2 * ROWS, 16), (5, 7, 136), (2, 700, 136)], ids=str
)
@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_as_exact_as_two_layers_and_gives_the_same_bits_twice(shape, transposed):
    torch.manual_seed(len(shape))
    branch, x = Branch(shape[-1], 3 * shape[-1]), torch.randn(shape)
    if transposed:
        x = x.transpose(0, -2).contiguous().transpose(0, -2)
    ours = results(on_cpu, branch, x)
    torchs, truth = results(plain, branch, x), results(plain, copy.deepcopy(branch).double(), x.double())
    for name, value in ours.items():
        exactness.assert_as_exact_as_torch(name, value, torchs[name], truth[name])
    for name, value in results(on_cpu, branch, x).items():
        exactness.assert_same_bits(name, value, ours[name])


@pytest.mark.parametrize("rows, width", [(ROWS + 1, 8), (7, mlp.NARROW + 8)])
def test_only_what_is_asked_for_gets_a_gradient(rows, width):
    branch, x = Branch(width, 16), torch.randn(rows, width)
    whole = results(on_cpu, branch, x)
    for name in ("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"):
        alone = copy.deepcopy(branch).requires_grad_(False)
        alone.get_parameter(name).requires_grad_()
        exactness.assert_same_bits(name, results(on_cpu, alone, x)[name], whole[name])
    frozen = branch.requires_grad_(False)
    exactness.assert_same_bits("x", results(on_cpu, frozen, x)["x"], whole["x"])


WIDE = mlp.NARROW + 8


@pytest.mark.parametrize("rows, width, hidden", [(2 * ROWS, 8, 0), (4 * WIDE + 1, WIDE, 1), (4 * WIDE - 1, WIDE, 2)])
def test_the_hidden_layer_and_its_gelu_are_kept_where_that_is_little(rows, width, hidden):
    branch, x = Branch(width, 4 * width), torch.randn(rows, width)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        on_cpu(branch, x)
    assert kept.count((rows, width)) <= 2 and kept.count((rows, 4 * width)) == hidden


def test_where_it_does_not_pay_or_cannot_be_the_layers_run_one_after_the_other():
    net = MLP(8, 16)
    many, weights = torch.randn(ROWS + 1, 8), tuple(net.parameters())
    assert mlp._is_for_cpu(many, weights)
    assert not mlp._is_for_cpu(many[:-1], weights)
    assert mlp._is_for_cpu(torch.randn(1, mlp.NARROW + 1), weights)
    assert not mlp._is_for_cpu(torch.randn(0, mlp.NARROW + 1), weights)
    assert not mlp._is_for_cpu(many.double(), weights)
    assert not mlp._is_for_cpu(many.to("meta"), weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert not mlp._is_for_cpu(many, weights)
    net.fc1.weight.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # as ZeRO-3 marks it
    assert not mlp._is_for_cpu(many, weights)
