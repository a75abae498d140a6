"""The fused choice of a codebook entry, in the interpreter on a CPU."""

import importlib
from typing import Any

import pytest
import torch

from bevt_kernels import codebook_argmax, implementation, runtime
from bevt_kernels.exactness import assert_choice_as_exact_as_torch

module = importlib.import_module("bevt_kernels.codebook_argmax")
interpreted = pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
SMALL = [case for case in module.CASES if case.small]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _fused(*arguments):
    with implementation("fused"):
        return codebook_argmax(*arguments)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_chooses_as_exactly_as_torch_and_0_where_nothing_is_hidden(case, dtype):
    features, weight, bias, mask = module.inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))
    ids, eager = _fused(features, weight, bias, mask), module.reference(features, weight, bias, mask)
    hidden = torch.ones(case.positions, dtype=torch.bool) if mask is None else mask
    scores = features[hidden].double() @ weight.double().T + (0 if bias is None else bias.double())
    assert ids.dtype == torch.int64
    assert_choice_as_exact_as_torch(str(case), ids[hidden], eager[hidden], scores)
    assert (ids[~hidden] == 0).all()
    assert torch.equal(ids, _fused(features, weight, bias, mask))


@interpreted
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_of_equal_scores_the_first_wins_wherever_the_others_stand(dtype):
    # small whole numbers: every score is exact
    features = torch.randint(-2, 3, (50, 32), dtype=dtype)
    weight = torch.randint(-1, 2, (100, 32), dtype=dtype).repeat(6, 1)
    truth = (features.double() @ weight.double().T).argmax(-1)
    assert (truth < 100).all()
    assert torch.equal(_fused(features, weight), truth)


@interpreted
def test_any_strides_and_leading_shapes():
    features = torch.randn(3, 16, 4, 5).permute(0, 2, 3, 1)  # channels last only in name
    weight, mask = torch.randn(16, 40).T, torch.rand(3, 4, 5) < 0.5
    assert torch.equal(_fused(features, weight, None, mask), module.reference(features, weight, None, mask))
    rows = torch.randn(20, 48)[::2, :32]  # rows that lie apart
    assert torch.equal(_fused(rows, torch.ones(7, 32)), torch.zeros(10, dtype=torch.int64))
    assert _fused(features[:0], weight).shape == (0, 4, 5)
    one = _fused(features[0, 0, 0], weight)
    assert one.shape == () and one == (weight @ features[0, 0, 0]).argmax()


@interpreted
def test_many_blocks_of_positions_keep_their_order(monkeypatch):
    rows = importlib.import_module("bevt_kernels._hidden_rows")
    monkeypatch.setattr(rows, "BLOCK", 16)
    mask = torch.rand(100) < 0.4
    listed, count = rows.hidden_rows(mask)
    assert count.item() == mask.sum()
    assert torch.equal(listed[: count.item()].long(), mask.nonzero()[:, 0])


@interpreted
def test_autocast_chooses_in_its_dtype():
    features, weight, bias, _ = module.inputs(SMALL[0], torch.float32, "cpu", torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = _fused(features, weight, bias)
    assert torch.equal(ids, _fused(features.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_nothing_of_positions_times_codebook_is_allocated(monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: (sizes.append(empty(*a, **k).numel()), empty(*a, **k))[1])
    case = module.CASES[0]
    with runtime.recording(90) as launches:
        module.rehearse(case, torch.bfloat16)
    assert len(launches) == 3
    assert max(sizes) <= case.positions * case.width  # the features themselves


@pytest.mark.parametrize("name", ["reference", "fused"])
def test_what_does_not_fit_is_named(name):
    features, weight = torch.randn(2, 3, 16), torch.randn(10, 16)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with implementation(name):
        wrong: list[tuple[Any, str]] = [
            ((features, weight[:, :8]), r"got \(2, 3, 16\) and \(10, 8\)"),
            ((features, weight[:0]), r"got \(2, 3, 16\) and \(0, 16\)"),
            ((features, weight, torch.zeros(9)), r"the weight \(10, 16\) has no bias \(9,\)"),
            ((features, weight, None, mask[0]), r"positions \(2, 3\), but the mask is \(3,\)"),
            ((features, weight, None, mask.float()), r"torch.float32, not torch.bool"),
            ((features, weight.half()), "one dtype, got torch.float16, torch.float32"),
            ((features, weight.to("meta")), "one device, got cpu, meta"),
            ((features[..., :0], weight[:, :0]), r"got \(2, 3, 0\) and \(10, 0\)"),
            ((features.long(), weight.long()), "the features are torch.int64"),
            ((features.to("meta"), weight.to("meta"), None, mask.to("meta")), "nobody knows what is hidden"),
        ]
        for arguments, words in wrong:
            with pytest.raises(ValueError, match=words):
                codebook_argmax(*arguments)
        not_tensors: list[tuple[Any, str]] = [
            ((None, weight), "features is of type NoneType"),
            ((features, torch.nn.Linear(16, 10)), "weight is of type Linear, expected a torch.Tensor"),
            ((features, weight, None, mask.tolist()), "mask is of type list"),
        ]
        for arguments, words in not_tensors:
            with pytest.raises(TypeError, match=f"^codebook_argmax: {words}"):
                codebook_argmax(*arguments)


def test_without_a_mask_the_meta_device_knows_the_shape():
    features, weight = torch.empty(2, 3, 16, device="meta"), torch.empty(10, 16, device="meta")
    assert codebook_argmax(features, weight).shape == (2, 3)


@interpreted
def test_float64_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(runtime, "_warned", set())
    features, weight = torch.randn(5, 16, dtype=torch.float64), torch.randn(10, 16, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"codebook_argmax: .* not in torch\.float64; the reference answers instead"):
        ids = _fused(features, weight)
    assert torch.equal(ids, (features @ weight.T).argmax(-1))
