"""What a run costs, from shapes alone: FLOPs, parameters and memory, before anything is built or read.

FLOPs are 2 x multiply-add of matrix products and convolutions, forward, as in SPEC 8.1; a training step is three times
the learnt parts (forward, and two products backward for each) and once the frozen tokenizer (SPEC 8.2). Windows that
are clipped and grids that are padded count as they are computed. The memory of activations is an estimate.

There are two counts, and one function for both. Necessary is what the program computes: decoder, head and tokenizer
leave out, exactly, what only visible cells need. Nominal is what the official program computes (SPEC 8.2, row A): the
same function of a stream with everything hidden. How fast a GPU works (MFU) is a matter of the necessary count alone.
"""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from bevt_fast.config import Config, open_part
from bevt_fast.data import masking
from bevt_fast.data.sources import Frames
from bevt_fast.models.video_swin import VideoSwinConfig

Triple = tuple[int, int, int]
Answer = Literal["fused", "chunks", "reference"]  # kernels; a CPU's attention, a few windows at a time; plain PyTorch
CELL = 16  # pixels, of the mask and target grid
TOKEN_CELL = 8  # the same cell in the tokenizer's half-size view
DALLE_WIDTH = 256  # n of SPEC 3.1
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = 1000  # drawn for mean shares: strategies often fall short of their target (SPEC 2.1), a tube's length is random
TILE = {"bf16": 64, "fp16": 64, "fp32": 32}  # tokens of a window are kept in whole tiles of the fused attention


class StreamShape(NamedTuple):
    """One stream of the model, and the mean shares of what its masks make necessary."""

    name: str
    frames: int  # 1 for images
    side: int  # pixels
    hidden: float  # of the cells: what is predicted
    tokenized: float = 1.0  # of the frames: those with a hidden cell
    cached: bool = False  # the tokenizer has been asked before

    @property
    def cells(self) -> int:
        """Positions the decoder could predict."""
        return self.frames * (self.side // CELL) ** 2

    @property
    def all_hidden(self) -> "StreamShape":
        """The stream whose necessary work is the nominal one."""
        return self._replace(hidden=1.0, tokenized=1.0, cached=False)


def grids(shape: VideoSwinConfig, stream: StreamShape) -> list[Triple]:
    """The token grid (t, h, w) of every stage; ends of odd axes are padded (SPEC 1.2, 1.4)."""
    t = 1 if stream.name == "images" else math.ceil(stream.frames / shape.patch[0])
    sides = [(math.ceil(stream.side / shape.patch[1]), math.ceil(stream.side / shape.patch[2]))]
    while len(sides) < 4:
        sides.append((math.ceil(sides[-1][0] / 2), math.ceil(sides[-1][1] / 2)))
    return [(t, h, w) for h, w in sides]


def windows(shape: VideoSwinConfig, grid: Triple) -> tuple[int, int]:
    """Tokens of the padded grid, and tokens of one window, after clipping (SPEC 1.4)."""
    used = [min(length, size) for length, size in zip(grid, shape.window)]
    return math.prod(math.ceil(length / size) * size for length, size in zip(grid, used)), math.prod(used)


def stem_flops(shape: VideoSwinConfig, stream: StreamShape) -> int:
    patch = shape.patch if stream.name == "clips" else shape.patch[1:]
    return 2 * 3 * math.prod(patch) * shape.embed_dim * math.prod(grids(shape, stream)[0])


def stage_flops(shape: VideoSwinConfig, stream: StreamShape) -> list[int]:
    """The blocks of each stage, and the merging behind it."""
    flops = []
    sizes = grids(shape, stream)
    for index, (grid, width, depth) in enumerate(zip(sizes, shape.widths, shape.depths)):
        tokens, (padded, window) = math.prod(grid), windows(shape, grid)
        qkv, scores = 2 * padded * width * 3 * width, 2 * 2 * padded * window * width
        projection, mlp = 2 * tokens * width**2, 2 * 2 * tokens * width * int(width * shape.mlp_ratio)
        merging = 2 * math.prod(sizes[index + 1]) * 4 * width * 2 * width if index < 3 else 0
        flops.append(depth * (qkv + scores + projection + mlp) + merging)
    return flops


def encoder_flops(shape: VideoSwinConfig, stream: StreamShape) -> int:
    """One clip or image, forward."""
    return stem_flops(shape, stream) + sum(stage_flops(shape, stream))


def decoder_flops(shape: VideoSwinConfig, stream: StreamShape) -> float:
    """Space doubled, then on hidden cells fused with stage 3, and for clips time doubled (SPEC 1.6).

    Doubling space is one product for all of stage 4, whatever is hidden.
    """
    *_, stage3, stage4 = map(math.prod, grids(shape, stream))
    width = shape.widths[-1]
    time = 2 * stage3 * width * shape.patch[0] * width if stream.name == "clips" else 0
    return 2 * stage4 * width * 4 * width + stream.hidden * (2 * stage3 * (width + width // 2) * width + time)


def head_flops(shape: VideoSwinConfig, vocab_size: int, rows: float) -> float:
    """The token head on `rows` positions."""
    return 2 * rows * shape.widths[-1] * vocab_size


def tokenizer_flops(name: str, vocab_size: int, stream: StreamShape) -> float | None:
    """Frames with a hidden cell, and of the last layer hidden cells only; None for a tokenizer whose layers are not
    known here.
    """
    layers = _tokenizer_layers(name, vocab_size)
    if layers is None:
        return None
    if stream.cached:
        return 0.0
    side = stream.side // 2
    *body, last = (2 * (side // step) ** 2 * inputs * outputs * kernel**2 for inputs, outputs, kernel, step in layers)
    return stream.frames * (stream.tokenized * sum(body) + stream.hidden * last)


def tokenizer_parameters(name: str, vocab_size: int) -> int | None:
    """Frozen numbers; None for a tokenizer whose layers are not known here."""
    layers = _tokenizer_layers(name, vocab_size)
    return None if layers is None else sum(outputs * (inputs * kernel**2 + 1) for inputs, outputs, kernel, _ in layers)


def _tokenizer_layers(name: str, vocab_size: int) -> list[tuple[int, int, int, int]] | None:
    """Convolutions: channels in and out, kernel side, pixels between two outputs. The last one scores the ids."""
    if name == "patch_kmeans":
        return [(3, vocab_size, TOKEN_CELL, TOKEN_CELL)]
    if name != "dalle":
        return None
    layers, width = [(3, DALLE_WIDTH, 7, 1)], DALLE_WIDTH
    for group in range(4):  # SPEC 3.1
        outputs, step = DALLE_WIDTH << group, 1 << group
        inner = outputs // 4
        for inputs in (width, outputs):
            layers += [(inputs, outputs, 1, step)] if inputs != outputs else []
            layers += [
                (inputs, inner, 3, step),
                (inner, inner, 3, step),
                (inner, inner, 3, step),
                (inner, outputs, 1, step),
            ]
        width = outputs
    return [*layers, (width, vocab_size, 1, TOKEN_CELL)]


def parameters(shape: VideoSwinConfig, vocab_size: int, streams: Sequence[str] = ("images", "clips")) -> dict[str, int]:
    """Learnt numbers by part of the pretraining model with these streams."""
    first, last = shape.embed_dim, shape.widths[-1]
    rows = math.prod(2 * size - 1 for size in shape.window)
    stages = 0
    for index, (width, heads, depth) in enumerate(zip(shape.widths, shape.heads, shape.depths)):
        hidden = int(width * shape.mlp_ratio)
        attention = 4 * width * (width + 1) + rows * heads
        stages += depth * (attention + 2 * width * hidden + hidden + width + 2 * 2 * width)
        stages += 8 * width**2 + 2 * 4 * width if index < 3 else 0
    decoder = 4 * last**2 + last + (last + last // 2) * last + last
    counts = {}
    if "clips" in streams:
        counts["clip stem"] = 3 * math.prod(shape.patch) * first + 3 * first
    if "images" in streams:
        counts["image stem"] = 3 * math.prod(shape.patch[1:]) * first + 3 * first
    counts |= {"mask token": first, "four stages": stages, "final norm": 2 * last}
    if "images" in streams:
        counts["image decoder"] = decoder
    if "clips" in streams:
        counts["clip decoder"] = decoder + shape.patch[0] * last**2 + last
    return counts | {"token head": last * vocab_size + vocab_size}


def state_bytes(count: int, precision: str, zero_stage: int, world_size: int) -> dict[str, float]:
    """Bytes of one process for `count` parameters. ZeRO 1 shares out the optimizer, 2 the gradients too, 3 all."""
    size = BYTES[precision]
    share = [1 / world_size if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    # every DeepSpeed optimizer but the plain float32 one keeps its own float32 weights
    copy = 0 if precision == "fp32" and zero_stage == 0 else 4
    return {
        "weights": size * count * share[2],
        "gradients": size * count * share[1],
        "optimizer (float32 weights and two moments)": (copy + 8) * count * share[0],
    }


def activation_bytes(
    shape: VideoSwinConfig, stream: StreamShape, vocab_size: int, precision: str, checkpointing: bool, answer: Answer
) -> float:
    """Estimate, good to a tenth, of what one clip or image keeps for the backward pass; `answer` says who attends and
    scores.

    With checkpointing: the inputs of all blocks, and one block that is being recomputed.
    """
    size, last = BYTES[precision], shape.widths[-1]
    sizes = grids(shape, stream)
    # the pixels, and what the stem makes of them
    kept, largest = size * (3 * stream.frames * stream.side**2 + math.prod(sizes[0]) * shape.embed_dim), 0.0
    for index, (grid, width, heads, depth) in enumerate(zip(sizes, shape.widths, shape.heads, shape.depths)):
        tokens, (padded, window) = math.prod(grid), windows(shape, grid)
        # inputs of both branches and of the GELU, q k v together, what attention gives
        block = size * (tokens * width * (2 + shape.mlp_ratio) + padded * width * 4)
        if answer == "fused":  # the logarithm of each softmax's sum
            block += padded * heads * 4 * math.ceil(window / TILE[precision]) * TILE[precision] / window
        elif (
            answer == "reference"
        ):  # float32 logits: scaled q (and k, where it is a copy), the softmax, and its copy in low precision
            block += padded * (width * (4 if size == 4 else 8) + heads * window * (4 if size == 4 else 4 + size))
        kept += depth * (tokens * width * size if checkpointing else block)
        largest = max(largest, block)
        kept += size * 4 * width * math.prod(sizes[index + 1]) if index < 3 else 0
    fuse, double_time = 1.5 * math.prod(sizes[2]), math.prod(sizes[2]) if stream.name == "clips" else 0
    kept += size * last * (math.prod(sizes[3]) + stream.hidden * (fuse + double_time))
    # the final norm's input; the head's, and its log-softmax, or in one the gradient that is already known
    positions = stream.hidden * stream.cells
    kept += positions * (2 * size * last + (0 if answer == "fused" else 4 * vocab_size))
    return kept + (largest if checkpointing else 0)


def head_gradient_bytes(shape: VideoSwinConfig, vocab_size: int) -> int:
    """What the fused cross-entropy keeps of one stream beside the activations: its share of the head's gradient."""
    return 4 * (shape.widths[-1] + 1) * vocab_size


class Costs(NamedTuple):
    """Forward FLOPs of one clip or image; `tokenizer` is all its frames, None where not known."""

    encoder: float
    decoder: float
    head: float
    tokenizer: float | None

    @property
    def training(self) -> float:
        """Forward and backward (SPEC 8.2)."""
        return 3 * (self.encoder + self.decoder + self.head) + (self.tokenizer or 0)


def costs(shape: VideoSwinConfig, stream: StreamShape, tokenizer: str, vocab_size: int) -> Costs:
    """The necessary FLOPs: SPEC 8.2 row C, less the decoder's rows and the tokenizer's scores of visible cells."""
    return Costs(
        encoder_flops(shape, stream),
        decoder_flops(shape, stream),
        head_flops(shape, vocab_size, stream.hidden * stream.cells),
        tokenizer_flops(tokenizer, vocab_size, stream),
    )


def nominal_costs(shape: VideoSwinConfig, stream: StreamShape, tokenizer: str, vocab_size: int) -> Costs:
    """The FLOPs of the official program: SPEC 8.2 row A."""
    return costs(shape, stream.all_hidden, tokenizer, vocab_size)


def mean_shares(masks: Iterable[np.ndarray]) -> tuple[float, float]:
    """Of masks as the loader draws them, ([t,] g, g): the share of hidden cells, and of frames that have one."""
    planes = np.concatenate([mask.reshape(-1, *mask.shape[-2:]) for mask in masks])
    return float(planes.mean()), float(planes.any(axis=(1, 2)).mean())


def stream_shapes(config: Config) -> list[StreamShape]:
    """The streams of a configuration: frames from the source's options, shares from masks as training draws them."""
    shapes = []
    for name, stream in config.streams.items():
        side, frames, steps = stream.view.size, 1, None
        if name == "clips":
            options = open_part("bevt_fast.data.sources", stream.source)[1]
            frames = int(getattr(options, "frames", Frames().count))
            steps = frames // 2
        draw, grid = masking.build(stream.mask), (side // CELL, side // CELL)
        shares = mean_shares(draw(grid, steps, random.Random(number)) for number in range(MASKS))
        shapes.append(StreamShape(name, frames, side, *shares, cached=config.data.token_cache is not None))
    return shapes


class StepFlops(NamedTuple):
    """Of one step over all processes. Activations that are computed twice count once."""

    necessary: float  # what MFU is a share of
    nominal: float


def step_flops(config: Config, streams: Sequence[StreamShape] | None = None) -> StepFlops:
    """`streams`: those of the configuration, where they are known already."""
    shape, name, vocab_size = VideoSwinConfig.of(config.model), config.tokenizer.name, codebook_size(config)
    streams = stream_shapes(config) if streams is None else streams
    return StepFlops(
        *(
            sum(
                config.streams[stream.name].batch * count(shape, stream, name, vocab_size).training
                for stream in streams
            )
            for count in (costs, nominal_costs)
        )
    )


def codebook_size(config: Config) -> int:
    options = open_part("bevt_fast.tokenizers", config.tokenizer)[1]
    return getattr(options, "vocab_size", None) or 128  # what patch_kmeans fits where its file does not say otherwise
