"""The phase-split layout: the frames of a video in an order in which a clip is a run of neighbours.

A clip takes frames `stride` apart, so an ordinary file decodes all that lie between them. A phase-split file stores
frames 0, s, 2s, ..., then 1, s + 1, ..., and so on, with a keyframe at the start of every phase and every few frames:
a clip of 16 frames is 16 frames in a row, whichever program decodes them. It is an ordinary file with one video
stream; what it is stands in the comment of its container. Everything here is arithmetic and text: `decode.py` reads
such files, `coding.py` writes them.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

VERSION = 1  # of the layout and of the comment
MARK = "bevt_fast transcode "  # a comment that starts so is ours; JSON follows
LARGEST = 2**31 - 1  # frames or stride


class Layout(NamedTuple):
    """The order of a phase-split file of `frames` frames; frame k belongs to phase k % `stride`."""

    stride: int
    frames: int


def stored(frames: Sequence[int] | np.ndarray, layout: Layout | None) -> list[int]:
    """Where the frames `frames` of a video are in its file: the position of each, from 0. None: an ordinary file."""
    numbers = np.asarray(frames, np.int64)
    if layout is not None:
        phase, place = numbers % layout.stride, numbers // layout.stride
        numbers = _start(phase, layout) + place
    return numbers.tolist()


def shown(positions: Sequence[int] | np.ndarray, layout: Layout | None) -> list[int]:
    """The inverse of `stored`: which frames of the video stand at `positions` in its file."""
    numbers = np.asarray(positions, np.int64)
    if layout is not None:
        short, longer = divmod(layout.frames, layout.stride)  # `longer` phases hold one frame more than `short`
        border = longer * (short + 1)
        in_longer = numbers < border
        phase = np.where(in_longer, numbers // (short + 1), longer + (numbers - border) // max(short, 1))
        numbers = (numbers - _start(phase, layout)) * layout.stride + phase
    return numbers.tolist()


def keyframes(layout: Layout, gop: int) -> list[int]:
    """The positions that hold a keyframe: the first of every phase, and every `gop`-th frame after it."""
    phases = np.arange(min(layout.stride, layout.frames))
    starts = [*_start(phases, layout).tolist(), layout.frames]
    return [position for first, end in pairwise(starts) for position in range(first, end, gop)]


def comment(layout: Layout | None, made: Mapping[str, Any]) -> str:
    """What a file says of itself: its layout (None: the ordinary order), and how and from what it was `made`."""
    order = {"layout": "plain"} if layout is None else {"layout": "phases", **layout._asdict()}
    return MARK + json.dumps({"version": VERSION, **order, "made": dict(made)}, sort_keys=True)


def claims(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What the metadata of a container says in our comment; None for a file of others. Raises ValueError."""
    text = next((value for name, value in metadata.items() if name.lower() == "comment"), "")
    if not text.startswith(MARK):
        return None
    try:
        said = json.loads(text[len(MARK) :])
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or said.get("version") != VERSION or said.get("layout") not in ("plain", "phases"):
        version = said.get("version", "none") if isinstance(said, dict) else "none"
        raise ValueError(
            f"its comment says that its frames are in an order of version {str(version)[:20]}, this program reads "
            f"version {VERSION}: transcode the original again"
        )
    return said


def layout_of(metadata: Mapping[str, str], frames: int) -> Layout | None:
    """The layout of a file that holds `frames` frames; None for the ordinary order.

    Raises ValueError, a sentence, where the metadata claim a layout that is unknown or not that of so many frames.
    """
    said = claims(metadata)
    if said is None or said["layout"] == "plain":
        return None
    stride, count = said.get("stride"), said.get("frames")
    if type(stride) is not int or not 1 <= stride <= LARGEST:
        raise ValueError(f"its comment names a stride of {str(stride)[:20]}: transcode the original again")
    if type(count) is not int or count != frames:
        raise ValueError(
            f"its comment tells the order of {str(count)[:20]} frames and it holds {frames}, so it was cut or joined "
            "later and the order is lost: transcode the original again"
        )
    return Layout(stride, count)


def _start(phase: np.ndarray, layout: Layout) -> np.ndarray:
    """The position of the first frame of each phase."""
    short, longer = divmod(layout.frames, layout.stride)
    return phase * short + np.minimum(phase, longer)
