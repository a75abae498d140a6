"""The same views as `pipeline_reference.py`, with NVIDIA DALI. The only file that imports it.

On a CPU DALI decodes and the reference cuts the views (`DaliViews`); on a GPU the graph does all of it (`DaliCrops`).
Frames, crops and JPEGs are those of `decode.py`; clips have colours of their own, because DALI interpolates colour
between blocks of 2 x 2 pixels where FFmpeg repeats it, and the graph another bicubic kernel (a = -0.5, OpenCV -0.75).
A damaged file ends a pipeline: it is built anew and the batch goes through it one by one. What DALI refuses is asked of
PyAV, whoever reads it: the file alone decides whose pixels a sample has, and damage outside a clip replaces nothing.
"""

import ctypes
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bevt_fast.data.containers import Probe
from bevt_fast.data.faults import BadFile, read_bytes
from bevt_fast.data.packed import File
from bevt_fast.data.pipeline_reference import GREY, clip_pixels, image_pixels
from bevt_fast.data.sampling import Crop
from bevt_fast.errors import MachineError

CPU_CODECS = {"vp8", "vp9", "mjpeg"}  # all that DALI 2.4 decodes without a GPU; H.264 and the rest go through PyAV
GPU_CODECS = {"h264", "hevc", "vp8", "vp9"}  # what the NVDEC of every GPU since 2017 decodes, and DALI asks of it
SMALLEST_ON_GPU = 144  # pixels a side; NVDEC refuses smaller HEVC pictures
LARGEST_FILE = 2**26  # bytes; a longer file would travel whole to the GPU for the sake of one clip
MAX_REBUILDS = 1000  # of a stream's decoding pipeline; two for each clip that DALI refuses
MAX_REFUSED = 50  # files in a row; then it is not the files

Kind = Literal["clips", "images"]
CPU = torch.device("cpu")


class Job(NamedTuple):
    """One sample to read: its file, frames (positions in the file, `phases.stored`; None for an image) and crop."""

    path: File
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
    """Whether DALI reads such a file without a GPU: a codec it has there, and no rotation to apply."""
    return found.rotation == 0 and (found.codec in CPU_CODECS or found.codec == "JPEG")


def takes_on_gpu(found: Probe) -> bool:
    """Whether DALI decodes such a file on a GPU: 8 bits 4:2:0 of a codec NVDEC has, or a JPEG that is not CMYK."""
    if found.codec == "JPEG":
        return found.pixel_format in ("RGB", "L")
    fits = found.codec in GPU_CODECS and found.pixel_format == "yuv420p" and found.rotation == 0
    return fits and min(found.height, found.width) >= SMALLEST_ON_GPU


def lacking(device: torch.device) -> str | None:
    """Why DALI cannot decode on `device`, and what to do about it; None where it can. Does not import DALI."""
    try:
        require()
    except MachineError as error:
        return str(error)
    if device.type == "cuda":
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError:
            return (
                'data.decoder is "dali", and the driver\'s video decoder (libnvcuvid.so.1) is not there: start the '
                "container with NVIDIA_DRIVER_CAPABILITIES=compute,video,utility"
            )
    return None


class DaliViews:
    """Reads batches of jobs of one stream without a GPU: DALI decodes, the reference cuts the crops.

    The pipeline is built by the first call, in the process that makes it.
    """

    def __init__(self, kind: Kind, batch: int, order: tuple[int, int, int] = (0, 1, 2)):
        self.kind: Kind = kind
        self.batch, self.order = batch, order
        self._pipeline: Any = None

    def __call__(self, jobs: Sequence[Job]) -> list[np.ndarray | BadFile]:
        """For each job pixels ([T,] S, S, 3) uint8, or what is wrong with its file."""
        try:
            pictures = self._run(jobs)
        except (RuntimeError, OSError) as error:  # the latter: the storage, between the header and now
            self._pipeline = None  # DALI: "current pipeline object is no longer valid"
            if len(jobs) == 1:
                return [BadFile("corrupt", jobs[0].path, _reason(error))]
            return [pixels for job in jobs for pixels in self([job])]
        if self.kind == "images":
            return [image_pixels(picture, job.crop, self.order) for picture, job in zip(pictures, jobs)]
        return [clip_pixels(picture, job.crop) for picture, job in zip(pictures, jobs)]

    def inputs(self, job: Job) -> dict[str, np.ndarray]:
        """What `DaliCrops` is to be given to read `job`."""
        return {k: v for k, (v,) in self._inputs([job]).items()} | view_inputs(self.kind, job.crop, self.order)

    def _run(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        if self._pipeline is None:
            self._pipeline = build(self.kind, self.batch)
        for name, values in self._inputs(jobs).items():
            self._pipeline.feed_input(name, values)
        (output,) = self._pipeline.run()
        return [np.array(output.at(i)) for i in range(len(jobs))]

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, list[np.ndarray]]:
        # a bytearray: what torch is to share must be writable
        encoded: list[np.ndarray] = [np.frombuffer(bytearray(read_bytes(job.path)), np.uint8) for job in jobs]
        frames = [np.array(job.frames, np.int32) for job in jobs if job.frames is not None]
        return {"encoded": encoded, "frames": frames} if frames else {"encoded": encoded}


class DaliCrops:
    """Cuts the crops of one stream in DALI's graph: decoding, rescaling, jitter, crop and flip, all on `device`.

    Two pipelines with one graph behind their first node: one decodes, the other is given decoded pictures, so what
    DALI does not decode is cut like the rest, and a damaged file ends the first pipeline only.
    """

    def __init__(self, kind: Kind, size: int, batch: int, device: torch.device, threads: int = 1):
        self.kind: Kind = kind
        self.size, self.batch, self.device, self.threads = size, batch, device, threads
        self.rebuilds = self._refused = 0
        self._pipelines: dict[str, Any] = {}

    def __call__(self, samples: Sequence[Mapping[str, np.ndarray]]) -> list[Tensor | str]:
        """For each sample its crop ([T,] S, S, 3) uint8 on the device, or the reason why DALI does not decode it.

        A sample has the inputs of `build` by name: `encoded`, or `pictures` instead.
        """
        crops: dict[int, Tensor | str] = {}
        for first in ("encoded", "pictures"):
            part = [k for k, sample in enumerate(samples) if first in sample]
            crops |= zip(part, self._cut(first, [samples[k] for k in part])) if part else ()
        return [crops[k] for k in range(len(samples))]

    def _cut(self, first: str, samples: Sequence[Mapping[str, np.ndarray]]) -> Sequence[Tensor | str]:
        try:
            crops = self._run(first, samples).unbind()
            self._refused = 0 if first == "encoded" else self._refused
            return crops
        except RuntimeError as error:
            if first == "pictures":  # nothing is decoded here: it is not a file's fault
                raise
            del self._pipelines[first]  # DALI: "current pipeline object is no longer valid"
            self.rebuilds += 1
            self._refused += len(samples) == 1
            if self.rebuilds > MAX_REBUILDS or self._refused > MAX_REFUSED:
                raise MachineError(
                    f"{self.kind}: DALI refused {self._refused} files in a row and was rebuilt {self.rebuilds} times, "
                    f'the last time for: {_reason(error)}; set data.decoder to "pyav", or remove damaged files'
                ) from None
            if len(samples) == 1:
                return [_reason(error)]
        return [crop for sample in samples for crop in self._cut(first, [sample])]

    def _run(self, first: str, samples: Sequence[Mapping[str, np.ndarray]]) -> Tensor:
        if first not in self._pipelines:
            self._pipelines[first] = build(self.kind, self.batch, self.size, self.device, self.threads, first)
        pipeline = self._pipelines[first]
        for name in samples[0]:
            pipeline.feed_input(name, [sample[name] for sample in samples])
        (output,) = pipeline.run()  # without a stream the result is there when this returns
        return torch.from_dlpack(output.as_tensor())  # no copy; DALI keeps the memory as long as the tensor lives


def view_inputs(kind: Kind, crop: Crop, order: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A crop as the graph wants it."""
    inputs = {
        "rescale": np.array((crop.height, crop.width), np.float32),
        "corner": np.array((crop.top, crop.left), np.int32),
        "flip": np.array(crop.flip, np.int32),
    }
    if kind == "images":
        inputs["colour"], inputs["pivot"] = colour_matrices(crop.jitter, order)
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


def build(
    kind: Kind,
    batch: int,
    size: int | None = None,
    device: torch.device = CPU,
    threads: int = 1,
    first: str = "encoded",
) -> Any:
    """The DALI pipeline of one stream, built: decoding, and the crops of side `size` unless it is None.

    Inputs by name, at most `batch` samples each: encoded (n,) uint8 and for clips frames (T,) int32, or, where `first`
    says so, pictures ([T,] H, W, 3) uint8. For crops rescale (height, width) float32, corner (top, left) int32, flip ()
    int32; for those of images colour and pivot (3, 3) float32 of `colour_matrices`. Output: uint8, channels last.
    """
    import nvidia.dali

    dali: Any = nvidia.dali  # its operators are made at run time, so it has no types to check
    on_gpu = device.type == "cuda"
    # depth 1: a batch is fed and fetched, so nothing is lost when the pipeline dies
    pipeline = dali.Pipeline(
        batch, num_threads=threads, device_id=(device.index or 0) if on_gpu else None, prefetch_queue_depth=1
    )
    with pipeline:
        pictures = (_decoded if first == "encoded" else _as_given)(kind, on_gpu)
        pipeline.set_outputs(pictures if size is None else _cut(pictures, kind, size))
    pipeline.build()
    return pipeline


def _decoded(kind: Kind, on_gpu: bool) -> Any:
    import nvidia.dali

    dali: Any = nvidia.dali
    fn, types = dali.fn, dali.types
    encoded, device = _given("encoded", types.UINT8, 1), "mixed" if on_gpu else "cpu"
    if kind == "clips":
        return fn.decoders.video(encoded, device=device, frames=_given("frames", types.INT32, 1))
    return fn.decoders.image(
        encoded,
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # the GPU's chroma as the CPU's
    )


def _as_given(kind: Kind, on_gpu: bool) -> Any:
    import nvidia.dali

    types: Any = nvidia.dali.types
    layout = "FHWC" if kind == "clips" else "HWC"
    pictures = _given("pictures", types.UINT8, len(layout), layout)
    return pictures.gpu() if on_gpu else pictures


def _cut(pictures: Any, kind: Kind, size: int) -> Any:
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


def _given(name: str, dtype: Any, ndim: int, layout: str | None = None) -> Any:
    from nvidia.dali import fn

    source: Any = fn.external_source
    return source(name=name, dtype=dtype, ndim=ndim, layout=layout, batch=True)


def _reason(error: Exception) -> str:
    """What a DALI error says happened, without where in DALI."""
    text = str(error).split("encountered:")[-1].split("C++ context")[0].split("Current pipeline object")[0]
    return " ".join(text.split())[:200]
