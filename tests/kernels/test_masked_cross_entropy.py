"""Hidden positions only, against the loss of all positions with the visible ones taken out afterwards (SPEC X22), and
the fused computation against the reference, in the interpreter on a CPU.
"""

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import nn

from bevt_kernels import implementation, masked_cross_entropy, runtime
from bevt_kernels.exactness import assert_as_exact_as_torch

module = importlib.import_module("bevt_kernels.masked_cross_entropy")
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
SMALL = [case for case in module.CASES if case.small]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("loss", "accuracy", "features", "weight", "bias")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _small(case, dtype=torch.float32):
    return module.inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


def _answers(name, features, head, targets, mask, upstream=0.7):
    """Loss, accuracy and every gradient."""
    wanted = [features, *head.parameters()]
    with implementation(name):
        loss, accuracy = masked_cross_entropy(features, head, targets, mask)
        return [loss.detach(), accuracy, *torch.autograd.grad(loss * upstream, wanted)]


def _in_float64(features, head, targets, mask):
    return features.detach().double().requires_grad_(), copy.deepcopy(head).double(), targets, mask


def _assert_exact(fused, arguments):
    eager, truth = _answers("reference", *arguments), _answers("reference", *_in_float64(*arguments))
    for name, *three in zip(NAMES, fused, eager, truth):
        assert_as_exact_as_torch(name, *three)


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


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_fused_is_as_exact_as_torch_and_repeats_itself(case, dtype):
    arguments = _small(case, dtype)
    fused = _answers("fused", *arguments)
    _assert_exact(fused, arguments)
    if case.hidden == 0:
        assert all((answer == 0).all() for answer in fused)
    assert all(torch.equal(*two) for two in zip(fused, _answers("fused", *arguments)))


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gathered", (True, False))
def test_many_chunks_of_many_slices(monkeypatch, dtype, gathered):
    for name, rows in (("CHUNK", 256), ("SLICE", 128), ("STRIP", 128)):
        monkeypatch.setattr(module, name, rows)
    case = module.Case(samples=1, cells=420, hidden=None if gathered else 270, width=32, vocabulary=40)
    arguments = _small(case, dtype)
    _assert_exact(_answers("fused", *arguments), arguments)


@interpreted
def test_a_sure_answer_keeps_the_sign_of_its_gradient():
    # bfloat16 rounds a score of 20 by up to 0.06, while a probability of 0.99 leaves a gradient of only 0.01
    features, head = torch.randn(40, 16), nn.Linear(16, 40, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.qr(torch.randn(40, 40)).Q[:, :16] * 3)
        features.copy_(head.weight * 6 + 0.1 * features)
    arguments = features.bfloat16().requires_grad_(), head.bfloat16(), torch.arange(40), None
    _assert_exact(_answers("fused", *arguments), arguments)


@interpreted
@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_large_scores_and_sure_answers_are_as_exact_in_float32(scale):
    # small whole numbers: every score is exact, and what is left is the softmax
    features, head = torch.randint(-3, 4, (40, 16)).float(), nn.Linear(16, 30)
    with torch.no_grad():
        head.weight.copy_(torch.randint(-2, 3, (30, 16)) * scale)
        head.bias.zero_()
    best, second = head(features).topk(2).values.T
    targets = head(features).argmax(-1)
    sure = [slice(row, row + 1) for row in (best - second).topk(4).indices.tolist()]
    targets[::4] = torch.randint(30, (10,))
    for rows in (slice(None), *sure):
        arguments = features[rows].clone().requires_grad_(), head, targets[rows], None
        _assert_exact(_answers("fused", *arguments), arguments)


@interpreted
def test_any_strides_and_frozen_parts():
    features = torch.randn(2, 16, 3, 4).permute(0, 2, 3, 1).requires_grad_()
    head, targets, mask = nn.Linear(16, 20), torch.randint(20, (2, 3, 4)), torch.rand(2, 3, 4) < 0.5
    head.weight = nn.Parameter(torch.randn(16, 20).T)
    _assert_exact(_answers("fused", features, head, targets, mask), (features, head, targets, mask))
    everything: dict[str, torch.Tensor] = dict(zip(NAMES, _answers("fused", features, head, targets, mask, 1.0)))
    for frozen in (("weight",), ("bias",), ("features", "bias"), ("weight", "bias")):
        for name, tensor in (("features", features), ("weight", head.weight), ("bias", head.bias)):
            tensor.requires_grad_(name not in frozen).grad = None
        with implementation("fused"):
            masked_cross_entropy(features, head, targets, mask)[0].backward()
        for name, tensor in (("features", features), ("weight", head.weight), ("bias", head.bias)):
            grad = tensor.grad
            assert (grad is None) == (name in frozen) and (grad is None or torch.equal(grad, everything[name])), name


@interpreted
@pytest.mark.parametrize("mask", (None, torch.zeros(0, 3, dtype=torch.bool)), ids=str)
def test_no_positions_at_all(mask):
    features = torch.randn(0, 3, 16, requires_grad=True)
    answers = _answers("fused", features, nn.Linear(16, 20), torch.zeros(0, 3, dtype=torch.int64), mask)
    assert [tuple(answer.shape) for answer in answers] == [(), (), (0, 3, 16), (20, 16), (20,)]
    assert all((answer == 0).all() for answer in answers)


@interpreted
def test_of_equal_scores_the_first_is_the_answer():
    features, head = torch.randint(-2, 3, (40, 16)).float(), nn.Linear(16, 300, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randint(-1, 2, (100, 16)).repeat(3, 1))
    best = head(features).argmax(-1)
    for targets, expected in ((best, 1.0), (best + 100, 0.0)):
        with implementation("fused"):
            assert masked_cross_entropy(features, head, targets)[1] == expected


@interpreted
def test_autocast_gives_the_dtypes_of_the_reference():
    arguments = _small(SMALL[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _assert_exact(_answers("fused", *arguments), arguments)


@pytest.mark.parametrize("name", ["reference", "fused"])
@pytest.mark.parametrize("wrong", (-100, -1, 20))
def test_targets_outside_the_codebook_are_named_where_they_count(name, wrong):
    features, head, mask = torch.randn(2, 5, 16), nn.Linear(16, 20), torch.ones(2, 5, dtype=torch.bool)
    targets = torch.randint(20, (2, 5))
    targets[1, 2] = wrong
    with implementation(name):
        for given in (mask, None):
            with pytest.raises(ValueError, match=rf"targets must lie in \[0, V\) with V = 20 .* got .*{wrong}"):
                masked_cross_entropy(features, head, targets, given)
        mask[1, 2] = False
        assert masked_cross_entropy(features, head, targets, mask)[0].isfinite()


@interpreted
@pytest.mark.parametrize("wrong", (-100, -(2**62), 20, 2**62))
def test_where_nobody_may_wait_a_wrong_target_makes_nan(monkeypatch, wrong):
    # as on a GPU; uninitialised memory is NaN, so nothing was read beyond what was written
    monkeypatch.setattr(module, "_check_targets", lambda *_: None)
    features, head = torch.randn(10, 16, requires_grad=True), nn.Linear(16, 20)
    targets = torch.randint(20, (10,))
    targets[3] = wrong
    for name in ("reference", "fused"):
        loss, accuracy, *gradients = _answers(name, features, head, targets, None)
        assert loss.isnan() and accuracy.isfinite()
        assert all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_what_does_not_fit_is_named(name):
    features, head, targets, mask = _case(torch.float32)
    with implementation(name):
        for arguments, words in (
            ((features[..., :4], head, targets, mask), r"features \(2, 3, 4, 4\) do not end in the head's width 6"),
            ((features, head, targets.int(), mask), "must be torch.int64 .* got torch.int32 and torch.bool"),
            ((features, head, targets, mask.long()), "got torch.int64 and torch.int64"),
            ((features, head, targets.to("meta"), mask), "one device, got cpu, meta"),
            ((features, copy.deepcopy(head).to("meta"), targets, mask), "features are on cpu, the head is on meta"),
            ((features.half(), head, targets, mask), "features are torch.float16, the head is torch.float32"),
            ((features, _half_bias(head), targets, mask), "features are torch.float32, the head is torch.float16"),
            ((torch.tensor(1.0), head, torch.tensor(1), None), r"features are \(\), expected \(..., K\)"),
            ((features[..., :0], nn.Linear(0, 11), targets, mask), r"features are \(2, 3, 4, 0\), expected"),
            ((features, nn.Flatten(0), targets, None), r"the head made \(144,\) of \(24, 6\), expected \(M, V\)"),
            (
                (features.to("meta"), copy.deepcopy(head).to("meta"), targets.to("meta"), mask.to("meta")),
                "on the meta device nobody knows what is hidden",
            ),
        ):
            with pytest.raises(ValueError, match=words):
                masked_cross_entropy(*arguments)
        wrong: list[tuple[Any, str]] = [
            ((None, head, targets, mask), "features is of type NoneType"),
            ((features, None, targets, mask), "head is of type NoneType, expected a module"),
            ((features, head, [1], mask), "targets is of type list"),
            ((features, head, targets, mask.numpy()), "mask is of type ndarray"),
        ]
        for arguments, words in wrong:
            with pytest.raises(TypeError, match=f"^masked_cross_entropy: {words}"):
                masked_cross_entropy(*arguments)


def _half_bias(head):
    head = copy.deepcopy(head)
    head.bias = nn.Parameter(head.bias.half())
    return head


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_one_position_may_have_no_axis(name):
    features, head = torch.randn(16, requires_grad=True), nn.Linear(16, 20)
    for mask in (None, torch.tensor(True)):
        with implementation(name):
            loss, _ = masked_cross_entropy(features, head, torch.tensor(3), mask)
        torch.testing.assert_close(loss, -head(features).log_softmax(-1)[3])


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_the_accuracy_is_the_callers(name):
    features, head, targets, mask = _case(torch.float32)
    with implementation(name):
        loss, accuracy = masked_cross_entropy(features, head, targets, mask)
    accuracy.mul_(100)
    loss.backward()
    assert features.grad is not None


@interpreted
def test_other_heads_are_called_and_said_so_once(monkeypatch):
    monkeypatch.setattr(runtime, "_warned", set())
    features, head, targets, mask = _case(torch.float32)
    watched = copy.deepcopy(head)
    watched.register_forward_hook(lambda *given: given[2] * 2.0)
    for other, words in ((nn.Sequential(head), "Sequential"), (watched, "the head has hooks")):
        with pytest.warns(UserWarning, match=f"{words}.*; the reference answers instead"):
            fused = _answers("fused", features, other, targets, mask)
        assert all(torch.equal(*two) for two in zip(fused, _answers("reference", features, other, targets, mask)))


@interpreted
def test_a_partitioned_head_is_called_as_a_module():
    """ZeRO-3 marks its parameters with `ds_id`, and they are whole between the module's hooks only."""
    features, head, targets, mask = _case(torch.float32)
    expected, whole, calls = _answers("fused", features, head, targets, mask), head.weight.data, []
    setattr(head.weight, "ds_id", 0)  # noqa: B010, a plain assignment is an unknown attribute to pyright

    def gather(module, inputs):
        module.weight.data = whole

    def release(module, inputs, output):
        calls.append(output.shape)
        module.weight.data = whole.new_empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.weight.data = whole.new_empty(0)
    with implementation("fused"):
        loss, accuracy = masked_cross_entropy(features, head, targets, mask)
    assert calls == [()] and "forward" not in vars(head)
    head.weight.data = whole  # as before the head's backward
    gradients = torch.autograd.grad(loss * 0.7, (features, *head.parameters()))
    assert all(torch.equal(*two) for two in zip((loss.detach(), accuracy, *gradients), expected))


def test_without_a_gradient_no_logits_are_kept(monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (sizes.append(empty(*a, **k).numel()), empty(*a, **k))[1])
    rows, width, vocabulary = 15_680, 1024, 8192
    x = empty(rows, width, dtype=torch.bfloat16, device="meta")
    arguments = x, x.new_empty(vocabulary, width), x.new_empty(vocabulary), x.new_empty(rows, dtype=torch.int64), None
    sizes.clear()
    with runtime.recording(90) as launches:
        module._forward(*arguments, False, False, False)
    assert {launch.kernel.__name__ for launch in launches} == {"score", "merge", "finish"}
    assert not any(launch.constants.get("KEEP") for launch in launches)
    assert max(sizes) < module.SLICE * vocabulary / 16
    sizes.clear()
    with runtime.recording(90):
        module._forward(*arguments, True, True, True)
    assert max(sizes) == module.CHUNK * vocabulary < rows * vocabulary / 2
