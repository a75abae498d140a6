"""What a run costs, from shapes alone: FLOPs, parameters and memory, before anything is built or read.

FLOPs are 2 x multiply-add of matrix products and convolutions, forward, as in SPEC 8.1; a training step is three times
the learnt parts (forward, and two products backward for each) and once the frozen tokenizer (SPEC 8.2). Windows that
are clipped and grids that are padded count as they are computed. The memory of activations is an estimate.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from bevt_fast.config import Config, accumulation, open_part
from bevt_fast.data import masking
from bevt_fast.data.sources import Frames
from bevt_fast.models.video_swin import VideoSwinConfig

Triple = tuple[int, int, int]
CELL = 16  # pixels, of the mask and target grid
TOKEN_CELL = 8  # the same cell in the tokenizer's half-size view
DALLE_WIDTH = 256  # n of SPEC 3.1
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MASKS = 200  # drawn for the mean share of hidden cells: strategies often fall short of their target (SPEC 2.1)


class StreamShape(NamedTuple):
    """One stream of the model: `frames` and `side` in pixels, `hidden` the mean share of cells to predict."""

    name: str
    frames: int  # 1 for images
    side: int
    hidden: float

    @property
    def cells(self) -> int:
        """Positions the decoder predicts, hidden or not."""
        return self.frames * (self.side // CELL) ** 2


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


def decoder_flops(shape: VideoSwinConfig, stream: StreamShape) -> int:
    """Space doubled, fused with stage 3, and for clips time doubled (SPEC 1.6)."""
    *_, stage3, stage4 = map(math.prod, grids(shape, stream))
    width = shape.widths[-1]
    time = 2 * stage3 * width * shape.patch[0] * width if stream.name == "clips" else 0
    return 2 * stage4 * width * 4 * width + 2 * stage3 * (width + width // 2) * width + time


def head_flops(shape: VideoSwinConfig, vocab_size: int, rows: float) -> float:
    """The token head on `rows` positions."""
    return 2 * rows * shape.widths[-1] * vocab_size


def tokenizer_flops(name: str, vocab_size: int, side: int) -> int | None:
    """One frame of the tokenizer's view, `side` pixels wide; None for a tokenizer whose layers are not known here."""
    layers = _tokenizer_layers(name, vocab_size)
    return (
        None
        if layers is None
        else sum(2 * (side // step) ** 2 * inputs * outputs * kernel**2 for inputs, outputs, kernel, step in layers)
    )


def tokenizer_parameters(name: str, vocab_size: int) -> int | None:
    """Frozen numbers; None for a tokenizer whose layers are not known here."""
    layers = _tokenizer_layers(name, vocab_size)
    return None if layers is None else sum(outputs * (inputs * kernel**2 + 1) for inputs, outputs, kernel, _ in layers)


def _tokenizer_layers(name: str, vocab_size: int) -> list[tuple[int, int, int, int]] | None:
    """Convolutions: channels in and out, kernel side, pixels between two outputs."""
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
    shape: VideoSwinConfig, stream: StreamShape, vocab_size: int, precision: str, checkpointing: bool
) -> float:
    """Estimate, good to a tenth, of what one clip or image keeps for the backward pass of plain PyTorch attention.

    With checkpointing: the inputs of all blocks, and one block that is being recomputed.
    """
    size = BYTES[precision]
    last = shape.widths[-1]
    sizes = grids(shape, stream)
    kept, largest = math.prod(sizes[0]) * shape.embed_dim * size, 0.0
    for index, (grid, width, heads, depth) in enumerate(zip(sizes, shape.widths, shape.heads, shape.depths)):
        tokens, (padded, window) = math.prod(grid), windows(shape, grid)
        # inputs of both norms and linears, q k v together, both sides of the GELU
        block = size * (tokens * width * (4 + 2 * shape.mlp_ratio) + padded * width * 4)
        # float32 logits: scaled q (and k, where it is a copy), the softmax, and its copy in low precision
        block += padded * (width * (4 if size == 4 else 8) + heads * window * (4 if size == 4 else 4 + size))
        kept += depth * (tokens * width * size if checkpointing else block)
        largest = max(largest, block)
        kept += 2 * size * 4 * width * math.prod(sizes[index + 1]) if index < 3 else 0
    fused, frames = math.prod(sizes[2]), stream.cells
    decoder = size * last * (1.5 * fused + (fused if stream.name == "clips" else 0) + frames)
    hidden = stream.hidden * stream.cells * (size * last + 4 * vocab_size)
    return kept + decoder + hidden + (largest if checkpointing else 0)


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
    """The head on hidden positions only, the tokenizer on every frame."""
    frame = tokenizer_flops(tokenizer, vocab_size, stream.side // 2)
    return Costs(
        encoder_flops(shape, stream),
        decoder_flops(shape, stream),
        head_flops(shape, vocab_size, stream.hidden * stream.cells),
        None if frame is None else frame * stream.frames,
    )


def stream_shapes(config: Config) -> list[StreamShape]:
    """The streams of a configuration: frames from the source's options, hidden share from masks as training draws."""
    shapes = []
    for name, stream in config.streams.items():
        side, frames, steps = stream.view.size, 1, None
        if name == "clips":
            options = open_part("bevt_fast.data.sources", stream.source)[1]
            frames = int(getattr(options, "frames", Frames().count))
            steps = frames // 2
        draw, grid = masking.build(stream.mask), (side // CELL, side // CELL)
        hidden = sum(float(draw(grid, steps, random.Random(number)).mean()) for number in range(MASKS)) / MASKS
        shapes.append(StreamShape(name, frames, side, hidden))
    return shapes


def step_flops(config: Config) -> float:
    """FLOPs of one step over all processes: what MFU is a share of. Recomputed activations do not count."""
    shape, vocab_size, name = VideoSwinConfig.of(config.model), codebook_size(config), config.tokenizer.name
    streams = config.streams
    return sum(streams[s.name].batch * costs(shape, s, name, vocab_size).training for s in stream_shapes(config))


def report(config: Config, world_size: int) -> str:
    """The figures of a run as text: parameters, shapes and FLOPs of every stage, the step, the memory of a process."""
    shape, vocab_size = VideoSwinConfig.of(config.model), codebook_size(config)
    counts = parameters(shape, vocab_size, tuple(config.streams))
    lines = ["learnt parameters", *(f"  {part:<14}{count:>14,}" for part, count in counts.items())]
    lines += [f"  {'sum':<14}{sum(counts.values()):>14,}"]
    frozen = tokenizer_parameters(config.tokenizer.name, vocab_size)
    lines += [f"  and {frozen:,} frozen ones of the tokenizer {config.tokenizer.name}"] if frozen else []
    for stream in stream_shapes(config):
        lines += ["", *_stream_lines(shape, stream, config.tokenizer.name, vocab_size)]
    lines += ["", *_step_lines(config, world_size), "", *_memory_lines(config, sum(counts.values()), world_size)]
    return "\n".join(lines)


def _stream_lines(shape: VideoSwinConfig, stream: StreamShape, tokenizer: str, vocab_size: int) -> list[str]:
    one, cost = stream.name.removesuffix("s"), costs(shape, stream, tokenizer, vocab_size)
    side = stream.side // CELL
    lines = [f"{stream.name}: {stream.frames} x {stream.side} x {stream.side} pixels; forward FLOPs of one {one}"]
    sizes = grids(shape, stream)
    rows: list[tuple[str, tuple[int, ...], float, str]] = []
    rows.append(("stem", (*sizes[0], shape.embed_dim), stem_flops(shape, stream), ""))
    for number, (grid, width, flops) in enumerate(zip(sizes, shape.widths, stage_flops(shape, stream)), start=1):
        used = " x ".join(str(min(pair)) for pair in zip(grid, shape.window))
        rows.append((f"stage {number}", (*grid, width), flops, f"windows of {used}"))
    rows.append(("decoder", (stream.frames, side, side, shape.widths[-1]), cost.decoder, ""))
    note = f"{stream.hidden:.1%} of {stream.cells:,} positions are hidden (mean)"
    rows.append(("token head", (round(stream.hidden * stream.cells), vocab_size), cost.head, note))
    if cost.tokenizer is not None:
        note = f"{stream.frames} frame{'s' * (stream.frames > 1)} of {stream.side // 2} x {stream.side // 2} pixels"
        rows.append(("tokenizer", (stream.frames, side, side), cost.tokenizer, note))
    for name, size, flops, note in rows:
        lines.append(f"  {name:<12}{' x '.join(map(str, size)):<22}{_flops(flops):>12}  {note}".rstrip())
    known = "and the tokenizer" if cost.tokenizer is not None else f"without the tokenizer {tokenizer}"
    return [*lines, f"  training: {_flops(cost.training)} per {one}: three times the learnt parts {known}"]


def _step_lines(config: Config, world_size: int) -> list[str]:
    batches = [
        f"{stream.batch} {name} ({accumulation(config, world_size)} x {stream.micro_batch} x {world_size})"
        for name, stream in config.streams.items()
    ]
    flops = step_flops(config)
    lines = [
        f"a step: {' and '.join(batches)}: micro-batches x micro-batch x processes",
        f"  {_flops(flops)}, {_flops(flops / world_size)} for each process",
    ]
    return lines + (
        [f"  {_flops(flops * config.train.steps)} in {config.train.steps:,} steps"] if config.train.steps else []
    )


def _memory_lines(config: Config, count: int, world_size: int) -> list[str]:
    shape, vocab_size, precision = VideoSwinConfig.of(config.model), codebook_size(config), config.train.precision
    stage = int(config.deepspeed.get("zero_optimization", {}).get("stage", 1))
    rows = state_bytes(count, precision, stage, world_size)
    streams = config.streams
    kept = 0.0
    for stream in stream_shapes(config):
        sample = activation_bytes(shape, stream, vocab_size, precision, config.model.activation_checkpointing)
        kept += streams[stream.name].micro_batch * sample
    rows[f"activations of a micro-batch{' (checkpointed)' * config.model.activation_checkpointing}"] = kept
    rows["tokenizer"] = 4 * (tokenizer_parameters(config.tokenizer.name, vocab_size) or 0)
    rows["sum"] = sum(rows.values())
    lines = [
        f"memory of a process: {precision}, ZeRO {stage}, {world_size} process{'es' * (world_size > 1)}; an estimate"
    ]
    lines += [f"  {name:<46}{size / 2**20:>12,.1f} MiB" for name, size in rows.items()]
    return [*lines, "  (temporaries, DeepSpeed's buffers and the allocator's reserve come on top)"]


def _flops(value: float) -> str:
    """Four digits and a unit."""
    power = min(max(int(math.log10(max(value, 1))) // 3, 2), 6)
    return f"{value / 1000**power:.4g} {'MGTPE'[power - 2]}FLOP"


def codebook_size(config: Config) -> int:
    options = open_part("bevt_fast.tokenizers", config.tokenizer)[1]
    return getattr(options, "vocab_size", None) or 128  # what patch_kmeans fits where its file does not say otherwise
