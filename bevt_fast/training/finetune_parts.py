"""The parts of a fine-tuning run, each refusing what it cannot use with one sentence."""

import logging
from typing import Any, Literal

import numpy as np
import torch

from bevt_fast.config import Part, open_part
from bevt_fast.data import sources
from bevt_fast.data.labelled import labels_of_twins
from bevt_fast.data.sources import Source
from bevt_fast.errors import CheckpointError, ConfigError, DataError
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models import pretrained
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training.assemble import find_weights

log = logging.getLogger("bevt_fast")

Key = Literal["source", "heldout", "test"]


def check_parts(config: FinetuneConfig) -> None:
    """Find every part the configuration names and check its options. Raises ConfigError; touches no data."""
    for key in ("source", "heldout", "test"):
        if (part := getattr(config.data, key)) is not None:
            open_part("bevt_fast.data.sources", part)


def open_labelled(config: FinetuneConfig, key: Key = "source") -> Source:
    """A source of labelled clips of the classes that the head has. Raises ConfigError or DataError."""
    part: Part = getattr(config.data, key)
    source, classes = sources.build(_told_classes(part, config.model.classes)), config.model.classes
    if source.frames is None:
        raise ConfigError(f"data.{key} {part.name!r} gives images; name a source of clips, or set its kind")
    if source.labels is None:
        raise DataError(f"data.{key}: {source.name} has no labels; name a list of `path label` lines, or class folders")
    if source.classes is not None and len(source.classes) != classes:
        raise ConfigError(
            f"data.{key}: {source.name} has {len(source.classes)} classes, but the head has {classes}; set "
            f"model.classes to {len(source.classes)}, or name all classes in the source's options"
        )
    outside = np.flatnonzero((source.labels < 0) | (source.labels >= classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"data.{key}: {source.path(first)} has the label {source.labels[first]}, outside 0 to {classes - 1}; set "
            "model.classes, or correct the list"
        )
    if key == "source" and config.views.twins:
        labels_of_twins(source)
    sources.preflight(source, config.data.quarantine_share)
    return source


def open_heldout(config: FinetuneConfig, source: Source) -> Source | None:
    """The validation list, with the classes of the training list in the same order. Raises as `open_labelled`."""
    if config.data.heldout is None:
        return None
    heldout = open_labelled(config, "heldout")
    if source.classes is not None and heldout.classes is not None and source.classes != heldout.classes:
        pairs = zip(source.classes, heldout.classes)
        number, (here, there) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
        raise DataError(
            f"data.heldout numbers its classes otherwise than data.source: {number} is {there!r} there and {here!r} "
            "here; set the option 'classes' of both to one file of names"
        )
    return heldout


def open_classifier(config: FinetuneConfig, initialise: bool = True) -> Classifier:
    """The classifier of the configuration, started from `model.pretrained` if `initialise`. Raises CheckpointError."""
    torch.manual_seed(config.seed)
    classifier = Classifier.of(config)
    if config.model.pretrained is None or not initialise:
        return classifier
    place, weights = find_weights(config.model.pretrained, "model.pretrained", "pretrain it first")
    try:
        began = pretrained.start(classifier, weights, VideoSwinConfig.of(config.model), config.model.pretrained_window)
    except CheckpointError as error:
        raise CheckpointError(f"model.pretrained: {place}: {error}") from None
    log.info("starts from %s: %s", place, began)
    return classifier


def _told_classes(part: Part, classes: int) -> Part:
    """The part of a list that does not say how many classes there are, told: a label beyond them is then refused with
    its line.
    """
    options: Any = open_part("bevt_fast.data.sources", part)[1]
    if getattr(options, "list", None) is not None and getattr(options, "classes", classes) is None:
        return part.model_copy(update={"options": part.options | {"classes": classes}})
    return part
