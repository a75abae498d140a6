"""How much of a training step is waiting for data: real files against one batch that is always there."""

import argparse
import contextlib
import time
from collections.abc import Callable

import torch

from bench.measure import quantiles
from bevt_fast.config import Config
from bevt_fast.data.batch import JointBatch, Targets
from bevt_fast.data.loader import Loader
from bevt_fast.data.sources import Source
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective

STEPS = 8  # of each kind, taken in turns


def waiting(config: Config, source: Source, options: argparse.Namespace, report: Callable[[str], None]) -> None:
    """Takes turns between a step with the loader's next batch and one with the first batch again; reports both."""
    device, steps = torch.device(options.device), 2 if options.quick else STEPS
    data = config.data.model_copy(update={"workers": max(options.workers)})
    step = _step(config, device)
    with contextlib.closing(
        Loader(config.model_copy(update={"data": data}), {"clips": source}, device=device)
    ) as loader:
        first = next(loader)
        step(first)
        times: dict[str, list[float]] = {"real": [], "synthetic": []}
        loader.pace()
        for _ in range(steps):
            for kind, batch in (("real", None), ("synthetic", first)):
                start = time.perf_counter()
                step(next(loader) if batch is None else batch)
                times[kind].append((time.perf_counter() - start) * 1e3)
        pace = loader.pace()
    real, synthetic = quantiles(times["real"]), quantiles(times["synthetic"])
    share = pace.waited * 1e3 / sum(times["real"])
    size = "a tiny model" if device.type == "cpu" else "Swin-B"
    report(
        f"a step of {size}, {data.workers} workers: {real.median:.0f} ms with real input [{real.low:.0f}, "
        f"{real.high:.0f}], {synthetic.median:.0f} ms with synthetic [{synthetic.low:.0f}, {synthetic.high:.0f}]; "
        f"{share:.1%} of the real steps is waiting for data"
    )


def _step(config: Config, device: torch.device) -> Callable[[JointBatch], None]:
    """Forward, backward and update of the clip stream, the end of which is waited for."""
    assert config.clips is not None
    tiny = VideoSwinConfig(embed_dim=32, depths=(1, 1, 1, 1), heads=(1, 2, 4, 8), window=(2, 2, 2))
    model = Bevt(tiny if device.type == "cpu" else VideoSwinConfig.preset("base"), 64, streams=("clips",))
    objective = JointObjective(model.to(device)).train()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-4)

    def step(batch: JointBatch) -> None:
        assert batch.clips is not None
        frames, cells = batch.clips.pixels.shape[2], batch.clips.mask.shape[2]
        ids = torch.zeros(len(batch.clips.pixels), frames, cells, cells, dtype=torch.long, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            total = objective(batch, Targets(None, ids)).total
        total.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step
