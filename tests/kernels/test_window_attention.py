"""Window attention against a pair-by-pair construction from the specification, and against MONAI's."""

from fractions import Fraction
from importlib import import_module
from math import prod

import numpy
import pytest
import torch

from bevt_kernels import implementation, runtime, window_attention
from bevt_kernels.window_attention import bias_rows, shift_mask
from bevt_kernels.window_geometry import plan
from tests.kernels.brute_force import attention

CASES = {
    "even": dict(grid=(4, 6, 6), window=(2, 3, 3)),
    "shifted": dict(grid=(4, 6, 6), window=(2, 3, 3), shift=(1, 1, 1)),
    "time-clipped": dict(grid=(2, 6, 9), window=(4, 3, 3), shift=(0, 1, 1)),
    "even-window": dict(grid=(2, 8, 4), window=(2, 4, 4), shift=(0, 2, 0)),
    "not-square": dict(grid=(3, 4, 6), window=(3, 2, 3), shift=(0, 1, 1)),
    "space-clipped": dict(grid=(2, 2, 3), window=(4, 3, 3)),
    "space-clipped-official": dict(grid=(2, 2, 3), window=(4, 3, 3), bias_index="official"),
    "width-clipped-official": dict(grid=(4, 6, 2), window=(2, 3, 3), shift=(1, 1, 0), bias_index="official"),
    "image": dict(grid=(1, 6, 6), window=(4, 3, 3), shift=(0, 1, 1)),
    "image-official-even": dict(grid=(1, 6, 6), window=(4, 3, 3), mask_shift=(0, 1, 1)),
    "image-official-one-window": dict(grid=(1, 3, 3), window=(4, 3, 3), shift=(0, 1, 1)),
}


def _inputs(case, dtype, batch=2, heads=2, width=8):
    rows = prod(2 * size - 1 for size in case["window"])
    qkv = torch.randn(batch, *case["grid"], 3, heads, width, dtype=dtype, requires_grad=True)
    return qkv, torch.randn(rows, heads, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_every_pair_of_the_specification(name):
    case = CASES[name]
    options = {key: value for key, value in case.items() if key != "grid"}
    inputs = _inputs(case, torch.float64)
    out, truth = window_attention(*inputs, **options), attention(*inputs, **options)
    torch.testing.assert_close(out, truth)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(truth, inputs, upstream)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "size", [(4, 6, 6), (8, 14, 14), (3, 4, 5)], ids=lambda size: "x".join(str(side) for side in size)
)
@pytest.mark.parametrize("shifted", [False, True])
def test_agrees_with_monai(size, shifted):
    swin = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is an oracle of the [test] extra")
    window = {4: (2, 3, 3), 8: (8, 7, 7), 3: (3, 2, 5)}[size[0]]
    st, sh, sw = (w // 2 if shifted and s > w else 0 for s, w in zip(size, window))
    shift = (st, sh, sw)
    theirs = swin.WindowAttention(dim=16, num_heads=2, window_size=window, qkv_bias=True)
    torch.nn.init.normal_(theirs.relative_position_bias_table)
    x = torch.randn(2, *size, 16)
    rolled = x.roll([-s for s in shift], (1, 2, 3))
    mask = swin.compute_mask(size, window, shift, x.device) if any(shift) else None
    windows = theirs(swin.window_partition(rolled, window), mask)
    expected = swin.window_reverse(windows.view(-1, *window, 16), window, (2, *size)).roll(shift, (1, 2, 3))

    qkv = theirs.qkv(x).unflatten(-1, (3, 2, 8))
    out = window_attention(qkv, theirs.relative_position_bias_table, window, shift)
    torch.testing.assert_close(theirs.proj(out.flatten(-2)), expected, atol=1e-5, rtol=1e-5)


def test_half_inputs_keep_logits_and_softmax_in_float32():
    # logits near 300 differ by less than bfloat16 can hold there; rounding them would change which value wins
    qkv = torch.zeros(1, 1, 1, 2, 3, 1, 2, dtype=torch.bfloat16)
    qkv[..., 0, 0, :] = 20.0
    qkv[0, 0, 0, 0, 1, 0] = torch.tensor([20.0, 1.0])
    qkv[0, 0, 0, 1, 1, 0] = torch.tensor([20.0, 0.9375])
    qkv[0, 0, 0, :, 2, 0, 0] = torch.tensor([0.0, 1.0])
    table = torch.zeros(9, 1, dtype=torch.bfloat16)
    for context in (torch.autocast("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)):
        with context:
            out = window_attention(qkv, table, (1, 2, 2))
        weight = torch.sigmoid(torch.tensor(-20.0 * 0.0625 / 2**0.5)).to(torch.bfloat16)
        assert out.dtype is torch.bfloat16
        assert out[0, 0, 0, 0, 0, 0] == weight


def test_separated_pairs_get_exactly_minus_100():
    mask = shift_mask((1, 4, 4), (1, 2, 2), (0, 1, 1), torch.device("cpu"), torch.float32)
    assert mask.unique().tolist() == [-100.0, 0.0]
    assert mask.shape == (4, 4, 4)
    # the first window holds one region, the last one four
    assert (mask[0] == 0).all()
    assert (mask[3] == 0).sum() == 4


def test_of_a_clipped_time_axis_both_indices_agree():
    rows = [bias_rows((8, 7, 7), (1, 7, 7), index, torch.device("cpu")) for index in ("true", "official")]
    assert torch.equal(*rows)
    # SPEC 1.5: the rows of temporal offset 0
    assert rows[0].min() == 7 * 13 * 13
    assert rows[0].max() == 8 * 13 * 13 - 1


def test_what_inference_mode_made_still_serves_training():
    case = dict(grid=(1, 10, 5), window=(1, 5, 5), shift=(0, 2, 0))
    qkv, table = _inputs(case, torch.float32)
    with torch.inference_mode():
        window_attention(qkv, table, (1, 5, 5), (0, 2, 0))
    window_attention(qkv, table, (1, 5, 5), (0, 2, 0)).sum().backward()
    assert table.grad is not None


def test_inputs_are_left_alone_and_may_have_any_strides():
    qkv, table = _inputs(CASES["shifted"], torch.float64)
    with torch.no_grad():
        strided = qkv.movedim(1, 3).contiguous().movedim(3, 1)
        copy = strided.clone()
        out = window_attention(strided, table, (2, 3, 3), (1, 1, 1))
        torch.testing.assert_close(out, window_attention(qkv, table, (2, 3, 3), (1, 1, 1)))
    assert torch.equal(strided, copy)


def test_an_empty_batch_is_empty():
    qkv, table = _inputs(CASES["shifted"], torch.float32, batch=0)
    assert window_attention(qkv, table, (2, 3, 3), (1, 1, 1)).shape == (0, 4, 6, 6, 2, 8)


def test_wrong_shapes_are_named():
    qkv, table = _inputs(CASES["even"], torch.float32)
    with pytest.raises(ValueError, match=r"the grid \(4, 6, 6\) is not a multiple of the window \(2, 4, 3\)"):
        window_attention(qkv, table, (2, 4, 3))
    with pytest.raises(ValueError, match=r"the bias table is \(75, 2\).* needs \(175, 2\)"):
        window_attention(qkv, table, (4, 3, 3))


@pytest.mark.parametrize("kind", [list, torch.Size, torch.tensor, numpy.array, lambda x: map(numpy.int64, x)])
@pytest.mark.parametrize("name", ["reference", "fused"])
def test_whole_numbers_may_come_in_any_form(kind, name):
    qkv, table = _inputs(CASES["shifted"], torch.float32)
    with implementation(name):
        expected = window_attention(qkv, table, (2, 3, 3), (1, 1, 1), (0, 1, 1))
        assert torch.equal(window_attention(qkv, table, kind([2, 3, 3]), kind([1, 1, 1]), kind([0, 1, 1])), expected)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"qkv": None}, TypeError, "qkv is of type NoneType, expected a torch.Tensor"),
        ({"qkv": numpy.zeros(3)}, TypeError, "qkv is of type ndarray"),
        ({"bias_table": None}, TypeError, "bias_table is of type NoneType"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 3, 2, 8).to_sparse()}, ValueError, "qkv is a sparse or nested tensor"),
        ({"qkv": torch.zeros(1, 4, 4, 3, 2, 8)}, ValueError, r"qkv is \(1, 4, 4, 3, 2, 8\), expected \(B, t, h"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 3, 2, 0)}, ValueError, "only the batch may be empty"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 3, 2, 8, dtype=torch.int32)}, ValueError, "qkv is torch.int32"),
        ({"qkv": torch.zeros(1, 2, 4, 4, 3, 2, 8).to(torch.float8_e4m3fn)}, ValueError, "qkv is torch.float8_e4m3fn"),
        ({"bias_table": torch.zeros(27)}, ValueError, r"the bias table is \(27,\) .* needs \(27, 2\)"),
        ({"bias_table": torch.zeros(27, 2, device="meta")}, ValueError, "on cpu but the bias table is on meta"),
        ({"window": 2}, ValueError, "window is 2, expected three whole numbers of at least 1"),
        ({"window": None}, ValueError, "window is None, expected three"),
        ({"window": (2, 2)}, ValueError, r"window is \(2, 2\), expected three"),
        ({"window": (2, 2.0, 2)}, ValueError, r"window is \(2, 2.0, 2\), expected three"),
        ({"window": "222"}, ValueError, "window is 222, expected three"),
        ({"window": (2, 0, 2)}, ValueError, r"window is \(2, 0, 2\), expected three"),
        ({"shift": None}, ValueError, "shift is None, expected three whole numbers of at least 0"),
        ({"shift": (0, -1, 0)}, ValueError, r"shift is \(0, -1, 0\), expected three"),
        ({"shift": (0, Fraction(1), 0)}, ValueError, "shift is .* expected three"),
        ({"shift": (0, 2, 0)}, ValueError, r"shift is \(0, 2, 0\), which must be less than the window \(2, 2, 2\)"),
        ({"mask_shift": (0, 0, 2)}, ValueError, r"mask_shift is \(0, 0, 2\), which must be less"),
        ({"bias_index": "other"}, ValueError, "bias_index is 'other', expected 'true' or 'official'"),
    ],
)
def test_what_does_not_fit_is_named(change, error, words):
    arguments = {"qkv": torch.zeros(1, 2, 4, 4, 3, 2, 8), "bias_table": torch.zeros(27, 2), "window": (2, 2, 2)}
    for name in ("reference", "fused"):
        with implementation(name), pytest.raises(error, match=f"^window_attention: .*{words}"):
            window_attention(**arguments | change)


def test_what_32_bits_cannot_count_is_refused():
    module = import_module("bevt_kernels.window_attention")
    for shape, words in (
        ((2**20, 1, 64, 64, 3, 1, 16), "less than"),  # programs
        ((1, 512, 512, 256, 3, 1, 16), "less than"),  # slots of a sample, in windows of one token
        ((1, 512, 512, 64, 3, 1, 16), None),
    ):
        qkv = torch.empty(0, dtype=torch.bfloat16, device="meta").expand(1, 1, 1, 1, 1, 1, 0).new_empty(shape)
        refusal = module._refusal(qkv, qkv.new_empty(1, 1), (1, 1, 1))
        assert (refusal is None) if words is None else words in (refusal or "")
    # q, k and v so far apart that twice their distance is more than 32 bits: a copy brings them together
    far = torch.empty_strided((1, 1, 1, 2, 3, 1, 16), (0, 0, 0, 16, 2**30, 16, 1), device="meta")
    assert module._even(far).stride(4) == 16
    assert module._even(far[..., :1, :, :]).shape[4] == 1


def test_the_plan_of_a_large_grid_compares_the_tokens_of_few_windows(monkeypatch):
    # all pairs of tokens of all 16,384 windows would be 315 MB
    seen = []
    module = import_module("bevt_kernels.window_geometry")
    canonical = module._canonical
    monkeypatch.setattr(module, "_canonical", lambda label: (seen.append(len(label)), canonical(label))[1])
    shift = (0, 3, 3)
    made = plan.__wrapped__((1, 896, 896), (1, 7, 7), shift, shift, "true", 64, True, False, torch.device("cpu"))
    assert made.kinds == 4 and seen == [4]


@pytest.mark.skipif(not runtime.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy about NaN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [5, 9])
def test_what_is_no_number_stays_in_its_sample_and_is_not_hidden(dtype, wrong, side):
    qkv = torch.randn(2, 1, side, side, 3, 1, 16).to(dtype)
    table = torch.randn((2 * side - 1) ** 2, 1).to(dtype)
    spoilt, window = qkv.clone(), (1, side, side)
    spoilt[0, 0, 1, 1] = wrong
    results = []
    with implementation("fused"):
        for given in (qkv, spoilt):
            leaf = given.clone().requires_grad_()
            out = window_attention(leaf, table, window)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaf)))
        for out, spoilt_out in zip(*results):
            assert torch.equal(out[1], spoilt_out[1])
            assert spoilt_out[0].isnan().any()
        diverged = table.clone()
        diverged[0] = wrong
        assert window_attention(qkv, diverged, window).isnan().any()
