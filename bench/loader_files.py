"""The files that the loader's benchmark reads where it is given none."""

import argparse
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from PIL import Image

from bevt_fast.data.sources import Source
from bevt_fast.data.sources.file_list import Options, build


def make_files(folder: Path, options: argparse.Namespace) -> None:
    """H.264 videos with a keyframe every 250 frames, as in Kinetics, and JPEGs: one for each sample of a round."""
    folder.mkdir(parents=True)
    height, width, frames = (64, 96, 40) if options.quick else (256, 340, 300)
    for number in range(0 if options.data else options.clips * (1 + options.batches)):
        scene = _scene(number, 2 * height, 2 * width)
        with av.open(str(folder / f"{number:03}.mp4"), "w") as output:
            stream = output.add_stream("libx264", rate=30, options={"preset": "fast"})
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 250
            for k in range(frames):
                top, left = int(height * (0.5 + 0.49 * math.sin(k / 40))), int(width * (0.5 + 0.49 * math.cos(k / 60)))
                picture = scene[top : top + height, left : left + width].copy()
                cv2.circle(picture, (7 * k % width, 3 * k % height), height // 8, (255, 40, 40), -1)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 30)
                output.mux(stream.encode(frame))
            output.mux(stream.encode())
    height, width = (64, 96) if options.quick else (375, 500)
    for number in range(options.images * (1 + options.batches)):
        Image.fromarray(_scene(number, height, width)).save(folder / f"{number:03}.jpg", quality=90)


def _scene(number: int, height: int, width: int) -> np.ndarray:
    """Soft blotches under a little grain."""
    noise = np.random.RandomState(number).randint(0, 256, (height, width, 3)).astype(np.uint8)
    soft = cv2.GaussianBlur(noise, (0, 0), 4)
    soft = cv2.normalize(soft, np.empty_like(soft), 10, 245, cv2.NORM_MINMAX)
    return cv2.addWeighted(soft, 0.95, noise, 0.05, 0)


def source(folder: Path, stream: str, options: argparse.Namespace) -> Source:
    """The files of one stream below `folder`."""
    kind: Any = stream
    return build(
        Options(root=str(folder), kind=kind, frames=4 if options.quick else 16, stride=3 if options.quick else 8)
    )
