"""What test_engine.py asks of two processes; started by torchrun, prints one JSON object on the first of them.

torchrun --standalone --nproc_per_node 2 engine_checks.py OUT.json
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bevt_fast.config import Config, parse
from bevt_fast.data.batch import Images, JointBatch, Targets
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.training import distributed
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import Engine

SIZE = VideoSwinConfig(embed_dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=(2, 2, 2), drop_path=0.2)
ACCUMULATION = 2
OTHER = {0: 3, 1: 2, 3: 0}  # the stage that goes on with the state of each
CASES = [(precision, stage) for precision in ("fp32", "bf16") for stage in OTHER]
State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]


def make(world: World, precision: str, stage: int, state: State | None = None) -> Engine:
    """A new engine; with `state`, one that has drawn other weights first and then takes these over."""
    part = {"name": "not_opened"}
    stream = {"source": part, "mask": part, "batch": 2 * world.size * ACCUMULATION, "micro_batch": 2}
    values = {"output": "x", "images": stream, "tokenizer": part, "optim": {"lr": 1e-3}}
    values |= {"train": {"steps": 9, "precision": precision}, "deepspeed": {"zero_optimization": {"stage": stage}}}
    torch.manual_seed(0 if state is None else 1)
    objective = JointObjective(Bevt(SIZE, vocab_size=32, streams=("images",)))
    if state is not None:
        objective.model.load_state_dict(state[0], strict=False)
    engine = Engine(objective, parse(Config, values, "engine_checks"), world)
    if state is not None:
        engine.load(state[0], state[1])
        engine.load_scalars(state[2])
    return engine


def inputs(number: int, dtype: torch.dtype) -> tuple[JointBatch, Targets]:
    """A micro-batch of images: the engine does not know what it trains, and clips would double the time."""
    draw = torch.Generator().manual_seed(number)
    pixels = torch.randn(2, 3, 64, 64, generator=draw).to(dtype)
    images = Images(pixels, torch.empty(0), torch.rand(2, 4, 4, generator=draw) < 0.5)
    return JointBatch(images, None), Targets(torch.randint(0, 32, (2, 4, 4), generator=draw), None)


def step(engine: Engine, world: World, number: int, bad: str = "") -> list[float]:
    """One step; `bad` spoils one micro-batch on the second process. Returns this process's losses."""
    engine.set_learning_rate(1e-3)
    losses = []
    for micro in range(ACCUMULATION):
        place = (number * ACCUMULATION + micro) * world.size + world.rank
        torch.manual_seed(place)
        batch, targets = inputs(place, engine.dtype)
        spoilt = bad and world.rank == 1 and micro == 0
        if spoilt and bad == "nan" and batch.images:
            batch.images.pixels[0, 0, 0, 0] = math.nan
        loss = engine(batch, targets).total
        if spoilt and bad == "inf":
            loss = loss * math.inf
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def state_of(engine: Engine) -> State:
    return dict(engine.weights()), dict(engine.moments()), engine.scalars()


def module_of(engine: Engine) -> list[Tensor]:
    """What the forward pass uses on this process: with ZeRO-3 its own piece, without the padding at the end."""
    held = []
    for parameter in engine.objective.parameters():
        piece = getattr(parameter, "ds_tensor", parameter).detach().flatten()
        left = getattr(parameter, "ds_numel", piece.numel()) - engine.world.rank * piece.numel()
        held.append(piece[: max(left, 0)].clone() if hasattr(parameter, "ds_tensor") else piece.clone())
    return held


def carried(state: State) -> State:
    """The state without the bookkeeping of DeepSpeed's loss scaler, which differs between stages and, its scale being
    always 1 outside fp16, decides nothing.
    """
    assert state[2]["loss_scaler"].get("cur_scale", 1.0) == 1.0
    return state[0], state[1], {"adam_step": state[2]["adam_step"]}


def same(one: Any, other: Any) -> bool:
    """Bit by bit (and NaN is not itself, so nothing that holds one is the same)."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other))
    return one == other


def check(world: World, precision: str, stage: int) -> dict[str, bool]:
    """Every statement of test_engine.py about one precision and stage, as seen by this process."""
    found: dict[str, bool] = {}
    engine = make(world, precision, stage)
    step(engine, world, 0)
    before = state_of(engine)
    found["moments are there"] = all(bool(value.any()) for name, value in before[1].items() if "head" in name)
    module = module_of(engine)
    for bad in ("nan", "inf"):
        step(engine, world, 1, bad)
        found[f"{bad}: skipped"] = not engine.step_applied and math.isnan(engine.grad_norm())
        found[f"{bad}: module unchanged"] = same(module_of(engine), module)
    found["weights, moments and counters unchanged"] = same(carried(state_of(engine)), carried(before))
    found["losses after it are finite"] = all(map(math.isfinite, step(engine, world, 1)))
    found["next step applied"] = engine.step_applied and math.isfinite(engine.grad_norm())
    after = state_of(engine)
    found["next step changes every weight"] = all(not same(value, before[0][name]) for name, value in after[0].items())
    found["next step is finite"] = all(
        bool(value.isfinite().all()) for value in (*after[0].values(), *after[1].values())
    )
    found["next step is counted once"] = after[2]["adam_step"] == before[2]["adam_step"] + 1 == 2

    again = make(world, precision, stage, before)
    step(again, world, 1)
    found["goes on bit by bit"] = same(carried(state_of(again)), carried(after))
    found["module goes on bit by bit"] = same(module_of(again), module_of(engine))

    other = make(world, precision, OTHER[stage], before)
    found["state in and out of another stage"] = same(carried(state_of(other)), carried(before))
    return found


def main(out: str) -> None:
    world = distributed.start(1)
    report = {}
    for precision, stage in CASES:
        found = check(world, precision, stage)
        everywhere: list[Any] = [None] * world.size
        torch.distributed.all_gather_object(everywhere, found)
        report[f"{precision} ZeRO {stage}"] = {name: all(one[name] for one in everywhere) for name in found}
    if world.is_main:
        Path(out).write_text(json.dumps(report, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
