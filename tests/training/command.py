"""The training program run within this process, and what its logs say.

Starting Python, torch and DeepSpeed takes longer than a small run; `train_here` goes through the same text from the
command line to the exit code.
"""

import contextlib
import copy
import json
import logging
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "bevt_fast" / "train.py"
FINETUNE = ROOT / "bevt_fast" / "finetune.py"
STARTED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OURS = (*STARTED_BY, "TRITON_INTERPRET")  # what the test process has set and a user has not


def environment(**more: str) -> dict[str, str]:
    """The environment in which a user starts a program, on one thread."""
    kept = {name: value for name, value in os.environ.items() if name not in OURS}
    return kept | {"OMP_NUM_THREADS": "1"} | more


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with dotted keys set; None takes a key away."""
    values = copy.deepcopy(values)
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = values
        for name in outer:
            place = place.setdefault(name, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return values


def written(values: dict[str, Any], path: Path) -> Path:
    """The configuration as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def train_here(*arguments: str | Path, program: Path = TRAIN) -> int:
    """`PROGRAM ARGUMENTS` in this process; returns its exit code. What it changes of the process is put back."""
    threads, path = torch.get_num_threads(), list(sys.path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logging.getLogger().level
    try:
        with mock.patch.object(sys, "argv", [str(program), *map(str, arguments)]):
            runpy.run_path(str(program), run_name="__main__")
    except SystemExit as exit:
        return int(exit.code or 0)
    finally:
        sys.path[:] = path
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger().setLevel(level)
        torch.set_num_threads(threads)
        leave_group()
    raise AssertionError("the program has not ended with an exit code")


def leave_group() -> None:
    """Leave the process group, and let DeepSpeed forget the groups it keeps for the life of a process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if "deepspeed" not in sys.modules:
        return
    for handler in logging.getLogger("DeepSpeed").handlers:
        if type(handler) is logging.StreamHandler:  # and not one of pytest's
            handler.stream = sys.__stdout__  # the one of its first import may be a test's, which ends with the test
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    for name, value in list(vars(groups).items()):
        if isinstance(value, torch.distributed.ProcessGroup):
            setattr(groups, name, None)
    comm.cdb = None


@contextlib.contextmanager
def alone():
    """An environment in which no launcher has started this process."""
    before = {name: os.environ.pop(name) for name in STARTED_BY if name in os.environ}
    try:
        yield
    finally:
        for name in STARTED_BY:
            os.environ.pop(name, None)
        os.environ.update(before)


def rows(output: Path) -> list[dict[str, Any]]:
    """The logged training steps without what depends on the clock; a value that was not finite is None."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("perf/")}
        for line in lines
        if "train/loss" in line
    ]


def losses(output: Path) -> list[float]:
    return [row["train/loss"] for row in rows(output)]
