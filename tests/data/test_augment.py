"""Training views: the same in all frames, inside the picture, decided by the generator alone."""

import random

import cv2
import numpy as np
import pytest

from bevt_fast.data import augment
from bevt_fast.data.augment import Box, Operation, Strong


def clip(frames: int = 3, side: int = 32, seed: int = 0) -> np.ndarray:
    """The same noise in all frames, so that a difference between frames is one of the treatment."""
    picture = np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8)
    return np.stack([picture] * frames)


def test_boxes_have_the_area_and_the_shape_that_were_asked_for():
    boxes = [augment.draw_box(256, 340, (0.08, 1.0), (3 / 4, 4 / 3), random.Random(seed)) for seed in range(500)]
    for top, left, height, width in boxes:
        assert 0 <= top <= 256 - height and 0 <= left <= 340 - width
        assert 0.07 < height * width / (256 * 340) <= 1 and 0.72 < width / height < 1.38
    areas = [box.height * box.width / (256 * 340) for box in boxes]
    assert 0.3 < np.mean(areas) < 0.55 and min(areas) < 0.12


def test_a_crop_that_never_fits_is_the_square_in_the_middle():
    assert augment.draw_box(10, 1000, (1.0, 1.0), (1.0, 1.0), random.Random(0)) == Box(0, 495, 10, 10)


def test_whole_pictures_of_the_right_size_pass_unchanged():
    pixels = clip()
    assert (augment.cut(pixels, 32, Box(0, 0, 32, 32), 32, flip=False) == pixels).all()
    assert (augment.cut(pixels, 32, Box(0, 0, 32, 32), 32, flip=True) == pixels[:, :, ::-1]).all()
    half = augment.cut(pixels, 64, Box(0, 0, 64, 64), 32, flip=False)
    assert half.shape == (3, 32, 32, 3)
    again = cv2.resize(cv2.resize(pixels[0], (64, 64)), (32, 32))
    assert (half[0] == again).all()


def test_erasing_follows_its_probability_and_its_limits():
    boxes = [augment.draw_erasing(224, 0.25, random.Random(seed)) for seed in range(2000)]
    erased = [box for box in boxes if box.height]
    assert 0.22 < len(erased) / len(boxes) < 0.28
    for top, left, height, width in erased:
        assert 0.019 < height * width / 224**2 < 0.34 and 0.29 < height / width < 3.4
        assert top + height <= 224 and left + width <= 224
    assert not any(augment.draw_erasing(224, 0.0, random.Random(seed)).height for seed in range(50))


def test_the_hidden_flip_and_crop_are_a_switch_that_changes_nothing_else():
    with_it = [augment.draw_strong(4, 7, True, random.Random(seed)) for seed in range(400)]
    without = [augment.draw_strong(4, 7, False, random.Random(seed)) for seed in range(400)]
    assert [strong.operations for strong in with_it] == [strong.operations for strong in without]
    assert 0.42 < np.mean([strong.flip for strong in with_it]) < 0.58
    assert not any(strong.flip or any(strong.crop) for strong in without)
    assert max(max(strong.crop) for strong in with_it) < 7 / 224
    assert {operation.name for strong in with_it for operation in strong.operations} == set(augment.OPERATIONS)
    assert len(augment.OPERATIONS) == 18 and all(len({o.name for o in s.operations}) == 4 for s in with_it)


def test_magnitude_seven_is_what_the_specification_says():
    drawn = [o for seed in range(400) for o in augment.draw_strong(4, 7, True, random.Random(seed)).operations]
    values = {name: {round(o.value, 3) for o in drawn if o.name == name} for name in augment.OPERATIONS}
    assert values["rotate"] == {-7.0, 7.0} and values["colour"] == {-0.21, 0.21}
    assert values["shear_x"] == {-4.011, 4.011} and values["translate_y"] == {-0.077, 0.077}
    assert values["cutout"] == {0.146} and values["identity"] == {0.0}
    ramp = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (1, 1, 1, 3)).reshape(1, 1, 256, 3)
    solarized = augment.strengthen(ramp, Strong(False, (0, 0, 0, 0), (Operation("solarize", 256 * 7 / 30),)))
    assert (solarized[0, 0, :197] == ramp[0, 0, :197]).all() and solarized[0, 0, 197, 0] == 255 - 197
    posterized = augment.strengthen(ramp, Strong(False, (0, 0, 0, 0), (Operation("posterize", 28 / 30),)))
    assert (posterized == ramp & 0b11111110).all()


@pytest.mark.parametrize("name", sorted(augment.OPERATIONS))
def test_every_operation_treats_all_frames_alike(name):
    magnitude = augment.MAGNITUDES.get(name, (0.0, False))[0] * 7 / 30
    strong = Strong(False, (0.0, 0.0, 0.0, 0.0), (Operation(name, magnitude, (0.5, 0.5)),))
    pixels = clip()
    treated = augment.strengthen(pixels, strong)
    assert treated.shape == pixels.shape and treated.dtype == np.uint8
    assert (treated == treated[:1]).all()
    assert (treated == pixels).all() == (name in ("identity", "autocontrast"))  # the noise has all contrast already


def test_moved_pictures_are_filled_with_grey():
    strong = Strong(False, (0.0, 0.0, 0.0, 0.0), (Operation("translate_x", 0.25),))
    moved = augment.strengthen(clip(1), strong)[0]
    assert (moved[:, :7] == 128).all() and (moved[:, 8:] == clip(1)[0][:, :-8]).all()
    cut = augment.strengthen(clip(1), Strong(False, (0.0, 0.0, 0.0, 0.0), (Operation("cutout", 0.25, (0.5, 0.5)),)))[0]
    assert (cut[12:20, 12:20] == 128).all() and (cut[:12] == clip(1)[0][:12]).all()


def test_mixing_is_beta_distributed_and_off_by_default():
    assert augment.draw_mix(0.0, random.Random(0)) == 1.0
    kept = [augment.draw_mix(0.8, random.Random(seed)) for seed in range(500)]
    assert 0.45 < np.mean(kept) < 0.55 and min(kept) < 0.1
