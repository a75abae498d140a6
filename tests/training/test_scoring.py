"""Every video once, the same bits for any number of processes, and numbers worked out by hand."""

import faulthandler
import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import dataloader

from bevt_fast.data import decode
from bevt_fast.data.views import TEMPORAL, ViewReader, Views
from bevt_fast.errors import DataError, NumericalError
from bevt_fast.training import scoring
from bevt_fast.training.distributed import World
from bevt_fast.training.scoring import Scores, score
from tests.data.media import video
from tests.training.scoring_checks import VIEWS, as_json, labelled, run, tiny_classifier
from tests.training.test_distributed import free_ports

ALONE = World(0, 0, 1, torch.device("cpu"))
BAD = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Seven videos, the fourth of which is none."""
    place = tmp_path_factory.mktemp("scored")
    for k in range(7):
        video(place / f"{k}.mp4", "libx264", frames=4 + 5 * k, size=(36, 48))
    (place / f"{BAD}.mp4").write_text("no video")
    return place


@pytest.fixture(scope="module")
def alone(root: Path) -> Scores:
    return score(tiny_classifier(), labelled(root), VIEWS, ALONE, workers=0, micro_batch=6)


def scores_of(rows: list[list[float]], labels: list[int]) -> Scores:
    return Scores(torch.arange(len(labels)), torch.tensor(labels), torch.tensor(rows), [])


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_has_the_bits_of_one(root: Path, alone: Scores, tmp_path: Path, processes: int) -> None:
    (port,) = free_ports(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    fork = multiprocessing.get_context("fork")  # starting Python and torch would take longer than all else
    started = [fork.Process(target=run, args=(k, root, tmp_path / "scores", place)) for k in range(processes)]
    try:
        for process in started:
            process.start()
        for process in started:
            process.join(timeout=60)
        assert [process.exitcode for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
    for rank in range(processes):
        assert json.loads((tmp_path / f"scores.{rank}").read_text()) == as_json(alone), rank


def test_every_video_once_and_the_bad_one_reported(alone: Scores) -> None:
    assert alone.indices.tolist() == [0, 1, 2, 4, 5, 6]
    assert alone.labels.tolist() == [0, 1, 2, 1, 2, 0]
    (bad,) = alone.bad
    assert bad["index"] == BAD and bad["path"].endswith("3.mp4") and bad["kind"] and bad["reason"]
    assert alone.probabilities.dtype == torch.float32 and alone.probabilities.shape == (6, 3)
    assert torch.allclose(alone.probabilities.sum(1), torch.ones(6))
    assert len(alone.probabilities.unique(dim=0)) > 1  # other videos, other answers


def test_softmax_comes_before_the_mean_over_views(root: Path, alone: Scores) -> None:
    model, source = tiny_classifier().eval(), labelled(root)
    from bevt_fast.data.pipeline_reference import normalise

    pixels = ViewReader(source, VIEWS)[5]["pixels"]
    with torch.no_grad():
        expected = model(normalise(pixels, channels=-4)).double().softmax(-1).mean(0)
    assert torch.allclose(alone.probabilities[4].double(), expected, atol=1e-6)


def test_workers_change_nothing_and_the_model_goes_on_training(root: Path, alone: Scores) -> None:
    model = tiny_classifier().train()
    state = torch.get_rng_state()
    found = score(model, labelled(root), VIEWS, ALONE, workers=1, micro_batch=6)
    assert as_json(found) == as_json(alone)
    assert model.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_file_that_ends_its_reader_is_refused_and_the_rest_scored(root: Path, alone, monkeypatch, number) -> None:
    read, here = decode.read_frames, os.getpid()

    def crashing(path, *arguments):
        if os.getpid() != here and Path(path).name == "5.mp4":
            faulthandler.disable()
            os.kill(os.getpid(), number)
        return read(path, *arguments)

    monkeypatch.setattr(decode, "read_frames", crashing)
    # torch looks every five seconds whether a worker is dead
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))
    if number == signal.SIGKILL:  # how a machine gets its memory back: it accuses no file
        with pytest.raises(DataError, match="take fewer --workers"):
            score(tiny_classifier(), labelled(root), VIEWS, ALONE, workers=1, micro_batch=6)
        return
    found = score(tiny_classifier(), labelled(root), VIEWS, ALONE, workers=1, micro_batch=6)
    assert found.indices.tolist() == [0, 1, 2, 4, 6]
    assert [(record["index"], record["kind"]) for record in found.bad] == [(BAD, found.bad[0]["kind"]), (5, "crash")]
    assert torch.equal(found.probabilities[:3], alone.probabilities[:3])


def test_the_micro_batch_changes_only_what_rounding_does(root: Path, alone: Scores) -> None:
    for micro_batch in (1, 2, 100):
        found = score(tiny_classifier(), labelled(root), VIEWS, ALONE, workers=0, micro_batch=micro_batch)
        assert torch.equal(found.indices, alone.indices)
        assert torch.allclose(found.probabilities, alone.probabilities, atol=1e-5)


class OrderBlind(nn.Module):
    """Sees the sum of a clip's frames, which no order of them changes; whole numbers, so to the bit."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        total = (pixels * 64).round().double().sum(2).mean((2, 3))
        return torch.stack([total[:, 0].sin(), total[:, 1].sin(), total[:, 2].sin()], dim=1)


class OrderAware(nn.Module):
    """Weighs each frame by its place."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        weights = torch.arange(1.0, 1 + pixels.shape[2]) ** 2
        total = (pixels.mean((1, 3, 4)) * weights).sum(1)
        return torch.stack([total, -total, total.sin()], dim=1)


def test_an_order_blind_model_loses_nothing_under_shuffling(root: Path) -> None:
    source = labelled(root)
    blind = {t: score(OrderBlind(), source, VIEWS, ALONE, temporal=t, workers=0) for t in TEMPORAL}
    assert torch.equal(blind["normal"].probabilities, blind["shuffled"].probabilities)
    assert scoring.top_k(blind["normal"], 1) - scoring.top_k(blind["shuffled"], 1) == 0
    assert not torch.equal(blind["normal"].probabilities, blind["single_frame"].probabilities)
    aware = {t: score(OrderAware(), source, VIEWS, ALONE, temporal=t, workers=0) for t in TEMPORAL}
    assert not torch.equal(aware["normal"].probabilities, aware["shuffled"].probabilities)


def test_numbers_worked_out_by_hand() -> None:
    scores = scores_of(
        [[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.3, 0.5]], [0, 0, 0, 1, 1]
    )
    # of equal probabilities the smaller class is first: the third is right, the fourth is not
    assert scoring.rank_of_truth(scores).tolist() == [0, 2, 0, 1, 1]
    assert scoring.top_k(scores, 1) == 2 / 5 and scoring.top_k(scores, 2) == 4 / 5 and scoring.top_k(scores, 3) == 1
    assert scoring.confusion(scores).tolist() == [[2, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert scoring.mean_class_accuracy(scores) == pytest.approx((2 / 3 + 0) / 2)  # class 2 has no videos
    first, second, third = scoring.per_class(scores)
    assert (first["samples"], first["right"], first["taken_for"], first["taken_for_count"]) == (3, 2, 1, 1)
    assert (second["top1"], second["top5"], second["taken_for"]) == (0, 1, 0)
    assert (third["samples"], third["top1"], third["taken_for"]) == (0, None, None)


def test_groups_cover_every_video_once() -> None:
    for videos, views, micro_batch in ((10, 3, 8), (1, 12, 8), (7, 1, 3)):
        groups = scoring.deal(videos, views, micro_batch)
        assert [index for group in groups for index in group] == list(range(videos))
    assert scoring.deal(5, 3, 8) == [range(0, 2), range(2, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labels": None}, "has no labels"),
        ({"labels": np.full(7, -1)}, "has no labels"),
        ({"classes": ["a", "b"]}, "tells 3 classes apart but the source 'file_list' has 2"),
        ({"labels": np.array([0, 1, 2, 3, 0, 1, 9])}, r"the label 3 of 3\.mp4 is outside 0 to 2.*2 such labels"),
        ({"labels": np.array([0, 1, -1, 0, 0, 1, 2])}, r"the label -1 of 2\.mp4"),
    ],
)
def test_labels_that_cannot_have_been_learnt_are_refused(root: Path, change: dict, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        scoring.check_labels(replace(labelled(root), **change), 3)
    scoring.check_labels(labelled(root), 3)


def test_an_answer_that_is_not_finite_is_no_answer(root: Path) -> None:
    model = tiny_classifier()
    model.class_head.bias.data[1] = float("nan")
    with pytest.raises(NumericalError, match=r"0\.mp4 is not finite"):
        score(model, labelled(root), Views(size=32, short_side=32), ALONE, workers=0)


def test_a_source_without_a_single_video_scores_nothing(root: Path) -> None:
    found = score(tiny_classifier(), labelled(root).take([BAD]), VIEWS, ALONE, workers=0)
    assert len(found.indices) == 0 and len(found.bad) == 1
    assert scoring.top_k(found, 1) == 0 and scoring.mean_class_accuracy(found) == 0
