"""The whole joint pretraining step: ours beside the official one, and what each optimisation is worth.

    python bench/throughput.py --out DIR [--config FILE] [--device cpu|cuda] [--size tiny|small|base|large] [--quick]

Frozen tokenizer, both streams, losses, backward, clipping, AdamW; contenders take turns in one process, from the same
weights, on the same batches, with the same samples dropped. They first take the same steps: where their losses do not
agree, no speed is printed. The last line is the headline.
"""

import argparse
import importlib.util
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch

from bench import throughput_gate as gate
from bench import throughput_memory as memory
from bench import throughput_parts as parts
from bench import throughput_plot
from bench import throughput_report as report
from bench.measure import Race, Trial, machine, quantiles, race, ready
from bench.throughput_contenders import (
    BESIDE,
    COMPILED,
    KINDER,
    NAMES,
    OFFICIAL,
    OURS,
    CannotRun,
    Contender,
    beside,
    build,
    yardsticks,
)
from bench.throughput_state import State, first_weights
from bench.throughput_work import Work, prepare
from bevt_fast.data.batch import JointBatch, Losses
from bevt_fast.errors import MachineError, UserError

ROUNDS = {"cpu": 5, "cuda": 30}
QUICK_ROUNDS, IMAGE_ROUNDS = 2, 10
MAIN = (OFFICIAL, KINDER, COMPILED, OURS)  # whose memory is measured by default
LEAST_STEPS = 2  # one shows the forward pass only


class Bench:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, work: Work, arguments: Sequence[str]) -> None:
        self.options, self.work, self.arguments = options, work, arguments
        self.machine = machine(work.device)
        self.contenders: dict[str, Contender] = {}
        self.results = {name: report.Result(name) for name in NAMES}
        self.gate = gate.Gate(work, options.steps)
        self.extra: dict[str, Any] = {}

    def run(self) -> int:
        """Gate, race, parts, memory; returns the exit code."""
        self.build()
        self.agree()
        if self.gate.differs:
            return 1
        raced = self.race()
        late = self.gate.check_rounds(self.losses)
        if late:
            print(f"the timed steps differ: {late}; no speed is printed")
            return 1
        for name, result in self.results.items():
            result.samples = raced.samples.get(name, [])
            result.reason = result.reason or raced.failures.get(name, "")
        if not self.results[OURS].samples:
            raise MachineError(memory.sentence(self.work, self.results[OURS].reason))
        self.extra["matmul"] = parts.matmul_rate(self.work.device, self.work.config.train.precision)
        self.write()
        self.measure_parts()
        self.measure_recipe()
        self.measure_memory()
        headline = self.write()
        problem = throughput_plot.ladder(*(Path(self.options.out) / f"throughput.{kind}" for kind in ("csv", "png")))
        print("\n".join([*self.cannot(), *([problem] if problem else []), headline]))
        return 0

    def cannot(self) -> list[str]:
        """Who did not run, and why."""
        return [f"{name} cannot run: {r.reason}" for name, r in self.results.items() if not r.samples]

    def build(self) -> None:
        """Every contender, or the reason why it cannot run."""
        self.first = first_weights(self.work)
        state = self.state = State(self.work, first=self.first)
        for name in NAMES:
            try:
                if name == COMPILED and not self.options.compile:
                    raise CannotRun("left out by --no-compile")
                if name not in MAIN and self.options.contenders == "main":
                    raise CannotRun("left out by --contenders main")
                memory.fits(self.work, name)
                if name == BESIDE:
                    self.contenders[name] = beside(self.work, self.contenders.get(OURS))
                else:
                    self.contenders[name] = build(name, self.work, state, self.options.engine, self.first)
            except CannotRun as problem:
                self.results[name].reason = str(problem)
        if OURS not in self.contenders:
            raise MachineError(memory.sentence(self.work, self.results[OURS].reason))

    def agree(self) -> None:
        """The same steps by everybody."""
        for name in list(self.contenders):
            start = time.perf_counter()
            try:
                self.gate.take(self.contenders[name])
            except Exception as problem:
                if name == OURS and memory.is_out_of_memory(problem):
                    raise MachineError(memory.sentence(self.work, gate.one_line(problem))) from problem
                if name in (OFFICIAL, OURS) and not memory.is_out_of_memory(problem):
                    raise
                self.results[name].reason = gate.one_line(problem)
                del self.contenders[name]
                continue
            self.results[name].note = self.contenders[name].note
            self.results[name].gate_s = time.perf_counter() - start
            print(f"{name}: {self.options.steps} steps in {self.results[name].gate_s:.1f} s", flush=True)
        if len(self.contenders) < 2:
            raise MachineError(memory.sentence(self.work, "nothing that ours could be compared with fits"))
        if self.work.config.train.precision == "bf16":
            self.gate.measure_bound(yardsticks(self.work, self.state))
        self.gate.judge()
        print(self.gate.text(), flush=True)

    def race(self) -> Race:
        """Every contender once a round, each from the first weights."""
        self.losses: dict[str, list[Losses]] = {name: [] for name in self.contenders}
        trials = {name: self.trial(contender) for name, contender in self.contenders.items()}
        rounds = self.options.rounds or (QUICK_ROUNDS if self.options.quick else ROUNDS[self.work.device.type])
        return race(trials, self.work.device, rounds, self.options.budget, warm_up=0, flush=False, hold=False, seed=0)

    def trial(self, contender: Contender) -> Trial:
        taken, busy = self.losses[contender.name], self.results[contender.name].busy

        def ready() -> JointBatch:
            number = len(taken)
            contender.restore(False)
            torch.manual_seed(number)
            return contender.ready(self.work.batches[number % len(self.work.batches)])

        def step(batch: JointBatch) -> None:
            before = time.process_time()
            taken.append(contender.step(batch))
            busy.append((time.process_time() - before) * 1e3)

        return Trial(step, ready)

    def measure_memory(self) -> None:
        """A fresh process for each, one after another."""
        command = [sys.executable, __file__, *self.arguments]
        for name in self.contenders:
            if self.has_detail(name):
                found = memory.ask([*command, "--only", name])
                self.results[name].peak_mib = found.get("peak_mib")
                self.results[name].before_mib = found.get("before_mib")
                if "reason" in found:
                    self.extra.setdefault("lines", []).append(
                        f"\nThe memory of {name} was not measured: {found['reason']}."
                    )

    def measure_parts(self) -> None:
        """One more step each, with marks on its parts; on a GPU another one that shows how long it waits."""
        cuda = self.work.device.type == "cuda"
        for name, contender in self.contenders.items():
            result, batch = self.results[name], self.work.batches[0]
            if not self.has_detail(name):
                continue
            try:
                result.parts = parts.shares(contender, batch, self.work.device)
                wanted = name == OURS and self.options.profile
                if cuda or wanted:
                    file = Path(self.options.out) / "throughput_trace.json" if wanted else None
                    seen = parts.trace(contender, batch, self.work.device, file)
                    if seen.busy_ms is not None:
                        result.waiting = max(0.0, 1 - seen.busy_ms / quantiles(result.samples).median)
                    if wanted:
                        (Path(self.options.out) / "throughput_kernels.txt").write_text(seen.table)
            except Exception as problem:
                self.say(f"The parts of {name} were not measured: {gate.one_line(problem)}.")

    def has_detail(self, name: str) -> bool:
        """Whether more than the speed of this contender is asked for."""
        asked = {"none": (), "main": MAIN, "all": NAMES}[self.options.detail]
        return name in asked and bool(self.results[name].samples)

    def measure_recipe(self) -> None:
        """On a GPU: the images alone, as stage one trains them, and the days that both stages take."""
        work, mine = self.work, self.contenders[OURS]
        both = work.config.images and work.config.clips
        if work.device.type != "cuda" or not both or self.options.quick or not self.results[OURS].samples:
            return

        def ready() -> JointBatch:
            mine.restore(False)
            return mine.ready(work.batches[0]._replace(clips=None))

        alone = race({OURS: Trial(mine.step, ready)}, work.device, IMAGE_ROUNDS, warm_up=1, flush=False, hold=False)
        if alone.failures:
            self.say(f"The days of the recipe are not known: images alone, {alone.failures[OURS]}.")
            return
        time = quantiles(alone.samples[OURS]).median
        self.say(report.recipe(work, self.results[OURS], work.count("images") / time * 1e3, self.machine.hardware))

    def say(self, sentence: str) -> None:
        """For the report."""
        self.extra.setdefault("lines", []).extend(["", sentence])

    def write(self) -> str:
        """The files so far; returns the headline."""
        out = Path(self.options.out)
        return report.write(out, self.machine, self.work, self.results, self.gate, self.extra)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    cuda = torch.cuda.is_available()
    has_deepspeed = importlib.util.find_spec("deepspeed") is not None
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--size", choices=("tiny", "small", "base", "large"), default="base")
    parser.add_argument("--config", metavar="FILE", help="time what this configuration trains, on synthetic data")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --config")
    parser.add_argument("--units", type=positive, metavar="N", help="1 clip and 8 images each; default 1, on a GPU 8")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--tokenizer", metavar="FILE", help="its weights; default: random ones of the real width")
    parser.add_argument("--steps", type=positive, default=LEAST_STEPS, help="that must agree before anything is timed")
    parser.add_argument("--rounds", type=positive, metavar="N", help="timed steps; default 30 on a GPU, 5 on a CPU")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="after which no further round starts")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch on a CPU")
    parser.add_argument("--engine", choices=("deepspeed", "plain"), default="deepspeed" if has_deepspeed else "plain")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--contenders", choices=("main", "all"), default="all", help="main: without the ladder")
    parser.add_argument("--detail", choices=("main", "all", "none"), default="main", help="whose memory and parts")
    parser.add_argument("--profile", action="store_true", help="write a chrome trace and the top kernels of ours")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a rehearsal, no figure")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.steps < LEAST_STEPS:
        parser.error(f"--steps {chosen.steps}: at least {LEAST_STEPS}, since one step never sees an update")
    return chosen


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    ready(chosen.out, chosen.device)
    try:
        return start(chosen, sys.argv[1:] if arguments is None else arguments)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return problem.exit_code


def start(chosen: argparse.Namespace, arguments: Sequence[str]) -> int:
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    work = prepare(chosen)
    if chosen.only:
        print(json.dumps(memory.peak(chosen.only, work, chosen.engine)))
        return 0
    bench = Bench(chosen, work, arguments)
    print("\n".join([bench.machine.line(), report.task(work), *work.notes]), flush=True)
    return bench.run()


if __name__ == "__main__":
    sys.exit(main())
