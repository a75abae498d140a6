"""The same seed with reference and fused kernels: the same loss curve? On synthetic data, in bf16.

    python bench/curve.py [--model small|base|tiny] [--steps 500] [--budget SECONDS] [--out DIR]

Four runs take turns step by step: reference and fused in bf16, the reference in float32, the reference from another
seed. The law: over all steps the fused curve is at most twice as far from float32 as the reference in bf16 is, and
closer to that than another seed. A budget that ends early ends all four at the same step.
"""

import argparse
import contextlib
import csv
import importlib
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch

import bevt_kernels
from bevt_kernels import runtime

LEFT_OUT = 77  # exit code: something is missing, and the last line says what
BATCHES = 16  # that come again and again, so that there is something to learn
TIMES = 2  # as far from the truth as torch itself: the law of every kernel
# what is run: shape of the encoder, side, frames, clips, images, vocabulary. The small one has every kind of block
# (shifted or not, whole windows or clipped ones) and 500 steps of it take seconds on a GPU.
SIZES: dict[str, tuple[dict[str, Any], int, int, int, int, int]] = {
    "tiny": ({"embed_dim": 32, "depths": (1,) * 4, "heads": (1, 2, 4, 8), "window": (2, 2, 2)}, 32, 4, 1, 1, 64),
    "small": ({"embed_dim": 96, "depths": (2, 2, 2, 1), "heads": (3, 6, 12, 24)}, 112, 8, 4, 16, 8192),
    "base": ({}, 224, 16, 2, 8, 8192),
}


class Role(NamedTuple):
    """One of the four runs."""

    name: str
    implementation: runtime.Implementation
    seed: int
    is_exact: bool = False  # float32 throughout


ROLES = (
    Role("float32", "reference", 0, is_exact=True),
    Role("reference", "reference", 0),
    Role("fused", "fused", 0),
    Role("another seed", "reference", 1),
)


class Curve:
    """One model in training. The data are the same whatever the seed; weights and drop path follow it."""

    def __init__(self, role: Role, size: str, device: torch.device) -> None:
        from bevt_fast.models.bevt import Bevt
        from bevt_fast.models.video_swin import VideoSwinConfig
        from bevt_fast.objectives.joint import JointObjective

        self.role, self.size, self.device = role, size, device
        shape = VideoSwinConfig.preset("base") if size == "base" else VideoSwinConfig(**SIZES[size][0])
        torch.manual_seed(role.seed)
        self.objective = JointObjective(Bevt(shape, SIZES[size][-1]).to(device)).train()
        self.optimiser = torch.optim.AdamW(
            self.objective.parameters(), lr=3e-4, weight_decay=0.05, fused=device.type == "cuda"
        )
        self.losses: list[torch.Tensor] = []

    def step(self, batch: Any, targets: Any) -> None:
        """Forward, backward, update; the loss stays on the device, so that nothing waits for it."""
        step = len(self.losses)
        torch.manual_seed(1000 * self.role.seed + step)  # drop path draws the same whoever ran before
        autocast = torch.autocast(self.device.type, torch.bfloat16)
        with bevt_kernels.implementation(self.role.implementation):
            with contextlib.nullcontext() if self.role.is_exact else autocast:
                total = self.objective(batch, targets).total
            total.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.losses.append(total.detach())


def batch(number: int, size: str, device: torch.device) -> tuple[Any, Any]:
    """Random pixels, random hidden cells, random targets."""
    from bevt_fast.data.batch import Clips, Images, JointBatch, Targets

    _, side, frames, clips, images, vocabulary = SIZES[size]
    draw, cells = torch.Generator(device).manual_seed(number), side // 16

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, device=device)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=draw, device=device)

    image_mask = pixels(images, cells, cells) > 0
    clip_mask = (pixels(clips, 1, cells, cells) > 0).expand(-1, frames // 2, -1, -1).contiguous()
    drawn = JointBatch(
        Images(pixels(images, 3, side, side), pixels(0), image_mask),
        Clips(pixels(clips, 3, frames, side, side), pixels(0), clip_mask),
    )
    return drawn, Targets(ids(images, cells, cells), ids(clips, frames, cells, cells))


def train(options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Loss by step of each role, as many steps as the budget allows, the same number for all."""
    started = time.perf_counter()
    curves = [Curve(role, options.model, device) for role in ROLES]
    batches = [batch(number, options.model, device) for number in range(BATCHES)]
    for step in range(options.steps):
        for curve in curves:
            curve.step(*batches[step % BATCHES])
        if step % 10 == 9 and device.type == "cuda":
            torch.cuda.synchronize(device)  # or the clock would show how fast the host queues
        if time.perf_counter() - started > options.budget:
            break
    losses = {curve.role.name: torch.stack(curve.losses).double().tolist() for curve in curves}
    print(f"{len(curves[0].losses)} steps of each in {time.perf_counter() - started:.1f} s", flush=True)
    return losses


def judge(losses: dict[str, list[float]], asked: int) -> tuple[bool, str]:
    """Whether the law holds, and the figures as a sentence."""
    own = _distance(losses["float32"], losses["reference"])
    ours = _distance(losses["float32"], losses["fused"])
    between, seeds = (_distance(losses["reference"], losses[name]) for name in ("fused", "another seed"))
    finite = all(math.isfinite(loss) for curve in losses.values() for loss in curve)
    ok = finite and ours <= TIMES * own and between < seeds
    count = len(losses["fused"])
    short = f" (of {asked}: the budget was spent)" if count < asked else ""
    return ok, (
        f"{count} steps{short}, mean distance: float32 to reference {own:.2e}, float32 to fused {ours:.2e} (at most "
        f"{TIMES} times that), reference to fused {between:.2e}, seed to seed {seeds:.2e}: {'ok' if ok else 'FAILS'}"
    )


def write(folder: Path, losses: dict[str, list[float]]) -> None:
    """curve.csv: a step a line."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *losses])
        writer.writerows([step, *(f"{loss:.6g}" for loss in row)] for step, row in enumerate(zip(*losses.values())))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=tuple(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="after which no step begins")
    parser.add_argument("--out", metavar="DIR", help="where curve.csv is written")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: at least 1")
    try:
        importlib.import_module("bevt_fast.objectives.joint")
    except ImportError as problem:
        print(f"the whole-model curve is left out: {problem}")
        return LEFT_OUT
    device = torch.device("cuda" if torch.cuda.is_available() and not runtime.INTERPRETED else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # float32 is the truth here
    print(f"the {options.model} model, bf16 autocast, AdamW, {options.steps} steps, {device.type}", flush=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = train(options, device)
    for sentence in sorted({str(w.message) for w in said if "the reference answers instead" in str(w.message)}):
        print(f"not fused: {sentence}")
    count = len(losses["fused"])
    for step in sorted({0, count // 4, count // 2, count - 1}):
        print(f"step {step}: " + ", ".join(f"{name} {curve[step]:.5f}" for name, curve in losses.items()))
    if options.out:
        write(Path(options.out), losses)
    ok, sentence = judge(losses, options.steps)
    print(sentence)
    return 0 if ok else 1


def _distance(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, two)) / len(one)


if __name__ == "__main__":
    raise SystemExit(main())
