"""--dry-run: what would be computed, on what, from which files, without a GPU, without DeepSpeed, without a step."""

from collections.abc import Iterator

import torch

from bevt_fast import tokenizers
from bevt_fast.config import Config, accumulation
from bevt_fast.data import loader
from bevt_fast.data.batch import JointBatch
from bevt_fast.errors import UserError
from bevt_fast.training import distributed, estimate
from bevt_fast.training.assemble import build_objective, check_parts, initial_weights, open_heldout, open_sources


def describe(config: Config) -> Iterator[str]:
    """Shapes, parameters, memory and FLOPs, then the first batch from the real files, a paragraph at a time.

    Raises what the run itself would, after saying what is known without data.
    """
    world_size = distributed.world_size_from_environment()
    accumulation(config, world_size)
    check_parts(config)
    yield estimate.report(config, world_size)
    data = open_sources(config)
    for name, source in data.items():
        yield f"{name}: {len(source):,} files of {source.name} under {source.root}"
    for name, source in open_heldout(config).items():
        yield f"{name}, held out: {len(source):,} files of {source.name} under {source.root}"
    batches = loader.Loader(config, data, rank=0, world_size=world_size, device=torch.device("cpu"))
    try:
        batch = next(batches)
        bad = [f"bad file: {record['path']}: {record['kind']}: {record['reason']}" for record in batches.bad_files]
    finally:
        batches.close()
    yield "\n".join(["first micro-batch:", *first_batch(batch), *bad])
    yield tokens(config, batch)
    if config.model.weights:
        model = build_objective(config, estimate.codebook_size(config), initialise=False).model
        yield initial_weights(model, config.model.weights)


def first_batch(batch: JointBatch) -> list[str]:
    """One line for each tensor."""
    lines = []
    for name, stream in batch._asdict().items():
        for field, tensor in stream._asdict().items() if stream else ():
            values = (
                f"hidden {tensor.float().mean():.1%}"
                if field == "mask"
                else f"{tensor.min():.3f} .. {tensor.max():.3f}"
            )
            lines.append(
                f"  {name}.{field}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}, {values}"
            )
    return lines


def tokens(config: Config, batch: JointBatch) -> str:
    """What the tokenizer calls the first micro-batch, where its weights are already there."""
    try:
        tokenizer = tokenizers.build(config.tokenizer)
    except UserError as error:
        if config.tokenizer.options.get("fit_if_missing"):
            return "tokenizer: will be fitted on the training data when the run starts"
        raise error
    sample = next(stream.token_pixels[:1] for stream in batch if stream)
    ids = tokenizer(sample)
    used = ids.unique().numel()
    return f"tokenizer {config.tokenizer.name}: {tokenizer.vocab_size} ids; {used} of them in the first sample"
