"""The one stopwatch and the one row format.

Contenders take turns inside one process, in a new random order every round, so that a clock that drifts or a neighbour
on the machine meets all of them alike. Nothing that was measured is dropped.
"""

import contextlib
import csv
import datetime
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bevt_fast.training.gpus import of_device

ROOT = Path(__file__).resolve().parents[1]
GPU_ROUNDS, CPU_ROUNDS = 50, 10
FEWEST = 3  # rounds that a spent budget still allows
# what one clock tick of the longest wait is: queueing a call takes the host less than this
LONGEST_HOLD = 10e-3


def ready(out: str | Path, device: str = "cpu") -> Path:
    """The folder of results, made. Ends the program with one sentence: exit code 6 without the GPU that was asked for,
    2 where there can be no such folder.
    """
    problem, code = None, 0
    if device == "cuda" and not torch.cuda.is_available():
        problem, code = "--device cuda needs an NVIDIA GPU, and torch sees none here; leave it out for a CPU run", 6
    else:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=out):
                pass
        except OSError as error:
            problem, code = f"--out {out} is no folder one can write to: {error.strerror}", 2
    if problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        raise SystemExit(code)
    return Path(out)


class Trial(NamedTuple):
    """One thing to time: `prepare` runs outside the clock and hands its result to `run`."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Quantiles(NamedTuple):
    """Milliseconds."""

    median: float
    low: float  # 20 %
    high: float  # 80 %
    rounds: int


@dataclass
class Machine:
    """What a figure depends on besides the code: the last columns of every results file."""

    hardware: str = ""
    driver: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    cuda: str = ""
    cudnn: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    def line(self) -> str:
        """One sentence for the head of a report."""
        parts = [
            self.hardware, f"driver {self.driver}" if self.driver else "",
            f"Python {self.python}", f"torch {self.torch}",
            f"triton {self.triton or 'absent'}", f"CUDA {self.cuda}" if self.cuda else "",
            f"cuDNN {self.cudnn}" if self.cudnn else "", f"commit {self.commit or 'unknown'}", self.date,
        ]  # fmt: skip
        return ", ".join(part for part in parts if part)


@dataclass
class Row(Machine):
    """One line of a results file; empty where it does not apply or was not measured."""

    benchmark: str = ""
    kernel: str = ""
    case: str = ""
    dtype: str = ""
    contender: str = ""
    mode: str = ""  # forward, backward, both, step
    status: str = "ok"  # ok, differs, left out
    reason: str = ""
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int | None = None
    peak_mib: float | None = None
    gflop: float | None = None
    tflops: float | None = None
    hbm_share: float | None = None
    speedup: float | None = None  # the contender's time over ours
    error_over_bound: float | None = None
    prepare_s: float | None = None
    sm_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None


def columns(kind: type[Machine]) -> list[str]:
    """Of a results file with rows of this kind: its own first, those of every file last."""
    names, everywhere = [field.name for field in fields(kind)], {field.name for field in fields(Machine)}
    return sorted(names, key=lambda name: name in everywhere)


COLUMNS = columns(Row)
TYPES = {field.name: field.type for field in fields(Row)}


def machine(device: torch.device) -> Machine:
    """This machine, this checkout, this command."""
    cudnn = str(torch.backends.cudnn.version() or "") if device.type == "cuda" else ""
    return Machine(
        hardware=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        driver=_ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda or "",
        triton=_triton(),
        cudnn=cudnn,
        commit=_commit(),
        command=shlex.join(["python", *_relative(sys.argv)]),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def peaks(hardware: str) -> tuple[float, float] | None:
    """Dense bf16 TFLOP/s and TB/s of a GPU we know."""
    gpu = of_device(hardware)
    return (gpu.tensor, gpu.bandwidth) if gpu else None


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Median and the 20 and 80 % quantiles, interpolated; all samples count."""
    ordered = sorted(samples)
    if not ordered:
        return Quantiles(float("nan"), float("nan"), float("nan"), 0)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Quantiles(at(0.5), at(0.2), at(0.8), len(ordered))


def orders(names: Sequence[str], rounds: int, seed: int = 0) -> list[list[str]]:
    """In which order the contenders run, round by round: each once a round, in a new random order."""
    generator = random.Random(seed)
    return [generator.sample(list(names), len(names)) for _ in range(rounds)]


class Race(NamedTuple):
    """What a race found: samples in milliseconds, and the GPU's state in the middle of it."""

    samples: dict[str, list[float]]
    failures: dict[str, str]
    clocks: tuple[float | None, float | None, float | None]  # MHz, W, degrees Celsius


def race(
    trials: Mapping[str, Trial],
    device: torch.device,
    rounds: int | None = None,
    budget: float | None = None,
    warm_up: int = 3,
    flush: bool = True,
    hold: bool = True,
    seed: int = 0,
) -> Race:
    """Time every trial once a round.

    Args:
        rounds: default 50 on a GPU, 10 on a CPU.
        budget: seconds after which no further round starts (at least 3 are run); None sets no limit.
        flush: on a GPU, overwrite the second-level cache before every measurement.
        hold: on a GPU, keep it busy until the host has queued the whole measurement, so that the time is the GPU's and
            not the host's. The same for every contender.
    """
    rounds = rounds or (GPU_ROUNDS if device.type == "cuda" else CPU_ROUNDS)
    watch = _GpuWatch(device, flush, hold) if device.type == "cuda" else _CpuWatch()
    started = time.perf_counter()
    failures: dict[str, str] = {}
    samples: dict[str, list[float]] = {name: [] for name in trials}
    for name, trial in trials.items():
        _attempt(name, failures, lambda trial=trial, name=name: watch.warm(name, trial, warm_up))
    pending = None
    for number, order in enumerate(orders(list(trials), rounds, seed)):
        if number >= FEWEST and budget is not None and time.perf_counter() - started > budget:
            break
        if number == FEWEST - 1:
            pending = _start_clocks() if device.type == "cuda" else None
        for name in order:
            if name not in failures:
                _attempt(name, failures, lambda name=name: samples[name].append(watch.time(name, trials[name])))
    return Race(samples, failures, _read_clocks(pending))


def peak_memory(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB above what was allocated at the start; None on a CPU, where it is not measured."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak / 2**20


def write_rows(path: Path, rows: Sequence[Machine], kind: type[Machine] = Row) -> None:
    """The whole file, through a temporary one, so that a kill leaves the last complete version. All rows are of one
    dataclass; `kind` names the columns where there is none.
    """
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(type(rows[0]) if rows else kind))
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in asdict(row).items()} for row in rows)
    draft.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Rows of a results file, numbers as numbers."""
    with path.open(newline="") as file:
        return [Row(**{k: _typed(k, v) for k, v in line.items() if k in COLUMNS}) for line in csv.DictReader(file)]


class _CpuWatch:
    def warm(self, name: str, trial: Trial, times: int) -> None:
        for _ in range(min(times, 1)):
            trial.run(trial.prepare())

    def time(self, name: str, trial: Trial) -> float:
        ready = trial.prepare()
        start = time.perf_counter()
        trial.run(ready)
        return (time.perf_counter() - start) * 1e3


class _GpuWatch:
    """CUDA events around the run; before them the cache is overwritten and the queue is filled."""

    def __init__(self, device: torch.device, flush: bool, hold: bool) -> None:
        self.device = device
        # five times the largest second-level cache so far
        self.cache = torch.empty(2**28, dtype=torch.int8, device=device) if flush else None
        self.sleep = getattr(torch.cuda, "_sleep", None) if hold else None
        self.hold: dict[str, float] = {}

    def warm(self, name: str, trial: Trial, times: int) -> None:
        queueing = []
        for _ in range(max(times, 1)):
            ready = trial.prepare()
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            trial.run(ready)
            queueing.append(time.perf_counter() - start)
            torch.cuda.synchronize(self.device)
        self.hold[name] = min(1.5 * min(queueing) + 50e-6, LONGEST_HOLD)

    def time(self, name: str, trial: Trial) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = trial.prepare()
        if self.cache is not None:
            self.cache.zero_()
        if self.sleep is not None:
            self.sleep(int(2e9 * self.hold.get(name, 0.0)))  # ticks of at most 2 GHz: at least that long
        begin.record()
        result = trial.run(ready)
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end)


def _attempt(name: str, failures: dict[str, str], action: Callable[[], object]) -> None:
    try:
        action()
    except Exception as problem:
        failures[name] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def _start_clocks() -> "subprocess.Popen[str] | None":
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError):
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return None


def _read_clocks(pending: "subprocess.Popen[str] | None") -> tuple[float | None, float | None, float | None]:
    if pending is None:
        return None, None, None
    try:
        line = pending.communicate(timeout=5)[0].split("\n")[0]
    except subprocess.TimeoutExpired:
        pending.kill()
        return None, None, None
    found: list[float | None] = []
    for value in (*line.split(","), "", "", "")[:3]:
        try:
            found.append(float(value))
        except ValueError:
            found.append(None)
    return found[0], found[1], found[2]


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    """The commit, with + where tracked files differ from it; the copy on a test machine may have no repository."""
    commit = _ask("git", "rev-parse", "--short=10", "HEAD")
    return commit + ("+" if commit and _ask("git", "status", "--porcelain", "-uno") else "")


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU {line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _relative(arguments: Sequence[str]) -> list[str]:
    """The program by its place in the repository, so that a results file names no machine's folders."""
    with contextlib.suppress(ValueError, IndexError):
        return [str(Path(arguments[0]).resolve().relative_to(ROOT)), *arguments[1:]]
    return [Path(arguments[0]).name, *arguments[1:]]


def _short(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value


def _typed(column: str, text: str | None) -> Any:
    kind = str(TYPES[column])
    if "str" in kind:
        return text or ""
    if not text:
        return None
    return int(text) if "int" in kind else float(text)
