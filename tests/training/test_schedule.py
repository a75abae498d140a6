"""The learning rate of SPEC 5.2, worked out by hand, and how long a run lasts."""

import math

import pytest

from bevt_fast.config import Optim
from bevt_fast.training.schedule import learning_rate, lengths

OPTIM = Optim(lr=5e-4, warmup_epochs=10)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 5e-5),  # cosine 1, a tenth of it
        (500, 5e-4 * math.cos(math.pi / 40) ** 2 * 0.55),  # half the warm-up: 1 - 0.9 / 2; (1 + cos x) / 2 = cos^2 x/2
        (1000, 5e-4 * math.cos(math.pi / 20) ** 2),  # the warm-up is over
        (2500, 5e-4 * (2 + 2**0.5) / 4),  # cos(pi/4) = sqrt(2)/2
        (5000, 2.5e-4),
        (10_000, 0.0),
    ],
)
def test_cosine_with_a_linear_warmup_from_a_tenth(step: int, rate: float) -> None:
    assert learning_rate(step, 10_000, 1000, OPTIM) == pytest.approx(rate, rel=1e-12, abs=1e-18)


def test_the_floor_is_reached_at_the_end_and_nowhere_before() -> None:
    optim = Optim(lr=1.5e-3, min_lr=1e-5, warmup_start=0.0)
    rates = [learning_rate(step, 100, 10, optim) for step in range(101)]
    assert rates[0] == 0 and rates[100] == pytest.approx(1e-5, rel=1e-12)
    assert rates[50] == pytest.approx((1.5e-3 + 1e-5) / 2, rel=1e-12)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_no_warmup_starts_at_the_full_rate() -> None:
    assert learning_rate(0, 10, 0, OPTIM) == 5e-4


def test_steps_win_over_epochs() -> None:
    assert lengths(OPTIM, epochs=150, steps=None, steps_per_epoch=940) == (141_000, 9400)  # SPEC 5.2
    assert lengths(OPTIM, epochs=150, steps=20_000, steps_per_epoch=940) == (20_000, 9400)


def test_a_shortened_run_warms_up_no_longer_than_it_lasts() -> None:
    assert lengths(OPTIM, epochs=150, steps=300, steps_per_epoch=940) == (300, 300)


def test_warmup_may_be_given_in_steps() -> None:
    assert lengths(Optim(lr=1, warmup_steps=7), epochs=3, steps=None, steps_per_epoch=10) == (30, 7)
    assert lengths(Optim(lr=1), epochs=None, steps=30, steps_per_epoch=10) == (30, 0)
