"""Test views against SPEC 6.6 and 6.7, and the temporal analysis of SPEC 6.8."""

import itertools
from dataclasses import replace

import cv2
import numpy as np
import pytest

from bevt_fast.config import Part
from bevt_fast.data import augment, decode, sampling, sources
from bevt_fast.data.sources import Frames
from bevt_fast.data.views import ViewReader, Views, frame_order, test_crops
from bevt_fast.errors import ConfigError, DataError
from tests.data.media import number, video


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two videos of numbered frames, wide and tall, and a file that is none."""
    root = tmp_path_factory.mktemp("views")
    video(root / "a_wide.mp4", "libx264", frames=40, size=(64, 96))
    video(root / "b_tall.mp4", "libx264", frames=9, size=(96, 64))
    (root / "c_bad.mp4").write_text("not a video")
    part = Part(name="file_list", options={"root": str(root), "frames": 4, "stride": 3})
    return replace(sources.build(part), labels=np.array([1, 0, 1]))


@pytest.mark.parametrize(
    ("height", "width", "crops", "expected"),
    [
        (240, 320, 1, [(16, 58)]),  # 256 x 341 pixels, the centre
        (240, 320, 3, [(0, 0), (0, 74), (0, 37)]),  # 224 x 299: s = 37
        (320, 240, 3, [(0, 0), (74, 0), (37, 0)]),
        (100, 100, 3, [(0, 0), (0, 0), (0, 0)]),
    ],
)
def test_crops_stand_where_the_specification_says(height, width, crops, expected):
    found = test_crops(height, width, Views(crops=crops, short_side=256 if crops == 1 else 224))
    assert [(crop.top, crop.left) for crop in found] == expected
    assert all(crop.size == 224 and not crop.flip and crop.jitter is None for crop in found)


def test_views_are_the_clips_and_crops_of_the_specification(source):
    views = Views(clips=2, crops=3, size=64, short_side=64)
    item = ViewReader(source, views)[0]
    assert item["index"] == 0 and item["label"] == 1 and item["bad"] is None
    assert item["pixels"].shape == (6, 4, 64, 64, 3) and item["pixels"].dtype.is_floating_point is False
    # L = 12, a = (40 - 12 + 1) / 2: starts floor(7.25) and floor(21.75)
    frames = [[7, 10, 13, 16], [21, 24, 27, 30]]
    for (clip, places), (crop, left) in itertools.product(enumerate(frames), enumerate((0, 32, 16))):
        expected = decode.read_frames(source.path(0), places)[:, :, left : left + 64]
        assert np.array_equal(item["pixels"][3 * clip + crop], expected)


def test_a_short_video_is_looped_and_a_large_one_resized_as_in_training(source):
    item = ViewReader(source, Views(size=32, short_side=40))[1]
    whole = decode.read_frames(source.path(1), [0, 3, 6, 0])
    pictures = [cv2.resize(frame, (40, 60), interpolation=cv2.INTER_LINEAR)[14:46, 4:36] for frame in whole]
    assert np.array_equal(item["pixels"][0], np.stack(pictures))


def test_a_test_and_a_training_view_of_the_same_frames_are_the_same_pixels(source):
    """Where training crops the middle and does not resize again."""
    view = ViewReader(source, Views(size=32, short_side=40))[0]["pixels"][0].numpy()
    places = sampling.test_clip_frames(40, Frames(4, 3, "interval"), 1)[0]
    frames = decode.read_frames(source.path(0), places)
    assert np.array_equal(view, augment.cut(frames, 40, augment.Box(4, 14, 32, 32), 32, flip=False))


def test_uniform_frames_are_the_middles_of_the_segments(source):
    uniform = replace(source, frames=Frames(4, 1, "uniform"))
    item = ViewReader(uniform, Views(crops=3, size=64, short_side=64))[0]
    # seg = 39 / 4: ends round(9.75), round(19.5) (half to even), round(29.25), 39
    assert [number(frame) for frame in whole(item["pixels"].numpy())] == [5, 15, 24, 34]
    with pytest.raises(ConfigError, match="one test clip a video, not 4"):
        ViewReader(uniform, Views(clips=4))


def whole(pixels: np.ndarray) -> np.ndarray:
    """The frames of a 64 x 96 video out of its left and right crops, (T, 64, 96, 3)."""
    return np.concatenate([pixels[0][:, :, :32], pixels[1]], axis=2)


def test_single_frame_and_shuffled_change_the_order_alone(source):
    views = Views(clips=2, crops=3, size=64, short_side=64)
    normal, single, shuffled = (
        ViewReader(source, views, temporal, seed=3)[0]["pixels"].numpy()
        for temporal in ("normal", "single_frame", "shuffled")
    )
    for clip in range(2):
        three = slice(3 * clip, 3 * clip + 3)
        before, still, mixed = ([number(f) for f in whole(part[three])] for part in (normal, single, shuffled))
        assert len(set(still)) == 1 and still[0] in before
        assert sorted(mixed) == sorted(before)
        for view in single[three]:
            assert all(np.array_equal(frame, view[0]) for frame in view)
    again = ViewReader(source, views, "shuffled", seed=3)[0]["pixels"].numpy()
    assert np.array_equal(again, shuffled)


def test_orders_are_drawn_evenly_and_by_key():
    drawn = [tuple(frame_order(3, "shuffled", 0, index)) for index in range(1200)]
    counts = [drawn.count(order) for order in itertools.permutations(range(3))]
    assert sum(counts) == 1200 and min(counts) > 140 and max(counts) < 260  # 200 each, 4.6 deviations
    single = [frame_order(4, "single_frame", 0, index)[0] for index in range(1200)]
    assert all(230 < single.count(k) < 370 for k in range(4))
    assert frame_order(16, "shuffled", 0, 5) != frame_order(16, "shuffled", 1, 5)
    assert frame_order(16, "shuffled", 0, 5, clip=1) != frame_order(16, "shuffled", 0, 5)
    assert frame_order(4, "normal", 0, 5) == [0, 1, 2, 3]


def test_what_is_no_video_is_named_and_has_no_pixels(source):
    item = ViewReader(source, Views(size=32, short_side=32))[2]
    assert item["pixels"].shape == (0, 4, 32, 32, 3)
    assert item["bad"]["path"].endswith("c_bad.mp4") and item["bad"]["kind"] in decode.KINDS and item["bad"]["reason"]


@pytest.mark.parametrize(
    ("views", "sentence"),
    [
        (Views(clips=0), "1 or more test clips"),
        (Views(crops=2), "1 or 3 crops, not 1 and 2"),
        (Views(size=256, short_side=224), "does not fit a short side of 224"),
        (Views(size=0), "a crop of 0 pixels"),
    ],
)
def test_impossible_views_are_refused(source, views, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ViewReader(source, views)


def test_sources_that_cannot_be_looked_at_are_refused(source):
    with pytest.raises(ConfigError, match="these are images"):
        ViewReader(replace(source, frames=None), Views())
    with pytest.raises(DataError, match="has no files"):
        ViewReader(source.take([]), Views())
    with pytest.raises(ConfigError, match="not 'reversed'"):
        ViewReader(source, Views(), "reversed")  # pyright: ignore[reportArgumentType]
