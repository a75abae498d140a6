"""Pretrain BEVT: `deepspeed bevt_fast/train.py --config configs/joint.json`, or torchrun, srun, or plain python.

Image-only, clip-only and joint pretraining are configurations of this one text: a stream that the configuration
leaves out is None and adds nothing to the loss.
"""

import contextlib
import sys
from pathlib import Path

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]
else:  # run as a module of a clone that may not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from bevt_fast.config import Config, command_line, load
from bevt_fast.errors import UserError, outcome

if __name__ == "__main__":  # a wrong key is refused here, before torch is imported
    try:
        ARGUMENTS = command_line()
        CONFIG = load(ARGUMENTS.config, ARGUMENTS.set)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

from typing import TYPE_CHECKING

import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets, send, unknown
from bevt_fast.training.overlap import beside
from bevt_fast.training.prediction import explained, out_of_memory
from bevt_fast.training.run import Run, build

if TYPE_CHECKING:
    from bevt_fast.tokenizers import Tokenizer
    from bevt_fast.training.engine import Engine


@torch.no_grad()
def hidden_targets(tokenizer: "Tokenizer", batch: JointBatch) -> Targets:
    """The ids of the hidden cells of both streams; 0 where the batch hides nothing, and nobody asks."""
    images, clips = batch
    return Targets(
        stream_targets(tokenizer, images) if images else None,
        stream_targets(tokenizer, clips) if clips else None,
    )


def stream_targets(tokenizer: "Tokenizer", stream: Images | Clips) -> torch.Tensor:
    """The ids of one stream: the tokenizer's, or those of a token cache and the tokenizer's where it has none."""
    hidden = stream.mask
    if isinstance(stream, Clips):
        hidden = hidden.repeat_interleave(stream.token_pixels.shape[1] // hidden.shape[1], dim=1)
    if stream.known is None:
        return tokenizer(stream.token_pixels, hidden)
    device, missing = stream.pixels.device, unknown(stream.known)
    ids = send(stream.known, device)
    if not len(missing):
        return ids
    # with a cache the tokenizer waits on the CPU until it is asked
    asked = tokenizer.to(device)(stream.token_pixels, hidden[missing])
    return ids.index_copy(0, send(missing, device), asked)


def joint_step(
    engine: "Engine", tokenizer: "Tokenizer", batch: JointBatch, hidden: tuple[float, float] | None = None
) -> Losses:
    """One micro-batch: name the hidden cells of both streams, predict them, one backward through the encoder.

    `hidden` is given for `train.loss_mean` "global" only: hidden images' and clips' positions per micro-batch of the
    step.
    """
    targets = beside(getattr(engine, "side", None), hidden_targets, tokenizer, batch)
    losses = engine(batch, targets, hidden)
    engine.backward(losses.total)
    engine.step()  # DeepSpeed changes the weights on the last micro-batch of a step, and only then
    return Losses(*(value.detach() for value in losses))


def train(run: Run) -> int:
    """Train to the last step, or until somebody asks to stop. Returns the exit code."""
    for step in range(run.first_step, run.last_step):
        run.engine.set_learning_rate(run.learning_rate(step))
        losses = [joint_step(run.engine, run.tokenizer, batch, hidden) for batch, hidden in run.micro_batches(step)]
        run.check(step, losses)
        if run.is_logged(step):
            run.log(step, losses)  # reading a loss waits for the GPU, so it happens here and nowhere else
        stop = run.must_stop()
        if run.is_saved(step) or stop:
            run.save(step + 1)
        if stop:
            return stop
    run.finish()
    return 0


def main(config: Config, resume: str = "none", dry_run: bool = False, gpu: str | None = None) -> int:
    """Build the run, or only describe it, as it would be on `gpu`; returns the exit code."""
    if dry_run:
        from bevt_fast.training.dry_run import describe

        for paragraph in describe(config, gpu):
            print(paragraph, flush=True)
        return 0
    with explained(lambda error: out_of_memory(config, error)), contextlib.closing(build(config, resume)) as run:
        return train(run)


if __name__ == "__main__":
    # an interrupt ends it before the first step only; afterwards the run saves and returns the code itself
    sys.exit(outcome(lambda: main(CONFIG, ARGUMENTS.resume, ARGUMENTS.dry_run, ARGUMENTS.gpu)))
