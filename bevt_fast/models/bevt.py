"""Bevt: the encoder, a mask token, one decoder per stream, and one token head for both streams (SPEC 1.3 to 1.6).

Features leave a decoder on the mask grid (16-pixel cells) with width K = 8 * embed_dim, after the encoder's own final
norm, which both streams share and which fine-tuning finds again on F4 (SPEC X4).

Everything behind the encoder works row by row, so training asks for the hidden rows only (`hidden_rows`) and gets the
same numbers. Legend as in `bevt_fast.data.batch`; besides, m hidden cells of the encoder's grid, M hidden positions.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from bevt_fast.data.batch import send
from bevt_fast.errors import ConfigError
from bevt_fast.models.residual import Linear, linear
from bevt_fast.models.video_swin import (
    BiasIndex,
    ImageAttention,
    Initialisation,
    Stem,
    VideoSwin,
    VideoSwinConfig,
    initialiser,
)

STREAMS = ("images", "clips")


class HiddenRows(NamedTuple):
    """The hidden cells of one stream, as flat indices into everything that is gathered for them."""

    grid: tuple[int, ...]  # (B, [T,] gh, gw)
    cells: Int64[Tensor, "m"]  # in (B, t, gh, gw)
    corners: Int64[Tensor, "m"]  # in (B, t, gh/2, gw/2, 2, 2): the same cells where F4 is doubled in space
    frames: Int64[Tensor, "M"]  # in (m, frames of a time step): the rows that doubling time makes of them
    positions: Int64[Tensor, "M"]  # in the grid, ascending: where those rows belong


def hidden_rows(mask: Bool[Tensor, "B *t gh gw"], frames: int = 1, device: torch.device | None = None) -> HiddenRows:
    """Where the mask is True, on `device` (None: the mask's); `frames` is how many frames a time step of a clip has.

    The host has to know how many rows there are: of a mask on the CPU it does, for one on a GPU it waits here.
    """
    *outside, rows, columns = mask.shape
    grid = (*outside[:-1], outside[-1] * frames, rows, columns)  # images have no time, and one frame
    cells = mask.flatten().nonzero().flatten()
    plane, row, column = cells // (rows * columns), cells // columns % rows, cells % columns
    parent = (plane * (rows // 2) + row // 2) * (columns // 2) + column // 2
    first = cells + plane * (frames - 1) * rows * columns
    steps = torch.arange(frames, device=mask.device) * rows * columns
    positions, order = (first[:, None] + steps).flatten().sort()
    corners = parent * 4 + row % 2 * 2 + column % 2
    device = mask.device if device is None else device
    return HiddenRows(grid, *(send(rows, device) for rows in (cells, corners, order, positions)))


class MaskToken(nn.Module):
    """The learnt vector that stands where a token is hidden; one for both streams."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self) -> Tensor:
        # a copy: ZeRO-3 may put the parameter itself away as soon as this forward returns
        return self.vector.clone()


class Upsample(nn.ConvTranspose3d):
    """A transposed convolution whose kernel is its stride, on channels-last tokens: one matrix product."""

    def __init__(self, width: int, factors: tuple[int, int, int]) -> None:
        super().__init__(width, width, factors, factors)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _upsample(x, self.weight, self.bias, rows)


class ImageUpsample(nn.ConvTranspose2d):
    """The same in space alone, with the four weight axes of the official image decoder."""

    def __init__(self, width: int, factors: tuple[int, int]) -> None:
        super().__init__(width, width, factors, factors)

    def forward(self, x: Tensor, rows: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _upsample(x, self.weight[:, :, None], self.bias, rows)


class Decoder(nn.Module):
    """F3 beside the upsampled F4, fused to width K; a clip decoder also doubles time back to frames."""

    def __init__(self, width: int, upsample: nn.Module, double_time: nn.Module | None = None) -> None:
        super().__init__()
        self.upsample = upsample
        self.fuse = Linear(width + width // 2, width)
        self.double_time = double_time

    def forward(self, stage3: Tensor, stage4: Tensor, rows: HiddenRows | None = None) -> Tensor:
        """(B, t, g, g, K/2), (B, t, g/2, g/2, K) -> (B, t or T, g, g, K), or (M, K) of the given rows only; before the
        shared norm.
        """
        doubled = tuple(2 * side for side in stage4.shape[2:4])
        if stage3.shape[2:4] != doubled:
            raise ConfigError(
                f"stage 3 has the grid {tuple(stage3.shape[2:4])} but stage 4 doubles to {doubled}; "
                "choose a view size that is a multiple of 32 pixels"
            )
        up = self.upsample(stage4, None if rows is None else rows.corners)
        if rows is not None:
            stage3 = stage3.flatten(0, 3).index_select(0, rows.cells)
        # eq. 1 writes F4 first; the official weights expect F3 first
        x = self.fuse(torch.cat([stage3, up], dim=-1))
        return x if self.double_time is None else self.double_time(x, None if rows is None else rows.frames)


class Bevt(nn.Module):
    """The pretraining model. It builds the stems and decoders of the named streams only, so every parameter is used.

    `image_attention` "t1" treats an image as a clip of one time step; "official" reproduces the released weights' image
    path (SPEC X3). `bias_index` "official" reproduces the official bias of clipped windows (SPEC X2).
    """

    def __init__(
        self,
        config: VideoSwinConfig,
        vocab_size: int = 8192,
        image_attention: ImageAttention = "t1",
        bias_index: BiasIndex = "true",
        streams: Sequence[str] = STREAMS,
        initialisation: Initialisation = "normal",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not streams or not set(streams) <= set(STREAMS):
            raise ConfigError(f"Bevt has the streams {', '.join(STREAMS)}; got {', '.join(streams) or 'none'}")
        width = config.widths[-1]
        self.config, self.streams = config, tuple(streams)
        self.image_attention: ImageAttention = image_attention
        self.encoder = VideoSwin(config, bias_index, initialisation, activation_checkpointing, "clips" in streams)
        self.mask_token = MaskToken(config.embed_dim)
        self.image_stem = self.image_decoder = self.clip_decoder = None
        if "images" in streams:
            self.image_stem = Stem(config.embed_dim, config.patch[1:])
            self.image_decoder = Decoder(width, ImageUpsample(width, (2, 2)))
        if "clips" in streams:
            frames = config.patch[0]
            self.clip_decoder = Decoder(width, Upsample(width, (1, 2, 2)), Upsample(width, (frames, 1, 1)))
        self.head = nn.Linear(width, vocab_size)
        for part in (self.image_decoder, self.clip_decoder, self.head):
            if part is not None:
                part.apply(initialiser(initialisation))
        nn.init.trunc_normal_(self.mask_token.vector, std=0.02)

    def clip_features(
        self,
        pixels: Float[Tensor, "B 3 T H W"],
        mask: Bool[Tensor, "B t gh gw"] | None = None,
        rows: HiddenRows | None = None,
    ) -> Float[Tensor, "B T gh gw K"] | Float[Tensor, "M K"]:
        """Clips, hidden where the mask is True, to decoder features of every frame's cells, after the shared norm; with
        `rows` (of that mask, and `config.patch[0]` frames) those of the hidden positions only.
        """
        if self.clip_decoder is None:
            raise ConfigError("this model was built without the stream 'clips'")
        _check_sides(pixels, mask)
        mask, token = (None, None) if mask is None else (send(mask, pixels.device), self.mask_token())
        features = self.encoder.stages(pixels, mask, token)
        return self.encoder.norm(self.clip_decoder(features[2], features[3], rows))

    def image_features(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        mask: Bool[Tensor, "B gh gw"] | None = None,
        rows: HiddenRows | None = None,
    ) -> Float[Tensor, "B gh gw K"] | Float[Tensor, "M K"]:
        """Images, hidden where the mask is True, to decoder features of every cell, after the shared norm; with `rows`
        (of that mask) those of the hidden cells only.
        """
        if self.image_decoder is None:
            raise ConfigError("this model was built without the stream 'images'")
        _check_sides(pixels, mask)
        mask, token = (None, None) if mask is None else (send(mask, pixels.device), self.mask_token())
        tokens = cast(Stem, self.image_stem)(pixels, mask, token)
        features = self.encoder.stages_of(tokens[:, None], self.image_attention)
        decoded = self.encoder.norm(self.image_decoder(features[2], features[3], rows))
        return decoded[:, 0] if rows is None else decoded


def _upsample(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None) -> Tensor:
    """(B, t, h, w, K) times (K, K', p, q, r) -> (B, t p, h q, w r, K'): a token becomes a block of p q r tokens.

    With `rows`, flat indices into (tokens of x, p, q, r), only those tokens: (len(rows), K').
    """
    _, width, p, q, r = weight.shape
    # the kernel's axes go before the channels, so that a block's outputs are whole vectors
    blocks = linear(x, weight.permute(0, 2, 3, 4, 1).flatten(1).T)
    if rows is not None:
        out = blocks.view(-1, width).index_select(0, rows)
    else:
        batch, t, h, w, _ = x.shape
        blocks = blocks.view(batch, t, h, w, p, q, r, width).permute(0, 1, 4, 2, 5, 3, 6, 7)
        out = blocks.reshape(batch, t * p, h * q, w * r, width)
    return out if bias is None else out + bias


def _check_sides(pixels: Tensor, mask: Tensor | None) -> None:
    """The decoders join F3 and the doubled F4, which meet only where the sides are multiples of 32."""
    height, width = pixels.shape[-2:]
    if height % 32 or width % 32:
        raise ConfigError(
            f"a view of {height} x {width} pixels has no whole stage 4; its sides must be multiples of 32"
        )
    if mask is not None and mask.shape[-2:] != (height // 16, width // 16):
        raise ConfigError(
            f"a view of {height} x {width} pixels has {height // 16} x {width // 16} cells of 16 pixels, "
            f"but the mask has {mask.shape[-2]} x {mask.shape[-1]}"
        )
