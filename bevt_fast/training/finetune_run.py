"""What a fine-tuning run is made of, and the chores of its loop; those it shares with pretraining are `BaseRun`'s.

A frozen encoder (modes "linear" and "attentive") stays outside the engine: only the probe learns, and checkpoints still
hold the whole classifier. With a moving average, `model.safetensors` is the average, which is what is scored, and the
weights that go on learning lie beside the optimizer's moments.
"""

import itertools
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bevt_fast import config as configuration
from bevt_fast import finetune_config
from bevt_fast.data.labelled import LabelledClips, LabelledLoader
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.probes import Probe
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig
from bevt_fast.objectives.classification import ClassificationObjective, ClassLoss
from bevt_fast.training import checkpoint, distributed, ema, estimate, layer_decay
from bevt_fast.training.assemble import fingerprint, require_same_data
from bevt_fast.training.base_run import BaseRun, speak
from bevt_fast.training.checkpoint import Checkpoint
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import AVERAGE, Engine
from bevt_fast.training.finetune_parts import check_parts, open_classifier, open_heldout, open_labelled
from bevt_fast.training.metrics import read_log
from bevt_fast.training.validation import validate

log = logging.getLogger("bevt_fast")

LEARNING = "learning"  # suffix of the weights behind a moving average, in optimizer.safetensors


class FinetuneRun(BaseRun):
    """Everything `finetune` uses; built by `build`."""

    config: FinetuneConfig

    def __init__(
        self, config: FinetuneConfig, source: Source, heldout: Source | None, world: World, resume: str
    ) -> None:
        super().__init__(config, world, resume)
        self.source, self.validation = source, heldout
        self.epoch_steps = max(1, len(source) // config.clips_per_step)
        self._place(self.epoch_steps, hold=self.epoch_steps if config.optim.cosine == "epoch" else 1)
        self._fingerprints = {"data": {"data": fingerprint(source)}, "tokenizer": ""}
        self._open_engine(self._found)
        self._watch({"data": len(source)})
        self.batches = LabelledLoader(
            config,
            source,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            first_step=self.first_step,
            dtype=self.engine.dtype,
        )
        self.best = max((row["val/top1"] for row in self._validated()), default=-1.0)
        self._begin(0, config.data.batch, self._flops())

    def _open_engine(self, found: Checkpoint | None) -> None:
        """The engine around what learns, from its start or as a checkpoint left it."""
        config, device = self.config, self.world.device
        classifier = open_classifier(config, initialise=found is None)
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        if found:
            require_same_data(found, self._fingerprints, config.data.allow_change, "model.pretrained")
            checkpoint.require_same_architecture(found, classifier)
            weights, moments = _without_average(found, config.train.ema)
            classifier.load_state_dict(weights)
        self.encoder: VideoSwin | None = None
        self._frozen: dict[str, Tensor] = {}
        model: torch.nn.Module = classifier
        if config.train.mode != "finetune":
            self._frozen = {f"encoder.{name}": value for name, value in classifier.encoder.state_dict().items()}
            model = Probe(classifier)
        depths = VideoSwinConfig.of(config.model).depths
        groups = layer_decay.parameter_groups(model.named_parameters(), config.optim, depths)
        self.engine = Engine(
            ClassificationObjective(model).to(device), config, self.world, groups, has_average=config.train.ema
        )
        if self._frozen:
            self._frozen = {name: value.clone() for name, value in self._frozen.items()}  # whole, whatever computes
            self.encoder = classifier.encoder.to(device, self.engine.dtype).eval().requires_grad_(False)
        if found:
            self.engine.load(weights, moments)
            self.engine.load_scalars(found.trainer)
            log.info("resumed from %s", found.path)

    # -- the loop's questions ------------------------------------------------------------------------------------------

    def is_validated(self, step: int) -> bool:
        every = self.config.train.validate_every * self.epoch_steps
        return bool(every and self.validation) and ((step + 1) % every == 0 or step + 1 == self.last_step)

    def micro_batches(self, step: int) -> Iterator[LabelledClips]:
        """The micro-batches of one step; behind a frozen encoder its features stand where the pixels were."""
        for micro in range(self.accumulation):
            batch: Any = self._next_batch()
            self._seed("dropout", step, micro)
            if self.encoder is not None:
                with torch.no_grad():
                    batch = batch._replace(pixels=self.encoder(batch.pixels))
            yield batch

    def average(self, step: int, micro: int) -> None:
        """Move the average of the weights, if there is one, after micro-batch `micro` of a step (SPEC 6.3)."""
        if self.config.train.ema:
            self.engine.average(ema.share(step * self.accumulation + micro))

    def log(self, step: int, losses: list[ClassLoss]) -> None:
        """One line of the log: the step's mean over micro-batches and processes."""
        means = torch.stack([torch.stack([value.double() for value in loss]) for loss in losses]).mean(0)
        total, accuracy = distributed.average(means).tolist()
        self._log(step, {"train/loss": total, "train/top1": accuracy})

    def validate(self, step: int) -> None:
        """Score the validation list with what would be saved now, log it, and keep the best under `best/`."""
        assert self.validation is not None
        weights = dict(self.state()[0])
        classifier = Classifier.of(self.config)
        classifier.load_state_dict(weights)
        values = validate(classifier, self.validation, self.config, self.world, self.engine.dtype)
        self.metrics.log(step, values)
        if values["val/top1"] <= self.best:
            return
        self.best = values["val/top1"]
        if self.world.is_main:
            trainer = {"step": step + 1} | values
            parts = (iter(weights.items()), iter(()), trainer, self.resolved_config())
            try:
                checkpoint.write(self.output / "best", step + 1, *parts, keep=1)
            except OSError as error:
                log.warning("the best weights could not be written: %s", error)

    def state(self) -> tuple[Iterator[tuple[str, Tensor]], Iterator[tuple[str, Tensor]]]:
        """The whole classifier as it is scored, and all that learning goes on from."""
        weights, moments = self.engine.weights(), self.engine.moments()
        if not self.config.train.ema:
            return itertools.chain(iter(self._frozen.items()), weights), moments
        suffix = f".{AVERAGE}"
        averages = ((n.removesuffix(suffix), value) for n, value in self.engine.moments() if n.endswith(suffix))
        others = ((name, value) for name, value in moments if not name.endswith(suffix))
        return averages, itertools.chain(others, ((f"{name}.{LEARNING}", value) for name, value in weights))

    def finish(self) -> None:
        """The end of a run: score it if it was stopped before that, and say where everything lies."""
        self._save_last()
        last = self.last_step - 1
        if self.is_validated(last):
            # the main process alone reads its log: another may see an older one, and scoring takes all of them
            missing = self.world.is_main and not any(row["step"] == last for row in self._validated())
            if distributed.agree(int(missing), self.world.device):
                self.validate(last)
        if self.world.is_main:
            log.info("%s", self.summary())

    # -- what it is --------------------------------------------------------------------------------------------------

    def resolved_config(self) -> str:
        return json.dumps(finetune_config.resolved(self.config), indent=2)

    def describe(self) -> str:
        held = f", validated on {len(self.validation):,} clips" if self.validation else ", never validated"
        return (
            f"{self._begins()}: {len(self.source):,} clips of {self.config.model.classes} classes from "
            f"{self.source.name}{held}; mode {self.config.train.mode}, {self._parameters()} learn; {self._course()}; "
            f"output {self.output}"
        )

    def summary(self) -> str:
        """The closing lines: what was reached, and where everything lies."""
        lines = [""]
        if rows := self._validated():
            last, best = rows[-1], max(rows, key=lambda row: row["val/top1"])
            place = self.output / "best" / f"step_{best['step'] + 1:08d}"
            lines.append(
                f"validation: top-1 {last['val/top1']:.1%} at the end, best {best['val/top1']:.1%} after step "
                f"{best['step'] + 1}: {place}"
            )
        lines.append(f"everything is under {self.output}: log.jsonl, tensorboard/, config.json, checkpoints/, best/")
        if len(self.quarantine):
            lines.append(f"{len(self.quarantine)} bad files were replaced; they are listed in {self.quarantine.path}")
        return "\n".join(lines)

    def _validated(self) -> list[dict[str, Any]]:
        place = self.output / "log.jsonl"
        return [row for row in read_log(place) if "val/top1" in row] if place.exists() else []

    def _flops(self) -> float:
        """Of a step: forward and backward of the encoder, or forward alone where it is frozen (SPEC 8.2)."""
        assert self.source.frames is not None
        shape = estimate.StreamShape("clips", self.source.frames.count, self.config.views.size, 0.0)
        once = estimate.encoder_flops(VideoSwinConfig.of(self.config.model), shape)
        return float(once * self.config.data.batch * (3 if self.config.train.mode == "finetune" else 1))


def _without_average(found: Checkpoint, has_average: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that go on learning, and the moments; of a run with a moving average that is one of them.

    Raises CheckpointError if the run had one and shall have none now, or the other way round.
    """
    suffix = f".{LEARNING}"
    learning = {n.removesuffix(suffix): value for n, value in found.moments.items() if n.endswith(suffix)}
    if bool(learning) != has_average:
        raise CheckpointError(
            f"{found.path} was written with train.ema={json.dumps(bool(learning))}; set it so, or begin a new run with "
            f"model.pretrained = {found.path / 'model.safetensors'}"
        )
    moments = {name: value for name, value in found.moments.items() if not name.endswith(suffix)}
    if not has_average:
        return found.weights, moments
    return learning, moments | {f"{name}.{AVERAGE}": value for name, value in found.weights.items()}


def build(config: FinetuneConfig, resume: str = "none") -> FinetuneRun:
    """Everything a run needs, cheapest first, so that a mistake is found before anything expensive starts."""
    distributed.read_environment()
    speak(is_main=os.environ["RANK"] == "0")
    configuration.accumulation(config, distributed.world_size_from_environment())
    check_parts(config)
    source = open_labelled(config)
    heldout = open_heldout(config, source)
    return FinetuneRun(config, source, heldout, distributed.start(config.train.threads), resume)
