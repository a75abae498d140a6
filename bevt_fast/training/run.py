"""What a pretraining run is made of, and the chores of its loop: rates, logs, checkpoints, stopping, the end.

The learning rate, the masks, the sample order, every crop and every dropped path are pure functions of the seed and the
step: going on from a checkpoint restores the engine and a number, nothing else.
"""

import json
import logging
import os
from collections.abc import Iterator

import torch

from bevt_fast import config as configuration
from bevt_fast.config import Config
from bevt_fast.data import loader
from bevt_fast.data.batch import Clips, Images, JointBatch, Losses
from bevt_fast.data.sources import Source
from bevt_fast.models.compiled import require_compiler
from bevt_fast.training import distributed
from bevt_fast.training.assemble import (
    check_parts,
    fingerprint,
    open_engine,
    open_heldout,
    open_sources,
    open_tokenizer,
    tokenizer_fingerprint,
)
from bevt_fast.training.base_run import BaseRun, speak
from bevt_fast.training.distributed import World
from bevt_fast.training.estimate import step_flops
from bevt_fast.training.token_targets import open_caches

log = logging.getLogger("bevt_fast")


class Run(BaseRun):
    """Everything `train` uses; built by `build`."""

    config: Config

    def __init__(
        self, config: Config, sources: dict[str, Source], heldout: dict[str, Source], world: World, resume: str
    ) -> None:
        super().__init__(config, world, resume)
        self.sources, self.heldout = sources, heldout
        self.tokenizer = open_tokenizer(config, sources, world)
        caches = open_caches(config, sources, self.tokenizer)
        self._not_cached = 0
        self._place(self.steps_per_epoch())
        self._fingerprints = {
            "data": {name: fingerprint(source) for name, source in sources.items()},
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }
        self.engine = open_engine(config, self.tokenizer, world, self._found, self._fingerprints)
        self._watch({name: len(source) for name, source in sources.items()})
        self.batches = loader.Loader(
            config,
            sources,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            first_step=self.first_step,
            caches=caches,
            dtype=self.engine.dtype,
        )
        self.flops = step_flops(config)
        images, clips = (stream.batch if stream else 0 for stream in (config.images, config.clips))
        self._begin(images, clips, self.flops.necessary)

    # -- the loop's questions ------------------------------------------------------------------------------------------

    def micro_batches(self, step: int) -> Iterator[tuple[JointBatch, tuple[float, float] | None]]:
        """The micro-batches of one step, and for a global mean how many positions each stream hides per micro-batch."""
        batches: Iterator[JointBatch] | list[JointBatch] = (self._next_batch() for _ in range(self.accumulation))
        hidden = None
        if self.config.train.loss_mean == "global":
            batches = list(batches)
            counts = [[_hidden(batch.images, 1), _hidden(batch.clips, 2)] for batch in batches]
            images, clips = distributed.average(
                torch.tensor(counts, dtype=torch.float64, device=self.world.device).mean(0)
            ).tolist()
            hidden = (images, clips)
        for micro, batch in enumerate(batches):
            self._seed("drop_path", step, micro)
            yield lower(batch, self.engine.dtype), hidden

    def log(self, step: int, losses: list[Losses]) -> None:
        """One line of the log: the step's mean over micro-batches and processes."""
        means = torch.stack([torch.stack([value.double() for value in loss]) for loss in losses]).mean(0)
        total, image, clip, image_accuracy, clip_accuracy = distributed.average(means).tolist()
        values = {"train/loss": total}
        if self.config.images:
            values |= {"train/loss_image": image, "train/mask_acc_2d": image_accuracy}
        if self.config.clips:
            values |= {"train/loss_video": clip, "train/mask_acc_3d": clip_accuracy}
        if self.config.data.token_cache:
            if self.batches.not_cached and not self._not_cached:
                log.warning("samples that are not as the token cache saw them are tokenized now (data/not_cached)")
            values["data/not_cached"] = self._not_cached = self.batches.not_cached
        self._log(step, values)

    def finish(self) -> None:
        """The end of a run: score held-out samples, draw pictures, say where everything lies."""
        from bevt_fast.training.ending import finish

        self._save_last()
        self.tokenizer = self.tokenizer.to(self.world.device)  # a token cache has only training samples
        finish(self)

    # -- what it is --------------------------------------------------------------------------------------------------

    def steps_per_epoch(self) -> int:
        """An epoch is a pass over the clips, or over the images where there are no clips."""
        name = "clips" if self.config.clips else "images"
        stream = self.config.streams[name]
        return max(1, len(self.sources[name]) // stream.batch)

    def resolved_config(self) -> str:
        return json.dumps(configuration.resolved(self.config), indent=2)

    def describe(self) -> str:
        parts = [f"{len(source):,} {name} from {source.name}" for name, source in self.sources.items()]
        return (
            f"{self._begins()}: {', '.join(parts)}; {self._parameters()}; {self._course()}; "
            f"{self.flops.necessary:.3g} FLOP a step are necessary (nominal {self.flops.nominal:.3g}); "
            f"output {self.output}"
        )


def build(config: Config, resume: str = "none") -> Run:
    """Everything a run needs, cheapest first, so that a mistake is found before anything expensive starts."""
    distributed.read_environment()
    speak(is_main=os.environ["RANK"] == "0")
    configuration.accumulation(config, distributed.world_size_from_environment())
    check_parts(config)
    sources, heldout = open_sources(config), open_heldout(config)
    world = distributed.start(config.train.threads)
    if config.train.compile:
        require_compiler(world.device)
    return Run(config, sources, heldout, world, resume)


def lower(batch: JointBatch, dtype: torch.dtype) -> JointBatch:
    """The encoder's pixels in the module's own precision; the tokenizer's stay float32."""
    images, clips = batch
    return JointBatch(
        images._replace(pixels=images.pixels.to(dtype)) if images else None,
        clips._replace(pixels=clips.pixels.to(dtype)) if clips else None,
    )


def _hidden(stream: Images | Clips | None, frames: int) -> float:
    return float(stream.mask.sum()) * frames if stream else 0.0
