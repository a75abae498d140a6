"""The headers of many shards, read by as many processes as there are cores for; one after another they take long."""

import multiprocessing
import os
import signal
from collections.abc import Generator
from multiprocessing.connection import Connection, wait
from pathlib import Path

from bevt_fast.data import pace
from bevt_fast.data.shards import Scanned, scan
from bevt_fast.errors import MachineError, UserError

FEW = 4  # shards that are not worth a process


def scan_all(paths: list[Path]) -> Generator[Scanned, None, None]:
    """What each shard holds, in order. Raises what `scan` raises of the first that is refused, and MachineError where a
    process dies.
    """
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # each of them reads all headers
    processes = min(pace.cores() // trainers, len(paths))
    # a daemon, as a loader's worker is, may have no processes of its own
    if processes < 2 or len(paths) < FEW or multiprocessing.current_process().daemon:
        yield from map(scan, paths)
        return
    team = _Team(processes)
    try:
        yield from team.scan(paths)
    finally:
        # whatever is left of the work is not wanted: an error or Ctrl-C does not wait for it
        team.end()


class _Team:
    """Forked processes, each of which is sent paths and answers with what the shard holds, or the error."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("fork")
        self._processes, self._connections = [], []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_answer, args=(theirs, ours), daemon=True)
            process.start()
            theirs.close()  # so that its death is the end of what it says
            self._processes.append(process)
            self._connections.append(ours)

    def scan(self, paths: list[Path]) -> Generator[Scanned, None, None]:
        """What the shards hold, in order. Raises the error of the first that has one, or MachineError."""
        left = iter(enumerate(paths))
        outcomes: dict[int, Scanned | UserError] = {}
        try:
            for connection in self._connections:
                connection.send(next(left, None))
            for number in range(len(paths)):
                while number not in outcomes:
                    for connection in wait(self._connections):
                        assert isinstance(connection, Connection)
                        answered, outcome = connection.recv()
                        outcomes[answered] = outcome
                        connection.send(next(left, None))
                found = outcomes.pop(number)
                if isinstance(found, UserError):
                    raise found
                yield found
        except (EOFError, ConnectionError):
            raise MachineError(
                "a process that reads the headers of shards died; free some memory and start again"
            ) from None

    def end(self) -> None:
        """Kill them."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()


def _answer(jobs: Connection, other_end: Connection) -> None:
    """What a process does until it is killed, or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    other_end.close()
    try:
        while True:
            if (job := jobs.recv()) is not None:
                number, path = job
                try:
                    jobs.send((number, scan(path)))
                except UserError as error:
                    jobs.send((number, error))
    except (EOFError, ConnectionError):
        return
