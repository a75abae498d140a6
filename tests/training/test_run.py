"""A whole run: what it writes, and that stopping it anywhere and going on changes no bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bevt_fast.errors import EXIT_SIGINT, EXIT_SIGTERM
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import checkpoint, distributed
from bevt_fast.training.run import Run
from tests.training.command import losses, rows

SCALARS = {  # NEEDS 4, those that this run can have
    "train/loss",
    "train/loss_image",
    "train/loss_video",
    "train/mask_acc_2d",
    "train/mask_acc_3d",
    "train/lr",
    "train/grad_norm",
    "train/skipped_steps",
    "perf/clips_per_s",
    "perf/data_wait_frac",
    "data/quarantined",
}


def weights_file(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step_{step:08d}" / "model.safetensors"


def contents(file: Path) -> tuple[dict, bytes]:
    """A safetensors file bit by bit; only the order of the entries of its header, which safetensors draws by chance, is
    left out.
    """
    blob = file.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:start]), blob[start:]


def wait_for_step(process, output: Path, step: int) -> None:
    """Until the log has `step`; the run must still be going on."""
    log, deadline = output / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_every_step_is_logged_once_with_the_promised_names(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(12))
    assert all(line.keys() >= SCALARS for line in steps)
    assert steps[0]["train/loss"] == pytest.approx(steps[0]["train/loss_image"] + steps[0]["train/loss_video"])
    held = [line for line in lines if "val/mask_acc_3d" in line]
    assert len(held) == 1 and 0 <= held[0]["val/mask_acc_2d"] <= 1


def test_tensorboard_shows_what_the_log_says(uninterrupted: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(uninterrupted / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(step, torch.tensor(loss).item()) for step, loss in enumerate(losses(uninterrupted))]
    assert set(events.Tags()["scalars"]) >= SCALARS


def test_a_run_leaves_its_files_and_no_others(uninterrupted: Path) -> None:
    there = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()}
    there = {path for path in there if not path.startswith("tensorboard/")}
    expected = {
        f"checkpoints/step_{step:08d}/{name}" for step in (4, 8, 12) for name in (*checkpoint.PARTS, "MANIFEST.json")
    }
    expected |= {"checkpoints/latest", "config.json", "log.jsonl", "heldout.json", ".lock"}
    expected |= {"pictures/images.png", "pictures/clips.png", "pictures/loss_curve.png"}
    assert there == expected  # and no quarantine.jsonl: every file was good
    for picture in (uninterrupted / "pictures").iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_written_configuration_is_the_run(uninterrupted: Path, settings, here) -> None:
    """config.json alone gives the same run again, wherever it is started."""
    again = uninterrupted.parent / "again"
    assert here(uninterrupted / "config.json", "--set", f"output={again}", "--set", "train.steps=12").code == 0
    assert losses(again) == losses(uninterrupted)


def test_the_weights_load_with_safetensors_alone(uninterrupted: Path) -> None:
    size = {"embed_dim": 16, "depths": (1, 1, 1, 1), "heads": (1, 2, 4, 8)}
    model = Bevt(VideoSwinConfig(**size, window=(2, 2, 2), drop_path=0.2), vocab_size=32)
    weights = load_file(weights_file(uninterrupted, 12))
    assert set(weights) == {name for name, _ in model.named_parameters()}
    model.load_state_dict(weights, strict=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


# -- killed, stopped, gone on with -----------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_nothing_had_happened(uninterrupted: Path, settings, here, background) -> None:
    seed = random.SystemRandom().randrange(10**6)
    step = random.Random(seed).randrange(4, 10)
    print(f"seed {seed}: kill -9 after step {step} is logged")
    config = settings({"data.workers": 1})
    output = config.with_suffix("")
    process = background("--config", config)
    wait_for_step(process, output, step)
    os.kill(process.pid, signal.SIGKILL)  # not its workers: the out-of-memory killer takes one process, too
    process.wait()
    committed = [path.name for path in checkpoint.commits(output / "checkpoints")]
    assert committed and not (output / "heldout.json").exists()
    assert rows(output)[: step + 1] == rows(uninterrupted)[: step + 1]

    done = here(config, "--resume", "auto")
    assert done.code == 0, done.error
    assert rows(output) == rows(uninterrupted)  # losses, accuracies, rates and norms, every digit
    assert contents(weights_file(output, 12)) == contents(weights_file(uninterrupted, 12))
    moments = "checkpoints/step_00000012/optimizer.safetensors"
    assert contents(output / moments) == contents(uninterrupted / moments)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, EXIT_SIGTERM), (signal.SIGINT, EXIT_SIGINT)])
def test_a_signal_within_a_step_saves_after_it(
    number: signal.Signals, code: int, uninterrupted: Path, settings, here, monkeypatch
) -> None:
    config = settings()
    output = config.with_suffix("")
    micro_batches = Run.micro_batches

    def interrupted(run: Run, step: int):
        for place, batch in enumerate(micro_batches(run, step)):
            if (step, place) == (6, 1):
                signal.raise_signal(number)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Run, "micro_batches", interrupted)
        assert here(config).code == code
    assert len(rows(output)) == 7
    found = checkpoint.newest_valid(output / "checkpoints")
    assert found is not None and found.step == 7
    assert here(config, "--resume", "auto").code == 0
    assert rows(output) == rows(uninterrupted)
    assert contents(weights_file(output, 12)) == contents(weights_file(uninterrupted, 12))


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_the_output_is_locked(settings, here, background) -> None:
    config = settings({"train.steps": 10**6, "data.workers": 1})
    output = config.with_suffix("")
    process = background("--config", config)
    wait_for_step(process, output, 2)
    second = here(config)
    assert second.code == 2 and second.error.count("\n") == 1 and str(output) in second.error
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_SIGINT, error
    assert "Traceback" not in error
    found = checkpoint.newest_valid(output / "checkpoints")
    assert found is not None and found.step == len(rows(output))


def test_sigterm_to_the_program(settings, background) -> None:
    config = settings({"train.steps": 10**6})
    process = background("--config", config)
    wait_for_step(process, config.with_suffix(""), 0)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_SIGTERM, error
    found = checkpoint.newest_valid(config.with_suffix("") / "checkpoints")
    assert found is not None and found.step == len(rows(config.with_suffix("")))


def test_the_second_interrupt_leaves_at_once(monkeypatch, capsys) -> None:
    left = []
    monkeypatch.setattr(distributed.os, "_exit", left.append)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop = distributed.StopSignal()
        assert stop.poll() == 0
        signal.raise_signal(signal.SIGINT)
        assert (stop.poll(), left) == (EXIT_SIGINT, [])
        signal.raise_signal(signal.SIGINT)
        assert left == [EXIT_SIGINT] and "intact" in capsys.readouterr().err
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# -- beginning again ---------------------------------------------------------------------------------------------------


def test_a_fresh_start_moves_the_earlier_run_aside(settings, here) -> None:
    config = settings({"train.steps": 2})
    output = config.with_suffix("")
    assert here(config).code == 0
    before = losses(output)
    assert here(config, "--set", "seed=1").code == 0
    assert losses(output.with_suffix(".1")) == before != losses(output)
    assert weights_file(output.with_suffix(".1"), 2).exists()


def test_resume_auto_without_a_checkpoint_starts(uninterrupted: Path, settings, here) -> None:
    config = settings({"train.steps": 12, "train.save_every": 100})
    assert here(config, "--resume", "auto").code == 0
    assert losses(config.with_suffix("")) == losses(uninterrupted)
