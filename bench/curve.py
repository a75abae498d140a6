"""The same seed with reference and fused kernels: the same loss curve? On synthetic data, in bf16.

    python bench/curve.py [--steps 50] [--small]

The law: the fused curve lies closer to the reference's than the reference under another seed does.
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch

import bevt_kernels
from bevt_kernels import runtime

LEFT_OUT = 77  # exit code: something is missing, and the last line says what


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--small", action="store_true", help="a tiny model, for a rehearsal on a CPU")
    options = parser.parse_args(arguments)
    try:
        importlib.import_module("bevt_fast.objectives.joint")
    except ImportError as problem:
        print(f"the whole-model curve is left out: {problem}")
        return LEFT_OUT
    device = torch.device("cuda" if torch.cuda.is_available() and not runtime.INTERPRETED else "cpu")
    print(
        f"{'a tiny model' if options.small else 'Swin-B'}, bf16 autocast, AdamW, {options.steps} steps, {device.type}"
    )
    reference = _curve("reference", 0, options, device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fused = _curve("fused", 0, options, device)
    refused = sorted({str(w.message) for w in said if "the reference answers instead" in str(w.message)})
    for sentence in refused:
        print(f"not fused: {sentence}")
    other = _curve("reference", 1, options, device)
    for step in sorted({0, options.steps // 4, options.steps // 2, options.steps - 1}):
        print(f"step {step}: reference {reference[step]:.5f}, fused {fused[step]:.5f}, another seed {other[step]:.5f}")
    between, seeds = _distance(reference, fused), _distance(reference, other)
    finite = all(loss == loss and abs(loss) < float("inf") for loss in fused)
    ok = finite and between < seeds
    print(f"mean distance: reference to fused {between:.2e}, seed to seed {seeds:.2e}: {'ok' if ok else 'FAILS'}")
    return 0 if ok else 1


def _curve(name: runtime.Implementation, seed: int, options: argparse.Namespace, device: torch.device) -> list[float]:
    """Total loss by step. The data are the same whatever the seed; weights and drop path follow it."""
    from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
    from bevt_fast.models.bevt import Bevt
    from bevt_fast.models.video_swin import VideoSwinConfig
    from bevt_fast.objectives.joint import JointObjective

    if options.small:
        config = VideoSwinConfig(embed_dim=32, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=(2, 2, 2))
        side, frames, clips, images, vocabulary = 32, 4, 1, 1, 64
    else:
        config = VideoSwinConfig.preset("base")
        side, frames, clips, images, vocabulary = 224, 16, 2, 8, 8192
    torch.manual_seed(seed)
    objective = JointObjective(Bevt(config, vocabulary).to(device)).train()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-4, weight_decay=0.05)
    cells, losses, started = side // 16, [], time.perf_counter()
    for step in range(options.steps):
        draw = torch.Generator(device).manual_seed(step % 4)  # four batches, so that there is something to learn

        def pixels(*shape: int, draw: torch.Generator = draw) -> torch.Tensor:
            return torch.randn(shape, generator=draw, device=device)

        def ids(*shape: int, draw: torch.Generator = draw) -> torch.Tensor:
            return torch.randint(vocabulary, shape, generator=draw, device=device)

        image_mask = pixels(images, cells, cells) > 0
        clip_mask = (pixels(clips, 1, cells, cells) > 0).expand(-1, frames // 2, -1, -1).contiguous()
        batch = JointBatch(
            Images(pixels(images, 3, side, side), pixels(0), image_mask),
            Clips(pixels(clips, 3, frames, side, side), pixels(0), clip_mask),
        )
        targets = Targets(ids(images, cells, cells), ids(clips, frames, cells, cells))
        torch.manual_seed(1000 * seed + step)  # drop path draws the same whoever ran before
        with bevt_kernels.implementation(name), torch.autocast(device.type, torch.bfloat16):
            total = objective(batch, targets).total
        with bevt_kernels.implementation(name):
            total.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(float(total.detach()))
    print(f"{name}, seed {seed}: {time.perf_counter() - started:.1f} s", flush=True)
    return losses


def _distance(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, two)) / len(one)


if __name__ == "__main__":
    raise SystemExit(main())
