"""What is said of a run before it starts, and when it has run out of memory: `memory` and `roofline` as sentences."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from bevt_fast.config import Config
from bevt_fast.errors import MachineError
from bevt_fast.training import estimate, gpus, memory, roofline
from bevt_fast.training.estimate import StreamShape
from bevt_fast.training.gpus import Gpu
from bevt_fast.training.memory import Place, as_gib

DAY = 86_400
# training samples of a data set that is not here: Russakovsky et al. 2015; SPEC 8.2
PUBLISHED = {"imagenet1k": 1_281_167, "kinetics400": 240_000}


def chosen_gpu(name: str | None) -> tuple[Gpu, str]:
    """The GPU to predict for and why it: the one asked for, the one that is here, or the default. Raises ConfigError
    for a name that is not known.
    """
    if name:
        return gpus.named(name), "asked for"
    if not torch.cuda.is_available():
        return gpus.named(gpus.DEFAULT), "this machine has no GPU; --gpu names another"
    device = torch.cuda.get_device_name()
    known = gpus.of_device(device)
    return known or gpus.named(gpus.DEFAULT), "the one here" if known else f"no figures are known for {device}"


def steps(config: Config, sizes: Mapping[str, int] | None = None) -> tuple[int, str] | None:
    """Steps of the whole run and what that rests on; `sizes` are the samples of each stream, where they are known."""
    if config.train.steps:
        return config.train.steps, "train.steps"
    name = "clips" if config.clips else "images"
    stream = config.streams[name]
    count = (sizes or PUBLISHED).get(name if sizes else stream.source.name)
    if count is None:
        return None
    return (config.train.epochs or 1) * max(
        1, count // stream.batch
    ), f"{count:,} {name}{'' if sizes else ', published'}"


def memory_lines(config: Config, streams: Sequence[StreamShape], world_size: int, gpu: Gpu) -> list[str]:
    """The parts, their sum beside the GPU's memory, the largest micro-batch, and what each ZeRO stage would hold."""
    place, stage = Place.of(gpu), memory.zero_stage(config)
    rows = memory.state(config, world_size)
    checkpointed = " (checkpointed)" * config.model.activation_checkpointing
    rows[f"activations of a micro-batch{checkpointed}"] = memory.activations(config, streams, place.answer)
    rows["sum"] = sum(rows.values())
    processes = f"{world_size} process{'es' * (world_size > 1)}"
    lines = [f"memory of a process: {config.train.precision}, ZeRO {stage}, {processes}; an estimate"]
    lines += [f"  {name:<46}{size / 2**20:>12,.1f} MiB" for name, size in rows.items()]
    lines += [f"  {f'of {gpu.name}':<46}{gpu.memory / 2**20:>12,.1f} MiB  {rows['sum'] / gpu.memory:.1%} used"]
    plain = memory.activations(config, streams, "reference")
    without = f"where there are none, activations are {plain / 2**20:,.1f} MiB"
    lines += [
        f"  (with the fused kernels; {without})" if place.has_kernels else f"  ({gpu.name} is too old for kernels)"
    ]
    lines += [f"  (temporaries and the allocator's reserve come on top: {1 - memory.USABLE:.0%} are left to them)"]
    largest = memory.largest_micro_batch(config, streams, world_size, place)
    best = _sizes(largest) if largest else "not even the smallest"
    needs = ""
    if largest:
        whole = memory.needed(memory.with_micro_batches(config, largest), streams, world_size, place)
        needs = f" ({as_gib(whole)})"
    lines += [f"  largest micro-batch that fits and divides the batch: {best}{needs}"]
    return [*lines, _zero_line(config, world_size)]


def _zero_line(config: Config, world_size: int) -> str:
    """Why the default is stage 1, and what the others would change."""
    held = [sum(memory.state(config, world_size, stage=stage).values()) / 2**30 for stage in range(4)]
    saved = ", ".join(f"{held[1] - held[stage]:+.2f}" for stage in (0, 2, 3))
    few = f"{memory.learnt(config) / 1e6:,.1f} M parameters are few"
    return f"  ZeRO 1 by default, as {few}: stages 0, 2, 3 would save a process {saved} GiB"


def time_lines(config: Config, streams: Sequence[StreamShape], world_size: int, gpu: Gpu) -> list[str]:
    """The roofline of a step in parts, and what follows for the rates and the whole run."""
    bound = roofline.bound(config, streams, gpu, world_size)
    units = math.gcd(*(stream.batch for stream in config.streams.values()))
    one = {name: stream.batch // units for name, stream in config.streams.items()}
    of = world_size / units  # every process computes its share of the step's units
    lines = [f"time, bound by the data sheet of {gpu.name}; nothing here is measured", f"  a unit is {_sizes(one)}"]
    for name, seconds in bound.parts.items():
        if seconds:
            lines.append(f"  {name:<46}{1e6 * seconds * of:>12,.1f} us a unit {seconds / bound.seconds:>7.1%}")
    found = steps(config)
    whole = f"{found[0]:,} steps ({found[1]})" if found else ""
    rates = "".join(f"{name + '/s':>12}" for name in config.streams)
    lines.append(f"  {f'{world_size} x {gpu.name}':<36}{'units/s':>10}{rates}   {whole}".rstrip())
    goal = f"goal, {roofline.GOAL:.0%} MFU"
    peak = f"necessary FLOPs at {gpu.peak(config.train.precision) / 1e12:,.0f} TFLOP/s"
    ways = {peak: bound.peak, "sum over the parts": bound.seconds, goal: bound.goal}
    for name, seconds in ways.items():
        figures = "".join(f"{units * size / seconds:>12,.1f}" for size in one.values())
        length = f"{_duration(found[0] * seconds):>10}" if found else ""
        lines.append(f"  {name:<36}{units / seconds:>10,.1f}{figures}   {length}".rstrip())
    if bound.goal < bound.seconds:
        lines.append(f"  (the goal lies beyond the bound: this configuration cannot reach {roofline.GOAL:.0%} there)")
    return [*lines, *_notes(config, gpu)]


def _notes(config: Config, gpu: Gpu) -> list[str]:
    """What the bound rests on."""
    rate = f"{gpu.sustained(config.train.precision) / 1e12:.0f} TFLOP/s"
    share = "" if config.train.precision == "fp32" else f", the {gpus.SUSTAINED:.0%} of the peak that an H100 sustains"
    lines = [
        "  (the sum takes of every part the slowest of products, memory traffic and exponentials, one after another,",
        f"  products at {rate}{share};",
        "  no communication, no reading of data, no launches: a run can only be slower)",
    ]
    if config.train.precision == "bf16" and gpu.capability < gpus.OLDEST:
        lines.append(f"  ({gpu.name} has no bf16; take train.precision=fp16)")
    return lines


def days(config: Config, streams: Sequence[StreamShape], sizes: Mapping[str, int], world_size: int, gpu: Gpu) -> str:
    """How long the run's epochs take, with the samples there really are."""
    found = steps(config, sizes)
    assert found is not None
    bound = roofline.bound(config, streams, gpu, world_size)
    best, goal = (_duration(found[0] * seconds) for seconds in (bound.seconds, max(bound.goal, bound.seconds)))
    return (
        f"the whole run: {found[0]:,} steps ({found[1]}), at least {best} on {world_size} x {gpu.name}, "
        f"{goal} at the goal; estimates"
    )


class OutOfMemory(NamedTuple):
    """The first line of the error, and the whole sentence where the micro-batch has nothing to do with it."""

    error: str
    sentence: str = ""


def ran_out(workers: int, prefetch: int, error: BaseException) -> OutOfMemory | None:
    """None if `error` says something else than that there is no memory left; the loader's settings are named."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    # torch says it in a plain RuntimeError of the CPU's memory, and of the GPU's where a library asked for it
    on_gpu = isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in said
    if not (on_gpu or isinstance(error, MemoryError) or "can't allocate memory" in said):
        return None
    if torch.cuda.is_available() and not on_gpu:
        return OutOfMemory(
            said,
            f"out of memory: the machine's own, not the GPU's; lower data.workers or data.prefetch (now {workers} and "
            f"{prefetch}), or start fewer processes ({said})",
        )
    return OutOfMemory(said)


@contextlib.contextmanager
def explained(sentence: Callable[[BaseException], str | None]) -> Iterator[None]:
    """What runs out of memory within raises MachineError with `sentence(error)`; None of it leaves the error alone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (said := sentence(error)) is None:
            raise
        raise MachineError(said) from error


def out_of_memory(config: Config, error: BaseException) -> str | None:
    """One sentence for a run that ended so, None if `error` says something else: what its micro-batch needs by the
    estimate, what this device has, and three settings that need less.
    """
    if (said := ran_out(config.data.workers, config.data.prefetch, error)) is None:
        return None
    if said.sentence:
        return said.sentence
    place, world_size = memory.here(), int(os.environ.get("WORLD_SIZE", "1") or 1)
    streams = estimate.stream_shapes(config)
    needed = memory.needed(config, streams, world_size, place)
    now = _sizes({name: stream.micro_batch for name, stream in config.streams.items()})
    settings = [
        f"--set {' --set '.join(setting.keys.split())} (about {as_gib(setting.bytes)})"
        for setting in memory.remedies(config, streams, world_size, place)
    ]
    return (
        f"out of memory: by the estimate a micro-batch of {now} needs about {as_gib(needed)} a process, and "
        f"{place.name} has {as_gib(place.memory)}; less is needed with {', or '.join(settings)}; --dry-run says "
        f"more ({said.error})"
    )


def _sizes(sizes: Mapping[str, int]) -> str:
    """'8 clips and 64 images'."""
    return " and ".join(f"{size} {name if size > 1 else name.removesuffix('s')}" for name, size in sizes.items())


def _duration(seconds: float) -> str:
    """'1.88 days', '3.2 hours', '12 s'."""
    for length, unit in ((DAY, "days"), (3600, "hours"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:,.3g} {unit}" if seconds < 1000 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.3g} s"
