"""A checkpoint is whole or it is not one: every kind of damage is found, named, and passed over."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from bevt_fast.errors import CheckpointError
from bevt_fast.training import checkpoint
from bevt_fast.training.checkpoint import PARTS, newest_valid, read, write
from tests.training.command import losses

FILES = (*PARTS, "MANIFEST.json")


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"head.weight": torch.full((4, 3), float(step)), "head.bias": torch.arange(4.0) + step}


def commit(directory: Path, step: int, keep: int = 9) -> Path:
    weights = tensors(step)
    moments = {f"{name}.{moment}": value * 2 for name, value in weights.items() for moment in ("exp_avg", "exp_avg_sq")}
    trainer = {"adam_step": step, "skipped": 0}
    return write(directory, step, iter(weights.items()), iter(moments.items()), trainer, "{}", keep)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Commits of steps 5, 10 and 15."""
    for step in (5, 10, 15):
        commit(tmp_path, step)
    return tmp_path


def newest_step(directory: Path) -> int:
    found = newest_valid(directory)
    assert found is not None
    return found.step


def test_what_is_read_is_what_was_written(three: Path) -> None:
    found = newest_valid(three)
    assert found is not None and found.step == 15 and found.path == three / "step_00000015"
    assert found.trainer["adam_step"] == 15
    for name, value in tensors(15).items():
        assert torch.equal(found.weights[name], value)
        assert torch.equal(found.moments[f"{name}.exp_avg_sq"], value * 2)
    assert (three / "latest").read_text().strip() == "step_00000015"


def test_no_checkpoint_at_all_is_no_fault(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "nowhere") is None


def flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 0b100
    path.write_bytes(blob)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink], ids=["bit flip", "cut short", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_commit_before_taken(three: Path, name: str, damage, caplog) -> None:
    damage(three / "step_00000015" / name)
    with caplog.at_level(logging.WARNING):
        assert newest_step(three) == 10
    (record,) = caplog.records
    assert "step_00000015" in record.getMessage()
    with pytest.raises(CheckpointError) as caught:
        read(three / "step_00000015")
    # a flipped bit in the manifest is seen as a file that does not match it
    named = FILES if (name, damage) == ("MANIFEST.json", flip) else (name,)
    assert any(file in str(caught.value) for file in named)


def test_every_bit_of_the_weights_counts(three: Path) -> None:
    path = three / "step_00000015" / "model.safetensors"
    blob = path.read_bytes()
    for place in range(0, len(blob), 7):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            read(path.parent)
    path.write_bytes(blob)
    assert read(path.parent).step == 15


def test_all_damaged_is_an_error_and_not_a_fresh_start(three: Path) -> None:
    for path in checkpoint.commits(three):
        flip(path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="none of 3 checkpoints is intact") as caught:
        newest_valid(three)
    assert caught.value.exit_code == 4


def test_what_was_never_committed_is_no_candidate(three: Path) -> None:
    shutil.copytree(three / "step_00000015", three / ".step_00000020.writing")
    shutil.copytree(three / "step_00000015", three / "step_25")
    (three / "step_00000030").write_text("a file, not a folder")
    assert newest_step(three) == 15
    commit(three, 20)
    assert newest_step(three) == 20
    assert not list(three.glob(".*.writing"))


@pytest.mark.parametrize("pointer", [None, "", "step_99999999\n", "step_00000005\n", "\0"])
def test_the_pointer_for_people_decides_nothing(three: Path, pointer: str | None) -> None:
    (three / "latest").unlink()
    if pointer is not None:
        (three / "latest").write_text(pointer)
    assert newest_step(three) == 15


def test_the_step_counts_and_not_the_time_of_the_file(three: Path) -> None:
    os.utime(three / "step_00000005", (2e9, 2e9))
    assert newest_step(three) == 15


def test_older_commits_go_when_there_are_enough(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        commit(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint.commits(tmp_path)] == ["step_00000003", "step_00000004"]


def test_the_same_step_again_replaces_the_commit(three: Path) -> None:
    flip(three / "step_00000015" / "model.safetensors")
    commit(three, 15)
    assert newest_step(three) == 15


def test_another_format_is_refused_by_its_number(three: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="format 1 is not 2"):
        read(three / "step_00000015")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "when"), [(NO_SPACE, when) for when in range(6)] + [(SafetensorError("ENOSPC"), when) for when in (0, 1)]
)
def test_a_full_disk_leaves_earlier_commits_intact(three: Path, error: Exception, when: int, monkeypatch) -> None:
    """At each of the writes: weights, moments, the three text files, the flush to the disk."""
    count = 0

    def full(function):
        def wrapper(*arguments, **options):
            nonlocal count
            count += 1
            if count > when:
                raise error
            return function(*arguments, **options)

        return wrapper

    monkeypatch.setattr(checkpoint, "save_file", full(checkpoint.save_file))
    if error is NO_SPACE:
        monkeypatch.setattr(Path, "write_text", full(Path.write_text))
        monkeypatch.setattr(checkpoint.os, "fsync", full(os.fsync))
    with pytest.raises(OSError):
        commit(three, 20)
    monkeypatch.undo()
    assert [path.name for path in checkpoint.commits(three)] == ["step_00000005", "step_00000010", "step_00000015"]
    assert newest_step(three) == 15 and not list(three.glob(".*.writing"))
    commit(three, 20)
    assert newest_step(three) == 20


def test_another_architecture_is_told_key_by_key(three: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)
            self.tail = nn.Linear(2, 2, bias=False)
            self.head.bias = None

    with pytest.raises(CheckpointError) as caught:
        checkpoint.require_same_architecture(read(three / "step_00000015"), Other())
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "reshaped: head.weight (4, 3) in the checkpoint, (5, 3) in the model" in message
    assert "missing: tail.weight (2, 2)" in message and "unexpected: head.bias (4,)" in message


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_a_run_passes_over_its_damaged_checkpoint(uninterrupted: Path, settings, here, caplog) -> None:
    config = settings()
    output = config.with_suffix("")
    shutil.copytree(uninterrupted, output)
    shutil.rmtree(output / "checkpoints" / "step_00000012")
    flip(output / "checkpoints" / "step_00000008" / "optimizer.safetensors")
    with caplog.at_level(logging.WARNING, "bevt_fast"):
        assert here(config, "--resume", "auto").code == 0
    assert any("step_00000008: optimizer.safetensors" in record.getMessage() for record in caplog.records)
    assert losses(output) == losses(uninterrupted)


@pytest.mark.parametrize("refusals", [1, 3])
def test_a_run_outlives_a_disk_that_is_full_for_a_while(refusals: int, settings, here, monkeypatch, caplog) -> None:
    config = settings({"train.steps": 4, "train.save_every": 1})
    output = config.with_suffix("")
    save_file, left = checkpoint.save_file, refusals

    def full(tensors, path, **options):
        nonlocal left
        if "step_00000001" not in str(path) and left:
            left -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    done = here(config)
    names = [path.name for path in checkpoint.commits(output / "checkpoints")]
    assert any("step 2 could not be written" in record.getMessage() for record in caplog.records)
    if refusals == 1:
        assert (done.code, names) == (0, ["step_00000001", "step_00000003", "step_00000004"])
    else:  # it stops rather than train for days without a checkpoint
        assert (done.code, names) == (4, ["step_00000001"])
        assert "No space left on device" in done.error


def test_resume_from_a_directory_into_a_new_output(uninterrupted: Path, settings, here) -> None:
    for name, place in (("run", uninterrupted), ("commits", uninterrupted / "checkpoints")):
        config = settings({"train.steps": 13}, output=name)
        assert here(config, "--resume", place).code == 0
        assert json.loads((config.with_suffix("") / "log.jsonl").read_text().splitlines()[0])["step"] == 12
    config = settings(output="commit")
    assert here(config, "--resume", uninterrupted / "checkpoints" / "step_00000004").code == 0
    assert losses(config.with_suffix("")) == losses(uninterrupted)[4:]
