"""What a pretraining run is made of, and the chores of its loop: rates, logs, checkpoints, stopping, the end.

The learning rate, the masks, the sample order, every crop and every dropped path are pure functions of the seed and the
step: going on from a checkpoint restores the engine and a number, nothing else.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bevt_fast import config as configuration
from bevt_fast.config import Config
from bevt_fast.data import loader, sampling
from bevt_fast.data.batch import Clips, Images, JointBatch, Losses
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError, ConfigError, DataError, NumericalError
from bevt_fast.models.compiled import require_compiler
from bevt_fast.training import checkpoint, distributed, schedule
from bevt_fast.training.assemble import (
    check_parts,
    fingerprint,
    open_engine,
    open_heldout,
    open_sources,
    open_tokenizer,
    tokenizer_fingerprint,
)
from bevt_fast.training.distributed import StopSignal, World
from bevt_fast.training.estimate import step_flops
from bevt_fast.training.metrics import Metrics
from bevt_fast.training.output import find_checkpoint, prepare_output
from bevt_fast.training.quarantine import Quarantine
from bevt_fast.training.token_targets import open_caches

log = logging.getLogger("bevt_fast")


class Run:
    """Everything `train` uses; built by `build`."""

    def __init__(
        self, config: Config, sources: dict[str, Source], heldout: dict[str, Source], world: World, resume: str
    ) -> None:
        self.config, self.sources, self.heldout, self.world = config, sources, heldout, world
        self.output = Path(config.output)
        self.accumulation = configuration.accumulation(config, world.size)
        self._lock = prepare_output(self.output, resume, world)
        found = find_checkpoint(self.output, resume, world)
        self.tokenizer = open_tokenizer(config, self.sources, world)
        caches = open_caches(config, self.sources, self.tokenizer)

        steps_per_epoch = self.steps_per_epoch()
        lengths = schedule.lengths(config.optim, config.train.epochs, config.train.steps, steps_per_epoch)
        self.last_step, self.warmup_steps = lengths
        self.first_step = found.step if found else 0
        if self.first_step > self.last_step:
            raise ConfigError(
                f"{self.output} is at step {self.first_step}, beyond the {self.last_step} steps of this configuration; "
                "raise train.steps or train.epochs, or take --resume none"
            )
        self.skipped = found.trainer["skipped"] if found else 0
        self.bad_in_a_row = found.trainer["bad_in_a_row"] if found else 0
        self._failed_saves = self._restarts = self._not_cached = 0
        self._saved_step = self.first_step if found else -1

        self._fingerprints = {
            "data": {name: fingerprint(source) for name, source in self.sources.items()},
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        self.engine = open_engine(config, self.tokenizer, world, found, self._fingerprints)
        if found and world.is_main:
            for path in checkpoint.set_aside(self.output / "checkpoints", self.first_step):
                log.warning("going on from step %d, so a later checkpoint is set aside: %s", self.first_step, path)
        self.quarantine = Quarantine(
            self.output / "quarantine.jsonl",
            {name: len(s) for name, s in self.sources.items()},
            config.data.quarantine_share,
        )
        self.batches = loader.Loader(
            config,
            self.sources,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            first_step=self.first_step,
            caches=caches,
            dtype=self.engine.dtype,
        )
        self.flops = step_flops(config)
        self.metrics = Metrics(
            self.output,
            total_steps=self.last_step,
            first_step=self.first_step,
            images_per_step=config.images.batch if config.images else 0,
            clips_per_step=config.clips.batch if config.clips else 0,
            flops_per_step=self.flops.necessary,
            is_main=world.is_main,
        )
        if world.is_main:
            (self.output / "config.json").write_text(self.resolved_config())
            log.info("%s", self.describe())
        self.stop = StopSignal()  # last: until here there is nothing to save, and a signal ends the program at once

    # -- the loop's questions ------------------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        return schedule.learning_rate(step, self.last_step, self.warmup_steps, self.config.optim)

    def is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step + 1 == self.last_step

    def is_saved(self, step: int) -> bool:
        return (step + 1) % self.config.train.save_every == 0 or step + 1 == self.last_step

    def micro_batches(self, step: int) -> Iterator[tuple[JointBatch, tuple[float, float] | None]]:
        """The micro-batches of one step, and for a global mean how many positions each stream hides per micro-batch."""
        batches: Iterator[JointBatch] | list[JointBatch] = (self._next_batch() for _ in range(self.accumulation))
        hidden = None
        if self.config.train.loss_mean == "global":
            batches = list(batches)
            counts = [[_hidden(batch.images, 1), _hidden(batch.clips, 2)] for batch in batches]
            images, clips = distributed.average(
                torch.tensor(counts, dtype=torch.float64, device=self.world.device).mean(0)
            ).tolist()
            hidden = (images, clips)
        for micro, batch in enumerate(batches):
            # dropped paths are drawn from torch's generator: seeded by the micro-batch's place in the step, not by
            # its process
            torch.manual_seed(
                sampling.random_for(
                    self.config.seed, "drop_path", step, micro * self.world.size + self.world.rank
                ).getrandbits(63)
            )
            yield lower(batch, self.engine.dtype), hidden

    def _next_batch(self) -> JointBatch:
        try:
            return next(self.batches)
        except DataError as error:  # too many bad files in a row: they are written down before the run ends
            self.quarantine.add([*self.batches.bad_files, *error.records])
            raise

    def check(self, step: int, losses: list[Losses]) -> None:
        """Count a step that changed nothing because a loss or gradient was not finite. Raises NumericalError after
        too many.
        """
        if self.engine.step_applied:
            self.bad_in_a_row = 0
            return
        self.skipped += 1
        value = distributed.average(torch.stack([loss.total.float() for loss in losses]).mean()).item()
        if math.isfinite(value) and self.engine.scaler_is_searching:
            return
        self.bad_in_a_row += 1
        log.warning(
            "step %d skipped: loss %s or its gradient is not finite (%d in a row)", step, value, self.bad_in_a_row
        )
        if self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise NumericalError(
                f"{self.bad_in_a_row} steps in a row (up to step {step}) had a loss or gradient that is not finite; "
                f"lower optim.lr, or go on from the last checkpoint in {self.output} with --resume auto"
            )

    def log(self, step: int, losses: list[Losses]) -> None:
        """One line of the log: the step's mean over micro-batches and processes."""
        means = torch.stack([torch.stack([value.double() for value in loss]) for loss in losses]).mean(0)
        total, image, clip, image_accuracy, clip_accuracy = distributed.average(means).tolist()
        values = {"train/loss": total}
        if self.config.images:
            values |= {"train/loss_image": image, "train/mask_acc_2d": image_accuracy}
        if self.config.clips:
            values |= {"train/loss_video": clip, "train/mask_acc_3d": clip_accuracy}
        values |= {
            "train/lr": self.learning_rate(step),
            "train/grad_norm": self.engine.grad_norm(),
            "train/skipped_steps": self.skipped,
            "data/quarantined": len(self.quarantine),
            "data/worker_restarts": self._restarts,
        }
        if self.config.data.token_cache:
            if self.batches.not_cached and not self._not_cached:
                log.warning("samples that are not as the token cache saw them are tokenized now (data/not_cached)")
            values["data/not_cached"] = self._not_cached = self.batches.not_cached
        pace = self.batches.pace()
        self.metrics.log(step, values, waited=pace.waited, remedy=pace.advice())

    def must_stop(self) -> int:
        """The exit code to stop with, agreed by all processes: a signal, or too many bad files (raises DataError)."""
        self.quarantine.add(self.batches.bad_files)
        if self.batches.restarts > self._restarts:
            self._restarts = self.batches.restarts
            log.warning("a loader process died and was replaced (%d so far); the samples are the same", self._restarts)
        verdict = self.quarantine.verdict()
        code = distributed.agree(DataError.exit_code if verdict else self.stop.poll(), self.world.device)
        if code == DataError.exit_code:
            raise DataError(verdict or f"too many bad files, see {self.quarantine.path}")
        if code:
            log.warning("asked to stop: saving a checkpoint; --resume auto goes on from it")
        return code

    def state(self) -> tuple[Iterator[tuple[str, Tensor]], Iterator[tuple[str, Tensor]]]:
        """What a checkpoint holds of the weights and of the optimizer, by parameter name. Collective."""
        return self.engine.weights(), self.engine.moments()

    def save(self, step: int) -> None:
        """Commit a checkpoint; a disk that refuses does not end the run, three refusals in a row do."""
        if step == self._saved_step:
            return
        (weights, moments), scalars = self.state(), self.engine.scalars()
        failure = ""
        if self.world.is_main:
            trainer = (
                scalars
                | {
                    "skipped": self.skipped,
                    "bad_in_a_row": self.bad_in_a_row,
                    "world_size": self.world.size,
                }
                | self._fingerprints
            )
            try:
                checkpoint.write(
                    self.output / "checkpoints",
                    step,
                    weights,
                    moments,
                    trainer,
                    self.resolved_config(),
                    self.config.train.keep_checkpoints,
                )
            except OSError as error:
                failure = str(error)
        # what is gathered is gathered by all: the others, and a writer that gave up early, run through the rest
        for gathered in (weights, moments):
            for _ in gathered:
                pass
        failed = distributed.agree(int(bool(failure)), self.world.device)
        self._failed_saves = self._failed_saves + 1 if failed else 0
        if not failed:
            self._saved_step = step
            return
        log.warning(
            "checkpoint of step %d could not be written: %s; earlier ones are intact",
            step,
            failure or "see the first process",
        )
        if self._failed_saves >= 3:
            raise CheckpointError(f"three checkpoints in a row could not be written under {self.output}: {failure}")

    def finish(self) -> None:
        """The end of a run: score held-out samples, draw pictures, say where everything lies."""
        from bevt_fast.training.ending import finish

        self.save(self.last_step)
        if self._saved_step != self.last_step:
            raise CheckpointError(
                f"the last checkpoint could not be written under {self.output}; make room, and --resume auto trains "
                "the steps since the one before again"
            )
        self.tokenizer = self.tokenizer.to(self.world.device)  # a token cache has only training samples
        finish(self)

    def close(self) -> None:
        """Stop the workers and the log; leave the other processes."""
        self.batches.close()
        self.metrics.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self._lock:
            self._lock.close()

    # -- what it is --------------------------------------------------------------------------------------------------

    def steps_per_epoch(self) -> int:
        """An epoch is a pass over the clips, or over the images where there are no clips."""
        name = "clips" if self.config.clips else "images"
        stream = self.config.streams[name]
        return max(1, len(self.sources[name]) // stream.batch)

    def resolved_config(self) -> str:
        return json.dumps(configuration.resolved(self.config), indent=2)

    def describe(self) -> str:
        parts = [f"{len(source):,} {name} from {source.name}" for name, source in self.sources.items()]
        count = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.objective.parameters())
        begin = f"going on at step {self.first_step}" if self.first_step else "starting"
        return (
            f"{begin}: {', '.join(parts)}; {count / 1e6:.1f} M parameters; {self.last_step} steps of "
            f"{self.accumulation} micro-batches on {self.world.size} process(es), {self.world.device.type}, "
            f"{self.config.train.precision}, ZeRO {self.engine.stage}; {self.flops.necessary:.3g} FLOP a step are "
            f"necessary (nominal {self.flops.nominal:.3g}); output {self.output}"
        )


def build(config: Config, resume: str = "none") -> Run:
    """Everything a run needs, cheapest first, so that a mistake is found before anything expensive starts."""
    distributed.read_environment()
    speak(is_main=os.environ["RANK"] == "0")
    configuration.accumulation(config, distributed.world_size_from_environment())
    check_parts(config)
    sources, heldout = open_sources(config), open_heldout(config)
    world = distributed.start(config.train.threads)
    if config.train.compile:
        require_compiler(world.device)
    return Run(config, sources, heldout, world, resume)


def speak(is_main: bool) -> None:
    """The first process says what it does on stderr; of the others, and of other libraries, only what is wrong."""
    logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    if is_main:
        log.setLevel(logging.INFO)


def lower(batch: JointBatch, dtype: torch.dtype) -> JointBatch:
    """The encoder's pixels in the module's own precision; the tokenizer's stay float32."""
    images, clips = batch
    return JointBatch(
        images._replace(pixels=images.pixels.to(dtype)) if images else None,
        clips._replace(pixels=clips.pixels.to(dtype)) if clips else None,
    )


def _hidden(stream: Images | Clips | None, frames: int) -> float:
    return float(stream.mask.sum()) * frames if stream else 0.0
