"""Whatever a user gets wrong: the right exit code, and one sentence that names the thing and the remedy."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.training.command import rows


def videos(root: Path, **options: Any) -> dict[str, Any]:
    return {"clips.source": {"name": "file_list", "options": {"root": str(root), "frames": 4, "stride": 2} | options}}


def is_one_sentence(finished, code: int, *words: str) -> None:
    """The exit code, a single line on stderr, and these words in it."""
    assert finished.code == code, finished.error
    assert finished.error.startswith("error: ") and finished.error.count("\n") == 1, finished.error
    for word in words:
        assert word in finished.error


# -- through a program of its own ------------------------------------------------------------------------------------


def blocking(folder: Path, *modules: str) -> dict[str, str]:
    """An environment in which these modules cannot be imported and no GPU is seen."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {modules!r} or name in {modules!r}:\n"
        "            raise ImportError(f'{name} is not installed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    return {"PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""}


def test_a_wrong_key_is_refused_before_anything_is_imported(program, settings, tmp_path: Path) -> None:
    config = settings({"clips.source": None, "clips.sorce": {"name": "file_list"}})
    environment = blocking(tmp_path / "site", "torch", "deepspeed", "nvidia", "cv2", "av")
    done = program("bevt_fast/train.py", "--config", config, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "'sorce'; did you mean 'source'?" in done.stderr
    # the same program, asked for help
    done = program("bevt_fast/train.py", "--help", env=environment)
    assert done.returncode == 0 and "--resume" in done.stdout and not done.stderr
    done = program("bevt_fast/train.py", "--version", env=environment)
    assert done.returncode == 0 and not done.stderr


def test_a_dry_run_needs_no_deepspeed_no_dali_and_no_gpu(program, settings, tmp_path: Path) -> None:
    environment = blocking(tmp_path / "site", "deepspeed", "nvidia.dali")
    done = program("bevt_fast/train.py", "--config", settings(), "--dry-run", env=environment)
    assert done.returncode == 0, done.stderr
    for said in (
        "images.pixels: (2, 3, 64, 64)",
        "clips.pixels: (2, 3, 4, 64, 64)",
        "clips.mask: (2, 2, 4, 4) bool",
        "48 files of moving_shapes",
        "tokenizer patch_kmeans: 32 ids",
        "arameters",
    ):
        assert said in done.stdout
    assert not (tmp_path / "run").exists()  # it has written nothing
    refused = program("-c", "import deepspeed", env=environment)
    assert refused.returncode and "not installed here" in refused.stderr


def test_a_missing_folder_is_one_sentence_of_a_real_program(program, settings, tmp_path: Path) -> None:
    done = program("bevt_fast/train.py", "--config", settings(videos(tmp_path / "nowhere")))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and str(tmp_path / "nowhere") in done.stderr


# -- the command line and the configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.stepps": 3}, ["train", "'stepps'", "'steps'"]),
        ({"optim.lr": "fast"}, ["optim: lr", "'fast'"]),
        ({"train.precision": "int8"}, ["precision", "'int8'", "bf16"]),
        ({"clips.micro_batch": 3}, ["clips.batch / (clips.micro_batch * processes) = 4 / (3 * 1)"]),
        ({"clips.micro_batch": 4}, ["= 4 / (4 * 1) = 1", "= 4 / (2 * 1) = 2"]),
        ({"clips.source": {"name": "file_lst"}}, ["'file_lst'", "file_list"]),
        ({"clips.mask": {"name": "tube", "options": {"ratoi": 0.5}}}, ["'ratoi'", "'ratio'"]),
        ({"tokenizer": {"name": "dali"}}, ["'dali'", "dalle"]),
        ({"deepspeed": {"train_batch_size": 8}}, ["train_batch_size", "clips.batch"]),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, ["deepspeed", "stage", "0, 1, 2", "7"]),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "big"}}},
            ["deepspeed", "reduce_bucket_size", "big"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_configuration(changes: dict[str, Any], words: list[str], settings, here) -> None:
    done = here(settings(changes))
    is_one_sentence(done, 2, *words)


def test_no_file_or_no_json(tmp_path: Path, settings, here) -> None:
    config = settings()
    is_one_sentence(here(tmp_path / "rum.json"), 2, "rum.json", str(config))
    config.write_text('{"output": "x",\n"train": }')
    is_one_sentence(here(config), 2, "run.json:2", "JSON")


def test_an_option_that_does_not_exist(settings, here) -> None:
    done = here(settings(), "--resum", "auto")
    assert done.code == 2 and "--resum" in done.error


def test_an_output_that_cannot_be_written(settings, here, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "run"
    is_one_sentence(here(settings({"output": str(output)})), 2, str(output), "output")


# -- data ------------------------------------------------------------------------------------------------------------


def test_folders_and_lists(settings, here, tmp_path: Path) -> None:
    is_one_sentence(here(settings(videos(tmp_path / "nowhere"))), 3, str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    is_one_sentence(here(settings(videos(empty))), 3, str(empty), "no clips")
    (empty / "list.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 one\n")
    is_one_sentence(here(settings(videos(empty, list="list.txt"))), 3, "list.txt:3", "'one'")
    (empty / "list.txt").write_text("a.mp4 0\nb.mp4 1\n")
    is_one_sentence(here(settings(videos(empty, list="list.txt"))), 3, "2 of 2", "a.mp4, b.mp4", str(empty))
    is_one_sentence(here(settings(videos(empty, list="lst.txt"))), 3, "lst.txt")


def test_tokenizer_weights(settings, here, tmp_path: Path, tiny) -> None:
    """Missing, cut short, a web page, of another vocabulary, of something else."""
    weights = tmp_path / "encoder.safetensors"

    def refused(*words: str, name: str = "dalle", **options: Any) -> None:
        part = {"name": name, "options": {"weights": str(weights)} | options}
        is_one_sentence(here(settings({"tokenizer": part})), 3, str(weights), *words)

    refused("https://")
    refused("prepare.py", name="patch_kmeans")
    good = Path(tiny["tokenizer"]["options"]["weights"]).read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    refused()
    refused("not a whole safetensors file", name="patch_kmeans")
    weights.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    refused("text page")
    refused(name="patch_kmeans")
    weights.write_bytes(b"")
    refused("empty")
    weights.write_bytes(good)
    refused("32", "64", "vocab_size", name="patch_kmeans", vocab_size=64)
    refused("does not hold DALL-E's encoder")
    save_file({"x": torch.zeros(3)}, weights)
    refused(name="patch_kmeans")


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_resuming_what_does_not_fit(uninterrupted: Path, settings, here, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    is_one_sentence(here(settings(), "--resume", nowhere), 4, str(nowhere))
    nowhere.mkdir()
    is_one_sentence(here(settings(), "--resume", nowhere), 4, str(nowhere), "no checkpoint")
    step = uninterrupted / "checkpoints" / "step_00000004"

    done = here(settings({"model.window": [2, 4, 4]}), "--resume", step)
    assert done.code == 4 and done.error.startswith("error: ") and "Traceback" not in done.error
    # (2 * 2 - 1) * (2 * 4 - 1)^2 rows instead of 3 * 3^2, a column a head
    assert "reshaped" in done.error and "(27, 1) in the checkpoint, (147, 1) in the model" in done.error
    assert done.error.count("relative_position_bias_table") == 4

    done = here(settings({"images": None}), "--resume", step)
    assert done.code == 4  # the list of images is not there any more, nor their decoder
    assert "unexpected: image_decoder.fuse.weight" in done.error

    shorter = here(settings({"images.source.options.split": "test"}), "--resume", step)
    is_one_sentence(shorter, 4, "images", "48", "24", "model.weights")


def test_initial_weights_that_are_not_there(settings, here, tmp_path: Path) -> None:
    is_one_sentence(here(settings({"model.weights": str(tmp_path / "w")})), 4, str(tmp_path / "w"), "model.weights")


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_after_a_while(settings, here, caplog) -> None:
    config = settings({"optim.lr": 1e30, "optim.warmup_steps": 0, "train.max_bad_steps": 3, "train.steps": 50})
    with caplog.at_level(logging.WARNING, "bevt_fast"):
        done = here(config)
    assert "Traceback" not in done.error
    last = done._replace(error=done.error.splitlines()[-1] + "\n")  # the lines before are the steps
    is_one_sentence(last, 5, "3 steps in a row", "optim.lr", "--resume auto")
    logged = rows(config.with_suffix(""))
    bad = [row["step"] for row in logged if row["train/grad_norm"] is None]
    assert 2 <= len(bad) <= 3 and bad == list(range(bad[0], bad[0] + len(bad)))
    assert sum("is not finite" in record.getMessage() for record in caplog.records) == 3


@pytest.mark.parametrize("stage", [0, 1])
def test_one_bad_batch_is_skipped_counted_and_forgotten(stage: int, settings, here, monkeypatch) -> None:
    from bevt_fast.training.run import Run

    micro_batches = Run.micro_batches

    def spoilt(run: Run, step: int):
        for place, (batch, hidden) in enumerate(micro_batches(run, step)):
            if step in (2, 5) and place == 1 and batch.clips:
                batch.clips.pixels[0, 0, 0, 0, 0] = float("nan")
            yield batch, hidden

    monkeypatch.setattr(Run, "micro_batches", spoilt)
    config = settings({"deepspeed.zero_optimization.stage": stage, "train.steps": 8, "train.max_bad_steps": 2})
    assert here(config).code == 0
    logged = rows(config.with_suffix(""))
    assert [row["train/skipped_steps"] for row in logged] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [row["train/loss"] is None for row in logged] == [step in (2, 5) for step in range(8)]
    trainer = json.loads((config.with_suffix("") / "checkpoints" / "step_00000008" / "trainer.json").read_text())
    assert (trainer["skipped"], trainer["bad_in_a_row"], trainer["adam_step"]) == (2, 0, 6)
