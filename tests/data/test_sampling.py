"""Sampling against the formulas of SPEC 5.2, 5.3 and 6.7, written out again with numpy."""

import math
import random
import subprocess
import sys

import numpy as np
import pytest

from bevt_fast.config import View
from bevt_fast.data import sampling
from bevt_fast.data.sources import Frames
from bevt_fast.errors import ConfigError, DataError


class Scripted(random.Random):
    """A generator whose draws are written down beforehand."""

    def __new__(cls, *draws: float):
        return super().__new__(cls)

    def __init__(self, *draws: float):
        super().__init__()
        self.draws = list(draws)

    def random(self) -> float:
        return self.draws.pop(0)


LOWEST, HIGHEST = 0.0, math.nextafter(1.0, 0.0)


def test_random_for_depends_on_the_key_alone_and_on_all_of_it():

    assert sampling.random_for(0, "clips", 3).random() == sampling.random_for(0, "clips", np.int64(3)).random()
    keys = [(0,), ("0",), (0, 0), (1, 0), (0, 1), (10,), ("ab", "c"), ("a", "bc"), ("abc",), (-1,), ("",), ("", "")]
    assert len({sampling.random_for(*key).random() for key in keys}) == len(keys)


def test_another_process_with_another_hash_seed_draws_the_same():
    program = (
        "from bevt_fast.data import sampling as s;"
        "print(s.random_for(7, 'clips', 2).random(), s.permutation(7, 'clips', 2, 1000).tolist(), s.jitter_order(7))"
    )
    expected = (
        sampling.random_for(7, "clips", 2).random(),
        sampling.permutation(7, "clips", 2, 1000).tolist(),
        sampling.jitter_order(7),
    )
    for hash_seed in ("1", "2"):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == " ".join(map(str, expected))


def test_permutations_are_permutations_and_differ():
    seen = set()
    for seed, stream, epoch in [(0, "clips", 0), (0, "clips", 1), (0, "images", 0), (1, "clips", 0)]:
        order = sampling.permutation(seed, stream, epoch, 257)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(257))
        seen.add(tuple(order.tolist()))
    assert len(seen) == 4
    with pytest.raises(ValueError, match="read-only"):
        sampling.permutation(0, "clips", 0, 257)[0] = 1


def test_every_order_of_three_is_equally_likely():
    draws = 6000
    counts = {}
    for epoch in range(draws):
        order = tuple(sampling.permutation(0, "x", epoch, 3).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    deviation = math.sqrt(draws * (1 / 6) * (5 / 6))
    assert all(abs(count - draws / 6) <= 3 * deviation for count in counts.values())


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_place_visits_every_sample_once_a_pass(n):
    for epoch in range(5):
        places = [sampling.place(3, "images", epoch * n + offset, n) for offset in range(n)]
        assert {p.epoch for p in places} == {epoch}
        assert sorted(p.index for p in places) == list(range(n))


def test_place_does_not_depend_on_what_was_asked_before():
    forward = [sampling.place(3, "clips", position, 13) for position in range(200)]
    shuffled = list(range(200))
    random.Random(0).shuffle(shuffled)
    assert {p: sampling.place(3, "clips", p, 13) for p in shuffled} == dict(enumerate(forward))
    assert sampling.place(3, "clips", 13 * 10**9 + 4, 13).epoch == 10**9
    for position, n in [(-1, 5), (0, 0)]:
        with pytest.raises(ValueError, match="does not exist"):
            sampling.place(0, "clips", position, n)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 24), (2, 6), (3, 4), (8, 3), (24, 1), (4, 2)])
def test_a_step_has_the_same_positions_on_any_number_of_processes(world_size, micro_batch):
    batch = 24
    accumulation = batch // (world_size * micro_batch)
    for step in (0, 1, 17):
        in_order = []
        for micro in range(accumulation):
            for rank in range(world_size):
                in_order += sampling.micro_batch_positions(
                    step, micro, rank, accumulation=accumulation, world_size=world_size, micro_batch=micro_batch
                )
        assert in_order == list(range(step * batch, (step + 1) * batch))


def test_a_rank_or_micro_batch_that_does_not_exist_is_refused():
    for micro, rank in [(2, 0), (0, 4), (-1, 0), (0, -1)]:
        with pytest.raises(ValueError, match="do not exist"):
            sampling.micro_batch_positions(0, micro, rank, accumulation=2, world_size=4, micro_batch=1)


# (frames in the file, clip length, stride)
VIDEOS = [(n, c, s) for n in (1, 2, 5, 16, 31, 32, 127, 128, 129, 300) for c, s in ((16, 8), (32, 2), (16, 1), (2, 4))]


@pytest.mark.parametrize("total, count, stride", VIDEOS)
def test_interval_clips_start_anywhere_they_fit_and_loop(total, count, stride):
    frames = Frames(count, stride, "interval")
    span = total - count * stride + 1
    starts = range(span) if span > 0 else range(1)
    expected = [[(start + k * stride) % total for k in range(count)] for start in starts]
    # a draw in the middle of each of the `span` equal shares of [0, 1) gives each start in turn
    draws = [(start + 0.5) / len(starts) for start in starts]
    assert [sampling.clip_frames(total, frames, Scripted(draw)) for draw in draws] == expected
    assert sampling.clip_frames(total, frames, Scripted(HIGHEST)) == expected[-1]


def test_interval_starts_are_uniform():
    rng, draws, span = random.Random(1), 10000, 5
    counts = np.bincount([sampling.clip_frames(20, Frames(16, 1), rng)[0] for _ in range(draws)], minlength=span)
    assert len(counts) == span
    assert np.all(np.abs(counts - draws / span) <= 3 * math.sqrt(draws * (1 / span) * (1 - 1 / span)))


@pytest.mark.parametrize("total, count, stride", VIDEOS)
def test_uniform_clips_take_one_frame_of_each_segment(total, count, stride):
    segments = (total - 1) / count
    first = np.round(segments * np.arange(count)).astype(int)
    last = np.round(segments * np.arange(1, count + 1)).astype(int)
    frames = Frames(count, stride, "uniform")
    assert sampling.clip_frames(total, frames, Scripted(*[LOWEST] * count)) == first.tolist()
    assert sampling.clip_frames(total, frames, Scripted(*[HIGHEST] * count)) == last.tolist()
    assert sampling.test_clip_frames(total, frames) == [((first + last) // 2).tolist()]
    assert 0 <= first.min() and last.max() <= total - 1


def test_uniform_segments_round_half_to_even():
    # (11 - 1) / 4 = 2.5: ends 0, 2.5 -> 2, 5, 7.5 -> 8, 10
    assert sampling.test_clip_frames(11, Frames(4, 1, "uniform")) == [[1, 3, 6, 9]]


@pytest.mark.parametrize("clips", [1, 2, 4, 10])
@pytest.mark.parametrize("total, count, stride", VIDEOS)
def test_interval_test_clips_are_spread_evenly(total, count, stride, clips):
    length = count * stride
    offsets = np.zeros(clips, dtype=int)
    if total > length - 1:
        average = (total - length + 1) / clips
        offsets = (np.arange(clips) * average + average / 2).astype(int)
    expected = [((start + np.arange(count) * stride) % total).tolist() for start in offsets]
    assert sampling.test_clip_frames(total, Frames(count, stride), clips) == expected


def test_what_cannot_be_drawn_is_refused():
    for frames in (Frames(16, 8, "interval"), Frames(16, 8, "uniform")):
        with pytest.raises(ValueError, match="no frames"):
            sampling.clip_frames(0, frames, random.Random(0))
    with pytest.raises(ConfigError, match="one test clip a video, not 4"):
        sampling.test_clip_frames(100, Frames(16, 8, "uniform"), 4)


def test_a_crop_rescales_as_mmcv_and_stays_inside():
    rng, picture = random.Random(0), random.Random(1)
    for _ in range(3000):
        height, width = picture.randint(1, 2000), picture.randint(1, 2000)
        size = picture.choice([32, 64, 224])
        low = size + picture.randint(0, 40)
        crop = sampling.draw_crop(height, width, View(size=size, short_side=(low, low + picture.randint(0, 64))), rng)
        short = min(crop.height, crop.width)
        assert low <= short <= low + 64
        scale = short / min(height, width)
        assert (crop.height, crop.width) == (int(height * scale + 0.5), int(width * scale + 0.5))
        for offset, side in ((crop.top, crop.height), (crop.left, crop.width)):
            # exclusive upper end: randint(0, side - size); no room, no offset
            assert 0 <= offset < side - size or (side == size and offset == 0)
        assert crop.size == size and crop.jitter is None


def test_the_ends_of_every_crop_draw():
    view = View(size=224, short_side=(256, 320), flip=0.5, colour_jitter=0.4)
    low = sampling.draw_crop(240, 320, view, Scripted(*[LOWEST] * 7))
    assert low[:6] == (256, 341, 0, 0, 224, True)  # 320 * 256 / 240 = 341.33
    assert low.jitter == pytest.approx((0.6, 0.6, 0.6), abs=1e-12)
    high = sampling.draw_crop(240, 320, view, Scripted(*[HIGHEST] * 7))
    assert high[:6] == (320, 427, 320 - 224 - 1, 427 - 224 - 1, 224, False)  # 320 * 320 / 240 = 426.67
    assert high.jitter == pytest.approx((1.4, 1.4, 1.4), abs=1e-12)
    exact = sampling.draw_crop(100, 100, View(size=224, short_side=(224, 224)), Scripted(*[HIGHEST] * 7))
    assert exact[:5] == (224, 224, 0, 0, 224)


def test_short_side_flip_and_jitter_are_uniform():
    view, draws = View(short_side=(256, 320), flip=0.25, colour_jitter=0.4), 6500
    rng = random.Random(5)
    crops = [sampling.draw_crop(360, 480, view, rng) for _ in range(draws)]
    shorts = np.array([crop.height for crop in crops])
    assert set(shorts.tolist()) == set(range(256, 321))
    assert abs(shorts.mean() - 288) <= 3 * math.sqrt((65**2 - 1) / 12 / draws)
    assert abs(np.mean([crop.flip for crop in crops]) - 0.25) <= 3 * math.sqrt(0.25 * 0.75 / draws)
    jitter = np.array([crop.jitter for crop in crops])
    assert np.all((jitter >= 0.6) & (jitter <= 1.4))
    assert np.all(np.abs(jitter.mean(axis=0) - 1) <= 3 * 0.8 / math.sqrt(12 * draws))
    assert np.all(np.abs(np.corrcoef(jitter.T)[np.triu_indices(3, 1)]) <= 3 / math.sqrt(draws))


def test_a_switch_of_the_view_changes_no_other_draw():
    for seed in range(50):
        plain = sampling.draw_crop(300, 400, View(flip=0.5), random.Random(seed))
        jittered = sampling.draw_crop(300, 400, View(flip=0.5, colour_jitter=0.4), random.Random(seed))
        unflipped = sampling.draw_crop(300, 400, View(flip=0.0), random.Random(seed))
        assert jittered._replace(jitter=None) == plain
        assert unflipped == plain._replace(flip=False)


def test_jitter_orders_are_all_drawn():
    orders = {sampling.jitter_order(seed) for seed in range(100)}
    assert orders == {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}


@pytest.mark.parametrize("n", [2, 3, 4, 10, 97, 100])
def test_substitutes_try_every_other_sample_once(n):
    for index in (0, n // 2, n - 1):
        for epoch in range(5):
            tried = [sampling.substitute(0, "clips", epoch, index, attempt, n) for attempt in range(n - 1)]
            assert sorted(tried) == sorted(set(range(n)) - {index})


def test_substitutes_are_uniform_and_need_another_sample():
    draws, n = 6000, 7
    first = [sampling.substitute(0, "clips", epoch, 2, 0, n) for epoch in range(draws)]
    counts = np.bincount(first, minlength=n)
    assert counts[2] == 0
    assert np.all(np.abs(np.delete(counts, 2) - draws / 6) <= 3 * math.sqrt(draws * (1 / 6) * (5 / 6)))
    with pytest.raises(DataError, match="only sample of the clips"):
        sampling.substitute(0, "clips", 0, 0, 0, 1)
