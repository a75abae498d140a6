"""The parts of a run, opened in the order of their cost, each refusing what it cannot use with one sentence."""

import hashlib
import logging
import random
from pathlib import Path
from typing import Any

import torch

from bevt_fast import tokenizers
from bevt_fast.config import Config, Part, Stream, open_part
from bevt_fast.data import masking, sources
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError, ConfigError, DataError, UserError
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

MASKS = 50  # drawn to see whether a mask hides anything


def check_parts(config: Config) -> None:
    """Find every part the configuration names and check its options. Raises ConfigError; touches no data."""
    open_part("bevt_fast.tokenizers", config.tokenizer)
    for stream in config.streams.values():
        for room, part in (("masking", stream.mask), ("sources", stream.source), ("sources", stream.heldout)):
            if part is not None:
                open_part(f"bevt_fast.data.{room}", part)
    for name, stream in config.streams.items():
        _check_mask(name, stream)


def _check_mask(name: str, stream: Stream) -> None:
    """Raises ConfigError for a mask of the other stream, and for one that leaves nothing to predict."""
    draw, side = masking.build(stream.mask), stream.view.size // 16
    steps = None if name == "images" else 4
    if not any(draw((side, side), steps, random.Random(number)).any() for number in range(MASKS)):
        raise ConfigError(
            f"{name}.mask hides none of the {side} x {side} cells of a view of {stream.view.size} pixels; "
            "raise its ratio, lower its min_block, or take a larger view"
        )


def open_sources(config: Config) -> dict[str, Source]:
    """The training source of each stream, its root looked at. Raises DataError before anything expensive starts."""
    return {name: _open_source(config, name, stream.source) for name, stream in config.streams.items()}


def open_heldout(config: Config) -> dict[str, Source]:
    """The held-out source of each stream that has one: scored at the end, looked at before the beginning."""
    parts = {name: stream.heldout for name, stream in config.streams.items()}
    return {name: _open_source(config, name, part, ".heldout") for name, part in parts.items() if part}


def _open_source(config: Config, stream: str, part: Part, key: str = ".source") -> Source:
    source = sources.build(part)
    kind = "images" if source.frames is None else "clips"
    if kind != stream:
        raise ConfigError(f"{stream}{key} {part.name!r} gives {kind}; name a source of {stream}, or set its kind")
    sources.preflight(source, config.data.quarantine_share)
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
    tokenizer = tokenizers.build(config.tokenizer)
    # where there is a cache it may never be asked
    return tokenizer if config.data.token_cache else tokenizer.to(world.device)


def open_engine(
    config: Config, tokenizer: Tokenizer, world: World, found: Checkpoint | None, fingerprints: dict[str, Any]
) -> Engine:
    """The objective under DeepSpeed, from initial weights, from `model.weights`, or as a checkpoint left it."""
    torch.manual_seed(config.seed)
    objective = build_objective(config, tokenizer.vocab_size, initialise=found is None)
    if found:
        require_same_data(found, fingerprints, config.data.allow_change)
        checkpoint.require_same_architecture(found, objective.model)
        objective.model.load_state_dict(found.weights)
    engine = Engine(objective.to(world.device), config, world)
    if found:
        engine.load(found.weights, found.moments)
        engine.load_scalars(found.trainer)
        log.info("resumed from %s", found.path)
    return engine


def require_same_data(
    found: Checkpoint, fingerprints: dict[str, Any], allow_change: bool = False, key: str = "model.weights"
) -> None:
    """The same files give the same samples, and the same tokenizer the same targets; others would silently give
    others. Raises CheckpointError; with `allow_change` other files are said aloud and taken. `key` starts a new run.
    """
    name = fingerprints["tokenizer"]
    if found.trainer.get("tokenizer", name) != name:
        raise CheckpointError(
            f"{found.path}: the tokenizer's weights are not those this run began with; bring them back, or begin a new "
            f"run with {key} = {found.path / 'model.safetensors'}"
        )
    for stream, now in fingerprints["data"].items():
        then = found.trainer.get("data", {}).get(stream)
        # what the checkpoint does not know of the data is not held against it
        if then and then == {key: now.get(key) for key in then}:
            continue
        listed = then and all(then.get(key) == now.get(key) for key in then if key != "sizes")
        what = f"sizes of the files of {stream} are not those" if listed else f"list of {stream} is not the one"
        sentence = f"{found.path}: the {what} this run began with ({then} then, {now} now)"
        if not allow_change:
            raise CheckpointError(
                f"{sentence}; bring it back, go on all the same with data.allow_change=true, or begin a new run with "
                f"{key} = {found.path / 'model.safetensors'}"
            )
        log.warning("%s; data.allow_change takes them: from here on the samples are others", sentence)


def fingerprint(source: Source) -> dict[str, str | int]:
    """Number of files, a digest of their names and which frames of them, in order, one of the sizes of those looked at
    before the run, and one of the labels if there are any.
    """
    digest = hashlib.sha256()
    for path in source.paths:
        digest.update(path.encode(errors="surrogateescape") + b"\n")
    if source.extents is not None:
        digest.update(source.extents.tobytes())
    sizes = hashlib.sha256(repr(sources.sizes(source)).encode())
    found: dict[str, str | int] = {"files": len(source), "sha256": digest.hexdigest(), "sizes": sizes.hexdigest()}
    if source.labels is not None:
        found["labels"] = hashlib.sha256(source.labels.tobytes()).hexdigest()
    return found


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A digest of the tokenizer's numbers, whatever file they came from, and of a precision that is not the official
    one; "" for one that has none.
    """
    digest = hashlib.sha256()
    precision = getattr(tokenizer, "precision", "official")
    if precision != "official":
        digest.update(f"precision {precision}\n".encode())
    state = tokenizer.state_dict() if isinstance(tokenizer, torch.nn.Module) else {}
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest() if state else ""


def build_objective(config: Config, vocab_size: int, initialise: bool = True) -> JointObjective:
    """The model the configuration describes, and what it is asked; from `model.weights` if named and `initialise`."""
    section = config.model
    model = Bevt(
        VideoSwinConfig.of(section),
        vocab_size,
        image_attention=section.image_attention,
        bias_index=section.bias_index,
        streams=tuple(config.streams),
        initialisation=section.initialisation,
        activation_checkpointing=section.activation_checkpointing,
    )
    if config.train.compile:
        model.encoder.compile_blocks()
    if section.weights and initialise:
        log.info("%s", initial_weights(model, section.weights))
    weights = {name: stream.weight for name, stream in config.streams.items()}
    return JointObjective(model, weights.get("images", 1.0), weights.get("clips", 1.0), config.in_turn)


def initial_weights(model: Bevt, path: str) -> str:
    """Start from a checkpoint file, a `step_XXXXXXXX` directory or the output of a run; returns what was taken and
    what not. Of a checkpoint of ours the digests are checked, and a damaged one at the end of a run is passed over.
    """
    place, weights = find_weights(path, "model.weights", "train stage one (configs/image.json) first")
    return f"initial weights from {place}: {official.initialise(model, weights, model.config)}"


def find_weights(path: str, key: str, first: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The weights that the configuration's `key` names, and where they lie. `first`: what to do if they are not there.
    Raises CheckpointError.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(
            f"{key}: {path} is not there; {first}, name a weights file, "
            f"or drop the key (--set {key}=null) to start from random weights"
        )
    if (found := weights_at(place)) is None:
        raise CheckpointError(f"{key}: {path} holds no checkpoint yet; train it first, or name a file")
    return found


def weights_at(place: Path) -> tuple[Path, dict[str, torch.Tensor]] | None:
    """The weights of a file, of a run or one of its checkpoints, or of an exported directory, and where they lie; None
    where a directory holds none. Raises CheckpointError for damaged ones.
    """
    if not place.is_dir():
        return place, official.read(place)
    within = place / "checkpoints" if (place / "checkpoints").is_dir() else place
    found = checkpoint.read(place) if (place / "MANIFEST.json").exists() else checkpoint.newest_valid(within)
    if found is not None:
        return found.path, found.weights
    file = place / "model.safetensors"
    return (file, official.read(file)) if file.is_file() else None
