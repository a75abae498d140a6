"""Clips and images a second: our loader beside what people write by hand, from the same frames of the same files.

    python bench/loader.py --out DIR [--data VIDEOS] [--workers 0 2] [--rounds 5] [--quick]

Contenders take turns, round by round, in one process group; every round opens its files anew, as an epoch over many
files does. torchcodec and decord take part where they are installed (torchcodec needs FFmpeg's libraries):
pip install --no-deps torchcodec==0.13.0 decord==0.6.0. Lists with bad files are measured as they are and after verify.
Then the share of a training step that is spent waiting, with real and with synthetic input.
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import cv2
import torch

from bench import loader_damage, loader_report
from bench.loader_contenders import OURS, PLAIN, CannotRun, Contender, Others, Workload, contenders
from bench.loader_files import make_files, source
from bench.loader_step import waiting
from bench.measure import Machine, Quantiles, machine, orders, quantiles, ready, write_rows
from bevt_fast import config as configuration
from bevt_fast.config import Config
from bevt_fast.data import decode, pace
from bevt_fast.data.sources import Source

LIBRARIES = ("av", "opencv-python-headless", "pillow", "nvidia-dali-cuda130", "torchcodec", "decord")
SAME = 8.0  # grey levels, mean: what two conversions of colours differ by at most, and two clips never


@dataclass
class Row(Machine):
    """One line of loader.csv; empty where it does not apply or was not measured."""

    benchmark: str = "loader"
    stream: str = ""
    contender: str = ""
    workers: int | None = None
    status: str = "ok"  # ok, differs, left out
    reason: str = ""
    median_per_s: float | None = None  # samples
    low_per_s: float | None = None
    high_per_s: float | None = None
    rounds: int | None = None
    cores: float | None = None  # that were busy, workers included
    per_core: float | None = None  # samples in a second of one core's work
    per_gpu: float | None = None
    against_plain: float | None = None  # median of the rounds' ratios
    against_ours: float | None = None
    levels: float | None = None  # mean difference from ours, grey levels
    libraries: str = ""


class Bench:
    """One run of the benchmark."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device)
        self.rows: list[Row] = []
        self.machine = asdict(machine(self.device))
        self.machine["libraries"] = ", ".join(f"{name} {v}" for name in LIBRARIES if (v := _version(name)))

    def run(self) -> None:
        made = self.folder / "made"
        make_files(made, self.options)
        clips = Path(self.options.data) if self.options.data else made
        for stream, place in (("clips", clips), ("images", made)):
            workload = Workload(stream, self.config(stream), source(place, stream, self.options), self.device)
            for workers in self.options.workers:
                self.race(workload, workers)
                self.write()

    def config(self, stream: str) -> Config:
        """One stream with the paper's views; `--quick` makes them small."""
        size = 64 if self.options.quick else 224
        view = {"size": size, "short_side": [64, 80] if self.options.quick else [256, 320]}
        mask = {"name": "tube" if stream == "clips" else "blockwise", "options": {"ratio": 0.5, "min_block": 2}}
        micro_batch = self.options.clips if stream == "clips" else self.options.images
        view |= {} if stream == "clips" else {"colour_jitter": 0.4}
        section = {"source": {"name": "x"}, "mask": mask, "batch": micro_batch, "micro_batch": micro_batch}
        values = {"output": "unused", "tokenizer": {"name": "x"}, "optim": {"lr": 1e-3}, "train": {"steps": 1}}
        return configuration.parse(Config, values | {stream: section | {"view": view}}, "bench")

    def race(self, workload: Workload, workers: int) -> None:
        """Every contender once a round, in a new random order."""
        row = functools.partial(Row, stream=workload.stream, workers=workers, **self.machine)
        other = [
            functools.partial(make, folder=self.folder) for make in (loader_damage.damaged, loader_damage.verified)
        ]
        cast = contenders(Others(self.transcoded, *other))
        everybody = {c.name: c for c in cast if workload.stream in c.streams}
        rows = {name: row(contender=name, reason=contender.note) for name, contender in everybody.items()}
        pictures: dict[str, torch.Tensor] = {}
        rates: dict[str, list[float]] = {name: [] for name in everybody}
        busy: dict[str, list[float]] = {name: [] for name in everybody}
        for number, order in enumerate(orders(list(everybody), self.options.rounds + 1)):
            for name in order:
                if rows[name].status == "left out":
                    continue
                try:
                    rate, cores, first = self.once(everybody[name], workload, workers)
                except Exception as problem:
                    why = str(problem) if isinstance(problem, CannotRun) else f"{type(problem).__name__}: {problem}"
                    rows[name] = replace(rows[name], status="left out", reason=" ".join(why.split())[:300])
                    continue
                pictures.setdefault(name, first)
                if number:  # the first round fills the system's cache of files
                    rates[name].append(rate)
                    busy[name].append(cores)
        for name, one in rows.items():
            if one.status != "left out":
                rows[name] = self.judged(one, rates[name], busy[name])
                if everybody[name].same and OURS in pictures:
                    rows[name] = self.compared(rows[name], pictures[name], pictures[OURS])
        plain = next((name for name in rows if name.startswith("plain")), "")
        for name, one in rows.items():
            one.against_plain = ratio(rates[name], rates.get(plain, []))
            one.against_ours = ratio(rates[name], rates.get(OURS, []))
            print(line(one), flush=True)
        self.rows += rows.values()

    def once(self, contender: Contender, workload: Workload, workers: int) -> tuple[float, float, torch.Tensor]:
        """One round: samples a second, cores busy, and the first batch, which is not timed: it starts the workers."""
        micro_batch = getattr(workload.config, workload.stream).micro_batch
        decode._indexed.cache_clear()  # the next clip is of a file not seen before
        batches = contender.open(workload, workers, micro_batch * (1 + self.options.batches))
        try:
            first = batches.next()[0].float().cpu()
            start, before = time.perf_counter(), _cpu_seconds()
            for _ in range(self.options.batches):
                batches.next()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds, cpu = time.perf_counter() - start, _cpu_seconds() - before
        finally:
            batches.close()
        return micro_batch * self.options.batches / seconds, cpu / seconds, first

    def judged(self, row: Row, rates: Sequence[float], busy: Sequence[float]) -> Row:
        """The row with its figures."""
        found: Quantiles = quantiles(rates)
        row = replace(row, median_per_s=found.median, low_per_s=found.low, high_per_s=found.high, rounds=found.rounds)
        row.cores = quantiles(busy).median
        row.per_core = quantiles([rate / cores for rate, cores in zip(rates, busy) if cores]).median
        row.per_gpu = found.median if self.device.type == "cuda" else None
        return row

    def compared(self, row: Row, picture: torch.Tensor, ours: torch.Tensor) -> Row:
        """The row, and whether its first batch is ours."""
        row.levels = float((picture - ours).abs().mean()) * 58
        if row.levels > SAME:
            row.status, row.reason = "differs", f"not the same frames: {row.levels:.1f} grey levels from ours"
        return row

    def transcoded(self, workload: Workload) -> Source:
        """The workload's videos, phase-split, written by the first call."""
        try:
            from bevt_fast.data import coding, transcode  # type: ignore[attr-defined]
        except ImportError as problem:
            raise CannotRun(f"bevt_fast.data.transcode is not there ({problem})") from None
        out = self.folder / "phases"
        if not out.exists():
            recipe = coding.Recipe(short_side=64 if self.options.quick else 256, stride=3 if self.options.quick else 8)
            transcode.transcode(workload.source, out, recipe, check=False)
        return source(out, "clips", self.options)

    def write(self) -> None:
        """What is known so far."""
        write_rows(Path(self.options.out) / "loader.csv", self.rows, Row)


def ratio(rates: Sequence[float], others: Sequence[float]) -> float | None:
    """The median over the rounds of one rate by another; None where either was not measured."""
    return quantiles([rate / other for rate, other in zip(rates, others)]).median if rates and others else None


def line(row: Row) -> str:
    """A row as a person reads it."""
    head = f"{row.stream:<7}{row.contender:<31}{row.workers} workers  "
    if row.median_per_s is None:
        return f"{head}{row.status}: {row.reason}"
    speed = f"{row.median_per_s:8.2f}/s [{row.low_per_s:.2f}, {row.high_per_s:.2f}]  {row.per_core:.2f} a core's second"
    against = ((row.against_plain, "plain"), (row.against_ours, "ours"))
    ratios = "".join(f"  {share:.2f}x {name}" for share, name in against if share)
    return f"{head}{speed}{ratios}{'  ' + row.reason if row.status != 'ok' else ''}"


def _cpu_seconds() -> float:
    """Of this process and of its children that still run, all threads."""
    seconds = time.process_time()
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with contextlib.suppress(OSError):
                user, system = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
                seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--data", metavar="VIDEOS", help="a folder of videos; default: ten that are made on the spot")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, nargs="+", metavar="N", help="default: 0, and the cores less one")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="timed in a round (%(default)s)")
    parser.add_argument("--clips", type=int, default=2, metavar="N", help="of a batch (%(default)s)")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="of a batch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small files and one round: a rehearsal, not a result")
    chosen = parser.parse_args(arguments)
    if chosen.workers is None:
        chosen.workers = [0] if chosen.quick else sorted({0, max(pace.cores() - 1, 1)})
    if chosen.quick:
        chosen.rounds, chosen.batches, chosen.clips, chosen.images = 1, 2, 1, 2
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    ready(chosen.out, chosen.device)
    if chosen.data is not None and not Path(chosen.data).is_dir():
        print(f"loader.py: --data {chosen.data} is no folder; give one that holds videos")
        return 1
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder))
        print(machine(bench.device).line())
        bench.run()
        remarks: list[str] = []

        def report(sentence: str) -> None:
            print(sentence, flush=True)
            remarks.append(sentence)

        waiting(bench.config("clips"), source(Path(chosen.data or f"{folder}/made"), "clips", chosen), chosen, report)
    loader_report.page(bench.rows, remarks, Path(chosen.out) / "loader.md")
    if problem := loader_report.picture(bench.rows, Path(chosen.out) / "loader.png"):
        print(problem)
    ours = [row for row in bench.rows if row.contender == OURS and row.stream == "clips" and row.against_plain]
    best = max(ours, key=lambda row: row.workers or 0, default=None)
    said = f"{best.against_plain:.2f} times {PLAIN}, {best.workers} workers" if best else "not comparable here"
    print(f"clips, {OURS}: {said}; {Path(chosen.out).name}/loader.csv has every row")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
