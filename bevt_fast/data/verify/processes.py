"""Processes that check files, and may hang or die at one: then the file is at fault, and another process goes on.

Fresh interpreters, one job at a time each. They are in a session of their own, so Ctrl-C reaches only the program that
started them, which ends them; if that is killed, they see the end of their input, and an alarm ends one that hangs.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import IO, Any

from bevt_fast.data.verify.examine import DEPTHS, Depth, Job, Look
from bevt_fast.errors import MachineError

START_LIMIT = 300.0  # seconds until a process must have imported what it needs, on a slow disk too

Asked = tuple[Job, Look | None]  # a file, and how it looked when it was checked before
TOO_SLOW = "not read within"


def too_slow(timeout: float) -> str:
    """The reason of a file that took too long."""
    return f"{TOO_SLOW} {timeout:g} s"


class _Checker:
    """One process, and what it is at."""

    def __init__(self, depth: Depth, timeout: float, complaints: IO[bytes]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "bevt_fast.data.verify.examine", str(DEPTHS.index(depth)), str(timeout)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=complaints, env=environment, bufsize=0, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout
        self.jobs, self.answers = self.process.stdin, self.process.stdout
        self.timeout = timeout
        self.job: Job | None = None
        self.look: Look | None = None
        self.lines: list[Any] = []
        self._rest = b""
        self.deadline = time.monotonic() + START_LIMIT

    def ask(self, asked: Asked) -> None:
        """Give it the next job."""
        self.job, self.look, self.lines = asked[0], None, []
        self.deadline = time.monotonic() + self.timeout
        with suppress(BrokenPipeError):  # it has died since; reading from it says so
            self.jobs.write(json.dumps(asked).encode() + b"\n")

    def hear(self) -> bool:
        """Take in what it has written; False if it has ended."""
        heard = os.read(self.answers.fileno(), 1 << 16)
        *whole, self._rest = (self._rest + heard).split(b"\n")
        self.lines += [json.loads(line) for line in whole]
        return bool(heard)

    def row(self, reason: str = "") -> dict[str, Any] | None:
        """What is known of its job: the answer, or a fault for `reason`; None for a file that is as it was."""
        seen = self.lines[0] if self.lines else None
        found = {"status": "unreadable", "reason": reason} if reason else self.lines[1]
        return None if found is None else found | (Look(*seen)._asdict() if seen else {})

    def end(self) -> str:
        """Kill it; returns how it ended."""
        self.process.kill()
        self.jobs.close()
        self.answers.close()
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead disk cannot even be killed
            code = self.process.wait(5.0)
            return f"the process that read it ended: {signal.strsignal(-code) if code < 0 else f'exit code {code}'}"
        return "the process that read it cannot be ended"


def check(
    jobs: Iterable[Asked], workers: int, depth: Depth, timeout: float
) -> Generator[tuple[Job, dict[str, Any] | None], None, None]:
    """Each job with the columns of its row, as they are done; None for a file that looks as it did.

    A file that takes more than `timeout` seconds, or twice ends the process that reads it, is unreadable. Raises
    MachineError if processes cannot start.
    """
    with tempfile.TemporaryFile() as complaints:
        team = _Team(iter(jobs), lambda: _Checker(depth, timeout, complaints))
        try:
            for _ in range(workers):
                team.start()
            while team.busy:
                yield from team.wait()
        except EOFError as error:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines() or [str(error)]
            raise MachineError(
                f"the processes that check files do not start: {said[-1]}; repair the installation"
            ) from None
        finally:
            team.end()


class _Team:
    """The processes at work. `busy` is empty when all jobs are done."""

    def __init__(self, jobs: Iterator[Asked], hire: Callable[[], _Checker]) -> None:
        self.busy: set[_Checker] = set()
        self._jobs, self._hire = jobs, hire
        self._selector = selectors.DefaultSelector()
        self._again: list[Asked] = []
        self._suspects: set[Job] = set()  # files that have ended a process once

    def start(self) -> None:
        """One more process."""
        checker = self._hire()
        self.busy.add(checker)
        self._selector.register(checker.answers, selectors.EVENT_READ, checker)

    def wait(self) -> Iterator[tuple[Job, dict[str, Any] | None]]:
        """Wait for an answer, a death or a deadline, and give out the next jobs."""
        first = min(checker.deadline for checker in self.busy)
        for key, _ in self._selector.select(max(first - time.monotonic(), 0)):
            checker: _Checker = key.data
            alive = checker.hear()
            if checker.job is None and checker.lines:
                self._go_on(checker)
            elif checker.job is not None and len(checker.lines) == 2:
                yield checker.job, checker.row()
                self._go_on(checker)
            elif not alive:
                yield from self._replace(checker)
        for checker in [checker for checker in self.busy if checker.deadline <= time.monotonic()]:
            yield from self._replace(checker, too_slow(checker.timeout))

    def end(self) -> None:
        """End them all, at once."""
        for checker in self.busy:
            checker.process.kill()
        for checker in list(self.busy):
            self._dismiss(checker)
        self._selector.close()

    def _go_on(self, checker: _Checker) -> None:
        asked = self._again.pop() if self._again else next(self._jobs, None)
        if asked is None:
            self._dismiss(checker)
        else:
            checker.ask(asked)

    def _replace(self, checker: _Checker, reason: str = "") -> Iterator[tuple[Job, dict[str, Any] | None]]:
        how, job = self._dismiss(checker), checker.job
        if job is None:
            raise EOFError(how)
        if reason or job in self._suspects:
            yield job, checker.row(reason or how)
        else:
            # the machine may have killed it for memory, or the file before may have harmed it
            self._suspects.add(job)
            self._again.append((job, None))
        self.start()

    def _dismiss(self, checker: _Checker) -> str:
        self.busy.discard(checker)
        self._selector.unregister(checker.answers)
        return checker.end()
