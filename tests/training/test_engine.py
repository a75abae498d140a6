"""The engine: which weights decay; a bad step changes nothing anywhere; the state goes in and out bit by bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bevt_fast.config import Optim
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.training.engine import ClippedAdamW, parameter_groups
from tests.training.command import ROOT, environment

CHECKS = (
    "moments are there",
    "nan: skipped",
    "nan: module unchanged",
    "inf: skipped",
    "inf: module unchanged",
    "weights, moments and counters unchanged",
    "losses after it are finite",
    "next step applied",
    "next step changes every weight",
    "next step is finite",
    "next step is counted once",
    "goes on bit by bit",
    "module goes on bit by bit",
    "state in and out of another stage",
)


def base_joint() -> tuple[JointObjective, dict[int, str]]:
    with torch.device("meta"):
        objective = JointObjective(Bevt(VideoSwinConfig.preset("base", window=(8, 7, 7))))
    return objective, {id(parameter): name for name, parameter in objective.named_parameters()}


def test_of_the_joint_base_model_132_of_344_tensors_do_not_decay() -> None:
    objective, names = base_joint()
    groups = parameter_groups(objective, Optim(lr=5e-4))
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, undecayed = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert (len(undecayed), len(decayed) + len(undecayed)) == (132, 344)  # SPEC 5.2
    assert decayed | undecayed == set(names.values())
    # by what they are, not by what they are called: every LayerNorm and every bias table
    norms = {id(p) for module in objective.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    tables = {id(p) for p in objective.parameters() if p.ndim == 2 and p.shape[0] == 15 * 13 * 13}
    assert len(tables) == 2 + 2 + 18 + 2
    assert undecayed == {names[number] for number in norms | tables}
    assert {"model.mask_token.vector", "model.head.bias"} <= decayed


def test_biases_are_spared_where_asked() -> None:
    objective, names = base_joint()
    decayed = parameter_groups(objective, Optim(lr=1, decay_biases=False))[0]["params"]
    assert not [names[id(parameter)] for parameter in decayed if parameter.ndim == 1]
    assert "model.mask_token.vector" in {names[id(parameter)] for parameter in decayed}


def test_clipping_is_by_the_norm_of_all_gradients_together() -> None:
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))]
    optimizer = ClippedAdamW([{"params": weights}], max_norm=3.0, lr=0.1, betas=(0.0, 0.0))
    for weight in weights:
        weight.grad = torch.full_like(weight, 10.0)
    optimizer.step()
    assert optimizer._global_grad_norm == pytest.approx(10 * 5**0.5)
    for weight in weights:  # AdamW's first moment with beta 0 is the clipped gradient itself
        assert torch.allclose(optimizer.state[weight]["exp_avg"], torch.full_like(weight, 3 / 5**0.5), rtol=1e-5)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bool]]:
    """What two processes found; engine_checks.py says how."""
    out = tmp_path_factory.mktemp("engine") / "report.json"
    place = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("engine_checks.py")
    done = subprocess.run([*command, str(script), str(out)], env=place, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_two_processes(report: dict[str, dict[str, bool]], precision: str, stage: int) -> None:
    """A NaN or inf in one micro-batch of one process, the step after it, and the state by name."""
    found = report[f"{precision} ZeRO {stage}"]
    assert set(found) == set(CHECKS)
    assert not [name for name, holds in found.items() if not holds]
