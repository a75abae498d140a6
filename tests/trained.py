"""A small classifier as the programs find it on disk, and small videos to ask it about."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bevt_fast import evaluate, export
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from tests.data.media import video
from tests.models.oracles import randomise
from tests.training.command import alone

SIZE = {"embed_dim": 8, "depths": [1, 1, 2, 1], "heads": [1, 2, 2, 4]}
WINDOW = (2, 3, 3)
CLASSES = ["down", "left", "up"]
SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=WINDOW, drop_path=0.0)
DESCRIPTION: dict[str, Any] = {
    "format": "bevt_fast classifier",
    "model": {"size": SIZE, "window": list(WINDOW)},
    "classes": 3,
    "class_names": CLASSES,
    "clip": {"frames": 4, "stride": 2},
    "test": {"clips": 1, "crops": 3, "size": 32, "short_side": 32},
}


def classifier(seed: int = 3) -> Classifier:
    """Weights away from their start, so that answers differ from video to video."""
    torch.manual_seed(seed)
    return randomise(Classifier(SHAPE, classes=3))


def exported(place: Path, model: Classifier | None = None, **changes: Any) -> Path:
    """A directory of config.json and model.safetensors."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(DESCRIPTION | changes))
    save_file((model or classifier()).state_dict(), place / "model.safetensors", metadata={"format": "pt"})
    return place


def videos(place: Path, bad: bool = True) -> Path:
    """Seven videos in one folder a class, one of them no video, and a list of all."""
    lines = []
    for k in range(7):
        path = Path(CLASSES[k % 3]) / f"{k}.mp4"
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        video(place / path, "libx264", frames=8 + 4 * k, size=(36, 48))
        lines.append(f"{path} {k % 3}\n")
    if bad:
        (place / CLASSES[0] / "3.mp4").write_text("no video")
    (place / "list.txt").write_text("".join(lines))
    return place


def ask(*arguments: str | Path, program: Any = evaluate) -> int:
    """`evaluate.py ARGUMENTS` within this process; returns its exit code."""
    common = () if program is export else ("--workers", "0", "--threads", "1")
    with threads(), alone():
        return program.main([*map(str, arguments), *common])


@contextlib.contextmanager
def threads() -> Iterator[None]:
    """Puts the number of torch's threads back."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence a program ended with."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line
