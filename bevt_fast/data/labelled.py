"""Labelled clips for fine-tuning, read by number as `reader.py` reads a stream: what the i-th micro-batch holds is a
function of the seed and of i alone, for any number of workers and processes.

A bad file is replaced by a substitute, with the substitute's label. With `views.twins` a micro-batch reads half as many
clips, and its second half is the first one played backwards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bevt_fast.config import accumulation
from bevt_fast.data import augment, pipeline_reference, sampling
from bevt_fast.data.augment import Box, Strong
from bevt_fast.data.crashes import Crashes, Reading
from bevt_fast.data.decode import BadFile
from bevt_fast.data.faults import or_bad
from bevt_fast.data.loader import Feed, Loader
from bevt_fast.data.reader import LARGEST_PICTURE, Slot, StreamReader
from bevt_fast.data.sampling import Place
from bevt_fast.data.sources import Source
from bevt_fast.errors import ConfigError, DataError
from bevt_fast.finetune_config import FinetuneConfig

KEY = "labelled clips"  # of every draw, where pretraining has the name of a stream


class LabelledClips(NamedTuple):
    """One micro-batch. Targets are shares of each class: smoothed, mixed, or all in one."""

    pixels: Float[Tensor, "B 3 T H W"]  # normalised
    targets: Float[Tensor, "B classes"]


class View(NamedTuple):
    """All that is random about one training clip, and the file it is read from. `box` is the crop of the rescaled
    picture.
    """

    epoch: int
    index: int
    file: int
    frames: list[int]
    box: Box
    flip: bool
    strong: Strong | None
    erase: Box


class LabelledReader(StreamReader):
    """One process's micro-batches: `reader[i]` is the i-th since the start of the run.

    An item is a dict of pixels (B, T, S, S, 3) uint8, labels (B,) int64, erase (B, 4) int64 rectangles, mix (the share
    a sample keeps when it is mixed with its mirror place in the micro-batch), `busy`, `bad` and `left_to_pyav`.
    """

    def __init__(self, config: FinetuneConfig, source: Source, *, rank: int = 0, world_size: int = 1):
        if source.frames is None or source.labels is None:
            raise DataError(f"data: the source {source.name!r} has no labelled clips")
        self.name, self.source, self.key, self.seed = "data", source, KEY, config.seed
        self.views, self.training, self.mixup = None, config.views, config.train.mixup
        self.accumulation = accumulation(config, world_size)
        self.twins = labels_of_twins(source) if config.views.twins else None
        self.split = {
            "world_size": world_size,
            "micro_batch": config.data.micro_batch // (1 if self.twins is None else 2),
            "accumulation": self.accumulation,
        }
        self.rank, self.kind, self.dali, self.cache = rank, "clips", None, None
        self.on_damage = config.data.on_damage
        self.crashes = Crashes()
        self._bad: dict[int, BadFile] = {}
        self._repaired: list[dict[str, Any]] = []
        self._left_to_pyav: set[str] = set()

    def item(self, places: Sequence[Place], bad: list[dict[str, Any]]) -> dict[str, Any]:
        """The samples at `places` as they travel to the training process."""
        found = self.fill([Slot(place, place.index) for place in places], self._views, bad)
        pixels, views = np.stack([pixels for pixels, _ in found]), [view for _, view in found]
        assert self.source.labels is not None
        labels = self.source.labels[[view.file for view in views]].astype(np.int64)
        erase = torch.tensor([view.erase for view in views])
        if self.twins is not None:
            pixels, erase = np.concatenate([pixels, pixels[:, ::-1]]), torch.cat([erase, erase])
            labels = np.concatenate([labels, self.twins[labels]])
        first = places[0]
        return {
            "pixels": torch.from_numpy(pixels),
            "labels": torch.from_numpy(labels),
            "erase": erase,
            "mix": augment.draw_mix(self.mixup, sampling.random_for(self.seed, KEY, *first, "mixup")),
        }

    def view(self, epoch: int, index: int, file: int) -> View:
        """What is drawn for slot `index` in pass `epoch`, to be read from `file`. Raises BadFile."""
        self.crashes.begin(Reading(file), self.source.file(file))
        found, how = self._probed(file), self.training
        rng = sampling.random_for(self.seed, KEY, epoch, index, "view")
        assert self.source.frames is not None
        frames = sampling.clip_frames(found.frames, self.source.frames, rng)
        flip = rng.random() < how.flip
        height, width = augment.rescaled(found.height, found.width, how.short_side)
        if height * width > LARGEST_PICTURE:
            shape = f"{found.height} x {found.width} pixels, {height} x {width} rescaled"
            raise BadFile("unreadable", self.source.file(file), f"too long and narrow: {shape}")
        box = augment.draw_box(height, width, how.scale, how.ratio, rng)
        strong = None
        if (rand := how.randaugment) is not None:
            rng = sampling.random_for(self.seed, KEY, epoch, index, "randaugment")
            strong = augment.draw_strong(rand.n, rand.m, rand.hidden_flip_and_crop, rng)
        rng = sampling.random_for(self.seed, KEY, epoch, index, "erasing")
        erase = augment.draw_erasing(how.size, how.erasing, rng)
        return View(epoch, index, file, frames, box, flip, strong, erase)

    def _views(self, slots: Sequence[Slot]) -> list[tuple[np.ndarray, View] | BadFile]:
        """For each slot its pixels and how they were drawn, or what is wrong with its file."""
        return [or_bad(self._cut, *slot.place, slot.file) for slot in slots]

    def _cut(self, epoch: int, index: int, file: int) -> tuple[np.ndarray, View]:
        view = self.view(epoch, index, file)
        self.crashes.begin(Reading(file, epoch, index), self.source.file(file))
        pictures, how = self._clip(epoch, view.frames, file), self.training
        pixels = augment.cut(pictures, how.short_side, view.box, how.size, view.flip)
        return (pixels if view.strong is None else augment.strengthen(pixels, view.strong)), view


class LabelledLoader(Loader):
    """An endless iterator of LabelledClips on `device`, one a micro-batch, starting exactly at `first_step`."""

    def __init__(
        self,
        config: FinetuneConfig,
        source: Source,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        first_step: int = 0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(config, {}, device=device, dtype=dtype)  # pyright: ignore[reportArgumentType]
        self.classes, self.smoothing = config.model.classes, config.train.label_smoothing
        reader = LabelledReader(config, source, rank=rank, world_size=world_size)
        first = first_step * reader.accumulation
        self._feeds["data"] = Feed(reader, first, self.data, pin=self.device.type == "cuda")

    def __next__(self) -> LabelledClips:  # pyright: ignore[reportIncompatibleMethodOverride]
        item = self._items()["data"]
        pixels = pipeline_reference.normalise(item["pixels"].to(self.device, non_blocking=True), channels=-4)
        for clip, (top, left, height, width) in zip(pixels, item["erase"].tolist()):
            clip[..., top : top + height, left : left + width] = 0  # after normalisation: the mean colour (SPEC 6.4)
        targets = smooth(item["labels"].to(self.device, non_blocking=True), self.classes, self.smoothing)
        if (kept := item["mix"]) < 1:
            pixels = pixels.mul(kept).add_(pixels.flip(0), alpha=1 - kept)
            targets = targets.mul(kept).add_(targets.flip(0), alpha=1 - kept)
        return LabelledClips(pixels.to(self.dtype), targets)


def labels_of_twins(source: Source) -> np.ndarray:
    """By label, (classes,) int64: that of the same clip played backwards. Raises ConfigError where the source does not
    know.
    """
    if source.reversed_labels is None:
        raise ConfigError(
            f"views.twins: the source {source.name!r} does not say which label a clip has when it is played backwards; "
            "set views.twins to false"
        )
    return np.array(source.reversed_labels, dtype=np.int64)


def smooth(labels: Tensor, classes: int, smoothing: float) -> Float[Tensor, "B classes"]:
    """Labels (B,) as shares: 1 - s + s/K on the true class of K, s/K elsewhere (SPEC 6.1)."""
    return F.one_hot(labels, classes).float().mul_(1 - smoothing).add_(smoothing / classes)
