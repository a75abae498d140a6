"""Frames damaged in the middle of a clip: another sample, the frame before, or the end of the run, as the user says."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.error import MemoryError as MemoryOfFFmpeg

from bevt_fast.data import decode
from bevt_fast.errors import ConfigError
from tests.data import media
from tests.faults import making

SQUARE = (64, 64)
# every fifth frame of 40 is the one clip there is; packet 25 is damaged, and the next keyframe is frame 36
WHOLE, DAMAGED = list(range(0, 40, 5)), [25, 30, 35]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A damaged and a good video, in two formats: DALI decodes one of them without a GPU."""
    place = tmp_path_factory.mktemp("damaged")
    for name, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9")):
        good = media.video(place / f"good.{name}", codec, size=SQUARE)
        bad = place / f"bad.{name}"
        bad.write_bytes(good.read_bytes())
        making.spoil(bad, 25)
        with pytest.raises(decode.BadFile):
            decode.read_frames(bad, DAMAGED)
    return place


def read(folder: Path, name: str, on_damage: str, **data):
    config = making.given(on_damage=on_damage, **data)
    source = making.clips(folder, f"bad.{name}", f"good.{name}", count=8, stride=5)
    batches, records = making.read(config, source, 3)
    draws = making.drawn(config, source, 3)
    shown = [
        making.numbers(clip, draw, making.plain(SQUARE))
        for clip, draw in zip((clip for batch in batches for clip in batch), draws)
    ]
    return [(str(source.paths[draw.index]), frames) for draw, frames in zip(draws, shown)], records


@pytest.mark.parametrize("name", ["mp4", "webm"])
@pytest.mark.parametrize("decoder, workers", [("pyav", 0), ("pyav", 2), ("dali", 1)])
def test_d02_the_three_policies(folder: Path, name: str, decoder: str, workers: int) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    found, records = read(folder, name, "quarantine", decoder=decoder, workers=workers)
    assert [frames for _, frames in found] == [WHOLE] * 6  # the damaged one's are those of the other video
    assert making.names(records) == {f"bad.{name}": "corrupt"}
    assert all(record["substitute"] != record["index"] for record in records)

    found, records = read(folder, name, "use_previous", decoder=decoder, workers=workers)
    repeated = [frame if frame not in DAMAGED else 20 for frame in WHOLE]
    for file, frames in found:
        assert frames == (repeated if file.startswith("bad") else WHOLE), file
    assert making.names(records) == {f"bad.{name}": "corrupt"}  # it is said all the same
    assert all(record["substitute"] == record["index"] for record in records)


def test_d02_what_comes_before_the_first_good_frame_repeats_that(tmp_path: Path) -> None:
    bad = making.spoil(media.video(tmp_path / "bad.mp4", "libx264", size=SQUARE), 12)
    config, source = making.given(on_damage="use_previous"), making.clips(tmp_path, "bad.mp4", count=8, stride=3)
    source = dataclasses.replace(source, extents=np.array([[13, 24]]))  # frames 13 to 36
    with pytest.raises(decode.BadFile):
        decode.read_frames(bad, [13])
    batches, _ = making.read(config, source, 1)
    draw = making.drawn(config, source, 1)[0]
    shown = making.numbers(batches[0][0], draw, making.plain(SQUARE))
    assert shown == [25, 25, 25, 25, 25, 28, 31, 34]  # 24 is the next keyframe; 13, 16, 19 and 22 are damaged


@pytest.mark.parametrize("workers", [0, 1])
def test_d02_fail_ends_the_run_and_names_the_file(folder: Path, workers: int, clips_only, here) -> None:
    (folder / "list.txt").write_text("bad.mp4\ngood.mp4\n")
    settings = {"clips__source__options__frames": 8, "clips__source__options__stride": 5}
    config = clips_only(folder, data__on_damage="fail", data__workers=workers, **settings)
    done = here(config)
    assert done.code == 3 and "Traceback" not in done.error
    sentence = done.error.splitlines()[-1]
    assert sentence.startswith("error: ") and str(folder / "bad.mp4") in sentence and "data.on_damage" in sentence
    assert making.names(making.quarantined(config.with_suffix(""))) == {"bad.mp4": "corrupt"}


def test_d02_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"on_damage: expected one of 'quarantine', 'use_previous', 'fail'"):
        making.given(on_damage="ignore")


@pytest.mark.parametrize("on_damage", ["quarantine", "use_previous"])
def test_d02_damage_of_any_kind_kills_no_process(tmp_path: Path, on_damage: str) -> None:
    """Bits flipped all over files of five codecs, read by a process whose death would be seen."""
    good = media.video(tmp_path / "good.avi", "mjpeg", size=SQUARE, pixel_format="yuvj420p")
    formats = [("libx264", "mp4"), ("libvpx-vp9", "webm"), ("libvpx", "webm"), ("mpeg4", "avi"), ("mjpeg", "avi")]
    files = [good.name]
    for codec, suffix in formats:
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        whole = media.video(tmp_path / f"{codec}.{suffix}", codec, size=SQUARE, pixel_format=pixels)
        for seed in range(4):
            copy = tmp_path / f"{codec}{seed}.{suffix}"
            copy.write_bytes(whole.read_bytes())
            making.flip(copy, seed, every=400 >> seed)
            files.append(copy.name)
    source = making.clips(tmp_path, *files)
    batches, records = making.read(making.given(batch=4, workers=1, on_damage=on_damage), source, 10)
    assert len(batches) == 10 and records
    assert all(record["kind"] in decode.KINDS for record in records)


def test_d02_a_file_that_claims_more_than_any_memory_holds_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As FFmpeg says it; where Python has no memory left, no file is to blame."""
    path = media.video(tmp_path / "good.avi", "mjpeg", size=SQUARE, pixel_format="yuvj420p")

    def of(error: MemoryError) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise error

        return fail

    monkeypatch.setattr(av, "open", of(MemoryOfFFmpeg(errno.ENOMEM, "Cannot allocate memory", str(path))))
    with pytest.raises(decode.BadFile, match="Cannot allocate memory") as found:
        decode.probe(path)
    assert found.value.kind == "unreadable"
    monkeypatch.setattr(av, "open", of(MemoryError()))
    with pytest.raises(MemoryError):
        decode.probe(path)
