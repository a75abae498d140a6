"""Exact frames out of any file, or a BadFile that says why not. PyAV for videos, Pillow for images.

Frame k of a video is the k-th frame a player would show: the k-th smallest presentation time among the packets that
are shown. One pass over the packets finds these times and the keyframes without decoding (`video.py`), so reading a
clip begins at the keyframe before each frame it needs and decodes forward from there. Its pixels are those of PyAV's
`to_ndarray`, decord and torchcodec: what the official pipeline trains on. Where a file has no trustworthy times, its
frames are counted as the decoder puts them out. A phase-split file (`phases.py`) stores its frames in another order;
callers number them as the video shows them. Whatever is wrong with a file ends as a BadFile: the run goes on.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from bevt_fast.data import phases
from bevt_fast.data.containers import Index, Look, Probe, is_cut_short
from bevt_fast.data.faults import KINDS as KINDS
from bevt_fast.data.faults import PASSING_FAULTS as PASSING_FAULTS
from bevt_fast.data.faults import BadFile, faults
from bevt_fast.data.packed import File, opened
from bevt_fast.data.video import open_container, opened_video, packets_of, picture

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
READ_TOGETHER = 64  # frames of a phase-split file that `each_frame` reads at once: 8 neighbours of each of 8 phases


def probe(path: File, extent: tuple[int, int] = (0, -1), min_frames: int = 1) -> Probe:
    """Size and exact number of frames of a video, or of the part `extent` = (first, count; -1: to the end) of it.

    Raises BadFile, also for fewer than `min_frames` frames.
    """
    whole = _whole(path)
    first, count = extent
    frames = whole.frames - first if count < 0 else count
    if frames > whole.frames - first or frames < 0:
        raise BadFile("truncated", path, f"holds {whole.frames} frames where the list says {first} + {max(count, 0)}")
    if frames < max(min_frames, 1):
        raise BadFile("too_short", path, f"{frames} frames, fewer than {max(min_frames, 1)}")
    return whole._replace(frames=frames)


def read_frames(path: File, indices: Sequence[int], extent: tuple[int, int] = (0, -1)) -> np.ndarray:
    """The frames `indices` (any order, repeats allowed) of the part `extent` of a video. Returns (T, H, W, 3) uint8.

    RGB, rotated as the file's display matrix says. Raises BadFile where one of the frames cannot be decoded, and
    IndexError for an index outside [0, probe(path, extent).frames).
    """
    found = probe(path, extent)
    if not all(0 <= i < found.frames for i in indices):
        raise IndexError(f"{path}: frames {min(indices)} to {max(indices)} asked of {found.frames}")
    places = phases.stored([extent[0] + i for i in indices], found.layout)
    wanted = sorted(set(places))
    if os.path.isdir(path):
        files = _image_files(path)
        pictures = {i: read_image(files[i]) for i in wanted}
    else:
        pictures = _read_video(path, wanted)
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise BadFile("corrupt", path, "the picture changes its size within the clip")
    return np.stack([pictures[place] for place in places])


def each_frame(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame of a video in order, as `read_frames` has them, (H, W, 3) uint8, in one pass. Raises BadFile."""
    found = _whole(path)
    if found.layout is not None or os.path.isdir(path):
        for first in range(0, found.frames, READ_TOGETHER):
            yield from read_frames(path, range(first, min(first + READ_TOGETHER, found.frames)))
        return
    times, rgb, number = index(path).times, VideoReformatter(), 0
    with faults(path, "corrupt"):
        for frame in decode_all(str(path)):
            if times is None or (number < len(times) and frame.pts == times[number]):
                yield picture(frame, rgb)
                number += 1
    if number < found.frames:
        raise BadFile("corrupt", path, f"{number} of {found.frames} frames can be decoded")


def probe_image(path: File) -> Probe:
    """An image from its header: one frame; `codec` is Pillow's name of the format. Raises BadFile."""
    with faults(path, "unreadable"), opened(path) as source, Image.open(source) as image:
        return Probe(1, image.height, image.width, image.format or "", image.mode, 0)


def read_image(path: File) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB: alpha dropped, CMYK and grey converted, 16 bits cut to 8, EXIF not applied.

    The official pipeline decodes with OpenCV's "ignore orientation" (SPEC 5.3); Pillow is used because OpenCV returns
    half a picture for a truncated file without saying so. Raises BadFile.
    """
    with faults(path, "corrupt"), opened(path) as source, Image.open(source) as image:
        if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip at 255
            grey = np.asarray(image).astype(np.uint32) >> 8
            return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


def _whole(path: File) -> Probe:
    if os.path.isdir(path):
        files = _image_files(path)
        return probe_image(files[0])._replace(frames=len(files), codec="images")
    return index(path).probe


def _image_files(folder: File) -> list[str]:
    """The images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg."""
    names = [name for name in os.listdir(folder) if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
    if not names:
        raise BadFile("no_video", folder, "a folder without images")
    names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
    return [os.path.join(folder, name) for name in names]


def index(path: File) -> Index:
    """Where the frames of a video file are, and what is known of it without decoding. Raises BadFile."""
    with faults(path, "unreadable"):
        return _indexed(str(path), _look(path))  # the cache must not outlive the file it describes


@functools.lru_cache(maxsize=4096)  # 3 KB for a video of 10 s
def _indexed(path: str, look: Look) -> Index:
    if is_cut_short(path):
        raise BadFile("truncated", path, "the file ends before its container does")
    with opened_video(path, look, anew=True) as video:
        found = video.survey()
        frames = found.probe.frames if found.times is not None else sum(1 for _ in decode_all(path))
        try:
            layout = phases.layout_of(dict(video.container.metadata), frames)
        except ValueError as error:
            raise BadFile("unreadable", path, str(error)) from None
    return found._replace(probe=found.probe._replace(frames=frames, layout=layout))


def _look(path: File) -> Look:
    status = os.stat(path)
    return Look(status.st_mtime_ns, status.st_size, status.st_ino)


def _read_video(path: File, wanted: list[int]) -> dict[int, np.ndarray]:
    """The frames `wanted` (ascending) of a file, by index."""
    found = index(path)
    with faults(path, "corrupt"):
        if found.times is None:
            return _from_the_start(path, {k: k for k in wanted}, counted=True)
        places = {int(found.times[k]): k for k in wanted}
        with contextlib.suppress(av.FFmpegError, ValueError):
            with opened_video(str(path), _look(path)) as video:
                pictures = video.collect(found, set(places))
            if len(pictures) == len(wanted):
                return {places[time]: shown for time, shown in pictures.items()}
        # a seek may land too late, or on a keyframe that needs more than itself: once more without seeking
        return _from_the_start(path, places, counted=False)


def _from_the_start(path: File, places: dict[int, int], counted: bool) -> dict[int, np.ndarray]:
    """The frames at `places` (presentation times, or numbers where frames are `counted`), by index. Raises BadFile."""
    rgb = VideoReformatter()
    frames: dict[int, np.ndarray] = {}
    for number, frame in enumerate(decode_all(str(path))):
        place = number if counted else frame.pts
        if place in places:
            frames[places[place]] = picture(frame, rgb)
        if len(frames) == len(places):
            return frames
    raise BadFile("corrupt", path, f"{len(frames)} of {len(places)} frames can be decoded")


def decode_all(path: str) -> "Iterator[av.VideoFrame]":
    """Every frame of a video file, one after the other, as stored. Raises BadFile at the first that is damaged."""
    with (
        faults(path, "corrupt"),
        open_container(path) as container,
        contextlib.closing(packets_of(container)) as packets,
    ):
        for packet in packets:
            yield from packet.decode()
