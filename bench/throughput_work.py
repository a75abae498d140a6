"""What every contender of the step benchmark is given: one configuration, one set of weights, the same batches."""

import argparse
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bevt_fast.config import Config, Stream, load, open_part, parse
from bevt_fast.data import masking
from bevt_fast.data.batch import Clips, Images, JointBatch
from bevt_fast.data.masking import Masking, tube
from bevt_fast.data.sources import Frames
from bevt_fast.errors import ConfigError
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.tokenizers import dalle, patch_kmeans
from bevt_fast.training import estimate
from bevt_fast.training.estimate import StreamShape

IMAGES = 8  # of a unit, beside one clip: the paper's mix
LENGTHS = (5, 6, 7)  # of 8 time steps, in turn: the tubes of successive clips
BATCHES = 3  # different ones, in turn
DROP_PATH = {"tiny": 0.2, "small": 0.2, "base": 0.3, "large": 0.3}
# the rehearsal: every part is there, nothing is of a size
QUICK: dict[str, Any] = {"embed_dim": 8, "depths": [2, 1, 1, 1], "heads": [1, 2, 4, 8]}
QUICK_SIDE, QUICK_FRAMES, QUICK_WIDTH, QUICK_VOCABULARY = 64, 4, 4, 64


def configuration(options: argparse.Namespace) -> Config:
    """The configuration that is timed, one micro-batch a step. Raises ConfigError."""
    config = load(options.config, options.set) if options.config else parse(Config, _values(options), "--size")
    if config.train.precision == "fp16":
        raise ConfigError("throughput.py compares bf16 and fp32; set train.precision to one of them (--precision bf16)")
    changes: dict[str, Any] = {}
    for name, stream in config.streams.items():
        micro = stream.micro_batch
        if options.units is not None:
            micro = options.units * (IMAGES if name == "images" else 1)
        changes[name] = stream.model_copy(update={"batch": micro, "micro_batch": micro})
    if options.precision:
        changes["train"] = config.train.model_copy(update={"precision": options.precision})
    return config.model_copy(update=changes)


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """A configuration as PERFORMANCE 11 has it: both streams, the paper's sizes, synthetic data."""
    side = QUICK_SIDE if options.quick else 224
    view = {"size": side, "short_side": [side, side]}

    def stream(count: int, mask: str, source: dict[str, Any]) -> dict[str, Any]:
        block = {"ratio": 0.5, "min_block": 2 if options.quick else 16}
        given = {"name": mask, "options": block}
        return {"source": source, "mask": given, "batch": count, "micro_batch": count, "view": view}

    cuda = options.device == "cuda"
    units = options.units or (8 if cuda else 1)
    values: dict[str, Any] = {
        "output": "unused",
        "clips": stream(units, "tube", {"name": "synthetic"}),
        "images": stream(units * IMAGES, "blockwise", {"name": "synthetic"}),
        "tokenizer": {"name": "dalle", "options": {"weights": "random"}},
        "model": {
            "size": QUICK if options.quick else options.size,
            "window": [8, 2, 2] if options.quick else [8, 7, 7],
            "drop_path": 0.2 if options.quick else DROP_PATH[options.size],
        },
        "optim": {"lr": 5e-4},
        "train": {"steps": 1, "precision": "bf16" if cuda else "fp32"},
        # one process has nobody to share its optimizer with; on a GPU as configs/joint.json
        "deepspeed": {"zero_optimization": {"stage": 1 if cuda else 0}},
    }
    for override in options.set:
        raise ConfigError(f"--set {override} changes a configuration file; name one with --config")
    return values


def clip_frames(config: Config) -> int:
    """T of a configuration, 16 where its source is made up."""
    if config.clips is None or config.clips.source.name == "synthetic":
        return 16
    options = open_part("bevt_fast.data.sources", config.clips.source)[1]
    return int(getattr(options, "frames", Frames().count))


class Work(NamedTuple):
    """One run's task."""

    config: Config
    shape: VideoSwinConfig
    batches: list[JointBatch]
    tokenizer: torch.nn.Module
    device: torch.device
    streams: list[StreamShape]  # with the shares that these batches hide
    notes: list[str]  # what is made up

    @property
    def units(self) -> float:
        """One clip and eight images each; without clips, eight images."""
        config = self.config
        return config.clips.micro_batch if config.clips else config.images.micro_batch / IMAGES  # pyright: ignore

    def count(self, stream: str) -> int:
        """Clips or images of a step."""
        found = self.config.streams.get(stream)
        return found.micro_batch if found else 0

    def flops(self) -> tuple[float, float] | None:
        """Necessary and nominal, of a step with these masks; None where the tokenizer's are not known."""
        tokenizer, vocabulary = self.config.tokenizer.name, getattr(self.tokenizer, "vocab_size", 0)
        found = []
        for count in (estimate.costs, estimate.nominal_costs):
            costs = [count(self.shape, stream, tokenizer, vocabulary) for stream in self.streams]
            if any(cost.tokenizer is None for cost in costs) or self.narrow:
                return None
            found.append(sum(self.count(s.name) * cost.training for s, cost in zip(self.streams, costs)))
        return found[0], found[1]

    @property
    def narrow(self) -> bool:
        """A DALL-E encoder of another width than the published one, whose FLOPs `estimate` does not count."""
        first = dict(self.tokenizer.named_parameters()).get("blocks.input.w")
        return first is not None and len(first) != estimate.DALLE_WIDTH


def prepare(options: argparse.Namespace) -> Work:
    """Draw everything. Raises ConfigError and DataError with one sentence."""
    config = configuration(options)
    device = torch.device(options.device)
    torch.manual_seed(0)
    notes = [f"data: random pixels, {BATCHES} batches in turn"]
    if config.model.weights:
        notes.append(f"model.weights {config.model.weights} is not read: the step starts from random weights")
    tokenizer, note = open_tokenizer(config, options)
    notes += [note] if note else []
    frames = QUICK_FRAMES if options.quick and not options.config else clip_frames(config)
    batches = [_batch(config, number, frames, not options.config) for number in range(BATCHES)]
    streams = []
    for name, stream in config.streams.items():
        masks = [getattr(batch, name).mask.numpy() for batch in batches]
        count = frames if name == "clips" else 1
        streams.append(StreamShape(name, count, stream.view.size, *estimate.mean_shares(masks)))
    batches = [_on(batch, device) for batch in batches]
    return Work(config, VideoSwinConfig.of(config.model), batches, tokenizer.to(device), device, streams, notes)


def open_tokenizer(config: Config, options: argparse.Namespace) -> tuple[torch.nn.Module, str]:
    """The tokenizer, from its file or from random weights; and the sentence that says so."""
    name, chosen = config.tokenizer.name, open_part("bevt_fast.tokenizers", config.tokenizer)[1]
    path = options.tokenizer or chosen.weights
    vocabulary = chosen.vocab_size
    if options.tokenizer or Path(path).is_file():
        return {"dalle": dalle, "patch_kmeans": patch_kmeans}[name].load(path, vocabulary), f"tokenizer: {path}"
    why = "" if path == "random" else f" ({path} is not there)"
    if name == "dalle":
        small = options.quick and not options.config
        width, count = (QUICK_WIDTH, QUICK_VOCABULARY) if small else (estimate.DALLE_WIDTH, vocabulary)
        return dalle.Dalle(width, count), f"tokenizer: dalle with random weights{why}"
    centroids = torch.randint(256, (vocabulary or 128, 3, 8, 8), dtype=torch.uint8)
    return patch_kmeans.PatchKMeans(centroids), f"tokenizer: {name} with random centroids{why}"


def _batch(config: Config, number: int, frames: int, cycling: bool) -> JointBatch:
    """One micro-batch on the CPU; the number decides all of it."""
    draw = torch.Generator().manual_seed(number)
    rng = random.Random(number)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    def token_pixels(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw) * 0.8 + 0.1

    images = clips = None
    if config.images:
        count, side = config.images.micro_batch, config.images.view.size
        mask = masks(config.images, None, count, rng)
        images = Images(pixels(count, 3, side, side), token_pixels(count, 3, side // 2, side // 2), mask)
    if config.clips:
        count, side = config.clips.micro_batch, config.clips.view.size
        first = number * count if cycling else None
        mask = masks(config.clips, frames // 2, count, rng, first)
        shape = (count, frames, 3, side // 2, side // 2)
        clips = Clips(pixels(count, 3, frames, side, side), token_pixels(*shape), mask)
    return JointBatch(images, clips)


def masks(stream: Stream, steps: int | None, count: int, rng: random.Random, first_length: int | None = None) -> Tensor:
    """(count, [steps,] g, g), as the stream draws them; with `first_length`, tubes of `LENGTHS` in turn."""
    side = stream.view.size // estimate.CELL
    grid = (side, side)
    draw: Masking = masking.build(stream.mask)
    drawn = []
    for number in range(count):
        if first_length is None or steps is None:
            drawn.append(draw(grid, steps, rng))
            continue
        share = LENGTHS[(first_length + number) % len(LENGTHS)] / 8
        options = parse(tube.Options, stream.mask.options | {"length": (share, share)}, "tube")
        drawn.append(tube.build(options)(grid, steps, rng))
    return torch.from_numpy(np.stack(drawn))


def _on(batch: JointBatch, device: torch.device) -> JointBatch:
    """Pixels on the device, masks on the CPU, as a loader delivers them."""

    def move(stream: Any) -> Any:
        if stream is None:
            return None
        return stream._replace(pixels=stream.pixels.to(device), token_pixels=stream.token_pixels.to(device))

    return JointBatch(move(batch.images), move(batch.clips))
