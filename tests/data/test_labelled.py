"""Labelled training clips: the same for any number of processes and workers, bad files replaced with their labels."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bevt_fast.config import parse
from bevt_fast.data import sources
from bevt_fast.data.labelled import LabelledLoader, LabelledReader, smooth
from bevt_fast.data.sources import Source
from bevt_fast.errors import ConfigError
from bevt_fast.finetune_config import FinetuneConfig
from tests.training.conftest import SHAPES

ROOT = Path(__file__).resolve().parents[2]
STRONG = {"randaugment": {"n": 2, "m": 7}, "erasing": 0.5, "scale": [0.3, 1.0], "ratio": [0.75, 1.33], "flip": 0.5}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    options = SHAPES | {"root": str(tmp_path_factory.mktemp("labelled") / "shapes"), "frames": 4}
    return sources.build(sources.Part(name="moving_shapes", options=options))


def settings(**changes) -> FinetuneConfig:
    values = json.loads((ROOT / "configs" / "finetune" / "demo.json").read_text())
    values["data"] |= {"batch": 8, "micro_batch": 2, "workers": 0} | changes.pop("data", {})
    values["views"] |= {"size": 64, "short_side": 64, "twins": False} | changes.pop("views", {})
    values["model"]["classes"] = 8
    values["train"] |= changes
    return parse(FinetuneConfig, values, "here")


def item_of(reader: LabelledReader, number: int = 0) -> dict[str, Any]:
    item = reader[number]
    assert isinstance(item, dict), item
    return item


def first(config: FinetuneConfig, source: Source, count: int, **where) -> list:
    loader = LabelledLoader(config, source, **where)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_any_number_of_processes_and_workers_reads_the_same(source):
    config = settings(views=STRONG, mixup=0.8, label_smoothing=0.1)
    alone = first(config, source, 8)
    shared = [first(config, source, 4, rank=rank, world_size=2) for rank in range(2)]
    together = [batch for pair in zip(*shared) for batch in pair]
    several = first(settings(views=STRONG, mixup=0.8, label_smoothing=0.1, data={"workers": 2}), source, 8)
    later = first(config, source, 4, first_step=1)
    for others in (together, several, [*alone[:4], *later]):
        for one, other in zip(alone, others, strict=True):
            assert torch.equal(one.pixels, other.pixels) and torch.equal(one.targets, other.targets)


def test_every_clip_is_seen_once_a_pass_with_its_label(source):
    config = settings()
    reader = LabelledReader(config, source)
    labels = torch.cat([item_of(reader, number)["labels"] for number in range(12)])
    assert sorted(labels.tolist()) == sorted(np.asarray(source.labels).tolist())
    batch = first(config, source, 1)[0]
    assert batch.pixels.shape == (2, 3, 4, 64, 64) and batch.targets.sum(1).tolist() == [1, 1]
    assert batch.targets.argmax(1).tolist() == labels[:2].tolist()


def test_two_passes_are_drawn_anew(source):
    reader = LabelledReader(settings(views=STRONG), source)
    views = [reader.view(epoch, 3, 3) for epoch in range(6)]
    assert len({view.box for view in views}) == 6 and len({view.flip for view in views}) == 2
    assert views[0] == reader.view(0, 3, 3)


def test_half_of_a_batch_of_twins_is_the_other_half_played_backwards(source):
    config = settings(views=STRONG | {"twins": True}, data={"micro_batch": 4})
    item = item_of(LabelledReader(config, source))
    pixels, labels = item["pixels"], item["labels"].tolist()
    assert pixels.shape == (4, 4, 64, 64, 3) and (pixels[0] != pixels[0].flip(0)).any()
    assert torch.equal(pixels[2:], pixels[:2].flip(1)) and torch.equal(item["erase"][2:], item["erase"][:2])
    assert [k ^ 1 for k in labels[:2]] == labels[2:]  # of all eight motions, reverses stand side by side
    # the clips are those of a run without twins, half as many a micro-batch, and a pass still shows each once
    plain = LabelledReader(settings(views=STRONG, data={"batch": 4, "micro_batch": 2}), source)
    assert torch.equal(item_of(plain)["pixels"], pixels[:2])
    reader = LabelledReader(settings(views={"twins": True}, data={"micro_batch": 4}), source)
    seen = torch.cat([item_of(reader, number)["labels"][:2] for number in range(12)])
    assert sorted(seen.tolist()) == sorted(np.asarray(source.labels).tolist())


def test_any_number_of_processes_and_workers_makes_the_same_twins(source):
    config = settings(views=STRONG | {"twins": True}, mixup=0.8, data={"micro_batch": 4})
    alone = first(config, source, 4)
    shared = [first(config, source, 2, rank=rank, world_size=2) for rank in range(2)]
    more = {"micro_batch": 4, "workers": 2}
    several = first(settings(views=STRONG | {"twins": True}, mixup=0.8, data=more), source, 4)
    for others in ([batch for pair in zip(*shared) for batch in pair], several):
        for one, other in zip(alone, others, strict=True):
            assert torch.equal(one.pixels, other.pixels) and torch.equal(one.targets, other.targets)


def test_twins_without_a_label_are_refused(source):
    unknown = Source(**vars(source) | {"reversed_labels": None})
    with pytest.raises(ConfigError, match=r"^views.twins: the source 'moving_shapes clips \(train\)' does not say"):
        LabelledReader(settings(views={"twins": True}), unknown)
    assert LabelledReader(settings(), unknown).twins is None


def test_an_erased_rectangle_is_the_mean_colour_in_every_frame(source):
    config = settings(views={"erasing": 1.0})
    batch, item = first(config, source, 1)[0], item_of(LabelledReader(config, source))
    plain = first(settings(), source, 1)[0]
    for clip, whole, (top, left, height, width) in zip(batch.pixels, plain.pixels, item["erase"].tolist()):
        assert height * width and not clip[..., top : top + height, left : left + width].any()
        outside = torch.ones(64, 64, dtype=torch.bool)
        outside[top : top + height, left : left + width] = False
        assert torch.equal(clip[..., outside], whole[..., outside])


def test_mixing_keeps_shares_of_both_labels(source):
    mixed, plain = (first(settings(mixup=alpha), source, 1)[0] for alpha in (1.0, 0.0))
    share = item_of(LabelledReader(settings(mixup=1.0), source))["mix"]
    assert 0 < share < 1
    torch.testing.assert_close(mixed.pixels, plain.pixels * share + plain.pixels.flip(0) * (1 - share))
    torch.testing.assert_close(mixed.targets, plain.targets * share + plain.targets.flip(0) * (1 - share))


def test_smoothed_labels_are_those_of_the_specification():
    """SPEC 6.1: 1 - 0.1 + 0.1/K on the true class, 0.1/K elsewhere."""
    targets = smooth(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets[0], torch.tensor([0.025, 0.025, 0.925, 0.025]))
    assert targets.sum(1).tolist() == pytest.approx([1, 1])


def test_a_bad_file_is_replaced_with_the_label_of_its_substitute(source, tmp_path):
    shutil.copytree(source.root, tmp_path / "copy")
    broken = Source(**vars(source) | {"root": tmp_path / "copy"})
    config = settings()
    reader = LabelledReader(config, source)
    victim = _index_of_first(reader)
    broken.path(victim).write_bytes(b"no video")  # pyright: ignore[reportAttributeAccessIssue]
    loader = LabelledLoader(config, broken)
    batch = next(loader)
    (record,) = loader.bad_files
    loader.close()
    assert record["index"] == victim and record["stream"] == "data" and record["substitute"] != victim
    labels = np.asarray(source.labels)
    assert batch.targets.argmax(1)[0] == labels[record["substitute"]]


def _index_of_first(reader: LabelledReader) -> int:
    from bevt_fast.data import sampling

    return sampling.place(reader.seed, reader.key, 0, len(reader.source)).index
