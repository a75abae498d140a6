"""A trained model out of what a user has: a run's directory, one checkpoint of it, an exported directory, or a file.

A run and an exported directory say themselves what the model is. A bare file does not: then `--config`, or `--size`
with `--window` and `--classes`, says it. What does not fit is refused with one sentence before anything is loaded.
"""

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bevt_fast import config as configuration
from bevt_fast.config import Model, Part, Positive, Section, open_part, parse
from bevt_fast.data import sources
from bevt_fast.data.sources import ClipOptions
from bevt_fast.errors import CheckpointError, ConfigError, UserError
from bevt_fast.models import official, torchvision_names, weights
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.official import AROUND_THE_ENCODER, TABLE
from bevt_fast.models.video_swin import SIZES, VideoSwinConfig
from bevt_fast.training import checkpoint

FORMAT = "bevt_fast classifier"
HEAD = "class_head.weight"


class TestViews(Section):
    """The views of a test (SPEC 6.6), as `bevt_fast.data.views.Views` has them."""

    __test__ = False  # the name starts as pytest's tests do

    clips: Positive = 1
    crops: Literal[1, 3] = 1
    size: Positive = 224
    short_side: Positive = 256


class Description(Section):
    """What a classifier is and how it is asked: the config.json of an exported directory. Without `classes` it is an
    encoder alone.
    """

    format: Literal["bevt_fast classifier"] = FORMAT
    model: Model = Model()
    classes: Positive | None = None
    class_names: list[str] | None = None
    clip: ClipOptions = ClipOptions(frames=32, stride=2)  # SPEC 6.1, Kinetics
    test: TestViews = TestViews()

    @property
    def shape(self) -> VideoSwinConfig:
        """The encoder's."""
        return VideoSwinConfig.of(self.model)


class Given(NamedTuple):
    """What the command line says of a model."""

    checkpoint: str
    config: str | None = None
    overrides: Sequence[str] = ()
    size: str | None = None
    window: tuple[int, int, int] | None = None
    classes: int | None = None
    ema: bool | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which model."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN|DIR|FILE", help="a run, a checkpoint of it, a file")
    parser.add_argument("--config", metavar="FILE", help="what the model is, if the checkpoint does not say it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the config")
    parser.add_argument(
        "--size", metavar="NAME", help="tiny, small, base or large, of a bare file; instead of --config"
    )
    parser.add_argument("--window", metavar="T,H,W", help="of a bare file (default: 8,7,7)")
    parser.add_argument("--classes", type=int, metavar="N", help="of a bare file; checked against it")
    parser.add_argument("--ema", choices=("yes", "no"), help="of an official file with both: take moving averages")


def given_of(options: argparse.Namespace) -> Given:
    """The same from the options that every program with a --checkpoint has. Raises ConfigError for a wrong window."""
    window = None
    if options.window is not None:
        sides = [int(part) if part.isdecimal() else 0 for part in options.window.split(",")]
        if len(sides) != 3 or not all(sides):
            raise ConfigError(f"--window {options.window}: expected three whole numbers, as 8,7,7")
        window = (sides[0], sides[1], sides[2])
    ema = {"yes": True, "no": False}.get(options.ema)
    return Given(options.checkpoint, options.config, options.set, options.size, window, options.classes, ema)


class Restored(NamedTuple):
    """A model with its weights, in `eval`."""

    classifier: Classifier
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
    described, parts = _described(given, config)
    tensors = our_names(tensors, given.ema)
    if HEAD in tensors:
        classes = len(tensors[HEAD])
        if described.classes not in (None, classes):
            raise CheckpointError(
                f"{path} tells {classes} classes apart, not {described.classes}; set the number of classes to {classes}"
            )
        described = described.model_copy(update={"classes": classes})
    elif needs_classes:
        raise CheckpointError(
            f"{path} has no class head: it was pretrained, not fine-tuned; fine-tune it first, or use `evaluate.py "
            "extract` for its features"
        )
    require_fit(tensors, described.shape, path)
    names = described.class_names
    if names is not None and len(names) != described.classes:
        raise ConfigError(f"{path}: {len(names)} class names for {described.classes} classes; correct its config.json")
    model = described.model
    classifier = Classifier(described.shape, described.classes or 1, bias_index=model.bias_index)
    around = () if HEAD in tensors else AROUND_THE_ENCODER
    weights.load(classifier, tensors, allow_missing=around, allow_unexpected=around)
    return Restored(classifier.eval().requires_grad_(False), described, parts, path, run)


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
    if path.is_file():
        beside = path.parent / "config.json"
        return path, weights.read(path), beside if beside.is_file() else None, None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    commits = checkpoint.commits(folder)
    if commits or (path / "MANIFEST.json").is_file():
        found = checkpoint.newest_valid(folder) if commits else checkpoint.read(path)
        if found is not None:
            run = found.path.parent.parent if found.path.parent.name == "checkpoints" else None
            return found.path, found.weights, found.path / "config.json", run
    file = path / "model.safetensors"
    if file.is_file():
        return file, weights.read(file), path / "config.json" if (path / "config.json").is_file() else None, None
    raise CheckpointError(f"{path} holds no checkpoint: neither checkpoints/step_* nor model.safetensors; give another")


def _described(given: Given, beside: Path | None) -> tuple[Description, dict[str, Part]]:
    """What the model is, as the command line says, or else the file beside the weights."""
    if given.config is not None and given.size is not None:
        raise ConfigError("--config and --size both say what the model is; give one of them")
    if given.size is not None:
        model = {"size": given.size} | ({"window": given.window} if given.window else {})
        values: dict[str, Any] = {"model": model, "classes": given.classes}
        return parse(Description, values, "--size"), {}
    file = Path(given.config) if given.config is not None else beside
    if file is None:
        raise ConfigError(
            f"{given.checkpoint} does not say what model it is of; give --config FILE, or --size with --window and "
            "--classes"
        )
    described, parts = _of_file(file, given.overrides)
    if given.window is not None:
        described = described.model_copy(update={"model": described.model.model_copy(update={"window": given.window})})
    if given.classes is not None:
        described = described.model_copy(update={"classes": given.classes})
    return described, parts


def _of_file(file: Path, overrides: Sequence[str]) -> tuple[Description, dict[str, Part]]:
    """The description in an exported, a fine-tuning or a pretraining configuration."""
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        values = {}  # the readers below say what is wrong with it
    if isinstance(values, dict) and values.get("format") == FORMAT and not overrides:
        return parse(Description, values, str(file)), {}
    if isinstance(values, dict) and isinstance(values.get("data"), dict) and "source" in values["data"]:
        run = importlib.import_module("bevt_fast.finetune_config").load_finetune(file, overrides)
        named = {name: getattr(run.data, name, None) for name in ("test", "heldout", "source")}
        parts = {name: part for name, part in named.items() if part is not None}
        test = parse(TestViews, {name: getattr(run.test, name) for name in TestViews.model_fields}, f"{file}: test")
        return Description(model=_plain(run.model), classes=run.model.classes, clip=_clip(parts), test=test), parts
    run = configuration.load(file, overrides)
    if run.clips is None:
        return Description(model=_plain(run.model)), {}
    parts = {"heldout": run.clips.heldout} if run.clips.heldout else {}
    parts["source"] = run.clips.source
    size = run.clips.view.size
    test = TestViews(size=size, short_side=max(size, run.clips.view.short_side[0]))
    return Description(model=_plain(run.model), clip=_clip(parts), test=test), parts


def _plain(model: Any) -> Model:
    """A model section with what it takes to build it, and without where its training began."""
    kept = {name: getattr(model, name) for name in ("size", "window", "bias_index")}
    return Model(**kept, drop_path=0.0)


def _clip(parts: dict[str, Part]) -> ClipOptions:
    """How the first of these sources draws its frames."""
    options = open_part("bevt_fast.data.sources", next(iter(parts.values())))[1]
    names = [name for name in ClipOptions.model_fields if hasattr(options, name)]
    return ClipOptions(**{name: getattr(options, name) for name in names})


def precision(name: str | None, device: torch.device) -> torch.dtype:
    """The numbers to compute with: what was asked for, else bf16 on a GPU and fp32 on a CPU."""
    name = name or ("bf16" if device.type == "cuda" else "fp32")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
