"""export.py as users call it: the same bits under other names, the same logits out of other programs; hubconf.py."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from bevt_fast import export
from bevt_fast.models import official, torchvision_names
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import exported as exporting
from tests.models.oracles import randomise, torchvision_models
from tests.trained import CLASSES, DESCRIPTION, SHAPE, ask, classifier, error_of, exported

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("exported") / "model")


def same_bits(found: dict[str, torch.Tensor]) -> bool:
    expected = classifier().state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["k.pth", "k.safetensors"])
def test_official_names_and_back(model, tmp_path, capsys, name):
    file = tmp_path / name
    assert ask("--checkpoint", model, "--to", "official", "--out", file, program=export) == 0
    assert "the same bits when read back" in capsys.readouterr().out
    if name.endswith(".pth"):
        theirs = torch.load(file, weights_only=True)["state_dict"]
    else:
        theirs = load_file(file)
    assert "backbone.layers.2.blocks.1.attn.qkv.weight" in theirs and "cls_head.fc_cls.weight" in theirs
    assert same_bits(official.from_official(theirs))
    config = tmp_path / "model.json"
    config.write_text(json.dumps(DESCRIPTION))
    back = tmp_path / "back"
    arguments = ("--checkpoint", file, "--config", config, "--to", "safetensors", "--out", back)
    assert ask(*arguments, program=export) == 0
    assert same_bits(load_file(back / "model.safetensors"))
    described = json.loads((back / "config.json").read_text())
    assert described["classes"] == 3 and described["class_names"] == CLASSES
    assert described["clip"] == {"frames": 4, "stride": 2, "mode": "interval", "min_frames": 2}


def test_torchvision_has_our_logits_and_we_have_theirs(model, tmp_path, capsys):
    swin = torchvision_models().video.swin_transformer
    file = tmp_path / "swin3d.pth"
    assert ask("--checkpoint", model, "--to", "torchvision", "--out", file, program=export) == 0
    assert "torchvision's swin3d has the same logits: they differ by" in capsys.readouterr().out
    theirs = torch.load(file, weights_only=True)
    assert same_bits(torchvision_names.from_torchvision(theirs))
    other = swin.SwinTransformer3d([2, 4, 4], 8, [1, 1, 2, 1], [1, 2, 2, 4], [2, 3, 3], num_classes=3)
    assert {key: value.shape for key, value in other.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    assert all(
        torch.equal(value, other.state_dict()[key]) for key, value in theirs.items() if key.endswith("position_index")
    )
    # the other way: their own weights, moved, in our classifier
    randomise(other)
    ours = Classifier(SHAPE, classes=3).eval()
    ours.load_state_dict(torchvision_names.from_torchvision(other.state_dict()))
    pixels = torch.randn(2, 3, 8, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), other.eval()(pixels), atol=1e-5, rtol=1e-5)
    back = torchvision_names.to_torchvision(ours.state_dict(), SHAPE)
    assert all(torch.equal(back[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_every_size_of_torchvision_has_our_names_and_shapes(size):
    video = torchvision_models().video
    with torch.device("meta"):
        ours = Classifier(VideoSwinConfig.preset(size), classes=400)
        theirs = getattr(video, f"swin3d_{size[0]}")()
    moved = torchvision_names.from_torchvision(theirs.state_dict())
    assert {key: value.shape for key, value in moved.items()} == {k: v.shape for k, v in ours.state_dict().items()}


def test_other_logits_are_noticed(model, tmp_path, capsys, monkeypatch):
    torchvision_models()
    broken = torchvision_names.to_torchvision

    def transposed(weights, config):
        theirs = broken(weights, config)
        key = "features.0.0.attn.relative_position_bias_table"
        return theirs | {key: theirs[key].flip(0)}

    monkeypatch.setattr(torchvision_names, "to_torchvision", transposed)
    arguments = ("--checkpoint", model, "--to", "torchvision", "--out", tmp_path / "a.pth")
    assert ask(*arguments, program=export) == 4
    assert "does not read back as it was written" in error_of(capsys)
    ours = classifier()
    with pytest.raises(exporting.CheckpointError, match="torchvision's logits differ by"):
        exporting.compared_with_torchvision(ours, transposed(ours.state_dict(), SHAPE), SHAPE)


def test_without_torchvision_one_sentence(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.video.swin_transformer", None)
    arguments = ("--checkpoint", model, "--to", "torchvision", "--out", tmp_path / "a.pth")
    assert ask(*arguments, program=export) == 0
    assert "logits are not compared with torchvision's" in capsys.readouterr().out


def test_a_program_of_torch_export_computes_the_same(model, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert ask("--checkpoint", model, "--to", "torch_export", "--out", file, program=export) == 0
    assert "for clips (N, 3, 4, 32, 32): its logits differ from ours by" in capsys.readouterr().out
    program = torch.export.load(file).module()
    for count in (1, 4):
        pixels = torch.randn(count, 3, 4, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(program(pixels), classifier()(pixels), atol=1e-5, rtol=1e-5)


def test_onnx_computes_the_same(model, tmp_path, capsys):
    file = tmp_path / "model.onnx"
    assert ask("--checkpoint", model, "--to", "onnx", "--out", file, program=export) == 0
    said = capsys.readouterr()
    assert "for clips (N, 3, 4, 32, 32): its logits differ from ours by" in said.out and "Warning" not in said.err
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (1, 4):
        pixels = torch.randn(count, 3, 4, 32, 32)
        found = torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, classifier()(pixels), atol=1e-5, rtol=1e-5)


def test_without_onnx_it_says_what_it_needs(model, tmp_path, capsys, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    assert ask("--checkpoint", model, "--to", "onnx", "--out", tmp_path / "model.onnx", program=export) == 6
    assert (
        "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err and not (tmp_path / "model.onnx").exists()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--to", "torchvison", "--out", "x"], 2, "did you mean 'torchvision'"),
        (["--to", "keras", "--out", "x"], 2, "there are: safetensors, official, torchvision, torch_export, onnx"),
        (["--to", "official", "--out", "x.txt"], 2, "ends in .pth or .pt or .safetensors"),
        (["--to", "safetensors", "--out", "x.safetensors"], 2, "name a folder"),
        (["--to", "safetensors", "--out", "{model}"], 2, "is there already"),
        (["--to", "torch_export", "--out", "{model}/x.pt2", "--frames", "0"], 2, "1 or more frames"),
        (["--to", "official", "--out", "{model}/config.json/x.pth"], 6, "cannot write"),
        (["--to", "official", "--out", "{model}/x.pth", "--config", "{model}/none.json"], 2, "none.json"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(model, capsys, arguments, code, sentence):
    filled = [argument.format(model=model) for argument in arguments]
    assert ask("--checkpoint", model, *filled, program=export) == code
    assert sentence in error_of(capsys)


def test_hub_entry_points_build_from_our_files(model):
    def from_hub(name: str, **options: Any) -> Any:
        return torch.hub.load(str(ROOT), name, source="local", **options)

    pixels = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(from_hub("bevt_classifier", checkpoint=str(model))(pixels), classifier()(pixels))
        assert torch.equal(from_hub("bevt_encoder", checkpoint=str(model))(pixels), classifier().encoder(pixels))
    with torch.device("meta"):
        random = from_hub("bevt_classifier", size="tiny", classes=7)
    assert random.class_head.out_features == 7 and not random.training
