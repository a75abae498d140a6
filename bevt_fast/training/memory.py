"""How much memory a process will need, in parts; which micro-batch still fits; what other settings would save.

Estimates from shapes. Activations are good to a tenth; a tenth of a device is left to what is not counted: temporaries,
the libraries' workspaces, and what the allocator cannot use.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from bevt_fast.config import Config, deepspeed_section
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import estimate, gpus
from bevt_fast.training.estimate import BYTES, Answer, StreamShape

USABLE = 0.9
# DeepSpeed 0.19, runtime/zero/config.py: numbers in the buffer that gradients are gathered in
BUCKET = 500_000_000


class Place(NamedTuple):
    """What a process runs on."""

    name: str
    memory: float  # bytes for one process
    is_gpu: bool
    has_kernels: bool

    @classmethod
    def of(cls, gpu: gpus.Gpu) -> "Place":
        return cls(gpu.name, gpu.memory, True, gpu.has_kernels)

    @property
    def answer(self) -> Answer:
        """Who attends and scores here."""
        if self.has_kernels:
            return "fused"
        return "reference" if self.is_gpu else "chunks"


class Setting(NamedTuple):
    """A change of the configuration, and what a process would then need."""

    keys: str  # as after --set
    bytes: float


def here() -> Place:
    """The device this process trains on: its GPU, or its share of the machine's memory."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Place(device.name, device.total_memory, True, (device.major, device.minor) >= gpus.OLDEST)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Place(
        "this machine" + f" for each of {processes} processes" * (processes > 1), whole / processes, False, False
    )


def as_gib(size: float) -> str:
    """'1.50 GiB'."""
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.1f} GiB"


def learnt(config: Config) -> int:
    """Parameters of the model."""
    shape, vocab_size = VideoSwinConfig.of(config.model), estimate.codebook_size(config)
    return sum(estimate.parameters(shape, vocab_size, tuple(config.streams)).values())


def zero_stage(config: Config | FinetuneConfig) -> int:
    return int(deepspeed_section(config.deepspeed).get("zero_optimization", {}).get("stage", 1))


def state(config: Config, world_size: int, is_gpu: bool = True, stage: int | None = None) -> dict[str, float]:
    """Bytes that a process holds whatever its micro-batch: for its parameters, and the tokenizer's."""
    stage, count = zero_stage(config) if stage is None else stage, learnt(config)
    rows = estimate.state_bytes(count, config.train.precision, stage, world_size)
    rows["DeepSpeed's gradient buffers"] = gradient_buffers(config, count, is_gpu, stage)
    frozen = estimate.tokenizer_parameters(config.tokenizer.name, estimate.codebook_size(config))
    rows["tokenizer"] = 0.0 if config.data.token_cache else 4.0 * (frozen or 0)
    return rows


def gradient_buffers(config: Config | FinetuneConfig, count: int, is_gpu: bool, stage: int | None = None) -> float:
    """Every ZeRO stage gathers gradients in a buffer of fixed size, two of them where communication overlaps. On a CPU
    only what is written takes memory.
    """
    stage = zero_stage(config) if stage is None else stage
    options: dict[str, Any] = deepspeed_section(config.deepspeed).get("zero_optimization", {})
    if not stage or options.get("contiguous_gradients", True) is False:
        return 0.0
    asked = options.get("reduce_bucket_size", BUCKET)
    numbers = float(asked) if isinstance(asked, (int, float)) else BUCKET
    overlap = options.get("overlap_comm")
    doubled = stage < 3 and overlap is True
    return BYTES[config.train.precision] * (numbers if is_gpu else min(numbers, count)) * (2 if doubled else 1)


def activations(config: Config, streams: Sequence[StreamShape], answer: Answer) -> float:
    """Bytes that a micro-batch of one process keeps for its backward pass."""
    shape, vocab_size = VideoSwinConfig.of(config.model), estimate.codebook_size(config)
    precision, checkpointing = config.train.precision, config.model.activation_checkpointing
    each = [
        config.streams[stream.name].micro_batch
        * estimate.activation_bytes(shape, stream, vocab_size, precision, checkpointing, answer)
        for stream in streams
    ]
    # the first stream of two leaves gradients alone
    kept = max(each[0], each[1] + BYTES[precision] * learnt(config)) if config.in_turn else sum(each)
    return kept + (len(streams) * estimate.head_gradient_bytes(shape, vocab_size) if answer == "fused" else 0)


def needed(config: Config, streams: Sequence[StreamShape], world_size: int, place: Place) -> float:
    """Bytes of one process in training."""
    held = sum(state(config, world_size, place.is_gpu).values())
    return held + activations(config, streams, place.answer)


def with_micro_batches(config: Config, sizes: dict[str, int]) -> Config:
    changed = {name: config.streams[name].model_copy(update={"micro_batch": size}) for name, size in sizes.items()}
    return config.model_copy(update=changed)


def micro_batches(config: Config, world_size: int) -> list[dict[str, int]]:
    """Every micro-batch that divides `batch` among the processes, smallest first. Both streams take the same number of
    micro-batches a step, so their ratio is that of the batches.
    """
    whole = math.gcd(*(stream.batch for stream in config.streams.values()))
    unit = {name: stream.batch // whole for name, stream in config.streams.items()}
    shares = [k for k in range(1, whole // world_size + 1) if whole % (k * world_size) == 0]
    return [{name: k * size for name, size in unit.items()} for k in shares]


def largest_micro_batch(
    config: Config, streams: Sequence[StreamShape], world_size: int, place: Place
) -> dict[str, int] | None:
    """The largest micro-batch that fits; None where not even the smallest does."""
    fitting = [
        sizes
        for sizes in micro_batches(config, world_size)
        if needed(with_micro_batches(config, sizes), streams, world_size, place) <= USABLE * place.memory
    ]
    return fitting[-1] if fitting else None


def remedies(config: Config, streams: Sequence[StreamShape], world_size: int, place: Place) -> list[Setting]:
    """Settings that need less, at most three: smaller micro-batches, recomputed blocks, half precision, more of
    ZeRO, a buffer no larger than the gradients, smaller pictures. Those that then fit come first.
    """
    now = needed(config, streams, world_size, place)
    found = []

    def add(keys: str, changed: Config, shapes: Sequence[StreamShape] = streams) -> None:
        then = needed(changed, shapes, world_size, place)
        if then < 0.99 * now:
            found.append(Setting(keys, then))

    def add_micro_batches(sizes: dict[str, int]) -> None:
        keys = " ".join(f"{name}.micro_batch={size}" for name, size in sizes.items())
        add(keys, with_micro_batches(config, sizes))

    name, stream = next(iter(config.streams.items()))
    smaller = [sizes for sizes in micro_batches(config, world_size) if 2 * sizes[name] <= stream.micro_batch]
    if smaller:
        best = largest_micro_batch(config, streams, world_size, place)
        # where the estimate says that what has just failed fits, or that nothing does, the next one to try
        add_micro_batches(best if best in smaller else smaller[-1])
    model = config.model.model_copy(update={"activation_checkpointing": True})
    add("model.activation_checkpointing=true", config.model_copy(update={"model": model}))
    if config.train.precision == "fp32" and place.has_kernels:
        train = config.train.model_copy(update={"precision": "bf16"})
        add("train.precision=bf16", config.model_copy(update={"train": train}))
    # with one process there is nobody to share with
    for key, value in (("stage", 3), ("reduce_bucket_size", learnt(config)))[world_size == 1 :]:
        options = config.deepspeed.get("zero_optimization", {}) | {key: value}
        changed = config.model_copy(update={"deepspeed": config.deepspeed | {"zero_optimization": options}})
        add(f"deepspeed.zero_optimization.{key}={value}", changed)
    less = [stream._replace(side=max(stream.side * 5 // 7 // 32 * 32, 32)) for stream in streams]
    if config.model.image_attention == "t1":
        add(" ".join(f"{stream.name}.view.size={stream.side}" for stream in less), config, less)
    if len(found) < 3 and len(smaller) > 1:
        add_micro_batches(smaller[0])
    return sorted(found, key=lambda setting: setting.bytes > USABLE * place.memory)[:3]
