"""How a video is looked at when it is judged: the same clips and crops every time, each video once (SPEC 6.6, 6.7).

A view is one crop of one test clip. Frames come from `sampling.test_clip_frames`, pixels from the resize of fine-tuning
(`augment.resized`); nothing is flipped. The temporal analysis (SPEC 6.8) changes the order of a clip's frames alone.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from bevt_fast.data import augment, decode, sampling
from bevt_fast.data.crashes import NOTHING, Crashes, Reading
from bevt_fast.data.faults import BadFile, twice
from bevt_fast.data.reader import LARGEST_PICTURE
from bevt_fast.data.sampling import Crop
from bevt_fast.data.sources import Frames, Source
from bevt_fast.errors import ConfigError, DataError

Temporal = Literal["normal", "single_frame", "shuffled"]
TEMPORAL: tuple[Temporal, ...] = get_args(Temporal)


class Views(NamedTuple):
    """The views of a video: `clips` in time, times `crops` in space; lengths in pixels. Validation is the default, the
    three crops of the final test have a `short_side` of `size` (SPEC 6.6).
    """

    clips: int = 1
    crops: int = 1  # 1: the centre; 3: left or top, right or bottom, centre along the long side
    size: int = 224
    short_side: int = 256

    @property
    def count(self) -> int:
        """How many views a video has."""
        return self.clips * self.crops

    def check(self, frames: Frames | None) -> Frames:
        """How frames are drawn, of a source that these views suit. Raises ConfigError where they cannot be taken."""
        if frames is None:
            raise ConfigError("only clips are scored, and these are images; set the source's option 'kind' to clips")
        if self.clips < 1 or self.crops not in (1, 3):
            raise ConfigError(f"a video has 1 or more test clips and 1 or 3 crops, not {self.clips} and {self.crops}")
        if not 1 <= self.size <= self.short_side:
            raise ConfigError(
                f"a crop of {self.size} pixels does not fit a short side of {self.short_side}; set short_side to "
                f"{self.size} or more"
            )
        sampling.test_clip_frames(frames.count, frames, self.clips)  # refuses several clips of uniform frames
        return frames


class ViewReader(Dataset):
    """The views of each video of a source, by its index.

    An item is a dict of index, label (-1: none), pixels (clips * crops, T, S, S, 3) uint8, clip by clip, and `bad`:
    None, or path, kind and reason of a file that cannot be read, which then has no pixels.
    """

    def __init__(self, source: Source, views: Views, temporal: Temporal = "normal", seed: int = 0):
        if temporal not in TEMPORAL:
            raise ConfigError(f"the order of frames is one of {', '.join(TEMPORAL)}, not {temporal!r}")
        if not len(source):
            raise DataError(f"the source {source.name!r} has no files to look at")
        self.source, self.views, self.seed = source, views, seed
        self.temporal: Temporal = temporal
        self.frames = views.check(source.frames)
        self.crashes = Crashes()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = -1 if self.source.labels is None else int(self.source.labels[index])
        item: dict[str, Any] = {"index": index, "label": label, "bad": None}
        try:
            self.crashes.begin(Reading(index), self.source.file(index))
            return item | {"pixels": torch.from_numpy(self.pixels(index))}
        except BadFile as error:
            side = self.views.size
            nothing = torch.empty((0, self.frames.count, side, side, 3), dtype=torch.uint8)
            bad = {"path": str(self.source.file(index)), "kind": error.kind, "reason": error.reason}
            return item | {"pixels": nothing, "bad": bad}
        finally:
            self.crashes.note(NOTHING)

    def pixels(self, index: int) -> np.ndarray:
        """The views of video `index`, (clips * crops, T, S, S, 3) uint8. Raises BadFile."""
        path, extent = self.source.file(index), self.source.extent(index)
        found = twice(lambda: decode.probe(path, extent, self.source.min_frames))
        crops = test_crops(found.height, found.width, self.views)
        if crops[0].height * crops[0].width > LARGEST_PICTURE:
            raise BadFile("unreadable", path, f"too long and narrow: {found.height} x {found.width} pixels")
        seen = []
        for clip, places in enumerate(sampling.test_clip_frames(found.frames, self.frames, self.views.clips)):
            order = frame_order(len(places), self.temporal, self.seed, index, clip)
            shown = [places[k] for k in order]
            # one clip at a time: all clips of a large video would not fit into memory
            wanted = sorted(set(shown))
            pictures = twice(lambda wanted=wanted: decode.read_frames(path, wanted, extent))
            rows = np.searchsorted(wanted, shown)
            seen += [view[rows] for view in cut(pictures, crops)]
        return np.stack(seen)


def frame_order(count: int, temporal: Temporal, seed: int, index: int, clip: int = 0) -> list[int]:
    """Which of a clip's `count` frames stands at each of its places (SPEC 6.8).

    "single_frame": one of them, drawn, everywhere. "shuffled": a permutation, drawn. Both depend on the arguments
    alone.
    """
    if temporal == "normal":
        return list(range(count))
    rng = sampling.random_for(seed, temporal, index, clip)
    if temporal == "single_frame":
        return [int(rng.random() * count)] * count
    keys = [rng.random() for _ in range(count)]
    return sorted(range(count), key=lambda k: keys[k])


def test_crops(height: int, width: int, views: Views) -> list[Crop]:
    """The crops of a picture of `height` x `width` pixels: the centre alone, or left or top, right or bottom, and
    centre along its longer side (SPEC 6.6: offsets 0, 2 s, s with s = (long - size) // 2).
    """
    tall, wide = augment.rescaled(height, width, views.short_side)
    top, left = (tall - views.size) // 2, (wide - views.size) // 2
    places = [(top, left)]
    if views.crops == 3:
        places = [(top, 0), (top, 2 * left), (top, left)] if wide >= tall else [(0, left), (2 * top, left), (top, left)]
    return [Crop(tall, wide, y, x, views.size, False, None) for y, x in places]


test_crops.__test__ = False  # the name starts as pytest's tests do


def cut(frames: np.ndarray, crops: Sequence[Crop]) -> list[np.ndarray]:
    """Frames (T, H, W, 3) uint8 -> for each crop (T, S, S, 3) uint8. The crops are of one resized picture."""
    whole = crops[0]._replace(top=0, left=0)
    views = [np.empty((len(frames), crop.size, crop.size, 3), np.uint8) for crop in crops]
    for k, frame in enumerate(frames):
        picture = augment.resized(frame, whole.height, whole.width)
        for crop, view in zip(crops, views):
            view[k] = picture[crop.top : crop.top + crop.size, crop.left : crop.left + crop.size]
    return views
