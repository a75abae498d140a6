"""The least time a step could take: every part bound by its products, its memory traffic or its exponentials.

Arithmetic from shapes and data sheets. A part is what one kernel could do at best: it reads every input once, writes
every output once, and its three units work at the same time, so that the slowest of them is its time. Parts run one
after another. A run cannot be faster; how near it comes, only a measurement says.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bevt_fast.config import Config, accumulation
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import estimate, memory
from bevt_fast.training.estimate import BYTES, StreamShape
from bevt_fast.training.gpus import Gpu

GOAL = 0.40  # of the peak, counting necessary FLOPs only


class Work(NamedTuple):
    """What one kernel has to do."""

    flops: float
    bytes: float = 0.0
    exponentials: float = 0.0

    def seconds(self, gpu: Gpu, precision: str) -> float:
        memory, special = self.bytes / (gpu.bandwidth * 1e12), self.exponentials / gpu.special
        return max(self.flops / gpu.sustained(precision), memory, special)


def block_parts(
    shape: VideoSwinConfig, stream: StreamShape, size: int
) -> tuple[list[tuple[Work, Work]], list[tuple[Work, Work]]]:
    """Forward and backward of everything but attention, and of attention, for the blocks of all stages.

    Residuals are added, biases and GELU computed where a product ends; norms read and write. The backward pass reads
    what the forward pass kept, and computes LayerNorm and GELU again.
    """
    rest, attention = [], []
    sizes = estimate.grids(shape, stream)
    for index, (grid, width, heads, depth) in enumerate(zip(sizes, shape.widths, shape.heads, shape.depths)):
        tokens, (padded, window) = math.prod(grid), estimate.windows(shape, grid)
        row, ratio = tokens * width * size, shape.mlp_ratio  # bytes of one tensor of the grid
        wide, product = padded * width * size, 2.0 * tokens * width**2
        linear = [
            (2.0 * padded * width * 3 * width, 4 * wide, 8 * wide),  # q, k, v together
            (product, 3 * row, 4 * row),  # projection, and the residual
            (ratio * product, (1 + 2 * ratio) * row, (2 + 2 * ratio) * row),  # fc1: keeps what comes before the GELU
            (ratio * product, (2 + ratio) * row, (2 + 4 * ratio) * row),  # fc2, the residual, the GELU backward
        ]
        one = [(Work(flops, read), Work(2 * flops, back)) for flops, read, back in linear]
        one += 2 * [(Work(0, 2 * row), Work(0, 4 * row))]  # two norms; backward adds the residual's gradient
        rest += depth * one
        scores = float(padded * window)
        forward = Work(4 * width * scores, 4 * wide, heads * scores)
        attention += depth * [(forward, Work(10 * width * scores, 8 * wide, heads * scores))]
        if index < 3:
            merged = math.prod(sizes[index + 1]) * 4 * width * size
            flops = 2.0 * math.prod(sizes[index + 1]) * 4 * width * 2 * width
            rest.append((Work(flops, 3.5 * merged), Work(2 * flops, 7 * merged)))
    return rest, attention


def sample_seconds(
    config: Config, stream: StreamShape, gpu: Gpu, nominal: bool = False, recompute: bool | None = None
) -> dict[str, float]:
    """Least seconds of one clip or image, forward and backward, by part. `nominal` leaves nothing out that the official
    program computes; `recompute` is whether blocks run forward twice, by default as the configuration says.
    """
    precision, vocab_size = config.train.precision, estimate.codebook_size(config)
    shape, size = VideoSwinConfig.of(config.model), BYTES[precision]
    again = 1 + (config.model.activation_checkpointing if recompute is None else recompute)

    def seconds(parts: list[tuple[Work, Work]]) -> float:
        return sum(again * one.seconds(gpu, precision) + two.seconds(gpu, precision) for one, two in parts)

    rest, attention = block_parts(shape, stream, size)
    count = estimate.nominal_costs if nominal else estimate.costs
    cost = count(shape, stream, config.tokenizer.name, vocab_size)
    # wide products, whose logits never leave the second-level cache
    ends = Work(3 * (cost.decoder + cost.head)).seconds(gpu, precision)
    return {
        "stem": _stem_seconds(shape, stream, size, gpu, precision),
        "products, norms and GELU of the blocks": seconds(rest),
        "attention": seconds(attention),
        "decoder and token head": ends,
        # float16 on a GPU whatever the model is in
        "tokenizer": Work(cost.tokenizer or 0.0).seconds(gpu, "fp16"),
    }


def _stem_seconds(shape: VideoSwinConfig, stream: StreamShape, size: int, gpu: Gpu, precision: str) -> float:
    """A convolution over whole patches and a norm; nobody asks for the gradient of the pixels."""
    pixels = 3 * stream.frames * stream.side**2 * size
    row = math.prod(estimate.grids(shape, stream)[0]) * shape.embed_dim * size
    flops = estimate.stem_flops(shape, stream)
    products = (Work(flops, pixels + row), Work(flops, pixels + row), Work(0, 2 * row), Work(0, 3 * row))
    return sum(part.seconds(gpu, precision) for part in products)


def optimizer_seconds(config: Config, gpu: Gpu, world_size: int) -> float:
    """AdamW reads and writes float32 weights and two moments, reads gradients and writes the weights the model uses."""
    share = 1 / world_size if memory.zero_stage(config) else 1
    return Work(0, (24 + 2 * BYTES[config.train.precision]) * memory.learnt(config) * share).seconds(
        gpu, config.train.precision
    )


class Bound(NamedTuple):
    """Of one step, in which every process takes its micro-batches; seconds."""

    parts: dict[str, float]  # the sum over parts, per step and process
    peak: float  # necessary FLOPs at the data sheet's peak
    goal: float  # and at `GOAL` of it

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def bound(config: Config, streams: Sequence[StreamShape], gpu: Gpu, world_size: int) -> Bound:
    """The bounds of a step. Communication between processes, reading of data and launches cost nothing here."""
    parts: dict[str, float] = {}
    peak = 0.0
    count, vocab_size = accumulation(config, world_size), estimate.codebook_size(config)
    for stream in streams:
        samples = count * config.streams[stream.name].micro_batch
        for part, seconds in sample_seconds(config, stream, gpu).items():
            parts[part] = parts.get(part, 0.0) + samples * seconds
        cost = estimate.costs(VideoSwinConfig.of(config.model), stream, config.tokenizer.name, vocab_size)
        learnt, named = cost._replace(tokenizer=0.0).training, cost.tokenizer or 0.0
        peak += samples * (learnt / gpu.peak(config.train.precision) + named / gpu.peak("fp16"))
    parts["optimizer"] = optimizer_seconds(config, gpu, world_size)
    return Bound(parts, peak, peak / GOAL)
