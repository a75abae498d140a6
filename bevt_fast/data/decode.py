"""Exact frames out of any file, or a BadFile that says why not. PyAV for videos, Pillow for images.

Frame k of a video is the k-th frame a player would show: the k-th smallest presentation time among the packets that
are shown. One pass over the packets finds these times and the keyframes without decoding, so reading a clip seeks to
the keyframe before each frame it needs and decodes forward from there. Where a file has no trustworthy times, its
frames are counted as the decoder puts them out. A phase-split file (`phases.py`) stores its frames in another order;
callers number them as the video shows them. Whatever is wrong with a file ends as a BadFile: the run goes on.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.container
import av.logging
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from PIL import Image

from bevt_fast.data import phases
from bevt_fast.data.containers import is_cut_short, is_hidden, times_are_trusted
from bevt_fast.data.packed import File, is_empty, opened

av.logging.set_level(av.logging.PANIC)  # FFmpeg's remarks on damaged files; what matters arrives as BadFile

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
# chroma interpolated and sums rounded exactly, not FFmpeg's faster default: these are DALI's pixels too, bit for bit
CONVERSION = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
KINDS = ("missing", "empty", "unreadable", "no_video", "truncated", "too_short", "corrupt", "io")
READ_TOGETHER = 64  # frames of a phase-split file that `each_frame` reads at once: 8 neighbours of each of 8 phases
# reading again may help with these, and with no other fault
PASSING_FAULTS = {"io"}
PASSING_ERRORS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT}


class BadFile(Exception):
    """A file that cannot be used, for a reason of one of KINDS."""

    def __init__(self, kind: str, path: File, reason: str):
        super().__init__(kind, str(path), reason)  # plain arguments, so that it travels between processes
        self.kind, self.path, self.reason = kind, str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.reason}"


class Probe(NamedTuple):
    """What is known of a video before a clip is read. `height` and `width` are of the shown (rotated) picture."""

    frames: int
    height: int
    width: int
    codec: str  # FFmpeg's name; "images" for a folder of images
    pixel_format: str
    rotation: int  # degrees anticlockwise from the stored to the shown picture
    rate: Fraction | None = None  # frames a second, on average, where the file says so
    layout: phases.Layout | None = None  # of the whole file, where its frames are not in the ordinary order


class Index(NamedTuple):
    """Where the frames of one file are. `times` is None where frames can only be counted."""

    probe: Probe
    times: np.ndarray | None  # (frames,) presentation times, ascending
    keys: np.ndarray  # presentation times of the keyframes, ascending
    container: str  # FFmpeg's name
    unit: Fraction  # seconds of one unit of time


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
    if Path(path).is_dir():
        files = _image_files(Path(path))
        pictures = {i: read_image(files[i]) for i in wanted}
    else:
        pictures = _read_video(path, wanted)
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise BadFile("corrupt", path, "the picture changes its size within the clip")
    return np.stack([pictures[place] for place in places])


def each_frame(path: str | Path) -> Iterator[np.ndarray]:
    """Every frame of a video in order, as `read_frames` has them, (H, W, 3) uint8, in one pass. Raises BadFile."""
    found = _whole(path)
    if found.layout is not None or Path(path).is_dir():
        for first in range(0, found.frames, READ_TOGETHER):
            yield from read_frames(path, range(first, min(first + READ_TOGETHER, found.frames)))
        return
    times, rgb, number = index(path).times, VideoReformatter(), 0
    with _faults(path, "corrupt"):
        for frame in decode_all(str(path)):
            if times is None or (number < len(times) and frame.pts == times[number]):
                yield _rgb(frame, rgb)
                number += 1
    if number < found.frames:
        raise BadFile("corrupt", path, f"{number} of {found.frames} frames can be decoded")


def probe_image(path: File) -> Probe:
    """An image from its header: one frame; `codec` is Pillow's name of the format. Raises BadFile."""
    with _faults(path, "unreadable"), opened(path) as source, Image.open(source) as image:
        return Probe(1, image.height, image.width, image.format or "", image.mode, 0)


def read_image(path: File) -> np.ndarray:
    """An image as (H, W, 3) uint8 RGB: alpha dropped, CMYK and grey converted, 16 bits cut to 8, EXIF not applied.

    The official pipeline decodes with OpenCV's "ignore orientation" (SPEC 5.3); Pillow is used because OpenCV returns
    half a picture for a truncated file without saying so. Raises BadFile.
    """
    with _faults(path, "corrupt"), opened(path) as source, Image.open(source) as image:
        if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip at 255
            grey = np.asarray(image).astype(np.uint32) >> 8
            return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))


@contextlib.contextmanager
def _faults(path: File, kind: str) -> Iterator[None]:
    """Turns every failure to read `path` into a BadFile, of kind `kind` where nothing more is known."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe, or read a device, could take for ever
            raise BadFile("unreadable", path, "not a regular file")
        yield
    except (BadFile, MemoryError):
        raise
    except FileNotFoundError:
        raise BadFile("missing", path, "no such file") from None
    except Exception as error:  # FFmpeg and Pillow raise a dozen unrelated classes on damaged files
        if is_empty(path):
            raise BadFile("empty", path, "0 bytes") from None
        if isinstance(error, OSError) and error.errno in PASSING_ERRORS:
            kind = "io"
        elif "truncated" in str(error).lower():  # Pillow's word
            kind = "truncated"
        raise BadFile(kind, path, f"{type(error).__name__}: {error}".split("; last error log")[0]) from None


def _whole(path: File) -> Probe:
    if Path(path).is_dir():
        files = _image_files(Path(path))
        return probe_image(files[0])._replace(frames=len(files), codec="images")
    return index(path).probe


def _image_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers in their names: 2.jpg before 10.jpg."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise BadFile("no_video", folder, "a folder without images")
    return sorted(
        files, key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)]
    )


def index(path: File) -> Index:
    """Where the frames of a video file are, and what is known of it without decoding. Raises BadFile."""
    with _faults(path, "unreadable"):
        status = Path(path).stat()
        # the cache must not outlive the file it describes
        return _indexed(str(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)  # 3 KB for a video of 10 s
def _indexed(path: str, changed: int, size: int) -> Index:
    if is_cut_short(path):
        raise BadFile("truncated", path, "the file ends before its container does")
    with _open(path) as container:
        stream = container.streams.video[0]
        times, keys, first = [], [], None
        for packet in _packets(container, stream):
            if first is None:
                # leading pictures of a cut stream; none at all is caught below
                with contextlib.suppress(av.FFmpegError):
                    first = next(iter(packet.decode()), None)
            if packet.size and not is_hidden(packet, stream.codec_context.name):
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        if first is None:
            raise BadFile("corrupt", path, "no frame can be decoded")
        trusted = times_are_trusted(container.format.name, stream.codec_context, times)
        codec, pixel_format = stream.codec_context.name, first.format.name
        clock = container.format.name, stream.time_base or Fraction(1)
        rate, metadata = stream.average_rate, dict(container.metadata)
    height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
    frames = len(times) if trusted else sum(1 for _ in decode_all(path))
    try:
        layout = phases.layout_of(metadata, frames)
    except ValueError as error:
        raise BadFile("unreadable", path, str(error)) from None
    found = Probe(frames, height, width, codec, pixel_format, first.rotation % 360, rate, layout)
    if not trusted:
        return Index(found, None, np.empty(0, np.int64), *clock)
    return Index(found, np.sort(np.array(times, np.int64)), np.sort(np.array(keys, np.int64)), *clock)


def _open(path: str) -> "av.container.InputContainer":
    container = av.open(path, metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise BadFile("no_video", path, "holds no video stream")
    codec = container.streams.video[0].codec_context
    codec.options = {"err_detect": "explode"}  # else a damaged frame is patched up and passed off as good
    codec.thread_count, codec.thread_type = 1, "NONE"  # the loader's processes are the parallelism
    return container


def _read_video(path: File, wanted: list[int]) -> dict[int, np.ndarray]:
    """The frames `wanted` (ascending) of a file, by index."""
    found = index(path)
    with _faults(path, "corrupt"):
        if found.times is None:
            return _from_the_start(path, {k: k for k in wanted}, counted=True)
        places = {int(found.times[k]): k for k in wanted}
        with contextlib.suppress(av.FFmpegError, ValueError):
            frames = _collect(str(path), found.keys, places)
            if len(frames) == len(wanted):
                return frames
        # a seek may land too late, or on a keyframe that needs more than itself: once more without seeking
        return _from_the_start(path, places, counted=False)


def _from_the_start(path: File, places: dict[int, int], counted: bool) -> dict[int, np.ndarray]:
    """The frames at `places` (presentation times, or numbers where frames are `counted`), by index. Raises BadFile."""
    rgb = VideoReformatter()
    frames: dict[int, np.ndarray] = {}
    for number, frame in enumerate(decode_all(str(path))):
        place = number if counted else frame.pts
        if place in places:
            frames[places[place]] = _rgb(frame, rgb)
        if len(frames) == len(places):
            return frames
    raise BadFile("corrupt", path, f"{len(frames)} of {len(places)} frames can be decoded")


def decode_all(path: str) -> "Iterator[av.VideoFrame]":
    """Every frame of a video file, one after the other, as stored. Raises BadFile at the first that is damaged."""
    with _faults(path, "corrupt"), _open(path) as container:
        for packet in _packets(container, container.streams.video[0]):
            yield from packet.decode()


def _collect(path: str, keys: np.ndarray, places: dict[int, int]) -> dict[int, np.ndarray]:
    """The frames at the presentation times `places`, by index, seeking from group to group. May miss some."""
    rgb = VideoReformatter()
    frames: dict[int, np.ndarray] = {}
    with _open(path) as container:
        stream = container.streams.video[0]
        groups: dict[int, list[int]] = {}  # index of the keyframe to start from -> times to collect
        for time in sorted(places):
            groups.setdefault(max(int(np.searchsorted(keys, time, "right")) - 1, 0), []).append(time)
        reached = 0  # the group the decoder is in
        for group, times in groups.items():
            if group > reached:
                container.seek(int(keys[group]), stream=stream)
            reached = group
            left = set(times)
            for frame in _forward(container, stream, left, int(keys[group]) if len(keys) else None):
                if frame.pts in left:
                    left.remove(frame.pts)
                    frames[places[frame.pts]] = _rgb(frame, rgb)
                if not left:
                    break
    return frames


def _forward(container, stream, wanted: set[int], key: int | None) -> "Iterator[av.VideoFrame]":
    """Frames from here on. Those that nobody wants and nobody refers to are not decoded."""
    codec = stream.codec_context
    for packet in _packets(container, stream):
        codec.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
        try:
            yield from packet.decode()
        except av.FFmpegError:
            # pictures shown before the keyframe refer to what the seek has skipped
            if key is None or packet.pts is None or packet.pts >= key:
                raise


def _packets(container, stream) -> "Iterator[av.Packet]":
    # one that is left half-way and not closed keeps 150 bytes for ever
    with contextlib.closing(container.demux(stream)) as packets:
        yield from packets


def _rgb(frame: "av.VideoFrame", reformatter: VideoReformatter) -> np.ndarray:
    """One frame as shown, (H, W, 3) uint8. `reformatter` keeps its conversion tables from frame to frame."""
    if frame.is_corrupt:
        raise ValueError("the decoder marks a frame as damaged")
    picture = reformatter.reformat(frame, format="rgb24", interpolation=CONVERSION, threads=1).to_ndarray()
    turns = frame.rotation // 90 if frame.rotation % 90 == 0 else 0
    return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture
