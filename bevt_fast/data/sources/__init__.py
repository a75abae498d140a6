"""Open room: one dataset per file. A source says which files there are, their labels, and how frames are drawn.

The file name is the name in the JSON. A part exposes `Options` and `build(options) -> Source`; parts never meet.
"""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from bevt_fast.config import Part, Positive, Section, open_part
from bevt_fast.data.packed import Packed, PackedPaths
from bevt_fast.errors import DataError

CHECK_ALL, CHECK_SOME = (
    20_000,
    2_000,
)  # files of a source that `preflight` looks for: all up to the first, else the second


# of a clip: the encoder joins two to a time step (SPEC 1.2)
FrameCount = Annotated[Positive, Field(multiple_of=2)]


class Frames(NamedTuple):
    """How a clip is drawn (SPEC 6.7): `count` frames, `stride` apart, or one from each of `count` segments."""

    count: int = 16
    stride: int = 8
    mode: Literal["interval", "uniform"] = "interval"


class ClipOptions(Section):
    """The options every source of clips has: how frames are drawn, and which videos are too short to use."""

    frames: FrameCount = 16  # SPEC 5.3: 16 frames, 8 apart
    stride: Positive = 8
    mode: Literal["interval", "uniform"] = "interval"
    min_frames: Positive = 2

    def drawn(self) -> Frames:
        """The three numbers of a clip together."""
        return Frames(self.frames, self.stride, self.mode)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A list of files. `paths` are relative to `root` (or absolute); flat, so that a million lines are cheap.

    Images may live inside other files; `paths` are then `PackedPaths`, and `path` gives a `Packed`.
    """

    name: str
    root: Path
    paths: Sequence[str]
    labels: np.ndarray | None = None  # (n,) int64
    classes: list[str] | None = None  # class names, by label
    frames: Frames | None = None  # None: the files are images
    reversed_labels: Sequence[int] | None = None  # by label, that of the clip played backwards; None: not known
    extents: np.ndarray | None = (
        None  # (n, 2) int64: first frame, number of frames (-1: to the end); for lists that say so
    )
    min_frames: int = (
        2  # a video with fewer frames (one tubelet) is quarantined; a longer one is looped as SPEC 6.7 says
    )

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path | Packed:
        """The file of sample `index`."""
        found = self.file(index)
        return Path(found) if isinstance(found, str) else found

    def file(self, index: int) -> str | Packed:
        """The same for whoever reads many: no Path, since each puts its names into the interpreter's table of interned
        strings, which grows by megabytes at a time and shrinks with none of them.
        """
        if isinstance(self.paths, PackedPaths):
            return self.paths.file(self.root, index)
        name = os.path.join(self.root, self.paths[index])
        return str(Path(name)) if ".." in name else os.path.normpath(name)  # both write it as a Path is written

    def take(self, indices: Sequence[int]) -> "Source":
        """The samples `indices` as a source of their own."""
        rows = np.array(indices, dtype=np.int64)
        return replace(
            self,
            paths=self.paths.take(rows) if isinstance(self.paths, PackedPaths) else [self.paths[i] for i in indices],
            labels=None if self.labels is None else self.labels[rows],
            extents=None if self.extents is None else self.extents[rows],
        )

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


def preflight(source: Source, allowed_share: float = 0.0) -> int:
    """Look for the files of a source before a run; returns how many of those looked for are missing.

    All files of a source of up to 20,000 are looked for, 2,000 evenly spaced ones of a larger one. Raises DataError
    with the count, the root and the first five if more than `allowed_share` of them are missing.
    """
    n, indices = len(source), _looked_for(source)
    with ThreadPoolExecutor(16) as pool:  # on a network file system each answer takes its time
        there = list(pool.map(_exists, (source.path(index) for index in indices)))
    missing = [source.paths[index] for index, found in zip(indices, there) if not found]
    if len(missing) > allowed_share * len(indices):
        raise DataError(
            f"{source.name}: {len(missing)} of {len(indices)} files looked for (of {n} listed) are not under "
            f"{source.root}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; check the option 'root'"
        )
    return len(missing)


def sizes(source: Source) -> list[int]:
    """Bytes of the files that `preflight` looks for, in order; -1 for what is not there, or no regular file."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_size, (source.path(index) for index in _looked_for(source))))


def _looked_for(source: Source) -> Sequence[int]:
    n = len(source)
    return range(n) if n <= CHECK_ALL else [k * n // CHECK_SOME for k in range(CHECK_SOME)]


def _size(path: Path | Packed) -> int:
    if isinstance(path, Packed):
        return path.size
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _exists(path: Path | Packed) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder we may not enter, a name too long
        return False
