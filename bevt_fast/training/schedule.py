"""The learning rate as a pure function of the step, so that resuming restores nothing but a number."""

import math

from bevt_fast.config import Optim


def learning_rate(step: int, total_steps: int, warmup_steps: int, optim: Optim, hold: int = 1) -> float:
    """The rate of step `step` (counted from 0) of `total_steps` (SPEC 5.2).

    Cosine from `optim.lr` to `optim.min_lr`, times a linear warm-up that starts at `optim.warmup_start`:
    cosine(step) * (1 - (1 - warmup_start) * (1 - step / warmup_steps)). The official code counts micro-batches; steps
    differ from that by less than one step. The cosine moves every `hold` steps: once an epoch in fine-tuning (SPEC
    6.1), where the warm-up moves every step all the same.
    """
    place = step // hold * hold
    cosine = optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * place / total_steps))
    if step >= warmup_steps:
        return cosine
    return cosine * (1 - (1 - optim.warmup_start) * (1 - step / warmup_steps))


def lengths(optim: Optim, epochs: int | None, steps: int | None, steps_per_epoch: int) -> tuple[int, int]:
    """Total steps and warm-up steps of a run; `steps` wins over `epochs`, and a shortened run warms up no longer than
    it lasts.
    """
    total = steps if steps is not None else (epochs or 1) * steps_per_epoch
    warmup = (
        optim.warmup_steps if optim.warmup_steps is not None else round((optim.warmup_epochs or 0) * steps_per_epoch)
    )
    return total, min(warmup, total)
