"""A tenth of the files is bad, workers and trainer are killed: the run trains on the same samples, to the last bit."""

import ctypes
import gc
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from bevt_fast.data import decode
from bevt_fast.training.run import Run
from tests.data import media
from tests.faults import making
from tests.training.command import losses, rows

STEPS = 15  # of 4 clips: every file once
KINDS = {
    "truncated.mp4": "truncated",
    "flipped.mp4": "corrupt",
    "empty.mp4": "empty",
    "text.mp4": "unreadable",
    "sound.mp4": "no_video",
    "missing.mp4": "missing",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 files, six of which are bad, each in another way."""
    place = tmp_path_factory.mktemp("load")
    for k in range(6):
        media.video(place / f"{k}.mp4", "mpeg4", frames=8 + 3 * k, size=(64, 64))
    for k in range(6, 54):
        (place / f"{k}.mp4").write_bytes((place / f"{k % 6}.mp4").read_bytes())
    making.cut(media.video(place / "truncated.mp4", "libx264", size=(64, 64)))
    making.flip_frames(media.video(place / "flipped.mp4", "libx264", size=(64, 64)))
    (place / "empty.mp4").write_bytes(b"")
    (place / "text.mp4").write_text("<html>404 not found</html>" * 99)
    media.sound(place / "sound.mp4")
    names = [*(f"{k}.mp4" for k in range(54)), *KINDS]
    random.Random(0).shuffle(names)
    (place / "list.txt").write_text("".join(f"{name}\n" for name in names))
    return place


@pytest.fixture
def run(folder: Path, clips_only):
    def write(output: str, **changes) -> Path:
        return clips_only(folder, output, **{"train__steps": STEPS, "train__save_every": 5} | changes)

    return write


@pytest.fixture(scope="module")
def expected() -> dict:
    """What the first run of this module gave, for the others to be compared with."""
    return {}


def result(config: Path) -> tuple[list[float], bytes, list[dict]]:
    """Losses, final weights, and the quarantine in the order of its paths."""
    output = config.with_suffix("")
    weights = (output / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()
    return losses(output), weights, sorted(making.quarantined(output), key=lambda record: record["path"])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.timeout(120)
def test_a_tenth_of_bad_files_changes_nothing_from_run_to_run(workers: int, run, here, expected) -> None:
    config = run("run", data__workers=workers)
    assert here(config).code == 0
    assert multiprocessing.active_children() == []
    found = result(config)
    assert len(found[0]) == STEPS
    assert making.names(found[2]) == KINDS and len(found[2]) == len(KINDS)  # each once
    assert found == expected.setdefault("run", found)


@pytest.mark.timeout(180)
def test_killed_workers_and_a_killed_trainer_change_no_sample(run, here, background, monkeypatch, expected) -> None:
    rng = random.Random(1)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "micro_batches", killing_workers({rng.randrange(2, STEPS - 4) for _ in range(2)}))
        config = run("workers", data__workers=1)
        assert here(config).code == 0
    assert 1 <= rows(config.with_suffix(""))[-1]["data/worker_restarts"] <= 2
    found = result(config)
    assert found == expected.setdefault("run", found)

    config = run("trainer", data__workers=1)
    kill_at(background("--config", config), config.with_suffix("") / "log.jsonl", rng.randrange(6, STEPS - 2))
    assert len(losses(config.with_suffix(""))) < STEPS
    assert here(config, "--resume", "auto").code == 0
    assert result(config) == expected["run"]


class Heap(ctypes.Structure):
    """What glibc's mallinfo2 returns, malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used f g".split()]


@pytest.mark.parametrize("codec, name", [("libx264", "a.mp4"), ("libvpx-vp9", "a.webm"), ("mpeg4", "a.avi")])
def test_reading_clips_keeps_no_memory(codec: str, name: str, tmp_path: Path) -> None:
    """A container that is left half-way must give all back: 150 bytes a clip are gigabytes in a long run."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("needs glibc 2.33")
    mallinfo.restype = Heap
    path = media.video(tmp_path / name, codec, frames=12, options={"bf": "0"} if codec == "libx264" else {})

    def used_after(clips: int) -> int:
        for _ in range(clips):
            decode.read_frames(path, [1, 5])
        gc.collect()
        heap = mallinfo()
        return heap.used + heap.mapped

    used_after(100)  # caches fill
    before = used_after(100)
    growth = used_after(400) - before
    assert growth < 400 * 50, f"{growth / 400:.0f} bytes a clip"


def killing_workers(steps: set[int]):
    """`Run.micro_batches`, with a worker killed before each of these steps."""
    micro_batches = Run.micro_batches

    def spoilt(run: Run, step: int):
        if step in steps and (children := multiprocessing.active_children()):
            os.kill(children[0].pid or 0, signal.SIGKILL)
        return micro_batches(run, step)

    return spoilt


def kill_at(trainer, log: Path, step: int) -> None:
    """Kill the trainer, and nobody else, once it has logged a step."""
    deadline = time.monotonic() + 100
    while not (log.exists() and any(json.loads(line)["step"] >= step for line in whole_lines(log))):
        assert trainer.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    trainer.kill()
    trainer.wait()


def whole_lines(log: Path) -> list[str]:
    return log.read_text().rpartition("\n")[0].splitlines()
