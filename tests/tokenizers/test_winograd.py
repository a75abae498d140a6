"""3 x 3 convolutions by Winograd's filtering: as exact as torch's, for any even frames, and the official tokens."""

import pytest
import torch
from torch.nn import functional

from bevt_fast.tokenizers import _convolution, _winograd, dalle
from bevt_fast.tokenizers._winograd import BY_2, BY_4, Winograd
from bevt_kernels import products_cpu
from bevt_kernels.exactness import assert_as_exact_as_torch

CHANNELS_LAST = torch.channels_last


@pytest.fixture(autouse=True)
def full_width(monkeypatch):
    """A machine whose BLAS uses all of the processor, whichever this is."""
    monkeypatch.setattr(products_cpu, "_left_to_mkl", lambda: False)


def layer(inputs, outputs, n, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(inputs + height)
    x = torch.randn(n, inputs, height, width, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    w = torch.randn(outputs, inputs, 3, 3, generator=generator).to(dtype) / (9 * inputs) ** 0.5
    return x, w, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "filtering, inputs, outputs, n, height, width",
    [
        (BY_2, 512, 128, 6, 14, 14),
        (BY_2, 40, 72, 5, 28, 28),
        (BY_2, 7, 3, 256, 2, 2),
        (BY_2, 16, 24, 52, 2, 10),
        (BY_2, 16, 8, 9, 30, 4),
        (BY_2, 8, 8, 1, 80, 112),
        (BY_4, 512, 128, 3, 28, 28),
        (BY_4, 128, 128, 5, 56, 56),
        (BY_4, 1024, 256, 5, 12, 20),
        (BY_4, 256, 64, 64, 4, 4),
    ],
)
def test_it_is_as_exact_as_torch(filtering, inputs, outputs, n, height, width):
    assert n * height * width >= _winograd.LEAST  # of fewer nobody asks for it
    x, w, b = layer(inputs, outputs, n, height, width)
    before = x.clone()
    for relu in (True, False):
        found = Winograd.of(w, b, filtering)(x, relu)
        theirs = functional.conv2d(x, w, b, padding=1)
        truth = functional.conv2d(x.double(), w.double(), b.double(), padding=1)
        if relu:
            theirs, truth = theirs.relu(), truth.relu()
        assert found.shape == theirs.shape and found.is_contiguous(memory_format=CHANNELS_LAST)
        assert_as_exact_as_torch("winograd", found, theirs, truth)
    assert torch.equal(x, before)


@pytest.mark.parametrize("n, height, width", [(1, 4, 4), (7, 8, 12), (2, 16, 4)])
@pytest.mark.parametrize("filtering", [BY_2, BY_4], ids=["2", "4"])
def test_the_algebra_is_that_of_a_convolution(filtering, n, height, width):
    """In float64, where rounding hides nothing, and whatever the channels."""
    x, w, b = layer(5, 3, n, height, width, torch.float64)
    truth = functional.conv2d(x, w, b, padding=1)
    torch.testing.assert_close(Winograd.of(w, b, filtering)(x, relu=False), truth, rtol=0, atol=1e-13)


def test_whole_numbers_come_out_exactly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (3, 6, 8, 6), generator=generator).float().contiguous(memory_format=CHANNELS_LAST)
    w, b = torch.randint(-4, 5, (5, 6, 3, 3), generator=generator).float(), torch.arange(5.0)
    expected = functional.conv2d(x, w, b, padding=1)
    assert torch.equal(Winograd.of(w, b, BY_2)(x, relu=True), expected.relu())
    assert torch.equal(Winograd.of(w, b, BY_2)(x, relu=False), expected)


@pytest.mark.parametrize("filtering", [BY_2, BY_4], ids=["2", "4"])
def test_neither_the_frames_at_a_time_nor_memory_used_before_change_a_result(monkeypatch, filtering):
    x, w, b = layer(16, 24, 7, 8, 8, torch.float64)
    made = Winograd.of(w, b, filtering)
    whole = made(x, relu=True)
    for tiles in (1, 32, 10_000):
        monkeypatch.setattr(_winograd, "TILES", tiles)
        memory = _winograd.take(made.room(7, 8, 8), torch.float64)
        for part in memory:
            part.fill_(float("nan"))
        torch.testing.assert_close(made(x, True, memory), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, BY_2),
        ({"frames": (16, 13, 14)}, None),  # an odd side
        ({"frames": (5, 14, 14)}, None),  # too few pixels for what the weights cost
        ({"frames": (16, 28, 28)}, BY_4),
        ({"frames": (16, 28, 30)}, BY_2),
        ({"side": 1}, None),
        ({"side": 7}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"channels": (2048, 64)}, None),
        ({"channels": (256, 256)}, BY_2),
        ({"channels": (128, 128)}, None),
        ({"channels": (128, 128), "frames": (4, 56, 56)}, BY_4),
        ({"channels": (256, 64), "frames": (4, 112, 112)}, None),
    ],
)
def test_what_suits_a_layer(changes, expected):
    told = {"frames": (16, 14, 14), "side": 3, "dtype": torch.float32, "channels": (1024, 512)} | changes
    inputs, outputs = told["channels"]
    w = torch.empty(outputs, inputs, told["side"], told["side"], device="meta")
    assert _winograd.suited(w, told["dtype"], told["frames"]) is expected


def test_direct_convolutions_are_quicker_where_the_blas_uses_half_of_the_processor(monkeypatch):
    w = torch.empty(512, 1024, 3, 3, device="meta")
    assert _winograd.suited(w, torch.float32, (16, 14, 14)) is BY_2
    monkeypatch.setattr(products_cpu, "_left_to_mkl", lambda: True)
    assert _winograd.suited(w, torch.float32, (16, 14, 14)) is None


def test_the_encoder_takes_it_where_it_applies_and_names_the_same_cells(monkeypatch):
    assert _convolution.onednn_runs(torch.float32), "torch 2.13 has the operators on every x86 CPU"
    torch.manual_seed(0)
    tokenizer, calls, tiles = dalle.Dalle(hidden=16, vocab_size=64), [], Winograd._tiles
    monkeypatch.setattr(Winograd, "_tiles", lambda *a: (calls.append(a[1].shape), tiles(*a))[1])
    pixels = 0.8 * torch.rand(5, 3, 64, 48, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = tokenizer(pixels)
    assert not calls
    for name in ("BY_2", "BY_4"):
        monkeypatch.setattr(_winograd, name, getattr(_winograd, name)._replace(channels=1))
    monkeypatch.setattr(_winograd, "LEAST", 241)
    assert torch.equal(tokenizer(pixels), expected)
    sides = {shape[1] for shape in calls}
    assert sides == {64, 32, 16}, "240 pixels of the last group are too few"
