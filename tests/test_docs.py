"""The pages of docs/: every command and key they name exists, and the five minutes of own data run as they stand."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from pydantic import BaseModel

from bevt_fast import config, evaluate, export, finetune_config, prepare, study
from bevt_fast.config import Config, Part, open_part
from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.training.run import Run
from tests.data.media import video
from tests.trained import ask, threads
from tests.training.command import FINETUNE, ROOT, TRAIN, alone, train_here

PAGES = sorted((ROOT / "docs").glob("*.md"))
OWN = ROOT / "docs" / "own_data.md"
SPANS = re.compile(r"`([^`\n]+)`")
KEY = re.compile(r"(seed|output|clips|images|tokenizer|model|optim|train|data|views|test|deepspeed)(\.[a-z_0-9]+)+")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Every command of a page, in blocks and within the text, from its program on."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += [span for span in SPANS.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if "bevt_fast/" in line else []
        program = [k for k, word in enumerate(words) if re.fullmatch(r"bevt_fast/\w+\.py", word)]
        found += [words[program[0] :]] if program else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_understood(page, tmp_path):
    (tmp_path / "own.json").write_text(blocks(OWN, "json")[1])
    assert commands(page)
    for program, *words in commands(page):
        words = [str(tmp_path / "own.json") if word == "own.json" else word for word in words]
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in words]
        if program == "bevt_fast/evaluate.py":
            evaluate.command_line(words)
        elif program == "bevt_fast/export.py":
            assert export.command_line(words).to in export.TARGETS
        elif program == "bevt_fast/prepare.py":
            prepare.command_line().parse_args(words)
        elif program == "bevt_fast/study.py":
            assert study.plan(study.load(study.command_line(words).config, []), tmp_path)
        else:
            options = config.command_line(words)
            load = config.load if program == "bevt_fast/train.py" else finetune_config.load_finetune
            for part in parts(load(options.config, options.set)):
                open_part(f"bevt_fast.{part[0]}", part[1])


def parts(section: BaseModel, key: str = "") -> list[tuple[str, Part]]:
    """Every part a configuration names, with its room."""
    if isinstance(section, Part):
        room = {"tokenizer": "tokenizers", "mask": "data.masking"}.get(key, "data.sources")
        return [(room, section)]
    inner = ((name, getattr(section, name)) for name in type(section).model_fields)
    return [part for name, value in inner if isinstance(value, BaseModel) for part in parts(value, name)]


def has(section: Any, key: str) -> bool:
    """Whether a section, or one of the alternatives of a type, has a dotted key; options of a part are its own."""
    if not (isinstance(section, type) and issubclass(section, BaseModel)):
        return any(has(one, key) for one in get_args(section))
    first, _, rest = key.partition(".")
    if first not in section.model_fields:
        return False
    return not rest or section is Part or has(section.model_fields[first].annotation, rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_key_is_one(page):
    keys = {match[0] for span in SPANS.findall(page.read_text()) if (match := KEY.fullmatch(span.partition("=")[0]))}
    assert len(keys) > (5 if page.stem in ("own_data", "from_official_bevt") else 0)
    assert not [key for key in sorted(keys) if not has(Config, key) and not has(FinetuneConfig, key)]
    assert not has(Config, "clips.veiw.size") and not has(FinetuneConfig, "views.randaugment.q")


def test_every_option_and_file_is_there(capsys):
    """Of a table whose first column is the official one, the others."""
    programs = [(evaluate, ["--help"]), (evaluate, ["predict", "--help"]), (export, ["--help"]), (config, ["--help"])]
    for program, words in programs:
        with pytest.raises(SystemExit):
            program.command_line(words)
    ours = {"-h", *re.findall(r"--[a-z][a-z_-]*", capsys.readouterr().out)}
    for page in PAGES:
        lines = page.read_text().splitlines()
        lines = [line.partition(" | ")[2] if page.stem == "from_official_bevt" else line for line in lines]
        named = {
            option for line in lines for span in SPANS.findall(line) for option in re.findall(r"--[a-z][a-z-]*", span)
        }
        assert not named - ours - {"--nproc-per-node"}, named - ours
        for file in re.findall(r"configs/[\w/]+\.json", page.read_text()):
            assert (ROOT / file).is_file(), file


def test_the_five_minutes_of_own_data(tmp_path, monkeypatch):
    """Each command of the page, in its order, on a handful of small videos; trained for two steps."""
    for k in range(12):
        place = tmp_path / "my_videos" / ("train" if k < 8 else "val") / ("jumping" if k % 2 else "waving") / f"{k}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        video(place, "libx264", frames=10, size=(64, 80))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "finish", lambda run: run.save(run.last_step))  # the pictures of pretraining's end
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "own.json").write_text(blocks(OWN, "json")[1])
    short = ["--set", "train.steps=2", "--set", "data.workers=0", "--set", "train.threads=1"]
    for block in blocks(OWN, "bash"):
        for line in block.splitlines():
            _, program, *words = shlex.split(line)
            name = Path(program).stem
            if name in ("train", "finetune"):
                with alone():
                    assert train_here(*words, *short, program=TRAIN if name == "train" else FINETUNE) == 0, line
            elif name == "prepare":
                with threads(), alone(), mock.patch.object(sys, "argv", [program, *words]):
                    with pytest.raises(SystemExit) as ended:
                        runpy.run_path(str(ROOT / program), run_name="__main__")
                assert not ended.value.code, line
            else:
                assert ask(*words, program=evaluate if name == "evaluate" else export) == 0, line
    assert (tmp_path / "runs" / "own" / "evaluation" / "results.json").exists()
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 1 + 4 * 2
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["class_names"] == ["jumping", "waving"]
    assert (tmp_path / "runs" / "own_after" / "checkpoints" / "step_00000002").is_dir()
