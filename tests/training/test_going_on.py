"""What a run goes on from: the checkpoints of another place in time, other targets, the weights of an earlier stage."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bevt_fast.models import official
from bevt_fast.training import checkpoint
from tests.training.command import losses


@pytest.fixture
def copied(uninterrupted: Path, tmp_path: Path) -> Path:
    """The finished tiny run, to be gone on from under the output `run`."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_going_on_from_an_earlier_step_keeps_the_later_ones_aside(copied: Path, settings, here, caplog) -> None:
    expected = losses(copied)
    damage(copied / "checkpoints" / "step_00000012" / "model.safetensors")
    assert here(settings(), "--resume", "auto").code == 0
    assert losses(copied) == expected
    assert (copied / "checkpoints" / "step_00000012.aside").is_dir()
    assert "set aside" in caplog.text
    found = checkpoint.newest_valid(copied / "checkpoints")
    assert found and found.step == 12


def test_going_on_beyond_the_end_is_refused(copied: Path, settings, here) -> None:
    done = here(settings({"train.steps": 6}), "--resume", "auto")
    assert done.code == 2 and "Traceback" not in done.error
    assert "6" in done.error and "12" in done.error
    found = checkpoint.newest_valid(copied / "checkpoints")
    assert found and found.step == 12


def test_another_tokenizer_of_the_same_size_is_refused(copied: Path, settings, here, tiny, tmp_path: Path) -> None:
    from bevt_fast.tokenizers import patch_kmeans

    own = patch_kmeans.load(tiny["tokenizer"]["options"]["weights"])
    patch_kmeans.PatchKMeans(own.centroids.flip(0), "another order").save(tmp_path / "other.safetensors")
    done = here(settings({"tokenizer.options.weights": str(tmp_path / "other.safetensors")}), "--resume", "auto")
    assert done.code == 4 and "tokenizer" in done.error


def test_another_list_is_refused(copied: Path, settings, here) -> None:
    trainer = copied / "checkpoints" / "step_00000012" / "trainer.json"
    values = json.loads(trainer.read_text())
    values["data"]["clips"]["sha256"] = "0" * 64
    trainer.write_text(json.dumps(values))
    manifest = copied / "checkpoints" / "step_00000012" / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"trainer.json": checkpoint._digest(trainer)}))
    done = here(settings(), "--resume", "auto")
    assert done.code == 4 and "list of clips" in done.error


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(settings, here, monkeypatch, tmp_path: Path) -> None:
    def full(*arguments: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    done = here(settings({"train.steps": 2, "train.save_every": 100}), ending=True)
    assert done.code == 4 and "could not be written" in done.error


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"clips.heldout.options.root": "nowhere", "clips.heldout.name": "kinetics400"}, 3, "nowhere"),
        ({"clips.source.options.frames": 3}, 2, "frames"),
        ({"clips.source.options.kind": "images"}, 2, "clips"),
        ({"images.view": {"size": 48, "short_side": [48, 48]}}, 2, "multiple of 32"),
    ],
)
def test_refused_before_the_first_step(changes: dict, code: int, words: str, settings: Callable, here) -> None:
    if "clips.heldout.name" in changes:
        changes = changes | {"clips.heldout.options": {"root": "nowhere"}}
        del changes["clips.heldout.options.root"]
    done = here(settings(changes))
    assert done.code == code and words in done.error
    assert "Traceback" not in done.error and "step 1/" not in done.error


def test_stage_one_starts_the_joint_stage(settings, here, tmp_path: Path) -> None:
    """SPEC 5.4: the stem spread over the frames of a patch, one table for every temporal offset, no classifier."""
    assert here(settings({"clips": None, "train.steps": 2}, output="stage_one")).code == 0
    stage_one = load_file(tmp_path / "stage_one" / "checkpoints" / "step_00000002" / "model.safetensors")
    # at rate 0 and without decay the weights saved are the weights begun with
    changes = {"model.weights": str(tmp_path / "stage_one"), "train.steps": 1, "optim.lr": 1e-30}
    assert here(settings(changes, output="joint")).code == 0
    joint = load_file(tmp_path / "joint" / "checkpoints" / "step_00000001" / "model.safetensors")
    stem = stage_one["image_stem.projection.weight"]
    assert joint["encoder.stem.projection.weight"].equal(stem[:, :, None].repeat(1, 1, 2, 1, 1) / 2)
    assert joint["image_stem.projection.weight"].equal(stem)
    name = "encoder.stage.0.blocks.0.attention.relative_position_bias_table"
    table = stage_one[name].unflatten(0, (3, 9))[1]
    assert joint[name].equal(table.repeat(3, 1))
    assert not joint["head.weight"].equal(stage_one["head.weight"])


def test_official_names_start_a_run_and_damaged_weights_do_not(copied: Path, settings, here, tmp_path: Path) -> None:
    import torch

    ours = load_file(copied / "checkpoints" / "step_00000012" / "model.safetensors")
    torch.save({"state_dict": official.to_official(ours)}, tmp_path / "official.pth")
    changes = {"model.weights": str(tmp_path / "official.pth"), "train.steps": 1, "optim.lr": 1e-30}
    assert here(settings(changes, output="from_official")).code == 0
    begun = load_file(tmp_path / "from_official" / "checkpoints" / "step_00000001" / "model.safetensors")
    assert begun.keys() == ours.keys() and all(begun[key].equal(ours[key]) for key in ours)

    for commit in checkpoint.commits(copied / "checkpoints"):
        damage(commit / "model.safetensors")
    done = here(settings({"model.weights": str(copied)}, output="from_damaged"))
    assert done.code == 4 and "Traceback" not in done.error
