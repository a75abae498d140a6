"""The parts of a fine-tuning run, each refusing what it cannot use with one sentence."""

import logging
from typing import Literal

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
from bevt_fast.training import labels
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
    source, classes = sources.build(labels.told(part, config.model.classes)), config.model.classes
    if source.frames is None:
        raise ConfigError(f"data.{key} {part.name!r} gives images; name a source of clips, or set its kind")
    if source.labels is None:
        raise DataError(f"data.{key}: {source.name} has no labels; name a list of `path label` lines, or class folders")
    if source.classes is not None and len(source.classes) != classes:
        raise ConfigError(
            f"data.{key}: {source.name} has {len(source.classes)} classes, but the head has {classes}; set "
            f"model.classes to {len(source.classes)}, or name all classes in the source's options"
        )
    if len(outside := labels.outside(source, classes)):
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
    if (k := labels.first_difference(source.classes, heldout.classes)) is not None:
        assert source.classes and heldout.classes
        raise DataError(
            f"data.heldout numbers its classes otherwise than data.source: {k} is {heldout.classes[k]!r} there and "
            f"{source.classes[k]!r} here; set the option 'classes' of both to one file of names"
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
