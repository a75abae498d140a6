"""What the predictions rest on and nobody has published: rates of one GPU's units in the shapes this model has.

    python bench/open_questions.py --out DIR [--device cuda|cpu] [--budget SECONDS] [--quick]

Four questions: results of ex2 a second in three forms, bf16 products at the widths of the four stages, cuDNN's
convolution in the tokenizer's narrowest layer, frames a second of the video decoder. What cannot be asked here says
why. On a CPU, and with --quick, the same lines run in small: such numbers are worth nothing.
"""

import argparse
import contextlib
import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import numpy as np
import torch
from torch.nn import functional

from bench.measure import Machine, Trial, machine, quantiles, race, ready, write_rows
from bevt_fast.training.gpus import Gpu, of_device

WIDTHS = {128: 25_088, 256: 6_272, 512: 1_568, 1024: 392}  # stage widths of Swin-B -> tokens of a clip, or of 8 images
UNITS = 8  # clips, and eight times as many images: the paper's share of one GPU
KINDS = {"f32": torch.float32, "f16x2": torch.float16, "bf16x2": torch.bfloat16}
BLOCK, ROUNDS = 1024, 4096  # elements of a program, links of a chain
WORTHLESS = "a rehearsal in small: this number is worth nothing"


@dataclass
class Row(Machine):
    """One answer; empty where it was not measured."""

    question: str = ""
    case: str = ""
    status: str = "ok"  # ok, left out, failed
    reason: str = ""
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    roof: float | None = None  # of the data sheet, in the same unit
    rounds: int | None = None
    max_error: float | None = None  # relative, against float64


class Bench:
    """One run: rows are written after each question."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.small = options.quick or self.device.type == "cpu"
        self.machine: Machine = machine(self.device)
        self.gpu: Gpu | None = of_device(self.machine.hardware)
        self.rows: list[Row] = []
        self.ends = time.perf_counter() + options.budget

    def run(self) -> None:
        """All questions; one that fails is a row that says so."""
        questions = {"ex2": self.exponentials, "product": self.products, "convolution": self.convolution,
                     "decoder": self.decoder}  # fmt: skip
        for name, ask in questions.items():
            if time.perf_counter() > self.ends:
                self.add(Row(question=name, status="left out", reason="the time budget was spent before its turn"))
                continue
            try:
                for row in ask():
                    self.add(row)
            except Exception as problem:
                self.add(
                    Row(
                        question=name,
                        status="failed",
                        reason=f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}",
                    )
                )

    def add(self, row: Row) -> None:
        if self.small and row.status == "ok":
            row.reason = "; ".join(part for part in (row.reason, WORTHLESS) if part)
        row = replace(row, **asdict(self.machine))
        self.rows.append(row)
        print(line(row), flush=True)
        write(Path(self.options.out), self.rows, self.machine, self.small)

    def timed(self, row: Row, work: float, run: Callable[[], object]) -> Row:
        """`work` over the time of `run`, in the row's unit, which is per second."""
        found = race({"it": Trial(lambda _: run())}, self.device, 3 if self.small else 30, flush=False)
        if "it" in found.failures:
            row.status, row.reason = "failed", found.failures["it"]
            return row
        times = quantiles(found.samples["it"])
        row.rate, row.low, row.high = (work / (t * 1e-3) for t in (times.median, times.high, times.low))
        row.rounds = times.rounds
        return row

    def exponentials(self) -> Iterator[Row]:
        """Results a second, and how far they are from the truth."""
        processors = 1 if self.small else torch.cuda.get_device_properties(self.device).multi_processor_count
        programs, rounds = 16 * processors, 2 if self.small else ROUNDS
        for kind, dtype in KINDS.items():
            row = Row(
                question="ex2",
                case=kind,
                unit="results/s",
                roof=self.gpu.special if self.gpu and kind == "f32" else None,
            )
            if (
                self.device.type == "cuda"
                and kind == "bf16x2"
                and torch.cuda.get_device_capability(self.device) < (9, 0)
            ):
                row.status, row.reason = "left out", "needs compute capability 9.0"
                yield row
                continue
            x = torch.rand(programs * BLOCK, device=self.device, dtype=torch.float64).mul(8).to(dtype)
            chain = self._chain(kind)
            truth = torch.exp2(-x.double())
            row.max_error = float(((chain(x, 1).double() - truth) / truth).abs().max())
            if self.device.type == "cpu":
                row.reason = "torch's exp2, as a CPU has no ex2"
            yield self.timed(row, float(rounds * x.numel()), lambda chain=chain, x=x: chain(x, rounds))

    def _chain(self, kind: str) -> Callable[[torch.Tensor, int], torch.Tensor]:
        if self.device.type == "cpu":
            return _chain_on_cpu
        from bench.exponentials import chain

        def launched(x: torch.Tensor, rounds: int) -> torch.Tensor:
            target, launch = torch.empty_like(x), cast(Any, chain[(x.numel() // BLOCK,)])
            launch(x, target, rounds, KIND=kind, BLOCK=BLOCK, num_warps=4)
            return target

        return launched

    def products(self) -> Iterator[Row]:
        """fc1 of every stage, for the tokens of both streams: (tokens, K) times (K, 4K)."""
        for width, tokens in WIDTHS.items():
            rows = 64 if self.small else 2 * UNITS * tokens
            a = torch.randn(rows, width, device=self.device, dtype=torch.bfloat16)
            b = torch.randn(width, 4 * width, device=self.device, dtype=torch.bfloat16)
            flops, moved = 2.0 * rows * width * 4 * width, a.nbytes + b.nbytes + 2.0 * rows * 4 * width
            row = Row(question="product", case=f"K = {width}: {rows} x {width} x {4 * width}, bf16", unit="FLOP/s")
            row.roof = self._roof(flops, moved)
            yield self.timed(row, flops, lambda a=a, b=b: a @ b)

    def convolution(self) -> Iterator[Row]:
        """The tokenizer's first group: 3 x 3, 64 channels, 112 x 112 pixels, channels last, float16."""
        frames, side = (1, 16) if self.small else (64, 112)
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        x = torch.randn(frames, 64, side, side, device=self.device, dtype=dtype)
        x = x.to(memory_format=torch.channels_last)
        weight = torch.randn(64, 64, 3, 3, device=self.device, dtype=dtype).to(memory_format=torch.channels_last)
        flops = 2.0 * frames * side**2 * 64 * 64 * 9
        row = Row(
            question="convolution",
            case=f"{frames} frames of {side} x {side}, 64 to 64 channels, 3 x 3, {dtype}",
            unit="FLOP/s",
        )
        row.roof = self._roof(flops, 2.0 * x.nbytes)
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
            yield self.timed(row, flops, lambda: functional.conv2d(x, weight, padding=1))

    def decoder(self) -> Iterator[Row]:
        """H.264 at 340 x 256, every frame of every file, several files at once."""
        with contextlib.suppress(ImportError):
            from bevt_fast.data import pipeline

            row = Row(question="decoder", case="H.264, 340 x 256, every frame", unit="frames/s")
            if (missing := pipeline.lacking(self.device)) or self.device.type == "cpu":
                row.status, row.reason = "left out", missing or "DALI decodes H.264 on a GPU only"
                yield row
                return
            files, count = 32, 128
            encoded = np.frombuffer(_video(count), np.uint8)
            graph = pipeline.build("clips", files, None, self.device, threads=8)

            def decode() -> None:
                graph.feed_input("encoded", [encoded] * files)
                graph.feed_input("frames", [np.arange(count, dtype=np.int32)] * files)
                graph.run()
                torch.cuda.synchronize(self.device)

            yield self.timed(row, float(files * count), decode)
            return
        yield Row(question="decoder", status="left out", reason="PyAV, OpenCV or pydantic is not installed")

    def _roof(self, flops: float, moved: float) -> float | None:
        """FLOP/s at which tensor cores or memory, whichever is slower, would do it by the data sheet."""
        if self.gpu is None:
            return None
        return flops / max(flops / self.gpu.peak("bf16"), moved / (self.gpu.bandwidth * 1e12))


def _chain_on_cpu(x: torch.Tensor, rounds: int) -> torch.Tensor:
    for _ in range(rounds):
        x = torch.exp2(-x)
    return x


def _video(frames: int) -> bytes:
    """H.264 with a keyframe every 12 frames; moving gradients, which are no easier than a film's."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=30, options={"preset": "fast"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 340, 256, "yuv420p", 12
        down, across = np.mgrid[:256, :340]
        grain = np.random.RandomState(0).randint(0, 24, (256, 340))
        for k in range(frames):
            planes = [(down + s * k + across * (s + 1) // 2 + grain) % 256 for s in (1, 2, 3)]
            picture = np.stack(planes, -1).astype(np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())
    return target.getvalue()


def line(row: Row) -> str:
    """A row as a person reads it."""
    head = f"{row.question:<12}{row.case:<58}"
    if row.rate is None:
        return f"{head}{row.status}: {row.reason}"
    power = max(min(int(math.log10(row.rate)) // 3, 4), 0)
    scale, unit = 1000.0**power, ("", "k", "M", "G", "T")[power] + row.unit
    text = f"{head}{row.rate / scale:8.2f} {unit} [{row.low / scale:.2f}, {row.high / scale:.2f}]"  # pyright: ignore[reportOptionalOperand]
    text += f"  {row.rate / row.roof:.0%} of the data sheet's roof" if row.roof else ""
    text += f"  error {row.max_error:.1e}" if row.max_error is not None else ""
    return f"{text}  {row.reason}".rstrip()


def write(out: Path, rows: Sequence[Row], found: Machine, small: bool) -> None:
    """Both files."""
    write_rows(out / "open_questions.csv", rows, Row)
    text = ["# Open questions", "", found.line(), "", f"`{found.command}`", ""]
    text += [f"**{WORTHLESS[0].upper()}{WORTHLESS[1:]}.**", ""] if small else []
    text += ["```", *map(line, rows), "```", ""]
    (out / "open_questions.md").write_text("\n".join(text))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="no question begins later")
    parser.add_argument("--quick", action="store_true", help="small sizes: a rehearsal, not a result")
    options = parser.parse_args(arguments)
    ready(options.out, options.device)
    bench = Bench(options)
    print(bench.machine.line())
    bench.run()
    answered = sum(row.status == "ok" for row in bench.rows)
    failed = [row.question for row in bench.rows if row.status == "failed"]
    said = f"; FAILED: {', '.join(failed)}" if failed else ""
    print(f"{answered} of {len(bench.rows)} answered{said}{f'; {WORTHLESS}' if bench.small else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
