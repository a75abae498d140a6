"""Every kernel over its own cases, beside everybody who can compute the same: time and memory, forward and backward.

    python bench/kernels.py --out DIR [--device cuda|cpu] [--kernel NAME] [--case TEXT] [--budget SECONDS]

Exactness comes first: where our own check fails, no speed-up is printed for the case. The last line is the headline.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch
from torch import Tensor

from bench import contenders as field_of
from bench import kernel_report, plot, roofline
from bench.contenders import OURS, Contender
from bench.measure import Row, Trial, machine, peak_memory, peaks, quantiles, race, ready, write_rows
from bevt_kernels import check

ENOUGH = 5.0  # seconds that the race of one mode may take; the rounds it manages by then are printed


CONTEXT_LOST = 3  # exit code of a child whose CUDA context is lost
MOST_CHILDREN = 25


class Sticky(Exception):
    """The CUDA context is lost; says why."""


@dataclass
class Found:
    """What is known of one case besides its rows."""

    exact: bool = False
    refused: str = ""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    place: roofline.Place | None = None
    flop: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """All that a new process needs to go on where a lost one stopped."""

    rows: list[Row] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)  # by "kernel | case"
    done: list[str] = field(default_factory=list)  # "tier | kernel | case"
    crashed: dict[str, str] = field(default_factory=dict)  # "kernel | case | contender" -> reason
    spent: float = 0.0

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "State":
        if not path.exists():
            return cls()
        raw = json.loads(path.read_text())
        raw["rows"] = [Row(**row) for row in raw["rows"]]
        for key, value in raw["found"].items():
            value["place"] = value["place"] and roofline.Place(*value["place"])
            raw["found"][key] = Found(**value)
        return cls(**raw)


class Bench:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, state: State) -> None:
        self.options, self.state, self.started, self.before = options, state, time.perf_counter(), state.spent
        self.device = torch.device(options.device)
        self.dtype = check.DTYPES[options.dtype]
        self.machine = machine(self.device)
        self.peaks = peaks(self.machine.hardware)
        self.core = 0  # how many of the cases the headline is made of
        self.compiling: dict[str, float] = {}  # contender -> the longest it took to build so far

    def left(self) -> float:
        """Seconds of the budget that remain."""
        if self.options.budget is None:
            return float("inf")
        return self.options.budget - self.before - (time.perf_counter() - self.started)

    def cases(self) -> list[tuple[check.Kernel, Any]]:
        """What the headline is made of first: a budget that ends early costs the rest."""
        core, rest = [], []
        for kernel in check.kernels():
            if self.options.kernel in (None, kernel.name):
                cases = kernel.real() if self.device.type == "cuda" else kernel.cases(small=True)
                for number, case in enumerate(cases):
                    first = case.stream in ("clip", "image") if getattr(case, "stream", "") else number < 3
                    if self.options.case in str(case):
                        (core if first else rest).append((kernel, case))
        self.core = len(core)
        return core + rest

    def run(self) -> None:
        cases = self.cases()
        core, rest = cases[: self.core], cases[self.core :]
        for tier, part in ((0, core), (1, core), (0, rest), (1, rest), (2, core), (2, rest)):
            if tier:
                self.precompile(tier)
            for kernel, case in part:
                key = f"{tier} | {kernel.name} | {case}"
                if key in self.state.done:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.case(kernel, case, tier)
                self.state.done.append(key)
                self.write()

    def case(self, kernel: check.Kernel, case: Any, tier: int) -> None:
        """Race the contenders of one tier over one case."""
        name = f"{kernel.name} | {case}"
        everybody = [c for c in field_of.contenders(kernel, self.device) if c.tier == tier]
        if not everybody:
            return
        if self.left() <= 0:
            self.leave_out(kernel, case, everybody, kernel_report.OUT_OF_TIME)
            return
        fatal = self.state.crashed.get(f"{name} | race") or self.state.crashed.get(f"{name} | the case")
        if fatal:
            self.leave_out(kernel, case, everybody, fatal)
            return
        self.now(kernel, case, "the case")
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            arguments = kernel.draw(case, self.dtype, self.device)
            if not next(a for a in arguments if isinstance(a, Tensor)).numel():
                return
            judge = check.Judge(kernel, arguments)
            if name not in self.state.found:
                self.state.found[name] = self.gate(kernel, case, arguments, judge)
        except Exception as problem:
            self.lost(kernel, case, None, problem)
            self.leave_out(kernel, case, everybody, f"the case could not be made: {check.one_line(problem)}")
            return
        ready: dict[str, Callable[..., Any]] = {}
        notes: dict[str, Row] = {}
        found = self.state.found[name]
        for contender in everybody:
            row = self.ready(kernel, case, contender, arguments, judge, found, ready)
            notes[contender.name] = row
        if tier and ready and found.exact and not found.refused:
            ready = {OURS: check.ours(kernel), **ready}
        rows = self.times(kernel, case, arguments, judge, ready, notes, found)
        self.state.rows += rows
        told = [f"{row.contender} {row.mode} {row.median_ms:.3f}" for row in rows if row.median_ms is not None]
        if told or not tier:
            print(f"{kernel.name} {case} (ms): {', '.join(told) or 'nobody could be timed'}", flush=True)

    def gate(self, kernel: check.Kernel, case: Any, arguments: Sequence[Any], judge: check.Judge) -> Found:
        """Our own exactness on this case, and what the case is."""
        work = roofline.work(kernel.name, arguments)
        found = Found(
            place=roofline.place(kernel.name, arguments),
            flop={mode: w.flop for mode, w in work.items()},
            bytes={mode: w.bytes for mode, w in work.items()},
        )
        crash = self.state.crashed.get(f"{kernel.name} | {case} | {OURS}")
        if crash:
            found.refused = crash
            return found
        self.now(kernel, case, OURS)
        try:
            found.refused = check.refusal(kernel, arguments) or ""
            verdicts = judge.judge(check.ours(kernel), twice=True)
        except Exception as problem:
            self.lost(kernel, case, OURS, problem)
            found.refused = check.one_line(problem)
            return found
        found.verdicts = [v._asdict() for v in verdicts]
        found.exact = all(v.ok for v in verdicts)
        return found

    def ready(
        self, kernel: check.Kernel, case: Any, contender: Contender, arguments: Sequence[Any], judge: check.Judge,
        found: Found, ready: dict[str, Callable[..., Any]],
    ) -> Row:  # fmt: skip
        """Build and judge one contender; into `ready` if it may be timed. Returns the row its figures go into."""
        row = self.row(kernel, case, contender.name)
        crash = self.state.crashed.get(f"{kernel.name} | {case} | {contender.name}")
        if crash:
            return replace(row, status="left out", reason=crash)
        if contender.name == OURS:
            if found.refused:
                return replace(row, status="left out", reason=found.refused)
            ready[OURS] = contender.build(arguments)
            worst = _worst(found.verdicts)
            status = "ok" if found.exact else "inexact"
            reason = "" if found.exact else _why([check.Verdict(**v) for v in found.verdicts])
            return replace(row, status=status, reason=reason, error_over_bound=worst)
        self.now(kernel, case, contender.name)
        expected = max(contender.seconds, self.compiling.get(contender.name, 0.0)) if contender.tier else 0.0
        start = time.perf_counter()
        try:
            function = contender.build(arguments)
            if expected > self.left():
                raise field_of.CannotRun(f"{kernel_report.OUT_OF_TIME}: compiling takes about {expected:.0f} s")
            verdicts = judge.judge(function)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Exception as problem:
            self.lost(kernel, case, contender.name, problem)
            plain = isinstance(problem, field_of.CannotRun)
            return replace(row, status="left out", reason=str(problem) if plain else check.one_line(problem))
        seconds = time.perf_counter() - start
        self.compiling[contender.name] = max(seconds, self.compiling.get(contender.name, 0.0))
        row = replace(row, prepare_s=seconds, error_over_bound=_worst([v._asdict() for v in verdicts]))
        missing = [v.tensor.removeprefix("d ") for v in verdicts if v.tensor.startswith("d ") and "missing" in v.note]
        if missing:
            return replace(row, status="left out", reason=f"gives no gradient for {', '.join(missing)}")
        ready[contender.name] = function
        if all(v.ok for v in verdicts):
            return row
        return replace(row, status="differs", reason=_why(verdicts))

    def times(
        self, kernel: check.Kernel, case: Any, arguments: Sequence[Any], judge: check.Judge,
        ready: dict[str, Callable[..., Any]], notes: dict[str, Row], found: Found,
    ) -> list[Row]:  # fmt: skip
        """The races of one case, mode by mode."""
        rows = [row for name, row in notes.items() if name not in ready]
        modes = ("forward", "backward", "both") if judge.upstream else ("forward",)
        for mode in modes:
            trials = {name: _trial(kernel, function, arguments, judge, mode) for name, function in ready.items()}
            self.now(kernel, case, "race")
            limit = min(ENOUGH, max(self.left() / 80, 0.5)) if self.options.budget else None
            result = race(trials, self.device, self.options.reps, limit)
            for name, reason in result.failures.items():
                self.lost(kernel, case, name, RuntimeError(reason))
            mine = quantiles(result.samples.get(OURS, [])).median if found.exact else float("nan")
            for name in ready:
                if name not in notes:
                    continue  # ours beside a later tier: its own rows stand already
                time_of = quantiles(result.samples[name])
                row = replace(notes[name], mode=mode)
                if name in result.failures or not time_of.rounds:
                    rows.append(replace(row, status="left out", reason=result.failures.get(name, "not timed")))
                    continue
                row.median_ms, row.low_ms, row.high_ms, row.rounds = time_of
                row.sm_mhz, row.power_w, row.temperature_c = result.clocks
                self.rates(row, found, mode)
                with contextlib.suppress(RuntimeError):
                    row.peak_mib = _peak(trials[name], self.device)
                if mine == mine and name != OURS:
                    row.speedup = time_of.median / mine
                rows.append(row)
        return rows

    def rates(self, row: Row, found: Found, mode: str) -> None:
        if mode in found.flop and row.median_ms:
            row.gflop = found.flop[mode] / 1e9
            row.tflops = found.flop[mode] / row.median_ms / 1e9 or None
            if self.peaks:
                row.hbm_share = found.bytes[mode] / (row.median_ms * 1e-3) / (self.peaks[1] * 1e12)

    def row(self, kernel: check.Kernel, case: Any, contender: str) -> Row:
        told = {k: v for k, v in asdict(self.machine).items()}
        dtype = self.options.dtype
        return Row(benchmark="kernels", kernel=kernel.name, case=str(case), dtype=dtype, contender=contender, **told)

    def leave_out(self, kernel: check.Kernel, case: Any, everybody: Sequence[Contender], reason: str) -> None:
        self.state.rows += [
            replace(self.row(kernel, case, c.name), status="left out", reason=reason) for c in everybody
        ]

    def lost(self, kernel: check.Kernel, case: Any, contender: str | None, problem: Exception) -> None:
        """After an error that no later call of this process survives: note who it was and start a new process."""
        said = check.one_line(problem)
        if self.device.type != "cuda" or not check.sticky(said):
            return
        self.state.crashed[f"{kernel.name} | {case} | {contender or 'the case'}"] = said
        raise Sticky(said)

    def now(self, kernel: check.Kernel, case: Any, contender: str) -> None:
        """Note who is at work, for the parent of a process that dies of it."""
        if self.options.state:
            Path(f"{self.options.state}.now").write_text(f"{kernel.name} | {case} | {contender}")

    def precompile(self, tier: int, share: float = 0.4) -> None:
        """Fill the compilers' caches on disk from several processes; what fails there fails again, visibly, later."""
        count, key = self.options.compilers, f"{tier} compiled"
        seconds = min(share * self.left(), 240.0)
        if not count or seconds < 20 or key in self.state.done:
            return
        self.state.done.append(key)
        print(f"compiling the contenders of tier {tier} in {count} processes, at most {seconds:.0f} s", flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--budget", str(seconds)]
        workers = [
            subprocess.Popen([*command, "--only-compile", f"{tier},{n},{count}"], stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
            for n in range(count)
        ]  # fmt: skip
        deadline = time.perf_counter() + seconds
        for worker in workers:
            try:
                worker.wait(timeout=max(deadline - time.perf_counter(), 0.1))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self.compiling.clear()

    def only_compile(self, tier: int, number: int, count: int) -> None:
        """A worker of `precompile`: its share of the cases, each contender called once."""
        for place, (kernel, case) in enumerate(self.cases()):
            if place % count != number:
                continue
            torch._dynamo.reset()
            arguments = kernel.draw(case, self.dtype, self.device)
            for contender in field_of.contenders(kernel, self.device):
                if contender.tier == tier and self.left() > 0:
                    with contextlib.suppress(Exception):
                        check.evaluate(contender.build(arguments), kernel.reference, arguments)

    def write(self, end: bool = False) -> str:
        """The results so far; returns the headline."""
        out = Path(self.options.out)
        if self.options.state:
            self.state.spent = self.before + time.perf_counter() - self.started
            self.state.save(Path(self.options.state))
        write_rows(out / "kernels.csv", self.state.rows)
        text, headline = kernel_report.report(self.machine, self.state.rows, self.state.found, self.device.type)
        (out / "kernels.md").write_text(text)
        if end:
            problem = plot.kernels(out / "kernels.csv", out / "kernels.png")
            if problem:
                print(problem)
        return headline


def _trial(
    kernel: check.Kernel, function: Callable[..., Any], arguments: Sequence[Any], judge: check.Judge, mode: str
) -> Trial:
    wanted = list(check.leaves(kernel.reference, arguments).values())

    def forward(_: Any) -> Any:
        return function(*arguments)

    def backward(returned: Any) -> Any:
        outputs = check.named(returned)
        names = [name for name in judge.upstream if name in outputs]
        return torch.autograd.grad(
            [outputs[name] for name in names], wanted, [judge.upstream[name] for name in names], allow_unused=True
        )

    if mode == "forward":
        return Trial(forward)
    if mode == "backward":
        return Trial(backward, lambda: function(*arguments))
    return Trial(lambda _: backward(function(*arguments)))


def _peak(trial: Trial, device: torch.device) -> float | None:
    ready = trial.prepare()
    return peak_memory(lambda: trial.run(ready), device)


def _worst(verdicts: Sequence[dict[str, Any]]) -> float | None:
    ratios = [v["error"] / v["bound"] for v in verdicts if v["bound"] > 0]
    return max(ratios, default=None)


def _why(verdicts: Sequence[check.Verdict]) -> str:
    return "; ".join(
        f"{v.tensor}: {v.note}" if v.note else f"{v.tensor}: error {v.error:.1e}, bound {v.bound:.1e}"
        for v in verdicts
        if not v.ok
    )


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kernel", metavar="NAME", help="this kernel only")
    parser.add_argument("--case", metavar="TEXT", default="", help="cases whose name contains this only")
    parser.add_argument("--dtype", choices=tuple(check.DTYPES), default="bf16")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="default: none on a GPU, 90 on a CPU")
    parser.add_argument("--reps", type=int, metavar="N", help="rounds of a race; default 50 on a GPU, 10 on a CPU")
    parser.add_argument("--compilers", type=int, metavar="N", help="processes that compile contenders beforehand")
    parser.add_argument("--warm", action="store_true", help="only fill the compilers' caches, for a later run")
    parser.add_argument("--state", help=argparse.SUPPRESS)
    parser.add_argument("--only-compile", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu" and chosen.budget is None:
        chosen.budget = 90.0
    if chosen.compilers is None:
        chosen.compilers = min(6, (os.cpu_count() or 1) // 2) if chosen.device == "cuda" else 0
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    ready(chosen.out, chosen.device)
    if chosen.device == "cuda" and not (chosen.state or chosen.warm or chosen.only_compile):
        return supervise([sys.executable, __file__, *(sys.argv[1:] if arguments is None else arguments)])
    bench = Bench(chosen, State.load(Path(chosen.state)) if chosen.state else State())
    if chosen.only_compile:
        bench.only_compile(*map(int, chosen.only_compile.split(",")))
        return 0
    if chosen.warm:
        bench.precompile(1, share=1.0)
        return 0
    if not bench.cases():
        print(f"kernels.py: no case of kernel {chosen.kernel or 'any'} matches {chosen.case!r}")
        return 1
    if chosen.device == "cpu":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # small cases: more threads only wait for one another
        print("on a CPU: the small cases; our kernels do not run there, and nothing here says what a GPU would do")
    try:
        bench.run()
    except Sticky as problem:
        print(f"the GPU's context is lost: {problem}", flush=True)
        bench.write()
        return CONTEXT_LOST
    headline = bench.write(end=True)
    print("\n".join(["", *kernel_report.left_out(bench.state.rows), headline]))
    return 0


def supervise(command: Sequence[str]) -> int:
    """Run the benchmark in a child; where one dies, of a lost context or of a signal, another goes on without the
    contender that was at work.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        now = Path(f"{path}.now")
        for _ in range(MOST_CHILDREN):
            code = subprocess.call([*command, f"--state={path}"])
            if code >= 0 and code != CONTEXT_LOST:
                return code
            if code < 0:
                state = State.load(path)
                who = now.read_text() if now.exists() else ""
                print(f"the benchmark died of signal {-code} at {who or 'its start'}", flush=True)
                if not who or who in state.crashed:
                    return 1
                state.crashed[who] = f"the process died of signal {-code}"
                state.save(path)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
