"""What a trained model is, as its run, its exported directory or the command line says it.

A run and an exported directory say themselves what the model is. A bare file does not: then `--config`, or `--size`
with `--window` and `--classes`, says it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from bevt_fast import config as configuration
from bevt_fast.config import Model, Part, Positive, Real, Section, open_part, parse
from bevt_fast.data.sources import ClipOptions
from bevt_fast.errors import ConfigError
from bevt_fast.finetune_config import FinetuneConfig, Test, load_finetune
from bevt_fast.models.video_swin import VideoSwinConfig

FORMAT = "bevt_fast classifier"


class Vote(Section):
    """How the nearest training clips decide, where no head has been learnt."""

    neighbours: Positive
    temperature: Annotated[Real, Field(gt=0)]


class Description(Section):
    """What a classifier is and how it is asked: the config.json of an exported directory. Without `classes` it is an
    encoder alone.
    """

    format: Literal["bevt_fast classifier"] = FORMAT
    model: Model = Model()
    classes: Positive | None = None
    class_names: list[str] | None = None
    pool_heads: Annotated[int, Field(ge=0, strict=True)] = 0  # of an attentive pooling; 0: the mean
    vote: Vote | None = None
    clip: ClipOptions = ClipOptions(frames=32, stride=2)  # SPEC 6.1, Kinetics
    test: Test = Test()

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


def describe(given: Given, beside: Path | None) -> tuple[Description, dict[str, Part]]:
    """What the model is, as the command line says, or else the file `beside` the weights; and the parts of its data.
    Raises ConfigError.
    """
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
        return _of_run(load_finetune(file, overrides))
    run = configuration.load(file, overrides)
    if run.clips is None:
        return Description(model=_plain(run.model)), {}
    parts = {"heldout": run.clips.heldout} if run.clips.heldout else {}
    parts["source"] = run.clips.source
    size = run.clips.view.size
    test = Test(crops=1, size=size, short_side=max(size, run.clips.view.short_side[0]))
    return Description(model=_plain(run.model), clip=_clip(parts), test=test), parts


def _of_run(run: FinetuneConfig) -> tuple[Description, dict[str, Part]]:
    """The description of a fine-tuning run, a probe, or a vote of the nearest clips."""
    named = {"test": run.data.test, "heldout": run.data.heldout, "source": run.data.source}
    parts = {name: part for name, part in named.items() if part is not None}
    mode, train = run.train.mode, run.train
    described = Description(
        model=_plain(run.model),
        classes=run.model.classes,
        pool_heads=train.probe_heads if mode == "attentive" else 0,
        vote=Vote(neighbours=train.neighbours, temperature=train.temperature) if mode == "knn" else None,
        clip=_clip(parts),
        test=run.test,
    )
    return described, parts


def _plain(model: Any) -> Model:
    """A model section with what it takes to build it, and without where its training began."""
    kept = {name: getattr(model, name) for name in ("size", "window", "bias_index")}
    return Model(**kept, drop_path=0.0)


def _clip(parts: dict[str, Part]) -> ClipOptions:
    """How the first of these sources draws its frames."""
    options = open_part("bevt_fast.data.sources", next(iter(parts.values())))[1]
    names = [name for name in ClipOptions.model_fields if hasattr(options, name)]
    return ClipOptions(**{name: getattr(options, name) for name in names})
