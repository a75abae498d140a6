"""One video written once more: smaller, and its frames in an order that makes a clip cheap to decode (`phases.py`).

A file appears under its name only when it is whole and its frames have been compared with those of its source. What is
wrong with the source is a BadFile, and so is an output that does not show it; what is wrong with the place to write to
is a DataError, which ends the program.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import av
import cv2
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from bevt_fast.data import decode, phases
from bevt_fast.data.decode import BadFile
from bevt_fast.errors import DataError

IN_MEMORY = 256 * 2**20  # bytes of pictures waiting for their place; more wait in a file
CHECKED = 12  # frames of a file that are compared
AT_ONCE = 256 * 2**20  # bytes of pictures decoded at once for the comparison
RATES = (Fraction(1, 100), Fraction(500))  # frames a second that every container can count in; others become 25
# sums rounded exactly and chroma of whole rows, because this is done once and read often
EXACT = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
GREY = np.array((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601


class Coding(NamedTuple):
    """An encoder: its name, container and options. None of them may put a frame before its time."""

    encoder: str
    container: Literal["mp4", "webm"]
    options: dict[str, str]
    pixel_format: str = "yuv420p"


CODINGS = {
    # without CABAC and deblocking: a quarter larger, and a CPU decodes a clip in two thirds of the time; without what
    # x264 adds for the eye: an eighth smaller at the same PSNR
    "h264": Coding(
        "libx264", "mp4", {"sc_threshold": "0", "forced-idr": "1", "bf": "0", "tune": "fastdecode", "psy": "0"}
    ),
    "vp9": Coding(
        "libvpx-vp9", "webm", {"deadline": "good", "cpu-used": "2", "lag-in-frames": "0", "auto-alt-ref": "0", "b": "0"}
    ),
    "hevc": Coding(
        "libx265", "mp4",
        {"forced-idr": "1", "x265-params": "log-level=none:bframes=0:scenecut=0:open-gop=0:pools=none:frame-threads=1"},
    ),
    "mjpeg": Coding("mjpeg", "mp4", {}, "yuvj420p"),
}  # fmt: skip


class Recipe(NamedTuple):
    """How files are written. `stride` 1 is the ordinary order; `crf` is the codec's own scale of quality."""

    short_side: int = 256
    stride: int = 8
    gop: int = 4
    crf: int = 18
    codec: str = "h264"

    def layout(self, frames: int) -> phases.Layout | None:
        """The order of the frames in a file of so many."""
        return phases.Layout(self.stride, frames) if self.stride > 1 else None


class Task(NamedTuple):
    """One file to write: the first `count` frames of `source` (-1: all) into `target`."""

    source: str
    target: str
    count: int = -1


def write(task: Task, recipe: Recipe, check: bool = True) -> bool:
    """Write one file, unless it is there from the same source and recipe; returns whether it was written.

    Raises BadFile for a source that cannot be used, DataError where the target cannot be written.
    """
    made = _made(task, recipe)
    if _is_finished(task, made):
        return False
    target = Path(task.target)
    # hidden, so that no walk over the folder finds it; its own name could become too long
    part = target.with_name(f".{hashlib.blake2b(os.fsencode(target.name), digest_size=12).hexdigest()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.SpooledTemporaryFile(IN_MEMORY, dir=str(target.parent)) as spool:
            _encode(task, recipe, made, spool, part)
        if check:
            compare(task, recipe, part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; make room or choose another --out, "
            "then run the same command again: what is finished is kept"
        ) from None
    except av.FFmpegError as error:
        raise BadFile("unreadable", task.source, f"cannot be written as {recipe.codec}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
    return True


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with this short side at most, both even as 4:2:0 needs; never larger than it was, but for 1."""
    scale = min(1.0, short_side / min(height, width))
    return max(2, int(height * scale + 0.5) // 2 * 2), max(2, int(width * scale + 0.5) // 2 * 2)


def resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture (H, W, 3) at `size` (height, width): averaged over areas, which does not alias; odd edges cut off."""
    height, width = picture.shape[:2]
    if height - size[0] in (0, 1) and width - size[1] in (0, 1):
        return np.ascontiguousarray(picture[: size[0], : size[1]])
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA)


def compare(task: Task, recipe: Recipe, written: Path) -> None:
    """Raises BadFile unless `written` has the frames of the task's source, each in its place, and its keyframes.

    Frames all over the file are read back under their own numbers and compared with those of the source at the same
    size: the error must stay below `least_psnr`, and wherever a frame of the source and one beside it (in the video or
    in the file) differ by more than coding explains, the written frame must be nearer to its own.
    """
    found, source = decode.probe(written), decode.probe(task.source, (0, task.count))
    layout = recipe.layout(source.frames)
    if (found.frames, found.layout) != (source.frames, layout):
        raise _differs(task, f"it has {found.frames} frames in the order {found.layout}")
    if lacking := set(phases.keyframes(layout or phases.Layout(1, found.frames), recipe.gop)) - _keyframes(written):
        raise _differs(task, f"the frame stored at {min(lacking)} is no keyframe")
    size, last = (found.height, found.width), found.frames - 1
    chosen = sorted({min(round(i * last / (CHECKED - 1)) + (i % recipe.stride), last) for i in range(CHECKED)})
    together = max(1, AT_ONCE // (5 * 3 * source.height * source.width))
    for some in (chosen[i : i + together] for i in range(0, len(chosen), together)):
        near = {k: _beside(k, recipe.stride, last) for k in some}
        needed = sorted({*some, *(j for others in near.values() for j in others)})
        originals = dict(zip(needed, (resized(frame, size) for frame in decode.read_frames(task.source, needed))))
        for k, picture in zip(some, decode.read_frames(written, some)):
            if fault := _difference(picture, originals[k], {j: originals[j] for j in near[k]}, recipe.crf):
                raise _differs(task, f"frame {k} {fault}")


def least_psnr(crf: int) -> float:
    """The PSNR in dB below which a picture of this `crf` is another picture.

    An error of half a quantiser step everywhere, at a step of 0.625 * 2**(QP / 6) (H.264's; the other codecs are finer
    at the same number), with a QP 12 above `crf`, as far as rate control goes in busy pictures: 46.2 - 1.003 crf.
    """
    return 46.0 - crf


def _difference(found: np.ndarray, own: np.ndarray, others: dict[int, np.ndarray], crf: int) -> str | None:
    """What says that the picture `found` is not `own`, coded; None if nothing does. All (H, W, 3) uint8."""
    error = 255 * 10 ** (-least_psnr(crf) / 20)  # root mean square, in grey levels
    grey, right = found @ GREY, own @ GREY
    # colour has half the resolution: at borders a quarter of it may move by a pixel, over the sides of a cell in 4 x 4
    leak = 255 / max(min(own.shape[:2]) // 4, 1)
    cells = [cv2.resize(picture, (4, 4), interpolation=cv2.INTER_AREA).astype(np.float32) for picture in (found, own)]
    for what, distance, most in (("brightness", grey - right, error), ("colours", cells[0] - cells[1], error + leak)):
        if (off := float(np.sqrt((distance**2).mean()))) > most:
            return f"differs from the source by {off:.0f} grey levels in its {what}, where coding explains {most:.0f}"
    for j, other in others.items():
        wrong = other @ GREY
        changed = np.abs(wrong - right) > 3 * error
        if np.count_nonzero(changed) < max(16, changed.size // 1000):  # a still scene
            continue
        if ((grey - right)[changed] ** 2).sum() >= ((grey - wrong)[changed] ** 2).sum():
            return f"shows frame {j}, or something between the two"
    return None


def _beside(k: int, stride: int, last: int) -> list[int]:
    """The frames before and after frame k in the video, and in the file."""
    return sorted({j for j in (k - stride, k - 1, k + 1, k + stride) if 0 <= j <= last})


def _keyframes(path: Path) -> set[int]:
    with av.open(str(path)) as container:
        packets = (packet for packet in container.demux(video=0) if packet.size)
        return {position for position, packet in enumerate(packets) if packet.is_keyframe}


def _differs(task: Task, how: str) -> BadFile:
    return BadFile("corrupt", task.source, f"what was written does not show it and was deleted: {how}")


def _made(task: Task, recipe: Recipe) -> dict[str, Any]:
    """What a file is made from and how: while this is the same, it need not be made again."""
    source = Path(task.source)
    try:
        files = [entry.stat() for entry in os.scandir(source)] if source.is_dir() else [source.stat()]
    except OSError as error:
        kind = "missing" if isinstance(error, FileNotFoundError) else "io"
        raise BadFile(kind, source, error.strerror or "cannot be read") from None
    changed = max((file.st_mtime_ns for file in files), default=0)
    return recipe._asdict() | {"bytes": sum(file.st_size for file in files), "changed": changed, "count": task.count}


def _is_finished(task: Task, made: dict[str, Any]) -> bool:
    """Whether the target is there and up to date. Raises DataError if it is there and not of our making."""
    if not os.path.lexists(task.target):
        return False
    try:
        with av.open(task.target, metadata_errors="ignore") as container:
            said = phases.claims(container.metadata)
    except ValueError:  # of another version, or no video: av.InvalidDataError is one too
        said = {} if _is_ours(task.target) else None
    except OSError:
        said = None
    if said is None:
        raise DataError(f"{task.target} is there and was not written by transcode; choose an empty folder for --out")
    return said.get("made") == made


def _is_ours(path: str) -> bool:
    """Whether an unreadable file is what a crash of the machine leaves: empty, or of another version of ours."""
    with open(path, "rb") as file:
        return not os.path.getsize(path) or phases.MARK.encode() in file.read(2**20)


def _encode(task: Task, recipe: Recipe, made: dict[str, Any], spool: IO[bytes], part: Path) -> None:
    """Decode the source once, in order, and code its pictures in the order of the layout."""
    found = decode.probe(task.source, (0, task.count))
    size, coding = target_size(found.height, found.width, recipe.short_side), CODINGS[recipe.codec]
    for picture in islice(decode.each_frame(task.source), found.frames):
        if picture.shape[:2] != (found.height, found.width):
            raise BadFile("corrupt", task.source, "the picture changes its size")
        spool.write(_planes(resized(picture, size), coding))
    layout = recipe.layout(found.frames)
    order = phases.shown(range(found.frames), layout)
    keys = set(phases.keyframes(layout or phases.Layout(1, found.frames), recipe.gop))
    rate = found.rate if found.rate and RATES[0] <= found.rate <= RATES[1] else Fraction(25)
    flags = {"movflags": "faststart"} if coding.container == "mp4" else {}
    with av.open(str(part), "w", format=coding.container, options=flags) as output:
        output.metadata["comment"] = phases.comment(layout, made)
        stream = _stream(output, coding, recipe, size, rate)
        for position, picture in enumerate(_in_order(spool, order, size)):
            frame = av.VideoFrame.from_ndarray(picture, format=coding.pixel_format)
            frame.pts, frame.time_base = position, 1 / rate
            frame.pict_type = PictureType.I if position in keys else PictureType.NONE
            output.mux(_coded(task, stream, frame))
        output.mux(_coded(task, stream, None))


def _stream(output: Any, coding: Coding, recipe: Recipe, size: tuple[int, int], rate: Fraction) -> Any:
    """The video stream of a file to write."""
    options = dict(coding.options)
    if recipe.codec == "mjpeg":
        options |= {"qmin": str(max(2, recipe.crf // 6)), "qmax": str(max(2, recipe.crf // 6))}
    else:
        options["crf"] = str(recipe.crf)
    stream = output.add_stream(coding.encoder, rate=rate, options=options)
    stream.height, stream.width, stream.pix_fmt = *size, coding.pixel_format
    codec = stream.codec_context
    codec.time_base, codec.gop_size = 1 / rate, recipe.gop
    codec.thread_count = 1  # the files are the parallelism
    if recipe.codec == "hevc":
        codec.codec_tag = "hvc1"
    # said, because players guess by the size of the picture
    codec.colorspace = Colorspace.SMPTE170M
    codec.color_range = ColorRange.JPEG if recipe.codec == "mjpeg" else ColorRange.MPEG
    return stream


def _coded(task: Task, stream: Any, frame: "av.VideoFrame | None") -> list[av.Packet]:
    try:
        return stream.encode(frame)
    except av.FFmpegError as error:
        size = f"{stream.width} x {stream.height}"
        raise BadFile("unreadable", task.source, f"its pictures of {size} cannot be coded: {error.strerror}") from None


def _planes(picture: np.ndarray, coding: Coding) -> bytes:
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return frame.reformat(format=coding.pixel_format, interpolation=EXACT, threads=1).to_ndarray().tobytes()


def _in_order(spool: IO[bytes], order: list[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    """The pictures of the spool as planes (3 H / 2, W) uint8, in `order`."""
    height, width = size[0] * 3 // 2, size[1]
    for k in order:
        spool.seek(k * height * width)
        yield np.frombuffer(spool.read(height * width), np.uint8).reshape(height, width)
