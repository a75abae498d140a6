"""A dataset and a model so small that a whole run takes seconds, and ways to start one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bevt_fast.config import Config, parse
from bevt_fast.data import sources
from bevt_fast.training import tokenizer_fit
from bevt_fast.training.run import Run
from tests.training.command import ROOT, TRAIN, alone, changed, environment, train_here, written

SHAPES = {"clips": 24, "images": 48, "test_clips": 12, "test_images": 24, "size": 64, "length": 8, "objects": 2}


class Finished(NamedTuple):
    """What a program left behind."""

    code: int
    out: str
    error: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """configs/demo.json on 24 clips of 8 frames and 48 images of 64 pixels, with a model of half a million weights.

    12 steps of two micro-batches, with dropped paths, so that random state counts; the tokenizer is fitted already.
    """
    place = tmp_path_factory.mktemp("tiny")
    values = json.loads((ROOT / "configs" / "demo.json").read_text())
    for name, mask in (("clips", {"length": [0.5, 1.0]}), ("images", {})):
        stream = values[name]
        for source in (stream["source"], stream["heldout"]):
            source["options"] |= SHAPES | {"root": str(place / "shapes")} | ({"frames": 4} if name == "clips" else {})
        stream["mask"]["options"] = {"ratio": 0.5, "min_block": 1} | mask
        stream |= {"batch": 4, "micro_batch": 2, "view": {"size": 64, "short_side": [64, 64], "flip": 0.5}}
    values["tokenizer"]["options"] |= {"weights": str(place / "tokens.safetensors"), "vocab_size": 32}
    values["model"] |= {
        "size": {"embed_dim": 16, "depths": [1, 1, 1, 1], "heads": [1, 2, 4, 8]},
        "window": [2, 2, 2],
        "drop_path": 0.2,
    }
    values["optim"]["warmup_steps"] = 3
    values["train"] = {
        "steps": 12,
        "precision": "fp32",
        "log_every": 1,
        "save_every": 4,
        "keep_checkpoints": 4,
        "threads": 1,
        "heldout_batches": 2,
        "pictures": 1,
    }
    values["data"] = {"workers": 0}
    values["output"] = str(place / "unused")
    config = parse(Config, values, "tiny")
    assert config.clips and config.images
    streams = {"clips": config.clips.source, "images": config.images.source}
    assert tokenizer_fit.fit_if_missing(config, {name: sources.build(part) for name, part in streams.items()})
    return values


@pytest.fixture
def settings(tiny: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """The tiny run's file with some keys changed: `settings({"optim.lr": 1e-4}, output="other")`."""

    def write(changes: dict[str, Any] | None = None, output: str = "run") -> Path:
        values = changed(tiny, {"output": str(tmp_path / output)} | (changes or {}))
        return written(values, tmp_path / f"{output}.json")

    return write


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """Train within this process. The pictures of a run's end are left out unless `ending` is true."""

    def start(config: Path, *arguments: str | Path, ending: bool = False) -> Finished:
        capsys.readouterr()
        with monkeypatch.context() as patch, alone():
            if not ending:
                patch.setattr(Run, "finish", lambda run: run.save(run.last_step))
            code = train_here("--config", config, *arguments)
        out, error = capsys.readouterr()
        return Finished(code, str(out), str(error))

    return start


@pytest.fixture
def background():
    """Start train.py as a process group of its own, in the background; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*launcher, str(TRAIN), *map(str, arguments)],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # also workers that outlive their trainer by seconds
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def uninterrupted(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the tiny run, from the first step to the pictures, on one process."""
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    config = written(changed(tiny, {"output": str(output)}), output.with_suffix(".json"))
    with alone():
        assert train_here("--config", config) == 0
    return output
