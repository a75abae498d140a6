"""The same views as `pipeline_reference.py`, decoded and cut by NVIDIA DALI. The only file that imports it.

One graph for clips, one for images; what is random reaches it as numbers, so DALI draws nothing itself. It decodes to
the same bits as `decode.py`. Its bicubic kernel is another (a = -0.5, OpenCV has -0.75), so rescaled pictures differ by
half a grey level on average. A damaged file ends a DALI pipeline: it is built anew, and the batch goes one by one.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bevt_fast.data.decode import BadFile, Probe
from bevt_fast.data.pipeline_reference import GREY, token_view
from bevt_fast.data.sampling import Crop
from bevt_fast.errors import MachineError

CPU_CODECS = {"vp8", "vp9", "mjpeg"}  # all that DALI 2.4 decodes without a GPU; H.264 and the rest go through PyAV


class Job(NamedTuple):
    """One sample to read: its file, frames (numbers in the file; None for an image) and crop."""

    path: Path
    frames: list[int] | None
    crop: Crop


def require() -> None:
    """Raises MachineError if DALI is not installed. Does not import it: worker processes do, each for itself."""
    try:
        there = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        there = False
    if not there:
        raise MachineError(
            'data.decoder is "dali", and NVIDIA DALI is not installed: '
            'pip install nvidia-dali-cuda130, or set data.decoder to "pyav"'
        )


def takes(found: Probe) -> bool:
    """Whether DALI reads such a file as `decode.py` does: a codec it has without a GPU, and no rotation to apply."""
    return found.rotation == 0 and (found.codec in CPU_CODECS or found.codec == "JPEG")


class DaliViews:
    """Reads batches of jobs of one stream. The pipeline is built by the first call, in the process that makes it."""

    def __init__(
        self,
        kind: Literal["clips", "images"],
        size: int,
        batch: int,
        order: tuple[int, int, int] = (0, 1, 2),
        device: Literal["cpu", "gpu"] = "cpu",
    ):
        self.kind: Literal["clips", "images"] = kind
        self.size, self.batch, self.order = size, batch, order
        self.device: Literal["cpu", "gpu"] = device
        self._pipeline: Any = None

    def __call__(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, np.ndarray] | BadFile]:
        """For each job pixels ([T,] S, S, 3) and token_pixels ([T,] s, s, 3), uint8, or what is wrong with its file."""
        try:
            return list(self._run(jobs))
        except RuntimeError as error:
            self._pipeline = None  # DALI: "current pipeline object is no longer valid"
            if len(jobs) == 1:
                return [BadFile("corrupt", jobs[0].path, _reason(error))]
        return [view for job in jobs for view in self([job])]

    def _run(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self._pipeline is None:
            self._pipeline = build(self.kind, self.size, self.batch, self.device)
        for name, values in self._inputs(jobs).items():
            self._pipeline.feed_input(name, values)
        (output,) = self._pipeline.run()
        pixels = [np.array(output.as_cpu().at(i)) for i in range(len(jobs))]
        half = self.size // 2
        if self.kind == "images":
            return [(picture, token_view(picture, half)) for picture in pixels]
        return [(clip, np.stack([token_view(frame, half) for frame in clip])) for clip in pixels]

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, list[np.ndarray]]:
        inputs = {
            "encoded": [np.fromfile(job.path, np.uint8) for job in jobs],
            "rescale": [np.array((job.crop.height, job.crop.width), np.float32) for job in jobs],
            "corner": [np.array((job.crop.top, job.crop.left), np.int32) for job in jobs],
            "flip": [np.array(job.crop.flip, np.int32) for job in jobs],
        }
        if self.kind == "clips":
            return inputs | {"frames": [np.array(job.frames, np.int32) for job in jobs]}
        colours = [colour_matrices(job.crop.jitter, self.order) for job in jobs]
        return inputs | {"colour": [colour for colour, _ in colours], "pivot": [pivot for _, pivot in colours]}


def colour_matrices(
    factors: tuple[float, float, float] | None, order: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The jitter of SPEC 5.3 as (A, K), both (3, 3) float32: pixel -> A pixel + K (mean colour of the picture)."""
    colour, pivot = np.eye(3), np.zeros((3, 3))
    grey = np.tile(GREY.astype(np.float64), (3, 1))  # takes a colour to (grey, grey, grey)
    for step in order if factors else ():
        factor = factors[step] if factors else 1.0
        if step == 0:
            colour, pivot = factor * colour, factor * pivot
        elif step == 1:
            colour, pivot = factor * colour, (1 - factor) * grey @ colour
        else:
            saturation = factor * np.eye(3) + (1 - factor) * grey
            colour, pivot = saturation @ colour, saturation @ pivot
    return colour.astype(np.float32), pivot.astype(np.float32)


def build(kind: Literal["clips", "images"], size: int, batch: int, device: Literal["cpu", "gpu"] = "cpu") -> Any:
    """The DALI pipeline of one stream, built. Inputs by name, at most `batch` samples each:

    encoded (n,) uint8; rescale (height, width) float32; corner (top, left) int32; flip () int32; for clips frames (T,)
    int32; for images colour and pivot (3, 3) float32 of `colour_matrices`. Output: uint8, (T, S, S, 3) or (S, S, 3).
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # its operators are made at run time, so it has no types to check
    fn, types = dali.fn, dali.types

    def given(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)

    decoding: Any = "mixed" if device == "gpu" else "cpu"
    # depth 1: a batch is fed and fetched, so nothing is lost when the pipeline dies
    pipeline = dali.Pipeline(batch, num_threads=1, device_id=0 if device == "gpu" else None, prefetch_queue_depth=1)
    with pipeline:
        encoded = given("encoded", types.UINT8, 1)
        if kind == "clips":
            pictures = fn.decoders.video(encoded, device=decoding, frames=given("frames", types.INT32, 1))
        else:
            pictures = fn.decoders.image(encoded, device=decoding, output_type=types.RGB, adjust_orientation=False)
        pictures = fn.resize(
            pictures, size=given("rescale", types.FLOAT, 1), interp_type=types.INTERP_CUBIC, antialias=False
        )
        crops = fn.slice(pictures, start=given("corner", types.INT32, 1), shape=[size, size], axis_names="HW")
        if kind == "images":
            mean = fn.reductions.mean(pictures, axes=[0, 1], keep_dims=True)  # (1, 1, 3)
            offset = fn.coord_transform(mean, M=given("pivot", types.FLOAT, 2))
            jittered = fn.coord_transform(fn.cast(crops, dtype=types.FLOAT), M=given("colour", types.FLOAT, 2)) + offset
            # cut off, because the cast would round
            crops = fn.cast(dali.math.floor(dali.math.clamp(jittered, 0.0, 255.0)), dtype=types.UINT8)
            crops = fn.reshape(crops, layout="HWC")
        pipeline.set_outputs(fn.flip(crops, horizontal=given("flip", types.INT32, 0)))
    pipeline.build()
    return pipeline


def _reason(error: RuntimeError) -> str:
    """What a DALI error says happened, without where in DALI."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0].split("Current pipeline object")[0]
    return " ".join(text.split())[:200]
