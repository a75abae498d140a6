"""The same views as `pipeline_reference.py`, with NVIDIA DALI. The only file that imports it.

DALI decodes to the same bits as `decode.py`. On a CPU the reference cuts the views from what it decodes, which is
faster and makes the choice of decoder change no batch; on a GPU the graph does all of it. What is random reaches the
graph as numbers, so DALI draws nothing itself. Its bicubic kernel is another (a = -0.5, OpenCV has -0.75), so what the
graph rescales differs by half a grey level on average. A damaged file ends a pipeline: it is built anew and the batch
goes through it one by one. What DALI refuses, `reader.py` asks of PyAV: damage outside a clip replaces nothing.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bevt_fast.data.decode import BadFile, Probe
from bevt_fast.data.pipeline_reference import GREY, clip_views, image_views, token_view
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
        in_graph: bool | None = None,
    ):
        """`in_graph`: whether DALI rescales, jitters, crops and flips too; None: on a GPU."""
        self.kind: Literal["clips", "images"] = kind
        self.size, self.batch, self.order = size, batch, order
        self.device: Literal["cpu", "gpu"] = device
        self.in_graph = device == "gpu" if in_graph is None else in_graph
        self._pipeline: Any = None

    def __call__(self, jobs: Sequence[Job]) -> list[tuple[np.ndarray, np.ndarray] | BadFile]:
        """For each job pixels ([T,] S, S, 3) and token_pixels ([T,] s, s, 3), uint8, or what is wrong with its file."""
        try:
            pictures = self._run(jobs)
        except (RuntimeError, OSError) as error:  # the latter: the storage, between the header and now
            self._pipeline = None  # DALI: "current pipeline object is no longer valid"
            if len(jobs) == 1:
                return [BadFile("corrupt", jobs[0].path, _reason(error))]
            return [view for job in jobs for view in self([job])]
        return [self._views(picture, job.crop) for picture, job in zip(pictures, jobs)]

    def _run(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        if self._pipeline is None:
            self._pipeline = build(self.kind, self.batch, self.size if self.in_graph else None, self.device)
        for name, values in self._inputs(jobs).items():
            self._pipeline.feed_input(name, values)
        (output,) = self._pipeline.run()
        return [np.array(output.as_cpu().at(i)) for i in range(len(jobs))]

    def _views(self, picture: np.ndarray, crop: Crop) -> tuple[np.ndarray, np.ndarray]:
        half = self.size // 2
        if self.kind == "images":
            return (
                (picture, token_view(picture, half)) if self.in_graph else image_views(picture, crop, half, self.order)
            )
        if self.in_graph:
            return picture, np.stack([token_view(frame, half) for frame in picture])
        return clip_views(picture, crop, half)

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, list[np.ndarray]]:
        inputs: dict[str, list[np.ndarray]] = {"encoded": [np.fromfile(job.path, np.uint8) for job in jobs]}
        if self.kind == "clips":
            inputs["frames"] = [np.array(job.frames, np.int32) for job in jobs]
        if not self.in_graph:
            return inputs
        inputs |= {
            "rescale": [np.array((job.crop.height, job.crop.width), np.float32) for job in jobs],
            "corner": [np.array((job.crop.top, job.crop.left), np.int32) for job in jobs],
            "flip": [np.array(job.crop.flip, np.int32) for job in jobs],
        }
        if self.kind == "images":
            colours = [colour_matrices(job.crop.jitter, self.order) for job in jobs]
            inputs |= {"colour": [colour for colour, _ in colours], "pivot": [pivot for _, pivot in colours]}
        return inputs


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


def build(kind: Literal["clips", "images"], batch: int, size: int | None, device: Literal["cpu", "gpu"] = "cpu") -> Any:
    """The DALI pipeline of one stream, built: decoding, and the views of side `size` unless it is None.

    Inputs by name, at most `batch` samples each: encoded (n,) uint8; for clips frames (T,) int32. For views rescale
    (height, width) float32, corner (top, left) int32, flip () int32; for those of images colour and pivot (3, 3)
    float32 of `colour_matrices`. Output: uint8, (T, H, W, 3) or (H, W, 3).
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # its operators are made at run time, so it has no types to check
    fn, types = dali.fn, dali.types
    decoding: Any = "mixed" if device == "gpu" else "cpu"
    # depth 1: a batch is fed and fetched, so nothing is lost when the pipeline dies
    pipeline = dali.Pipeline(batch, num_threads=1, device_id=0 if device == "gpu" else None, prefetch_queue_depth=1)
    with pipeline:
        encoded = _given("encoded", types.UINT8, 1)
        if kind == "clips":
            pictures = fn.decoders.video(encoded, device=decoding, frames=_given("frames", types.INT32, 1))
        else:
            pictures = fn.decoders.image(encoded, device=decoding, output_type=types.RGB, adjust_orientation=False)
        pipeline.set_outputs(pictures if size is None else _cut(pictures, kind, size))
    pipeline.build()
    return pipeline


def _cut(pictures: Any, kind: str, size: int) -> Any:
    """The graph from decoded pictures to crops, after `pipeline_reference.clip_views` and `image_views`."""
    import nvidia.dali

    dali: Any = nvidia.dali
    fn, types = dali.fn, dali.types
    rescale = _given("rescale", types.FLOAT, 1)
    pictures = fn.resize(pictures, size=rescale, interp_type=types.INTERP_CUBIC, antialias=False)
    crops = fn.slice(pictures, start=_given("corner", types.INT32, 1), shape=[size, size], axis_names="HW")
    if kind == "images":
        mean = fn.reductions.mean(pictures, axes=[0, 1], keep_dims=True)  # (1, 1, 3)
        offset = fn.coord_transform(mean, M=_given("pivot", types.FLOAT, 2))
        jittered = fn.coord_transform(fn.cast(crops, dtype=types.FLOAT), M=_given("colour", types.FLOAT, 2)) + offset
        # cut off, because the cast would round
        crops = fn.cast(dali.math.floor(dali.math.clamp(jittered, 0.0, 255.0)), dtype=types.UINT8)
        crops = fn.reshape(crops, layout="HWC")
    return fn.flip(crops, horizontal=_given("flip", types.INT32, 0))


def _given(name: str, dtype: Any, ndim: int) -> Any:
    from nvidia.dali import fn

    source: Any = fn.external_source
    return source(name=name, dtype=dtype, ndim=ndim, batch=True)


def _reason(error: Exception) -> str:
    """What a DALI error says happened, without where in DALI."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0].split("Current pipeline object")[0]
    return " ".join(text.split())[:200]
