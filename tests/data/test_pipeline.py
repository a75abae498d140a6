"""The views of SPEC 3.2 and 5.3: the reference beside OpenCV and formulas written out, DALI beside the reference."""

import importlib.util
import itertools

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from bevt_fast.data import pipeline, pipeline_reference
from bevt_fast.data.decode import BadFile, Probe, probe, probe_image, read_frames, read_image
from bevt_fast.data.pipeline import DaliCrops, DaliViews, Job
from bevt_fast.data.sampling import Crop
from bevt_fast.errors import MachineError
from tests.data import media

ORDERS = list(itertools.permutations((0, 1, 2)))
CROPS = [
    Crop(96, 144, 0, 0, 64, False, None),
    Crop(96, 144, 32, 80, 64, True, None),
    Crop(96, 144, 7, 33, 64, True, None),
]
RESCALED = [crop._replace(height=height, width=height * 3 // 2) for crop, height in zip(CROPS, (96, 144, 120))]
FACTORS = [(1.4, 1.3, 0.6), (0.6, 0.7, 1.4), (1.1, 0.9, 1.4)]


def noise(*shape):
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def smooth(height=96, width=144):
    return cv2.resize(noise(12, 18, 3), (width, height), interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("flip", [False, True])
def test_clip_views_are_opencv_step_by_step(flip):
    frames = noise(3, 50, 70, 3)
    crop = Crop(80, 112, 9, 21, 64, flip, None)
    pixels, token_pixels = pipeline_reference.clip_views(frames, crop, 32)
    for frame, picture, tokens in zip(frames, pixels, token_pixels):
        expected = cv2.resize(frame, (112, 80), interpolation=cv2.INTER_CUBIC)[9 : 9 + 64, 21 : 21 + 64]
        expected = cv2.flip(expected, 1) if flip else expected
        np.testing.assert_array_equal(picture, expected)
        np.testing.assert_array_equal(tokens, cv2.resize(expected, (32, 32), interpolation=cv2.INTER_LANCZOS4))


def jittered(picture, factors, order):
    """SPEC 5.3 pixel by pixel in float64, straight from its sentence."""
    values = picture.astype(np.float64)
    for step in order:
        grey = 0.2989 * values[..., 0] + 0.587 * values[..., 1] + 0.114 * values[..., 2]
        pivot = [0.0, grey.mean(), grey[..., None]][step]
        values = pivot + factors[step] * (values - pivot)
    return values


@pytest.mark.parametrize("size", [64, 48, 224])
def test_token_views_are_opencvs_lanczos_of_the_hardest_pictures(size):
    for picture in (noise(size, size, 3), noise(size, size, 3) // 128 * 255, np.full((size, size, 3), 255, np.uint8)):
        expected = cv2.resize(picture, (size // 2, size // 2), interpolation=cv2.INTER_LANCZOS4)
        np.testing.assert_array_equal(pipeline_reference.token_view(picture, size // 2), expected)


def test_looked_up_numbers_are_those_of_the_formula():
    """A CPU looks each byte up, another device computes; both have the bits of the same float32 operations."""
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 2, 8, 16, 3)
    mean, std = (torch.tensor(values) for values in (pipeline_reference.MEAN, pipeline_reference.STD))
    expected = pixels.float().sub(mean).div(std).movedim(-1, 1)
    found = pipeline_reference.normalise(pixels, channels=-4)
    assert torch.equal(found, expected) and found.is_contiguous()
    expected = pixels.float().div(255).mul(0.8).add(0.1).movedim(-1, -3)
    assert torch.equal(pipeline_reference.map_pixels(pixels), expected)
    assert pipeline_reference.normalise(pixels[:0]).shape == (0, 2, 3, 8, 16)


@pytest.mark.parametrize("order", ORDERS)
def test_a_window_is_jittered_as_the_whole_picture(order):
    picture, window = smooth(), (slice(7, 71), slice(33, 97))
    whole = pipeline_reference.jitter(picture, FACTORS[0], order)[window].astype(int)
    levels = abs(pipeline_reference.jitter(picture, FACTORS[0], order, window) - whole)
    # the last bit of a float32 may stand on the other side of a whole level
    assert levels.max() <= 1 and (levels > 0).mean() < 1e-3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("factors", FACTORS)
def test_jitter_is_the_formula_cut_to_whole_grey_levels(order, factors):
    picture = noise(40, 60, 3)
    exact = jittered(picture, factors, order)
    found = pipeline_reference.jitter(picture, factors, order).astype(int)
    # float32 may stand on the other side of a whole number, and only there
    below, above = (np.clip(exact + d, 0, 255).astype(int) for d in (-1e-3, 1e-3))
    assert ((found == below) | (found == above)).all()


def test_jitter_by_factors_of_one_changes_nothing():
    picture = noise(40, 60, 3)
    np.testing.assert_array_equal(pipeline_reference.jitter(picture, (1.0, 1.0, 1.0), (0, 1, 2)), picture)


def test_an_image_is_jittered_between_rescaling_and_crop():
    image = noise(50, 70, 3)
    crop = Crop(80, 112, 9, 21, 64, True, FACTORS[0])
    pixels, token_pixels = pipeline_reference.image_views(image, crop, 32, (2, 0, 1))
    rescaled = cv2.resize(image, (112, 80), interpolation=cv2.INTER_CUBIC)
    expected = pipeline_reference.jitter(rescaled, FACTORS[0], (2, 0, 1))[9:73, 21:85][:, ::-1]
    np.testing.assert_array_equal(pixels, expected)
    np.testing.assert_array_equal(token_pixels, cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_LANCZOS4))


@pytest.mark.parametrize("shape", [(96, 96, 3), (2, 3, 32, 64, 3), (1, 16, 16, 3)])
def test_half_token_view_has_opencvs_bits(shape):
    extremes = noise(*shape) // 128 * 255
    for pictures in (noise(*shape), extremes, np.full(shape, 255, np.uint8)):
        flat = pictures.reshape(-1, *shape[-3:])
        size = (shape[-2] // 2, shape[-3] // 2)
        expected = np.stack([cv2.resize(picture, size, interpolation=cv2.INTER_LANCZOS4) for picture in flat])
        found = pipeline_reference.half_token_view(torch.from_numpy(pictures))
        np.testing.assert_array_equal(found.numpy().reshape(expected.shape), expected)


def test_normalise_and_map_pixels():
    pictures = noise(2, 3, 8, 10, 3)
    channels_first = np.moveaxis(pictures.astype(np.float64), -1, -3)
    mean, deviation = (np.array(v).reshape(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    found = pipeline_reference.normalise(torch.from_numpy(pictures))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (channels_first - mean) / deviation, rtol=1e-6, atol=1e-6)
    mapped = pipeline_reference.map_pixels(torch.from_numpy(pictures))
    dall_e = pytest.importorskip("dall_e", reason="the oracle of map_pixels is the DALL-E package")
    expected = dall_e.map_pixels(torch.from_numpy(channels_first / 255).float().flatten(0, 1)).unflatten(0, (2, 3))
    np.testing.assert_allclose(mapped.numpy(), expected.numpy(), rtol=0, atol=float(np.finfo(np.float32).eps))


def test_without_dali_the_sentence_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install nvidia-dali"):
        pipeline.require()


def test_dali_takes_what_it_decodes_without_a_gpu():
    found = Probe(16, 96, 96, "vp9", "yuv420p", 0)
    assert pipeline.takes(found) and pipeline.takes(found._replace(codec="JPEG"))
    assert not pipeline.takes(found._replace(rotation=90))
    assert not any(pipeline.takes(found._replace(codec=codec)) for codec in ("h264", "mpeg4", "images", "PNG"))


needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed",
)
IRREGULAR = np.cumsum(np.random.RandomState(0).randint(10, 90, 40))
DALI_VIDEOS = {
    "vp9.webm": {"codec": "libvpx-vp9"},
    "irregular.webm": {"codec": "libvpx-vp9", "times": IRREGULAR},
    "vp8.webm": {"codec": "libvpx"},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj420p"},
}


def cut_in_graph(kind, jobs, order=(0, 1, 2)):
    """The crops that the graph of a GPU cuts, by the same host code with DALI's CPU operators, as arrays."""
    views = DaliViews(kind, len(jobs), order)
    crops = DaliCrops(kind, 64, len(jobs), torch.device("cpu"))([views.inputs(job) for job in jobs])
    return [crop if isinstance(crop, str) else crop.numpy() for crop in crops]


@needs_dali
@pytest.mark.parametrize("name", DALI_VIDEOS)
def test_dali_gives_the_same_frames_and_crops(name, tmp_path):
    """Of any file it takes: those of PyAV, in colours of its own; so does the graph, where it does not itself rescale.

    The graph's crops are the very bits of DALI's decoder, cut by the reference.
    """
    path = media.video(tmp_path / name, size=(96, 144), **DALI_VIDEOS[name])
    assert pipeline.takes(probe(path))
    draws = [[5, 30, 7, 39], [38, 1, 4, 7], [3, 3, 0, 3]]  # any order, looped, repeated
    jobs = [[Job(path, *draw) for draw in zip(draws, crops)] for crops in (RESCALED, CROPS)]
    cut = [DaliViews("clips", 3)(jobs[0]), cut_in_graph("clips", jobs[1])]
    for job, found in zip(itertools.chain(*jobs), itertools.chain(*cut)):
        assert isinstance(found, np.ndarray) and job.frames
        expected = pipeline_reference.clip_pixels(read_frames(path, job.frames), job.crop)
        media.assert_same_but_for_chroma(found, expected, rescaled=job.crop.height != 96)
    for found, again in zip(DaliViews("clips", 3)(jobs[1]), cut[1]):
        np.testing.assert_array_equal(found, again)


@needs_dali
def test_dali_counts_the_frames_an_edit_list_leaves(tmp_path):
    """As PyAV does: a clip that was cut without encoding it anew holds frames before its beginning."""
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as output:
        stream = output.add_stream("libvpx-vp9", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 144, "yuv420p"
        frames = [av.VideoFrame.from_ndarray(media.picture(k, 96, 144), format="rgb24") for k in range(40)]
        for packet in [packet for frame in (*frames, None) for packet in stream.encode(frame)]:
            packet.pts, packet.dts = (packet.pts or 0) - 10, (packet.dts or 0) - 10
            output.mux(packet)
    assert probe(path).frames == 30 and pipeline.takes(probe(path))
    (found,) = cut_in_graph("clips", [Job(path, [0, 5, 20], CROPS[0])])
    expected = read_frames(path, [0, 5, 20])
    assert [media.number(frame) for frame in expected] == [10, 15, 30]
    media.assert_same_but_for_chroma(found, pipeline_reference.clip_pixels(expected, CROPS[0]), rescaled=False)


@needs_dali
@pytest.mark.parametrize("order", ORDERS)
def test_dali_jitters_as_the_reference(order, tmp_path):
    path = tmp_path / "image.jpg"
    Image.fromarray(smooth()).save(path, quality=90)
    assert pipeline.takes(probe_image(path))
    crops = [crop._replace(jitter=factors) for crop, factors in zip(CROPS, FACTORS)]
    views = cut_in_graph("images", [Job(path, None, crop) for crop in (*crops, CROPS[0])], order)
    rescaled = read_image(path)
    for crop, found in zip(crops, views):
        assert isinstance(found, np.ndarray)
        window = jittered(rescaled, crop.jitter, order)[crop.top : crop.top + 64, crop.left : crop.left + 64]
        exact = window[:, ::-1] if crop.flip else window
        below, above = (np.clip(exact + d, 0, 255).astype(int) for d in (-1e-3, 1e-3))
        assert ((found == below) | (found == above)).all()
    # and an image without jitter has the same bits
    np.testing.assert_array_equal(views[3], rescaled[:64, :64])


@needs_dali
def test_the_graph_cuts_pictures_that_were_decoded_elsewhere_like_its_own(tmp_path):
    """One batch of decoded and given samples, of several sizes; and a picture smaller than another's crop box."""
    path = media.video(tmp_path / "a.webm", "libvpx-vp9", size=(96, 144))
    other = media.video(tmp_path / "b.mp4", "libx264", size=(64, 98))
    boxes = [RESCALED[1], RESCALED[2], Crop(72, 110, 3, 40, 64, True, None)]
    draws = [(path, [3, 9]), (path, [3, 9]), (other, [0, 7])]
    views, samples = DaliViews("clips", 3), []
    for number, ((file, frames), crop) in enumerate(zip(draws, boxes)):
        sample = views.inputs(Job(file, frames, crop))
        if number:  # the second and third are handed over as pictures
            sample = {k: v for k, v in sample.items() if k not in ("encoded", "frames")}
            sample["pictures"] = views._run([Job(path, frames, crop)])[0] if file == path else read_frames(file, frames)
        samples.append(sample)
    samples[1] |= {k: samples[0][k] for k in ("rescale", "corner", "flip")}
    first, second, third = DaliCrops("clips", 64, 3, torch.device("cpu"))(samples)
    assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor) and isinstance(third, torch.Tensor)
    assert torch.equal(first, second)
    pictures = read_frames(other, [0, 7])
    exact = bicubic(pictures[1], 72, 110, -0.5)[3:67, 40:104][:, ::-1]
    assert abs(third[1].numpy() - exact).max() <= 1


def bicubic(image, height, width, a):
    """Cubic convolution (Keys 1981) with the free parameter `a`, no antialiasing, edges repeated; exact, as float64."""

    def kernel(x):
        x = np.abs(x)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        return np.where(x <= 1, near, np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0))

    def weights(new, old):
        matrix, centres = np.zeros((new, old)), (np.arange(new) + 0.5) * old / new - 0.5
        for tap in range(-1, 3):
            places = np.floor(centres).astype(int) + tap
            np.add.at(matrix, (np.arange(new), places.clip(0, old - 1)), kernel(centres - places))
        return matrix

    rows, columns = weights(height, image.shape[0]), weights(width, image.shape[1])
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns, optimize=True).clip(0, 255)


@needs_dali
def test_dali_decodes_jpegs_to_the_same_bits(tmp_path):
    jobs, expected = [], []
    for k, (mode, options) in enumerate([("RGB", {}), ("RGB", {"subsampling": 0, "progressive": True}), ("L", {})]):
        path = tmp_path / f"{k}.jpg"
        Image.fromarray(smooth()).convert(mode).save(path, quality=80, **options)
        jobs.append(Job(path, None, RESCALED[k]._replace(jitter=FACTORS[k])))
        expected.append(pipeline_reference.image_views(read_image(path), jobs[-1].crop, 32, (2, 1, 0)))
    for found, views in zip(DaliViews("images", 3, (2, 1, 0))(jobs), expected):
        assert not isinstance(found, BadFile)
        np.testing.assert_array_equal(found, views[0])


@needs_dali
@pytest.mark.parametrize("height, width", [(112, 168), (80, 120)])
def test_dali_rescales_with_another_bicubic_kernel(height, width, tmp_path):
    """Why rescaled pixels of the two differ: both leave out antialiasing, OpenCV has a = -0.75 and DALI a = -0.5."""
    path = tmp_path / "image.jpg"
    Image.fromarray(noise(96, 144, 3)).save(path, quality=95)
    image, crop = read_image(path), Crop(height, width, 9, 20, 64, False, None)
    (found,) = cut_in_graph("images", [Job(path, None, crop)])
    opencvs, dalis = (bicubic(image, height, width, a)[9:73, 20:84] for a in (-0.75, -0.5))
    ours, _ = pipeline_reference.image_views(image, crop, 32)
    # one grey level: OpenCV's weights are in 1/2048, and DALI rounds between its two passes
    assert abs(ours - opencvs).max() <= 1 and abs(found - dalis).max() <= 1
    assert abs(opencvs - dalis).max() > 2


@needs_dali
def test_dali_finds_the_damaged_files_of_a_batch_and_reads_the_others(tmp_path):
    good = media.video(tmp_path / "good.webm", "libvpx-vp9", size=(96, 144))
    content = good.read_bytes()
    bad = [tmp_path / name for name in ("cut.webm", "empty.webm", "noise.webm")]
    for path, damaged in zip(bad, (content[:400], b"", noise(3000).tobytes())):
        path.write_bytes(damaged)
    views = DaliViews("clips", batch=5)
    jobs = [Job(path, [0, 3], CROPS[0]) for path in (bad[0], good, bad[1], bad[2], good)]
    for _ in range(2):
        found = views(jobs)
        faults = [view for view in found if isinstance(view, BadFile)]
        assert [isinstance(view, BadFile) for view in found] == [True, False, True, True, False]
        assert [fault.path for fault in faults] == [str(path) for path in bad]
        assert all(fault.kind == "corrupt" and fault.reason for fault in faults)
    (alone,), last = views([jobs[1]]), views(jobs)[4]
    assert not isinstance(alone, BadFile) and not isinstance(last, BadFile)
    np.testing.assert_array_equal(alone, last)


@needs_dali
def test_the_graph_names_the_damaged_samples_of_a_batch_and_cuts_the_others(tmp_path, monkeypatch):
    good = media.video(tmp_path / "good.webm", "libvpx-vp9", size=(96, 144))
    bad = tmp_path / "cut.webm"
    bad.write_bytes(good.read_bytes()[:400])
    views, graph = DaliViews("clips", 3), DaliCrops("clips", 64, 3, torch.device("cpu"))
    samples = [views.inputs(Job(path, [0, 3], CROPS[0])) for path in (good, bad, good)]
    for times in (1, 2):
        first, reason, third = graph(samples)
        assert isinstance(reason, str) and reason
        assert isinstance(first, torch.Tensor) and isinstance(third, torch.Tensor) and torch.equal(first, third)
        assert graph.rebuilds == 2 * times  # the batch, and the file alone
    with (
        monkeypatch.context() as patch,
        pytest.raises(MachineError, match=r"rebuilt 6 times, the last time for: .*pyav"),
    ):
        patch.setattr(pipeline, "MAX_REBUILDS", 5)
        graph(samples)
    monkeypatch.setattr(pipeline, "MAX_REFUSED", 2)
    with pytest.raises(MachineError, match="DALI refused 3 files in a row"):
        graph([samples[1]] * 3)


def test_what_is_decoded_on_a_gpu():
    found = Probe(16, 144, 144, "h264", "yuv420p", 0)
    assert pipeline.takes_on_gpu(found) and pipeline.takes_on_gpu(Probe(1, 8, 8, "JPEG", "RGB", 0))
    others = ({"codec": "mpeg4"}, {"codec": "av1"}, {"pixel_format": "yuv420p10le"}, {"pixel_format": "yuv444p"})
    others += ({"rotation": 90}, {"height": 143})
    assert not any(pipeline.takes_on_gpu(found._replace(**other)) for other in others)
    assert not pipeline.takes_on_gpu(Probe(1, 8, 8, "JPEG", "CMYK", 0))


def test_a_driver_without_its_video_decoder_is_named(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(pipeline, "require", lambda: None)
    monkeypatch.setattr(pipeline.ctypes, "CDLL", missing)
    assert pipeline.lacking(torch.device("cpu")) is None
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,video,utility" in (pipeline.lacking(torch.device("cuda")) or "")


@needs_dali
@pytest.mark.parametrize("kind", ["clips", "images"])
@pytest.mark.parametrize("first", ["encoded", "pictures"])
def test_every_operator_of_the_gpu_graph_exists_with_its_arguments(kind, first, monkeypatch):
    """DALI checks names and devices when a graph is written down; only building it needs a GPU."""
    import nvidia.dali

    devices = []

    def built(graph):
        graph._build_graph()
        devices.extend(operator._op.device for operator in graph._ops)

    monkeypatch.setattr(nvidia.dali.Pipeline, "build", built)
    pipeline.build(kind, 4, 64, torch.device("cuda", 0), 2, first)
    assert devices.count("gpu") >= (3 if kind == "clips" else 8) and ("mixed" in devices) == (first == "encoded")
