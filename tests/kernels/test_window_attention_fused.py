"""The fused window attention where windows, shifts, strides and dtypes are awkward: output and both gradients, held to
the exactness law against float64.

Truth is the reference in float64, and for small grids a construction pair by pair from the specification.
"""

import functools
import warnings
from math import prod
from typing import Any

import pytest
import torch

from bevt_kernels import exactness, implementation, runtime, window_attention
from tests.kernels import brute_force
from tests.kernels.answers import counted_launches, modules

reference = modules()["window_attention"].reference
pytestmark = pytest.mark.skipif(
    not runtime.INTERPRETED and not torch.cuda.is_available(), reason="nothing runs kernels"
)
DEVICE = "cpu" if runtime.INTERPRETED else "cuda"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)


def _problem(grid, window, heads=1, width=32, dtype=torch.float32, batch=1, table_dtype=None, scale=1.0, bias=1.0):
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, *grid, 3, heads, width, generator=draw)
    qkv[..., :2, :, :] *= scale
    table = bias * torch.randn(prod(2 * size - 1 for size in window), heads, generator=draw)
    qkv, table = qkv.to(DEVICE, dtype), table.to(DEVICE, table_dtype or dtype)
    return qkv.requires_grad_(), table.requires_grad_()


def _run(function, qkv, table, options, upstream):
    """Output and gradients by name."""
    out = function(qkv, table, **options)
    wanted = {name: x for name, x in (("qkv", qkv), ("table", table)) if x.requires_grad}
    gradients = torch.autograd.grad(out, list(wanted.values()), upstream.to(out.dtype))
    return {"output": out.detach()} | {f"gradient of {name}": value for name, value in zip(wanted, gradients)}


def _upstream(qkv):
    draw = torch.Generator().manual_seed(1)
    shape = (*qkv.shape[:4], *qkv.shape[5:])
    return torch.randn(shape, generator=draw).to(qkv.device, qkv.dtype)


def _fused(qkv, table, options, upstream):
    """Only an answer of the kernels counts: no fallback, no warning."""
    with implementation("fused"), counted_launches() as launches, warnings.catch_warnings():
        warnings.simplefilter("error")
        made = _run(window_attention, qkv, table, options, upstream)
    assert len(launches) > 1, "the reference answered"
    return made


def _double(x):
    return x.detach().double().requires_grad_(x.requires_grad)


def _hold_to_the_law(qkv, table, truth=reference, upstream=None, cancelled=0.0, **options):
    """`cancelled`: an absolute error that gradients may have beyond the law."""
    upstream = _upstream(qkv) if upstream is None else upstream
    fused = _fused(qkv, table, options, upstream)
    eager = _run(reference, qkv, table, options, upstream)
    true = _run(truth, _double(qkv), _double(table), options, upstream)
    assert fused.keys() == eager.keys() == true.keys()
    for name, value in fused.items():
        if cancelled and name.startswith("gradient"):
            error, _, bound = exactness.errors(value, eager[name], true[name])
            assert error <= bound + cancelled, f"{name}: error {error:.2e}"
        else:
            exactness.assert_as_exact_as_torch(name, value, eager[name], true[name])
    return fused


def _name(value):
    return str(value).removeprefix("torch.")


# -- sizes -------------------------------------------------------------------------------------------------------------

WINDOWS = {
    1: ((1, 2, 2), (1, 1, 1)),
    8: ((2, 4, 2), (2, 2, 2)),
    16: ((1, 8, 4), (1, 4, 4)),
    27: ((3, 3, 6), (3, 3, 3)),
    49: ((1, 7, 14), (1, 7, 7)),
    50: ((2, 5, 10), (2, 5, 5)),
    64: ((1, 8, 8), (1, 8, 8)),
    98: ((2, 7, 14), (2, 7, 7)),
    112: ((4, 4, 7), (4, 4, 7)),
    245: ((5, 7, 7), (5, 7, 7)),
    392: ((8, 7, 7), (8, 7, 7)),
    784: ((16, 7, 7), (16, 7, 7)),
}


SLOW = {112: HALVES[:1], 245: HALVES[1:], 392: HALVES[:1], 784: HALVES[1:]}  # seconds each in the interpreter
SIZES = [(n, x) for n in WINDOWS for x in (SLOW.get(n, DTYPES) if DEVICE == "cpu" else DTYPES)]


@pytest.mark.parametrize("tokens, dtype", SIZES, ids=_name)
def test_windows_of_any_size(tokens, dtype):
    grid, window = WINDOWS[tokens]
    assert prod(window) == tokens
    qkv, table = _problem(grid, window, 2 if tokens < 50 else 1, 32 if tokens < 700 else 16, dtype)
    if tokens == 784 and DEVICE == "cpu":
        table.requires_grad_(False)
    _hold_to_the_law(qkv, table, window=window)


WIDTHS = [(49, width, dtype) for width in (8, 16, 24, 64) for dtype in (torch.float32, torch.bfloat16)]
WIDTHS += [(98, 24, torch.bfloat16), (98, 64, torch.float32)]


@pytest.mark.parametrize(
    "tokens, width, dtype", WIDTHS, ids=lambda value: value if isinstance(value, int) else _name(value)
)
def test_heads_of_any_width(tokens, width, dtype):
    window = WINDOWS[tokens][1]
    qkv, table = _problem(window, window, 2, width, dtype)
    if width not in (16, 32, 64):
        # padded, or refused with a sentence that names the width
        runtime._warned.clear()
        with implementation("fused"), counted_launches() as launches, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = window_attention(qkv, table, window)
        if not launches:
            assert len(said) == 1 and str(width) in str(said[0].message)
            assert torch.equal(out, reference(qkv, table, window))
            return
    _hold_to_the_law(qkv, table, window=window)


def test_many_samples_windows_and_heads():
    """More of each than a program takes at once, and numbers that divide by nothing."""
    qkv, table = _problem((1, 4, 6), (1, 2, 2), heads=3, width=16, dtype=torch.bfloat16, batch=5)
    _hold_to_the_law(qkv, table, window=(1, 2, 2), shift=(0, 1, 1))


# -- shifts, masks, clipped windows ------------------------------------------------------------------------------------

GEOMETRIES = {
    "one-axis": dict(grid=(2, 3, 9), window=(2, 3, 3), shift=(0, 0, 1)),
    "two-axes": dict(grid=(2, 6, 6), window=(2, 3, 3), shift=(0, 1, 2)),
    "three-axes": dict(grid=(4, 6, 6), window=(2, 3, 3), shift=(1, 1, 1)),
    "large-shift": dict(grid=(1, 6, 6), window=(1, 3, 3), shift=(0, 2, 2)),
    "time-only": dict(grid=(4, 3, 3), window=(2, 3, 3), shift=(1, 0, 0)),
    "mask-without-roll": dict(grid=(1, 6, 6), window=(4, 3, 3), mask_shift=(0, 1, 1)),
    "roll-without-mask": dict(grid=(2, 6, 6), window=(2, 3, 3), shift=(1, 1, 1), mask_shift=(0, 0, 0)),
    "mask-unlike-roll": dict(grid=(4, 6, 6), window=(2, 3, 3), shift=(0, 1, 1), mask_shift=(1, 2, 0)),
    "official-one-window": dict(grid=(1, 3, 3), window=(4, 3, 3), shift=(0, 1, 1)),
    "mask-of-one-window": dict(grid=(1, 3, 3), window=(4, 3, 3), mask_shift=(0, 1, 1)),
    "image": dict(grid=(1, 6, 6), window=(4, 3, 3), shift=(0, 1, 1)),
    "time-clipped": dict(grid=(2, 6, 6), window=(4, 3, 3), shift=(0, 1, 1)),
    "time-clipped-official": dict(grid=(2, 6, 6), window=(4, 3, 3), shift=(0, 1, 1), bias_index="official"),
    "space-clipped": dict(grid=(2, 2, 6), window=(2, 3, 3), shift=(0, 0, 1)),
    "space-clipped-official": dict(grid=(2, 2, 6), window=(2, 3, 3), shift=(0, 0, 1), bias_index="official"),
    "all-clipped-official": dict(grid=(2, 2, 2), window=(4, 3, 3), bias_index="official"),
}

# geometry is float32's to show; half precision takes its constants and masks through other code
PAIRS = [(name, torch.float32) for name in GEOMETRIES]
PAIRS += [(name, torch.bfloat16) for name in ("three-axes", "mask-unlike-roll", "all-clipped-official")]


@functools.cache
def _pairs(grid, window, shift, mask_shift, bias_index):
    return _slow_pairs(grid, window, shift, mask_shift, bias_index)


_slow_pairs = brute_force.pairs


@pytest.mark.parametrize("name, dtype", PAIRS, ids=_name)
def test_every_pair_of_the_specification(name, dtype, monkeypatch):
    monkeypatch.setattr(brute_force, "pairs", _pairs)
    options = dict(GEOMETRIES[name])
    grid, window = options.pop("grid"), options["window"]
    qkv, table = _problem(grid, window, heads=2, width=16, dtype=dtype)

    def truth(qkv, table, **options):
        return brute_force.attention(qkv.cpu(), table.cpu(), **options).to(qkv.device)

    _hold_to_the_law(qkv, table, truth, **options)


LARGE = {
    "image-14": dict(grid=(1, 14, 14), window=(2, 7, 7), shift=(0, 3, 3)),
    "two-axes-98": dict(grid=(4, 7, 14), window=(2, 7, 7), shift=(1, 0, 3)),
    "official-image": dict(grid=(1, 7, 7), window=(2, 7, 7), shift=(0, 3, 3), bias_index="official"),
    "clipped-147": dict(grid=(3, 7, 14), window=(4, 7, 7), shift=(0, 0, 3)),
    "small-view-official": dict(grid=(4, 4, 4), window=(4, 7, 7), bias_index="official"),
}
if DEVICE == "cuda":
    LARGE["three-axes-392"] = dict(grid=(16, 14, 14), window=(8, 7, 7), shift=(4, 3, 3))
    LARGE["two-axes-784"] = dict(grid=(16, 14, 14), window=(16, 7, 7), shift=(0, 3, 3))


@pytest.mark.parametrize("name", LARGE)
def test_shifted_windows_of_the_model(name):
    options = dict(LARGE[name])
    grid = options.pop("grid")
    _hold_to_the_law(*_problem(grid, options["window"], dtype=torch.bfloat16, width=32), **options)


# -- logits that are far apart -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize(
    "grid, window, shift",
    [((2, 6, 6), (2, 3, 3), (0, 1, 1)), ((2, 6, 12), (2, 6, 6), (0, 0, 3))],
    ids=["N18", "N72"],
)
def test_separated_pairs_get_minus_100_and_no_less(grid, window, shift, dtype):
    qkv, table = _problem(grid, window, 1, 16, dtype, scale=12.0)
    # where logits lie hundreds apart, whoever leaves the separated pairs out answers something else
    rows, added = brute_force.pairs(grid, window, shift, shift)
    q, k, _ = (x.detach().double().flatten(0, 2)[:, 0].cpu() for x in qkv[0].unbind(3))
    logits = q @ k.T * 16**-0.5 + table.detach().double().cpu()[rows][..., 0] + added
    separated = logits.softmax(-1).masked_fill(added != -100.0, 0.0).sum(-1)
    assert logits[added == 0].max() - logits[added == 0].min() > 200
    assert (separated > 0.5).sum() >= 2
    _hold_to_the_law(qkv, table, window=window, shift=shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("bias", [30.0, 300.0])
def test_large_bias(bias, dtype):
    """Rounding such a bias to half precision would show in the softmax."""
    window = (2, 4, 4)
    qkv, table = _problem((2, 4, 8), window, 2, 16, dtype, bias=bias, table_dtype=torch.float32)
    _hold_to_the_law(qkv, table, window=window, shift=(0, 0, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("window", [(1, 4, 4), (2, 6, 6)], ids=["N16", "N72"])
def test_logits_beyond_what_exp_can_take(window, dtype):
    qkv, table = _problem(window, window, 1, 16, dtype, scale=60.0)
    upstream = _upstream(qkv)
    # every row has one key, so dS = p (dP - delta) is a difference of equals. Windows of several tiles know delta in
    # 16-bit dtypes from dO and O, to one float32 rounding of the terms it is summed from
    terms = float((upstream.float().abs()[..., None, :, :] * qkv.detach().float().abs()[..., 2:, :, :]).sum(-1).max())
    several = prod(window) > 64 and dtype != torch.float32
    cancelled = torch.finfo(torch.float32).eps * terms if several else 0.0
    made = _hold_to_the_law(qkv, table, upstream=upstream, cancelled=cancelled, window=window)
    assert all(value.isfinite().all() for value in made.values())


# -- strides -----------------------------------------------------------------------------------------------------------


def _of_a_larger_grid(x):
    batch, t, h, w, *rest = x.shape
    wide = torch.full((batch, t + 1, h + 2, w + 3, *rest), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 1:, 1:-1, 2:-1] = x
    return wide[:, 1:, 1:-1, 2:-1]


def _permuted(x):
    return x.permute(4, 5, 3, 0, 2, 1, 6).contiguous().permute(3, 5, 4, 2, 0, 1, 6)


def _heads_first(x):
    return x.transpose(4, 5).contiguous().transpose(4, 5)


def _odd_rows(x):
    """Heads of 16 in rows of 17: no vector of eight is aligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 1), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1:] = x
    return wide[..., 1:]


def _last_axis_strided(x):
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


@pytest.mark.parametrize("window", [(1, 4, 4), (2, 6, 6)], ids=["N16", "N72"])
def test_any_strides(window):
    grid = (window[0], window[1], 2 * window[2])
    qkv, table = _problem(grid, window, 2, 16, torch.bfloat16, batch=2)
    options = dict(window=window, shift=(0, 0, 2))
    contiguous = _hold_to_the_law(qkv, table, **options)  # pyright: ignore[reportArgumentType]
    for layout in (_of_a_larger_grid, _permuted, _heads_first, _odd_rows):
        strided = layout(qkv.detach()).requires_grad_()
        assert torch.equal(strided, qkv) and not strided.is_contiguous() and strided.stride(-1) == 1
        for name, value in _fused(strided, table, options, _upstream(qkv)).items():
            exactness.assert_same_bits(f"{layout.__name__}: {name}", value, contiguous[name])


def test_a_strided_last_axis_is_copied_or_left_to_the_reference():
    qkv, table = _problem((1, 4, 8), (1, 4, 4), 2, 16, torch.bfloat16)
    strided = _last_axis_strided(qkv.detach()).requires_grad_()
    with implementation("fused"), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = window_attention(strided, table, (1, 4, 4))
        eager, truth = (reference(x, y, (1, 4, 4)) for x, y in ((qkv, table), (_double(qkv), _double(table))))
    exactness.assert_as_exact_as_torch("output", out, eager, truth)


def test_one_sample_expanded_over_the_batch():
    one, table = _problem((2, 4, 8), (2, 4, 4), 2, 16, torch.float32)
    qkv = one.expand(3, *one.shape[1:])
    upstream = _upstream(qkv)
    options: Any = dict(window=(2, 4, 4), shift=(0, 0, 2))
    with implementation("fused"), counted_launches() as launches:
        out = window_attention(qkv, table, **options)
        gradients = torch.autograd.grad(out, (one, table), upstream)
    assert launches
    many = one.detach().repeat(3, *[1] * (one.ndim - 1)).requires_grad_()
    eager, truth = (
        _run(reference, *pair, options, upstream) for pair in ((many, table), (_double(many), _double(table)))
    )
    exactness.assert_as_exact_as_torch("output", out.detach(), eager["output"], truth["output"])
    true, torchs = (made["gradient of qkv"].sum(0, keepdim=True) for made in (truth, eager))
    exactness.assert_as_exact_as_torch("gradient of qkv", gradients[0], torchs, true)
    exactness.assert_as_exact_as_torch("table", gradients[1], eager["gradient of table"], truth["gradient of table"])


@pytest.mark.parametrize("expanded", [True, False], ids=["expanded", "permuted"])
def test_gradients_from_above_of_any_strides(expanded):
    qkv, table = _problem((2, 4, 8), (2, 4, 4), 2, 16, torch.bfloat16, batch=2)
    upstream = _upstream(qkv)
    if expanded:
        upstream = upstream.new_full((), 0.5).expand_as(upstream)
    else:
        upstream = upstream.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    _hold_to_the_law(qkv, table, upstream=upstream, window=(2, 4, 4), shift=(0, 0, 2))


def test_offsets_beyond_two_to_the_31(tmp_path):
    """Two samples 2^31 values apart, in a file that is all hole but for them."""
    one, table = _problem((1, 4, 8), (1, 4, 4), 1, 16, torch.bfloat16, batch=2)
    sample = one[0].numel()
    if DEVICE == "cuda":
        room = torch.empty(2**31 + sample, dtype=torch.bfloat16, device=DEVICE)
    else:
        room = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + sample, dtype=torch.bfloat16)
    qkv = room.as_strided(one.shape, (2**31, *one.stride()[1:]))
    qkv.copy_(one.detach())
    qkv = qkv.detach().requires_grad_()
    options = dict(window=(1, 4, 4), shift=(0, 0, 2))
    upstream = _upstream(one)
    near, far = (_fused(x, table, options, upstream) for x in (one, qkv))
    for name, value in near.items():
        exactness.assert_same_bits(name, far[name], value)


# -- dtypes and which gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(1, 4, 4), (2, 6, 6)], ids=["N16", "N72"])
@pytest.mark.parametrize("dtype", HALVES, ids=_name)
def test_a_float32_table_beside_half_inputs(dtype, window):
    """As under autocast. Its gradient is float32, and is summed in float32."""
    grid = (window[0], window[1], 2 * window[2])
    qkv, table = _problem(grid, window, 2, 16, dtype, batch=2, table_dtype=torch.float32)
    made = _hold_to_the_law(qkv, table, window=window, shift=(0, 0, 2))
    assert made["gradient of table"].dtype is torch.float32


@pytest.mark.parametrize("window", [(1, 4, 4), (2, 6, 6)], ids=["N16", "N72"])
@pytest.mark.parametrize("frozen", ["qkv", "table"])
def test_one_gradient_alone_has_the_bits_of_both(frozen, window):
    grid = (window[0], window[1], 2 * window[2])
    qkv, table = _problem(grid, window, 1, 16, torch.bfloat16)
    options, upstream = dict(window=window, shift=(0, 0, 2)), _upstream(qkv)
    both = _fused(qkv, table, options, upstream)
    {"qkv": qkv, "table": table}[frozen].requires_grad_(False)
    alone = _fused(qkv, table, options, upstream)
    assert len(alone) == 2
    for name, value in alone.items():
        exactness.assert_same_bits(name, value, both[name])


def test_the_table_s_gradient_is_summed_over_samples_and_windows_in_float32():
    """96 equal contributions: bfloat16 sums would be off by far more."""
    batch, window = 8, (1, 4, 4)
    qkv, table = _problem((1, 12, 16), window, 1, 16, torch.bfloat16, batch=batch, table_dtype=torch.float32)
    with torch.no_grad():
        qkv.copy_(qkv[:1, :, :4, :4].repeat(batch, 1, 3, 4, 1, 1, 1))
    upstream = _upstream(qkv[:1, :, :4, :4]).repeat(batch, 1, 3, 4, 1, 1)
    many = _fused(qkv, table, dict(window=window), upstream)["gradient of table"]
    few = qkv.detach()[:1, :, :4, :4].requires_grad_()
    one = _fused(few, table, dict(window=window), upstream[:1, :, :4, :4])["gradient of table"]
    torch.testing.assert_close(many, 96 * one, rtol=1e-5, atol=96e-5 * float(one.abs().max()))


def test_a_float64_call_is_the_reference_s():
    qkv, table = _problem((1, 4, 4), (1, 4, 4), 1, 16, torch.float64)
    runtime._warned.clear()
    with implementation("fused"), pytest.warns(UserWarning, match="window_attention.*float64"):
        out = window_attention(qkv, table, (1, 4, 4))
    assert torch.equal(out, reference(qkv, table, (1, 4, 4)))


# -- bad input ---------------------------------------------------------------------------------------------------------


def _bad(**changes):
    """A call that is right but for `changes`, on any device."""
    shape = changes.pop("shape", (2, 4, 6, 6, 3, 2, 16))
    dtype, device = changes.pop("dtype", torch.float32), changes.pop("device", "cpu")
    qkv = torch.zeros(shape, dtype=dtype, device=device)
    table = torch.zeros(changes.pop("table", (75, 2)), dtype=changes.pop("table_dtype", torch.float32))
    options: Any = {"window": (2, 3, 3), "shift": (0, 1, 1)} | changes
    return window_attention(qkv, table, **options)


BAD = {
    "rank-six": (dict(shape=(4, 6, 6, 3, 2, 16)), ["(4, 6, 6, 3, 2, 16)"]),
    "rank-eight": (dict(shape=(1, 2, 4, 6, 6, 3, 2, 16)), ["(1, 2, 4, 6, 6, 3, 2, 16)"]),
    "not-three": (dict(shape=(2, 4, 6, 6, 2, 2, 16)), ["(2, 4, 6, 6, 2, 2, 16)"]),
    "table-rank": (dict(table=(75,)), ["(75,)", "(75, 2)"]),
    "table-length": (dict(table=(74, 2)), ["(74, 2)", "(75, 2)"]),
    "table-heads": (dict(table=(75, 3)), ["(75, 3)", "(75, 2)"]),
    "devices": (dict(device="meta"), ["meta", "cpu"]),
    "integers": (dict(dtype=torch.int64), ["int64"]),
    "integer-table": (dict(table_dtype=torch.int32), ["int32"]),
    "grid": (dict(shape=(2, 4, 6, 7, 3, 2, 16)), ["(4, 6, 7)", "(2, 3, 3)"]),
    "shift-is-window": (dict(shift=(0, 3, 1)), ["(0, 3, 1)", "(2, 3, 3)"]),
    "shift-of-a-clipped-axis": (
        dict(shape=(2, 1, 6, 6, 3, 2, 16), shift=(1, 1, 1)),
        ["(1, 1, 1)", "(1, 3, 3)"],
    ),
    "negative-shift": (dict(shift=(0, -1, 1)), ["(0, -1, 1)"]),
    "mask-shift-too-large": (dict(mask_shift=(2, 1, 1)), ["(2, 1, 1)", "(2, 3, 3)"]),
    "negative-mask-shift": (dict(mask_shift=(0, 1, -2)), ["(0, 1, -2)"]),
    "no-window": (dict(window=(0, 3, 3)), ["(0, 3, 3)"]),
    "negative-window": (dict(window=(2, -3, 3)), ["(2, -3, 3)"]),
    "window-of-two": (dict(window=(3, 3)), ["(3, 3)"]),
    "shift-of-two": (dict(shift=(1, 1)), ["(1, 1)"]),
    "bias-index": (dict(bias_index="offical"), ["offical", "true", "official"]),
}


def test_the_call_below_is_right_before_it_is_changed():
    assert _bad().shape == (2, 4, 6, 6, 2, 16)


@pytest.mark.parametrize("choice", ["auto", "reference", "fused"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_with_the_numbers(name, choice):
    changes, words = BAD[name]
    with implementation(choice), pytest.raises(ValueError) as caught:
        _bad(**changes)
    said = str(caught.value)
    assert said.startswith("window_attention: ") and "\n" not in said
    for word in words:
        assert word in said, said
