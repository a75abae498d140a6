"""Video Swin: one encoder for clips and images (Liu et al. 2021; SPEC 1).

Legend as in `bevt_fast.data.batch`. Tokens stay channels-last, (B, t, h, w, C), from stem to last stage; an image is a
grid with t = 1. Every parameter is read inside the forward of the module that owns it, so that ZeRO-3 can gather it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bevt_fast.config import Model
from bevt_fast.errors import ConfigError
from bevt_fast.models.compiled import Compiled, is_wanted
from bevt_fast.models.grids import Triple, official_image_shift, pad, window_and_shift
from bevt_fast.models.mlp import MLP
from bevt_fast.models.residual import DropPath, Linear, Norm, normalised
from bevt_kernels import masked_embedding, window_attention

BiasIndex = Literal["true", "official"]
ImageAttention = Literal["t1", "official"]
Initialisation = Literal["normal", "fan_in"]

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
        pixels = pad(pixels, pixels.shape[2:], self.patch, channels_last=False)
        return self.norm(self.projection(pixels).movedim(1, -1), mask, mask_token)


class WindowAttention(nn.Module):
    """Multi-head attention within windows; owns the bias table of its nominal window (SPEC 1.4)."""

    def __init__(self, width: int, heads: int, window: Triple, shifted: bool, bias_index: BiasIndex) -> None:
        super().__init__()
        self.heads, self.window, self.shifted = heads, window, shifted
        self.bias_index: BiasIndex = bias_index
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        self.qkv = Linear(width, 3 * width)
        self.projection = Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))

    def forward(
        self,
        x: Tensor,
        image_attention: ImageAttention = "t1",
        again: tuple[Tensor, ...] = (),
        qkv: Tensor | None = None,
    ) -> Tensor:
        """(B, t, h, w, C) -> (B, t, h, w, C). `again`: what makes x once more, if it is not to be kept; `qkv`: what
        the layer of that name makes of a grid that is not padded, where it is there already.
        """
        t, h, w = x.shape[1:4]
        window, shift = window_and_shift((t, h, w), self.window)
        mask_shift = shift
        if image_attention == "official":
            mask_shift = shift = official_image_shift((h, w), self.window)
        elif not self.shifted:
            mask_shift = (0, 0, 0)
        if not self.shifted:
            shift = (0, 0, 0)

        if qkv is None:
            # padded after the norm: exact zeros enter qkv, and they take part in attention (SPEC X26)
            y: Tensor = pad(x, (t, h, w), window)
            y = self.qkv(y, lambda *again: pad(normalised(*again), (t, h, w), window), *again)
        else:
            y = qkv
        table = self.relative_position_bias_table
        heads = y.unflatten(-1, (3, self.heads, -1))
        out = window_attention(heads, table, self.window, shift, mask_shift, self.bias_index)
        return self.projection(out[:, :t, :h, :w].flatten(-2))

    def pads(self, grid: Sequence[int]) -> bool:
        """Whether the windows do not fill a (t, h, w) grid."""
        return any(length % min(length, size) for length, size in zip(grid, self.window))


class Block(nn.Module):
    """A pre-norm block: window attention, then MLP, each a residual branch."""

    def __init__(self, width: int, attention: WindowAttention, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = Norm(width)
        self.attention = attention
        self.norm2 = Norm(width)
        self.mlp = MLP(width, hidden)
        self.drop_path = DropPath(drop_path)
        self.compiled: Compiled | None = None

    def forward(self, x: Tensor, image_attention: ImageAttention = "t1") -> Tensor:
        compiled = self.compiled if is_wanted() else None

        def attend(x: Tensor) -> Tensor:
            if compiled and not self.attention.pads(x.shape[1:4]):
                qkv = compiled.projected(x, self.norm1, self.attention.qkv)
                return self.attention(x, image_attention, qkv=qkv)
            y, again = self.norm1(x)
            return self.attention(y, image_attention, again)

        def mix(x: Tensor) -> Tensor:
            if compiled:
                return compiled.mixed(x, self.norm2, self.mlp)
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
        x = pad(x, x.shape[1:4], (1, 2, 2))
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

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Train with the blocks under torch.compile (`compiled`); names and numbers of the weights stay."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compiled = Compiled(backend)

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
