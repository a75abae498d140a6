"""Weights, optimizers and engines of the step benchmark's contenders."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.throughput_work import Work
from bevt_fast.data.batch import JointBatch, Targets
from bevt_fast.errors import MachineError
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.training import distributed
from bevt_fast.training.assemble import build_objective
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import parameter_groups


def new_objective(work: Work) -> JointObjective:
    """The model with the benchmark's first weights, in training mode, on the CPU."""
    torch.manual_seed(1)
    return build_objective(work.config, getattr(work.tokenizer, "vocab_size", 0), initialise=False).train()


def first_weights(work: Work) -> dict[str, Tensor]:
    """By name, on the device, for whoever has to come back to them."""
    return {name: weight.detach().to(work.device) for name, weight in new_objective(work).model.named_parameters()}


class State:
    """Weights and an optimizer; the plain contenders take turns on one. `first`: the weights to come back to."""

    def __init__(
        self,
        work: Work,
        kind: type[torch.optim.AdamW] = torch.optim.AdamW,
        first: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.objective: JointObjective = new_objective(work).to(work.device)
        self.parameters: list[Tensor] = list(self.objective.parameters())
        self.first = list((first or {}).values())
        optim = work.config.optim
        groups = parameter_groups(self.objective, optim)
        self.optimizer = kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, **options)
        self.max_norm = optim.grad_clip or float("inf")

    def restore(self, moments: bool = False) -> None:
        """The first weights; with `moments`, an optimizer that has not stepped yet."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.first)
        if moments:
            self.optimizer.state.clear()

    def update(self, clip: bool = True) -> None:
        """Clip, step, and let go of the gradients."""
        if clip:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class PlainEngine:
    """What `joint_step` asks of an engine, without DeepSpeed."""

    def __init__(self, state: State, work: Work, clips_itself: bool = False) -> None:
        self.state, self.autocast, self.clips_itself = state, autocast(work), clips_itself

    def __call__(self, *arguments: Any) -> Any:
        with self.autocast():
            return self.state.objective(*arguments)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.state.update(clip=not self.clips_itself)


class Seen:
    """An engine, and the targets that it was given last."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.targets = Targets(None, None)

    def __call__(self, batch: JointBatch, targets: Targets, *rest: Any) -> Any:
        # the streams may come one after the other
        self.targets = Targets(*(old if new is None else new for old, new in zip(self.targets, targets)))
        return self.engine(batch, targets, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def autocast(work: Work, dtype: str = "") -> Callable[[], AbstractContextManager[Any]]:
    """The official recipe's mixed precision (SPEC 5.2) in bf16; nothing in float32."""
    low = (dtype or work.config.train.precision) == "bf16"
    return lambda: torch.autocast(work.device.type, torch.bfloat16, enabled=low)


def world(device: torch.device) -> World:
    """This process alone, as train.py would be started by plain python."""
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise MachineError("throughput.py times one process; start it with plain python, not with a launcher")
    if not dist.is_initialized():
        distributed.read_environment()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    return World(0, 0, 1, device)
