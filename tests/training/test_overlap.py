"""The tokenizer beside the encoder: nobody reads an id before it is there."""

from typing import Any

import pytest
import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.tokenizers.dalle import Dalle
from bevt_fast.train import hidden_targets
from bevt_fast.training.overlap import beside

SHAPE = VideoSwinConfig(embed_dim=16, depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), window=(2, 3, 3))


def objective_and_batch(device: str) -> tuple[JointObjective, JointBatch]:
    torch.manual_seed(0)
    batch = JointBatch(
        Images(torch.randn(2, 3, 64, 64, device=device), torch.rand(2, 3, 32, 32, device=device), _mask(2, 4, 4)),
        Clips(
            torch.randn(2, 3, 4, 64, 64, device=device), torch.rand(2, 4, 3, 32, 32, device=device), _mask(2, 2, 4, 4)
        ),
    )
    return JointObjective(Bevt(SHAPE, vocab_size=50)).to(device).eval(), batch


def _mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape) < 0.5


class Late:
    """An event that has the ids made at the last moment, when somebody waits for it."""

    def __init__(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.pairs = pairs

    def wait(self) -> None:
        for ids, real in self.pairs:
            ids.copy_(real)


def same(first: Losses, second: Losses) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second))


def test_ids_are_not_read_before_they_are_ready() -> None:
    objective, batch = objective_and_batch("cpu")
    real = hidden_targets(Dalle(8, 50), batch)
    assert real.images is not None and real.clips is not None
    images, clips = torch.zeros_like(real.images), torch.zeros_like(real.clips)
    expected = objective(batch, real)
    assert not same(objective(batch, Targets(images, clips)), expected)
    assert same(objective(batch, Targets(images, clips, Late((images, real.images), (clips, real.clips)))), expected)


def test_without_a_stream_of_its_own_the_tokenizer_runs_at_once() -> None:
    _, batch = objective_and_batch("cpu")
    asked: list[Any] = []

    def name(tokenizer: Any, given: JointBatch) -> Targets:
        asked.append((tokenizer, given))
        return Targets(None, None)

    assert beside(None, name, "tokenizer", batch).ready is None
    assert asked == [("tokenizer", batch)]


@pytest.mark.gpu
def test_beside_the_encoder_the_losses_are_the_same() -> None:
    objective, batch = objective_and_batch("cuda")
    tokenizer, side = Dalle(64, 50).cuda(), torch.cuda.Stream()
    expected = objective(batch, hidden_targets(tokenizer, batch))
    for _ in range(20):
        targets = beside(side, hidden_targets, tokenizer, batch)
        assert targets.ready is not None
        assert same(objective(batch, targets), expected)
