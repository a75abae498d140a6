"""Who am I among the processes: one function for every launcher (plain python, deepspeed, torchrun, srun), and when
to stop.
"""

import datetime
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from bevt_fast.errors import EXIT_SIGINT, EXIT_SIGTERM, MachineError


class World(NamedTuple):
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size_from_environment() -> int:
    """How many processes the launcher started, known before any of them has met another."""
    started_by_srun = "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ
    text = os.environ.get("WORLD_SIZE" if "RANK" in os.environ or not started_by_srun else "SLURM_NTASKS") or "1"
    if not text.isdecimal() or not int(text):
        raise MachineError(f"the number of processes is {text!r}; start them with deepspeed, torchrun or srun")
    return int(text)


def read_environment() -> None:
    """Fill in what torch.distributed reads (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    deepspeed and torchrun set all five; srun sets its own names; plain python sets none and is a world of one.
    """
    environment = os.environ
    if "RANK" not in environment and "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        if "MASTER_ADDR" not in environment:
            nodes = environment.get("SLURM_JOB_NODELIST", "localhost")
            environment["MASTER_ADDR"] = first_node(nodes)
        # every task of a job derives the same port, and two jobs on one node another
        environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000))
    if "RANK" not in environment:
        environment.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise MachineError(
            f"RANK is set but {', '.join(missing)} is not; start the processes with deepspeed, torchrun or srun"
        )
    environment.setdefault("LOCAL_RANK", "0")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environment[name].isdecimal():
            raise MachineError(f"{name} is {environment[name]!r}; start the processes with deepspeed, torchrun or srun")


def first_node(nodes: str) -> str:
    """The first host of a SLURM node list: 'gpu[03-05,9],x1' -> 'gpu03'."""
    head, bracket, tail = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + tail.partition("]")[0].partition(",")[0].partition("-")[0]


def start(threads: int | None) -> World:
    """Join the other processes; NCCL on GPUs, gloo on CPUs. `threads` of torch per process, None: cores / processes
    here.
    """
    read_environment()
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise MachineError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start fewer processes a machine"
            )
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or size)
        if threads is not None or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // here))
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=10),
            rank=rank,
            world_size=size,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise MachineError(
            f"process {rank} of {size} cannot meet the others at {address}: {str(error).splitlines()[0]}"
        ) from None
    return World(rank, local_rank, size, device)


def average(values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over all processes."""
    return total(values) / (dist.get_world_size() if dist.is_initialized() else 1)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes."""
    values = values.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def agree(value: int, device: torch.device) -> int:
    """The largest `value` any process has: what one process learnt, all know."""
    tensor = torch.tensor(value, device=device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def leave() -> None:
    """Leave the other processes, if this one has joined them."""
    if dist.is_initialized():
        dist.destroy_process_group()


class StopSignal:
    """Remembers the first SIGINT or SIGTERM until the step is finished; a second SIGINT leaves at once.

    `exit_code` is 0 as long as nobody asked to stop. A process that `deepspeed` started also stops when the launcher is
    gone: the launcher does not pass a signal on, and its orphans would train for days.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self._launcher = _launcher_chain()
        signal.signal(signal.SIGINT, self._remember)
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.exit_code == EXIT_SIGINT:
            print(
                "second interrupt: leaving without saving; the last checkpoint is intact", file=sys.stderr, flush=True
            )
            os._exit(EXIT_SIGINT)
        if not self.exit_code:
            self.exit_code = EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM

    def poll(self) -> int:
        """The exit code to stop with, or 0."""
        if not self.exit_code and self._launcher and _launcher_chain() != self._launcher:
            self.exit_code = EXIT_SIGTERM
        return self.exit_code


def _launcher_chain() -> tuple[int, ...]:
    """Process ids of deepspeed's launcher above this process (its per-node part and the command itself), or ()."""
    chain = []
    pid = os.getppid()
    while pid > 1:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        if b"deepspeed" not in command or b"sh\0-c" in command:
            break
        chain.append(pid)
        pid = int(fields[1])
    return tuple(chain)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
