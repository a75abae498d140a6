"""Two processes do the arithmetic of one, under every launcher and ZeRO stage; who is who among the processes."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import functional

from bevt_fast.config import load
from bevt_fast.data.batch import Targets
from bevt_fast.errors import MachineError
from bevt_fast.training import checkpoint, distributed
from bevt_fast.training.run import Run, build
from tests.training.command import (
    ROOT,
    STARTED_BY,
    TRAIN,
    alone,
    changed,
    environment,
    leave_group,
    losses,
    rows,
    train_here,
    written,
)


def together(processes: int, configs: list[Path], program: Path = TRAIN) -> None:
    """All these runs, one after the other, on so many processes."""
    script = Path(__file__).with_name("several_runs.py")
    arguments = [str(program), *(f"{config}={port}" for config, port in zip(configs, free_ports(len(configs))))]
    common = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "MASTER_ADDR": "127.0.0.1"}
    started = []
    for rank in range(processes):
        place = environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), **common)
        command = [sys.executable, str(script), *arguments]
        started.append(subprocess.Popen(command, env=place, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, errors[0][-4000:]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def runs(tiny, uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of the same twelve steps as `uninterrupted`, which is one process and ZeRO-1: `two_0` ... `two_3` by two
    processes and ZeRO stage, `resumed` by two from one; and with the global mean `global_one` (a single micro-batch)
    and `global_two`.
    """
    place = tmp_path_factory.mktemp("runs")

    def config(name: str, **changes) -> Path:
        return written(changed(tiny, {"output": str(place / name)} | changes), place / f"{name}.json")

    stage = "deepspeed.zero_optimization.stage"
    whole = {"clips.micro_batch": 4, "images.micro_batch": 4, "model.drop_path": 0.0, "train.loss_mean": "global"}
    halves = whole | {"clips.micro_batch": 2, "images.micro_batch": 2}
    with alone(), mock.patch.object(Run, "finish", lambda run: run.save(run.last_step)):
        assert train_here("--config", config("global_one", **whole)) == 0
    # going on from step 4 of one process and ZeRO-1, with two and ZeRO-2
    shutil.copytree(uninterrupted, place / "resumed")
    for later in ("step_00000008", "step_00000012"):
        shutil.rmtree(place / "resumed" / "checkpoints" / later)
    fresh = [config(f"two_{number}", **{stage: number}) for number in (0, 1, 3)]
    together(2, [*fresh, config("global_two", **halves), config("resumed", **{stage: 2})])
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "2", TRAIN, "--config", config("two_2", **{stage: 2})]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


def same(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) == 12 and one == pytest.approx(other, rel=0, abs=1e-5)


@pytest.mark.parametrize("name", ["two_0", "two_1", "two_2", "two_3", "resumed"])
def test_two_processes_have_the_losses_of_one(runs: Path, uninterrupted: Path, name: str) -> None:
    assert same(losses(runs / name), losses(uninterrupted)), (losses(runs / name), losses(uninterrupted))
    # other samples, or the same in another order, would be seen
    ordered = sorted(losses(uninterrupted))
    assert min(high - low for low, high in itertools.pairwise(ordered)) > 2e-5


@pytest.mark.parametrize("name", ["two_0", "two_1", "two_2", "two_3"])
def test_two_processes_end_with_the_weights_of_one(runs: Path, uninterrupted: Path, name: str) -> None:
    one, two = (checkpoint.newest_valid(run / "checkpoints") for run in (uninterrupted, runs / name))
    assert one is not None and two is not None and one.step == two.step == 12
    assert two.trainer["world_size"] == 2
    for key, value in one.weights.items():
        assert two.weights[key].shape == value.shape
    gradient_sums = [f"{key}.exp_avg" for key in one.weights]
    for key in gradient_sums:
        assert torch.allclose(two.moments[key], one.moments[key], rtol=1e-3, atol=1e-5), key


def test_two_processes_leave_one_log(runs: Path) -> None:
    assert [row["step"] for row in rows(runs / "two_2")] == list(range(12))
    assert sorted(path.name for path in (runs / "two_2" / "pictures").iterdir()) == [
        "clips.png",
        "images.png",
        "loss_curve.png",
    ]


def test_the_global_mean_depends_on_no_split(runs: Path, uninterrupted: Path) -> None:
    assert same(losses(runs / "global_two"), losses(runs / "global_one"))
    # the default, the mean of means, does depend on it
    assert not same(losses(uninterrupted), losses(runs / "global_one"))


def test_the_global_mean_is_over_all_hidden_positions(settings, monkeypatch) -> None:
    """Worked out from logits, for the first step of accumulated micro-batches with different numbers hidden."""
    config = load(settings({"train.loss_mean": "global", "model.drop_path": 0.0}))
    with alone():
        run = build(config)
        try:
            sums, counts, totals, micro = torch.zeros(2), torch.zeros(2), [], []
            model: Any = run.engine.objective.model
            for batch, hidden in run.micro_batches(0):
                targets = targets_of(run, batch)
                totals.append(float(run.engine(batch, targets, hidden).total.detach()))
                for place, stream in enumerate(("images", "clips")):
                    part, ids = getattr(batch, stream), getattr(targets, stream)
                    features = model.image_features if stream == "images" else model.clip_features
                    mask = part.mask.repeat_interleave(2, dim=1) if stream == "clips" else part.mask
                    with torch.no_grad():
                        logits = model.head(features(part.pixels, part.mask))
                    loss = functional.cross_entropy(logits.flatten(0, -2), ids.flatten(), reduction="none")
                    sums[place] += loss[mask.flatten()].sum()
                    counts[place] += mask.sum()
                    micro.append((stream, int(mask.sum())))
        finally:
            run.close()
            leave_group()
    assert len(totals) == 2 and len(set(micro)) > 2  # the numbers hidden do differ
    assert sum(totals) / 2 == pytest.approx(float((sums / counts).sum()), rel=1e-5)


def targets_of(run, batch):
    return Targets(*(run.tokenizer(stream.token_pixels) for stream in batch))


# -- who am I ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu01,gpu02", "gpu01"),
        ("gpu[03-05,9],x1", "gpu03"),
        ("gpu[7],x1", "gpu7"),
        ("login,gpu[03-05]", "login"),
    ],
)
def test_the_first_node_of_a_slurm_list(nodes: str, first: str) -> None:
    assert distributed.first_node(nodes) == first


def only(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    for name in (*STARTED_BY, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_srun_sets_its_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"PROCID": "5", "NTASKS": "16", "LOCALID": "1", "STEP_ID": "0", "JOB_ID": "123456"}
    only(monkeypatch, **{f"SLURM_{name}": value for name, value in slurm.items()}, SLURM_JOB_NODELIST="n[4-7]")
    assert distributed.world_size_from_environment() == 16
    with alone():  # puts the environment back
        distributed.read_environment()
        found = {name: os.environ[name] for name in STARTED_BY}
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("5", "16", "1")
    assert found["MASTER_ADDR"] == "n4" and 1024 < int(found["MASTER_PORT"]) < 65536


def test_plain_python_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch)
    with alone():
        distributed.read_environment()
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")


def test_a_half_set_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, RANK="1", WORLD_SIZE="2")
    with pytest.raises(MachineError, match="MASTER_ADDR, MASTER_PORT") as caught:
        distributed.read_environment()
    assert caught.value.exit_code == 6


def test_a_taken_port_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        only(monkeypatch, RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(MachineError, match=f"process 0 of 1 cannot meet the others at 127.0.0.1:{port}"):
            distributed.start(1)
    leave_group()
