"""Masks against a literal transcription of SPEC 2.1 and 2.3, and the statistics measured on the official code."""

import math
import pickle
import random

import numpy as np
import pytest

from bevt_fast.config import Part
from bevt_fast.data import masking
from bevt_fast.data.masking import blockwise, frame_diff, random_3d, random_frame, tube
from bevt_fast.errors import ConfigError

GRID = (14, 14)
MASKS = 20_000  # as many as the published statistics were taken from


def spec_blockwise(grid, target, min_block, rng, max_block=None):
    """SPEC 2.1 word by word, on nested lists."""
    rows, columns = grid
    mask = [[False] * columns for _ in range(rows)]
    count = 0
    while count < target:
        room = min(target - count, max_block or target)
        added = 0
        for _ in range(10):
            area = rng.uniform(min_block, room)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h = round(math.sqrt(area * aspect))
            w = round(math.sqrt(area / aspect))
            if w < columns and h < rows:
                top = rng.randint(0, rows - h)
                left = rng.randint(0, columns - w)
                cells = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
                new = sum(not mask[i][j] for i, j in cells)
                if 0 < new <= room:
                    for i, j in cells:
                        mask[i][j] = True
                    added = new
            if added > 0:
                break
        if added == 0:
            break
        count += added
    return np.array(mask)


def spec_tube(steps, grid, target, min_block, length, rng):
    """SPEC 2.3 word by word."""
    plane = spec_blockwise(grid, target, min_block, rng)
    start = rng.randint(0, steps - 1)
    run = rng.randint(max(int(length[0] * steps), 1), min(int(length[1] * steps), steps))
    mask = np.zeros((steps, *grid), dtype=bool)
    for t in range(start, start + run):
        mask[t % steps] = plane
    return mask


def assert_agrees(values, published, half_unit):
    """The mean of `values` is within three standard errors of a mean of as many draws, printed to `half_unit`."""
    values = np.asarray(values, dtype=float)
    standard_error = math.sqrt(2) * values.std() / math.sqrt(len(values))
    assert abs(values.mean() - published) <= 3 * standard_error + half_unit


@pytest.fixture(scope="module")
def planes():
    rng = random.Random(1)
    return np.stack([blockwise.sample(grid=GRID, target=98, min_block=16, rng=rng) for _ in range(MASKS)])


@pytest.fixture(scope="module")
def tubes():
    rng = random.Random(2)
    return np.stack([tube.sample(steps=8, grid=GRID, target=98, min_block=16, rng=rng) for _ in range(MASKS)])


@pytest.mark.parametrize(
    ("grid", "target", "min_block"),
    [
        ((14, 14), 78, 16),
        ((14, 14), 98, 16),
        ((14, 14), 118, 16),
        ((14, 14), 137, 16),
        ((6, 6), 18, 4),
        ((5, 9), 30, 3),
    ],
)
def test_blockwise_draws_as_the_spec_says(grid, target, min_block):
    ours, theirs = random.Random(3), random.Random(3)
    for _ in range(200):
        mask = blockwise.sample(grid=grid, target=target, min_block=min_block, rng=ours)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, spec_blockwise(grid, target, min_block, theirs))
    assert ours.getstate() == theirs.getstate()


@pytest.mark.parametrize(("steps", "length"), [(8, (0.5, 1.0)), (8, (0.25, 0.75)), (8, (1.0, 1.0)), (4, (0.5, 1.0))])
def test_tube_draws_as_the_spec_says(steps, length):
    ours, theirs = random.Random(4), random.Random(4)
    for _ in range(200):
        mask = tube.sample(steps=steps, grid=(6, 6), target=18, min_block=4, length=length, rng=ours)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, spec_tube(steps, (6, 6), 18, 4, length, theirs))
    assert ours.getstate() == theirs.getstate()


def test_blockwise_count_statistics(planes):
    counts = planes.sum(axis=(1, 2))
    assert counts.max() == 98
    assert_agrees(counts, 97.53, 0.005)
    assert_agrees(counts == 98, 0.697, 0.0005)
    # the standard error of a standard deviation, from the fourth moment
    deviations = counts - counts.mean()
    variance = np.mean(deviations**2)
    standard_error = math.sqrt((np.mean(deviations**4) - variance**2) / (4 * variance * MASKS))
    assert abs(math.sqrt(variance) - 0.93) <= 3 * math.sqrt(2) * standard_error + 0.005


def test_blockwise_coverage_is_heavy_in_the_centre(planes):
    assert_agrees(planes[:, 5:9, 5:9].mean(axis=(1, 2)), 0.84, 0.005)
    assert_agrees(planes[:, [0, -1]].mean(axis=(1, 2)), 0.19, 0.005)
    assert_agrees(planes[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1), 0.06, 0.005)


def test_tube_statistics(tubes):
    hidden = tubes.any(axis=(2, 3))
    lengths = hidden.sum(axis=1)
    assert set(lengths) == {4, 5, 6, 7, 8}
    for length in range(4, 9):
        share = np.mean(lengths == length)
        assert abs(share - 1 / 5) <= 3 * math.sqrt(1 / 5 * 4 / 5 / MASKS)
    wraps = hidden[:, 0] & hidden[:, -1] & (lengths < 8)
    # starts that wrap: length - 1 of 8, for lengths 4 to 7 of five equally likely ones
    assert abs(wraps.mean() - (3 + 4 + 5 + 6) / 8 / 5) <= 3 * math.sqrt(0.45 * 0.55 / MASKS)
    assert_agrees(tubes.mean(axis=(1, 2, 3)), 0.374, 0.0005)


def test_max_block_bounds_every_block():
    ours, theirs = random.Random(5), random.Random(5)
    for _ in range(200):
        mask = blockwise.sample(grid=GRID, target=98, min_block=4, max_block=9, rng=ours)
        np.testing.assert_array_equal(mask, spec_blockwise(GRID, 98, 4, theirs, max_block=9))


@pytest.mark.parametrize(("ratio", "cells"), [(0.4, 78), (0.5, 98), (0.6, 118), (0.7, 137)])
def test_ratios_of_table_8_never_exceed_their_target(ratio, cells):
    draw = masking.build(Part(name="blockwise", options={"ratio": ratio}))
    rng = random.Random(6)
    counts = [int(draw(GRID, None, rng).sum()) for _ in range(300)]
    assert max(counts) == cells


def test_random_3d_hides_an_exact_share_evenly():
    draw = masking.build(Part(name="random_3d"))
    rng = random.Random(7)
    masks = np.stack([draw(GRID, 8, rng) for _ in range(400)])
    assert masks.shape == (400, 8, *GRID)
    assert masks.dtype == bool
    assert (masks.sum(axis=(1, 2, 3)) == 784).all()
    # chi-square over the cells: each mask is half of them without replacement, so the sum has n - 1 degrees of freedom
    cells = masks[0].size
    frequency = masks.sum(axis=0)
    statistic = ((frequency - 200) ** 2 / (400 * 0.25)).sum() * (cells - 1) / cells
    assert abs(statistic - (cells - 1)) <= 3 * math.sqrt(2 * (cells - 1))
    image = draw((6, 6), None, rng)
    assert image.shape == (6, 6)
    assert image.sum() == 18
    assert random_3d.sample(grid=(3, 3), target=4, rng=rng).sum() == 4


def test_frame_diff_hides_the_steps_of_the_tube_with_fresh_masks():
    for seed in range(50):
        settings = {"steps": 8, "grid": GRID, "target": 98, "min_block": 16}
        same = tube.sample(**settings, rng=random.Random(seed))
        mask = frame_diff.sample(**settings, rng=random.Random(seed))
        hidden = mask.any(axis=(1, 2))
        np.testing.assert_array_equal(hidden, same.any(axis=(1, 2)))
        planes = {plane.tobytes() for plane in mask[hidden]}
        assert len(planes) == hidden.sum()
        assert mask.sum(axis=(1, 2)).max() <= 98


def test_random_frame_scatters_one_mask():
    rng = random.Random(8)
    masks = [random_frame.sample(steps=8, grid=GRID, target=98, min_block=16, rng=rng) for _ in range(5000)]
    hidden = np.stack([mask.any(axis=(1, 2)) for mask in masks])
    for mask, steps in zip(masks, hidden, strict=True):
        assert (mask[steps] == mask[steps][0]).all()
    lengths = hidden.sum(axis=1)
    assert set(lengths) == {4, 5, 6, 7, 8}
    # a step is hidden with probability 6 / 8 wherever it stands
    assert (abs(hidden.mean(axis=0) - 0.75) <= 3 * math.sqrt(0.75 * 0.25 / len(masks))).all()
    # of the 70 ways to choose four steps, 8 are cyclic runs
    four = hidden[lengths == 4]
    runs = (four != np.roll(four, 1, axis=1)).sum(axis=1) == 2
    assert abs(runs.mean() - 8 / 70) <= 3 * math.sqrt(8 / 70 * 62 / 70 / len(four))


@pytest.mark.parametrize("name", ["tube", "frame_diff", "random_frame"])
def test_clip_strategies_obey_their_options_and_refuse_images(name):
    draw = masking.build(Part(name=name, options={"ratio": 0.25, "min_block": 2, "length": [0.25, 0.5]}))
    draw = pickle.loads(pickle.dumps(draw))  # noqa: S301 -- what reaches the loader's processes
    rng = random.Random(9)
    masks = [draw((6, 6), 8, rng) for _ in range(200)]
    assert {int(mask.any(axis=(1, 2)).sum()) for mask in masks} == {2, 3, 4}
    assert max(int(plane.sum()) for mask in masks for plane in mask) == 9
    with pytest.raises(ConfigError, match=f"{name} masking is for clips"):
        draw((6, 6), None, rng)


def test_blockwise_refuses_clips():
    with pytest.raises(ConfigError, match="blockwise masking is for images"):
        masking.build(Part(name="blockwise"))(GRID, 8, random.Random(0))


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("blockwise", {"ratio": 0.0}, "ratio"),
        ("blockwise", {"ratio": 1.0}, "ratio"),
        ("blockwise", {"min_block": 0}, "min_block"),
        ("blockwise", {"length": [0.5, 1.0]}, "no key 'length'"),
        ("tube", {"length": [0.0, 1.0]}, "length must be a range"),
        ("tube", {"length": [0.8, 0.5]}, "length must be a range"),
        ("frame_diff", {"length": [0.5, 1.5]}, "length must be a range"),
        ("random_frame", {"ratio": -1}, "ratio"),
        ("random_3d", {"min_block": 4}, "no key 'min_block'"),
        ("tubes", {}, "did you mean 'tube'"),
    ],
)
def test_wrong_options_are_refused(name, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        masking.build(Part(name=name, options=options))


def test_no_strategy_is_without_a_step_to_hide():
    for seed in range(20):
        mask = tube.sample(steps=2, grid=(6, 6), target=18, min_block=4, length=(0.25, 0.4), rng=random.Random(seed))
        assert mask.any(axis=(1, 2)).sum() == 1
