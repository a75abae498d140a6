"""Who takes part in the step benchmark: the official step in three forms, ours, and the ladder between them.

A rung is the rung below with one part of the official step replaced by ours, so that the share of each can be seen.
"""

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench import official_step, official_tokenizer
from bench.official_step import Layout, OfficialModel, Place
from bench.official_tokenizer import HiddenCells, OfficialTokenizer
from bench.throughput_work import Work
from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.errors import MachineError
from bevt_fast.models.bevt import hidden_rows
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.train import hidden_targets, joint_step
from bevt_fast.training import distributed
from bevt_fast.training.assemble import build_objective
from bevt_fast.training.distributed import World
from bevt_fast.training.engine import MOMENTS, ClippedAdamW, Engine, parameter_groups
from bevt_fast.training.run import lower
from bevt_kernels import masked_cross_entropy

OFFICIAL, KINDER, COMPILED = "official", "official, tokenizer by 4", "official, compiled"
HIDDEN, TOKENIZER, ROWS = "+ hidden frames and cells", "+ our tokenizer", "+ hidden rows in decoder and loss"
ATTENTION, BLOCKS, OURS = "+ our window attention", "+ our blocks", "ours"
LADDER = (OFFICIAL, KINDER, HIDDEN, TOKENIZER, ROWS, ATTENTION, BLOCKS, OURS)
NAMES = (OFFICIAL, KINDER, COMPILED, *LADDER[2:])
CHUNK = {"cpu": 4, "cuda": 64}  # frames our tokenizer takes at a time, so that this rung changes one thing


class CannotRun(Exception):
    """Says why."""


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
    """An engine, and the targets that it was last given."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.targets: Targets | None = None

    def __call__(self, batch: JointBatch, targets: Targets, hidden: Any = None) -> Any:
        self.targets = targets
        return self.engine(batch, targets, hidden)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()


def autocast(work: Work, dtype: str = "") -> Callable[[], AbstractContextManager[Any]]:
    """The official recipe's mixed precision (SPEC 5.2) in bf16; nothing in float32."""
    low = (dtype or work.config.train.precision) == "bf16"
    return lambda: torch.autocast(work.device.type, torch.bfloat16, enabled=low)


@dataclass
class Contender:
    """One way to take the step. `targets` are those of its last step."""

    name: str
    step: Callable[[JointBatch], Losses]
    restore: Callable[[bool], None]
    seen: Callable[[], Targets]
    ready: Callable[[JointBatch], JointBatch] = lambda batch: batch
    note: str = ""
    owner: Any = None  # what `throughput_parts` puts its marks on


class Mixed:
    """A step put together of parts: a tokenizer's and a model's."""

    def __init__(self, work: Work, state: State, tokens: Callable[[JointBatch], Targets], model: OfficialModel) -> None:
        self.work, self.state, self.tokens, self.model = work, state, tokens, model
        self.autocast = autocast(work)
        self.targets = Targets(None, None)

    def step(self, batch: JointBatch) -> Losses:
        self.targets = self.tokens(batch)
        with self.autocast():
            losses = self.model.step_losses(batch, self.targets)
        self.backward(losses.total)
        self.state.update()
        return Losses(*(value.detach() for value in losses))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def contender(self, name: str, note: str = "") -> Contender:
        return Contender(name, self.step, self.state.restore, lambda: self.targets, note=note, owner=self)


class HiddenRowsModel(OfficialModel):
    """Decoder, norm and head of ours, on hidden rows."""

    model: Any

    def stream_loss(self, stream: Images | Clips, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        assert ids is not None
        clips = isinstance(stream, Clips)
        rows = hidden_rows(stream.mask, self.shape.patch[0] if clips else 1, stream.pixels.device)
        stages = self.stages(stream)[2:]
        return self.loss_of_rows(self.model.clip_decoder if clips else self.model.image_decoder, stages, ids, rows)

    def loss_of_rows(self, decoder: nn.Module, stages: Any, ids: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
        features = self.model.encoder.norm(decoder(*stages, rows))
        return masked_cross_entropy(features, self.model.head, ids.flatten().index_select(0, rows.positions))


class OurAttentionModel(HiddenRowsModel):
    """The official blocks around our window attention."""

    def run_block(self, x: Tensor, place: Place, official: bool) -> Tensor:
        ours = self.model.encoder.stage[place.stage].blocks[place.depth].attention
        kind = "official" if official else "t1"

        def attend(x: Tensor, weights: Any, layout: Layout) -> Tensor:
            return ours(x, kind)

        self.block = functools.partial(official_step.block, attend=attend)
        return super().run_block(x, place, official)


def make_model(work: Work, state: State, kind: type[OfficialModel] = OfficialModel) -> OfficialModel:
    """The official computation over the weights of a state."""
    section, objective = work.config.model, state.objective
    weights = dict(objective.model.named_parameters())
    stream_weights = (objective.image_weight, objective.clip_weight)
    model = kind(weights, work.shape, section.image_attention, section.bias_index, stream_weights)
    if isinstance(model, HiddenRowsModel):
        model.model = objective.model
    return model


def official_tokens(work: Work, at_a_time: int | None) -> OfficialTokenizer:
    """Of a tokenizer other than DALL-E's, its own scores of every cell."""
    tokenizer = OfficialTokenizer(work.tokenizer.state_dict(), at_a_time)
    if work.config.tokenizer.name != "dalle":
        scores: Any = work.tokenizer.logits
        tokenizer.logits = lambda weights, frames: scores(frames)
    return tokenizer


def build(name: str, work: Work, state: State | None, engine: str, first: Mapping[str, Tensor] | None) -> Contender:
    """The contender of that name. Raises CannotRun. `engine` "deepspeed" or "plain" is for ours alone, which needs no
    state; without `first` weights nothing can be restored.
    """
    if name == OURS:
        return ours(work, engine, first or {})
    assert state is not None
    if name == BLOCKS:
        seen = Seen(PlainEngine(state, work))
        return _joint(
            name, seen, work, state.restore, "train.py's joint_step, AdamW without DeepSpeed", state.objective
        )
    if name == COMPILED:
        return _compiled(work, state)
    at_a_time = None if name == OFFICIAL else official_tokenizer.FRAMES
    tokens: Callable[[JointBatch], Targets] = official_tokens(work, at_a_time)
    if name == HIDDEN:
        if work.config.tokenizer.name != "dalle":
            raise CannotRun(f"the layers of {work.config.tokenizer.name} are not known to the official step")
        tokens = HiddenCells(work.tokenizer.state_dict(), CHUNK[work.device.type])
    elif name in (TOKENIZER, ROWS, ATTENTION):
        tokenizer: Any = work.tokenizer
        tokens = lambda batch: hidden_targets(tokenizer, batch)  # noqa: E731
    kinds: Mapping[str, type[OfficialModel]] = {ROWS: HiddenRowsModel, ATTENTION: OurAttentionModel}
    return Mixed(work, state, tokens, make_model(work, state, kinds.get(name, OfficialModel))).contender(name)


def _compiled(work: Work, state: State) -> Contender:
    """torch.compile over the official blocks and tokenizer; one graph a stage, shift and stream."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(settings, limit, 256)
    settings.fail_on_recompile_limit_hit = True  # it would go on uncompiled, and say nothing
    model, tokens = make_model(work, state), official_tokens(work, None)
    model.block = torch.compile(official_step.block, dynamic=False)
    tokens.logits = torch.compile(tokens.logits, dynamic=False)
    return Mixed(work, state, tokens, model).contender(COMPILED, "blocks and tokenizer under torch.compile")


def ours(work: Work, kind: str, first: Mapping[str, Tensor]) -> Contender:
    """What bevt_fast/train.py runs, on weights of its own."""
    if kind == "plain":
        # clips and steps as the engine's own optimizer does
        fused = work.device.type == "cuda" or None
        state = State(work, ClippedAdamW, first, max_norm=work.config.optim.grad_clip, fused=fused)
        seen = Seen(PlainEngine(state, work, clips_itself=True))
        note = "train.py's joint_step over a plain stand-in for DeepSpeed: the same clipping and AdamW"
        return _joint(OURS, seen, work, state.restore, note, state.objective)
    objective = new_objective(work)
    engine = Engine(objective.to(work.device), work.config, world(work.device))
    engine.set_learning_rate(work.config.optim.lr)
    nothing = torch.zeros(())

    def restore(moments: bool = False) -> None:
        zeros = {f"{name}.{moment}": nothing.expand(w.shape) for name, w in first.items() for moment in MOMENTS}
        engine.objective.model.load_state_dict(first)  # pyright: ignore
        engine.load(dict(first), zeros)
        if moments:
            engine.load_scalars({"adam_step": 0.0, "loss_scaler": {}})

    note = f"train.py's joint_step over its DeepSpeed engine, ZeRO stage {engine.stage}"
    found = _joint(OURS, Seen(engine), work, restore, note, objective)
    found.ready = lambda batch: lower(batch, engine.dtype)
    return found


def _joint(
    name: str, seen: Seen, work: Work, restore: Callable[[bool], None], note: str, objective: nn.Module
) -> Contender:
    tokenizer: Any = work.tokenizer

    def targets() -> Targets:
        return seen.targets or Targets(None, None)

    found = Contender(name, lambda batch: joint_step(owner.engine, owner.tokenizer, batch), restore, targets, note=note)
    owner = found.owner = Joint(seen, tokenizer, objective)  # pyright: ignore
    return found


@dataclass
class Joint:
    """What `joint_step` is given, and the modules within."""

    engine: Any
    tokenizer: Any
    objective: nn.Module


def world(device: torch.device) -> World:
    """This process alone, as train.py would be started by plain python."""
    if int(os.environ.get("WORLD_SIZE") or "1") > 1:
        raise MachineError("throughput.py times one process; start it with plain python, not with a launcher")
    if not dist.is_initialized():
        distributed.read_environment()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    return World(0, 0, 1, device)
