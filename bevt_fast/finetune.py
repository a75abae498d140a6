"""Train a classifier: `deepspeed bevt_fast/finetune.py --config configs/finetune/kinetics400.json`, or torchrun, srun,
or plain python.

Fine-tuning, a linear or an attentive probe, and nearest neighbours are configurations of this one text (`train.mode`).
"""

import contextlib
import sys
from pathlib import Path

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]
else:  # run as a module of a clone that may not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from bevt_fast.config import command_line
from bevt_fast.errors import UserError, outcome
from bevt_fast.finetune_config import FinetuneConfig, load_finetune

if __name__ == "__main__":  # a wrong key is refused here, before torch is imported
    try:
        ARGUMENTS = command_line(description="Train a classifier.")
        CONFIG = load_finetune(ARGUMENTS.config, ARGUMENTS.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

from typing import TYPE_CHECKING

from bevt_fast.data.labelled import LabelledClips
from bevt_fast.objectives.classification import ClassLoss
from bevt_fast.training.finetune_memory import out_of_memory
from bevt_fast.training.finetune_run import FinetuneRun, build
from bevt_fast.training.prediction import explained
from bevt_fast.training.validation import nearest_neighbours

if TYPE_CHECKING:
    from bevt_fast.training.engine import Engine


def classify_step(engine: "Engine", batch: LabelledClips) -> ClassLoss:
    """One micro-batch: name the class of each clip, one backward."""
    losses = engine(batch.pixels, batch.targets)
    engine.backward(losses.total)
    engine.step()  # DeepSpeed changes the weights on the last micro-batch of a step, and only then
    return ClassLoss(*(value.detach() for value in losses))


def finetune(run: FinetuneRun) -> int:
    """Train to the last step, or until somebody asks to stop. Returns the exit code."""
    for step in range(run.first_step, run.last_step):
        run.engine.set_learning_rate(run.learning_rate(step))
        losses = []
        for micro, batch in enumerate(run.micro_batches(step)):
            losses.append(classify_step(run.engine, batch))
            run.average(step, micro)
        run.check(step, losses)
        if run.is_logged(step):
            run.log(step, losses)  # reading a loss waits for the GPU, so it happens here and nowhere else
        stop = run.must_stop()
        if run.is_saved(step) or stop:
            run.save(step + 1)
        if stop:
            return stop
        if run.is_validated(step):
            run.validate(step)
    run.finish()
    return 0


def main(config: FinetuneConfig, resume: str = "none", dry_run: bool = False, gpu: str | None = None) -> int:
    """Build the run, or only describe it, as it would be on `gpu`; returns the exit code."""
    if dry_run:
        from bevt_fast.training.finetune_dry_run import describe

        for paragraph in describe(config, gpu):
            print(paragraph, flush=True)
        return 0
    with explained(lambda error: out_of_memory(config, error)):
        if config.train.mode == "knn":
            nearest_neighbours(config)
            return 0
        with contextlib.closing(build(config, resume)) as run:
            return finetune(run)


if __name__ == "__main__":
    # an interrupt ends it before the first step only; afterwards the run saves and returns the code itself
    sys.exit(outcome(lambda: main(CONFIG, ARGUMENTS.resume, ARGUMENTS.dry_run, ARGUMENTS.gpu)))
