"""Who takes part in the step benchmark: the official step in three forms, ours, and the ladder between them.

A rung is the rung below with one part of the official step replaced by ours, so that the share of each can be seen.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import official_step, official_tokenizer
from bench.official_step import Layout, OfficialModel, Place
from bench.official_tokenizer import HiddenCells, OfficialTokenizer
from bench.throughput_state import PlainEngine, Seen, State, autocast, new_objective, world
from bench.throughput_work import Work
from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.models.bevt import hidden_rows
from bevt_fast.train import hidden_targets, joint_step
from bevt_fast.training.engine import MOMENTS, ClippedAdamW, Engine
from bevt_fast.training.run import lower
from bevt_kernels import masked_cross_entropy

OFFICIAL, KINDER, COMPILED = "official", "official, tokenizer by 4", "official, compiled"
HIDDEN, TOKENIZER, ROWS = "+ hidden frames and cells", "+ our tokenizer", "+ hidden rows in decoder and loss"
ATTENTION, BLOCKS, OURS = "+ our window attention", "+ our blocks", "ours"
LADDER = (OFFICIAL, KINDER, HIDDEN, TOKENIZER, ROWS, ATTENTION, BLOCKS, OURS)
BESIDE = "ours, tokenizer beside the encoder"
NAMES = (OFFICIAL, KINDER, COMPILED, *LADDER[2:], BESIDE)
TRUTH, ROUNDED = "official in float32", "official in bfloat16 throughout"
CHUNK = {"cpu": 4, "cuda": 64}  # frames our tokenizer takes at a time, so that this rung changes one thing


class CannotRun(Exception):
    """Says why."""


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


class LowWeights(Mapping[str, Tensor]):
    """Weights in bfloat16, as an engine without autocast holds them; their gradients reach the float32 ones."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].to(torch.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def yardsticks(work: Work, state: State) -> list[Contender]:
    """The official step in float32, and with everything in bfloat16: what rounding alone does to a loss."""
    found = []
    for name, low in ((TRUTH, False), (ROUNDED, True)):
        model = make_model(work, state)
        mixed = Mixed(work, state, official_tokens(work, official_tokenizer.FRAMES), model)
        mixed.autocast = autocast(work, "fp32")
        contender = mixed.contender(name)
        if low:
            model.weights = LowWeights(model.weights)
            contender.ready = lambda batch: lower(batch, torch.bfloat16)
        found.append(contender)
    return found


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
    owner = Joint(seen, work.tokenizer, objective)

    def step(batch: JointBatch) -> Losses:
        return joint_step(owner.engine, owner.tokenizer, batch)

    return Contender(name, step, restore, lambda: seen.targets, note=note, owner=owner)


def beside(work: Work, ours: Contender | None) -> Contender:
    """Ours with train.overlap_tokenizer, on the same engine. Raises CannotRun."""
    if work.device.type != "cuda" or ours is None:
        raise CannotRun("streams beside one another need an NVIDIA GPU" if ours else "ours cannot run")
    seen, side = ours.owner.engine, torch.cuda.Stream(work.device)

    def step(batch: JointBatch) -> Losses:
        seen.side = side
        try:
            return ours.step(batch)
        finally:
            seen.side = None

    return Contender(BESIDE, step, ours.restore, ours.seen, ours.ready, "train.overlap_tokenizer", ours.owner)


@dataclass
class Joint:
    """What `joint_step` is given, and the modules within."""

    engine: Any
    tokenizer: Any
    objective: nn.Module
