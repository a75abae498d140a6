"""Window attention against a pair-by-pair construction from the specification, and against MONAI's."""

from math import prod

import pytest
import torch

from bevt_kernels import window_attention
from bevt_kernels.window_attention import bias_rows, shift_mask
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
