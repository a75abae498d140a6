"""Useful FLOP and fewest bytes of a call, read off its arguments: every input once, every output once, no padding.

The denominators of a figure in TFLOP/s and of a share of the memory roof.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn

# Swin-B: heads of a stage -> (its number, blocks in it, side of its grid at 224 pixels); half of the blocks are shifted
STAGES = {4: (1, 2, 56), 8: (2, 2, 28), 16: (3, 18, 14), 32: (4, 2, 7)}


class Work(NamedTuple):
    """FLOP and bytes of one pass."""

    flop: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Work(self.flop + other.flop, self.bytes + other.bytes)


class Place(NamedTuple):
    """Which block of Swin-B a call of window_attention is."""

    stream: str  # "8 clips of 16 frames", "64 images"
    stage: int
    blocks: int  # of this stage, shifted and unshifted together
    shifted: bool


def work(name: str, arguments: Sequence[Any]) -> dict[str, Work]:
    """By mode: forward, backward, both. Empty for a function it knows nothing about."""
    if name == "window_attention":
        found = _attention(arguments[0], arguments[2])
    elif name == "masked_cross_entropy":
        found = _cross_entropy(*arguments[:4])
    elif name == "masked_embedding":
        size = arguments[0].nbytes
        found = (Work(0, 2 * size), Work(0, 3 * size))
    elif name == "codebook_argmax":
        features, weight, _, mask = _filled(arguments, (None,) * 4)
        rows = features[..., 0].numel() if mask is None else int(mask.sum())
        size = rows * features.shape[-1] * features.itemsize + weight.nbytes + 8 * rows
        return {"forward": Work(2.0 * rows * weight.numel(), size)}
    else:
        return {}
    return {"forward": found[0], "backward": found[1], "both": found[0] + found[1]}


def place(name: str, arguments: Sequence[Any]) -> Place | None:
    """Where in Swin-B at 224 pixels this call stands; None elsewhere."""
    if name != "window_attention":
        return None
    qkv, _, window, shift, mask_shift, bias_index = _filled(arguments, (None, None, None, (0, 0, 0), None, "true"))
    batch, t, h, w, _, heads, width = qkv.shape
    stage, blocks, side = STAGES.get(heads, (0, 0, 0))
    usual = (mask_shift is None or tuple(mask_shift) == tuple(shift)) and bias_index == "true"
    if (h, w) != (side, side) or width != 32 or not usual or tuple(window[1:]) != (7, 7) or t not in (1, 8, 16):
        return None
    if t > window[0]:
        return None
    stream = f"{batch} images" if t == 1 else f"{batch} clips of {2 * t} frames"
    return Place(stream, stage, blocks, any(shift))


def weights(places: Sequence[Place]) -> list[float]:
    """How many of the 24 blocks each place stands for: half of a stage, or all where the other half is missing."""
    kinds = {(p.stage, p.shifted) for p in places}
    return [p.blocks / 2 if (p.stage, not p.shifted) in kinds else float(p.blocks) for p in places]


def _filled(arguments: Sequence[Any], defaults: Sequence[Any]) -> list[Any]:
    """Positional arguments, the missing last ones from their defaults."""
    return [*arguments, *defaults[len(arguments) :]]


def _attention(qkv: Tensor, window: Sequence[int]) -> tuple[Work, Work]:
    batch, t, h, w, _, heads, width = qkv.shape
    tokens = prod(min(a, b) for a, b in zip((t, h, w), window))
    scores = batch * t * h * w * heads * tokens
    out = qkv.nbytes / 3
    # forward reads qkv and writes out; backward reads qkv, out and its gradient and writes the gradient of qkv
    return Work(4.0 * width * scores, 4 * out), Work(10.0 * width * scores, 8 * out)


def _cross_entropy(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None) -> tuple[Work, Work]:
    weight = max(head.parameters(), key=lambda p: p.numel())
    rows = features[..., 0].numel() if mask is None else int(mask.sum())
    gathered = rows * features.shape[-1] * features.itemsize
    product = 2.0 * rows * weight.numel()
    forward = Work(product, gathered + weight.nbytes + 8 * rows)
    return forward, Work(2 * product, gathered + features.nbytes + 2 * weight.nbytes)
