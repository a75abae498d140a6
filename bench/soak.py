"""Does a run grow? Trains for a while and watches the program from outside: memory, open files, threads, processes.

    python bench/soak.py [--steps 2000] [--config configs/demo.json] [--set KEY=VALUE ...] [--limit 1.0] [--out CSV]

Memory is resident memory in MiB, of the trainer and of its loader workers together; pages they share count in each.
It goes up and down by tens of MiB with what the allocator has freed and not given back, so what counts is its floor,
below which a fifth of the readings are: the slope is that of a line through the floors of eight equal parts of the run
after the warm-up, in MiB a 1,000 steps. The exit code is 1 if the floor of trainer and workers together rises by more
than the limit, or the median number of open files, threads or processes is higher in the last part than in the first;
else it is that of the run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
READINGS = 200  # of a run, at equal distances
SHOWN_EVERY = 1000  # steps
PARTS = 8  # of the run after the warm-up
FLOOR, MEDIAN = 0.2, 0.5  # shares of the readings below them


class Reading(NamedTuple):
    """What a run holds at one step."""

    step: int
    trainer: float  # MiB
    workers: float  # MiB
    files: int
    threads: int
    processes: int

    def __str__(self) -> str:
        return (
            f"step {self.step:>6}  trainer {self.trainer:8.1f} MiB  workers {self.workers:8.1f} MiB  "
            f"open files {self.files:>4}  threads {self.threads:>3}  processes {self.processes:>2}"
        )


def command_line(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; what `--set` says goes to train.py as it is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.json"), metavar="FILE")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, metavar="STEPS", help="steps that do not count (a quarter, at most 500)")
    parser.add_argument("--limit", type=float, default=1.0, metavar="MIB", help="growth allowed a 1,000 steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of train.py; repeatable")
    parser.add_argument("--out", metavar="CSV", help="write every reading to this file")
    options = parser.parse_args(arguments)
    if options.warm_up is None:
        options.warm_up = min(options.steps // 4, 500)
    if not 0 <= options.warm_up < options.steps:
        parser.error(f"expected 0 <= warm-up < steps, got {options.warm_up} and {options.steps}")
    return options


def watch(run: subprocess.Popen, log: Path, distance: int) -> list[Reading]:
    """A reading whenever the run has come `distance` steps further; what comes after the last step does not count."""
    readings: list[Reading] = []
    steps, shown = Steps(log), 0
    while run.poll() is None:
        step = steps.newest()
        if step is not None and (not readings or step >= readings[-1].step + distance):
            try:
                readings.append(read(psutil.Process(run.pid), step))
            except psutil.Error:  # it is ending
                break
            if step >= shown:
                print(readings[-1], flush=True)
                shown = (step // SHOWN_EVERY + 1) * SHOWN_EVERY
        time.sleep(0.1)
    return readings


def read(trainer: psutil.Process, step: int) -> Reading:
    """What the trainer and its workers hold now. Raises psutil.Error if one of them ends meanwhile."""
    workers = trainer.children(recursive=True)
    everyone = [trainer, *workers]
    memory = [process.memory_info().rss / 2**20 for process in everyone]
    files, threads = (
        sum(process.num_fds() for process in everyone),
        sum(process.num_threads() for process in everyone),
    )
    return Reading(step, memory[0], sum(memory[1:]), files, threads, len(everyone))


class Steps:
    """The newest step of a growing log.jsonl."""

    def __init__(self, log: Path) -> None:
        self.log, self.read_to = log, 0
        self.step: int | None = None

    def newest(self) -> int | None:
        """None before the first step."""
        if self.log.exists():
            with self.log.open("rb") as file:
                file.seek(self.read_to)
                whole, _, _ = file.read().rpartition(b"\n")
            if whole:
                self.read_to += len(whole) + 1
                self.step = json.loads(whole.splitlines()[-1])["step"]
        return self.step


def slope(readings: Sequence[Reading], warm_up: int, *parts: str) -> float:
    """Growth of the floor of the sum of `parts` after `warm_up` steps, in MiB a 1,000 steps."""
    floors = levels(readings, warm_up, FLOOR, *parts)
    if len(floors) < 2:
        return 0.0
    steps, sums = zip(*floors)
    return 1000 * float(np.polyfit(steps, sums, 1)[0])


def levels(readings: Sequence[Reading], warm_up: int, share: float, *parts: str) -> list[tuple[int, float]]:
    """The sum of `parts` that a share of the readings lie below, and its step, in each of eight equal pieces of the
    readings after `warm_up` steps.
    """
    settled = [reading for reading in readings if reading.step >= warm_up]
    pairs = [(reading.step, sum(getattr(reading, part) for part in parts)) for reading in settled]
    pieces = [pairs[len(pairs) * k // PARTS : len(pairs) * (k + 1) // PARTS] for k in range(PARTS)]
    return [sorted(piece, key=lambda pair: pair[1])[int(share * len(piece))] for piece in pieces if piece]


def judge(readings: Sequence[Reading], warm_up: int, limit: float) -> list[str]:
    """What grows, a sentence each."""
    settled = sum(reading.step >= warm_up for reading in readings)
    if settled < PARTS:
        return [f"{settled} readings after the warm-up of {warm_up} steps are too few; take more steps"]
    faults = []
    if (growth := slope(readings, warm_up, "trainer", "workers")) > limit:
        faults.append(f"memory grows by {growth:.2f} MiB a 1,000 steps, more than {limit:g}")
    for part in ("files", "threads", "processes"):
        (_, first), *_, (_, last) = levels(readings, warm_up, MEDIAN, part)
        if last > first:
            faults.append(f"{part} rise from {first} to {last}")
    return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, watch, report. Returns the exit code."""
    options = command_line(arguments)
    distance = max(options.steps // READINGS, 1)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        settings = [f"train.steps={options.steps}", f"train.log_every={distance}", f"output={output}", *options.set]
        command = [sys.executable, str(ROOT / "bevt_fast" / "train.py"), "--config", options.config]
        for setting in settings:
            command += ["--set", setting]
        with tempfile.TemporaryFile() as said:
            run = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"NO_COLOR": "1"})
            try:
                readings = watch(run, output / "log.jsonl", distance)
                code = run.wait()
            finally:
                run.kill()
                run.wait()
            if code:
                said.seek(0)
                print(said.read().decode(errors="replace")[-2000:], file=sys.stderr)
                return code
    if readings:
        print(readings[-1])
    if options.out:
        lines = [",".join(Reading._fields), *(",".join(map(str, reading)) for reading in readings)]
        Path(options.out).write_text("\n".join(lines) + "\n")
    for name, parts in (("trainer", ["trainer"]), ("workers", ["workers"]), ("together", ["trainer", "workers"])):
        print(f"slope after step {options.warm_up}, {name}: {slope(readings, options.warm_up, *parts):+.3f} MiB/1,000")
    faults = judge(readings, options.warm_up, options.limit)
    print("\n".join(faults) if faults else f"ok: {len(readings)} readings, nothing grows")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
