"""Studies: the chain as it is, then with a stand-in for the programs: what is run, kept, made again and reported."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bevt_fast import evaluate, study
from bevt_fast.errors import ConfigError
from bevt_fast.studies import config, jobs, report
from bevt_fast.studies.config import load
from bevt_fast.studies.report import Cell, Grid
from tests.training.command import ROOT, changed, environment, written
from tests.training.conftest import SHAPES

PROGRAM = ROOT / "bevt_fast" / "study.py"
# writes what the programs would, notes how it was called, and fails or waits where faults.json says so
STAND_IN = """
import json, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
program, words = pathlib.Path(sys.argv[1]).stem, sys.argv[2:]
place = pathlib.Path(words[words.index("--checkpoint" if program == "evaluate" else "--config") + 1])
config = {} if program == "evaluate" else json.loads(place.read_text())
output = place if program == "evaluate" else pathlib.Path(config["output"])
for fault, code in json.loads((here / "faults.json").read_text()).items():
    if fault in str(output):
        print("error: " + fault + " has failed", flush=True)
        time.sleep(60 if code == "wait" else 0)
        sys.exit(code)
output.mkdir(parents=True, exist_ok=True)
value = (0.9 if "pretrained" in config.get("model", {}) else 0.5) + config.get("seed", 0) / 100
if program == "train":
    (output / "heldout.json").write_text(json.dumps({"clips": {"accuracy": value}}))
elif program == "finetune":
    (output / "log.jsonl").write_text(json.dumps({"step": 1, "val/top1": value}) + "\\n")
else:
    (output / "evaluation").mkdir(exist_ok=True)
    orders = {"normal": {"top1": 0.9}, "single_frame": {"top1": 0.5}, "shuffled": {"top1": 0.4}}
    (output / "evaluation" / "results.json").write_text(json.dumps({"temporal": orders}))
"""


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A study of two pretrainings and two evaluations, whose programs are the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "faults.json").write_text("{}")
    pretraining, motion = (str(ROOT / "configs" / "study" / f"{name}.json") for name in ("pretraining", "motion"))
    return {
        "seeds": [0, 1],
        "launcher": [sys.executable, str(tmp_path / "stand_in.py")],
        "pretraining": {
            "joint": {"config": pretraining, "start": "image"},
            "image": {"config": pretraining, "set": ["clips=null"], "seconds": 30},
        },
        "evaluations": {
            "motion": {"config": motion, "arms": ["scratch", "image", "joint"], "temporal": ["joint"], "seconds": 60},
            "knn": {"config": motion, "set": ["train.mode=knn"], "arms": ["scratch", "image"]},
        },
        "tables": [
            {"title": "Table 1", "rows": ["scratch", "image", "joint"], "columns": ["motion", "knn"]},
            {"title": "Table 2", "rows": ["joint"], "columns": ["motion"], "temporal": True},
        ],
    }


@pytest.fixture
def run(values: dict[str, Any], tmp_path: Path) -> Callable[..., int]:
    """`run({"seeds": [3]}, "--dry-run")` in this process."""

    def start(changes: dict[str, Any] | None = None, *words: str) -> int:
        path = written(changed(values, changes or {}), tmp_path / "study.json")
        (tmp_path / "calls").unlink(missing_ok=True)
        return study.main(["--config", str(path), "--out", str(tmp_path / "out"), *words])

    return start


def calls(place: Path) -> list[str]:
    """What the stand-in was started for, as `train joint/seed0 resume`."""
    found = []
    for line in (place / "calls").read_text().splitlines() if (place / "calls").exists() else []:
        program, *words = json.loads(line)
        where = Path(words[words.index("--checkpoint" if "evaluate" in program else "--config") + 1])
        name = f"{where.parent.parent.name}/{where.parent.name}/{where.name.split('.')[0]}"
        found.append(f"{Path(program).stem} {name}{' resume' if words[-2:] == ['--resume', 'auto'] else ''}")
    return found


# -- the chain ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_the_chain_runs_from_pretraining_to_tables(tmp_path):
    """One arm of two steps, fine-tuned for two, by the real programs."""
    shapes = SHAPES | {"root": str(tmp_path / "shapes"), "frames": 4, "clips": 8, "images": 64, "test_images": 8}
    small = {"model.size": {"embed_dim": 8, "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2]}, "model.window": [2, 2, 2]}
    pretraining = json.loads((ROOT / "configs" / "study" / "pretraining.json").read_text())
    part = {"name": "moving_shapes", "options": shapes | {"kind": "images", "frames": 8}}
    del pretraining["clips"], pretraining["images"]["heldout"]
    changes = {"images.source": part, "images.view.size": 64, "images.view.short_side": [64, 64], "train.steps": 2}
    changes |= {"images.mask.options.min_block": 1, "tokenizer.options.fit_if_missing": True}
    changes |= {"tokenizer.options.weights": str(tmp_path / "tokens.safetensors"), "tokenizer.options.vocab_size": 16}
    written(changed(pretraining, small | changes), tmp_path / "pretraining.json")
    motion = json.loads((ROOT / "configs" / "study" / "motion.json").read_text())
    for key in ("source", "heldout"):
        motion["data"][key]["options"] = shapes | ({"split": "test"} if key == "heldout" else {})
    motion |= {"test": {"clips": 1, "crops": 1, "size": 64, "short_side": 64}}
    changes = {"views.size": 64, "views.short_side": 64, "train.steps": 2, "model.classes": 8}
    written(changed(motion, small | changes), tmp_path / "motion.json")
    arm = {"image": {"config": str(tmp_path / "pretraining.json")}}
    judged = {"motion": {"config": str(tmp_path / "motion.json"), "arms": ["image"]}}
    table = {"title": "One arm", "rows": ["image"], "columns": ["motion"]}
    values = {"seeds": [0], "pretraining": arm, "evaluations": judged, "tables": [table]}
    words = ["--config", str(written(values, tmp_path / "study.json")), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(PROGRAM), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    log = (tmp_path / "out" / "motion" / "image" / "seed0.log").read_text()
    assert f"starts from {tmp_path / 'out' / 'pretraining' / 'image' / 'seed0'}" in log
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## One arm" in page and "| arm | motion |" in page
    with (tmp_path / "out" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["measure"] == "normal" and 0 <= float(row["value"]) <= 1 and row["arm"] == "image"


def test_the_orders_of_frames_are_asked_for_in_words_that_evaluate_knows(values, tmp_path):
    path = written(changed(values, {"launcher": []}), tmp_path / "study.json")
    (job,) = (job for job in jobs.plan(load(path), tmp_path / "out") if job.temporal and job.seed == 1)
    python, program, *words = job.commands[1]
    assert python == sys.executable and Path(program).is_file()
    options = evaluate.command_line(words)
    assert options.temporal and options.checkpoint == str(tmp_path / "out" / "motion" / "joint" / "seed1")
    assert (options.workers, options.threads, options.out) == (0, 1, None)


# -- what is run -------------------------------------------------------------------------------------------------------


def test_runs_come_after_those_they_need_and_are_done_once(run, tmp_path, capsys):
    assert run() == 0
    made = calls(tmp_path)
    assert made.index("train pretraining/image/seed0") < made.index("train pretraining/joint/seed0")
    assert made.index("train pretraining/joint/seed0") < made.index("finetune motion/joint/seed0")
    assert made[made.index("finetune motion/joint/seed0") + 1] == "evaluate motion/joint/seed0"
    assert len(made) == 2 * (2 + 3 + 2 + 1) and len(set(made)) == len(made)
    assert made.index("finetune knn/image/seed0") < made.index("train pretraining/image/seed1")
    given = json.loads((tmp_path / "out" / "motion" / "joint" / "seed1.config.json").read_text())
    assert given["seed"] == 1 and given["model"]["pretrained"] == str(tmp_path / "out/pretraining/joint/seed1")
    assert run() == 0 and not calls(tmp_path)
    # another mask for one arm makes that arm anew, and what is judged of it
    assert run({"pretraining.joint.set": ["clips.mask.name=random_frame"]}) == 0
    remade = {line.split()[1].split("/seed")[0] for line in calls(tmp_path)}
    assert remade == {"pretraining/joint", "motion/joint"}
    assert run({"pretraining.joint.set": ["clips.mask.name=random_frame"], "seeds": [0, 1, 2]}) == 0
    assert {line.split()[1].rpartition("/")[2] for line in calls(tmp_path)} == {"seed2"}
    assert "image seed 2: clips 52.0% (" in capsys.readouterr().out


def test_several_at_a_time_are_the_same_runs(run, tmp_path):
    assert run({"jobs": 4}) == 0
    made = calls(tmp_path)
    assert len(made) == len(set(made)) == 16
    assert made.index("train pretraining/joint/seed1") < made.index("finetune motion/joint/seed1")


def test_a_run_that_fails_is_reported_and_the_rest_goes_on(run, tmp_path, capsys):
    (tmp_path / "faults.json").write_text(json.dumps({"pretraining/image/seed1": 5}))
    assert run() == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    log = tmp_path / "out" / "pretraining" / "image" / "seed1.log"
    assert f"error: image seed 1: failed (exit code 5): pretraining/image/seed1 has failed [{log}]" in lines
    assert "error: joint seed 1: not run, for it needs image seed 1" in lines and len(lines) == 5
    made = calls(tmp_path)
    assert "finetune motion/scratch/seed1" in made and "finetune motion/joint/seed0" in made
    page = (tmp_path / "out" / "report.md").read_text()
    assert "## Not there" in page and "| image | 90.0 (n = 1) | 90.0 (n = 1) |" in page
    # mended, it goes on from the checkpoint of the run that failed, and what was never begun begins
    (tmp_path / "faults.json").write_text("{}")
    assert run() == 0
    again = calls(tmp_path)
    assert again[0] == "train pretraining/image/seed1 resume" and "finetune motion/joint/seed1" in again
    assert len(again) == 5 + 1 and "## Not there" not in (tmp_path / "out" / "report.md").read_text()


def test_a_run_without_a_score_has_failed(run, tmp_path, capsys):
    text = (tmp_path / "stand_in.py").read_text().replace('"val/top1"', '"train/top1"')
    (tmp_path / "stand_in.py").write_text(text)
    assert run() == 1
    assert "knn of scratch seed 0: ended well, but left no score under" in capsys.readouterr().err


def test_a_stopped_study_ends_its_runs_and_goes_on(values, run, tmp_path):
    (tmp_path / "faults.json").write_text(json.dumps({"motion/scratch/seed0": "wait"}))
    words = ["--config", str(written(values, tmp_path / "study.json")), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, str(PROGRAM), *words], env=environment(), stdout=subprocess.DEVNULL)
    while "finetune motion/scratch/seed0" not in calls(tmp_path):
        assert process.poll() is None
        time.sleep(0.05)
    other = subprocess.run(
        [sys.executable, str(PROGRAM), *words], env=environment(), capture_output=True, text=True, check=False
    )
    assert other.returncode == 2 and other.stderr.startswith("error: another study is running in ")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
    assert "report.md" in os.listdir(tmp_path / "out")
    (tmp_path / "faults.json").write_text("{}")
    assert run() == 0
    assert calls(tmp_path)[0] == "finetune motion/scratch/seed0 resume"


def test_a_dry_run_lists_the_arms_and_the_time(run, tmp_path, capsys):
    assert run(None, "--dry-run") == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "pretraining image 0 of 2 done 30 s each" in said and "motion of joint 0 of 2 done 60 s each" in said
    # 2 times 30 s and 6 times 60 s; two joint pretrainings and four knn have no time
    assert said[-1] == "14 runs to do, 1 at a time: about 7 minutes, and 6 of which none has been timed"
    assert not calls(tmp_path) and not (tmp_path / "out").exists()
    assert run() == 0 and run(None, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 runs to do, 1 at a time: about 0 minutes"


@pytest.mark.parametrize("path", [p for p in (ROOT / "configs" / "study").glob("*.json") if "seeds" in p.read_text()])
def test_shipped_studies_load(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    found = load(path)
    assert len(found.seeds) >= 3
    assert len(jobs.plan(found, tmp_path)) > len(found.seeds) * len(found.evaluations)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds must differ from one another, got 1, 1"),
        ({"seeds": [-1]}, "seeds"),
        ({"jobs": 0}, "jobs"),
        ({"evaluations": {}}, "evaluations"),
        (
            {"evaluations.knn.arms": ["imagee"]},
            "there is no arm 'imagee', there are: scratch, joint, image; did you mean",
        ),
        ({"evaluations.knn.arms": []}, "arms"),
        ({"evaluations.motion.temporal": ["nobody"]}, "evaluations.motion.temporal: there is no arm of it 'nobody'"),
        ({"pretraining.joint.start": "clips"}, "pretraining.joint.start: there is no pretraining 'clips'"),
        ({"pretraining.image.start": "joint"}, "joint begins with image begins with joint; one must begin"),
        ({"pretraining.scratch": {"config": "x"}}, "'scratch' is the arm without one"),
        ({"pretraining.../up": {"config": "x"}}, "pretraining"),
        ({"tables": [{"title": "t", "rows": ["joint"], "columns": ["mution"]}]}, "did you mean 'motion'"),
        (
            {"tables": [{"title": "t", "rows": ["image"], "columns": ["motion"], "temporal": True}]},
            "evaluations.motion.temporal: there is no arm 'image'",
        ),
        ({"pretraining.joint.set": ["output=x"]}, "the study itself sets output; leave 'output=x' out"),
        ({"pretraining.joint.set": ["optim.lrr=1"]}, "pretraining.joint: "),
        ({"evaluations.knn.config": "nowhere.json"}, "evaluations.knn: cannot read the configuration nowhere.json"),
        ({"evaluations.motion.set": ["train.validate_every=0"]}, "evaluations.motion: train.validate_every is 0"),
        ({"evaluations.motion.set": ["data.source.name=nothing"]}, "has no part 'nothing'"),
        ({"evaluation": {}}, "did you mean 'evaluations'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(changes, said, values, run, tmp_path, capsys):
    if "pretraining.../up" in changes:
        values["pretraining"]["../up"] = changes.pop("pretraining.../up")
    assert run(changes) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error
    assert not calls(tmp_path) and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_sentence(values, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = written(values, tmp_path / "study.json")
    assert study.main(["--config", str(path), "--out", str(tmp_path / "file" / "out")]) == 6
    assert capsys.readouterr().err.startswith("error: cannot write the study to ")


def test_a_study_that_is_no_json(tmp_path):
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(ConfigError, match=r"study.json:1: not valid JSON"):
        load(tmp_path / "study.json")


def test_every_key_is_explained():
    page = (ROOT / "configs" / "README.md").read_text()
    for section in (config.Study, config.Pretraining, config.Evaluation, config.Table):
        for key in section.model_fields:
            assert f"`{key}`" in page, f"{section.__name__}.{key} is not in configs/README.md"


# -- the report --------------------------------------------------------------------------------------------------------


def grid(*rows: tuple[float, ...]) -> Grid:
    names = ["scratch", "image", "joint"][: len(rows)]
    return Grid("Table", names, ["motion"], [[Cell(row)] for row in rows])


def test_means_and_spreads_are_those_of_the_seeds():
    cell = Cell((0.8, 0.9, 1.0))
    assert cell.mean == pytest.approx(0.9) and cell.spread == pytest.approx(0.1)
    assert str(cell) == "90.0 ± 10.0" and str(Cell((0.5,))) == "50.0" and str(Cell(())) == "-"
    lines = report.markdown(grid((0.8, 0.9, 1.0), (0.5,), ()))
    assert lines[2:] == ["| scratch | 90.0 ± 10.0 |", "| image | 50.0 (n = 1) |", "| joint | - |"]


def test_a_difference_counts_where_no_seed_reaches_the_other_arm():
    (said,) = report.differences(grid((0.5, 0.6), (0.6, 0.8), (0.7, 0.9)))
    assert said == "* motion: differences that exceed the spread: joint > scratch (+25.0); the other 2 do not."
    (said,) = report.differences(grid((0.5, 0.6), (0.6, 0.5)))
    assert said == "* motion: differences that exceed the spread: none of 1."
    assert not report.differences(grid((0.5,), (0.9,)))  # one seed has no spread


def test_without_matplotlib_there_are_no_pictures(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run() == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert "![" not in (tmp_path / "out" / "report.md").read_text() and not list((tmp_path / "out").glob("*.png"))


def test_pictures_are_drawn_and_named(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert run() == 0
    page = (tmp_path / "out" / "report.md").read_text()
    for number in range(3):
        assert f"(table_{number}.png)" in page
        assert (tmp_path / "out" / f"table_{number}.png").read_bytes().startswith(b"\x89PNG")
