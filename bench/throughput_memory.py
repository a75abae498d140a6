"""How much a step needs: estimated before anything is built, measured in a process of its own."""

import gc
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.throughput_contenders import BLOCKS, OURS, CannotRun, build
from bench.throughput_state import State
from bench.throughput_work import Work
from bevt_fast.training import estimate

WORLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST = 1800.0  # seconds a process may take
STEPS = 2  # the second one finds the optimizer's moments allocated


def needed(work: Work, official: bool) -> float:
    """Estimated bytes: two sets of weights, gradients and moments, the first weights, and one step's activations."""
    precision, vocabulary = work.config.train.precision, getattr(work.tokenizer, "vocab_size", 0)
    count = sum(estimate.parameters(work.shape, vocabulary, tuple(work.config.streams)).values())
    frozen = sum(weight.numel() for weight in work.tokenizer.parameters())
    answer: estimate.Answer = "fused" if work.device.type == "cuda" else "chunks"
    if official:  # less than it keeps: it makes nothing again
        answer = "reference"
    checkpointing = not official and work.config.model.activation_checkpointing
    total = 4.0 * (count * 9 + frozen)
    for stream in work.streams:
        shape = stream.all_hidden if official else stream
        one = estimate.activation_bytes(work.shape, shape, vocabulary, precision, checkpointing, answer)
        total += work.count(stream.name) * one
    return total


def free(device: torch.device) -> float:
    """Bytes that can still be had."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return _status("/proc/meminfo", "MemAvailable") or float("inf")


def fits(work: Work, name: str) -> None:
    """Raises CannotRun where the estimate is more than there is."""
    asked, there = needed(work, name not in (OURS, BLOCKS)), free(work.device)
    if asked > there:
        raise CannotRun(f"needs about {asked / 1e9:.0f} GB, and {there / 1e9:.0f} GB are free")


def is_out_of_memory(problem: BaseException) -> bool:
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(problem)


def sentence(work: Work, reason: str) -> str:
    """What to do about it."""
    micro = {name: work.count(name) for name in work.config.streams}
    halves = " ".join(f"--set {name}.micro_batch={max(count // 2, 1)}" for name, count in micro.items())
    counts = " and ".join(f"{count} {name}" for name, count in micro.items())
    return (
        f"a step of {counts} does not fit ({reason}; estimated are {needed(work, False) / 1e9:.1f} GB for ours and "
        f"{needed(work, True) / 1e9:.1f} GB for the official step); with --config take {halves}, or "
        f"--set model.activation_checkpointing=true, and without one --units {max(int(work.units) // 2, 1)} or a "
        "smaller --size"
    )


def peak(name: str, work: Work, engine: str) -> dict[str, Any]:
    """Peak MiB of one contender's second step in this process, and what was there before it was built."""
    cpu = work.device.type == "cpu"
    before = (_status("/proc/self/status", "VmRSS") or 0.0) if cpu else 0.0
    state = None if name == OURS else State(work)
    contender = build(name, work, state, engine, None)
    for step in range(STEPS):
        batch = contender.ready(work.batches[step % len(work.batches)])
        torch.manual_seed(step)
        gc.collect()
        if cpu:
            with suppress(OSError):  # the high-water mark starts again from here
                Path("/proc/self/clear_refs").write_text("5")
        else:
            torch.cuda.reset_peak_memory_stats(work.device)
        contender.step(batch)
        del batch
    if cpu:
        highest = _status("/proc/self/status", "VmHWM")
    else:
        torch.cuda.synchronize(work.device)
        highest = float(torch.cuda.max_memory_allocated(work.device))
    return {"peak_mib": highest / 2**20 if highest else None, "before_mib": before / 2**20}


def ask(command: Sequence[str]) -> dict[str, Any]:
    """What `peak` found in a process of its own; or why there is nothing, as `reason`."""
    # the child is a world of its own, not a second process of this one
    alone = {key: value for key, value in os.environ.items() if key not in WORLD}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=alone)
        return json.loads(done.stdout.strip().split("\n")[-1])
    except subprocess.TimeoutExpired:
        return {"reason": f"it took more than {LONGEST:.0f} s"}
    except ValueError:
        said = (done.stderr.strip() or "it said nothing").split("\n")[-1]
        return {"reason": f"exit code {done.returncode}: {said[:200]}"}


def _status(path: str, key: str) -> float | None:
    """Bytes of a line `key: N kB`; None where there is no such file."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key + ":"):
                return 1024.0 * int(line.split()[1])
    return None
