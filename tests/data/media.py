"""Small real files, made on the spot: videos whose frames carry their number as black and white bars."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 6  # so a video has at most 64 frames


def picture(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """(height, width, 3) uint8: one bar a bit of `number` in the upper half, a texture that moves with it below."""
    rows, columns = np.mgrid[:height, :width]
    bright = (number >> (columns * BITS // width)) & 1
    texture = 128 + 60 * np.sin((rows + 3 * number) / 5) * np.cos((columns - 2 * number) / 7)
    grey = np.where(rows < height // 2, 40 + 180 * bright, texture)
    return np.stack([grey, grey * 0.8, 250 - grey], axis=-1).astype(np.uint8)


def number(frame: np.ndarray) -> int:
    """The number a frame carries, from the middle of each bar; right for any codec that keeps black from white."""
    height, width = frame.shape[:2]
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    rows = slice(height // 8, height // 4)
    return sum(int(frame[rows, x - 2 : x + 3, 0].mean() > 130) << bit for bit, x in enumerate(middles))


def assert_same_but_for_chroma(found: Any, expected: Any, rescaled: bool = True) -> None:
    """The same pictures (..., 3) uint8 of one file, decoded by DALI and by PyAV.

    Colours are stored for blocks of 2 x 2 pixels: FFmpeg repeats them, DALI interpolates, so at an edge between colours
    the two differ by much. Brightness does not depend on that: FFmpeg cuts off each of the three terms of a channel and
    DALI rounds, which makes at most 3 grey levels; bicubic rescaling (the sum of its weights is at most 1.375 along an
    axis) makes that 3 * 1.375 ** 2 and rounds both, by half a level. Another frame differs by tens of levels.
    """
    found, expected = (np.asarray(pictures).astype(np.float64) for pictures in (found, expected))
    assert found.shape == expected.shape
    brightness = np.abs((found - expected) @ (0.299, 0.587, 0.114))
    assert brightness.max() <= (3 * 1.375**2 + 1 if rescaled else 3), brightness.max()
    assert np.abs(found - expected).mean() < 8  # colours


def video(
    path: Path,
    codec: str,
    *,
    frames: int = 40,
    size: tuple[int, int] = (64, 96),
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    group: int = 12,
    rate: int = 25,
) -> Path:
    """Writes a video of numbered frames of (height, width) `size`; `times` in milliseconds, else `rate` a second."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = pixel_format, group
        unit = Fraction(1, rate) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = unit
        if rotation:
            stream.set_display_rotation(rotation)
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(k, *size), format="rgb24")
            frame.pts, frame.time_base = (k if times is None else int(times[k])), unit
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """Writes a file with an audio stream and nothing else."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=16000, layout="mono")
        for k in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * k
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def packets(path: Path) -> list[tuple[int, int, int]]:
    """(position in the file, size, presentation time) of the packets of a video, in decoding order."""
    with av.open(str(path)) as container:
        return [(packet.pos or 0, packet.size, packet.pts or 0) for packet in container.demux(video=0) if packet.size]
