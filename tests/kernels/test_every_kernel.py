"""One set of promises for all kernel files, whatever they compute; a new file is found by its `reference`.

On a CPU the small cases, in Triton's interpreter; on a GPU all of them. What depends on neither size nor dtype is
shared out among the small cases.
"""

import inspect

import pytest
import torch

from bevt_kernels import exactness, implementation, runtime
from bevt_kernels.runtime import tl, triton
from tests.kernels import answers
from tests.kernels.answers import DTYPES, LAYOUTS, answer, assert_law, changed, kernel_files, small_cases

FILES = kernel_files()
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="Triton's interpreter is for machines without a GPU")


def _parameter(name, case, dtype, device):
    marks = interpreted if device == "cpu" else pytest.mark.gpu
    identity = f"{name}-{case}-{str(dtype).removeprefix('torch.')}-{device}"
    return pytest.param((name, case, dtype, device), marks=marks, id=identity)


def _all_dtypes():
    """The small cases on a CPU, all cases on a GPU."""
    found = []
    for name, module in FILES.items():
        for dtype in DTYPES:
            found += [_parameter(name, case, dtype, "cpu") for case in small_cases(module)]
            found += [_parameter(name, case, dtype, "cuda") for case in getattr(module, "CASES", [])]
    return found


def _small(dtypes=DTYPES):
    """Every small case once, in alternating dtypes; without those that take the interpreter many seconds."""
    cases = [(name, place, case) for name, module in FILES.items() for place, case in enumerate(_smallest(module))]
    return [_parameter(name, case, dtypes[i % len(dtypes)], on) for name, i, case in cases for on in ("cpu", "cuda")]


def _smallest(module):
    return [case for case in small_cases(module) if answers.arguments_of(module, case, DTYPES[0])[0].numel() < 50_000]


def _in_turns(choices):
    """The small cases in bfloat16, each with one of the choices."""
    found = []
    for place, parts in enumerate(_small(dtypes=(torch.bfloat16,))):
        choice = choices[place // 2 % len(choices)]
        found.append(pytest.param(*parts.values, choice, marks=parts.marks, id=f"{parts.id}-{choice.__name__}"))
    return found


# -- the law -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", _all_dtypes())
def test_is_as_exact_as_torch(parts):
    """And has the reference's dtypes, shapes and contiguity. A gradient that is missing is missing in both: DDP asks
    which parameters were used.
    """
    made = answers.answers(*parts)
    assert made.launches, f"{made.name}: no kernel ran, the reference answered"
    assert_law(made, made.fused)
    for name, value in made.fused.outputs.items():
        assert value.device == made.eager.outputs[name].device
        assert value.is_contiguous() == made.eager.outputs[name].is_contiguous(), name


@pytest.mark.parametrize("parts", _small())
def test_planted_errors_are_seen(parts):
    """Eight roundings beyond twice torch's own error, in the largest element of any output or gradient."""
    made = answers.answers(*parts)
    for kind in ("outputs", "gradients"):
        for name, value in getattr(made.fused, kind).items():
            truth = getattr(made.truth, kind).get(name)
            if value is None or not value.is_floating_point() or not value.any():
                continue
            torchs_own = exactness.errors(value, getattr(made.eager, kind)[name], truth)[1]
            largest = float(truth.abs().max())
            spoilt = value.clone(memory_format=torch.contiguous_format)
            place = truth.abs().argmax()
            wrong = largest * (1 + 8 * torch.finfo(value.dtype).eps) + 3 * torchs_own
            spoilt.view(-1)[place] = wrong if truth.flatten()[place] > 0 else -wrong
            spoilt_answer = made.fused._replace(**{kind: getattr(made.fused, kind) | {name: spoilt}})
            with pytest.raises(AssertionError, match=r"torch's own|values differ"):
                assert_law(made, spoilt_answer)


@pytest.mark.parametrize("parts", _all_dtypes() if torch.cuda.is_available() else _small())
def test_two_runs_give_equal_bits(parts):
    name, case, dtype, device = parts
    module = answers.modules()[name]
    arguments = answers.arguments_of(module, case, dtype, device)
    with implementation("fused"):
        upstream = answers.upstream_for(answers.outputs_of(answers.public(name)(*arguments)))
    first, second = (answers.fused_answer(name, arguments, upstream).named() for _ in range(2))
    for key, value in first.items():
        exactness.assert_same_bits(f"{name}: {key}", second[key], value)


# -- inputs in any form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_layouts_below_are_not_contiguous(layout):
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(layout(x), x)
    assert not layout(x).is_contiguous() and layout(x).stride(-1) == 1


@pytest.mark.parametrize("parts, layout", _in_turns(LAYOUTS))
def test_takes_any_strides(parts, layout):
    made = answers.answers(*parts)
    strided = changed(made.arguments, lambda x: layout(x) if x.ndim > 1 else x)
    assert_law(made, made.fused_again(strided))


@pytest.mark.parametrize("parts, layout", _in_turns([*LAYOUTS[1:], LAYOUTS[0]]))
def test_takes_gradients_of_any_strides(parts, layout):
    made = answers.answers(*parts)
    strided = {name: layout(value) if value.ndim > 1 else value for name, value in made.upstream.items()}
    assert_law(made, made.fused_again(upstream=strided))


@pytest.mark.parametrize("parts", _small())
def test_takes_a_gradient_that_is_one_number_expanded(parts):
    """As `sum().backward()` gives it."""
    made = answers.answers(*parts)
    upstream = {name: value.new_full((), 0.5).expand_as(value) for name, value in made.upstream.items()}
    eager = answer(made.module.reference, made.arguments, upstream)
    truth = answer(made.module.reference, answers.doubled(made.arguments), upstream)
    assert_law(made._replace(eager=eager, truth=truth), made.fused_again(upstream=upstream))


@pytest.mark.parametrize("parts", _small())
def test_an_empty_batch(parts):
    made = answers.answers(*parts)
    empty = answers.without_batch(made.arguments)
    upstream = answers.upstream_for(answers.outputs_of(made.module.reference(*empty)))
    eager, fused = answer(made.module.reference, empty, upstream), made.fused_again(empty, upstream)
    for kind in ("outputs", "gradients"):
        ours, theirs = getattr(fused, kind), getattr(eager, kind)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (ours[name] is None) == (value is None)
            if value is not None:  # nothing, or zeros
                exactness.assert_same_bits(f"{made.name}: {name}", ours[name], value)


@pytest.mark.parametrize("parts", _small(dtypes=(torch.bfloat16, torch.float16)))
def test_large_finite_inputs_give_nothing_that_torch_would_not(parts):
    made = answers.answers(*parts)
    size = 30.0 if made.dtype is torch.float16 else 3000.0
    large = changed(made.arguments, lambda x: x * size if x.is_floating_point() else x)
    eager, fused = answer(made.module.reference, large, made.upstream), made.fused_again(large)
    for name, value in eager.named().items():
        if value.is_floating_point():
            assert fused.named()[name][value.isfinite()].isfinite().all(), name


# -- under the modes of autograd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", _small())
def test_without_gradients_the_same_bits(parts):
    """Inference comes first, and whatever tables it makes serve training afterwards."""
    made = answers.answers(*parts)
    for module in answers.modules().values():
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()
    with torch.inference_mode():
        inferred = made.fused_again(upstream={}).outputs
    with torch.no_grad():
        ungraded = made.fused_again(upstream={}).outputs
    trained = made.fused_again()
    for name, value in made.fused.named().items():
        exactness.assert_same_bits(f"{made.name}: {name}", trained.named()[name], value)
    for name, value in made.fused.outputs.items():
        assert not ungraded[name].requires_grad
        exactness.assert_same_bits(f"{made.name}: {name}", inferred[name].clone(), value)
        exactness.assert_same_bits(f"{made.name}: {name}", ungraded[name], value)


@pytest.mark.parametrize("parts", _small(dtypes=(torch.bfloat16,)))
def test_frozen_inputs_change_no_other_gradient(parts):
    """The first leaf alone, then all but the first: the same bits as all together."""
    made = answers.answers(*parts)
    names = list(answers.leaves(made.arguments))
    for wanted in (names[:1], names[1:]):
        arguments = changed(made.arguments, torch.clone)
        for name, leaf in answers.leaves(arguments).items():
            leaf.requires_grad_(name in wanted)
        if wanted and made.upstream:
            gradients = made.fused_again(arguments).gradients
            assert list(gradients) == wanted
            for name, value in gradients.items():
                expected = made.fused.gradients[name]
                assert (value is None) == (expected is None), name
                if value is not None and expected is not None:
                    exactness.assert_same_bits(f"{made.name}: {name}", value, expected)


# -- the form of a kernel file -----------------------------------------------------------------------------------------


def test_the_files_are_found():
    assert {"window_attention", "masked_embedding", "masked_cross_entropy", "codebook_argmax"} <= FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_kernel_file_has_its_parts(name: str):
    module = FILES[name]
    ours, theirs = (inspect.signature(function) for function in (answers.public(name), module.reference))
    assert [*ours.parameters.values()] == [*theirs.parameters.values()]
    for part in ("CASES", "inputs", "rehearse"):
        assert hasattr(module, part), f"{name}: no {part}"
    assert all(answers.is_a_case(case) for case in module.CASES)
    assert len({str(case) for case in module.CASES}) == len(module.CASES)
    assert small_cases(module), f"{name}: no case is small enough for the interpreter"
    assert len(small_cases(module)) < len(module.CASES), f"{name}: no case of the real model"


@pytest.mark.parametrize("name", FILES)
def test_every_case_can_be_rehearsed(name: str):
    """On meta tensors, so that `compile_check` sees what a GPU would be given."""
    for place, case in enumerate(getattr(FILES[name], "CASES", [])):
        with runtime.recording((80, 90, 100)[place % 3]) as launches:
            FILES[name].rehearse(case, DTYPES[place % len(DTYPES)])
        assert launches, f"{name}: {case} starts no kernel"


@pytest.mark.parametrize("parts", _small())
def test_a_rehearsal_starts_what_a_call_starts(parts):
    made = answers.answers(*parts)
    with runtime.recording(90) as launches:
        made.module.rehearse(made.case, made.dtype)
    names = {getattr(launch.kernel, "__name__", str(launch.kernel)) for launch in launches}
    assert set(made.launches) <= names


# -- what the tests themselves stand on --------------------------------------------------------------------------------


@interpreted
def test_the_interpreter_is_corrected_and_fresh_buffers_are_nan():
    assert torch.empty(3).isnan().all()
    x = torch.arange(1, 257, dtype=torch.float32).to(torch.bfloat16)
    out = torch.empty_like(x)
    runtime.launch(_add_a_third, (1,), x, out, SIZE=256)
    assert torch.equal(out, x + torch.tensor(1 / 3).to(torch.bfloat16))


@triton.jit
def _add_a_third(
    x_ptr,  # (SIZE,)
    out_ptr,  # (SIZE,)
    SIZE: tl.constexpr,
):
    places = tl.arange(0, SIZE)
    third = tl.full((SIZE,), 1 / 3, tl.float32).to(tl.bfloat16)
    tl.store(out_ptr + places, tl.load(x_ptr + places) + third)
