"""Storage that fails once, or twice, or stalls."""

import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from bevt_fast.data import faults
from tests.data import media
from tests.faults import making
from tests.training.command import losses, rows

FILES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "videos"
    place.mkdir()
    for k in range(FILES):
        media.video(place / f"{k}.avi", "mjpeg", frames=10 + k, size=(64, 64), pixel_format="yuvj420p")
    (place / "list.txt").write_text("".join(f"{k}.avi\n" for k in range(FILES)))
    return place


class Storage:
    """Opens videos; the file 2.avi fails the `fails` times it is opened after the first `works`."""

    def __init__(self, works: int, fails: int):
        self.works, self.fails, self.opened, self.open = works, fails, 0, av.open

    def __call__(self, path: Any, *arguments: Any, **keywords: Any) -> Any:
        if Path(path).name == "2.avi":
            self.opened += 1
            if self.works < self.opened <= self.works + self.fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return self.open(path, *arguments, **keywords)


# the first opening reads the header, the second the frames
@pytest.mark.parametrize("works", [0, 1])
def test_d15_one_fault_passes_two_are_quarantined(works: int, folder: Path, clips_only, here, monkeypatch) -> None:
    assert here(clips_only(folder, "good", train__steps=3)).code == 0
    expected = losses(folder.parent / "good")
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    results = {}
    for fails in (1, 2):
        for path in folder.iterdir():
            path.touch()  # headers are remembered by the date of the file
        monkeypatch.setattr(av, "open", Storage(works, fails))
        config = clips_only(folder, f"run{fails}", train__steps=3)
        assert here(config).code == 0
        results[fails] = losses(config.with_suffix("")), making.quarantined(config.with_suffix(""))
    assert results[1] == (expected, [])
    found, (record,) = results[2]
    assert record["path"].endswith("2.avi") and record["kind"] == "io" and "Input/output error" in record["reason"]
    assert len(found) == 3 and found != expected


def test_d15_with_dali_a_fault_is_no_crash_either(folder: Path, monkeypatch) -> None:
    """DALI is given the bytes of a file, which are read again: a passing fault changes no decoder and so no pixel."""
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    source = making.clips(folder, *(f"{k}.avi" for k in range(FILES)))
    expected, _ = making.read(making.given(decoder="dali"), source, 4)
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    failed = []

    def failing_once(path, mode):
        if Path(path).name == "2.avi" and not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return open(path, mode)

    monkeypatch.setattr(faults, "open", failing_once, raising=False)
    found, records = making.read(making.given(decoder="dali"), source, 4)
    assert failed and not records
    np.testing.assert_array_equal(found, expected)


def test_d15_images_are_tried_again_too(tmp_path: Path, monkeypatch) -> None:
    for k in range(3):
        Image.fromarray(media.picture(k)).save(tmp_path / f"{k}.png")
    source, config = making.images(tmp_path, "0.png", "1.png", "2.png"), making.given("images", batch=3)
    expected, _ = making.read(config, source, 1)
    opening, opened = Image.open, []

    def failing_once(path, *arguments):
        opened.append(path)
        if len(opened) in (1, 4):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opening(path, *arguments)

    monkeypatch.setattr(Image, "open", failing_once)
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    found, records = making.read(config, source, 1)
    assert not records and len(opened) == 8  # three headers, three pictures, and twice again
    np.testing.assert_array_equal(found, expected)


def test_d15_a_stall_is_waited_for_and_shows_in_the_data_wait(
    folder: Path, clips_only, here, monkeypatch, caplog
) -> None:
    begun = time.monotonic()
    assert here(clips_only(folder, "good")).code == 0
    # however slow the machine: as long as all of these steps, of which a few are read ahead
    stall = max(3.0, time.monotonic() - begun)
    opening, opened = av.open, []

    def stalling(path, *arguments, **keywords):
        # in the middle of the run on any machine: its 12 steps open 48 files and, where need be, six headers
        opened.append(path)
        if len(opened) == 30:
            (folder / "stalled").touch()
            time.sleep(stall)
        return opening(path, *arguments, **keywords)

    monkeypatch.setattr(av, "open", stalling)
    config = clips_only(folder, data__workers=1, train__steps=12)
    with caplog.at_level(logging.WARNING):
        assert here(config).code == 0
    output = config.with_suffix("")
    assert losses(output) == losses(folder.parent / "good")
    assert rows(output)[-1]["data/worker_restarts"] == 0 and not making.quarantined(output)
    shares = [line["perf/data_wait_frac"] for line in waits(output)]
    assert (folder / "stalled").exists() and max(shares) > 0.5
    assert "training waits for data" in caplog.text


def waits(output: Path) -> list[dict[str, Any]]:
    import json

    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/data_wait_frac" in line]
