"""Open room: one dataset per file. A source says which files there are, their labels, and how frames are drawn.

The file name is the name in the JSON. A part exposes `Options` and `build(options) -> Source`; parts never meet.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from bevt_fast.config import Part, open_part


class Frames(NamedTuple):
    """How a clip is drawn (SPEC 6.7): `count` frames, `stride` apart, or one from each of `count` segments."""

    count: int = 16
    stride: int = 8
    mode: Literal["interval", "uniform"] = "interval"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A list of files. `paths` are relative to `root` (or absolute); flat, so that a million lines are cheap."""

    name: str
    root: Path
    paths: list[str]
    labels: np.ndarray | None = None  # (n,) int64
    classes: list[str] | None = None  # class names, by label
    frames: Frames | None = None  # None: the files are images
    extents: np.ndarray | None = (
        None  # (n, 2) int64: first frame, number of frames (-1: to the end); for lists that say so
    )
    min_frames: int = (
        2  # a video with fewer frames (one tubelet) is quarantined; a longer one is looped as SPEC 6.7 says
    )

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of sample `index`."""
        return self.root / self.paths[index]

    def extent(self, index: int) -> tuple[int, int]:
        """First frame and number of frames (-1: all) that belong to sample `index`."""
        if self.extents is None:
            return 0, -1
        first, count = self.extents[index]
        return int(first), int(count)


def build(part: Part) -> Source:
    """The source a configuration names. Raises ConfigError for a wrong name or option, DataError for unusable data."""
    module, options = open_part(__name__, part)
    return module.build(options)
