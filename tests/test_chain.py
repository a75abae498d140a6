"""The whole way from the command line, as a user goes it: pretrain, fine-tune or probe, evaluate, export, load it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bevt_fast import export
from bevt_fast.training.run import Run
from tests.trained import ask, error_of
from tests.training.command import FINETUNE, ROOT, TRAIN, alone, environment, train_here, written
from tests.training.test_distributed import free_ports

TEST_CLIPS = 9  # not the same number for two processes
SHAPES = {"clips": 16, "images": 16, "test_clips": TEST_CLIPS, "test_images": 8, "size": 64, "length": 8, "objects": 2}
MODEL = {"size": {"embed_dim": 16, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]}, "window": [2, 2, 2]}


def run(program: Path, values: dict[str, Any], place: Path) -> Path:
    """Train, and return the output."""
    with alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", lambda run: run.save(run.last_step))  # pretraining's pictures are slow
        config = written(values | {"output": str(place)}, place.with_suffix(".json"))
        assert train_here("--config", config, program=program) == 0
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pretrained`, two steps of the demo on small data."""
    place = tmp_path_factory.mktemp("chain")
    values = json.loads((ROOT / "configs" / "demo.json").read_text())
    for name, frames in (("clips", {"frames": 4}), ("images", {})):
        for key in ("source", "heldout"):
            values[name][key]["options"] |= SHAPES | frames | {"root": str(place / "shapes")}
        values[name]["mask"]["options"]["min_block"] = 1
        values[name] |= {"batch": 4, "micro_batch": 4, "view": {"size": 64, "short_side": [64, 64]}}
    values["tokenizer"]["options"] |= {"weights": str(place / "tokens.safetensors"), "vocab_size": 32}
    values["model"] |= MODEL
    values["train"] = {"steps": 2, "precision": "fp32", "threads": 1}
    values["optim"]["warmup_steps"] = 1
    values["data"] = {"workers": 0}
    run(TRAIN, values, place / "pretrained")
    return place


def finetuned(place: Path, mode: str, pretrained: Path | None = None, output: Path | None = None) -> Path:
    """Two epochs from `pretrained` in one of the modes; made once."""
    output = output or place / mode
    if not output.exists():
        options = SHAPES | {"root": str(place / "shapes"), "frames": 4, "label": "motion"}
        parts = {"source": options, "heldout": options | {"split": "test"}}
        data: dict[str, Any] = {key: {"name": "moving_shapes", "options": part} for key, part in parts.items()}
        values: dict[str, Any] = {"data": data | {"batch": 8, "micro_batch": 8, "workers": 0}}
        values["views"] = {"size": 64, "short_side": 64, "flip": 0.0}
        values["model"] = MODEL | {"classes": 8, "pretrained": str(pretrained or place / "pretrained")}
        values["optim"] = {"lr": 1e-3, "warmup_steps": 1}
        values["train"] = {"mode": mode, "epochs": 2, "precision": "fp32", "validate_every": 1, "threads": 1}
        several = {"clips": 2, "crops": 3} if mode == "finetune" else {"clips": 1, "crops": 1}
        values["test"] = several | {"size": 64, "short_side": 64}
        run(FINETUNE, values, output)
    return output


def results(place: Path) -> dict[str, Any]:
    return json.loads((place / "results.json").read_text())


def asked(place: Path, mode: str, views: int, tmp_path: Path) -> dict[str, Any]:
    """Evaluate, predict, extract; export and evaluate that. Returns the numbers of the run itself."""
    model = ("--checkpoint", finetuned(place, mode))
    assert ask(*model, "--out", tmp_path / "here") == 0
    found = results(tmp_path / "here")
    assert found["scored"] == TEST_CLIPS and found["views"]["clips"] * found["views"]["crops"] == views
    folder = place / "shapes" / "clips" / "test"
    assert ask("extract", *model, folder / "00000.webm", "--out", tmp_path / "features.npz") == 0
    assert np.load(tmp_path / "features.npz")["features"].shape == (1, 128)
    said = predictions(folder, tmp_path / "said.json", *model)
    assert len(said) == TEST_CLIPS and said[0]["classes"][0]["name"] and len(said[0]["classes"]) == 8
    assert ask(*model, "--to", "safetensors", "--out", tmp_path / "exported", program=export) == 0
    assert predictions(folder, tmp_path / "again.json", "--checkpoint", tmp_path / "exported") == said
    return found


def predictions(videos: Path, out: Path, *model: str | Path) -> list[dict[str, Any]]:
    """The probability of every class of each video, every digit."""
    assert ask("predict", *model, videos, "--out", out, "--top", "8") == 0
    return json.loads(out.read_text())["videos"]


@pytest.mark.parametrize("mode", ["linear", "attentive", "knn"])
def test_probes_are_evaluated_asked_and_exported(place, mode, tmp_path, capsys):
    found = asked(place, mode, 1, tmp_path)
    # the views are those of validation, so the numbers are those of the end of training
    rows = [json.loads(line) for line in (place / mode / "log.jsonl").read_text().splitlines()]
    (*_, last) = [row for row in rows if "val/top1" in row]
    measured = (found["top1"], found["top5"], found["mean_class_accuracy"])
    assert measured == (last["val/top1"], last["val/top5"], last["val/mean_class_acc"])
    if mode == "linear":
        return
    model = ("--checkpoint", finetuned(place, mode))
    assert ask(*model, "--to", "torch_export", "--out", tmp_path / "a.pt2", program=export) == 0
    for form in ("official", "torchvision"):
        assert ask(*model, "--to", form, "--out", tmp_path / "a.pth", program=export) == 4
        assert "which only our own names know" in error_of(capsys)


def test_a_classifier_goes_the_whole_way(place, tmp_path, capsys):
    asked(place, "finetune", 6, tmp_path)
    model = ("--checkpoint", place / "finetune")
    shape = tmp_path / "shape.json"
    shape.write_text((place / "finetune" / "config.json").read_text())
    folder = place / "shapes" / "clips" / "test"
    for form, name in (("official", "official.pth"), ("torchvision", "swin3d.pth")):
        file = tmp_path / form / name
        assert ask(*model, "--to", form, "--out", file, program=export) == 0
        said = predictions(folder, tmp_path / f"{form}.json", "--checkpoint", file, "--config", shape)
        assert said == json.loads((tmp_path / "said.json").read_text())["videos"]
    assert ask(*model, "--to", "onnx", "--out", tmp_path / "model.onnx", program=export) == 0
    # and begin again from what was exported
    assert finetuned(place, "linear", pretrained=tmp_path / "exported", output=tmp_path / "onwards").exists()
    two_processes_have_the_numbers_of(place / "finetune", tmp_path / "here", tmp_path / "two")


def two_processes_have_the_numbers_of(model: Path, one: Path, two: Path) -> None:
    """As torchrun starts them, without the third process that it is itself."""
    (port,) = free_ports(1)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / "bevt_fast" / "evaluate.py"), "--checkpoint", str(model), "--out", str(two)]
    started = []
    for rank in ("0", "1"):
        place = environment(RANK=rank, LOCAL_RANK=rank, **common)
        started.append(subprocess.Popen([*command, "--workers", "0"], env=place, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors[0][-3000:]
    for name in ("results.json", "per_class.csv", "bad.jsonl"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
