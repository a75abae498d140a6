"""What a video file says of itself, and what of it to believe.

FFmpeg reads a file that was cut off as a shorter video; the sizes in its headers tell.
"""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np

from bevt_fast.data import phases

EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # Matroska / WebM


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
    key_packets: np.ndarray  # the packet of each of `keys`: its number in the order of decoding
    in_order: bool = False  # taken from the container's table: no frame is shown before one that is decoded earlier


class Look(NamedTuple):
    """What tells that a file is still the same one."""

    changed: int  # nanoseconds
    size: int
    inode: int


def is_cut_short(path: str | Path) -> bool:
    """Whether an mp4/mov, WebM/Matroska or avi file ends before the size in its own headers. False if there is none."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(64)
        if head[:4] == b"RIFF":
            # an interrupted recording leaves 0 or all ones
            declared = int.from_bytes(head[4:8], "little")
            return declared != 0xFFFFFFFF and declared + 8 > size
        if head[:4] == EBML:
            return _segment_end(head) > size
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return any(kind in (b"moov", b"mdat", b"moof") and end > size for kind, end in _boxes(file, size))
    return False


def is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is only there to be decoded: outside the edit list, or a hidden frame of VP8 (RFC 6386, 9.1)."""
    return packet.is_discard or (codec == "vp8" and not bytes(packet)[0] >> 4 & 1)


def times_are_trusted(container: str, codec: "av.VideoCodecContext", times: list[int | None]) -> bool:
    """False where the packets' times do not say the order of presentation."""
    if None in times or len(set(times)) < len(times):
        return False
    # avi stores no presentation times; FFmpeg's guess holds only where decoding order is presentation order
    return container != "avi" or not codec.has_b_frames


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """The outer boxes of an mp4 file: kind, and where it ends (ISO 14496-12, 4.2)."""
    start = 0
    while start + 8 <= size:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0 means up to the end of the file; anything else is no box
            return
        start += length
        yield head[4:8], start


def _segment_end(head: bytes) -> int:
    """Where the Segment, which holds everything, ends; 0 if it does not say (RFC 8794, 4 and 6)."""
    after, header = _number(head, 4)
    if header is None or head[after + header : after + header + 4] != SEGMENT:
        return 0
    start, length = _number(head, after + header + 4)
    return 0 if length is None else start + length


def _number(head: bytes, at: int) -> tuple[int, int | None]:
    """A variable-length number: where it ends, and its value; None where all its bits are ones, which means unknown."""
    first = head[at] if at < len(head) else 0
    length = 9 - first.bit_length()
    bits = (1 << 7 * length) - 1
    value = int.from_bytes(head[at : at + length], "big") & bits
    return at + length, None if not first or value == bits else value
