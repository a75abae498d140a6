"""Pretrain in several ways, fine-tune and probe what comes of each from several seeds, and make the tables:
`python bevt_fast/study.py --config configs/study/demo.json --out runs/study`.

Every run is train.py, finetune.py or evaluate.py as a user would start it. The same command goes on where it was cut
off: runs that are done are kept, one that was begun goes on from its checkpoint, and a changed one is made again.
"""

import argparse
import fcntl
import signal
import sys
from pathlib import Path
from typing import IO, Any

if not __package__:  # run as a script: look from the repository root and kernels/, not from bevt_fast/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]
else:  # run as a module of a clone that may not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from bevt_fast.errors import EXIT_SIGTERM, ConfigError, MachineError, outcome
from bevt_fast.studies import report
from bevt_fast.studies.config import Study, load
from bevt_fast.studies.jobs import Job, Runner, expected, plan

FAILED = 1  # the exit code where a run has failed; the others are done all the same


class Terminated(BaseException):
    """SIGTERM, on its way out through the runs."""


def command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The options. Exits with 2 and a sentence on a wrong one, as argparse does."""
    parser = argparse.ArgumentParser(prog="study.py", description="Pretraining, judged: many runs, one report.")
    parser.add_argument("--config", required=True, metavar="FILE", help="the study, as a JSON file (configs/study)")
    parser.add_argument("--out", required=True, metavar="DIR", help="its runs and the report")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. jobs=1")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how long they take; run nothing")
    return parser.parse_args(argv)


def describe(study: Study, jobs: list[Job]) -> list[str]:
    """Every kind of run, what is left of it, and the time that takes."""
    times, lines, left, unknown = expected(jobs), [], 0.0, 0
    width = max(len(_title(job)) for job in jobs)
    for title in dict.fromkeys(_title(job) for job in jobs):
        same = [job for job in jobs if _title(job) == title]
        todo = [job for job in same if not job.is_done]
        seconds = [times[job.name] for job in todo]
        known = [value for value in seconds if value is not None]
        left += sum(known)
        unknown += sum(value is None and job.seed is not None for value, job in zip(seconds, todo))
        each = f"{known[0]:.0f} s each" if known else ""
        lines.append(f"{title:<{width}}  {len(same) - len(todo)} of {len(same)} done  {each}".rstrip())
    more = f", and {unknown} of which none has been timed" if unknown else ""
    todo = sum(not job.is_done for job in jobs)
    return [*lines, f"{todo} runs to do, {study.jobs} at a time: about {left / study.jobs / 60:.0f} minutes{more}"]


def _title(job: Job) -> str:
    if job.seed is None:
        return job.name
    return f"pretraining {job.arm}" if job.evaluation is None else f"{job.evaluation} of {job.arm}"


def run_study(study: Study, jobs: list[Job], out: Path) -> int:
    """Do what is not done, and report. Returns the exit code."""
    runner = Runner(jobs, study.jobs, lambda line: print(line, flush=True))
    try:
        runner.run()
    finally:
        missing = report.write(study, jobs, runner.failed, out)
    print("\n".join([*missing, f"wrote {out / 'report.md'}"]))
    if runner.failed:
        for name, reason in runner.failed.items():
            print(f"error: {name}: {reason}", file=sys.stderr)
        return FAILED
    return 0


def locked(out: Path) -> IO[Any]:
    """The directory, made and held by this study alone. Raises ConfigError while another one holds it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / ".lock").open("a")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise ConfigError(f"another study is running in {out}; wait for it, or name another --out") from None
    return lock


def main(argv: list[str] | None = None) -> int:
    """Run the study of the command line. Returns the exit code."""
    options = command_line(argv)
    return outcome(lambda: _run(options, Path(options.out)))


def _run(options: argparse.Namespace, out: Path) -> int:
    try:
        study = load(options.config, options.set)
        jobs = plan(study, out)
        if options.dry_run:
            print("\n".join(describe(study, jobs)))
            return 0
        with locked(out):
            return run_study(study, jobs, out)
    except OSError as error:
        raise MachineError(f"cannot write the study to {out}: {error.strerror or error}; name another --out") from None
    except Terminated:
        return EXIT_SIGTERM


def _terminate(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
