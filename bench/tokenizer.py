"""Frames a second of the DALL-E encoder: ours beside plain PyTorch, and beside each speed how many tokens are the same.

    python bench/tokenizer.py --out DIR [--device cuda|cpu] [--frames N] [--quick] [--weights FILE]

Agreement comes first: a float32 contender whose tokens are not those of plain float32 gets no speed. Without --weights
the weights are random; how often real ones agree, only real ones tell. The last line is the headline.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bench import plot
from bench.measure import Machine, Row, Trial, machine, quantiles, race, ready, write_rows
from bevt_fast.errors import UserError
from bevt_fast.tokenizers import _convolution, dalle

OURS, BY_FEW, AT_ONCE = "ours", "NCHW, a few at a time", "NCHW, all at once"
SIDE, QUICK_SIDE = 112, 32  # pixels; 112 is BEVT's (SPEC 3.2)
FEW = {"cpu": 4, "cuda": 64}
JUDGED = 4  # frames whose scores are compared at a time: 6.4 MB a frame
MAX_FRAMES = 4096


@dataclass
class TokenRow(Row):
    """A line of tokenizer.csv: the times are those of all frames, one call."""

    frames: int | None = None
    frames_per_s: float | None = None
    same_on_noise: float | None = None  # share of tokens that plain float32 gives
    same_on_shapes: float | None = None
    score_difference: float | None = None  # largest, from plain float32, where scores have this size:
    score_size: float | None = None


class Contender(NamedTuple):
    name: str
    dtype: str
    scores: Callable[[Tensor], Tensor]  # (n, 3, H, W) -> (n, V, h, w)
    ids: Callable[[Tensor], Tensor]
    exact: bool = False  # float32, so that its tokens must be those of plain float32


def noise(frames: int, side: int) -> Tensor:
    """(frames, 3, side, side) token pixels of random 8-bit colours."""
    generator = torch.Generator().manual_seed(0)
    return 0.8 * torch.randint(0, 256, (frames, 3, side, side), generator=generator) / 255 + 0.1


def shapes(frames: int, side: int) -> Tensor:
    """(frames, 3, side, side): discs that move over a colour gradient, with a little noise, in 8 bits."""
    generator = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij")
    corners, colours = torch.rand(3, 3, generator=generator), torch.rand(4, 3, 1, 1, generator=generator)
    start, speed = torch.rand(4, 2, generator=generator), torch.rand(4, 2, generator=generator) / 8 - 1 / 16
    pictures = []
    for t in range(frames):
        picture = (
            corners[0, :, None, None] * x + corners[1, :, None, None] * y * (1 - x) + corners[2, :, None, None] / 4
        )
        for (row, column), colour, radius in zip((start + t * speed) % 1, colours, (0.3, 0.2, 0.12, 0.06)):
            picture = torch.where((y - row).square() + (x - column).square() < radius**2, colour, picture)
        pictures.append(picture + 0.02 * torch.randn(picture.shape, generator=generator))
    levels = (torch.stack(pictures).clamp(0, 1) * 255).round()
    return 0.8 * levels / 255 + 0.1


def plain_scores(tokenizer: dalle.Dalle, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The encoder in torch's own operators, as it is published (SPEC 3.1): the last convolution in float32."""
    blocks = tokenizer.blocks

    def convolve(name: str, x: Tensor) -> Tensor:
        w, b = (blocks.get_parameter(f"{name}.{part}").to(x.dtype) for part in "wb")
        return functional.conv2d(x, w, b, padding=w.shape[-1] // 2)

    x = convolve("input", x.to(dtype))
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name, y = f"group_{group}.block_{block}", x
            for i in (1, 2, 3, 4):
                y = convolve(f"{name}.res_path.conv_{i}", functional.relu(y))
            x = (convolve(f"{name}.id_path", x) if group > 1 and block == 1 else x) + y / 64
        x = functional.max_pool2d(x, 2) if group < 4 else x
    return convolve("output.conv", functional.relu(x).float())


def contenders(tokenizer: dalle.Dalle, device: torch.device, quick: bool) -> list[Contender]:
    """Everybody, ours in each precision; the compiled one only where there is time for it."""
    few, half = FEW[device.type], torch.float16 if device.type == "cuda" else torch.float32
    told = "fp16" if half == torch.float16 else "fp32"

    def plain(name: str, frames: int | None, layout: torch.memory_format) -> Contender:
        def scores(x: Tensor) -> Tensor:
            return plain_scores(tokenizer, x.contiguous(memory_format=layout), half)

        def ids(x: Tensor) -> Tensor:
            return torch.cat([scores(part).argmax(1) for part in x.split(frames or len(x))])

        return Contender(name, told, scores, ids, half == torch.float32)

    def own(name: str, precision: dalle.Precision, compile: bool = False) -> Contender:
        same = dalle.from_tensors(tokenizer.state_dict(), name)  # the same memory
        same.blocks.precision, same.blocks.compiles = precision, compile
        dtype = told if precision == "official" else precision
        return Contender(name, dtype, same.logits, same, dtype == "fp32")

    found = [
        plain(AT_ONCE, None, torch.contiguous_format),
        plain(BY_FEW, few, torch.contiguous_format),
        plain("channels_last, a few at a time", few, torch.channels_last),
        own(OURS, "official"),
        *([own("ours, fp32", "fp32")] if device.type == "cuda" else []),
        own("ours, bf16", "bf16"),
    ]
    return found if quick else [*found, own("ours, compiled", "official", compile=True)]


class Judge:
    """Tokens and scores of plain float32, and what others differ from them. Scores are those of the first frames."""

    def __init__(self, tokenizer: dalle.Dalle, pictures: dict[str, Tensor]):
        self.pictures = pictures
        self.ids: dict[str, Tensor] = {}
        self.scores: dict[str, Tensor] = {}
        for name, x in pictures.items():
            with _convolution.ieee_float32(x.device):
                parts = (plain_scores(tokenizer, part, torch.float32) for part in x.split(JUDGED))
                self.scores[name] = next(parts)
                self.ids[name] = torch.cat([scores.argmax(1) for scores in itertools.chain([self.scores[name]], parts)])

    def fill(self, row: TokenRow, contender: Contender) -> None:
        """Share of equal tokens and the largest difference of a score; where they must agree and do not, the status."""
        row.same_on_noise, row.same_on_shapes = (
            float((contender.ids(x) == self.ids[name]).double().mean()) for name, x in self.pictures.items()
        )
        apart = [(contender.scores(x[:JUDGED]) - self.scores[name]).abs().max() for name, x in self.pictures.items()]
        row.score_difference = float(max(apart))
        row.score_size = float(max(scores.abs().max() for scores in self.scores.values()))
        if contender.exact and (row.same_on_noise, row.same_on_shapes) != (1.0, 1.0):
            row.status, row.reason = "differs", "float32, but not the tokens of plain float32"


@torch.no_grad()
def compare(tokenizer: dalle.Dalle, told: Machine, chosen: argparse.Namespace) -> list[TokenRow]:
    """A row for every contender, in their order."""
    device, side = torch.device(chosen.device), QUICK_SIDE if chosen.quick else SIDE
    pictures = {"noise": noise(chosen.frames, side).to(device), "shapes": shapes(chosen.frames, side).to(device)}
    judge, flop = Judge(tokenizer, pictures), _flop(tokenizer, side) * chosen.frames
    rows, trials = [], {}
    for contender in contenders(tokenizer, device, chosen.quick):
        row = TokenRow(
            benchmark="tokenizer", kernel="dalle", case=f"{chosen.frames} frames of {side}x{side}", mode="forward",
            contender=contender.name, dtype=contender.dtype, frames=chosen.frames, gflop=flop / 1e9, **asdict(told),
        )  # fmt: skip
        try:
            judge.fill(row, contender)
        except Exception as problem:
            row.status, row.reason = "left out", f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"
        if row.status == "ok":
            trials[contender.name] = Trial(lambda _, ids=contender.ids: ids(pictures["shapes"]))
        rows.append(row)
    found = race(trials, device, rounds=3 if chosen.quick else None, budget=300.0, flush=False)
    for row in rows:
        samples = found.samples.get(row.contender, [])
        if row.contender in found.failures:
            row.status, row.reason = "left out", found.failures[row.contender]
        elif samples:
            _time(row, samples, found.clocks)
    mine = next(row.median_ms for row in rows if row.contender == OURS)
    for row in rows:
        row.speedup = row.median_ms / mine if row.median_ms and mine else None
    return rows


def _time(row: TokenRow, samples: Sequence[float], clocks: tuple[float | None, float | None, float | None]) -> None:
    row.median_ms, row.low_ms, row.high_ms, row.rounds = quantiles(samples)
    row.sm_mhz, row.power_w, row.temperature_c = clocks
    row.frames_per_s = 1e3 * (row.frames or 0) / row.median_ms
    row.tflops = (row.gflop or 0.0) / row.median_ms


def _flop(tokenizer: dalle.Dalle, side: int) -> float:
    """Of one frame, every cell scored."""
    with torch.device("meta"):
        shape = dalle.Dalle(len(tokenizer.blocks.get_parameter("input.w")), tokenizer.vocab_size)
    with FlopCounterMode(display=False) as counter:
        plain_scores(shape, torch.empty(1, 3, side, side, device="meta"), torch.float32)
    return counter.get_total_flops()


def report(told: Machine, rows: Sequence[TokenRow], weights: str) -> str:
    """The whole text; its last line is the headline."""
    lines = [
        "# Tokenizer", "", told.line(), "", f"`{told.command}`", "",
        f"DALL-E's encoder with {weights}; {rows[0].case}, every cell named. Contenders interleaved in one process; "
        "median, 20 and 80 % quantiles. Same tokens: those of plain float32, on random pixels and on discs that move "
        "over a gradient with a little noise, both made here; scores are compared on the first frames of each. Times "
        "ours: the contender's time over ours.", "",
        "| contender | dtype | frames/s | 20 to 80 % | TFLOP/s | times ours | same, noise | same, shapes | largest "
        "score difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        speed = ["", "", "", row.reason]
        if row.frames_per_s and row.low_ms and row.high_ms:
            span = [1e3 * (row.frames or 0) / time for time in (row.high_ms, row.low_ms)]
            speed = [
                f"{row.frames_per_s:.4g}", "{:.4g} to {:.4g}".format(*span), f"{row.tflops:.3g}",
                f"{row.speedup:.2f}" if row.speedup else "",
            ]  # fmt: skip
        agreement = ["" if x is None else f"{x:.3%}" for x in (row.same_on_noise, row.same_on_shapes)]
        differs = "" if row.score_difference is None else f"{row.score_difference:.1e} of {row.score_size:.3g}"
        lines.append("| " + " | ".join([row.contender, row.dtype, *speed, *agreement, differs]) + " |")
    return "\n".join([*lines, "", _headline(rows, weights), ""])


def _headline(rows: Sequence[TokenRow], weights: str) -> str:
    by_name = {row.contender: row for row in rows}
    mine = by_name[OURS]
    if mine.frames_per_s is None:
        return f"tokenizer: no speed, for ours is {mine.status}: {mine.reason}"
    ratios = [
        f"{by_name[name].speedup:.2f} x {name}" for name in (AT_ONCE, BY_FEW) if by_name[name].speedup is not None
    ]
    same = f"{mine.same_on_noise:.2%} of tokens as plain float32 on noise, {mine.same_on_shapes:.2%} on shapes"
    return f"tokenizer: {mine.frames_per_s:.4g} frames/s, {', '.join(ratios)}; {same}; {weights}; {mine.hardware}"


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, metavar="N", help="default 24; 256 on a GPU; 5 with --quick")
    parser.add_argument("--quick", action="store_true", help="a narrow encoder, small frames, nothing compiled")
    parser.add_argument(
        "--weights", metavar="FILE", help="OpenAI's encoder.pkl or the safetensors of prepare.py convert"
    )
    chosen = parser.parse_args(arguments)
    if chosen.frames is None:
        chosen.frames = 5 if chosen.quick else 256 if chosen.device == "cuda" else 24
    if not 0 < chosen.frames <= MAX_FRAMES:
        parser.error(f"--frames {chosen.frames}: give a number from 1 to {MAX_FRAMES}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    device = torch.device(chosen.device)
    out = ready(chosen.out, chosen.device)
    try:
        torch.manual_seed(0)
        if chosen.weights:
            tokenizer, weights = dalle.load(chosen.weights), "weights from a file"
        else:
            tokenizer = dalle.Dalle(64, 512) if chosen.quick else dalle.Dalle()
            weights = f"random weights, width {len(tokenizer.blocks.get_parameter('input.w'))}"
    except (UserError, OSError) as problem:
        print(f"tokenizer.py: {problem}")
        return problem.exit_code if isinstance(problem, UserError) else 1
    told = machine(device)
    rows = compare(tokenizer.to(device), told, chosen)
    write_rows(out / "tokenizer.csv", rows)
    text = report(told, rows, weights)
    (out / "tokenizer.md").write_text(text)
    problem = plot.kernels(out / "tokenizer.csv", out / "tokenizer.png")
    print("\n".join([*([problem] if problem else []), *text.splitlines()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
