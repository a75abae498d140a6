"""bench/soak.py sees what grows, and says nothing of what only goes up and down."""

import json
from pathlib import Path

import pytest

from bench import soak
from bench.soak import Reading
from tests.training.command import changed, written
from tests.training.conftest import tiny

__all__ = ["tiny"]


def readings(leak: float = 0.0, **last: int) -> list[Reading]:
    """Of 2,000 steps: memory climbs in the first 200, then goes up and down, and grows by `leak` MiB a 1,000 steps.
    From step 1,700 on the rest is as in `last`.
    """
    found = []
    for step in range(0, 2000, 10):
        unreturned = 25.0 * (step // 10 % 3 > 0) - 70 * (step == 1530)
        reading = Reading(step, min(600 + step, 800) + unreturned + leak * step / 1000, 50.0, 20 + step // 10 % 3, 9, 3)
        found.append(reading._replace(**last) if step >= 1700 else reading)
    return found


@pytest.mark.parametrize("leak", [0.0, 0.5, 2.0, 40.0])
def test_the_slope_is_that_of_the_leak(leak: float) -> None:
    assert soak.slope(readings(leak), 500, "trainer", "workers") == pytest.approx(leak, abs=1e-9)
    assert soak.slope(readings(leak), 500, "workers") == pytest.approx(0, abs=1e-9)
    faults = soak.judge(readings(leak), 500, 1.0)
    assert len(faults) == (leak > 1)
    assert not faults or f"grows by {leak:.2f} MiB" in faults[0]


@pytest.mark.parametrize("part", ["files", "threads", "processes"])
def test_what_is_more_at_the_end_is_named(part: str) -> None:
    (fault,) = soak.judge(readings(**{part: 99}), 500, 1.0)
    assert fault.startswith(part) and fault.endswith("to 99")


@pytest.mark.parametrize("leaked", [0, 1])
def test_files_that_are_open_for_a_moment_are_no_leak(leaked: int) -> None:
    """A reading in four falls between two files at first, in eight at the end: a lower quantile would have risen."""
    found = []
    for reading in readings():
        early = reading.step < 1200
        opened = 127 if reading.step // 10 % (4 if early else 8) == 0 else 132
        found.append(reading._replace(files=opened + leaked * (not early)))
    faults = soak.judge(found, 500, 1.0)
    assert faults == ([f"files rise from 132 to {132 + leaked}"] if leaked else [])


def test_too_few_readings_are_no_verdict() -> None:
    assert "too few" in soak.judge(readings()[:7], 0, 1.0)[0]
    with pytest.raises(SystemExit) as caught:
        soak.main(["--steps", "10", "--warm-up", "10"])
    assert caught.value.code == 2


def test_a_run_is_watched_to_its_end(tiny, tmp_path: Path, program) -> None:
    config = written(changed(tiny, {"data.workers": 1, "train.heldout_batches": 1}), tmp_path / "run.json")
    steps = ["--steps", "60", "--limit", "1e6"]
    done = program("bench/soak.py", "--config", config, *steps)
    lines = done.stdout.splitlines()
    first, last = lines[0].split(), next(line for line in reversed(lines) if line.startswith("step")).split()
    assert int(first[1]) < 10 and int(last[1]) > 40
    assert float(last[3]) > 100 and float(last[6]) > 50  # MiB: torch alone is more
    assert last[-1] == "3"  # the trainer and a worker for each stream
    assert sum(line.startswith("slope after step 15") for line in lines) == 3
    assert done.returncode in (0, 1) and ("ok: " in done.stdout) == (done.returncode == 0)


def test_a_run_that_fails_is_no_soak(tiny, tmp_path: Path, program) -> None:
    config = tmp_path / "wrong.json"
    config.write_text(json.dumps(changed(tiny, {"optim.lr": "fast"})))
    done = program("bench/soak.py", "--config", config, "--steps", "5")
    assert done.returncode == 2 and "optim.lr" in done.stderr.replace(": ", ".")
