"""The parts of a run, opened in the order of their cost, each refusing what it cannot use with one sentence."""

import hashlib
import logging
from pathlib import Path

import torch

from bevt_fast import tokenizers
from bevt_fast.config import Config, Stream, open_part
from bevt_fast.data import sources
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError, DataError, UserError
from bevt_fast.models import official
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.tokenizers import Tokenizer
from bevt_fast.training import checkpoint, distributed, tokenizer_fit
from bevt_fast.training.checkpoint import Checkpoint
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import Engine

log = logging.getLogger("bevt_fast")


def streams(config: Config) -> dict[str, Stream]:
    """The streams the configuration has, by name, images first as everywhere."""
    return {name: stream for name, stream in (("images", config.images), ("clips", config.clips)) if stream}


def check_parts(config: Config) -> None:
    """Find every part the configuration names and check its options. Raises ConfigError; touches no data."""
    open_part("bevt_fast.tokenizers", config.tokenizer)
    for stream in streams(config).values():
        for room, part in (("masking", stream.mask), ("sources", stream.source), ("sources", stream.heldout)):
            if part is not None:
                open_part(f"bevt_fast.data.{room}", part)


def open_source(stream: Stream) -> Source:
    """The stream's source, its root looked at. Raises DataError before anything expensive starts."""
    source = sources.build(stream.source)
    sources.preflight(source, 0.5)
    return source


def open_tokenizer(config: Config, data: dict[str, Source], world: World) -> Tokenizer:
    """The frozen tokenizer; one that may be fitted on the run's own data is fitted by the first process if it is not
    there.
    """
    failure: UserError | None = None
    if world.is_main:
        try:
            tokenizer_fit.fit_if_missing(config, data)
        except UserError as error:
            failure = error
    if distributed.agree(int(failure is not None), world.device):
        raise failure or DataError("the first process could not fit the tokenizer; it says why")
    return tokenizers.build(config.tokenizer).to(world.device)


def open_engine(
    config: Config, tokenizer: Tokenizer, world: World, found: Checkpoint | None, fingerprints: dict
) -> Engine:
    """The objective under DeepSpeed, from initial weights, from `model.weights`, or as a checkpoint left it."""
    torch.manual_seed(config.seed)
    objective = build_objective(config, tokenizer.vocab_size, initialise=found is None)
    if found:
        require_same_data(found, fingerprints)
        checkpoint.require_same_architecture(found, objective.model)
        objective.model.load_state_dict(found.weights)
    engine = Engine(objective.to(world.device), config, world)
    if found:
        engine.load(found.weights, found.moments)
        engine.load_scalars(found.trainer)
        log.info("resumed from %s", found.path)
    return engine


def require_same_data(found: Checkpoint, fingerprints: dict) -> None:
    """The same lists give the same samples; other lists would silently give others. Raises CheckpointError."""
    for stream, now in fingerprints.items():
        then = found.trainer.get("data", {}).get(stream)
        if then != now:
            raise CheckpointError(
                f"{found.path}: the list of {stream} is not the one this run began with ({then} then, {now} now); "
                f"bring it back, or begin a new run with model.weights = {found.path / 'model.safetensors'}"
            )


def fingerprint(source: Source) -> dict[str, str | int]:
    """Number of files and a digest of their names, and which frames of them, in order."""
    digest = hashlib.sha256()
    for path in source.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\n")
    if source.extents is not None:
        digest.update(source.extents.tobytes())
    return {"files": len(source), "sha256": digest.hexdigest()}


def build_objective(config: Config, vocab_size: int, initialise: bool = True) -> JointObjective:
    """The model the configuration describes, and what it is asked; from `model.weights` if named and `initialise`."""
    section = config.model
    model = Bevt(
        VideoSwinConfig.of(section),
        vocab_size,
        image_attention=section.image_attention,
        bias_index=section.bias_index,
        streams=tuple(streams(config)),
        initialisation=section.initialisation,
        activation_checkpointing=section.activation_checkpointing,
    )
    if section.weights and initialise:
        log.info("%s", initial_weights(model, section.weights))
    weights = {name: stream.weight for name, stream in streams(config).items()}
    return JointObjective(model, weights.get("images", 1.0), weights.get("clips", 1.0))


def initial_weights(model: Bevt, path: str) -> str:
    """Start from a checkpoint file, a `step_XXXXXXXX` directory or the output of a run; returns what was taken and
    what not.
    """
    place = Path(path)
    if (place / "checkpoints").is_dir():
        found = checkpoint.commits(place / "checkpoints")
        if not found:
            raise CheckpointError(f"model.weights: {path} holds no checkpoint yet; train it first, or name a file")
        place = found[-1]
    if place.is_dir():
        place = place / "model.safetensors"
    if not place.is_file():
        raise CheckpointError(
            f"model.weights: {path} is not there; train stage one (configs/image.json) first, name a weights file, "
            "or drop the key (--set model.weights=null) to start from random weights"
        )
    return f"initial weights from {place}: {official.initialise(model, official.read(place), model.config)}"
