"""A study is a file: how encoders are pretrained, how each is then judged, from which seeds, and which tables are made.

An arm is a pretraining by its name, or "scratch", the random weights that an evaluation starts from without one.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from bevt_fast import config as configuration
from bevt_fast import finetune_config
from bevt_fast.config import Positive, Real, Section, load_as
from bevt_fast.errors import ConfigError

SCRATCH = "scratch"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=64)]
Text = Annotated[str, Field(min_length=1)]
OURS = ("output", "seed", "model.weights", "model.pretrained")  # keys of a run that the study sets


class Program(Section):
    """A run of a training program: its file, what is changed in it, and how long it took where it was tried."""

    config: Text
    set: list[str] = Field(default=[])  # as --set: key=value
    seconds: Annotated[Real, Field(gt=0)] | None = None  # of one run, for --dry-run, until one has been timed here

    @model_validator(mode="after")
    def _leaves_ours(self) -> "Program":
        for override in self.set:
            if (key := override.partition("=")[0]) in OURS:
                raise ValueError(f"the study itself sets {key}; leave {override!r} out")
        return self


class Pretraining(Program):
    """A run of train.py. `start` names the pretraining whose weights of the same seed it begins with."""

    start: Name | None = None


class Evaluation(Program):
    """Runs of finetune.py, one for each of `arms` and seeds. `temporal`: those of the arms that evaluate.py --temporal
    judges afterwards.
    """

    arms: Annotated[list[Name], Field(min_length=1)]
    temporal: list[Name] = Field(default=[])


class Table(Section):
    """Mean and spread over the seeds: a row an arm, a column an evaluation, or with `temporal` three of each."""

    title: Text
    rows: Annotated[list[Name], Field(min_length=1)]
    columns: Annotated[list[Name], Field(min_length=1)]
    temporal: bool = False


class Study(Section):
    """The whole study. `jobs` runs go on side by side; `launcher` starts each (default: this Python)."""

    seeds: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
    jobs: Positive = 1
    launcher: list[Text] = Field(default=[])  # e.g. ["deepspeed"]
    prepare: list[list[Text]] = Field(
        default=[]
    )  # arguments of prepare.py, one command after the other, before everything else
    pretraining: dict[Name, Pretraining] = Field(default={})
    evaluations: Annotated[dict[Name, Evaluation], Field(min_length=1)]
    tables: list[Table] = Field(default=[])

    @model_validator(mode="after")
    def _names_are_known(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ from one another, got {', '.join(map(str, self.seeds))}")
        if SCRATCH in self.pretraining:
            raise ValueError(f"pretraining: {SCRATCH!r} is the arm without one; take another name")
        arms, evaluations = [SCRATCH, *self.pretraining], list(self.evaluations)
        for name, run in self.pretraining.items():
            _known(f"pretraining.{name}.start", [run.start] if run.start else [], list(self.pretraining), "pretraining")
            self.line(name)
        for name, evaluation in self.evaluations.items():
            _known(f"evaluations.{name}.arms", evaluation.arms, arms, "arm")
            _known(f"evaluations.{name}.temporal", evaluation.temporal, evaluation.arms, "arm of it")
        for number, table in enumerate(self.tables):
            _known(f"tables.{number}.rows", table.rows, arms, "arm")
            _known(f"tables.{number}.columns", table.columns, evaluations, "evaluation")
            for name in table.columns if table.temporal else []:
                there = self.evaluations[name].temporal
                _known(f"tables.{number}.rows: evaluations.{name}.temporal", table.rows, there, "arm")
        return self

    def line(self, name: str) -> list[str]:
        """A pretraining and those before it, the first one last. Raises ValueError where it begins with itself."""
        line = [name]
        while (start := self.pretraining[line[-1]].start) is not None:
            if start in line:
                raise ValueError(f"pretraining.{name}.start: {' begins with '.join([*line, start])}; one must begin")
            line.append(start)
        return line


def load(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study and every file it names. Raises ConfigError with one sentence."""
    study = load_as(Study, path, overrides)
    for name, run in study.pretraining.items():
        values_of(run, f"pretraining.{name}")
    for name, run in study.evaluations.items():
        values_of(run, f"evaluations.{name}")
    return study


def values_of(run: Program, where: str) -> dict[str, Any]:
    """What a run will be, with every default; without what the study sets. Raises ConfigError that begins with
    `where`.
    """
    try:
        if isinstance(run, Pretraining):
            values = configuration.resolved(configuration.load(run.config, run.set))
        else:
            found = finetune_config.load_finetune(run.config, run.set)
            if found.train.mode != "knn" and not found.train.validate_every:
                raise ConfigError("train.validate_every is 0, and a study needs the score; set it to 1 or more")
            values = finetune_config.resolved(found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    values.pop("output")
    values.pop("seed")
    values["model"].pop("weights", None)
    values["model"].pop("pretrained", None)
    return values


def _known(where: str, names: Iterable[str], there: Sequence[str], kind: str) -> None:
    """Raises ValueError for a name that is not among those `there`."""
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: there is no {kind} {name!r}, there are: {', '.join(there)}{hint}")
