"""The runs of a study, which of them are done, and doing the others. A run is done when its record says so.

A record lies beside the run's directory and holds a digest of everything that decides the result: the configuration
with every default, the seed, and the digests of the runs before it. Another digest, and the run is made again. A run
that was begun and not finished goes on from its last checkpoint.
"""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bevt_fast.errors import MachineError
from bevt_fast.studies.config import SCRATCH, Evaluation, Study, values_of

PROGRAMS = Path(__file__).resolve().parents[1]
PREPARE = "prepare"
STOPPED = -1000  # exit code of a run that was not even started


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run. `arm` and `seed` are None for preparations, `evaluation` for preparations and pretraining."""

    name: str
    place: Path  # its directory; the record is `place.json`, what it says `place.log`, its file `place.config.json`
    commands: list[list[str]]
    config: dict[str, Any] = field(default_factory=dict)  # the whole run, as it was read when the study began
    needs: list[str] = field(default_factory=list)
    digest: str
    kind: str  # runs of one kind differ in their seed alone
    seconds: float | None = None
    arm: str | None = None
    evaluation: str | None = None
    seed: int | None = None
    temporal: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What is known of an earlier try: digest, and when it is done seconds and scores. Empty if there is none."""
        try:
            found = json.loads(self.place.with_suffix(".json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and found.get("digest") == self.digest else {}

    @property
    def is_done(self) -> bool:
        """Whether its scores are there."""
        return "scores" in self.record


def plan(study: Study, out: Path) -> list[Job]:
    """Every run of the study, each after those it needs: seed by seed, so that a study cut short is a smaller one."""
    jobs: list[Job] = []
    for number, arguments in enumerate(study.prepare):
        before = [job.name for job in jobs]
        script = [sys.executable, str(PROGRAMS / "prepare.py"), *arguments]
        name = f"{PREPARE} {arguments[0]}"
        place = out / PREPARE / f"{number}_{arguments[0]}"
        jobs.append(Job(name=name, place=place, commands=[script], needs=before, digest=_digest(arguments), kind=name))
    first = [job.name for job in jobs]
    for seed in study.seeds:
        digests: dict[str, str] = {}
        order = sorted(study.pretraining, key=lambda name: len(study.line(name)))
        for arm in order:
            jobs.append(_pretraining(study, out, arm, seed, first, digests))
            digests[arm] = jobs[-1].digest
        for name, evaluation in study.evaluations.items():
            jobs += [_evaluation(study, out, name, arm, seed, (first, digests)) for arm in evaluation.arms]
    return jobs


def _pretraining(study: Study, out: Path, arm: str, seed: int, first: list[str], digests: dict[str, str]) -> Job:
    run, start = study.pretraining[arm], study.pretraining[arm].start
    place, values, needs = out / "pretraining" / arm / f"seed{seed}", values_of(run, arm), list(first)
    digest = _digest([study.prepare, values, seed, digests[start] if start else None])
    if start is not None:
        values["model"]["weights"] = str(out / "pretraining" / start / f"seed{seed}")
        needs.append(f"{start} seed {seed}")
    return Job(
        name=f"{arm} seed {seed}", place=place, commands=[_command(study, "train.py", place)],
        config=values | {"output": str(place), "seed": seed}, needs=needs, digest=digest, kind=arm,
        seconds=run.seconds, arm=arm, seed=seed,
    )  # fmt: skip


def _evaluation(
    study: Study, out: Path, name: str, arm: str, seed: int, before: tuple[list[str], dict[str, str]]
) -> Job:
    run: Evaluation = study.evaluations[name]
    place, values, needs = out / name / arm / f"seed{seed}", values_of(run, name), list(before[0])
    digest = _digest([study.prepare, values, seed, before[1].get(arm), arm in run.temporal])
    commands = [_command(study, "finetune.py", place)]
    if arm in run.temporal:
        how = ["--checkpoint", str(place), "--temporal", "--workers", str(values["data"]["workers"])]
        threads = ["--threads", str(n)] if (n := values["train"].get("threads")) else []
        commands.append([*_started(study, "evaluate.py"), *how, *threads])
    if arm != SCRATCH:
        values["model"]["pretrained"] = str(out / "pretraining" / arm / f"seed{seed}")
        needs.append(f"{arm} seed {seed}")
    return Job(
        name=f"{name} of {arm} seed {seed}", place=place, commands=commands,
        config=values | {"output": str(place), "seed": seed}, needs=needs, digest=digest, kind=name,
        seconds=run.seconds, arm=arm, evaluation=name, seed=seed, temporal=arm in run.temporal,
    )  # fmt: skip


def _command(study: Study, program: str, place: Path) -> list[str]:
    return [*_started(study, program), "--config", str(place.with_suffix(".config.json"))]


def _started(study: Study, program: str) -> list[str]:
    return [*(study.launcher or [sys.executable]), str(PROGRAMS / program)]


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def expected(jobs: Sequence[Job]) -> dict[str, float | None]:
    """Seconds each run takes, by its name: the mean of those of its kind that are done, or what the study says."""
    timed: dict[str, list[float]] = {}
    for job in jobs:
        if job.is_done:
            timed.setdefault(job.kind, []).append(job.record["seconds"])
    return {job.name: sum(timed[job.kind]) / len(timed[job.kind]) if job.kind in timed else job.seconds for job in jobs}


class Failure(Exception):
    """A run that has ended without its scores, in one sentence."""


class Runner:
    """Does the runs of a study, `width` at a time. `say` gets a line for each that has ended."""

    def __init__(self, jobs: Sequence[Job], width: int, say: Callable[[str], None]) -> None:
        self.jobs, self.width, self.say = list(jobs), width, say
        self.failed: dict[str, str] = {}
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self) -> None:
        """Everything that is not done yet; what fails is in `failed`, and what needs it as well. The rest goes on."""
        waiting = [job for job in self.jobs if not job.is_done]
        done = {job.name for job in self.jobs} - {job.name for job in waiting}
        running: dict[Future[None], Job] = {}
        ended, pool = 0, ThreadPoolExecutor(self.width)
        total = len(waiting)
        try:
            while waiting or running:
                for job in self._ready(waiting, done, self.width - len(running)):
                    running[pool.submit(self._do, job)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    job, ended = running.pop(future), ended + 1
                    problem = future.exception()
                    if problem is None:
                        done.add(job.name)
                    elif isinstance(problem, Failure):
                        self.failed[job.name] = str(problem)
                    else:
                        raise problem
                    self.say(f"[{ended}/{total}] {job.name}: {self.failed.get(job.name) or result(job)}")
        finally:
            self.stop()
            pool.shutdown()

    def _ready(self, waiting: list[Job], done: set[str], room: int) -> Iterator[Job]:
        """Takes out of `waiting` what can begin, and what never will."""
        for job in list(waiting):
            if broken := [name for name in job.needs if name in self.failed]:
                waiting.remove(job)
                self.failed[job.name] = f"not run, for it needs {broken[0]}"
            elif room and set(job.needs) <= done:
                waiting.remove(job)
                room -= 1
                yield job

    def stop(self) -> None:
        """Ends what still runs; each run saves a checkpoint, from which it goes on next time."""
        with self._lock:
            self._stopping = True
            children = list(self._children)
        for child in children:
            child.terminate()

    def _do(self, job: Job) -> None:
        """One run to its record. Raises Failure."""
        record = job.place.with_suffix(".json")
        began, resume = time.monotonic(), ["--resume", "auto"] if job.record else []
        try:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps({"digest": job.digest}))
            if job.config:
                job.place.with_suffix(".config.json").write_text(json.dumps(job.config, indent=1))
            for number, command in enumerate(job.commands):
                last = job.seed is not None and not number
                code = self._call([*command, *(resume if last else [])], job.place.with_suffix(".log"), number > 0)
                if code:
                    raise Failure(_why(job, code))
            found = {"digest": job.digest, "seconds": round(time.monotonic() - began, 1), "scores": scores(job)}
            aside = record.with_suffix(".partial")
            aside.write_text(json.dumps(found))
            aside.rename(record)
        except OSError as error:
            raise MachineError(f"cannot write {error.filename or job.place}: {error.strerror or error}") from None

    def _call(self, command: list[str], log: Path, append: bool) -> int:
        """The exit code of a program that writes to `log` what it says."""
        with log.open("ab" if append else "wb") as said:
            with self._lock:
                if self._stopping:
                    return STOPPED
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
                self._children.add(child)
            try:
                return child.wait()
            finally:
                self._children.discard(child)


def _why(job: Job, code: int) -> str:
    """What became of a run, and what it said last."""
    log = job.place.with_suffix(".log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "no words")
    how = signal.Signals(-code).name if -65 < code < 0 else f"exit code {code}"
    return f"failed ({how}): {said.removeprefix('error: ')[:500]} [{log}]"


def scores(job: Job) -> dict[str, float]:
    """What a finished run has reached, as shares: `clips` and `images` of held-out masked tokens, or top-1 by the order
    of frames. Raises Failure where a run has ended well and left no score.
    """
    if job.arm is None:
        return {}
    try:
        if job.evaluation is None:
            found = json.loads((job.place / "heldout.json").read_text())
            return {stream: float(values["accuracy"]) for stream, values in found.items()}
        if job.temporal:
            found = json.loads((job.place / "evaluation" / "results.json").read_text())["temporal"]
            return {order: float(values["top1"]) for order, values in found.items()}
        rows = [json.loads(line) for line in (job.place / "log.jsonl").read_text().splitlines()]
        return {"normal": float([row["val/top1"] for row in rows if "val/top1" in row][-1])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        if job.evaluation is None and isinstance(error, FileNotFoundError):
            return {}  # a pretraining without held-out data
        raise Failure(f"ended well, but left no score under {job.place}") from None


def result(job: Job) -> str:
    """The scores of a run that is done, for people."""
    record = job.record
    reached = ", ".join(f"{name} {value:.1%}" for name, value in record["scores"].items())
    return f"{reached or 'done'} ({record['seconds']:.0f} s)"
