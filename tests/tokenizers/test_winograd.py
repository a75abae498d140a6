"""3 x 3 convolutions by Winograd's filtering: as exact as torch's, for any even frames, and the official tokens."""

import pytest
import torch
from torch.nn import functional

from bevt_fast.tokenizers import _convolution, _winograd, dalle
from bevt_fast.tokenizers._winograd import Winograd
from bevt_kernels.exactness import assert_as_exact_as_torch

CHANNELS_LAST = torch.channels_last


def layer(inputs, outputs, n, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(inputs + height)
    x = torch.randn(n, inputs, height, width, generator=generator).to(dtype).contiguous(memory_format=CHANNELS_LAST)
    w = torch.randn(outputs, inputs, 3, 3, generator=generator).to(dtype) / (9 * inputs) ** 0.5
    return x, w, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize(
    "inputs, outputs, n, height, width",
    [
        (512, 128, 3, 14, 14),
        (40, 72, 5, 28, 28),
        (7, 3, 1, 2, 2),
        (16, 24, 2, 2, 10),
        (16, 8, 9, 30, 4),
        (8, 8, 1, 80, 112),
    ],
)
def test_it_is_as_exact_as_torch(inputs, outputs, n, height, width):
    x, w, b = layer(inputs, outputs, n, height, width)
    before = x.clone()
    found = Winograd.of(w, b)(x, relu=True)
    theirs = functional.conv2d(x, w, b, padding=1).relu()
    truth = functional.conv2d(x.double(), w.double(), b.double(), padding=1).relu()
    assert found.shape == theirs.shape and found.is_contiguous(memory_format=CHANNELS_LAST)
    assert_as_exact_as_torch("winograd", found, theirs, truth)
    assert torch.equal(x, before)


def test_whole_numbers_come_out_exactly():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (3, 6, 8, 6), generator=generator).float().contiguous(memory_format=CHANNELS_LAST)
    w, b = torch.randint(-4, 5, (5, 6, 3, 3), generator=generator).float(), torch.arange(5.0)
    expected = functional.conv2d(x, w, b, padding=1)
    assert torch.equal(Winograd.of(w, b)(x, relu=True), expected.relu())
    assert torch.equal(Winograd.of(w, b)(x, relu=False), expected)


def test_how_many_frames_go_at_a_time_changes_no_result(monkeypatch):
    x, w, b = layer(16, 16, 7, 8, 8)
    whole = Winograd.of(w, b)(x, relu=True)
    for tiles in (1, 32, 10_000):
        monkeypatch.setattr(_winograd, "TILES", tiles)
        assert torch.allclose(Winograd.of(w, b)(x, relu=True), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, True),
        ({"frames": (16, 13, 14)}, False),  # an odd side
        ({"frames": (2, 14, 14)}, False),  # too few tiles for what the weights cost
        ({"side": 1}, False),
        ({"side": 7}, False),
        ({"dtype": torch.bfloat16}, False),
        ({"channels": (2048, 64)}, False),
        ({"channels": (256, 256)}, True),
    ],
)
def test_where_it_applies(changes, expected):
    told = {"frames": (16, 14, 14), "side": 3, "dtype": torch.float32, "channels": (1024, 512)} | changes
    inputs, outputs = told["channels"]
    w = torch.empty(outputs, inputs, told["side"], told["side"], device="meta")
    assert _winograd.applies(w, told["dtype"], told["frames"]) is expected


def test_the_encoder_takes_it_where_it_applies_and_names_the_same_cells(monkeypatch):
    assert _convolution.onednn_runs(torch.float32), "torch 2.13 has the operators on every x86 CPU"
    torch.manual_seed(0)
    tokenizer, calls, tiles = dalle.Dalle(hidden=16, vocab_size=64), [], Winograd._tiles
    monkeypatch.setattr(Winograd, "_tiles", lambda *a: (calls.append(a[1].shape), tiles(*a))[1])
    pixels = 0.8 * torch.rand(5, 3, 64, 48, generator=torch.Generator().manual_seed(1)) + 0.1
    expected = tokenizer(pixels)
    assert not calls
    monkeypatch.setattr(_winograd, "CHANNELS", 1)
    monkeypatch.setattr(_winograd, "LEAST", 61)
    assert torch.equal(tokenizer(pixels), expected)
    sides = {shape[1] for shape in calls}
    assert sides == {64, 32, 16}, "60 tiles of the last group are too few"
