"""How much memory fine-tuning will need, and what to change where it was too much: as `memory`, for a classifier."""

import os
from collections.abc import Iterator
from typing import Any

import torch

from bevt_fast.config import open_part
from bevt_fast.data.sources import Frames
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.probes import Probe
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import estimate, memory
from bevt_fast.training.memory import Place, Setting, as_gib
from bevt_fast.training.prediction import chosen_gpu, ran_out


def state(config: FinetuneConfig, world_size: int, is_gpu: bool) -> dict[str, float]:
    """Bytes that a process holds whatever its micro-batch."""
    with torch.device("meta"):
        classifier = Classifier.of(config)
        learner = classifier if config.train.mode == "finetune" else Probe(classifier)
    learnt, size = sum(p.numel() for p in learner.parameters()), estimate.BYTES[config.train.precision]
    rows = estimate.state_bytes(learnt, config.train.precision, memory.zero_stage(config), world_size)
    rows["DeepSpeed's gradient buffers"] = memory.gradient_buffers(config, learnt, is_gpu)
    if config.train.ema:
        rows["moving average of the weights"] = 4.0 * learnt / (world_size if memory.zero_stage(config) else 1)
    if config.train.mode != "finetune":
        rows["frozen encoder"] = float(size * sum(p.numel() for p in classifier.encoder.parameters()))
    return rows


def activations(config: FinetuneConfig, place: Place) -> float:
    """Bytes that a micro-batch of one process keeps for its backward pass; behind a frozen encoder, at most what one
    block of it needs at a time.
    """
    frames = int(getattr(open_part("bevt_fast.data.sources", config.data.source)[1], "frames", Frames().count))
    shape, clip = VideoSwinConfig.of(config.model), estimate.StreamShape("clips", frames, config.views.size, 0.0)
    recomputed = config.model.activation_checkpointing or config.train.mode != "finetune"
    precision = config.train.precision
    return config.data.micro_batch * estimate.activation_bytes(shape, clip, 0, precision, recomputed, place.answer)


def needed(config: FinetuneConfig, world_size: int, place: Place) -> float:
    """Bytes of one process in training."""
    return sum(state(config, world_size, place.is_gpu).values()) + activations(config, place)


def micro_batches(config: FinetuneConfig, world_size: int) -> list[int]:
    """Those that divide `batch` among the processes, smallest first; twins come in pairs."""
    share = config.data.batch // world_size
    return [n for n in range(1, share + 1) if share % n == 0 and not (config.views.twins and n % 2)]


def describe(config: FinetuneConfig, world_size: int, gpu: str | None) -> str:
    """The parts, their sum beside a GPU's memory, the largest micro-batch. Raises ConfigError for an unknown GPU."""
    chosen, why = chosen_gpu(gpu)
    place = Place.of(chosen)
    rows = state(config, world_size, True) | {"activations of a micro-batch": activations(config, place)}
    rows["sum"] = sum(rows.values())
    lines = [f"memory of a process on {chosen.name} ({why}): an estimate from shapes, not measured"]
    lines += [f"  {name:<46}{size / 2**20:>12,.1f} MiB" for name, size in rows.items()]
    lines += [f"  {f'of {chosen.name}':<46}{chosen.memory / 2**20:>12,.1f} MiB  {rows['sum'] / chosen.memory:.1%} used"]
    room = memory.USABLE * chosen.memory
    fitting = [n for n in micro_batches(config, world_size) if needed(_changed(config, n), world_size, place) <= room]
    best = f"{fitting[-1]} clips" if fitting else "not even the smallest"
    return "\n".join([*lines, f"  largest micro-batch that fits and divides the batch: {best}"])


def out_of_memory(config: FinetuneConfig, error: BaseException) -> str | None:
    """One sentence for a run that ended so, None if `error` says something else: what its micro-batch needs by the
    estimate, what this device has, and up to three settings that need less.
    """
    if (said := ran_out(config.data.workers, config.data.prefetch, error)) is None:
        return None
    if said.sentence:
        return said.sentence
    place, world_size = memory.here(), int(os.environ.get("WORLD_SIZE", "1") or 1)
    now, room = needed(config, world_size, place), memory.USABLE * place.memory
    found = sorted(_remedies(config, world_size, place, now), key=lambda setting: setting.bytes > room)
    less = ", or ".join(f"--set {setting.keys} (about {as_gib(setting.bytes)})" for setting in found[:3])
    clips = config.data.micro_batch
    return (
        f"out of memory: by the estimate a micro-batch of {clips} clip{'s' * (clips > 1)} needs about {as_gib(now)} a "
        f"process, and {place.name} has {as_gib(place.memory)}; less is needed with {less} ({said.error})"
    )


def _remedies(config: FinetuneConfig, world_size: int, place: Place, now: float) -> Iterator[Setting]:
    """Smaller micro-batches, recomputed blocks, half precision, smaller pictures: those that need less than `now`."""
    room = memory.USABLE * place.memory
    smaller = [n for n in micro_batches(config, world_size) if 2 * n <= config.data.micro_batch]
    fitting = [n for n in smaller if needed(_changed(config, n), world_size, place) <= room]
    changes: dict[str, FinetuneConfig] = {}
    if smaller:
        best = (fitting or smaller)[-1]
        changes[f"data.micro_batch={best}"] = _changed(config, best)
    changes["model.activation_checkpointing=true"] = _with(config, "model", activation_checkpointing=True)
    if config.train.precision == "fp32" and place.has_kernels:
        changes["train.precision=bf16"] = _with(config, "train", precision="bf16")
    side = max(config.views.size * 5 // 7 // 32 * 32, 32)
    changes[f"views.size={side}"] = _with(config, "views", size=side)
    for keys, changed in changes.items():
        if (then := needed(changed, world_size, place)) < 0.99 * now:
            yield Setting(keys, then)


def _changed(config: FinetuneConfig, micro_batch: int) -> FinetuneConfig:
    return _with(config, "data", micro_batch=micro_batch)


def _with(config: FinetuneConfig, section: str, **values: Any) -> FinetuneConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
