"""Blocks under torch.compile: the answers, the names and the memory of blocks that are not."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from bevt_fast.config import Config, parse
from bevt_fast.errors import ConfigError, MachineError
from bevt_fast.models import compiled
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.compiled import Compiled, require_compiler
from bevt_fast.models.video_swin import Block, Stage, VideoSwinConfig, WindowAttention
from bevt_kernels import exactness
from tests.models.oracles import randomise

WINDOW = (2, 3, 3)
GRIDS = {"clips": (4, 6, 6), "images": (1, 6, 6), "padded": (3, 5, 7), "smaller than a window": (1, 2, 3)}
SHAPE = VideoSwinConfig(embed_dim=8, depths=(2, 1, 1, 1), heads=(1, 2, 2, 2), window=WINDOW, drop_path=0.5)


@pytest.fixture(autouse=True)
def _forget():
    """Graphs of other tests."""
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    counters.clear()


def _block(width: int = 8, rate: float = 0.4) -> Block:
    return randomise(Block(width, WindowAttention(width, 2, WINDOW, True, "true"), 4 * width, rate)).train()


def _gradients(module, x, seed=0):
    """Output and the gradients of x and of every parameter, each in units of its largest value, in one vector."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    out = module(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), (x, *module.parameters()))]


def _assert_law(ours, plain, truth):
    units = [exact.abs().max().clamp_min(1e-30) for exact in truth]
    one, two, three = (
        torch.cat([(value.double() / unit).flatten() for value, unit in zip(values, units)])
        for values in (ours, plain, truth)
    )
    exactness.assert_as_exact_as_torch("output and gradients", one.float(), two.float(), three)


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("grid", "rate"), [*((grid, 0.4) for grid in GRIDS), ("clips", 0.0), ("clips", 1.0)])
def test_a_block_draws_the_same_samples_and_gives_the_same_answers(grid, rate):
    block, x = _block(rate=rate), torch.randn(5, *GRIDS[grid], 8)
    plain, truth = copy.deepcopy(block), copy.deepcopy(block).double()
    block.compiled = Compiled("aot_eager")
    for seed in range(3):
        _assert_law(_gradients(block, x, seed), _gradients(plain, x, seed), _gradients(truth, x.double(), seed))
    assert _graphs() <= 2


def test_inductor_gives_the_same_answers_and_keeps_as_little():
    width, tokens = 32, 3 * 4 * 36
    block, x = _block(width, 0.0), torch.randn(3, 4, 6, 6, width)
    plain, truth = copy.deepcopy(block), copy.deepcopy(block).double()
    block.compiled = Compiled()
    ours = _gradients(block, x)
    _assert_law(ours, _gradients(plain, x), _gradients(truth, x.double()))
    for one, other in zip(ours, _gradients(block, x)):
        exactness.assert_same_bits("twice", one, other)
    weights = {parameter.data_ptr() for parameter in block.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}), x)[1], lambda x: x
    ):
        _ = block(x.requires_grad_())
    # x, qkv (3), the attention's output, x between the branches, the hidden layer before its GELU (4)
    large = [size for place, size in kept.items() if place not in weights and size >= 4 * tokens * width]
    assert sum(large) == 10 * 4 * tokens * width
    few = x.detach()[:1, :2].contiguous()
    _assert_law(_gradients(block, few), _gradients(plain, few), _gradients(truth, few.double()))
    assert _graphs() == 2


def _stage(activation_checkpointing: bool = False) -> Stage:
    """Two blocks of one width, the second shifted."""
    stage = randomise(Stage(SHAPE, 0, "true", activation_checkpointing)).train()
    stage.merging = None
    for block in stage.modules():
        if isinstance(block, Block):
            block.compiled = Compiled("aot_eager")
    return stage


def test_graphs_do_not_grow_with_samples_streams_or_blocks():
    stage = _stage()
    for seed, (samples, steps) in enumerate([(5, 4), (1, 4), (7, 1), (2, 1), (5, 2), (3, 4)]):
        torch.manual_seed(seed)
        stage(torch.randn(samples, steps, 6, 6, 8, requires_grad=True)).sum().backward()
    assert _graphs() == 2
    with torch.no_grad():
        stage(torch.randn(9, 4, 6, 6, 8))
    stage.eval()(torch.randn(1, 2, 6, 6, 8, requires_grad=True))
    assert _graphs() == 2


def test_the_model_stays_the_same_model():
    plain, ours = Bevt(SHAPE, vocab_size=7), Bevt(SHAPE, vocab_size=7)
    ours.encoder.compile_blocks("aot_eager")
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    pixels, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 2, 2) < 0.5
    twin = copy.deepcopy(ours)
    features = []
    for model in (plain, ours, twin):
        torch.manual_seed(1)
        features.append(model.image_features(pixels, mask).detach())
    assert torch.equal(features[1], features[2])
    torch.testing.assert_close(features[0], features[1])
    assert torch.equal(ours.eval().image_features(pixels).detach(), twin.eval().image_features(pixels).detach())


def test_activation_checkpointing_changes_no_bit():
    plain, saving = _stage(), _stage(True)
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(4, 4, 6, 6, 8)
    for one, other in zip(_gradients(plain, x, 5), _gradients(saving, x, 5)):
        exactness.assert_same_bits("checkpointing", one, other)


def test_bfloat16_and_autocast():
    block, x = _block(), torch.randn(5, *GRIDS["clips"], 8)
    low = copy.deepcopy(block).bfloat16()
    low_x, plain, lowered = x.bfloat16(), copy.deepcopy(block), copy.deepcopy(low)
    truth = _gradients(copy.deepcopy(low).double(), low_x.double())
    low.compiled = block.compiled = Compiled("aot_eager")
    _assert_law(_gradients(low, low_x), _gradients(lowered, low_x), truth)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _gradients(block, x), _gradients(plain, x)
    assert [value.dtype for value in ours] == [value.dtype for value in theirs]
    _assert_law(ours, theirs, _gradients(copy.deepcopy(plain).double(), x.double()))


def _parse(stage: int | None, **train):
    part = {"name": "not_opened"}
    stream = {"source": part, "mask": part, "batch": 2, "micro_batch": 2}
    values = {"output": "x", "images": stream, "tokenizer": part, "optim": {"lr": 1e-3}, "train": {"steps": 9} | train}
    zero = {} if stage is None else {"deepspeed": {"zero_optimization": {"stage": stage}}}
    return parse(Config, values | zero, "here")


def test_what_cannot_go_together_is_refused():
    assert not _parse(3).train.compile
    for stage in (None, 0, 1, 2):
        assert _parse(stage, compile=True).train.compile
    with pytest.raises(ConfigError, match=r"ZeRO stage 3.*stage to 2, or leave train\.compile out") as caught:
        _parse(3, compile=True)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="compile"):
        _parse(None, compile="inductor")


def test_a_machine_without_a_compiler_is_told_in_one_sentence(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(MachineError, match=r"train\.compile needs a C\+\+ compiler.*no-such-compiler") as caught:
        require_compiler(torch.device("cpu"))
    assert len(str(caught.value).splitlines()) == 1
