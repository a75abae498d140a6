"""Fine-tuning runs: they learn, log, validate, go on bit by bit, and refuse what does not fit with one sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bevt_fast.data.sources import Source
from bevt_fast.data.views import Views
from bevt_fast.errors import MachineError
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.probes import NearestNeighbours
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import scoring
from bevt_fast.training.distributed import World
from tests.training.command import FINETUNE, ROOT, alone, changed, rows, train_here, written
from tests.training.conftest import SHAPES, Finished
from tests.training.test_distributed import together

SIZE = {"embed_dim": 16, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]}
SHAPE = VideoSwinConfig(embed_dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=(2, 2, 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """configs/finetune/demo.json on 24 clips of 64 pixels: three steps of two micro-batches an epoch, two epochs."""
    values = json.loads((ROOT / "configs" / "finetune" / "demo.json").read_text())
    options = SHAPES | {"root": str(tmp_path_factory.mktemp("finetune") / "shapes"), "frames": 4}
    for key in ("source", "heldout"):
        values["data"][key]["options"] |= options
        del values["data"][key]["options"]["motions"]
    values["data"] |= {"batch": 8, "micro_batch": 4, "workers": 0}
    values["views"] |= {"size": 64, "short_side": 64, "twins": False}
    values["model"] |= {"size": SIZE, "window": [2, 2, 2], "drop_path": 0.2, "dropout": 0.5, "classes": 8}
    values["optim"] |= {"warmup_steps": 2, "cosine": "epoch"}
    values["train"] = {"epochs": 2, "precision": "fp32", "log_every": 1, "save_every": 2, "keep_checkpoints": 4}
    values["train"] |= {"validate_every": 1, "threads": 1}
    return values


@pytest.fixture
def start(base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """`start({"train.mode": "knn"}, "--resume", "auto", output="other")` within this process."""

    def run(changes: dict[str, Any] | None = None, *arguments: str | Path, output: str = "run") -> Finished:
        values = changed(base, {"output": str(tmp_path / output)} | (changes or {}))
        capsys.readouterr()
        with alone():
            code = train_here("--config", written(values, tmp_path / f"{output}.json"), *arguments, program=FINETUNE)
        return Finished(code, *map(str, capsys.readouterr()))

    return run


@pytest.mark.parametrize(
    "changes", [{}, {"train.mode": "linear"}, {"train.ema": True}], ids=["plain", "frozen", "average"]
)
def test_dry_run_says_what_a_gpu_would_need(changes, start) -> None:
    done = start(changes, "--dry-run", "--gpu", "A100-40GB")
    assert done.code == 0 and "memory of a process on A100-40GB (asked for)" in done.out
    rows_ = dict(re.findall(r"^  (.{46}) +([\d,.]+) MiB", done.out, re.M))
    sizes = {name.strip(): float(size.replace(",", "")) for name, size in rows_.items()}
    whole, of = sizes.pop("sum"), sizes.pop("of A100-40GB")
    assert of == 40 * 1024 and whole == pytest.approx(sum(sizes.values()), abs=0.5)
    assert ("frozen encoder" in sizes) == ("train.mode" in changes)
    assert ("moving average of the weights" in sizes) == ("train.ema" in changes)
    assert "divides the batch: 8 clips" in done.out


def test_the_gpu_of_a_dry_run_is_known(start) -> None:
    for mode in ("finetune", "knn"):
        is_one_sentence(start({"train.mode": mode}, "--dry-run", "--gpu", "A1000"), 2, "known are: B200")
    done = start({}, "--gpu", "A100")
    assert done.code == 2 and "--gpu says what --dry-run predicts for" in done.error


def test_out_of_memory_ends_with_the_estimate_and_settings(start, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr("bevt_fast.training.finetune_run.build", build)
    done = start()
    is_one_sentence(done, 6, "a micro-batch of 4 clips needs about", "this machine has", "--set data.micro_batch=2 ")
    assert "--set model.activation_checkpointing=true" in done.error and "--set views.size=32" in done.error
    # twins come in pairs: there is no smaller micro-batch
    assert "micro_batch" not in start({"data.micro_batch": 2, "views.twins": True}).error.split("less")[1]


def is_one_sentence(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done.error
    assert done.error.startswith("error: ") and done.error.count("\n") == 1, done.error
    for word in words:
        assert word in done.error


def weights(output: Path, step: int, folder: str = "checkpoints") -> dict[str, torch.Tensor]:
    return load_file(output / folder / f"step_{step:08d}" / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.layer_decay": 0.9, "train.mixup": 0.5, "optim.grad_clip": 40.0},
        {"train.ema": True, "optim.encoder_lr": 0.1, "train.label_smoothing": 0.1, "views.erasing": 0.5},
        {"train.mode": "attentive", "train.precision": "bf16"},
    ],
    ids=["kinetics", "something", "attentive"],
)
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(changes, start, tmp_path):
    assert start(changes).code == 0
    there, again = tmp_path / "run", tmp_path / "again"
    assert start(changes, "--resume", there / "checkpoints" / "step_00000004", output="again").code == 0
    assert rows(there)[4:] == rows(again) and same(weights(there, 6), weights(again, 6))
    assert [line["step"] for line in rows(there)] == list(range(6))
    scores = [json.loads(line) for line in (there / "log.jsonl").read_text().splitlines() if "val/top1" in line]
    assert [line["step"] for line in scores] == [2, 5]
    assert scores[0].keys() >= {"val/top1", "val/top5", "val/mean_class_acc"}
    names = {"train/loss", "train/lr", "train/grad_norm", "train/skipped_steps", "perf/clips_per_s", "data/quarantined"}
    assert all(names <= json.loads(line).keys() for line in (there / "log.jsonl").read_text().splitlines()[:3])
    assert len(list((there / "best").glob("step_*"))) == 1
    values = json.loads((there / "config.json").read_text())
    assert values["train"]["mode"] == changes.get("train.mode", "finetune")
    classifier = Classifier(SHAPE, 8, pool_heads=8 if "train.mode" in changes else 0)
    classifier.load_state_dict(weights(there, 6))


def test_two_processes_learn_and_validate_as_one_does(start, base, tmp_path):
    """Also under ZeRO 3, whose weights are spread, with a validation list that does not divide evenly among them."""
    runs = {
        "spread": {"train.ema": True, "deepspeed.zero_optimization.stage": 3},
        "probed": {"train.mode": "attentive", "deepspeed.zero_optimization.stage": 2},
        "near": {"train.mode": "knn"},
    }
    two = {"train.epochs": 1, "train.validate_every": 1}
    configs = []
    for name, changes in runs.items():
        values = changed(base, two | changes | {"output": str(tmp_path / f"{name}_two")})
        configs.append(written(values, tmp_path / f"{name}_two.json"))
        # ZeRO 3 puts a function of its own into torch.nn.functional, for the life of a process
        here = {key: value for key, value in changes.items() if not key.startswith("deepspeed")}
        assert start(two | here, output=name).code == 0
    together(2, configs, FINETUNE)
    for name in runs:
        one, other = ([json.loads(line) for line in open(tmp_path / n / "log.jsonl")] for n in (name, f"{name}_two"))
        assert len(one) == len(other) == (1 if name == "near" else 4)
        for row, found in zip(one, other):
            compared = [key for key in row if key.startswith("val/") or key in ("train/loss", "train/top1")]
            assert compared and [row[key] for key in compared] == pytest.approx(
                [found[key] for key in compared], abs=1e-5
            )
        step = 0 if name == "near" else 3
        weights_two = weights(tmp_path / f"{name}_two", step)
        for key, value in weights(tmp_path / name, step).items():
            assert torch.allclose(weights_two[key].float(), value.float(), rtol=1e-2, atol=1e-4), key


def test_spread_weights_are_not_scored():
    classifier = Classifier(SHAPE, 8)
    classifier.class_head.bias.ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]  # as ZeRO 3 marks them
    with pytest.raises(MachineError, match="ZeRO stage 3 has spread"):
        scoring.score(
            classifier, Source(name="none", root=Path(), paths=[]), Views(), World(0, 0, 1, torch.device("cpu"))
        )


def test_it_learns_what_it_is_shown(start, tmp_path):
    """Eight clips again and again, without anything random: the loss falls to near 0."""
    shown = {"data.source.options.clips": 8, "data.heldout.options.clips": 8, "data.micro_batch": 8}
    root = {f"data.{key}.options.root": str(tmp_path / "eight") for key in ("source", "heldout")}
    still = {"model.dropout": 0.0, "model.drop_path": 0.0, "train.epochs": 24, "train.validate_every": 0}
    assert start(shown | root | still | {"optim.lr": 5e-3, "optim.cosine": "step"}).code == 0
    losses = [row["train/loss"] for row in rows(tmp_path / "run")]
    assert losses[0] > 1.5 and losses[-1] < losses[0] / 2, losses


def test_a_probe_leaves_the_encoder_as_it_was(start, tmp_path):
    first = Classifier(SHAPE, 8).state_dict()
    save_file({name: value for name, value in first.items()}, tmp_path / "start.safetensors")
    changes = {"train.mode": "linear", "model.pretrained": str(tmp_path / "start.safetensors"), "train.epochs": 1}
    assert start(changes | {"train.precision": "bf16"}).code == 0
    learnt = weights(tmp_path / "run", 3)
    for name, value in first.items():
        assert torch.equal(learnt[name], value) == name.startswith("encoder."), name


def test_the_average_is_what_is_saved_and_scored(start, tmp_path):
    assert start({"train.ema": True, "train.epochs": 1, "train.validate_every": 1}).code == 0
    assert start({"train.epochs": 1, "train.validate_every": 1}, output="plain").code == 0
    averaged, plain = weights(tmp_path / "run", 3), weights(tmp_path / "plain", 3)
    state = load_file(tmp_path / "run" / "checkpoints" / "step_00000003" / "optimizer.safetensors")
    assert all(torch.equal(state[f"{name}.learning"], value) for name, value in plain.items())
    assert same(averaged, weights(tmp_path / "run", 3, "best")) and not same(averaged, plain)
    done = start({"train.epochs": 2}, "--resume", "auto")
    assert done.code == 4 and "train.ema=true" in done.error


def test_nearest_neighbours_find_the_clips_they_know(start, tmp_path):
    assert start({"train.mode": "knn", "train.neighbours": 1, "data.heldout.options.split": "train"}).code == 0
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert line["val/top1"] == 1.0


def test_votes_are_weighted_by_nearness():
    bank = torch.eye(4)
    itself: Any = torch.nn.Identity()
    judge = NearestNeighbours(itself, bank, torch.tensor([0, 1, 1, 2]), 3, neighbours=9, temperature=0.1)
    votes = judge(torch.tensor([0.9, 0.3, 0.3, 0.0])[None, None, None, None]).softmax(-1)[0]
    assert votes.argmax() == 0 and votes[1] > votes[2] and votes.sum() == pytest.approx(1)


def test_a_dry_run_says_groups_start_and_shapes_and_writes_nothing(start, tmp_path):
    done = start({"optim.layer_decay": 0.9}, "--dry-run")
    assert done.code == 0, done.error
    for said in (
        "parameters learn, in groups",
        "lr 1.500e-03",
        "pixels: (4, 3, 4, 64, 64)",
        "targets: (4, 8)",
        "24 clips",
    ):
        assert said in done.out
    assert not (tmp_path / "run").exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


def listed(root: Path, text: str, **options: Any) -> dict[str, Any]:
    (root / "list.txt").write_text(text)
    part = {"name": "file_list", "options": {"root": str(root), "list": "list.txt", "frames": 4} | options}
    return {"data.source": part}


def test_labels_and_classes_that_do_not_fit(start, base, tmp_path):
    is_one_sentence(start({"model.classes": 5}), 2, "has 8 classes, but the head has 5", "model.classes to 8")
    is_one_sentence(start(listed(tmp_path, "a.mp4 0\nb.mp4 9\n")), 3, "list.txt:2", "below 8", "9")
    is_one_sentence(start(listed(tmp_path, "a.mp4 0\nb.mp4 -1\n")), 3, "list.txt:2", "-1")
    is_one_sentence(start(listed(tmp_path, "a.mp4\nb.mp4\n")), 3, "data.source", "no labels")
    is_one_sentence(
        start({"data.source.options.kind": "images", "data.source.options.label": None}),
        2,
        "data.source",
        "gives images",
    )
    other = changed(base, {"data.heldout.options.label": "appearance"})["data"]["heldout"]
    is_one_sentence(start({"data.heldout": other}), 3, "data.heldout numbers its classes otherwise", "'")
    is_one_sentence(start({"data.heldout": None}), 2, "no validation list")


def test_twins_of_a_source_that_cannot_say_their_labels(start, tmp_path):
    listing = listed(tmp_path, "".join(f"{k}.mp4 {k}\n" for k in range(8))) | {"views.twins": True}
    is_one_sentence(start(listing), 2, "views.twins", "does not say which label", "set views.twins to false")
    assert not (tmp_path / "run").exists()


def test_starts_that_do_not_fit(start, tmp_path):
    path = tmp_path / "start.safetensors"
    is_one_sentence(start({"model.pretrained": str(path)}), 4, "model.pretrained", str(path), "is not there")
    save_file(Classifier(SHAPE, 8).state_dict(), path)
    begin = {"model.pretrained": str(path)}
    size = {"model.size": SIZE | {"embed_dim": 32}}
    is_one_sentence(last(start(begin | size)), 4, str(path), "16 wide after its stem, the model 32")
    is_one_sentence(last(start(begin | {"model.window": [4, 2, 2]})), 4, str(path), "model.pretrained_window")
    stem = "encoder.stem.projection.weight"
    other = Classifier(SHAPE, 8).state_dict()
    save_file(other | {stem: other[stem].repeat(1, 1, 2, 1, 1)}, path)
    is_one_sentence(last(start(begin)), 4, str(path), "patches of (4, 4, 4), the model of (2, 4, 4)")
    path.write_bytes(path.read_bytes()[:1000])
    is_one_sentence(last(start(begin)), 4, str(path), "truncated")


@pytest.mark.parametrize("readable", [True, False])
def test_validation_clips_that_no_decoder_opens_are_counted_and_never_scored(start, base, tmp_path, readable, caplog):
    options = base["data"]["heldout"]["options"]
    folder = Path(options["root"]) / "clips" / "test"
    assert start({"train.mode": "knn"}).code == 0  # the files are there now
    (tmp_path / "bad.webm").write_bytes(b"no video")
    lines = [f"{tmp_path / 'bad.webm'} 3\n", *(f"{folder / f'{k:05d}.webm'} {k}\n" for k in range(4))]
    part = listed(tmp_path, "".join(lines if readable else lines[:1]))["data.source"]
    done = start({"data.heldout": part, "train.epochs": 1, "train.validate_every": 1}, output="other")
    if not readable:
        is_one_sentence(last(done), 3, "data.heldout", "none of the 1 validation clips can be read")
        assert weights(tmp_path / "other", 3)  # what was learnt is saved before it is scored
        return
    assert done.code == 0 and f"not scored {tmp_path / 'bad.webm'}: unreadable" in caplog.text
    (row,) = [line for line in map(json.loads, open(tmp_path / "other" / "log.jsonl")) if "val/top1" in line]
    assert row["data/heldout_bad"] == 1 and row["val/top1"] * 4 == int(row["val/top1"] * 4)


def last(done: Finished) -> Finished:
    """The last line of what it said: moving an earlier output aside comes before."""
    return done._replace(error=done.error.splitlines()[-1] + "\n")


def test_too_many_bad_files_end_the_run(start, base, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for k in range(8):
        (root / f"{k}.mp4").write_bytes(b"no video")
    text = "".join(f"{k}.mp4 {k}\n" for k in range(8))
    done = last(start(listed(root, text)))
    assert done.code == 3 and "cannot be read" in done.error
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) == 8
