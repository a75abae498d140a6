"""One open video file: where its frames are (`Index`), and their decoding, with PyAV.

A clip is drawn from a file's index and read at once, so a file stays open between the two, with its decoder and, while
they are few bytes, its packets: what was read for the index is not read again. One file is kept by a process.
"""

import contextlib
import os
from collections.abc import Generator, Iterator
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any, NamedTuple

import av
import av.container
import av.logging
import numpy as np
from av.video.reformatter import VideoReformatter

from bevt_fast.data import phases
from bevt_fast.data.containers import Index, Look, Probe, is_hidden, times_are_trusted
from bevt_fast.data.faults import BadFile

av.logging.set_level(av.logging.PANIC)  # FFmpeg's remarks on damaged files; what matters arrives as BadFile

IN_MEMORY = 2**25  # bytes of packets that are kept; a longer file is read again where the clip is


class _Table(NamedTuple):
    """The packets of the shown frames, in the order of decoding: presentation times; those of keyframes by number."""

    times: list[int | None]
    keys: list[tuple[int | None, int]]


class Video:
    """An open file. Whatever is raised while it is in use: close it, and open the file anew."""

    def __init__(self, path: str, look: Look):
        self.path, self.look = path, look
        self.worth_keeping = False  # what was read of it spares reading it again
        self._open()

    def _open(self) -> None:
        self.container = open_container(self.path)
        self.stream = self.container.streams.video[0]
        self.codec = self.stream.codec_context
        self._packets: list[av.Packet] | None = None  # all of them, where they are held
        self._coming: Generator[av.Packet] = packets_of(self.container)  # the packets that follow
        self._next = 0  # the number of the first of them
        # what the decoder has given since packet `_since`, and nobody has looked at; None: it has given more
        self._given: list[av.VideoFrame] = []
        self._since: int | None = 0

    def close(self) -> None:
        """The file is closed and its packets are forgotten."""
        self._coming.close()
        self._packets = None
        self.container.close()

    def survey(self) -> Index:
        """Where the frames are, as far as packets tell: where `times` is None, `probe.frames` is of packets.

        For a file that was just opened. Raises BadFile.
        """
        table, first = self._listed(), None
        if table is not None:
            first = self._first()
            if first is None or first.pts != table.times[0]:
                self.close()
                self._open()
                table = None
        in_order = table is not None
        if table is None:
            table, first = self._read_through()
        if first is None:
            raise BadFile("corrupt", self.path, "no frame can be decoded")
        name, codec, times = self.container.format.name, self.codec, table.times
        height, width = (first.width, first.height) if first.rotation % 180 else (first.height, first.width)
        found = Probe(
            len(times), height, width, codec.name, first.format.name, first.rotation % 360, self.stream.average_rate
        )
        unit, nothing = self.stream.time_base or Fraction(1), np.empty(0, np.int64)
        if not times_are_trusted(name, codec, times):
            return Index(found, None, nothing, name, unit, nothing)
        self.worth_keeping = in_order or self._packets is not None
        keys = np.array(sorted(table.keys), np.int64).reshape(-1, 2)
        return Index(found, np.sort(np.array(times, np.int64)), keys[:, 0], name, unit, keys[:, 1], in_order)

    def collect(self, index: Index, wanted: set[int]) -> dict[int, np.ndarray]:
        """The frames at the presentation times `wanted`, (H, W, 3) uint8 by time, from group to group. May miss some.

        The arrays may be views of rows that lie further apart.
        """
        rgb, frames = VideoReformatter(), {}
        groups: dict[int, set[int]] = {}  # number of the keyframe to start from -> times to collect
        for time in sorted(wanted):
            groups.setdefault(max(int(np.searchsorted(index.keys, time, "right")) - 1, 0), set()).add(time)
        for group, left in groups.items():
            key = int(index.keys[group]) if len(index.keys) else None
            self._go_to(key, int(index.key_packets[group]) if group else 0)
            for frame in self._forward(left, key, index.in_order):
                if frame.pts in left:
                    left.remove(frame.pts)
                    frames[frame.pts] = picture(frame, rgb)
                if not left:
                    break
        return frames

    def _listed(self) -> _Table | None:
        """The table of an mp4's index, without a look at its packets; None where it may not say what they do.

        It has times of decoding, which are those of presentation in a file that `coding.py` wrote.
        """
        with contextlib.suppress(ValueError):
            claimed = phases.claims(self.container.metadata)
            if claimed is None or "mp4" not in self.container.format.name or self.codec.has_b_frames:
                return None
            entries = [(e.timestamp, e.is_keyframe) for e in self.stream.index_entries if e.size and not e.is_discard]
            times = [time for time, _ in entries]
            if not entries or not len(entries) == len(self.stream.index_entries) == self.stream.frames:
                return None
            if all(one < other for one, other in pairwise(times)):
                return _Table(list(times), [(time, k) for k, (time, is_key) in enumerate(entries) if is_key])
        return None

    def _first(self) -> "av.VideoFrame | None":
        """The first frame that can be decoded."""
        for packet in self._coming:
            self._next += 1
            try:
                self._given += packet.decode()
            except av.FFmpegError:  # leading pictures of a cut stream
                self._since = None
            if self._given:
                return self._given[0]
        return None

    def _read_through(self) -> "tuple[_Table, av.VideoFrame | None]":
        """One pass over all packets, which are held if they are few."""
        packets: list[av.Packet] | None = []
        size, first, name = 0, None, self.codec.name
        table = _Table([], [])
        for number, packet in enumerate(self._coming):
            if first is None:
                self._next = number + 1
                try:
                    self._given += packet.decode()
                except av.FFmpegError:  # leading pictures of a cut stream; none at all is found by the caller
                    self._since = None
                first = next(iter(self._given), None)
            bytes_ = packet.size
            if bytes_ and not is_hidden(packet, name):
                table.times.append(packet.pts)
                if packet.is_keyframe:
                    table.keys.append((packet.pts, number))
                    if number and packet.has_sidedata("new_extradata"):
                        packets = None  # to start behind a change of headers, the container must be asked
            size += bytes_
            if packets is not None and size <= IN_MEMORY:
                packets.append(packet)
            else:
                packets = None
        if packets is not None:
            self._packets, self._coming = packets, _each(packets, self._next)
        return table, first

    def _go_to(self, key: int | None, packet: int) -> None:
        """Makes the decoder ready for the keyframe shown at `key`, unless that is what follows anyway."""
        if self._next == packet or self._since == packet:
            return
        self._coming.close()
        self._given, self._since = [], None
        if self._packets is not None:
            self.codec.flush_buffers()
            self._coming = _each(self._packets, packet)
        else:
            self.container.seek(key or 0, stream=self.stream)
            self._coming = packets_of(self.container)
        self._next = packet

    def _forward(self, wanted: set[int], key: int | None, in_order: bool) -> "Iterator[av.VideoFrame]":
        """Frames from here on. Those that nobody wants and nobody refers to are not decoded."""
        given, self._given, self._since = self._given, [], None
        yield from given
        codec, skipping = self.codec, None
        for packet in self._coming:
            self._next += 1
            skip = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
            if skip != skipping:
                codec.skip_frame = skipping = skip
            if in_order and packet.size and packet.pts != packet.dts:
                raise BadFile("unreadable", self.path, "its frames were reordered later: transcode the original again")
            try:
                yield from packet.decode()
            except av.FFmpegError:
                # pictures shown before the keyframe refer to what the seek has skipped
                if key is None or packet.pts is None or packet.pts >= key:
                    raise


_kept: list[Video] = []  # one at most; whoever uses it takes it out, so two threads never have the same


@contextlib.contextmanager
def opened_video(path: str, look: Look, anew: bool = False) -> Iterator[Video]:
    """The open file: the one that was kept if it is that and unchanged, unless it is to be opened `anew`."""
    video = None
    with contextlib.suppress(IndexError):
        video = _kept.pop()
        if anew or (video.path, video.look) != (path, look):
            video.close()
            video = None
    video = video or Video(path, look)
    try:
        yield video
    except BaseException:
        video.close()
        raise
    if not video.worth_keeping:
        video.close()
        return
    let_go()
    _kept.append(video)


def let_go() -> None:
    """Closes the file that is kept, if there is one."""
    with contextlib.suppress(IndexError):
        while True:
            _kept.pop().close()


# a file that two processes have open moves in one when the other reads
os.register_at_fork(before=let_go)


def _each(packets: list[av.Packet], start: int) -> "Generator[av.Packet]":
    yield from islice(packets, start, None)


def packets_of(container: "av.container.InputContainer") -> "Generator[av.Packet]":
    """The packets of the video stream, from where the container stands."""
    # one that is left half-way and not closed keeps 150 bytes for ever
    packets: Any = container.demux(container.streams.video[0])
    with contextlib.closing(packets):
        yield from packets


def open_container(path: str) -> "av.container.InputContainer":
    """The file, its decoder set to notice damage. Raises BadFile where it has no video, av.FFmpegError."""
    container = av.open(path, metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise BadFile("no_video", path, "holds no video stream")
    codec = container.streams.video[0].codec_context
    codec.options = {"err_detect": "explode"}  # else a damaged frame is patched up and passed off as good
    codec.thread_count, codec.thread_type = 1, "NONE"  # the loader's processes are the parallelism
    return container


def picture(frame: "av.VideoFrame", reformatter: VideoReformatter) -> np.ndarray:
    """One frame as shown, (H, W, 3) uint8: what PyAV's `to_ndarray` gives, without its copy.

    FFmpeg's own conversion, as decord and torchcodec use it too: the pixels of the official pipeline. `reformatter`
    keeps its conversion tables from frame to frame. Raises ValueError for a frame that is known to be damaged.
    """
    if frame.is_corrupt:
        raise ValueError("the decoder marks a frame as damaged")
    plane: Any = reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: frame.height, : 3 * frame.width]
    turns = frame.rotation // 90 if frame.rotation % 90 == 0 else 0
    return np.rot90(rows.reshape(frame.height, frame.width, 3), turns)
