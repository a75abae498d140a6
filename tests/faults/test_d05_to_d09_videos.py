"""Videos that are short, irregular, turned, odd or of all sorts at once: the right pictures, whichever decoder."""

import logging
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bevt_fast.data import decode, loader
from tests.data import media
from tests.faults import making


@pytest.fixture(params=["pyav", "dali"])
def decoder(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return request.param


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    loader._warn.cache_clear()


def test_d05_a_short_video_is_looped_by_the_same_rule(decoder: str, tmp_path: Path) -> None:
    """Start 0, and frame k * stride modulo the length, as SPEC 6.7 says; one frame only where that is allowed."""
    for frames in (1, 2, 3, 9, 23):  # a span is 24
        name = f"{frames}.webm"
        media.video(tmp_path / name, "libvpx-vp9", frames=frames)
        source, config = making.clips(tmp_path, name, min_frames=1), making.given(decoder=decoder)
        batches, records = making.read(config, source, 1)
        for clip, draw in zip(batches[0], making.drawn(config, source, 1)):
            assert making.numbers(clip, draw, making.plain(), frames) == [3 * k % frames for k in range(8)]
        assert not records
    source = making.clips(tmp_path, "1.webm", "9.webm")
    _, records = making.read(making.given(decoder=decoder), source, 1)
    assert making.names(records) == {"1.webm": "too_short"}


TIMES = [0, 40, 80, 81, 90, 1500, 1501, *range(1600, 1600 + 33 * 7, 7)]  # bursts, and a hole of 1.4 s


def test_d06_of_a_variable_frame_rate_the_frames_are_right(decoder: str, tmp_path: Path) -> None:
    for name, codec, options in (("a.webm", "libvpx-vp9", {}), ("b.mp4", "libx264", {"bf": "2"})):
        path = media.video(tmp_path / name, codec, times=TIMES, options=options)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            unit = stream.time_base or 0
            shown = [round(1000 * float((frame.pts or 0) * unit)) for frame in container.decode(stream)]
        assert shown == TIMES  # the k-th frame is the one shown at the k-th time
        source, config = making.clips(tmp_path, name), making.given(decoder=decoder)
        batches, records = making.read(config, source, 2)
        assert not records
        draws = making.drawn(config, source, 2)
        assert len({tuple(draw.frames) for draw in draws}) > 1
        for clip, draw in zip(np.concatenate(batches), draws):
            assert making.numbers(clip, draw, making.plain()) == draw.frames


ODD: dict[str, dict[str, Any]] = {
    "turned90.mp4": {"codec": "libx264", "rotation": 90},
    "turned180.mp4": {"codec": "libx264", "rotation": 180},
    "turned270.mov": {"codec": "mjpeg", "rotation": 270, "pixel_format": "yuvj420p"},
    "odd.webm": {"codec": "libvpx-vp9", "size": (129, 171)},
    "odd.mkv": {"codec": "libx264", "size": (129, 171), "pixel_format": "yuv444p"},
    "422.mp4": {"codec": "libx264", "pixel_format": "yuv422p"},
    "422.webm": {"codec": "libvpx-vp9", "pixel_format": "yuv422p"},
    "422.avi": {"codec": "mjpeg", "pixel_format": "yuvj422p"},
    "444.webm": {"codec": "libvpx-vp9", "pixel_format": "yuv444p"},
    "10bit.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "10bit.mkv": {"codec": "libsvtav1", "pixel_format": "yuv420p10le", "options": {"preset": "12"}},
    "alpha8.webm": {"codec": "libvpx", "pixel_format": "yuva420p", "options": {"auto-alt-ref": "0"}},
    "alpha9.webm": {"codec": "libvpx-vp9", "pixel_format": "yuva420p"},
    "grey.mp4": {"codec": "libx264", "pixel_format": "gray"},
    "opengop.mp4": {"codec": "libx264", "options": {"x264-params": "open-gop=1:bframes=3:keyint=12"}},
    "refresh.mp4": {"codec": "libx264", "options": {"x264-params": "intra-refresh=1"}},
    "hiddenref.webm": {"codec": "libvpx-vp9", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name, settings in ODD.items():
        media.video(folder / name, **settings)
    return folder


def grey(number: int) -> np.ndarray:
    brightness = np.round(media.picture(number) @ (0.299, 0.587, 0.114))
    return np.repeat(brightness[..., None], 3, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", ODD)
def test_d07_odd_videos_show_the_right_picture(decoder: str, name: str, odd: Path) -> None:
    settings = ODD[name]
    size, rotation = settings.get("size", (64, 96)), settings.get("rotation", 0)
    source, config = making.clips(odd, name), making.given(decoder=decoder)
    batches, records = making.read(config, source, 2)
    assert not records
    golden = making.plain(size, rotation)
    if settings.get("pixel_format") == "gray":
        golden = grey
    for clip, draw in zip(np.concatenate(batches), making.drawn(config, source, 2)):
        assert making.numbers(clip, draw, golden) == draw.frames


def test_d08_a_codec_dali_lacks_goes_through_pyav_with_one_warning(tmp_path: Path, caplog) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    formats = [("mpeg4", "avi"), ("libx264", "mp4"), ("libvpx", "webm"), ("libvpx-vp9", "webm"), ("mpeg4", "mp4")]
    names = []
    for k, (codec, suffix) in enumerate([*formats, *formats]):
        names.append(f"{k}.{suffix}")
        media.video(tmp_path / names[-1], codec, frames=24)
    divx = tmp_path / "0.avi"
    divx.write_bytes(divx.read_bytes().replace(b"FMP4", b"DIVX").replace(b"fmp4", b"divx"))
    assert decode.probe(divx).codec == "mpeg4"
    source = making.clips(tmp_path, *names)
    with caplog.at_level(logging.WARNING):
        found, records = making.read(making.given(decoder="dali", workers=2), source, 6)
    said = [record.getMessage() for record in caplog.records if "DALI does not decode" in record.getMessage()]
    assert sorted(sentence.split()[4] for sentence in said) == ["h264", "mpeg4"]  # VP8 and VP9 it has
    assert not records
    expected, _ = making.read(making.given(), source, 6)
    for batch, other in zip(found, expected):
        media.assert_same_but_for_chroma(batch, other)


def test_d08_training_says_it_once_too(tmp_path: Path, clips_only, here, caplog) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    for k in range(3):
        media.video(tmp_path / f"{k}.avi", "mpeg4", frames=12)
    (tmp_path / "list.txt").write_text("0.avi\n1.avi\n2.avi\n")
    with caplog.at_level(logging.WARNING):
        assert here(clips_only(tmp_path, data__decoder="dali", train__steps=3)).code == 0
    said = [record.getMessage() for record in caplog.records]
    assert sum("mpeg4" in sentence for sentence in said) == 1, said


def test_d09_a_batch_of_all_sizes_and_orientations(decoder: str, tmp_path: Path) -> None:
    shapes = {"a.webm": (64, 96), "b.webm": (96, 64), "c.avi": (129, 171), "d.mp4": (200, 80), "e.webm": (480, 640)}
    for name, size in shapes.items():
        codec = {"avi": "mpeg4", "mp4": "libx264"}.get(name[2:], "libvpx-vp9")
        speed = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx-vp9" else {}
        media.video(tmp_path / name, codec, frames=26, size=size, options=speed)
    source = making.clips(tmp_path, *shapes)
    config = making.given(batch=5, decoder=decoder)
    batches, records = making.read(config, source, 1)
    assert not records and batches[0].shape == (5, 8, 64, 64, 3)
    draws = making.drawn(config, source, 1)
    assert {draw.index for draw in draws} == set(range(5))
    for clip, draw in zip(batches[0], draws):
        assert making.numbers(clip, draw, making.plain(shapes[str(source.paths[draw.index])]), 26) == draw.frames
