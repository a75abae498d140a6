"""One file of the data, opened and checked: what it is, and whether training can read it. A process of its own runs
this, because a decoder may hang at a file or die of it.

Every verdict is `decode.py`'s, so a file that is good here is good in a run. A process reads jobs from its standard
input and answers on its standard output, a line of JSON each: first how the file looked before it was opened, then
its row.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
from PIL import Image

from bevt_fast.data import decode, parquet_rows, phases
from bevt_fast.data.decode import BadFile
from bevt_fast.data.packed import File, Part, opened

Depth = Literal["headers", "ends", "full"]
DEPTHS: tuple[Depth, ...] = ("headers", "ends", "full")
ORIENTATION = 0x0112  # EXIF's tag
CHUNK = 16  # frames held at once
GRACE = 5.0  # seconds after the time limit until a process whose parent is gone ends itself
# what NVDEC decodes on A100 and H100 (NVIDIA Video Codec SDK, decode support matrix); AV1 not on A100
EIGHT_BITS = {"yuv420p", "yuvj420p"}
MORE_BITS = {"yuv420p", "yuvj420p", "yuv420p10le", "yuv420p12le"}
NVDEC = {
    "h264": EIGHT_BITS,
    "hevc": MORE_BITS | {"yuv444p", "yuvj444p", "yuv444p10le", "yuv444p12le"},
    "av1": {"yuv420p", "yuvj420p", "yuv420p10le"},
    "vp9": MORE_BITS,
    "vp8": EIGHT_BITS,
    "mpeg1video": EIGHT_BITS,
    "mpeg2video": EIGHT_BITS,
    "mpeg4": EIGHT_BITS,
    "vc1": EIGHT_BITS,
}


class Job(NamedTuple):
    """A file to check, as a source lists it: all of it, or `count` frames from `first` on.

    An image in a tar shard is `count` bytes from byte `first` of `shard`; one in a parquet file is a row of it.
    """

    path: str
    kind: str  # "clips" or "images"
    first: int = 0
    count: int = -1
    min_frames: int = 1
    shard: str = ""

    @property
    def file(self) -> File:
        """What `decode` opens."""
        if not self.shard:
            return self.path
        if self.shard.endswith(parquet_rows.SUFFIX):
            return parquet_rows.Row.named(self.shard, self.path[len(self.shard) + 1 :])
        return Part(Path(self.shard), self.path[len(self.shard) + 1 :], self.first, self.count)


class Look(NamedTuple):
    """How a file looks from outside; one that looks the same is not opened again. For a folder, its images together."""

    bytes: int
    changed_ns: int


def look(path: str) -> Look | None:
    """The file's size and time of change; None where there is no file, or none that may be looked at."""
    try:
        status = os.stat(path)
        if not os.path.isdir(path):
            return Look(status.st_size, status.st_mtime_ns)
        with os.scandir(path) as entries:
            images = [e.stat() for e in entries if os.path.splitext(e.name)[1].lower() in decode.IMAGE_SUFFIXES]
        return Look(sum(i.st_size for i in images), max([status.st_mtime_ns, *(i.st_mtime_ns for i in images)]))
    except OSError:
        return None


def examine(job: Job, depth: Depth) -> dict[str, Any]:
    """The columns that opening the file fills in: `status`, "ok" or one of decode.KINDS, `reason`, and all that was
    found out before a fault.
    """
    row: dict[str, Any] = {}
    for attempt in range(2):
        try:
            (_image if job.kind == "images" else _folder if os.path.isdir(job.path) else _video)(job, depth, row)
            return row | {"status": "ok", "reason": ""}
        except BadFile as error:
            reason = error.reason if error.path == job.path else f"{error.path}: {error.reason}"
            row |= {"status": error.kind, "reason": reason}
            if error.kind not in decode.PASSING_FAULTS or attempt:
                break
            time.sleep(1.0)
        except Exception as error:  # whatever else a file may do to a library, memory included
            row |= {"status": "unreadable", "reason": f"{type(error).__name__}: {error}"}
            break
    return row


def _image(job: Job, depth: Depth, row: dict[str, Any]) -> None:
    row |= _columns(decode.probe_image(job.file)) | {"container": "image", "frame_rate": ""}
    with (
        suppress(Exception),
        opened(job.file) as content,
        Image.open(content) as image,
    ):  # damaged EXIF data matters to nobody else
        row["exif_orientation"] = image.getexif().get(ORIENTATION, "")
    if depth != "headers":
        decode.read_image(job.file)


def _folder(job: Job, depth: Depth, row: dict[str, Any]) -> None:
    row |= _columns(decode.probe(job.path)) | {"container": "folder"}
    extent = (job.first, job.count)
    n = decode.probe(job.path, extent, job.min_frames).frames
    row["frames"] = n
    if depth == "ends":
        decode.read_frames(job.path, [0, n // 2, n - 1], extent)
    elif depth == "full":
        _read_all(job, n)


def _video(job: Job, depth: Depth, row: dict[str, Any]) -> None:
    index = decode.index(job.path)
    row |= _described(index)
    extent = (job.first, job.count)
    n = decode.probe(job.path, extent, job.min_frames).frames
    row["frames"] = n
    if depth == "ends":
        decode.read_frames(job.path, _ends(index, job.first, n), extent)
    elif depth == "full" and n == index.probe.frames:
        _decode_all(job.path, n)
    elif depth == "full":
        _read_all(job, n)


def _columns(probe: decode.Probe) -> dict[str, Any]:
    """What the report has of a probe as it is."""
    return {name: value for name, value in probe._asdict().items() if name not in ("rate", "layout")}


def _described(index: decode.Index) -> dict[str, Any]:
    """What the packets say of a video: timing, keyframes, and whether NVDEC has its codec."""
    probe, times, n = index.probe, index.times, index.probe.frames
    takes = probe.pixel_format in NVDEC.get(probe.codec, ())
    row = _columns(probe) | {"container": index.container, "nvdec": f"{'yes' if takes else 'no'} (by table)"}
    if probe.layout is not None:
        row["phases"] = probe.layout.stride
    rate = probe.rate
    if times is not None and n > 1 and (span := int(times[-1]) - int(times[0])) > 0:
        rate = Fraction(n - 1, span) / index.unit
    if rate:
        row |= {"fps": f"{float(rate):.3f}", "duration_s": f"{float(n / rate):.3f}"}
    row["frame_rate"] = "unknown" if times is None else "constant" if _is_even(times, index.unit) else "variable"
    if times is not None and len(index.keys):
        starts = np.searchsorted(times, index.keys)
        longest = int(np.diff(np.append(starts, n)).max())
        row |= {"keyframe_longest": longest, "keyframe_mean": f"{n / len(starts):.2f}"}
    return row


def _is_even(times: np.ndarray, unit: Fraction) -> bool:
    """Whether no frame is off an even spacing by more than what rounding does: a unit, or a millisecond (WebM, flv)."""
    if len(times) < 3:
        return True
    since = (times - times[0]).astype(np.float64)
    off = np.abs(since - np.linspace(0, since[-1], len(times))).max()
    return bool(off * float(unit) <= 1.001 * max(float(unit), 0.001))


def _ends(index: decode.Index, first: int, n: int) -> list[int]:
    """The first and last frame of the first, middle and last keyframe group among the `n` frames from `first` on."""
    keys = np.empty(0, np.int64) if index.times is None else np.searchsorted(index.times, index.keys) - first
    starts = [0, *(int(key) for key in keys if 0 < key < n)]
    groups = {0, len(starts) // 2, len(starts) - 1}
    ends = sorted({k for group in groups for k in (starts[group], [*starts, n][group + 1] - 1)})
    # of a part of a phase-split file they are some frames or other: its groups hold frames of the other parts too
    return ends if n < index.probe.frames else phases.shown(ends, index.probe.layout)


def _decode_all(path: str, n: int) -> None:
    """Decode every frame of a file, holding one."""
    count, size = 0, None
    for frame in decode.decode_all(path):
        if frame.is_corrupt:
            raise BadFile("corrupt", path, f"the decoder marks frame {count} as damaged")
        if size not in (None, (frame.width, frame.height)):
            raise BadFile("corrupt", path, f"the picture changes its size at frame {count}")
        count, size = count + 1, (frame.width, frame.height)
    if count < n:
        raise BadFile("corrupt", path, f"{count} of {n} frames can be decoded")


def _read_all(job: Job, n: int) -> None:
    """Read every frame of a part of a file, or of a folder, some at a time."""
    shapes = set()
    for start in range(0, n, CHUNK):
        frames = decode.read_frames(job.path, range(start, min(start + CHUNK, n)), (job.first, job.count))
        shapes.add(frames.shape[1:])
    if len(shapes) > 1:
        raise BadFile("corrupt", job.path, "the picture changes its size")


def answer(lines: Iterator[str], answers: TextIO, depth: Depth, timeout: float) -> None:
    """Work off jobs, (job, its look when it was checked before or None) a line; null answers a file that looks the
    same.
    """

    def say(what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    say(None)  # ready
    for line in lines:
        job, known = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        seen = look(Job(*job).shard or job[0])
        say(seen)
        same = known is not None and seen is not None and tuple(known) == seen
        say(None if same else examine(Job(*job), depth))
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(depth: str, timeout: str) -> None:
    """What a checking process runs; `depth` is a number in DEPTHS."""
    # the alarm ends the process inside any library, and even when nobody is left to end it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "w")
    for descriptor in (1, 2):  # libraries write where they like
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    answer(iter(sys.stdin.readline, ""), answers, DEPTHS[int(depth)], float(timeout))


if __name__ == "__main__":
    main(*sys.argv[1:])
