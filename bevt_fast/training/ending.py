"""The end of a run: score samples never trained on, draw what was asked and answered, say where everything lies."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from bevt_fast.data import loader, pipeline_reference
from bevt_fast.data.batch import Clips, Images, JointBatch
from bevt_fast.training import distributed, pictures
from bevt_fast.training.metrics import read_log

if TYPE_CHECKING:
    from bevt_fast.training.run import Run

log = logging.getLogger("bevt_fast")

# stream -> the scalar's name
ACCURACY = {"images": "val/mask_acc_2d", "clips": "val/mask_acc_3d"}


class Answers(NamedTuple):
    """One stream of one micro-batch: what was hidden, what the tokenizer says, what the model says; (B, [T,] g, g)."""

    hidden: Tensor
    targets: Tensor
    predictions: Tensor


class Score(NamedTuple):
    """Accuracy on hidden positions, and the share of the commonest target among them: what a constant guess would
    reach.
    """

    accuracy: float
    commonest: float
    positions: int


def finish(run: "Run") -> None:
    """Held-out scores into the log, pictures into `pictures/`, the summary onto the screen."""
    scores, shown = score_heldout(run)
    values = {}
    for stream, score in scores.items():
        values |= {ACCURACY[stream]: score.accuracy, f"{ACCURACY[stream]}_commonest": score.commonest}
    if values and run.first_step < run.last_step:  # not again for a run that was already at its end
        run.metrics.log(run.last_step - 1, values)
    if not run.world.is_main:
        return
    run.metrics.close()
    drawn = []
    try:
        (run.output / "heldout.json").write_text(
            json.dumps({s: score._asdict() for s, score in scores.items()}, indent=1)
        )
        drawn = draw(run, shown)
    except OSError as error:  # the checkpoint is what matters, and it is there
        log.warning("the pictures could not be written: %s", error)
    log.info("%s", summary(run, scores, drawn))


def draw(run: "Run", shown: dict[str, tuple[Images | Clips, Answers]]) -> list[Path]:
    """One picture of samples for each stream, and the curves of the whole run; returns the files."""
    folder = run.output / "pictures"
    folder.mkdir(exist_ok=True)
    count = run.config.train.pictures
    for stream, (batch, answers) in shown.items():
        pictures.samples(
            folder / f"{stream}.png",
            cast(Any, stream),
            pipeline_reference.denormalise(batch.pixels[:count].float().cpu()),
            batch.token_pixels[:count].cpu(),
            batch.mask[:count].cpu(),
            answers.targets[:count].cpu(),
            answers.predictions[:count].cpu(),
            getattr(run.tokenizer, "decode", None),
        )
    files = [folder / f"{stream}.png" for stream in shown]
    if history := read_log(run.output / "log.jsonl"):
        pictures.loss_curve(history, folder / "loss_curve.png")
        files.append(folder / "loss_curve.png")
    return files


@torch.no_grad()
def answer(run: "Run", stream: str, batch: Images | Clips) -> Answers:
    """What the model says at every position of one stream's micro-batch."""
    model: Any = run.engine.objective.model
    targets = run.tokenizer(batch.token_pixels)
    pixels = batch.pixels.to(run.engine.dtype)
    if stream == "images":
        features, hidden = model.image_features(pixels, batch.mask), batch.mask
    else:
        features = model.clip_features(pixels, batch.mask)
        hidden = batch.mask.repeat_interleave(targets.shape[1] // batch.mask.shape[1], dim=1)
    return Answers(hidden.to(targets.device), targets, model.head(features).argmax(dim=-1))


def score_heldout(run: "Run") -> tuple[dict[str, Score], dict[str, tuple[Images | Clips, Answers]]]:
    """Scores per stream over `train.heldout_batches` micro-batches a process, and the first micro-batch answered.

    A stream without a held-out source is not scored; a training micro-batch is shown instead.
    """
    config = run.config
    held = run.heldout
    run.engine.objective.eval()
    scores, shown = {}, {}
    for name in config.streams:
        count = config.train.heldout_batches if name in held else 1
        data = loader.Loader(
            config,
            {name: held.get(name, run.sources[name])},
            rank=run.world.rank,
            world_size=run.world.size,
            device=run.world.device,
            first_step=0,
            heldout=name in held,
        )
        right = torch.zeros((), device=run.world.device)
        histogram = torch.zeros(run.tokenizer.vocab_size, device=run.world.device, dtype=torch.long)
        for number in range(count):
            batch = _stream(next(data), name)
            answers = answer(run, name, batch)
            targets = answers.targets[answers.hidden]
            right += (answers.predictions[answers.hidden] == targets).sum()
            histogram += torch.bincount(targets, minlength=len(histogram))
            if number == 0:
                shown[name] = (batch, answers)
        data.close()
        right, histogram = distributed.total(right), distributed.total(histogram)
        positions = int(histogram.sum())
        if name in held and positions:
            scores[name] = Score(float(right) / positions, float(histogram.max()) / positions, positions)
    run.engine.objective.train()
    return scores, shown


def summary(run: "Run", scores: dict[str, Score], drawn: list[Any]) -> str:
    """The closing lines: what was reached, where everything lies, what to run next."""
    lines = [""]
    for stream, score in scores.items():
        lines.append(
            f"held-out {stream}: {score.accuracy:.1%} of hidden tokens right; always guessing the commonest would give "
            f"{score.commonest:.1%} ({score.positions:,} positions)"
        )
    lines.append(f"everything is under {run.output}: log.jsonl, tensorboard/, config.json, checkpoints/, pictures/")
    if drawn:
        lines.append("look at " + ", ".join(str(path) for path in drawn))
    if len(run.quarantine):
        lines.append(f"{len(run.quarantine)} bad files were replaced; they are listed in {run.quarantine.path}")
    lines.append(
        f"next: tensorboard --logdir {run.output / 'tensorboard'}; the weights are in "
        f"{run.output / 'checkpoints' / f'step_{run.last_step:08d}' / 'model.safetensors'}"
    )
    return "\n".join(lines)


def _stream(batch: JointBatch, name: str) -> Images | Clips:
    stream = batch.images if name == "images" else batch.clips
    assert stream is not None
    return stream
