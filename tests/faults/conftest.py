"""A tiny run on files of one's own, and no process that outlives a test."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.training.conftest import background, here, settings, tiny

__all__ = ["background", "here", "settings", "tiny"]


@pytest.fixture(autouse=True)
def _no_process_is_left():
    before = set(psutil.Process().children(recursive=True))
    yield
    deadline = time.monotonic() + 10
    while left := set(psutil.Process().children(recursive=True)) - before:
        assert time.monotonic() < deadline, f"processes are left: {left}"
        time.sleep(0.05)


@pytest.fixture
def clips_only(settings: Callable[..., Path]) -> Callable[..., Path]:
    """The tiny run on the videos that `list.txt` in a folder names: 4 clips of 4 frames a step, all on one process."""

    def write(folder: Path, output: str = "run", **changes: Any) -> Path:
        options = {"root": str(folder), "list": "list.txt", "frames": 4, "stride": 2}
        alone = {"images": None, "clips.source": {"name": "file_list", "options": options}, "clips.heldout": None}
        return settings(alone | {key.replace("__", "."): value for key, value in changes.items()}, output=output)

    return write
