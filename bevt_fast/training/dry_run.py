"""--dry-run: what would be computed, on what, from which files, without a GPU, without DeepSpeed, without a step."""

import math
from collections.abc import Iterator, Sequence

import torch

from bevt_fast import tokenizers
from bevt_fast.config import Config, accumulation
from bevt_fast.data import loader
from bevt_fast.data.batch import JointBatch
from bevt_fast.data.sources import Source
from bevt_fast.errors import UserError
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import distributed, estimate, prediction, token_targets
from bevt_fast.training.assemble import build_objective, check_parts, initial_weights, open_heldout, open_sources
from bevt_fast.training.estimate import StreamShape


def describe(config: Config, gpu: str | None = None) -> Iterator[str]:
    """Shapes, parameters, FLOPs, memory and time on a GPU by its name, then the first batch from the real files, a
    paragraph at a time.

    Raises what the run itself would, after saying what is known without data, and ConfigError for an unknown GPU.
    """
    chosen, _ = prediction.chosen_gpu(gpu)
    world_size = distributed.world_size_from_environment()
    accumulation(config, world_size)
    check_parts(config)
    yield report(config, world_size, gpu)
    data = open_sources(config)
    for name, source in data.items():
        yield f"{name}: {len(source):,} files of {source.name} under {source.root}"
    for name, source in open_heldout(config).items():
        yield f"{name}, held out: {len(source):,} files of {source.name} under {source.root}"
    if not config.train.steps:
        streams = estimate.stream_shapes(config)
        yield prediction.days(config, streams, {name: len(source) for name, source in data.items()}, world_size, chosen)
    batches = loader.Loader(config, data, rank=0, world_size=world_size, device=torch.device("cpu"))
    try:
        batch = next(batches)
        bad = [f"bad file: {record['path']}: {record['kind']}: {record['reason']}" for record in batches.bad_files]
    finally:
        batches.close()
    yield "\n".join(["first micro-batch:", *first_batch(batch), *bad])
    yield tokens(config, batch, data)
    if config.model.weights:
        model = build_objective(config, estimate.codebook_size(config), initialise=False).model
        yield initial_weights(model, config.model.weights)


def report(config: Config, world_size: int, gpu: str | None = None) -> str:
    """The figures of a run as text: parameters, shapes and FLOPs of every stage, the step, and on one GPU or several of
    a kind the memory of a process, the time of a step and the days of the run.
    """
    shape, vocab_size, name = VideoSwinConfig.of(config.model), estimate.codebook_size(config), config.tokenizer.name
    streams = estimate.stream_shapes(config)
    counts = estimate.parameters(shape, vocab_size, tuple(config.streams))
    lines = ["learnt parameters", *(f"  {part:<14}{count:>14,}" for part, count in counts.items())]
    lines += [f"  {'sum':<14}{sum(counts.values()):>14,}"]
    frozen = estimate.tokenizer_parameters(name, vocab_size)
    lines += [f"  and {frozen:,} frozen ones of the tokenizer {name}"] if frozen else []
    for stream in streams:
        lines += ["", *_stream_lines(shape, stream, name, vocab_size)]
    lines += ["", *_step_lines(config, streams, world_size)]
    chosen, why = prediction.chosen_gpu(gpu)
    lines += ["", f"predicted for {chosen.name} ({why}): estimates from data sheets, not measured"]
    for part in (prediction.memory_lines, prediction.time_lines):
        lines += ["", *part(config, streams, world_size, chosen)]
    return "\n".join(lines)


def _stream_lines(shape: VideoSwinConfig, stream: StreamShape, tokenizer: str, vocab_size: int) -> list[str]:
    one, side = stream.name.removesuffix("s"), stream.side // estimate.CELL
    cost, nominal = (f(shape, stream, tokenizer, vocab_size) for f in (estimate.costs, estimate.nominal_costs))
    lines = [f"{stream.name}: {stream.frames} x {stream.side} x {stream.side} pixels; forward FLOPs of one {one}"]
    lines += [f"  {'':<34}{'necessary':>12}{'nominal':>14}"]
    sizes = estimate.grids(shape, stream)
    stem = estimate.stem_flops(shape, stream)
    rows: list[tuple[str, tuple[int, ...], float, float, str]] = []
    rows.append(("stem", (*sizes[0], shape.embed_dim), stem, stem, ""))
    flops = estimate.stage_flops(shape, stream)
    for number, (grid, width, stage) in enumerate(zip(sizes, shape.widths, flops), start=1):
        used = " x ".join(str(min(pair)) for pair in zip(grid, shape.window))
        rows.append((f"stage {number}", (*grid, width), stage, stage, f"windows of {used}"))
    rows.append(("decoder", (stream.frames, side, side, shape.widths[-1]), cost.decoder, nominal.decoder, ""))
    note = f"{stream.hidden:.1%} of {stream.cells:,} positions are hidden (mean)"
    rows.append(("token head", (stream.frames, side, side, vocab_size), cost.head, nominal.head, note))
    if cost.tokenizer is not None and nominal.tokenizer is not None:
        frames = f"{stream.frames} frame{'s' * (stream.frames > 1)} of {stream.side // 2} x {stream.side // 2} pixels"
        note = f"{stream.tokenized:.1%} of {frames}" if stream.frames > 1 else frames
        rows.append(("tokenizer", (stream.frames, side, side), cost.tokenizer, nominal.tokenizer, note))
    for name, size, flop, most, note in rows:
        lines.append(
            f"  {name:<12}{' x '.join(map(str, size)):<22}{_flops(flop):>12}{_flops(most):>14}  {note}".rstrip()
        )
    known = "and the tokenizer" if cost.tokenizer is not None else f"without the tokenizer {tokenizer}"
    training = f"{_flops(cost.training)} per {one} necessary, {_flops(nominal.training)} nominal"
    return [*lines, f"  training: {training}: three times the learnt parts {known}"]


def _step_lines(config: Config, streams: Sequence[StreamShape], world_size: int) -> list[str]:
    batches = [
        f"{stream.batch} {name} ({accumulation(config, world_size)} x {stream.micro_batch} x {world_size})"
        for name, stream in config.streams.items()
    ]
    lines = [f"a step: {' and '.join(batches)}: micro-batches x micro-batch x processes"]
    for count, flops in estimate.step_flops(config, streams)._asdict().items():
        line = f"  {count}: {_flops(flops)}, {_flops(flops / world_size)} for each process"
        steps = config.train.steps
        lines.append(line + (f"; {_flops(flops * steps)} in {steps:,} steps" if steps else ""))
    return [*lines, "  (necessary: what the program computes, and what MFU counts; nominal: the official program)"]


def _flops(value: float) -> str:
    """Four digits and a unit."""
    power = min(max(int(math.log10(max(value, 1))) // 3, 2), 6)
    return f"{value / 1000**power:.4g} {'MGTPE'[power - 2]}FLOP"


def first_batch(batch: JointBatch) -> list[str]:
    """One line for each tensor."""
    lines = []
    for name, stream in batch._asdict().items():
        for field, tensor in stream._asdict().items() if stream else ():
            if tensor is None:
                continue
            values = (
                f"hidden {tensor.float().mean():.1%}"
                if field == "mask"
                else f"{tensor.min():.3f} .. {tensor.max():.3f}"
            )
            lines.append(
                f"  {name}.{field}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {values}"
            )
    return lines


def tokens(config: Config, batch: JointBatch, data: dict[str, Source]) -> str:
    """What the tokenizer calls the first micro-batch, where its weights are already there; and whether the token cache
    can be used. Raises DataError where it cannot.
    """
    try:
        tokenizer = tokenizers.build(config.tokenizer)
    except UserError as error:
        if config.tokenizer.options.get("fit_if_missing"):
            return "tokenizer: will be fitted on the training data when the run starts"
        raise error
    sample = next(stream.token_pixels[:1] for stream in batch if stream)
    ids = tokenizer(sample)
    used = ids.unique().numel()
    cached = [
        f"token cache {cache.path}: {cache.views} views of each of {len(data[name]):,} {name}, whole, made for this run"
        for name, cache in token_targets.open_caches(config, data, tokenizer).items()
    ]
    first = f"tokenizer {config.tokenizer.name}: {tokenizer.vocab_size} ids; {used} of them in the first sample"
    return "\n".join([first, *cached])
