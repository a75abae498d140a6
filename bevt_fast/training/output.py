"""The output directory of a run: made, tested, locked, and never overwritten; and which checkpoint --resume means."""

import fcntl
import logging
import os
from pathlib import Path
from typing import IO

from bevt_fast.errors import CheckpointError, ConfigError
from bevt_fast.training import checkpoint, distributed
from bevt_fast.training.checkpoint import Checkpoint
from bevt_fast.training.distributed import World

log = logging.getLogger("bevt_fast")


def prepare_output(output: Path, resume: str, world: World) -> IO | None:
    """Make, test and lock the output directory; a fresh start moves an earlier run aside. Returns the lock on the
    first process.
    """
    failure: str | None = None
    lock = None
    if world.is_main:
        try:
            lock = _lock_output(output)
            if lock and resume == "none" and any((output / name).exists() for name in ("log.jsonl", "checkpoints")):
                number = next(n for n in range(1, 10**6) if not Path(f"{output}.{n}").exists())
                output.rename(f"{output}.{number}")
                log.warning(
                    "%s held an earlier run, which is now %s.%d; --resume auto would have gone on with it",
                    output,
                    output,
                    number,
                )
                lock.close()
                lock = _lock_output(output)
            if lock is None:
                failure = f"another run is writing to {output}; give this one another output"
        except OSError as error:
            failure = f"cannot write to the output {output}: {error.strerror}; set output=DIR to a writable directory"
    if distributed.agree(int(failure is not None), world.device):
        raise ConfigError(failure or f"the first process cannot use the output {output}")
    return lock


def _lock_output(output: Path) -> IO | None:
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / ".lock").open("a+")
    try:
        # not flock: loader workers would inherit it, and outlive a killed run by seconds in which it cannot be resumed
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        lock.close()
        return None
    lock.truncate(0)
    lock.write(f"{os.uname().nodename} {os.getpid()}\n")
    lock.flush()
    return lock


def find_checkpoint(output: Path, resume: str, world: World) -> Checkpoint | None:
    """What --resume names: nothing, the newest intact commit under the output, or one directory."""
    if resume == "none":
        return None
    if resume == "auto":
        return checkpoint.newest_valid(output / "checkpoints")
    path = Path(resume)
    if not path.is_dir():
        raise CheckpointError(
            f"--resume {resume}: there is no such directory; use auto, none, or a step_XXXXXXXX directory"
        )
    if checkpoint.NAME.fullmatch(path.resolve().name) or (path / "MANIFEST.json").exists():
        return checkpoint.read(path)
    found = checkpoint.newest_valid(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise CheckpointError(f"--resume {resume}: holds no checkpoint (step_XXXXXXXX)")
    return found
