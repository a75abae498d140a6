"""evaluate.py as users call it: numbers, tables, predictions, features, and what it says to bad input."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from bevt_fast import evaluate
from bevt_fast.config import Part
from bevt_fast.data import sources
from bevt_fast.data.views import ViewReader, Views
from bevt_fast.models import official, torchvision_names
from bevt_fast.training import answers, checkpoint, scoring
from bevt_fast.training.distributed import World
from tests.trained import CLASSES, DESCRIPTION, SIZE, WINDOW, ask, classifier, error_of, exported, videos

ALONE = World(0, 0, 1, torch.device("cpu"))
VIEWS = Views(crops=3, size=32, short_side=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """`model`, an exported classifier, and `videos`."""
    root = tmp_path_factory.mktemp("evaluated")
    exported(root / "model")
    videos(root / "videos")
    return root


@pytest.fixture(scope="module")
def source(place: Path):
    return sources.build(
        Part(
            name="file_list",
            options={"root": str(place / "videos"), "list": "list.txt", "frames": 4, "stride": 2},
        )
    )


@pytest.fixture(scope="module")
def expected(source) -> scoring.Scores:
    return scoring.score(classifier(), source, VIEWS, ALONE, workers=0)


def test_an_evaluation_leaves_numbers_tables_and_a_picture(place, expected, tmp_path, capsys):
    code = ask("--checkpoint", place / "model", "--data", place / "videos" / "list.txt", "--out", tmp_path / "out")
    assert code == 0
    said = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["top1"] == scoring.top_k(expected, 1) and results["top5"] == 1
    assert results["mean_class_accuracy"] == scoring.mean_class_accuracy(expected)
    assert (results["videos"], results["scored"], results["bad"]) == (7, 6, 1)
    assert results["views"] == {"clips": 1, "crops": 3, "size": 32, "short_side": 32}
    assert f"top-1 {results['top1']:.2%}" in said.out and "which were not scored: 1" in said.out
    assert "not scored: " in said.err and "3.mp4" in said.err
    rows = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    assert [row["name"] for row in rows] == CLASSES
    assert [int(row["samples"]) for row in rows] == [2, 2, 2]
    assert sum(int(row["right"]) for row in rows) == round(6 * results["top1"])
    assert (tmp_path / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    (bad,) = map(json.loads, (tmp_path / "out" / "bad.jsonl").read_text().splitlines())
    assert bad["path"].endswith("3.mp4")


def test_the_temporal_table_is_the_papers(place, source, tmp_path, capsys):
    arguments = ("--checkpoint", place / "model", "--data", place / "videos", "--temporal", "--seed", "5")
    assert ask(*arguments, "--out", tmp_path) == 0
    table = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    for temporal in ("single_frame", "shuffled"):
        scores = scoring.score(classifier(), source, VIEWS, ALONE, temporal=temporal, seed=5, workers=0)
        assert results["temporal"][temporal]["top1"] == scoring.top_k(scores, 1)
        assert results["drops"][temporal] == results["top1"] - scoring.top_k(scores, 1)
    assert all(title in table for title in ("normal", "single frame", "random shuffling", "drop"))


def test_without_matplotlib_one_sentence(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ask("--checkpoint", place / "model", "--data", place / "videos", "--out", tmp_path) == 0
    assert "confusion.png is not drawn: matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "per_class.csv").exists()


@pytest.mark.parametrize("form", ["ours.safetensors", "official.pth", "torchvision.pth"])
def test_a_bare_file_needs_to_be_told_what_it_is(place, tmp_path, expected, form, capsys):
    ours = classifier().state_dict()
    names = {"ours": lambda w: w, "official": official.to_official}
    convert = names.get(form.split(".")[0], lambda w: torchvision_names.to_torchvision(w, classifier().encoder.config))
    file = tmp_path / "alone" / form
    file.parent.mkdir()
    save = save_file if form.endswith("safetensors") else torch.save
    save(convert(ours), file)
    assert ask("--checkpoint", file, "--data", place / "videos") == 2
    assert "give --config FILE, or --size with --window and --classes" in error_of(capsys)
    config = tmp_path / "model.json"
    config.write_text(json.dumps(DESCRIPTION))
    out = tmp_path / "out"
    assert ask("--checkpoint", file, "--config", config, "--data", place / "videos", "--out", out) == 0
    assert json.loads((out / "results.json").read_text())["top1"] == scoring.top_k(expected, 1)


def test_predictions_for_a_video_a_folder_and_a_list(place, expected, tmp_path, capsys):
    model, folder = ("--checkpoint", place / "model"), place / "videos"
    assert ask("predict", *model, folder / "down" / "0.mp4") == 0
    shown = capsys.readouterr().out
    best = int(expected.probabilities[0].argmax())
    assert CLASSES[best] in shown.splitlines()[1] and f"{float(expected.probabilities[0].max()):.2%}" in shown
    assert ask("predict", *model, folder, "--out", tmp_path / "all.json", "--top", "2") == 0
    found = json.loads((tmp_path / "all.json").read_text())
    assert len(found["videos"]) == 6 and len(found["bad"]) == 1
    assert all(len(row["classes"]) == 2 for row in found["videos"])
    assert ask("predict", *model, folder / "list.txt", "--out", tmp_path / "all.csv", "--top", "9") == 0
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert len(rows) == 6 * 3 and rows[0]["name"] == CLASSES[best] and rows[0]["rank"] == "1"
    assert float(rows[0]["probability"]) == pytest.approx(float(expected.probabilities[0].max()), abs=1e-6)


def test_features_are_what_the_head_sees(place, source, tmp_path):
    arguments = ("extract", "--checkpoint", place / "model", place / "videos" / "list.txt")
    assert ask(*arguments, "--out", tmp_path / "a.npz") == 0
    found = np.load(tmp_path / "a.npz")  # refuses pickles
    assert found["features"].shape == (6, 64) and found["labels"].tolist() == [0, 1, 2, 1, 2, 0]
    assert found["paths"][0].endswith("0.mp4")
    model = classifier()
    logits = torch.from_numpy(found["features"]) @ model.class_head.weight.T + model.class_head.bias
    from bevt_fast.data.pipeline_reference import normalise

    pixels = normalise(ViewReader(source, VIEWS)[0]["pixels"], channels=-4)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(pixels).mean(0), atol=1e-4, rtol=1e-4)
        stages = answers.features(model.encoder, pixels, "all").mean(0)
    assert ask(*arguments, "--out", tmp_path / "b.parquet", "--stage", "2") == 0
    table = parquet.read_table(tmp_path / "b.parquet")
    assert table["label"].to_pylist() == [0, 1, 2, 1, 2, 0]
    second = torch.tensor(table["features"].to_pylist()[0])
    torch.testing.assert_close(second, stages[8:24], atol=1e-4, rtol=1e-4)


def run_directory(place: Path, folder: Path) -> Path:
    """A fine-tuned run as finetune.py leaves it, whose test data are the videos of `folder`."""
    data = {"name": "file_list", "options": {"root": str(folder), "list": "list.txt", "frames": 4, "stride": 2}}
    values = {
        "output": str(place),
        "data": {"source": data, "heldout": data, "batch": 2, "micro_batch": 2},
        "model": {"size": SIZE, "window": WINDOW, "classes": 3},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2, "precision": "fp32"},
        "test": {"clips": 1, "crops": 3, "size": 32, "short_side": 32},
    }
    weights = classifier().state_dict()
    for step in (1, 2):
        later = {name: value * (step - 1) for name, value in weights.items()}
        checkpoint.write(place / "checkpoints", step, iter(later.items()), iter(()), {}, json.dumps(values), 2)
    (place / "config.json").write_text(json.dumps(values))
    return place


def test_a_fine_tuned_run_says_everything_itself(place, expected, tmp_path, capsys):
    pytest.importorskip("bevt_fast.finetune_config")
    run = run_directory(tmp_path / "run", place / "videos")
    assert ask("--checkpoint", run) == 0
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["checkpoint"].endswith("step_00000002") and results["top1"] == scoring.top_k(expected, 1)
    assert ask("--checkpoint", run / "checkpoints" / "step_00000001", "--out", tmp_path / "first") == 0
    first = json.loads((tmp_path / "first" / "results.json").read_text())
    assert first["top1"] == 2 / 6  # all weights are zero: all classes are equal, and the first is said
    capsys.readouterr()
    (run / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"damaged")
    assert ask("--checkpoint", run / "checkpoints" / "step_00000002") == 4
    assert "does not match its digest" in error_of(capsys)


LIST = "{place}/videos/list.txt"


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--checkpoint", "{place}/nowhere", "--data", LIST], 4, "there is no checkpoint at"),
        (["--checkpoint", "{place}/videos", "--data", LIST], 4, "holds no checkpoint"),
        (["--checkpoint", "{place}/videos/down/0.mp4", "--size", "tiny", "--data", LIST], 4, "damaged"),
        (["--checkpoint", "{place}/model"], 3, "names no test data; give --data"),
        (["--checkpoint", "{place}/model", "--data", "{place}/no.txt"], 3, "there is nothing at"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--source", "{}"], 2, "give one of them"),
        (["--checkpoint", "{place}/model", "--source", "{"], 2, "not valid JSON"),
        (["--checkpoint", "{place}/model", "--source", '{{"name": "kinetics"}}'], 2, "did you mean 'kinetics400'"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--size", "huge"], 2, "size"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--size", "tiny"], 4, "is 8 wide with (1, 1, 2, 1) blocks"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--window", "4,3,3"], 4, "set the window to 2,3,3"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--window", "4,3"], 2, "expected three whole numbers"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--classes", "9"], 4, "tells 3 classes apart, not 9"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--mode", "uniform", "--clips", "4"], 2, "not 4"),
        (["--checkpoint", "{place}/model", "--data", LIST, "--frames", "5"], 2, "multiple of 2"),
        (["predict", "--checkpoint", "{place}/model", "{place}/model/config.json"], 3, "config.json"),
        (["predict", "--checkpoint", "{place}/model", "{place}/videos/down/3.mp4"], 3, "none of the 1 videos"),
        (["predict", "--checkpoint", "{place}/model", LIST, "--out", "x.pkl"], 2, "ends in .json or .csv"),
        (["extract", "--checkpoint", "{place}/model", LIST, "--out", "x.pt"], 2, "ends in .npz or .parquet"),
    ],
)
def test_bad_input_is_answered_with_one_sentence(place, capsys, arguments, code, sentence):
    filled = [a.format(place=place) if "{place}" in a or "{{" in a else a for a in arguments]
    assert ask(*filled) == code
    assert sentence in error_of(capsys)


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("down/0.mp4 0\nleft/1.mp4 3\n", "other.txt:2: expected a label below 3, the number of classes, got 3"),
        ("down/0.mp4 0\nleft/1.mp4 -1\n", "other.txt:2: expected a label of at least 0, got -1"),
        ("down/0.mp4\nleft/1.mp4\n", "has no labels to score against"),
        ("gone/0.mp4 0\ngone/1.mp4 1\n", "2 of 2 files looked for"),
        ("down/3.mp4 0\n", "none of the 1 videos"),
    ],
)
def test_lists_that_do_not_belong_to_the_checkpoint(place, capsys, lines, sentence):
    file = place / "videos" / "other.txt"
    file.write_text(lines)
    assert ask("--checkpoint", place / "model", "--data", file) == 3
    assert sentence in error_of(capsys)


def test_classes_of_another_dataset_or_order(place, tmp_path, capsys):
    renamed = exported(tmp_path / "renamed", class_names=["up", "left", "down"])
    assert ask("--checkpoint", renamed, "--data", place / "videos") == 3
    assert "class 0 is 'up' for the checkpoint but 'down'" in error_of(capsys)
    two = tmp_path / "two"
    for name in ("down", "left"):
        (two / name).mkdir(parents=True)
        (two / name / "1.mp4").write_bytes((place / "videos" / "left" / "1.mp4").read_bytes())
    assert ask("--checkpoint", place / "model", "--data", two) == 3
    assert "tells 3 classes apart but the source 'file_list' has 2" in error_of(capsys)


def test_weights_of_another_patch_and_of_pretraining(place, tmp_path, capsys):
    weights = classifier().state_dict()
    stem = "encoder.stem.projection.weight"
    config = tmp_path / "config.json"
    config.write_text(json.dumps(DESCRIPTION))
    data = ("--data", place / "videos")
    save_file(weights | {stem: weights[stem].repeat(1, 1, 2, 1, 1)}, tmp_path / "patch.safetensors")
    assert ask("--checkpoint", tmp_path / "patch.safetensors", *data) == 4
    assert "joins patches of 4 x 4 x 4 pixels, the model (2, 4, 4)" in error_of(capsys)
    headless = {name: value for name, value in weights.items() if not name.startswith("class_head")}
    save_file(headless, tmp_path / "encoder.safetensors")
    assert ask("--checkpoint", tmp_path / "encoder.safetensors", *data) == 4
    assert "has no class head: it was pretrained" in error_of(capsys)
    features = ("extract", "--checkpoint", tmp_path / "encoder.safetensors", place / "videos")
    assert ask(*features, "--out", tmp_path / "f.npz") == 0


@pytest.mark.parametrize(
    ("bank", "labels", "vote", "sentence"),
    [
        ((5, 64), [0, 1, 2, 0, 1], True, None),
        ((5, 64), [0, 1, 2, 0, 3], True, "its bank has labels outside 0 to 2"),
        ((0, 64), [], True, "its bank has labels outside 0 to 2"),
        ((5, 32), [0, 1, 2, 0, 1], True, "its bank is not a row of 64 features"),
        ((5, 64), [0, 1], True, "its bank is not a row of 64 features and a label a clip"),
        ((5, 64), [0, 1, 2, 0, 1], False, "its configuration is of another mode"),
    ],
)
def test_a_bank_of_clips_votes_or_is_refused(place, tmp_path, capsys, bank, labels, vote, sentence):
    weights = {name: value for name, value in classifier().state_dict().items() if name.startswith("encoder.")}
    description = DESCRIPTION | ({"vote": {"neighbours": 3, "temperature": 0.1}} if vote else {})
    (tmp_path / "config.json").write_text(json.dumps(description))
    save_file(weights | {"bank": torch.ones(bank), "labels": torch.tensor(labels)}, tmp_path / "model.safetensors")
    code = ask("predict", "--checkpoint", tmp_path, place / "videos" / "down" / "0.mp4", "--out", tmp_path / "a.json")
    assert code == (4 if sentence else 0)
    if sentence:
        assert sentence in error_of(capsys)


def test_a_file_that_runs_code_is_refused(place, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Evil()}, tmp_path / "evil.pth")
    assert ask("--checkpoint", tmp_path / "evil.pth", "--size", "tiny", "--data", place / "videos") == 4
    said = capsys.readouterr()
    assert "would run code when opened" in said.err and "run\n" not in said.out


def test_the_program_starts_as_a_script(program, place):
    done = program("bevt_fast/evaluate.py", "predict", "--checkpoint", place / "model", place / "videos", check=0)
    assert done.stdout.count(".mp4") == 6
    assert evaluate.__doc__ is not None
