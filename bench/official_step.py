"""BEVT's pretraining step as the official program computes it, in plain eager PyTorch: what a speed is a multiple of.

Written from the SPEC alone, and apart from the model it is compared with; the only thing they share is the weights,
found here by our names. Everything the official program computes is computed: scores, bias and -100 masks exist as
tensors, dropped samples are worked out and multiplied by 0, decoder and head see every position, the tokenizer every
frame and cell. Legend as in `bevt_fast.data.batch`; a window has N tokens, nW windows cover a grid.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.models.video_swin import VideoSwinConfig

Triple = tuple[int, int, int]
Weights = Mapping[str, Tensor]
EPS = 1e-5  # SPEC, notation: of every LayerNorm
# of a block, in the order `block` reads them
BLOCK = (
    "norm1.weight", "norm1.bias", "attention.relative_position_bias_table", "attention.qkv.weight",
    "attention.qkv.bias", "attention.projection.weight", "attention.projection.bias", "norm2.weight", "norm2.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip


class Layout(NamedTuple):
    """How one block of one stream attends (SPEC 1.4, 1.5)."""

    window: Triple  # as used
    shift: Triple  # of the roll
    index: Tensor  # (N, N) rows of the bias table
    mask: Tensor | None  # (nW, N, N): 0, or -100 between regions


class Place(NamedTuple):
    """Which block: its stage, its number within the stage, its number among all."""

    stage: int
    depth: int
    number: int


def pad(x: Tensor, window: Triple) -> Tensor:
    """(B, t, h, w, C), zeros at the end of each axis up to a multiple of the window."""
    t, h, w = (-length % size for length, size in zip(x.shape[1:4], window))
    return F.pad(x, (0, 0, 0, w, 0, h, 0, t))


def window_partition(x: Tensor, window: Triple) -> Tensor:
    """(B, t, h, w, C) -> (B nW, N, C)."""
    batch, t, h, w, width = x.shape
    a, b, c = window
    split = x.view(batch, t // a, a, h // b, b, w // c, c, width)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, prod(window), width)


def window_reverse(windows: Tensor, window: Triple, grid: Sequence[int]) -> Tensor:
    """(B nW, N, C) -> (B, t, h, w, C)."""
    t, h, w = grid
    a, b, c = window
    split = windows.view(-1, t // a, h // b, w // c, a, b, c, windows.shape[-1])
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, t, h, w, windows.shape[-1])


@functools.lru_cache(maxsize=64)
def compute_mask(grid: Triple, window: Triple, shift: Triple, device: torch.device) -> Tensor:
    """(nW, N, N) of a padded grid (SPEC 1.4, attention mask)."""
    region = torch.zeros(1, *grid, 1, device=device)
    for axis, (length, size, step) in enumerate(zip(grid, window, shift)):
        place = torch.arange(length, device=device)
        label = (place >= length - size).float() + (place >= length - step).float() if step else place * 0.0
        region = region * 3 + label.view([-1 if a == axis + 1 else 1 for a in range(5)])
    regions = window_partition(region, window).squeeze(-1)
    return (regions[:, None] - regions[:, :, None] != 0) * -100.0


@functools.lru_cache(maxsize=64)
def position_index(window: Triple, tokens: Triple, device: torch.device) -> Tensor:
    """(N, N) rows of the table that belongs to `window`, for the pairs of a window of `tokens` (SPEC 1.4)."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in tokens), indexing="ij")).flatten(1)
    offsets = places[:, :, None] - places[:, None]
    rows = torch.zeros_like(offsets[0])
    for offset, size in zip(offsets, window):
        rows = rows * (2 * size - 1) + offset + size - 1
    return rows


def window_attention(x: Tensor, weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """(B nW, N, C) -> (B nW, N, C): table, qkv and projection with biases; scores, bias and mask as whole tensors."""
    table, qkv_weight, qkv_bias, out_weight, out_bias = weights
    count, tokens, width = x.shape
    heads = table.shape[1]
    qkv = F.linear(x, qkv_weight, qkv_bias).reshape(count, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0] * (width // heads) ** -0.5, qkv[1], qkv[2]
    scores = q @ k.transpose(-2, -1)
    bias = table[layout.index.reshape(-1)].reshape(tokens, tokens, heads).permute(2, 0, 1).contiguous()
    scores = scores + bias.unsqueeze(0)
    if layout.mask is not None:
        regions = len(layout.mask)
        scores = scores.view(count // regions, regions, heads, tokens, tokens) + layout.mask[:, None]
        scores = scores.view(-1, heads, tokens, tokens)
    out = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).reshape(count, tokens, width)
    return F.linear(out, out_weight, out_bias)


def attention(x: Tensor, weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """(B, t, h, w, C) after the norm, to the same: pad, roll, partition, attend, reverse, roll back, crop."""
    t, h, w = x.shape[1:4]
    x = pad(x, layout.window)
    grid = x.shape[1:4]
    if any(layout.shift):
        x = torch.roll(x, [-step for step in layout.shift], dims=(1, 2, 3))
    windows = window_attention(window_partition(x, layout.window), weights, layout)
    x = window_reverse(windows, layout.window, grid)
    if any(layout.shift):
        x = torch.roll(x, layout.shift, dims=(1, 2, 3))
    return x[:, :t, :h, :w]


def block(
    x: Tensor,
    weights: Sequence[Tensor],
    layout: Layout,
    scales: tuple[Tensor, Tensor] | None,
    attend: Callable[[Tensor, Sequence[Tensor], Layout], Tensor] = attention,
) -> Tensor:
    """A pre-norm block. `scales` (B, 1, 1, 1, 1) are 0 for the samples that drop a branch; None drops nothing."""
    norm1, norm2, mlp = weights[0:2], weights[7:9], weights[9:13]
    width = x.shape[-1:]
    branch = attend(F.layer_norm(x, width, norm1[0], norm1[1], EPS), weights[2:7], layout)
    x = x + (branch if scales is None else branch * scales[0])
    hidden = F.gelu(F.linear(F.layer_norm(x, width, norm2[0], norm2[1], EPS), mlp[0], mlp[1]))
    branch = F.linear(hidden, mlp[2], mlp[3])
    return x + (branch if scales is None else branch * scales[1])


def drop_scales(batch: int, rate: float, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """What multiplies the two branches of a block, drawn in the order of the forward pass."""
    if not rate:
        return None
    keep = 1 - rate
    drawn = [torch.empty(batch).bernoulli_(keep).div_(keep) for _ in range(2)]
    one, two = (scale.view(-1, 1, 1, 1, 1).to(like.device, like.dtype) for scale in drawn)
    return one, two


class OfficialModel:
    """Stems, encoder, decoders and loss over the weights of `Bevt.state_dict()`.

    `image_attention` and `bias_index` are our switches for the two official quirks (SPEC X3, X2), so that both sides
    are asked for the same numbers.
    """

    def __init__(
        self,
        weights: Weights,
        shape: VideoSwinConfig,
        image_attention: str = "t1",
        bias_index: str = "true",
        stream_weights: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.weights, self.shape, self.stream_weights = weights, shape, stream_weights
        self.official_images, self.clipped_index = image_attention == "official", bias_index == "official"
        self.training = True
        self.block: Callable[..., Tensor] = block
        total = sum(shape.depths)
        self.rates = [shape.drop_path * number / max(total - 1, 1) for number in range(total)]

    def step_losses(self, batch: JointBatch, ids: Targets) -> Losses:
        """The losses of a micro-batch: images first, then clips."""
        zero = torch.zeros((), device=self.weights["head.weight"].device)
        image, image_accuracy = self.stream_loss(batch.images, ids.images) if batch.images else (zero, zero)
        clip, clip_accuracy = self.stream_loss(batch.clips, ids.clips) if batch.clips else (zero, zero)
        total = self.stream_weights[0] * image + self.stream_weights[1] * clip
        return Losses(total, image, clip, image_accuracy, clip_accuracy)

    def stream_loss(self, stream: Images | Clips, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of every position, then those of the hidden ones: mean cross-entropy and accuracy (SPEC 4)."""
        assert ids is not None
        features = self.decode(stream, *self.stages(stream)[2:])
        logits = F.linear(features, self.weights["head.weight"], self.weights["head.bias"])
        hidden = stream.mask.to(logits.device)
        if isinstance(stream, Clips):
            hidden = hidden.repeat_interleave(self.shape.patch[0], dim=1)
        logits, ids = logits[hidden], ids[hidden]
        return F.cross_entropy(logits.float(), ids), (logits.argmax(-1) == ids).float().mean()

    def stem(self, stream: Images | Clips) -> Tensor:
        """Pixels to tokens (B, t, h, w, C), the mask token where they are hidden (SPEC 1.2, 1.3)."""
        clips = isinstance(stream, Clips)
        name, patch = ("encoder.stem", self.shape.patch) if clips else ("image_stem", self.shape.patch[1:])
        missing = [-length % size for length, size in zip(stream.pixels.shape[2:], patch)]
        pixels = F.pad(stream.pixels, [end for size in reversed(missing) for end in (0, size)])
        convolve = F.conv3d if clips else F.conv2d
        x = convolve(pixels, *self.pair(f"{name}.projection"), stride=patch)  # pyright: ignore[reportArgumentType]
        x = self.norm(x.flatten(2).transpose(1, 2), f"{name}.norm").view(len(x), *x.shape[2:], -1)
        mask = stream.mask.to(x.device)
        for axis in (-1, -2):
            mask = mask.repeat_interleave(x.shape[axis - 1] // mask.shape[axis], dim=axis)
        hidden = mask.unsqueeze(-1).type_as(x)
        x = x * (1 - hidden) + self.weights["mask_token.vector"].view(-1).type_as(x) * hidden
        return x if clips else x[:, None]

    def stages(self, stream: Images | Clips) -> list[Tensor]:
        """F1 to F4."""
        x, number, features = self.stem(stream), 0, []
        official = self.official_images and isinstance(stream, Images)
        for stage, depth in enumerate(self.shape.depths):
            for position in range(depth):
                x = self.run_block(x, Place(stage, position, number), official)
                number += 1
            features.append(x)
            if stage < 3:
                x = self.merge(x, f"encoder.stage.{stage}.merging")
        return features

    def run_block(self, x: Tensor, place: Place, official: bool) -> Tensor:
        rate = self.rates[place.number] if self.training else 0.0
        grid = (x.shape[1], x.shape[2], x.shape[3])
        layout = self.layout(grid, place.depth % 2 == 1, official, x.device)
        prefix = f"encoder.stage.{place.stage}.blocks.{place.depth}."
        weights = tuple(self.weights[prefix + name] for name in BLOCK)
        return self.block(x, weights, layout, drop_scales(len(x), rate, x))

    def layout(self, grid: Triple, odd: bool, official: bool, device: torch.device) -> Layout:
        """Window, shift, bias rows and mask of a block (SPEC 1.4); of the official image path, with its quirks (X3)."""
        nominal = self.shape.window
        used = tuple(min(size, length) for size, length in zip(nominal, grid))
        shift = tuple(size // 2 if length > size else 0 for size, length in zip(nominal, grid))
        if official:
            shift = (0, nominal[1] // 2, nominal[2] // 2)
        padded = tuple(-(-length // size) * size for length, size in zip(grid, used))
        masked = any(shift) and (odd or official)
        mask = compute_mask(padded, used, shift, device) if masked else None  # pyright: ignore[reportArgumentType]
        tokens = prod(used)
        index = position_index(nominal, nominal if self.clipped_index else used, device)  # pyright: ignore[reportArgumentType]
        return Layout(used, shift if odd else (0, 0, 0), index[:tokens, :tokens], mask)  # pyright: ignore[reportArgumentType]

    def merge(self, x: Tensor, name: str) -> Tensor:
        """Patch merging (SPEC 1.4)."""
        x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
        corners = [x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]]
        return F.linear(self.norm(torch.cat(corners, -1), f"{name}.norm"), self.weights[f"{name}.reduction.weight"])

    def decode(self, stream: Images | Clips, stage3: Tensor, stage4: Tensor) -> Tensor:
        """Every position's features after the shared norm: (B, g, g, K) or (B, T, g, g, K) (SPEC 1.6)."""
        clips = isinstance(stream, Clips)
        name, convolve = ("clip_decoder", F.conv_transpose3d) if clips else ("image_decoder", F.conv_transpose2d)
        stage3, stage4 = ((x if clips else x[:, 0]).movedim(-1, 1) for x in (stage3, stage4))
        steps = (1, 2, 2) if clips else (2, 2)
        up = convolve(stage4, *self.pair(f"{name}.upsample"), stride=steps)  # pyright: ignore[reportArgumentType]
        x = F.linear(torch.cat([stage3.to(up.dtype), up], 1).movedim(1, -1), *self.pair(f"{name}.fuse"))
        if clips:
            steps = (self.shape.patch[0], 1, 1)
            x = F.conv_transpose3d(x.movedim(-1, 1), *self.pair(f"{name}.double_time"), stride=steps).movedim(1, -1)
        return self.norm(x, "encoder.norm")

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.pair(name), EPS)
