"""What every training run has, and the chores that the loops share: logs, checkpoints, stopping, the end."""

import logging
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bevt_fast import config as configuration
from bevt_fast.data import sampling
from bevt_fast.errors import CheckpointError, ConfigError, DataError, NumericalError
from bevt_fast.training import checkpoint, distributed, schedule
from bevt_fast.training.checkpoint import Checkpoint
from bevt_fast.training.distributed import StopSignal, World
from bevt_fast.training.engine import Engine
from bevt_fast.training.metrics import Metrics
from bevt_fast.training.output import find_checkpoint, prepare_output
from bevt_fast.training.quarantine import Quarantine

log = logging.getLogger("bevt_fast")


class HasTotal(Protocol):
    """The losses of a micro-batch."""

    @property
    def total(self) -> Tensor: ...


class BaseRun(ABC):
    """A run's place in its schedule, its engine, log and checkpoints.

    What kind of run it is opens the engine and the batches, between `_place` and `_begin`.
    """

    engine: Engine
    batches: Any  # an endless iterator of micro-batches: a Loader or a LabelledLoader
    _fingerprints: dict[str, Any]

    def __init__(self, config: Any, world: World, resume: str) -> None:
        """Takes the output, and finds the checkpoint to go on from, if there is one."""
        self.config, self.world = config, world
        self.output = Path(config.output)
        self.accumulation = configuration.accumulation(config, world.size)
        self._lock = prepare_output(self.output, resume, world)
        self._found: Checkpoint | None = find_checkpoint(self.output, resume, world)
        self._failed_saves = self._restarts = 0

    def _place(self, steps_per_epoch: int, hold: int = 1) -> None:
        """Where the run begins and ends; its learning rate stays for `hold` steps. Raises ConfigError if it is beyond
        its end.
        """
        self.hold = hold
        found, train = self._found, self.config.train
        lengths = schedule.lengths(self.config.optim, train.epochs, train.steps, steps_per_epoch)
        self.last_step, self.warmup_steps = lengths
        self.first_step = found.step if found else 0
        if self.first_step > self.last_step:
            raise ConfigError(
                f"{self.output} is at step {self.first_step}, beyond the {self.last_step} steps of this configuration; "
                "raise train.steps or train.epochs, or take --resume none"
            )
        self.skipped = found.trainer["skipped"] if found else 0
        self.bad_in_a_row = found.trainer["bad_in_a_row"] if found else 0
        self._saved_step = self.first_step if found else -1

    def _watch(self, lengths: Mapping[str, int]) -> None:
        """Sets later checkpoints aside, and opens the list of bad files; `lengths` are those of the sources."""
        if self._found and self.world.is_main:
            for path in checkpoint.set_aside(self.output / "checkpoints", self.first_step):
                log.warning("going on from step %d, so a later checkpoint is set aside: %s", self.first_step, path)
        place = self.output / "quarantine.jsonl"
        self.quarantine = Quarantine(place, dict(lengths), self.config.data.quarantine_share)

    def _begin(self, images: int, clips: int, flops: float) -> None:
        """Opens the log, of so many samples and FLOPs a step, and listens to signals."""
        self.metrics = Metrics(
            self.output,
            total_steps=self.last_step,
            first_step=self.first_step,
            images_per_step=images,
            clips_per_step=clips,
            flops_per_step=flops,
            is_main=self.world.is_main,
        )
        if self.world.is_main:
            (self.output / "config.json").write_text(self.resolved_config())
            log.info("%s", self.describe())
        self.stop = StopSignal()  # last: until here there is nothing to save, and a signal ends the program at once

    # -- the loop's questions ------------------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        return schedule.learning_rate(step, self.last_step, self.warmup_steps, self.config.optim, self.hold)

    def is_logged(self, step: int) -> bool:
        return step % self.config.train.log_every == 0 or step + 1 == self.last_step

    def is_saved(self, step: int) -> bool:
        return (step + 1) % self.config.train.save_every == 0 or step + 1 == self.last_step

    def _next_batch(self) -> Any:
        try:
            return next(self.batches)
        except DataError as error:  # too many bad files in a row: they are written down before the run ends
            self.quarantine.add([*self.batches.bad_files, *error.records])
            raise

    def _seed(self, purpose: str, step: int, micro: int) -> None:
        """What a step drops is drawn from torch's generator: seeded by the micro-batch's place in the step, not by its
        process.
        """
        place = micro * self.world.size + self.world.rank
        torch.manual_seed(sampling.random_for(self.config.seed, purpose, step, place).getrandbits(63))

    def _log(self, step: int, values: dict[str, float]) -> None:
        """One line of the log: `values`, and what every run tells."""
        values |= {
            "train/lr": self.learning_rate(step),
            "train/grad_norm": self.engine.grad_norm(),
            "train/skipped_steps": self.skipped,
            "data/quarantined": len(self.quarantine),
            "data/worker_restarts": self._restarts,
        }
        pace = self.batches.pace()
        self.metrics.log(step, values, waited=pace.waited, remedy=pace.advice())

    def check(self, step: int, losses: Sequence[HasTotal]) -> None:
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

    def _save_last(self) -> None:
        """The checkpoint a run ends with. Raises CheckpointError where it cannot be written."""
        self.save(self.last_step)
        if self._saved_step != self.last_step:
            raise CheckpointError(
                f"the last checkpoint could not be written under {self.output}; make room, and --resume auto trains "
                "the steps since the one before again"
            )

    def close(self) -> None:
        """Stop the workers and the log; leave the other processes."""
        self.batches.close()
        self.metrics.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if self._lock:
            self._lock.close()

    # -- what it is --------------------------------------------------------------------------------------------------

    @abstractmethod
    def resolved_config(self) -> str:
        """The configuration as JSON, every default written out."""

    @abstractmethod
    def describe(self) -> str:
        """What the run is, for the log."""

    def _begins(self) -> str:
        return f"going on at step {self.first_step}" if self.first_step else "starting"

    def _parameters(self) -> str:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.objective.parameters())
        return f"{count / 1e6:.1f} M parameters"

    def _course(self) -> str:
        return (
            f"{self.last_step} steps of {self.accumulation} micro-batches on {self.world.size} process(es), "
            f"{self.world.device.type}, {self.config.train.precision}, ZeRO {self.engine.stage}"
        )


def speak(is_main: bool) -> None:
    """The first process says what it does on stderr; of the others, and of other libraries, only what is wrong."""
    logging.basicConfig(level=logging.WARNING if is_main else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    if is_main:
        log.setLevel(logging.INFO)
