"""A fine-tuning run is a file: its sections, typed as those of pretraining are (SPEC 6.1).

`mode` says what is learnt: every weight ("finetune"), one linear layer or an attentive pooling before it over a frozen
encoder ("linear", "attentive"), or nothing ("knn": the labels of the nearest training clips decide).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bevt_fast.config import (
    Model,
    Optim,
    Part,
    Positive,
    Real,
    Section,
    Share,
    Window,
    deepspeed_section,
    load_as,
    open_part,
)

Range = tuple[Annotated[Real, Field(gt=0)], Annotated[Real, Field(gt=0)]]
Mode = Literal["finetune", "linear", "attentive", "knn"]


class RandAugment(Section):
    """imgaug's RandAugment as in the official SSv2 recipe (SPEC 6.4): `n` of 18 operations of magnitude `m` of 30.

    It flips half of the clips and crops a little before, whatever `flip` says (SPEC X14): `hidden_flip_and_crop`.
    """

    n: Positive = 4
    m: Annotated[int, Field(ge=0, le=30, strict=True)] = 7
    hidden_flip_and_crop: bool = True


class Views(Section):
    """How a training clip is looked at (SPEC 6.1): short side, a crop of random area and shape, flip, and more."""

    size: Positive = 224
    short_side: Positive = 256
    scale: Range = (0.08, 1.0)  # of the area
    ratio: Range = (3 / 4, 4 / 3)
    flip: Share = 0.5
    randaugment: RandAugment | None = None
    erasing: Share = 0.0  # of the clips that lose a rectangle (SPEC 6.4)
    # half of each micro-batch is the other half played backwards, labelled as the source says: what tells the two apart
    # is then the order of frames alone
    twins: bool = False

    @model_validator(mode="after")
    def _ranges(self) -> "Views":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} must be a range [low, high], got {low:g}, {high:g}")
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the picture's area, at most 1, got {self.scale[1]:g}")
        if self.size % 32:
            raise ValueError(f"size {self.size} is not a multiple of 32, the side of a position of the last stage")
        return self


class FinetuneData(Section):
    """The labelled clips. `batch` is the whole step's over all processes, `micro_batch` one process's."""

    source: Part
    heldout: Part | None = None  # the validation list, scored every `train.validate_every` epochs
    test: Part | None = None  # for evaluate.py; None: heldout
    batch: Positive
    micro_batch: Positive
    decoder: Literal["pyav"] = "pyav"
    workers: Annotated[int, Field(ge=0, strict=True)] = 2
    prefetch: Positive = 2
    quarantine_share: Share = 0.25
    on_damage: Literal["quarantine", "use_previous", "fail"] = "quarantine"
    allow_change: bool = False


class FinetuneModel(Model):
    """The encoder, its start and its head. `pretrained`: any checkpoint of `bevt_fast.models.pretrained`."""

    classes: Annotated[int, Field(ge=2, strict=True)]
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.5
    pretrained: Annotated[str, Field(min_length=1)] | None = None
    # the window of `pretrained`: its bias tables are resized from it to `window`, and never otherwise
    pretrained_window: Window | None = None

    @model_validator(mode="after")
    def _one_start(self) -> "FinetuneModel":
        if self.weights is not None:
            raise ValueError("weights belongs to pretraining; write pretrained")
        if self.pretrained_window is not None and self.pretrained is None:
            raise ValueError("pretrained_window is the window of pretrained, which is not set")
        return self


class FinetuneOptim(Optim):
    """AdamW, and rates of layers as SPEC 6.2 says they come out: by `layer_decay` (K400) or `encoder_lr` (SSv2)."""

    grad_clip: Annotated[Real, Field(ge=0)] = 40.0
    cosine: Literal["epoch", "step"] = "epoch"
    layer_decay: Annotated[Real, Field(gt=0, le=1)] | None = None
    encoder_lr: Annotated[Real, Field(gt=0)] | None = None  # times lr; the head's is lr

    @model_validator(mode="after")
    def _one_rule(self) -> "FinetuneOptim":
        if self.layer_decay is not None and self.encoder_lr is not None:
            raise ValueError("layer_decay and encoder_lr both say the rates of the encoder; write one of them")
        return self


class FinetuneTrain(Section):
    """What is learnt, how long, in what precision, and what is kept. `validate_every` counts epochs; 0: never."""

    mode: Mode = "finetune"
    epochs: Positive | None = None
    steps: Annotated[Positive, Field(lt=10**8)] | None = None  # wins over epochs
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    label_smoothing: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[Real, Field(ge=0)] = 0.0  # alpha of the Beta distribution; 0: none
    ema: bool = False  # score and hand out a moving average of the weights (SPEC 6.3)
    neighbours: Positive = 20  # of mode "knn"
    temperature: Annotated[Real, Field(gt=0)] = 0.07
    probe_heads: Positive = 8  # attention heads of mode "attentive"
    validate_every: Annotated[int, Field(ge=0, strict=True)] = 5
    log_every: Positive = 10
    save_every: Positive = 1000
    keep_checkpoints: Positive = 2
    max_bad_steps: Positive = 5
    threads: Positive | None = None

    @model_validator(mode="after")
    def _has_length(self) -> "FinetuneTrain":
        if self.mode != "knn" and self.epochs is None and self.steps is None:
            raise ValueError("needs the key 'epochs' or 'steps'")
        return self


class Test(Section):
    """The views of evaluate.py (SPEC 6.6)."""

    __test__ = False  # the name starts as pytest's tests do

    clips: Positive = 1
    crops: Literal[1, 3] = 3
    size: Positive = 224
    short_side: Positive = 224


class FinetuneConfig(Section):
    """A whole fine-tuning run."""

    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    output: Annotated[str, Field(min_length=1)]
    data: FinetuneData
    views: Views = Views()
    model: FinetuneModel
    optim: FinetuneOptim
    train: FinetuneTrain
    test: Test = Test()
    deepspeed: dict[str, Any] = Field(default={})

    @property
    def clips_per_step(self) -> int:
        """How many clips of the source a step sees: a twin is the same clip again."""
        return self.data.batch // 2 if self.views.twins else self.data.batch

    @property
    def streams(self) -> dict[str, FinetuneData]:
        """The one stream there is, under the name that messages about its batch have."""
        return {"data": self.data}

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneConfig":
        deepspeed_section(self.deepspeed)
        if self.views.twins and self.data.micro_batch % 2:
            raise ValueError(
                f"views.twins pairs the clips of a micro-batch, and data.micro_batch is {self.data.micro_batch}; make "
                "it even"
            )
        if self.data.heldout is None and self.train.mode == "knn":
            raise ValueError(
                "data names no validation list, and mode 'knn' does nothing but score one; add data.heldout"
            )
        if self.data.heldout is None and self.train.validate_every:
            raise ValueError(
                "data names no validation list to score every train.validate_every epochs; add data.heldout, or set "
                "train.validate_every to 0"
            )
        if self.train.mode in ("linear", "attentive") and (self.train.ema or self.optim.layer_decay):
            raise ValueError(f"mode {self.train.mode!r} learns a head alone; leave train.ema and optim.layer_decay out")
        widest = self.model.size if isinstance(self.model.size, str) else 8 * self.model.size.embed_dim
        if self.train.mode == "attentive" and isinstance(widest, int) and widest % self.train.probe_heads:
            raise ValueError(f"train.probe_heads {self.train.probe_heads} cannot share the width {widest} evenly")
        return self


def load_finetune(path: str | Path, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Read a fine-tuning file as `config.load` reads a pretraining one. Raises ConfigError with one sentence."""
    return load_as(FinetuneConfig, path, overrides)


def resolved(config: FinetuneConfig) -> dict[str, Any]:
    """The configuration with every default written out, those of the sources too; loading it gives the same run."""
    values = config.model_dump(mode="json", exclude_none=True)
    for key in ("source", "heldout", "test"):
        part: Part | None = getattr(config.data, key)
        if part is not None:
            options = open_part("bevt_fast.data.sources", part)[1]
            values["data"][key]["options"] = options.model_dump(mode="json", exclude_none=True)
    return values
