"""Video Swin: one encoder for clips and images (Liu et al. 2021; SPEC 1).

Legend as in `bevt_fast.data.batch`. Tokens stay channels-last, (B, t, h, w, C), from stem to last stage; an image is a
grid with t = 1. Every parameter is read inside the forward of the module that owns it, so that ZeRO-3 can gather it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevt_fast.config import Model
from bevt_fast.errors import ConfigError
from bevt_fast.models.residual import DropPath, Linear, Norm, activated, normalised
from bevt_kernels import masked_embedding, window_attention

BiasIndex = Literal["true", "official"]
ImageAttention = Literal["t1", "official"]
Initialisation = Literal["normal", "fan_in"]
Triple = tuple[int, int, int]

# SPEC 1.1; every head is 32 wide
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "heads": (3, 6, 12, 24)},
    "small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "heads": (3, 6, 12, 24)},
    "base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "heads": (4, 8, 16, 32)},
    "large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "heads": (6, 12, 24, 48)},
}


@dataclass(frozen=True, kw_only=True)
class VideoSwinConfig:
    """The shape of an encoder. `window` is the nominal one: the bias tables belong to it."""

    embed_dim: int = 128
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window: Triple = (8, 7, 7)
    patch: Triple = (2, 4, 4)
    mlp_ratio: float = 4.0
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        for stage, (width, heads) in enumerate(zip(self.widths, self.heads), start=1):
            if width % heads:
                raise ConfigError(f"model.size: stage {stage} is {width} wide, which {heads} heads cannot share evenly")

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of F1 to F4."""
        return (self.embed_dim, 2 * self.embed_dim, 4 * self.embed_dim, 8 * self.embed_dim)

    @classmethod
    def preset(cls, size: str, **changes: Any) -> "VideoSwinConfig":
        """One of `SIZES`, with other fields changed: preset("base", window=(16, 7, 7))."""
        if size not in SIZES:
            raise ConfigError(f"there is no model size {size!r}; there are: {', '.join(SIZES)}")
        return cls(**SIZES[size] | changes)

    @classmethod
    def of(cls, section: Model) -> "VideoSwinConfig":
        """The encoder that the `model` section of a configuration file describes."""
        size = SIZES[section.size] if isinstance(section.size, str) else section.size.model_dump()
        return cls(**size, window=section.window, drop_path=section.drop_path)


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm whose hidden tokens become the mask token afterwards."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        return masked_embedding(tokens, mask, self.weight, self.bias, mask_token, self.eps)


class Stem(nn.Module):
    """Pixels to tokens: convolution over whole patches, then LayerNorm (SPEC 1.2). An image stem has two patch axes."""

    def __init__(self, width: int, patch: Sequence[int]) -> None:
        super().__init__()
        self.patch = tuple(patch)
        convolution: Any = nn.Conv3d if len(self.patch) == 3 else nn.Conv2d
        self.projection = convolution(3, width, self.patch, self.patch)
        self.norm = MaskedLayerNorm(width)

    def forward(self, pixels: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 3, [T,] H, W) -> (B, [t,] h, w, C). Axes that are not whole patches are zero-padded at their end."""
        pixels = _pad(pixels, pixels.shape[2:], self.patch, channels_last=False)
        return self.norm(self.projection(pixels).movedim(1, -1), mask, mask_token)


class WindowAttention(nn.Module):
    """Multi-head attention within windows; owns the bias table of its nominal window (SPEC 1.4)."""

    def __init__(self, width: int, heads: int, window: Triple, shifted: bool, bias_index: BiasIndex) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.bias_index: BiasIndex = bias_index
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.qkv = Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def forward(self, x: Tensor, image_attention: ImageAttention = "t1", again: tuple[Tensor, ...] = ()) -> Tensor:
        """(B, t, h, w, C) -> (B, t, h, w, C). `again`: what makes x once more, if it is not to be kept."""
        t, h, w = x.shape[1:4]
        window, shift = _window_and_shift((t, h, w), self.window)
        mask_shift = shift
        if image_attention == "official":
            mask_shift = shift = _official_image_shift((h, w), self.window)
        elif not self.shifted:
            mask_shift = (0, 0, 0)
        if not self.shifted:
            shift = (0, 0, 0)

        # padded after the norm: exact zeros enter qkv, and they take part in attention (SPEC X26)
        qkv = self.qkv(
            _pad(x, (t, h, w), window), lambda *again: _pad(normalised(*again), (t, h, w), window), *again
        ).unflatten(-1, (3, self.heads, -1))
        table = self.relative_position_bias_table
        out = window_attention(qkv, table, self.window, shift, mask_shift, self.bias_index)
        return self.projection(out[:, :t, :h, :w].flatten(-2))


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, again: tuple[Tensor, ...] = ()) -> Tensor:
        """(..., C) -> (..., C). `again`: what makes x once more, if it is not to be kept."""
        return activated(self.fc1(x, normalised, *again), self.fc2)


class Block(nn.Module):
    """A pre-norm block: window attention, then MLP, each a residual branch."""

    def __init__(self, width: int, attention: WindowAttention, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attention = attention
        self.norm2 = Norm(width)
        self.mlp = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, image_attention: ImageAttention = "t1") -> Tensor:
        def attend(x: Tensor) -> Tensor:
            y, again = self.norm1(x)
            return self.attention(y, image_attention, again)

        def mix(x: Tensor) -> Tensor:
            y, again = self.norm2(x)
            return self.mlp(y, again)

        window = self.attention.window
        return self.drop_path(self.drop_path(x, attend, window), mix, window)


class PatchMerging(nn.Module):
    """Halves the grid in space and doubles the width; time stays. Odd sides are zero-padded at their end (SPEC 1.4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(4 * width)
        self.reduction = Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _pad(x, x.shape[1:4], (1, 2, 2))
        # (row, column) parities in the official order: rows change first
        corners = [x[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        y, again = self.norm(torch.cat(corners, dim=-1))
        return self.reduction(y, normalised, *again)  # (B, t, h/2, w/2, 2C)


class Stage(nn.Module):
    """Blocks of one width, every other one shifted; `merging` leads to the next stage and is called by the encoder."""

    def __init__(
        self, shape: VideoSwinConfig, index: int, bias_index: BiasIndex, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        width, before = shape.widths[index], sum(shape.depths[:index])
        rates = torch.linspace(0, shape.drop_path, sum(shape.depths), device="cpu", dtype=torch.float64).tolist()
        self.activation_checkpointing = activation_checkpointing
        self.blocks = nn.ModuleList()
        for depth in range(shape.depths[index]):
            attention = WindowAttention(width, shape.heads[index], shape.window, depth % 2 == 1, bias_index)
            self.blocks.append(Block(width, attention, int(width * shape.mlp_ratio), rates[before + depth]))
        self.merging = PatchMerging(width) if index < 3 else None

    def forward(self, x: Tensor, image_attention: ImageAttention = "t1") -> Tensor:
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, image_attention, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, image_attention)
        return x


class VideoSwin(nn.Module):
    """The encoder. `clip_stem=False` leaves the 3-D stem out, for a model that only ever sees images."""

    def __init__(
        self,
        config: VideoSwinConfig,
        bias_index: BiasIndex = "true",
        initialisation: Initialisation = "normal",
        activation_checkpointing: bool = False,
        clip_stem: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.stem = Stem(config.embed_dim, config.patch) if clip_stem else None
        self.stage = nn.ModuleList(Stage(config, i, bias_index, activation_checkpointing) for i in range(4))
        self.norm = nn.LayerNorm(config.widths[-1])
        self.apply(initialiser(initialisation))
        self.register_load_state_dict_pre_hook(_take_encoder_of_a_model)

    def stages(
        self,
        pixels: Float[Tensor, "B 3 T H W"],
        mask: Bool[Tensor, "B t gh gw"] | None = None,
        mask_token: Tensor | None = None,
    ) -> list[Float[Tensor, "B t _h _w _C"]]:
        """Clips to [F1, F2, F3, F4]: the raw residual stream after each stage's last block, before any final norm."""
        if self.stem is None:
            raise ConfigError("this encoder was built for images only; name the stream 'clips' to give it a clip stem")
        return self.stages_of(self.stem(pixels, mask, mask_token))

    def stages_of(
        self, tokens: Float[Tensor, "B t h w C"], image_attention: ImageAttention = "t1"
    ) -> list[Float[Tensor, "B t _h _w _C"]]:
        """Tokens of either stem to [F1, F2, F3, F4]; "official" attends as the official image path does (SPEC X3)."""
        features = []
        for stage in self.stage:
            tokens = stage(tokens, image_attention)
            features.append(tokens)
            if isinstance(stage.merging, PatchMerging):
                tokens = stage.merging(tokens)
        return features

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B t h w K"]:
        """Clips to F4 after the final norm."""
        return self.norm(self.stages(pixels)[-1])


def initialiser(initialisation: Initialisation):
    """What to `apply` to a module for SPEC 1.8; "fan_in" gives linear weights std 1/sqrt(inputs), for narrow models."""

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            if initialisation == "normal":
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, WindowAttention):
            nn.init.trunc_normal_(module.relative_position_bias_table, std=0.02)

    return initialise


def _take_encoder_of_a_model(_module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """An encoder on its own also loads from the names it has inside a model."""
    for key in [key for key in state_dict if not prefix and key.startswith("encoder.")]:
        state_dict[key.removeprefix("encoder.")] = state_dict.pop(key)


def _pad(x: Tensor, sizes: Sequence[int], multiple: Sequence[int], channels_last: bool = True) -> Tensor:
    """Zero-pad the ends of the grid axes to multiples; x itself when nothing is missing."""
    missing = [-size % step for size, step in zip(sizes, multiple)]
    if not any(missing):
        return x
    ends = [amount for size in reversed(missing) for amount in (0, size)]  # F.pad starts at the last axis
    return F.pad(x, [0, 0, *ends] if channels_last else ends)


def _window_and_shift(grid: Triple, window: Triple) -> tuple[Triple, Triple]:
    """The used window and shift: an axis no longer than the window is one window, unshifted (SPEC 1.4, step 2)."""
    t, h, w = (min(length, size) for length, size in zip(grid, window))
    dt, dh, dw = (size // 2 if length > size else 0 for length, size in zip(grid, window))
    return (t, h, w), (dt, dh, dw)


def _official_image_shift(sides: tuple[int, int], window: Triple) -> Triple:
    """The official image path shifts (and masks) in every stage, clipped or not, and cannot pad (SPEC X3)."""
    if sides[0] % window[1] or sides[1] % window[2]:
        raise ConfigError(
            f"image_attention 'official' needs stages whose sides are multiples of the window {window[1:]}, "
            f"but one is {sides}; use images of {32 * window[1]} x {32 * window[2]} pixels or image_attention 't1'"
        )
    return (0, window[1] // 2, window[2] // 2)
