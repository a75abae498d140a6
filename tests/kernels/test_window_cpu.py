"""Window attention's own way for a CPU: the law of the kernels, whatever strides, gradients and chunks."""

from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch

from bevt_kernels import implementation, window_attention, window_cpu
from tests.kernels import answers
from tests.kernels.answers import DTYPES, LAYOUTS, answer, assert_law, changed

MODULE = import_module("bevt_kernels.window_attention")
SMALL = answers.small_cases(MODULE)
DRAWS = 8
CASE = next(case for case in SMALL if any(case.shift))  # several kinds of windows


@pytest.fixture(autouse=True)
def _no_reference(monkeypatch):
    """What the reference answers by mistake is no answer."""
    calls = []
    monkeypatch.setattr(window_cpu, "forward", _counted(window_cpu.forward, calls))
    return calls


def _counted(function, calls):
    def call(*arguments):
        calls.append(function.__name__)
        return function(*arguments)

    return call


def _made(case, dtype, seed=0):
    """The answers to a case, with "auto" in place of the kernels."""
    arguments = answers.arguments_of(MODULE, case, dtype, seed=seed)
    upstream = answers.upstream_for(answers.outputs_of(MODULE.reference(*arguments)))
    eager = answer(MODULE.reference, arguments, upstream)
    truth = answer(MODULE.reference, answers.doubled(arguments), upstream)
    ours = answer(window_attention, arguments, upstream)
    return answers.Answers("window_cpu", MODULE, case, dtype, arguments, upstream, ours, eager, truth, [])


def _assert_law(case, dtype):
    """Over several draws: the largest error of a table of 45 numbers is luck, and torch's own as much."""
    made = [_made(case, dtype, seed) for seed in range(DRAWS)]
    together = [
        answers.Answer({name: torch.stack([one.named()[name] for one in same]) for name in same[0].named()}, {})
        for same in zip(*((each.fused, each.eager, each.truth) for each in made))
    ]
    assert_law(made[0]._replace(eager=together[1], truth=together[2]), together[0])
    return made[0]


def _same(one, other):
    assert one.named().keys() == other.named().keys()
    for name, value in one.named().items():
        assert torch.equal(value, other.named()[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_is_as_exact_as_torch_and_two_runs_give_equal_bits(case, dtype, _no_reference):
    made = _assert_law(case, dtype)
    assert _no_reference, "the reference answered"
    _same(made.fused, answer(window_attention, made.arguments, made.upstream))


@pytest.mark.parametrize("scores", [1, 3 * 49**2])
def test_the_size_of_a_chunk_changes_no_answer(scores):
    with mock.patch.object(window_cpu, "CHUNK", scores):
        for case in SMALL[:3] + [CASE]:
            _assert_law(case, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_any_strides(layout):
    made = _made(CASE, torch.float32)
    given = (layout(made.arguments[0].detach()).requires_grad_(), *made.arguments[1:])
    _same(made.fused, answer(window_attention, given, made.upstream))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_wanted(wanted):
    made = _made(CASE, torch.float32)
    given = changed(made.arguments, torch.clone)
    for leaf, needed in zip(given[:2], wanted):
        leaf.requires_grad_(needed)
    out = window_attention(*given)
    assert out.requires_grad == any(wanted)
    if any(wanted):
        out.backward(made.upstream["output"])
    for place, needed in enumerate(wanted):
        expected = made.fused.named()[f"argument {place}"]
        assert torch.equal(given[place].grad, expected) if needed else given[place].grad is None


def test_one_table_used_twice_gets_both_gradients():
    made = _made(CASE, torch.float32)
    qkv, table, *rest = changed(made.arguments, torch.clone)
    out = window_attention(qkv, table, *rest) + window_attention(qkv, table, *rest)
    out.backward(made.upstream["output"])
    assert torch.equal(table.grad, 2 * made.fused.named()["argument 1"])


def test_an_empty_batch_has_gradients_of_zero():
    arguments = answers.without_batch(answers.arguments_of(MODULE, CASE, torch.float32))
    out = window_attention(*arguments)
    assert out.shape[0] == 0
    out.sum().backward()
    assert not arguments[1].grad.any()


@pytest.fixture
def _regions_apart(monkeypatch):
    """Also of windows as small as these; the kinds that were taken."""
    taken, works = [], window_cpu._kinds
    monkeypatch.setattr(window_cpu, "FEWEST", 1)
    monkeypatch.setattr(window_cpu, "_kinds", lambda *a: (taken.append(works(*a)), taken[-1])[1])
    window_cpu.layer.cache_clear()
    yield taken
    window_cpu.layer.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL if any(case.shift)], ids=str)
def test_regions_apart_are_as_exact_as_torch(case, dtype, _regions_apart):
    _assert_law(case, dtype)
    assert _regions_apart and all(kind.foreign is None for kinds in _regions_apart for kind in kinds)


def test_regions_are_apart_only_while_no_token_of_another_one_can_count(_regions_apart):
    """Scores of s and -s and a table of zeros: the other region lacks 100 - 2 s, and 64 are enough."""
    qkv, table, *rest = answers.arguments_of(MODULE, CASE, torch.float32)
    with torch.no_grad():
        for score, apart in ((17.9, True), (18.1, False), (float("nan"), False)):
            given = torch.ones_like(qkv) * (score / qkv.shape[-1] ** 0.5) ** 0.5
            window_attention(given, torch.zeros_like(table), *rest)
            assert all(kind.foreign is None for kind in _regions_apart[-1]) is apart, score


def test_every_token_is_in_one_region_of_its_window_and_every_region_is_a_box(_regions_apart):
    for grid, window, shift in (((8, 14, 21), (4, 7, 7), (2, 3, 3)), ((4, 7, 7), (4, 7, 7), (0, 3, 3))):
        made = window_cpu.layer(grid, window, shift, shift, "true")
        assert made.apart is not made.whole
        for kinds in (made.whole, made.apart):
            tokens = torch.cat([kind.places.flatten() for kind in kinds])
            assert torch.equal(tokens.sort().values, torch.arange(made.tokens))
        for kind in made.apart:
            volume = torch.empty(made.window)[kind.box].numel()
            assert kind.places.shape[1] == volume


def test_a_token_of_another_region_that_outweighs_100_is_still_seen():
    qkv, table, *rest = answers.arguments_of(MODULE, CASE, torch.float64)
    qkv = 10 * qkv.detach()
    truth, blind = (MODULE.reference(qkv, table, *rest[:2], mask, *rest[3:]) for mask in (rest[2], (0, 0, 0)))
    out = window_attention(qkv.float(), table.detach().float(), *rest)
    # the rounding of logits of some hundreds, beside what it would be not to look
    assert (out - truth).abs().max() < 1e-3 * (blind - truth).abs().max()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_sample_and_is_not_hidden(wrong):
    arguments: Any = answers.arguments_of(MODULE, CASE, torch.float32)
    qkv, *rest = arguments
    qkv = torch.cat([qkv.detach(), qkv.detach()])
    spoilt = qkv.clone()
    spoilt[0, 0, 0, 0] = wrong
    clean, out = window_attention(qkv, *rest), window_attention(spoilt, *rest)
    assert torch.equal(out[1:], clean[1:])
    assert out[0].isnan().any()


def test_transforms_and_second_derivatives_are_left_to_the_reference(_no_reference):
    arguments: Any = answers.arguments_of(MODULE, CASE, torch.float32)
    qkv, table, *rest = arguments
    tangent = torch.func.jvp(lambda x: window_attention(x, table, *rest), (qkv.detach(),), (qkv.detach(),))[1]
    assert tangent.any() and not _no_reference

    def second(function):
        (grad,) = torch.autograd.grad(function(qkv, table, *rest).square().sum(), qkv, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (qkv, table))

    for ours, theirs in zip(second(window_attention), second(MODULE.reference)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert _no_reference


def test_the_reference_and_float64_are_answered_plainly(_no_reference):
    arguments = answers.arguments_of(MODULE, CASE, torch.float32)
    with implementation("reference"):
        assert torch.equal(window_attention(*arguments), MODULE.reference(*arguments))
    window_attention(*answers.doubled(arguments))
    assert not _no_reference


def test_autocast_does_not_reach_into_it():
    arguments = answers.arguments_of(MODULE, CASE, torch.float32)
    upstream = answers.upstream_for(answers.outputs_of(MODULE.reference(*arguments)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(window_attention, arguments, upstream)
    _same(inside, answer(window_attention, arguments, upstream))


def test_the_compiler_meets_one_operator():
    arguments = answers.arguments_of(MODULE, CASE, torch.float32)

    def use(qkv, table):
        return window_attention(qkv, table, *arguments[2:]).square().sum()

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*arguments[:2]), arguments[:2]) for f in (use, compiled)]
    assert all(torch.equal(one, other) for one, other in zip(*grads))


def test_nothing_but_the_inputs_is_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        arguments = answers.arguments_of(MODULE, CASE, torch.float32)
        window_attention(*arguments)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in arguments[:2]}
