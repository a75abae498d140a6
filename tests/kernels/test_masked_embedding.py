"""The stem's norm and the mask token, cell by cell."""

import importlib
import warnings
from typing import Any

import pytest
import torch

from bevt_kernels import implementation, masked_embedding, runtime
from bevt_kernels.exactness import assert_as_exact_as_torch, assert_same_bits

kernel = importlib.import_module("bevt_kernels.masked_embedding")  # the package's name of it is the function
reference = kernel.reference


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


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"mask": torch.zeros(2, 3, 4, dtype=torch.bool)}, r"mask \(2, 3, 4\) does not divide the tokens \(2, 4, 4\)"),
        ({"mask": torch.zeros(1, 2, 2, dtype=torch.bool)}, r"the mask \(1, 2, 2\)"),
        ({"mask": torch.zeros(2, 1, 2, 2, dtype=torch.bool)}, r"the mask \(2, 1, 2, 2\)"),
        ({"mask": torch.zeros(2, 0, 2, dtype=torch.bool)}, r"the mask \(2, 0, 2\)"),
        ({"mask": torch.zeros(2, 2, 2)}, "the mask is torch.float32, not torch.bool"),
        ({"mask_token": None}, "needs a mask token"),
        ({"mask_token": torch.ones(5)}, "mask token has 5 values, but the tokens have 6 channels"),
        ({"norm_weight": torch.ones(7)}, r"norm_weight is \(7,\), but the tokens have 6 channels"),
        ({"norm_bias": torch.ones(1, 6)}, r"norm_bias is \(1, 6\), but the tokens have 6 channels"),
        ({"tokens": torch.ones(2, 4, 6)}, r"got 3 axes \(2, 4, 6\)"),
        ({"tokens": torch.ones(2, 4, 4, 6, dtype=torch.int32)}, "the tokens are torch.int32"),
        ({"norm_bias": torch.ones(6, device="meta")}, "norm_bias is on meta, but the tokens are on cpu"),
        ({"norm_weight": torch.ones(6).long()}, "norm_weight is torch.int64 and norm_bias torch.float32; both must"),
        ({"norm_weight": torch.ones(6).double()}, "norm_weight is torch.float64 and norm_bias torch.float32"),
        ({"norm_bias": torch.ones(6).bfloat16()}, "norm_bias torch.bfloat16; .* the tokens' dtype torch.float32"),
        ({"mask_token": torch.ones(6).long()}, "the mask token is torch.int64"),
        ({"eps": None}, "eps is None, expected a number of at least 0"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_what_does_not_fit_is_named(change, sentence):
    one = torch.ones(6)
    arguments = {
        "tokens": torch.randn(2, 4, 4, 6),
        "mask": torch.zeros(2, 2, 2, dtype=torch.bool),
        "norm_weight": one,
        "norm_bias": one,
        "mask_token": one,
    }
    for name in ("reference", "fused"):
        with implementation(name), pytest.raises(ValueError, match=f"^masked_embedding: .*{sentence}"):
            masked_embedding(**arguments | change)


@pytest.mark.parametrize("name", ["tokens", "mask", "norm_weight", "norm_bias", "mask_token"])
def test_what_is_no_tensor_is_named(name):
    arguments: list[Any] = [torch.randn(2, 4, 4, 6), torch.zeros(2, 2, 2, dtype=torch.bool), *torch.ones(3, 6)]
    place = ["tokens", "mask", "norm_weight", "norm_bias", "mask_token"].index(name)
    arguments[place] = arguments[place].numpy()
    with pytest.raises(TypeError, match=f"^masked_embedding: {name} is of type ndarray, expected a torch.Tensor"):
        masked_embedding(*arguments)


# -- the kernels: on a GPU, or under Triton's interpreter --------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or runtime.INTERPRETED), reason="needs an NVIDIA GPU or TRITON_INTERPRET=1"
)
SMALL = [case for case in kernel.CASES if case.small]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def poisoned():
    """Fresh memory holds NaN, so an element that nobody writes, or a read outside, cannot hide."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(before)


def _drawn(case, dtype):
    return kernel.inputs(case, dtype, DEVICE, torch.Generator(DEVICE).manual_seed(0))


def _results(function, arguments, upstream):
    """The output and the gradients of tokens, weight, bias and mask token."""
    leaves = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in arguments]
    out = function(*leaves)
    out.backward(upstream.to(out.dtype))
    names = ("tokens", "mask", "norm_weight", "norm_bias", "mask_token")
    grads = {name: leaf.grad for name, leaf in zip(names, leaves) if leaf is not None and leaf.is_leaf}
    return {"output": out.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def _fused(*arguments):
    with implementation("fused"), warnings.catch_warnings():
        warnings.simplefilter("error")
        return masked_embedding(*arguments)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_kernels_are_as_exact_as_torch(case, dtype, poisoned):
    arguments = _drawn(case, dtype)
    upstream = torch.randn(arguments[0].shape, device=DEVICE)
    fused, eager = (_results(f, arguments, upstream) for f in (_fused, reference))
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    truth = _results(reference, exact, upstream.to(dtype))
    assert fused.keys() == eager.keys() == truth.keys()
    for name in truth:
        assert_as_exact_as_torch(name, fused[name], eager[name], truth[name])
    assert fused["output"].is_contiguous()
    if case.cells:
        hidden = torch.where(eager["output"] == arguments[4].flatten(), True, False).all(dim=-1)
        assert (fused["tokens"][hidden] == 0).all()
        assert_same_bits("hidden tokens", fused["output"][hidden], eager["output"][hidden])


@needs_kernels
def test_two_runs_give_equal_bits():
    arguments = _drawn(SMALL[0], torch.bfloat16)
    upstream = torch.randn(arguments[0].shape, device=DEVICE)
    once, again = (_results(_fused, arguments, upstream) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)


@needs_kernels
def test_several_tiles_of_one_program_are_summed(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    case = kernel.Case(grid=(2, 3, 8, 8), cells=(2, 4), width=130, small=True)
    arguments = _drawn(case, torch.float32)
    upstream = torch.randn(arguments[0].shape, device=DEVICE)
    fused, eager = (_results(f, arguments, upstream) for f in (_fused, reference))
    truth = _results(
        reference, [x if x is None or not x.is_floating_point() else x.double() for x in arguments], upstream
    )
    for name in truth:
        assert_as_exact_as_torch(name, fused[name], eager[name], truth[name])


@needs_kernels
def test_a_gradient_keeps_the_layout_that_the_convolution_left():
    tokens, *others = _drawn(SMALL[0], torch.float32)
    out = _fused(tokens, *others)
    (grad,) = torch.autograd.grad(out.sum(), tokens)
    assert grad.stride() == tokens.stride() and not tokens.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("wanted", [(0,), (2,), (3, 4), (0, 4), ()], ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    arguments = [x.detach() for x in _drawn(SMALL[1], torch.float32)]
    for place in wanted:
        arguments[place].requires_grad_()
    launched = []
    original = runtime.launch
    kernel.runtime.launch = lambda *a, **k: (launched.append(k), original(*a, **k))
    try:
        out = _fused(*arguments)
        if wanted:
            out.backward(torch.ones_like(out))
    finally:
        kernel.runtime.launch = original
    assert [x.grad is not None for x in arguments] == [place in wanted for place in range(5)]
    if wanted:
        assert (launched[1]["WANTS_X"], launched[1]["WANTS_SUMS"]) == (0 in wanted, any(place > 1 for place in wanted))
    reference_arguments = [x.detach().requires_grad_(x.requires_grad) for x in arguments]
    if wanted:
        reference(*reference_arguments).sum().backward()
    for ours, theirs in zip(arguments, reference_arguments):
        torch.testing.assert_close(ours.grad, theirs.grad)


@needs_kernels
def test_low_precision_tokens_with_float32_parameters():
    tokens, mask, *parameters = _drawn(SMALL[0], torch.bfloat16)
    parameters = [parameter.detach().float().requires_grad_() for parameter in parameters]
    upstream = torch.randn(tokens.shape, device=DEVICE)
    fused = _results(_fused, [tokens, mask, *parameters], upstream)
    truth = _results(reference, [tokens.double(), mask, *(p.double() for p in parameters)], upstream.bfloat16())
    assert fused["output"].dtype is fused["tokens"].dtype is torch.bfloat16
    for name in ("norm_weight", "norm_bias", "mask_token"):
        torch.testing.assert_close(fused[name].double(), truth[name], rtol=1e-4, atol=1e-4)


@needs_kernels
def test_the_dtype_under_autocast_is_the_references():
    arguments = _drawn(SMALL[0], torch.float32)
    low = (arguments[0].detach().bfloat16().requires_grad_(), *arguments[1:])
    with torch.autocast(DEVICE, torch.bfloat16):
        ours, theirs = _fused(*low), reference(*low)
    assert ours.dtype is theirs.dtype
    ours.float().sum().backward()
    assert low[0].grad is not None and low[0].grad.dtype is torch.bfloat16


@needs_kernels
def test_the_operators_keep_torchs_rules():
    arguments = _drawn(SMALL[2], torch.float32)
    torch.library.opcheck(torch.ops.bevt_kernels.masked_embedding.default, (*arguments, 1e-5, torch.float32))
    tokens, mask, weight, *_ = (x.detach() for x in arguments)
    torch.library.opcheck(
        torch.ops.bevt_kernels.masked_embedding_backward.default,
        (torch.randn_like(tokens), tokens, mask, weight, 1e-5, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@needs_kernels
def test_compiled_without_a_graph_break():
    arguments = _drawn(SMALL[1], torch.float32)
    upstream = torch.randn(arguments[0].shape, device=DEVICE)
    compiled = torch.compile(masked_embedding, fullgraph=True, backend="aot_eager")
    with implementation("fused"):
        ours, theirs = _results(compiled, arguments, upstream), _results(masked_embedding, arguments, upstream)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@needs_kernels
def test_what_the_kernels_cannot_take_goes_to_the_reference_with_one_warning():
    tokens, mask, *parameters = _drawn(SMALL[1], torch.float32)
    exact = [tokens.double(), mask, *(p.double() for p in parameters)]
    runtime._warned.clear()
    with implementation("fused"), pytest.warns(UserWarning, match="no kernel for torch.float64; the reference answers"):
        ours = masked_embedding(*exact)
    assert torch.equal(ours, reference(*exact))


@pytest.mark.parametrize(
    "shape, strides, sizes, steps",
    [
        ((8, 8, 56, 56), (3211264, 3136, 56, 1), [1, 1, 8, 25088], [0, 0, 3211264, 1]),  # a convolution's output
        ((8, 8, 56, 56), (3211264, 401408, 7168, 128), [1, 1, 1, 200704], [0, 0, 0, 128]),
        ((2, 3, 4, 6), (1000, 300, 70, 10), [2, 3, 4, 6], [1000, 300, 70, 10]),
        ((2, 1, 4, 6), (1000, 7, 60, 10), [1, 1, 2, 24], [0, 0, 1000, 10]),
        ((1, 1, 1), (5, 5, 5), [1, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_axes_that_lie_behind_one_another_are_one(shape, strides, sizes, steps):
    assert kernel._merged(shape, strides) == (sizes, [steps])
    both = kernel._merged(shape, strides, torch.empty(shape).stride())  # what one cannot merge, the other does not
    assert both[0] == sizes and both[1][0] == steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", kernel.CASES, ids=str)
def test_every_case_can_be_rehearsed_without_a_gpu(case, dtype):
    for capability in (80, 90, 100):
        with runtime.recording(capability) as launches:
            kernel.rehearse(case, dtype)
        forward, backward = launches
        assert forward.constants["HIDES"] == (case.cells is not None)
        assert backward.constants["WANTS_X"] and backward.constants["WANTS_SUMS"]
        assert all(len(launch.arguments) + len(launch.constants) == len(launch.kernel.arg_names) for launch in launches)
