"""Streams in turn: the same losses and gradients, of a graph that holds one stream at a time."""

import pytest
import torch

from bevt_fast.config import Config, parse
from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from tests.test_config import values

JOINT = values()
SHAPE = VideoSwinConfig(embed_dim=16, depths=(1, 1, 2, 1), heads=(1, 1, 2, 2), window=(2, 3, 3), drop_path=0.4)


def objective(in_turn: bool, dtype: torch.dtype, **weights: float) -> JointObjective:
    torch.manual_seed(0)
    made = JointObjective(Bevt(SHAPE, vocab_size=50, initialisation="fan_in"), in_turn=in_turn, **weights)
    return made.to(dtype).train()


def batch_and_targets(dtype: torch.dtype) -> tuple[JointBatch, Targets]:
    torch.manual_seed(1)
    images = Images(torch.randn(3, 3, 64, 64, dtype=dtype), torch.empty(0), torch.rand(3, 4, 4) < 0.5)
    clips = Clips(torch.randn(2, 3, 4, 64, 64, dtype=dtype), torch.empty(0), torch.rand(2, 2, 4, 4) < 0.5)
    return JointBatch(images, clips), Targets(torch.randint(50, (3, 4, 4)), torch.randint(50, (2, 4, 4, 4)))


@pytest.mark.parametrize("hidden", [None, (20.0, 31.0)])
def test_losses_and_gradients_are_those_of_both_together(hidden: tuple[float, float] | None) -> None:
    found = []
    for in_turn in (False, True):
        model = objective(in_turn, torch.float64, image_weight=0.7, clip_weight=1.3)
        torch.manual_seed(2)
        losses = model(*batch_and_targets(torch.float64), hidden)
        (losses.total / 4).backward()  # as an engine that accumulates does
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (together, expected), (turns, ours) = found
    assert all(torch.equal(a, b) for a, b in zip(together, turns))
    assert {name for name, g in ours.items() if g is None} == {name for name, g in expected.items() if g is None}
    for name, grad in expected.items():
        if grad is not None:  # a loss is a float32 scalar, and so is what its gradient is multiplied by
            bound = 4 * torch.finfo(torch.float32).eps * float(grad.abs().max())
            torch.testing.assert_close(ours[name], grad, rtol=0, atol=bound)


def test_the_first_stream_leaves_nothing_but_gradients() -> None:
    kept: dict[bool, int] = {}
    for in_turn in (False, True):
        alive: dict[int, int] = {}

        def pack(tensor: torch.Tensor, alive: dict[int, int] = alive) -> "Saved":
            return Saved(tensor, alive)

        model = objective(in_turn, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            losses = model(*batch_and_targets(torch.float32))
        kept[in_turn] = sum(alive.values())
        losses.total.backward()
    assert kept[True] < 0.75 * kept[False]


class Saved:
    """What autograd keeps, counted while it does."""

    def __init__(self, tensor: torch.Tensor, alive: dict[int, int]) -> None:
        self.tensor, self.alive = tensor, alive
        alive[id(self)] = tensor.nbytes

    def __del__(self) -> None:
        self.alive.pop(id(self), None)


def test_a_second_backward_pass_is_refused() -> None:
    losses = objective(True, torch.float32)(*batch_and_targets(torch.float32))
    losses.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        losses.total.backward()


def test_one_stream_and_no_gradients_need_no_turns() -> None:
    model, (batch, targets) = objective(True, torch.float32), batch_and_targets(torch.float32)
    model(batch._replace(images=None), targets).total.backward()
    with torch.no_grad():
        assert model(batch, targets).total.requires_grad is False


@pytest.mark.parametrize(
    "changes, possible",
    [
        ({}, True),
        ({"precision": "fp16"}, False),
        ({"streams_in_turn": False}, False),
        ({"streams_in_turn": True}, True),
    ],
)
def test_turns_are_taken_where_they_can_be(changes: dict[str, object], possible: bool) -> None:
    assert parse(Config, JOINT | {"train": JOINT["train"] | changes}, "test").in_turn is possible


def test_what_cannot_take_turns_says_so() -> None:
    zero = {"zero_optimization": {"stage": 3}}
    assert not parse(Config, JOINT | {"deepspeed": zero}, "test").in_turn
    asked = JOINT | {"deepspeed": zero, "train": JOINT["train"] | {"streams_in_turn": True}}
    with pytest.raises(ConfigError, match="ZeRO stage 3"):
        parse(Config, asked, "test")
