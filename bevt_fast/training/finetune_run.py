"""What a fine-tuning run is made of, and the chores of its loop; those it shares with pretraining are `run.Run`'s.

A frozen encoder (modes "linear" and "attentive") stays outside the engine: only the probe learns, and checkpoints still
hold the whole classifier. With a moving average, `model.safetensors` is the average, which is what is scored, and the
weights that go on learning lie beside the optimizer's moments.
"""

import itertools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevt_fast import config as configuration
from bevt_fast import finetune_config
from bevt_fast.data import sampling
from bevt_fast.data.labelled import LabelledClips, LabelledLoader
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError, ConfigError
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.probes import Probe
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig
from bevt_fast.objectives.classification import ClassificationObjective, ClassLoss
from bevt_fast.training import checkpoint, distributed, ema, estimate, layer_decay, schedule
from bevt_fast.training.assemble import fingerprint, require_same_data
from bevt_fast.training.checkpoint import Checkpoint
from bevt_fast.training.distributed import StopSignal, World
from bevt_fast.training.engine import AVERAGE, Engine
from bevt_fast.training.finetune_parts import check_parts, open_classifier, open_heldout, open_labelled
from bevt_fast.training.metrics import Metrics, read_log
from bevt_fast.training.output import find_checkpoint, prepare_output
from bevt_fast.training.quarantine import Quarantine
from bevt_fast.training.run import Run, speak
from bevt_fast.training.validation import validate

log = logging.getLogger("bevt_fast")

LEARNING = "learning"  # suffix of the weights behind a moving average, in optimizer.safetensors


class FinetuneRun(Run):
    """Everything `finetune` uses; built by `build`."""

    config: FinetuneConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    batches: LabelledLoader  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, config: FinetuneConfig, source: Source, heldout: Source | None, world: World, resume: str
    ) -> None:
        self.config, self.source, self.world = config, source, world
        self.validation = heldout
        self.output = Path(config.output)
        self.accumulation = configuration.accumulation(config, world.size)
        self._lock = prepare_output(self.output, resume, world)
        found = find_checkpoint(self.output, resume, world)
        self.epoch_steps = max(1, len(source) // config.clips_per_step)
        train = config.train
        lengths = schedule.lengths(config.optim, train.epochs, train.steps, self.epoch_steps)
        self.last_step, self.warmup_steps = lengths
        self.first_step = found.step if found else 0
        if self.first_step > self.last_step:
            raise ConfigError(
                f"{self.output} is at step {self.first_step}, beyond the {self.last_step} steps of this configuration; "
                "raise train.steps or train.epochs, or take --resume none"
            )
        self.skipped = found.trainer["skipped"] if found else 0
        self.bad_in_a_row = found.trainer["bad_in_a_row"] if found else 0
        self._failed_saves = self._restarts = 0
        self._saved_step = self.first_step if found else -1
        self._fingerprints = {"data": {"data": fingerprint(source)}, "tokenizer": ""}
        self._open_engine(found)
        if found and world.is_main:
            for path in checkpoint.set_aside(self.output / "checkpoints", self.first_step):
                log.warning("going on from step %d, so a later checkpoint is set aside: %s", self.first_step, path)
        self.quarantine = Quarantine(
            self.output / "quarantine.jsonl", {"data": len(source)}, config.data.quarantine_share
        )
        self.batches = LabelledLoader(
            config,
            source,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            first_step=self.first_step,
            dtype=self.engine.dtype,
        )
        self.metrics = Metrics(
            self.output,
            total_steps=self.last_step,
            first_step=self.first_step,
            images_per_step=0,
            clips_per_step=config.data.batch,
            flops_per_step=self._flops(),
            is_main=world.is_main,
        )
        if world.is_main:
            (self.output / "config.json").write_text(self.resolved_config())
            log.info("%s", self.describe())
        self.best = max((row["val/top1"] for row in self._validated()), default=-1.0)
        self.stop = StopSignal()  # last: until here there is nothing to save, and a signal ends the program at once

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

    def learning_rate(self, step: int) -> float:
        hold = self.epoch_steps if self.config.optim.cosine == "epoch" else 1
        return schedule.learning_rate(step, self.last_step, self.warmup_steps, self.config.optim, hold)

    def is_validated(self, step: int) -> bool:
        every = self.config.train.validate_every * self.epoch_steps
        return bool(every and self.validation) and ((step + 1) % every == 0 or step + 1 == self.last_step)

    def micro_batches(self, step: int) -> Iterator[LabelledClips]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The micro-batches of one step; behind a frozen encoder its features stand where the pixels were."""
        for micro in range(self.accumulation):
            batch: Any = self._next_batch()
            # dropped paths and features are drawn from torch's generator: seeded by the micro-batch's place in the
            # step, not by its process
            place = micro * self.world.size + self.world.rank
            torch.manual_seed(sampling.random_for(self.config.seed, "dropout", step, place).getrandbits(63))
            if self.encoder is not None:
                with torch.no_grad():
                    batch = batch._replace(pixels=self.encoder(batch.pixels))
            yield batch

    def average(self, step: int, micro: int) -> None:
        """Move the average of the weights, if there is one, after micro-batch `micro` of a step (SPEC 6.3)."""
        if self.config.train.ema:
            self.engine.average(ema.share(step * self.accumulation + micro))

    def log(self, step: int, losses: list[ClassLoss]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One line of the log: the step's mean over micro-batches and processes."""
        means = torch.stack([torch.stack([value.double() for value in loss]) for loss in losses]).mean(0)
        total, accuracy = distributed.average(means).tolist()
        values = {
            "train/loss": total,
            "train/top1": accuracy,
            "train/lr": self.learning_rate(step),
            "train/grad_norm": self.engine.grad_norm(),
            "train/skipped_steps": self.skipped,
            "data/quarantined": len(self.quarantine),
            "data/worker_restarts": self._restarts,
        }
        pace = self.batches.pace()
        self.metrics.log(step, values, waited=pace.waited, remedy=pace.advice())

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
        self.save(self.last_step)
        if self._saved_step != self.last_step:
            raise CheckpointError(
                f"the last checkpoint could not be written under {self.output}; make room, and --resume auto trains "
                "the steps since the one before again"
            )
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
        count = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.objective.parameters())
        begin = f"going on at step {self.first_step}" if self.first_step else "starting"
        held = f", validated on {len(self.validation):,} clips" if self.validation else ", never validated"
        return (
            f"{begin}: {len(self.source):,} clips of {self.config.model.classes} classes from {self.source.name}{held}"
            f"; mode {self.config.train.mode}, {count / 1e6:.1f} M parameters learn; {self.last_step} steps of "
            f"{self.accumulation} micro-batches on {self.world.size} process(es), {self.world.device.type}, "
            f"{self.config.train.precision}, ZeRO {self.engine.stage}; output {self.output}"
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
