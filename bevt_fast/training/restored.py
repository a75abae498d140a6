"""A trained model out of what a user has: a run's directory, one checkpoint of it, an exported directory, or a file.

What does not fit is refused with one sentence before anything is loaded.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bevt_fast.config import Part
from bevt_fast.data import sources
from bevt_fast.errors import CheckpointError, ConfigError, UserError
from bevt_fast.models import official, torchvision_names, weights
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.official import AROUND_THE_ENCODER, TABLE
from bevt_fast.models.probes import NearestNeighbours
from bevt_fast.models.video_swin import SIZES, VideoSwinConfig
from bevt_fast.training.assemble import weights_at
from bevt_fast.training.described import Description, Given, describe
from bevt_fast.training.engine import DTYPES

HEAD, POOL, BANK, LABELS = "class_head.weight", "pool.query", "bank", "labels"


class Restored(NamedTuple):
    """A model with its weights, in `eval`."""

    classifier: Classifier | NearestNeighbours
    description: Description
    parts: dict[str, Part]  # of the run: "test", "heldout" and "source", where it names them
    path: Path  # what the weights were read from
    run: Path | None  # the run's directory

    def class_names(self) -> list[str] | None:
        """The names of the classes, from the checkpoint or else from the data of the run, if that is there."""
        if self.description.class_names is not None:
            return self.description.class_names
        for part in self.parts.values():
            try:
                if (names := sources.build(part).classes) is not None and len(names) == self.description.classes:
                    return names
            except UserError:
                continue
        return None


def restore(given: Given, needs_classes: bool = True) -> Restored:
    """The model a checkpoint holds. Raises CheckpointError and ConfigError with one sentence.

    Without `needs_classes` a pretrained encoder will do; its class head then has one class and no meaning.
    """
    path, tensors, config, run = _found(Path(given.checkpoint))
    described, parts = describe(given, config)
    tensors = our_names(tensors, given.ema)
    if HEAD in tensors:
        classes = len(tensors[HEAD])
        if described.classes not in (None, classes):
            raise CheckpointError(
                f"{path} tells {classes} classes apart, not {described.classes}; set the number of classes to {classes}"
            )
        described = described.model_copy(update={"classes": classes})
    elif needs_classes and BANK not in tensors:
        raise CheckpointError(
            f"{path} has no class head: it was pretrained, not fine-tuned; fine-tune it first, or use `evaluate.py "
            "extract` for its features"
        )
    require_fit(tensors, described.shape, path)
    names = described.class_names
    if names is not None and len(names) != described.classes:
        raise ConfigError(f"{path}: {len(names)} class names for {described.classes} classes; correct its config.json")
    model = _judge(tensors, described, path) if BANK in tensors else _classifier(tensors, described)
    around = () if HEAD in tensors or BANK in tensors else AROUND_THE_ENCODER
    weights.load(model, tensors, allow_missing=around, allow_unexpected=around)
    return Restored(model.eval().requires_grad_(False), described, parts, path, run)


def _classifier(tensors: dict[str, Tensor], described: Description) -> Classifier:
    """A classifier for these weights, with random ones."""
    heads, width = described.pool_heads if POOL in tensors else 0, described.shape.widths[-1]
    if heads and width % heads:
        raise ConfigError(f"pool_heads {heads} cannot share the width {width} evenly; correct config.json")
    return Classifier(described.shape, described.classes or 1, bias_index=described.model.bias_index, pool_heads=heads)


def _judge(tensors: dict[str, Tensor], described: Description, path: Path) -> NearestNeighbours:
    """The nearest training clips, with their bank. Raises CheckpointError where bank and description disagree."""
    vote, classes = described.vote, described.classes
    bank, labels = tensors[BANK], tensors.get(LABELS)
    if vote is None or classes is None:
        raise CheckpointError(f"{path} votes by nearest clips, but its configuration is of another mode; restore it")
    width = described.shape.widths[-1]
    if labels is None or bank.ndim != 2 or bank.shape[1] != width or len(labels) != len(bank):
        raise CheckpointError(f"{path}: its bank is not a row of {width} features and a label a clip; run it again")
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise CheckpointError(
            f"{path}: its bank has labels outside 0 to {classes - 1}; set the classes it was made for"
        )
    encoder = Classifier(described.shape, 1, bias_index=described.model.bias_index).encoder
    return NearestNeighbours(encoder, bank, labels, classes, vote.neighbours, vote.temperature)


def our_names(tensors: dict[str, Tensor], ema: bool | None = None) -> dict[str, Tensor]:
    """Weights of ours, of the official code or of torchvision's swin3d, in our names."""
    if torchvision_names.is_torchvision(tensors):
        return torchvision_names.from_torchvision(tensors)
    if any(key.startswith(("encoder.stage.", "model.encoder.stage.")) for key in tensors):
        return {key.removeprefix("model."): value for key, value in tensors.items()}
    return official.from_official(tensors, ema=ema)


def require_fit(tensors: dict[str, Tensor], shape: VideoSwinConfig, path: Path) -> None:
    """Raises CheckpointError where weights are of another patch, width, depth or window than `shape`."""
    stem = tensors.get("encoder.stem.projection.weight")
    if stem is None:
        raise CheckpointError(f"{path} has no stem for clips, so it is no Video Swin of ours; take another checkpoint")
    if stem.ndim != 5 or tuple(stem.shape[2:]) != shape.patch:
        raise CheckpointError(
            f"{path} joins patches of {' x '.join(map(str, stem.shape[2:]))} pixels, the model {shape.patch}; a 2-D "
            "checkpoint is inflated by fine-tuning, any other needs a model of its patch"
        )
    blocks = [key.split(".") for key in tensors if key.startswith("encoder.stage.") and ".norm1.weight" in key]
    depths = tuple(sum(stage == str(k) for _, _, stage, *_ in blocks) for k in range(4))
    if (len(stem), depths) != (shape.embed_dim, shape.depths):
        fitting = [n for n, s in SIZES.items() if (s["embed_dim"], s["depths"]) == (len(stem), depths)]
        remedy = f"set the size to {fitting[0]}" if fitting else "give the configuration it was trained with"
        raise CheckpointError(
            f"{path} is {len(stem)} wide with {depths} blocks, the model {shape.embed_dim} with {shape.depths}; "
            + remedy
        )
    rows = next((len(value) for key, value in tensors.items() if key.endswith(TABLE)), 0)
    t, h, w = (2 * size - 1 for size in shape.window)
    if rows != t * h * w:
        steps, rest = divmod(rows, h * w)
        remedy = f"set the window to {(steps + 1) // 2},{shape.window[1]},{shape.window[2]}"
        raise CheckpointError(
            f"the bias tables of {path} have {rows} rows, but the window {shape.window} needs {t * h * w}; "
            + (remedy if steps % 2 and not rest else "set the window it was trained with")
        )


def _found(path: Path) -> tuple[Path, dict[str, Tensor], Path | None, Path | None]:
    """What the weights were read from, the weights, the config.json that belongs to them, and the run's directory."""
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint at {path}; give a run's directory, one of its checkpoints or a file"
        )
    if (found := weights_at(path)) is None:
        raise CheckpointError(
            f"{path} holds no checkpoint: neither checkpoints/step_* nor model.safetensors; give another"
        )
    place, tensors = found
    beside = (place if place.is_dir() else place.parent) / "config.json"
    is_of_run = place.is_dir() and place.parent.name in ("checkpoints", "best")
    return place, tensors, beside if beside.is_file() else None, place.parent.parent if is_of_run else None


def precision(name: str | None, device: torch.device) -> torch.dtype:
    """The numbers to compute with: what was asked for, else bf16 on a GPU and fp32 on a CPU."""
    return DTYPES[name or ("bf16" if device.type == "cuda" else "fp32")]
