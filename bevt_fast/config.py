"""A run is a file: every section of the JSON, typed, refused in the first second if a key is wrong.

Each value has one owner. Batch sizes, accumulation, clipping, precision and the optimizer live in typed sections here;
`deepspeed_config` fills them into the DeepSpeed section, which is otherwise passed on word for word, and refuses a file
that writes them twice. Nothing here imports torch, so a misspelt key is refused at once and anywhere.
"""

import argparse
import difflib
import importlib
import json
import pkgutil
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bevt_fast import __version__
from bevt_fast.errors import ConfigError
from bevt_fast.refusals import sentences


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change, types are not guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0, strict=True)]
Real = Annotated[float, Field(strict=True)]
Share = Annotated[Real, Field(ge=0, le=1)]
Beta = Annotated[Real, Field(ge=0, lt=1)]
Window = tuple[Positive, Positive, Positive]


class Part(Section):
    """A file of an open room, by name, and the options that file defines."""

    name: str
    options: dict[str, Any] = {}


class View(Section):
    """How a picture is looked at (SPEC 5.3): short side drawn from a range, crop, flip, colour jitter (images only)."""

    size: Positive = 224
    short_side: tuple[Positive, Positive] = (256, 320)
    flip: Share = 0.5
    colour_jitter: Share = 0.0

    @model_validator(mode="after")
    def _crop_fits(self) -> "View":
        low, high = self.short_side
        if not self.size <= low <= high:
            raise ValueError(
                f"short_side must be a range [low, high] with size {self.size} <= low <= high, got {low}, {high}"
            )
        if self.size % 32:
            raise ValueError(f"size {self.size} is not a multiple of 32, the side of a position of the last stage")
        return self


class Stream(Section):
    """The clip or the image half of a joint batch. `batch` is the whole step's over all processes, `micro_batch` one
    process's.
    """

    source: Part
    mask: Part
    batch: Positive
    micro_batch: Positive
    weight: Annotated[Real, Field(gt=0)] = 1.0
    view: View = View()
    heldout: Part | None = None  # a source of samples never trained on, scored at the end


class CustomSize(Section):
    """Stage widths and depths that have no name in the paper."""

    embed_dim: Positive
    depths: tuple[Positive, Positive, Positive, Positive]
    heads: tuple[Positive, Positive, Positive, Positive]
    mlp_ratio: Annotated[Real, Field(gt=0)] = 4.0


class Model(Section):
    """The encoder and its switches (SPEC 1). `weights` initialises from a checkpoint: ours, official, or a 2-D stage
    one.
    """

    size: Literal["tiny", "small", "base", "large"] | CustomSize = "base"
    window: Window = (8, 7, 7)
    drop_path: Share = 0.1
    image_attention: Literal["t1", "official"] = "t1"
    bias_index: Literal["true", "official"] = "true"
    initialisation: Literal["normal", "fan_in"] = "normal"  # SPEC 1.8, or 1/sqrt(fan-in) for narrow models
    weights: str | None = None
    activation_checkpointing: bool = False


class Optim(Section):
    """AdamW and its schedule (SPEC 5.2): linear warm-up from `warmup_start` times the rate, cosine to `min_lr`."""

    lr: Annotated[Real, Field(gt=0)]
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.05
    grad_clip: Annotated[Real, Field(ge=0)] = 3.0
    warmup_epochs: Annotated[Real, Field(ge=0)] | None = None
    warmup_steps: Annotated[int, Field(ge=0, strict=True)] | None = None
    warmup_start: Share = 0.1
    min_lr: Annotated[Real, Field(ge=0)] = 0.0
    decay_biases: bool = True  # SPEC 5.2: only norms and bias tables are spared; BEiT spares biases too

    @model_validator(mode="after")
    def _one_warmup(self) -> "Optim":
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("warmup_epochs and warmup_steps are one value in two units; write one of them")
        return self


class Train(Section):
    """How long, in what precision, and what is kept. An epoch is one pass over the clips (over the images if there
    are none).
    """

    epochs: Positive | None = None
    steps: Annotated[Positive, Field(lt=10**8)] | None = None  # wins over epochs; checkpoints have eight digits
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    loss_mean: Literal["rank", "global"] = (
        "rank"  # SPEC 4 (X9): mean per micro-batch as official, or over all hidden positions
    )
    # one stream's backward pass before the other's forward pass: less memory; None: wherever that is possible
    streams_in_turn: bool | None = None
    overlap_tokenizer: bool = False  # on a GPU the tokenizer runs beside the encoder, on a stream of its own
    log_every: Positive = 10
    save_every: Positive = 1000
    keep_checkpoints: Positive = 2
    max_bad_steps: Positive = 5  # steps in a row with a loss or gradient that is not finite
    compile: bool = False  # torch.compile runs what the blocks compute token by token
    threads: Positive | None = None  # of torch on a CPU, per process; None: cores / processes
    heldout_batches: Positive = 16
    pictures: Positive = 4  # samples of each stream drawn at the end

    @model_validator(mode="after")
    def _has_length(self) -> "Train":
        if self.epochs is None and self.steps is None:
            raise ValueError("needs the key 'epochs' or 'steps'")
        return self


class Data(Section):
    """Reading files. `decoder` "dali" takes what it can through NVIDIA DALI, on a GPU if there is one, the rest through
    PyAV.
    """

    decoder: Literal["pyav", "dali"] = "pyav"
    workers: Annotated[int, Field(ge=0, strict=True)] = 2  # processes per stream; 0 reads in the training process
    prefetch: Positive = 2  # batches each worker holds ready
    quarantine_share: Share = 0.25  # of a stream's files; more bad files than this stops the run
    # a clip with damaged frames: replace the sample, repeat the frame before, or end the run (NEEDS D02)
    on_damage: Literal["quarantine", "use_previous", "fail"] = "quarantine"
    allow_change: bool = False  # go on from a checkpoint although the lists or the files of the data have changed
    views: Positive | None = None  # frames and crops of a pass repeat those of `views` passes before; None: never
    token_cache: Annotated[str, Field(min_length=1)] | None = None  # a directory of `prepare.py tokens`

    @model_validator(mode="after")
    def _cached_views_repeat(self) -> "Data":
        if self.token_cache is not None and self.views is None:
            raise ValueError("token_cache needs the key 'views': how many views of a sample the cache was made with")
        return self


class Batched(typing.Protocol):
    """A section that says how many samples a step has."""

    @property
    def batch(self) -> int: ...

    @property
    def micro_batch(self) -> int: ...


class AnyConfig(typing.Protocol):
    """What DeepSpeed has to know of a run, whichever program's it is."""

    @property
    def streams(self) -> typing.Mapping[str, Batched]: ...

    @property
    def optim(self) -> Optim: ...

    @property
    def train(self) -> Any: ...

    @property
    def deepspeed(self) -> dict[str, Any]: ...


class Config(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    output: Annotated[str, Field(min_length=1)]
    clips: Stream | None = None
    images: Stream | None = None
    tokenizer: Part
    model: Model = Model()
    optim: Optim
    train: Train
    data: Data = Data()
    deepspeed: dict[str, Any] = {}

    @property
    def streams(self) -> dict[str, Stream]:
        """The streams there are, by name, images first as everywhere."""
        return {name: stream for name, stream in (("images", self.images), ("clips", self.clips)) if stream}

    @property
    def in_turn(self) -> bool:
        """Whether the streams of a micro-batch take turns: two there are, and nothing forbids it."""
        wanted = self.train.streams_in_turn is not False
        return wanted and len(self.streams) == 2 and not self._why_not_in_turn()

    def _why_not_in_turn(self) -> str:
        if self.train.precision == "fp16":
            return "train.precision fp16 scales the loss first"
        zero = self.deepspeed.get("zero_optimization", {})
        return "ZeRO stage 3 puts weights away in between" if zero.get("stage", 1) == 3 else ""

    @model_validator(mode="after")
    def _has_a_stream(self) -> "Config":
        if self.clips is None and self.images is None:
            raise ValueError("needs the key 'clips' or 'images'")
        deepspeed_section(self.deepspeed)
        return self

    @model_validator(mode="after")
    def _streams_can_take_turns(self) -> "Config":
        if self.train.streams_in_turn and (reason := self._why_not_in_turn()):
            raise ValueError(f"train.streams_in_turn is true, but {reason}; leave it out")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_see_their_weights(self) -> "Config":
        zero = self.deepspeed.get("zero_optimization", {})
        if self.train.compile and isinstance(zero, dict) and zero.get("stage") == 3:
            raise ValueError(
                "train.compile cannot go with ZeRO stage 3, which puts the weights of a layer away while others run; "
                "set deepspeed.zero_optimization.stage to 2, or leave train.compile out"
            )
        return self

    @model_validator(mode="after")
    def _clips_keep_their_colours(self) -> "Config":
        if self.clips is not None and self.clips.view.colour_jitter:
            raise ValueError(
                f"clips.view.colour_jitter is {self.clips.view.colour_jitter:g}, but only images are jittered "
                "(SPEC 5.3); leave it out"
            )
        return self

    @model_validator(mode="after")
    def _official_images_fit(self) -> "Config":
        if self.images is not None and self.model.image_attention == "official":
            sides = [32 * window for window in self.model.window[1:]]
            if any(self.images.view.size % side for side in sides):
                raise ValueError(
                    f"model.image_attention 'official' cannot pad (SPEC 1.5): images.view.size {self.images.view.size} "
                    f"is no multiple of {max(sides)}; change the size or model.window, or use image_attention 't1'"
                )
        return self


# DeepSpeed key -> the key of ours that owns its value
OWNERS = {
    "train_batch_size": "clips.batch and images.batch",
    "train_micro_batch_size_per_gpu": "clips.micro_batch and images.micro_batch",
    "gradient_accumulation_steps": "batch and micro_batch of the streams",
    "gradient_clipping": "optim.grad_clip",
    "bf16.enabled": "train.precision",
    "fp16.enabled": "train.precision",
    "optimizer": "optim",
    "scheduler": "optim",
}
# further keys of DeepSpeed's own; it ignores what it does not know, so one that is nearly one of these is a mistake
DEEPSPEED_KEYS = (
    "activation_checkpointing aio amp autotuning bf16 checkpoint comms_logger communication_data_type "
    "compression_training csv_monitor data_efficiency data_types dump_state elasticity flops_profiler fp16 "
    "gradient_predivide_factor memory_breakdown prescale_gradients sparse_gradients steps_per_print "
    "tensorboard torch_autocast wall_clock_breakdown wandb zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer zero_optimization"
).split()


def deepspeed_section(section: dict[str, Any]) -> dict[str, Any]:
    """The DeepSpeed section without its "auto" values. Raises ValueError where it sets what another key owns."""
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in section.items()}
    known = {*DEEPSPEED_KEYS, *OWNERS}
    for key in kept.keys() - known:
        if near := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise ValueError(f"deepspeed has no key {key!r}; did you mean {near[0]!r}?")
    for key in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(kept.get(key, {}), dict):
            raise ValueError(f"deepspeed.{key} must be an object of keys, got {kept[key]!r}")
    stage = kept.get("zero_optimization", {}).get("stage", 1)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ValueError(f"deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    for key, owner in OWNERS.items():
        *outer, last = key.split(".")
        place: Any = kept
        for name in outer:
            place = place.get(name, {}) if isinstance(place, dict) else {}
        if not isinstance(place, dict) or last not in place:
            continue
        if place[last] != "auto":
            raise ValueError(f"deepspeed.{key} is set by {owner}; write it there")
        del place[last]
    return kept


def accumulation(config: AnyConfig, world_size: int) -> int:
    """Micro-batches per step, the same whole number for both streams. Raises ConfigError with the equation."""
    counts = {}
    for name, stream in config.streams.items():
        count, rest = divmod(stream.batch, stream.micro_batch * world_size)
        equation = (
            f"{name}.batch / ({name}.micro_batch * processes) = {stream.batch} / ({stream.micro_batch} * {world_size})"
        )
        if rest or not count:
            raise ConfigError(
                f"{equation} = {stream.batch / (stream.micro_batch * world_size):g} "
                "must be a whole number of micro-batches"
            )
        counts[equation] = count
    if len(set(counts.values())) > 1:
        equations = "; ".join(f"{equation} = {count}" for equation, count in counts.items())
        raise ConfigError(f"both streams must take the same number of micro-batches a step: {equations}")
    return next(iter(counts.values()))


def deepspeed_config(config: AnyConfig, world_size: int) -> dict[str, Any]:
    """What DeepSpeed is given: the `deepspeed` section, and the values that other sections own filled in."""
    section = deepspeed_section(config.deepspeed)
    precision = config.train.precision
    return section | {
        "train_micro_batch_size_per_gpu": sum(stream.micro_batch for stream in config.streams.values()),
        "gradient_accumulation_steps": accumulation(config, world_size),
        "gradient_clipping": config.optim.grad_clip,
        "bf16": section.get("bf16", {}) | {"enabled": precision == "bf16"},
        "fp16": section.get("fp16", {}) | {"enabled": precision == "fp16"},
    }


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a configuration file and apply `key.path=JSON value` overrides. Raises ConfigError with one sentence."""
    return load_as(Config, path, overrides)


AnySection = TypeVar("AnySection", bound=BaseModel)


def load_as(section: type[AnySection], path: str | Path, overrides: typing.Sequence[str] = ()) -> AnySection:
    """`load` for a file of another program, which is one `section`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        near = sorted(str(p) for p in Path(path).parent.glob("*.json"))
        hint = f"; there are: {', '.join(near)}" if near else ""
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a UTF-8 text file") from None
    try:
        values = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected one JSON object of sections, got {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return parse(section, values, str(path))


def parse(section: type[AnySection], values: dict[str, Any], where: str) -> AnySection:
    """Validate `values` as `section`. Raises ConfigError that names the key, what was expected, and the nearest valid
    key.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {sentence}" for sentence in sentences(section, error))) from None


def open_part(room: str, part: Part) -> tuple[Any, Any]:
    """The module `part.name` of the package `room` and its validated `Options`. Raises ConfigError listing the parts
    there are.
    """
    package = importlib.import_module(room)
    there = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_"))
    if part.name not in there:
        near = difflib.get_close_matches(part.name, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{room} has no part {part.name!r}; it has: {', '.join(there)}{hint}")
    module = importlib.import_module(f"{room}.{part.name}")
    return module, parse(module.Options, part.options, f"{room}.{part.name}: options")


def resolved(config: Config) -> dict[str, Any]:
    """The configuration with every default written out, those of the parts too; loading it gives the same run."""
    values = config.model_dump(mode="json", exclude_none=True)
    parts = [("bevt_fast.tokenizers", config.tokenizer, values["tokenizer"])]
    for name, stream in config.streams.items():
        parts.append(("bevt_fast.data.masking", stream.mask, values[name]["mask"]))
        for key, part in (("source", stream.source), ("heldout", stream.heldout)):
            if part is not None:
                parts.append(("bevt_fast.data.sources", part, values[name][key]))
    for room, part, place in parts:
        place["options"] = open_part(room, part)[1].model_dump(mode="json", exclude_none=True)
    return values


def command_line(argv: typing.Sequence[str] | None = None, description: str = "Pretrain BEVT.") -> argparse.Namespace:
    """The options every training program has. Exits with 2 and a sentence on a wrong option, as argparse does."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run, as a JSON file (configs/*.json)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. optim.lr=1e-4; repeatable"
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|DIR",
        help="continue from the newest valid checkpoint, or from one",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print shapes, parameters, FLOPs, predicted memory and time, and the first batch; train nothing",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="the GPU that --dry-run predicts for, e.g. H100, A100, RTX-4090; default: the one here",
    )
    parser.add_argument("--version", action="version", version=f"bevt_fast {__version__}")
    # the launchers append these; the environment variable LOCAL_RANK is what counts
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.gpu is not None and not options.dry_run:
        parser.error("--gpu says what --dry-run predicts for; a run takes the GPU that is there")
    return options


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is written twice in one object")
    return dict(pairs)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, e.g. --set train.steps=100")
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError:
        value = text  # a bare word is a string, as in --set output=runs/mine
    *outer, last = key.split(".")
    place = values
    for name in outer:
        inner = place.get(name)
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {name!r} is {inner!r}, which has no keys")
        place = inner
    place[last] = value
