"""Dropped samples that are not computed, and inputs that are made again: the answers of computing and keeping all."""

import copy

import pytest
import torch
from torch.func import functional_call

from bevt_fast.models import residual
from bevt_fast.models.residual import DropPath, Linear, Norm, activated, normalised
from bevt_fast.models.video_swin import Block, ImageAttention, VideoSwin, VideoSwinConfig, WindowAttention
from bevt_kernels import exactness
from tests.models.oracles import randomise

WINDOW = (2, 3, 3)
GRIDS = {"clips": (4, 6, 6), "images": (1, 6, 6), "padded": (3, 5, 7), "smaller than a window": (1, 2, 3)}


def _compute_all(self, x, branch, few):
    """What drop path says, with the decisions that `DropPath` draws."""
    if not self.training or self.rate == 0:
        return x + branch(x)
    survives = torch.empty(len(x)).bernoulli_(1 - self.rate).to(x.dtype)
    return x + branch(x) * (survives / max(1 - self.rate, 1e-9)).view(-1, 1, 1, 1, 1)


def _block(rate: float, shifted: bool = True) -> Block:
    return randomise(Block(8, WindowAttention(8, 2, WINDOW, shifted, "true"), 16, rate)).train()


def _gradients(block, x, seed, image_attention: ImageAttention = "t1"):
    """Output and the gradients of x and of every parameter, by name."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = block(x, image_attention)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names, parameters = zip(*block.named_parameters())
    grads = torch.autograd.grad((out * weight).sum(), (x, *parameters))
    return {"output": out.detach(), "x": grads[0]} | dict(zip(names, grads[1:]))


@pytest.mark.parametrize("rate", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("grid", GRIDS)
def test_survivors_alone_are_as_exact_as_computing_all(monkeypatch, grid, samples, rate):
    block, x = _block(rate), torch.randn(samples, *GRIDS[grid], 8)
    made: list[list[torch.Tensor]] = [[], [], []]
    for seed in range(3):
        ours = _gradients(block, x, seed)
        with monkeypatch.context() as patch:
            patch.setattr(DropPath, "forward", _compute_all)
            eager = _gradients(block, x, seed)
            truth = _gradients(copy.deepcopy(block).double(), x.double(), seed)
        for name, exact in truth.items():
            # everything in units of its tensor's largest value: one law for all, a bias of 8 numbers is luck
            unit = exact.abs().max() or 1.0
            for values, one in zip(made, (ours, eager, truth)):
                values.append((one[name].double() / unit).flatten())
    fused, plain, exact = (torch.cat(values) for values in made)
    exactness.assert_as_exact_as_torch("output and gradients", fused.float(), plain.float(), exact)


def test_where_nobody_survives_every_parameter_has_a_gradient_of_zero():
    for image_attention in ("t1", "official"):
        grads = _gradients(_block(1.0), x := torch.randn(2, 1, 6, 6, 8), 0, image_attention)
        assert torch.equal(grads.pop("output"), x)
        grads.pop("x")
        assert not any(grad.any() for grad in grads.values())


def test_only_survivors_are_computed():
    seen = []
    drop, x = DropPath(0.5), torch.randn(64, 2, 3, 3, 4)
    torch.manual_seed(3)
    drop(x, lambda some: (seen.append(some), some)[1], WINDOW)
    torch.manual_seed(3)
    survives = torch.empty(64).bernoulli_(0.5).bool()
    assert torch.equal(seen[0], x[survives])
    DropPath(1.0)(x, lambda some: (seen.append(some), some)[1], WINDOW)
    assert seen[1].shape == (1, 2, 3, 3, 4)


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    drop, count = DropPath(0.3), 4000
    zeros = torch.zeros(count, 2, 1, 1, 3)
    out = drop(zeros, torch.ones_like, WINDOW)
    survived = out[:, :1] > 0
    assert torch.equal(out, torch.where(survived, torch.tensor(1 / 0.7), 0.0).expand_as(out))
    three_standard_errors = 3 * (0.7 * 0.3 / count) ** 0.5
    assert abs(survived[:, 0, 0, 0, 0].float().mean() - 0.7) < three_standard_errors
    assert (DropPath(1.0)(zeros, torch.ones_like, WINDOW) == 0).all()
    assert (drop.eval()(zeros, torch.ones_like, WINDOW) == 1).all()


def test_an_empty_batch_passes():
    assert _block(0.5)(torch.randn(0, 2, 6, 6, 8)).shape == (0, 2, 6, 6, 8)


def test_gradients_agree_with_finite_differences():
    block, x = _block(0.5).double(), torch.randn(3, 1, 3, 3, 8, dtype=torch.float64, requires_grad=True)

    def seeded(x, bias):
        torch.manual_seed(4)
        return functional_call(block, {"mlp.fc2.bias": bias}, x)

    assert torch.autograd.gradcheck(seeded, (x, block.get_parameter("mlp.fc2.bias")), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_made_again_has_the_bits_of_what_is_kept(monkeypatch, grid, dtype):
    block, x = _block(0.4).to(dtype), torch.randn(5, *GRIDS[grid], 8, dtype=dtype)
    ours = _gradients(block, x, 0)
    monkeypatch.setattr(residual, "_recomputes", lambda: False)
    for name, value in _gradients(block, x, 0).items():
        exactness.assert_same_bits(name, ours[name], value)


def test_under_autocast_too(monkeypatch):
    block, x = _block(0.4), torch.randn(5, 2, 6, 6, 8)
    made = []
    for keeps in (False, True):
        monkeypatch.setattr(residual, "_recomputes", (lambda: False) if keeps else residual._recomputes)
        with torch.autocast("cpu", torch.bfloat16):
            made.append(_gradients(block, x, 0))
    for name, value in made[0].items():
        exactness.assert_same_bits(name, value, made[1][name])


def test_a_block_keeps_ten_numbers_a_token_and_channel():
    width, tokens = 32, 4 * 36
    block = Block(width, WindowAttention(width, 1, WINDOW, True, "true"), 4 * width, 0.0)
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1], lambda x: x
    ):
        out = block(torch.randn(1, 4, 6, 6, width))
    large = {place: size for place, size in kept.items() if place not in weights and size >= 4 * tokens * width}
    # x, qkv (3), the attention's output, x between the branches, the hidden layer before its GELU (4)
    assert sum(large.values()) == 10 * 4 * tokens * width
    assert out.data_ptr() not in kept


def test_activation_checkpointing_draws_the_same_decisions_again():
    shape = VideoSwinConfig(embed_dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=WINDOW, drop_path=0.6)
    plain, saving = VideoSwin(shape), VideoSwin(shape, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    pixels = torch.randn(3, 3, 4, 32, 32)
    for seed in range(4):
        gradients = []
        for encoder in (plain, saving):
            torch.manual_seed(seed)
            loss = encoder(pixels).square().mean()
            torch.manual_seed(99)  # something else draws before the backward pass
            gradients.append(torch.autograd.grad(loss, list(encoder.parameters())))
        assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_frozen_weights_and_evaluation_keep_nothing_for_them():
    norm, linear = Norm(8), Linear(8, 4).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    y, again = norm(x)
    linear(y, normalised, *again).sum().backward()
    assert x.grad is not None and linear.weight.grad is None
    with torch.no_grad():
        assert norm(x)[1] == ()
        assert torch.equal(activated(x, linear), linear(torch.nn.functional.gelu(x)))


def test_forward_mode_and_transforms_see_plain_layers():
    block, x = _block(0.0).double().eval(), torch.randn(1, 1, 3, 3, 8, dtype=torch.float64)
    tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))[1]
    step = 1e-6
    torch.testing.assert_close(tangent, (block(x + step) - block(x - step)) / (2 * step), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_compiled_block_has_no_graph_break(rate):
    block, x = _block(rate), torch.randn(4, 1, 6, 6, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ours = _gradients(block, x, 0)
    if rate:
        _gradients(compiled, x, 0)  # with decisions of its own
        block.eval()
        ours = _gradients(block, x, 0)
    theirs = _gradients(compiled, x, 0)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[f"_orig_mod.{name}" if f"_orig_mod.{name}" in theirs else name], value)
