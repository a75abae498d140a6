"""What test_integration.py asks of two processes; started by torchrun, writes one JSON object.

torchrun --standalone --nproc_per_node 2 distributed_checks.py OUT.json

The gradients of one joint step of a tiny model, its batch halved between the processes: under DDP and under every ZeRO
stage, by the kernels and by the reference, against the whole batch on one process in float64.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from bevt_fast.config import Config, parse
from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.training import distributed
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import Engine
from bevt_kernels import exactness, implementation
from tests.kernels.answers import counted_launches

SHAPE = VideoSwinConfig(embed_dim=16, depths=(2, 1, 1, 1), heads=(1, 1, 2, 4), window=(2, 4, 4), drop_path=0.0)
VOCABULARY = 32
PARTS = {"name": "not_opened"}
Gradients = dict[str, Tensor]


def objective(dtype: torch.dtype = torch.float32) -> JointObjective:
    torch.manual_seed(0)
    return JointObjective(Bevt(SHAPE, VOCABULARY, initialisation="fan_in").to(dtype))


def batch(samples: slice, dtype: torch.dtype = torch.float32) -> tuple[JointBatch, Targets]:
    """As many positions are hidden in every sample, so that the mean of means is the mean."""
    draw = torch.Generator().manual_seed(1)
    images, clips = torch.randn(2, 3, 32, 32, generator=draw), torch.randn(2, 3, 4, 32, 32, generator=draw)
    hidden = torch.tensor([[[True, False], [False, True]], [[True, True], [False, False]]])
    targets = torch.randint(0, VOCABULARY, (2, 2, 2), generator=draw)
    over_time = torch.randint(0, VOCABULARY, (2, 4, 2, 2), generator=draw)
    masks = hidden[:, None].expand(2, 2, 2, 2)
    nothing = torch.empty(0)
    joint = JointBatch(
        Images(images[samples].to(dtype), nothing, hidden[samples]),
        Clips(clips[samples].to(dtype), nothing, masks[samples].contiguous()),
    )
    return joint, Targets(targets[samples], over_time[samples])


def truth() -> Gradients:
    model = objective(torch.float64)
    with implementation("reference"):
        model(*batch(slice(None), torch.float64)).total.backward()
    return gradients_of(model)


def gradients_of(model: JointObjective) -> Gradients:
    return {name: p.grad.detach().clone() for name, p in model.model.named_parameters() if p.grad is not None}


def under_ddp(world: World) -> Gradients:
    model = DistributedDataParallel(objective())
    model(*batch(slice(world.rank, world.rank + 1))).total.backward()
    return gradients_of(model.module)


def under_zero(world: World, stage: int) -> Gradients:
    """From AdamW's first moment after one step, which without clipping is a tenth of the gradient."""
    stream = {"source": PARTS, "mask": PARTS, "batch": 2, "micro_batch": 1}
    values = {"output": "x", "images": stream, "clips": stream, "tokenizer": PARTS}
    values |= {
        "optim": {"lr": 1e-3, "grad_clip": 0.0, "betas": [0.9, 0.999]},
        "train": {"steps": 1, "precision": "fp32"},
    }
    values |= {"deepspeed": {"zero_optimization": {"stage": stage}}}
    engine = Engine(objective(), parse(Config, values, "distributed_checks"), world)
    engine.set_learning_rate(1e-3)
    engine.backward(engine(*batch(slice(world.rank, world.rank + 1))).total)
    engine.step()
    first = ".exp_avg"
    return {name.removesuffix(first): 10 * value for name, value in engine.moments() if name.endswith(first)}


def scaled(gradients: Gradients, by: Gradients) -> Tensor:
    """All gradients as one vector, each divided by its largest true value."""
    assert gradients.keys() == by.keys()
    return torch.cat([(value.double() / by[name].abs().max()).flatten() for name, value in gradients.items()])


def same_everywhere(world: World, gradients: Gradients) -> bool:
    flat = torch.cat([value.flatten() for value in gradients.values()])
    gathered = [torch.empty_like(flat) for _ in range(world.size)]
    torch.distributed.all_gather(gathered, flat)
    return all(torch.equal(one, gathered[0]) for one in gathered)


def main(out: str) -> None:
    world = distributed.start(1)
    true, report = truth(), {}
    ways = {"DDP": lambda: under_ddp(world)}
    ways |= {f"ZeRO {stage}": (lambda stage=stage: under_zero(world, stage)) for stage in (1, 2, 3)}
    with implementation("reference"):
        eager = under_ddp(world)
    for name, way in ways.items():
        with implementation("fused"), counted_launches() as launches, warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*the reference answers instead")
            fused = way()
        ours, torchs = (scaled(gradients, true).float() for gradients in (fused, eager))
        error, _, bound = exactness.errors(ours, torchs, scaled(true, true))
        report[name] = {"launches": len(launches), "error": error, "bound": bound}
        report[name]["same on both"] = same_everywhere(world, fused)
    if world.is_main:
        Path(out).write_text(json.dumps(report, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
