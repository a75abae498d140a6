"""Rates and decays of fine-tuning, against the numbers of SPEC 6.2."""

import pytest
import torch

from bevt_fast.finetune_config import FinetuneOptim
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import ema, schedule
from bevt_fast.training.layer_decay import layer, parameter_groups, rule

BASE = (2, 2, 18, 2)
# SPEC 6.2: exponents of 0.9
LAYERS = {
    "class_head.weight": 0,
    "encoder.norm.weight": 1,
    "encoder.stage.3.blocks.1.mlp.fc1.weight": 1,
    "encoder.stage.3.blocks.0.norm1.bias": 2,
    "encoder.stage.2.merging.reduction.weight": 3,
    "encoder.stage.2.blocks.17.attention.qkv.weight": 4,
    "encoder.stage.2.blocks.0.attention.qkv.weight": 21,
    "encoder.stage.1.merging.norm.weight": 22,
    "encoder.stage.1.blocks.1.norm2.weight": 23,
    "encoder.stage.1.blocks.0.norm2.weight": 24,
    "encoder.stage.0.merging.norm.weight": 25,
    "encoder.stage.0.blocks.1.mlp.fc2.bias": 26,
    "encoder.stage.0.blocks.0.mlp.fc2.bias": 27,
    "encoder.stem.projection.weight": 28,
    "encoder.stem.norm.weight": 28,
}
TABLE = "encoder.stage.0.blocks.0.attention.relative_position_bias_table"


def optim(**changes) -> FinetuneOptim:
    return FinetuneOptim.model_validate({"lr": 1.0, "weight_decay": 0.5} | changes)


def test_kinetics_rates_are_those_of_the_specification():
    kinetics = optim(layer_decay=0.9)
    for name, exponent in LAYERS.items():
        assert layer(name, BASE) == exponent, name
        found = rule(name, kinetics, BASE)
        assert found.lr_scale == pytest.approx(0.9**exponent) and found.decayed == (name != "encoder.norm.weight"), name
    assert rule(TABLE, kinetics, BASE) == (1.0, False)


def test_something_rates_are_those_of_the_specification():
    something = optim(encoder_lr=0.1)
    for name in LAYERS:
        assert rule(name, something, BASE) == (0.1 if name.startswith("encoder.") else 1.0, True)
    assert rule(TABLE, something, BASE) == (1.0, False)


@pytest.mark.parametrize(
    ("changes", "count", "tensors"),
    [({"layer_decay": 0.9}, 31, {(1.0, 0.0): 24, (1.0, 0.5): 2, (0.9, 0.0): 2}), ({"encoder_lr": 0.1}, 3, {})],
)
def test_every_parameter_is_in_one_group(changes, count, tensors):
    with torch.device("meta"):
        model = Classifier(VideoSwinConfig.preset("base"), classes=400)
    groups = parameter_groups(model.named_parameters(), optim(**changes), BASE)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(groups) == count and sorted(members) == sorted(map(id, model.parameters()))
    sizes = {(group["lr_scale"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert sizes | tensors == sizes


def test_the_engine_multiplies_the_rate_of_each_group():
    from bevt_fast.training.engine import Engine

    class Stub(Engine):
        def __init__(self, groups):
            self.optimizer = torch.optim.AdamW(groups, lr=0.0)

    weights = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    stub = Stub([{"params": [weights[0]], "lr_scale": 0.5}, {"params": [weights[1]]}])
    stub.set_learning_rate(0.3)
    assert [group["lr"] for group in stub.optimizer.param_groups] == [0.15, 0.3]


def test_cosine_per_epoch_with_a_warm_up_per_step():
    """SPEC 6.1: 0.5 * base * (1 + cos(pi * epoch / 60)), times 1 - 0.9 * (1 - step / (2.5 epochs))."""
    steps = 10
    rates = [schedule.learning_rate(step, 60 * steps, 25, optim(), hold=steps) for step in range(60 * steps)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[12] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi / 60)).item()) * (1 - 0.9 * 13 / 25))
    assert len(set(rates[30:40])) == 1 and rates[39] > rates[40]
    assert rates[590] == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(torch.pi * 59 / 60)).item()), rel=1e-4)


def test_the_momentum_of_the_average_is_constant():
    assert [ema.share(number) for number in (0, 1, 10**6)] == [0.0002] * 3
