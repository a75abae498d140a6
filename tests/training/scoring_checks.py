"""A tiny classifier's scores of a folder of videos, by one of several processes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bevt_fast.config import Part
from bevt_fast.data import sources
from bevt_fast.data.sources import Source
from bevt_fast.data.views import Views
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import distributed
from bevt_fast.training.scoring import Scores, score

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.5)
VIEWS = Views(clips=1, crops=3, size=32, short_side=32)


def labelled(root: Path, classes: int = 3) -> Source:
    """The videos below `root` in order, labelled 0, 1, 2, 0, ..."""
    source = sources.build(Part(name="file_list", options={"root": str(root), "frames": 4, "stride": 2}))
    return replace(source, labels=np.arange(len(source)) % classes)


def tiny_classifier() -> Classifier:
    """The same weights in every process, and answers that differ from video to video."""
    torch.manual_seed(7)
    model = Classifier(SHAPE, classes=3, initialisation="fan_in")
    torch.nn.init.normal_(model.class_head.weight, std=1.0)
    return model


def as_json(scores: Scores) -> dict:
    """Scores as JSON has them, every bit of the probabilities included."""
    bits = scores.probabilities.view(torch.int32).tolist()
    return {"indices": scores.indices.tolist(), "labels": scores.labels.tolist(), "bits": bits, "bad": scores.bad}


def run(rank: int, root: Path, out: Path, place: dict[str, str]) -> None:
    """Score as process `rank` of the group that `place` describes, and write OUT.<rank>."""
    torch.set_num_threads(1)
    os.environ.update(place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    world = distributed.start(1)
    found = score(tiny_classifier(), labelled(root), VIEWS, world, workers=0, micro_batch=6)
    Path(f"{out}.{world.rank}").write_text(json.dumps(as_json(found)))
    torch.distributed.destroy_process_group()
