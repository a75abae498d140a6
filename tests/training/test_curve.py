"""Rung three of the exactness law: 50 joint steps of the same seed, by the reference and by the kernels, give loss
curves that lie closer together than those of two seeds.
"""

import contextlib
import dataclasses
import functools

import pytest
import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_kernels import implementation, runtime
from tests.kernels.answers import counted_launches

STEPS = 50
BATCHES = 5  # seen again and again, so that a model this small learns them
VOCABULARY = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# two blocks of two windows each, the second shifted: more would take minutes in the interpreter
SMALL = VideoSwinConfig(embed_dim=16, depths=(0, 2, 0, 0), heads=(1, 1, 1, 1), window=(2, 2, 4), drop_path=0.0)
LARGE = VideoSwinConfig(embed_dim=96, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24), window=(4, 7, 7), drop_path=0.1)


def _batch(step: int, seed: int, large: bool, dtype: torch.dtype) -> tuple[JointBatch, Targets]:
    """Stripes whose slope the targets name, so that there is something to learn."""
    draw = torch.Generator().manual_seed(1000 * seed + step % BATCHES)
    count, frames, side = (8, 8, 224) if large else (1, 4, 32)
    cells = side // 16
    ids = torch.randint(0, VOCABULARY, (2, count), generator=draw)
    place = torch.arange(side) / side
    angles = (ids * torch.pi / VOCABULARY)[..., None, None]
    stripes = torch.sin(20 * (angles.cos() * place + angles.sin() * place[:, None]))  # (2, count, side, side)
    stripes = stripes + 0.1 * torch.randn(stripes.shape, generator=draw)
    images = stripes[0][:, None].expand(-1, 3, -1, -1)
    clips = stripes[1][:, None, None].expand(-1, 3, frames, -1, -1)
    hidden = torch.rand(2, count, frames // 2, cells, cells, generator=draw) < 0.5
    nothing = torch.empty(0)
    batch = JointBatch(
        Images(images.to(DEVICE, dtype).contiguous(), nothing, hidden[0, :, 0].to(DEVICE)),
        Clips(clips.to(DEVICE, dtype).contiguous(), nothing, hidden[1].to(DEVICE)),
    )
    image_ids = ids[0].view(-1, 1, 1).expand(-1, cells, cells)
    clip_ids = ids[1].view(-1, 1, 1, 1).expand(-1, frames, cells, cells)
    return batch, Targets(image_ids.to(DEVICE).contiguous(), clip_ids.to(DEVICE).contiguous())


@pytest.fixture(autouse=True)
def _hurry():
    """Tensors are so small that a second thread would only wait; that no whole number overflows, which the interpreter
    checks in every sum, the kernels' own tests have shown.
    """
    threads, builder = torch.get_num_threads(), None
    torch.set_num_threads(1)
    if runtime.INTERPRETED:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        options, builder.options = builder.options, dataclasses.replace(builder.options, sanitize_overflow=False)
    yield
    torch.set_num_threads(threads)
    if builder is not None:
        builder.options = options


@functools.cache
def _curve(choice, seed: int, precision: str, large: bool = False) -> torch.Tensor:
    """The loss of every step."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = Bevt(LARGE if large else SMALL, VOCABULARY, initialisation="fan_in")
    objective = JointObjective(model).to(DEVICE, dtype).train()
    # weights in float32 beside the model, as mixed precision keeps them
    masters = [parameter.detach().float() for parameter in objective.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=5e-4, weight_decay=0.05)
    autocast = torch.autocast(DEVICE, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
    losses = []
    with implementation(choice):
        for step in range(STEPS):
            torch.manual_seed(step)
            with autocast:
                losses.append(objective(*_batch(step, seed, large, dtype)).total)
            losses[-1].backward()
            for master, parameter in zip(masters, objective.parameters()):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, objective.parameters()):
                    parameter.copy_(master)
    return torch.stack([loss.detach().double().cpu() for loss in losses])


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().mean())


def _compare(precision: str, large: bool) -> None:
    seeds = [_curve("reference", seed, precision, large) for seed in (0, 1)]
    with counted_launches() as launches:
        fused = _curve("fused", 0, precision, large)
    assert launches
    assert seeds[0][-10:].mean() < seeds[0][:10].mean(), "nothing is learnt, so there is nothing to compare"
    assert _distance(fused, seeds[0]) < _distance(*seeds)
    if precision == "fp32":  # the two orders of summation have no reason to part further
        assert _distance(fused, seeds[0]) < 0.01 * _distance(*seeds)


@pytest.mark.skipif(not runtime.INTERPRETED, reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_curves_of_a_tiny_model(precision: str) -> None:
    _compare(precision, large=False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_the_curves_on_a_gpu(precision: str) -> None:
    _compare(precision, large=True)
