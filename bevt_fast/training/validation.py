"""Validation during fine-tuning, and the nearest-neighbour score: one clip, the middle crop (SPEC 6.6).

A nearest-neighbour run leaves a checkpoint as any other run does, with the training clips' features beside the encoder:
evaluate.py and export.py open it.
"""

import copy
import json
import logging
import os
from pathlib import Path

import torch
from torch import nn

from bevt_fast import finetune_config
from bevt_fast.data.sources import Source
from bevt_fast.data.views import ViewReader, Views
from bevt_fast.errors import DataError, MachineError
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.probes import NearestNeighbours
from bevt_fast.training import checkpoint, distributed, scoring
from bevt_fast.training.base_run import speak
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import DTYPES
from bevt_fast.training.finetune_parts import check_parts, open_classifier, open_heldout, open_labelled
from bevt_fast.training.metrics import Metrics
from bevt_fast.training.output import prepare_output

log = logging.getLogger("bevt_fast")


def validate(
    classifier: nn.Module, heldout: Source, config: FinetuneConfig, world: World, dtype: torch.dtype
) -> dict[str, float]:
    """val/top1, val/top5, val/mean_class_acc and data/heldout_bad of a validation list. Collective.

    Files that cannot be read are counted and named, never scored. Raises DataError where that is all of them.
    """
    scores = scoring.score(
        classifier.to(world.device, dtype).eval(),
        heldout,
        _plain_views(config),
        world,
        workers=config.data.workers,
        micro_batch=config.data.micro_batch,
        dtype=dtype,
    )
    for record in scores.bad:
        log.warning("not scored %s: %s: %s", record["path"], record["kind"], record["reason"])
    if not len(scores.indices):
        raise DataError(f"data.heldout: none of the {len(heldout)} validation clips can be read; check the files")
    return {
        "val/top1": scoring.top_k(scores, 1),
        "val/top5": scoring.top_k(scores, min(5, config.model.classes)),
        "val/mean_class_acc": scoring.mean_class_accuracy(scores),
        "data/heldout_bad": float(len(scores.bad)),
    }


def nearest_neighbours(config: FinetuneConfig) -> dict[str, float]:
    """Mode "knn": score the validation list by the labels of the nearest training clips; log.jsonl has the result."""
    distributed.read_environment()
    speak(is_main=os.environ["RANK"] == "0")
    check_parts(config)
    source = open_labelled(config)
    heldout = open_heldout(config, source)
    assert heldout is not None  # the configuration has seen to it
    world = distributed.start(config.train.threads)
    output = Path(config.output)
    lock = prepare_output(output, "none", world)
    metrics = Metrics(output, 1, 0, 0, 0, 0.0, world.is_main)
    try:
        judge = _neighbours(config, source, world)
        if world.is_main:
            _save(judge, config, output)
        values = validate(judge, heldout, config, world, DTYPES[config.train.precision])
        metrics.log(0, values)
    finally:
        metrics.close()
        distributed.leave()
        if lock:
            lock.close()
    return values


def _neighbours(config: FinetuneConfig, source: Source, world: World) -> NearestNeighbours:
    """The judge whose bank is the training clips that can be read, float32, on the CPU. Collective."""
    train, dtype = config.train, DTYPES[config.train.precision]
    encoder = open_classifier(config).encoder.eval()
    computing = copy.deepcopy(encoder).to(world.device, dtype)  # the one that is saved stays as it came
    bank = scoring.averaged(
        lambda pixels: computing(pixels).float().mean(dim=(1, 2, 3)),
        ViewReader(source, _plain_views(config)),
        world,
        workers=config.data.workers,
        micro_batch=config.data.micro_batch,
        dtype=dtype,
    )
    for record in bank.bad:
        log.warning("left out %s: %s: %s", record["path"], record["kind"], record["reason"])
    if not len(bank.labels):
        raise DataError(f"data.source: none of the {len(source)} training clips can be read; check the files")
    return NearestNeighbours(
        encoder, bank.probabilities, bank.labels, config.model.classes, train.neighbours, train.temperature
    )


def _save(judge: NearestNeighbours, config: FinetuneConfig, output: Path) -> None:
    """The checkpoint of a run that has no steps."""
    text = json.dumps(finetune_config.resolved(config), indent=2)
    try:
        (output / "config.json").write_text(text)
        weights = iter(judge.state_dict().items())
        checkpoint.write(output / "checkpoints", 0, weights, iter(()), {"clips": len(judge.bank)}, text, keep=1)
    except OSError as error:
        raise MachineError(
            f"cannot write {output}: {error.strerror or error}; make room, or name another output"
        ) from None


def _plain_views(config: FinetuneConfig) -> Views:
    """One clip and the middle crop after the short side of training."""
    return Views(clips=1, crops=1, size=config.views.size, short_side=config.views.short_side)
