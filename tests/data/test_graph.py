"""The GPU's data path, run by its own host code with DALI's CPU operators, sample by sample beside the reference."""

import importlib.util
import multiprocessing
import os
import signal
import threading
from contextlib import closing
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from bevt_fast.config import Config
from bevt_fast.data import loader, pipeline, pipeline_reference, sampling
from bevt_fast.data.graph import GraphReader
from bevt_fast.data.loader import Loader
from bevt_fast.data.reader import Slot, StreamReader
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError
from tests.data import media
from tests.data.test_loader import (
    AUGMENTED,
    FRAMES,
    batches,
    clips,
    config,
    folder,
    needs_dali,
    same,
    shown,
    sources,
    spoiled,
)

__all__ = ["folder"]  # the fixture


def in_graph(workers=0, **changes) -> tuple[Config, dict[str, Any]]:
    return config(workers, decoder="dali", **changes), {"in_graph": True}


def test_the_gpu_path_on_a_cpu_has_the_same_samples_where_nothing_is_rescaled(folder, tmp_path):
    """Frames, crops, flips, masks, substitutes and their records, of whole and of spoiled files."""
    needs_dali()
    view = AUGMENTED | {"short_side": [64, 64]}
    for data in (sources(folder), spoiled(folder, tmp_path)[0]):
        found, records = {}, {}
        for decoder in ("pyav", "dali"):
            where: dict[str, Any] = {"in_graph": True} if decoder == "dali" else {}
            with closing(Loader(config(1, view=view, decoder=decoder), data, **where)) as made:
                found[decoder] = [next(made) for _ in range(8)]
                key = ("stream", "path", "epoch", "index", "substitute")
                records[decoder] = {tuple(record[k] for k in key) for record in made.bad_files}
        assert records["dali"] >= records["pyav"]  # its thread is ahead of the training
        for ours, reference in zip(found["dali"], found["pyav"]):
            assert ours.images is not None and reference.images is not None
            assert torch.equal(ours.clips.mask, reference.clips.mask)
            assert torch.equal(ours.images.mask, reference.images.mask)
            for clip, again in zip(reference.clips.pixels, ours.clips.pixels):
                media.assert_same_but_for_chroma(shown(again), shown(clip), rescaled=False)
            # the float32 of two jitters may stand on two sides of a whole grey level
            levels = abs(grey(ours.images.pixels) - grey(reference.images.pixels))
            assert levels.max() <= 1 and (levels > 0).float().mean() < 1e-2


def grey(pixels):
    return pipeline_reference.denormalise(pixels).int()


def test_the_gpu_path_on_a_cpu_is_the_reference_but_for_its_bicubic_kernel(folder):
    """Two cubic kernels, a = -0.5 and -0.75: their weights differ by at most 0.125 in sum along an axis and add up to
    0, so what they make of values that span R differs by at most (1.375 + 1.25) * 0.125 / 2 R = 0.164 R, 1.375 and 1.25
    being the largest sums of their own weights; and each rounds by up to 1.
    """
    needs_dali()
    given, where = in_graph(view=AUGMENTED)
    for name, data in sources(folder).items():
        stream = StreamReader(given, name, data)
        stream.view = stream.view.model_copy(update={"colour_jitter": 0.0})
        loaded = Loader(given, {name: data}, **where)
        loaded._feeds[name].reader.view = stream.view  # type: ignore[union-attr]
        with closing(loaded):
            for number in range(6):
                part = getattr(next(loaded), name)
                for k, crops in enumerate(part.pixels):
                    place = sampling.place(given.seed, name, len(part.pixels) * number + k, len(data))
                    drawn = stream.draw(*place, place.index)
                    if drawn.frames and stream.dali and stream._dali_takes(place.index):  # in colours of its own
                        pictures = stream.dali._run([stream._job(drawn, place.index)])[0]
                    else:
                        pictures = stream.pictures(drawn, place.index)
                    pictures = pictures if drawn.frames else pictures[None]
                    expected = pipeline_reference.clip_pixels(pictures, drawn.crop)
                    found = grey(crops[None])[0].reshape(3, -1, 64, 64).permute(1, 2, 3, 0).numpy()
                    box = np.ones((7, 7))
                    span = [(cv2.dilate(p, box) - cv2.erode(p, box)).astype(np.float32) for p in pictures]
                    size = drawn.crop.width, drawn.crop.height
                    span = np.stack([cv2.resize(p, size, interpolation=cv2.INTER_NEAREST) for p in span])
                    top, left = drawn.crop.top, drawn.crop.left
                    span = span[:, top : top + 64, left : left + 64][:, :, :: -1 if drawn.crop.flip else 1]
                    assert (abs(found - expected.astype(int)) <= 0.164 * span + 2).all()
                    np.testing.assert_array_equal(part.mask[k], drawn.mask)


def test_tokens_of_the_gpu_path_are_those_of_its_own_crops(folder):
    needs_dali()
    given, where = in_graph()
    (batch,) = batches(given, sources(folder), 1, **where)
    assert batch.images is not None and batch.clips is not None
    for part, pictures in ((batch.images, batch.images.pixels), (batch.clips, batch.clips.pixels.transpose(1, 2))):
        crops = grey(pictures.reshape(-1, 3, 64, 64)).permute(0, 2, 3, 1).byte().numpy()
        views = np.stack([cv2.resize(crop, (32, 32), interpolation=cv2.INTER_LANCZOS4) for crop in crops])
        expected = pipeline_reference.map_pixels(torch.from_numpy(views)).reshape(part.token_pixels.shape)
        assert torch.equal(part.token_pixels, expected)
        assert all(tensor.is_contiguous() for tensor in part if tensor is not None)


def test_neither_workers_nor_processes_nor_a_later_start_change_a_bit_of_the_gpu_path(folder):
    needs_dali()
    steps = 6  # 24 clips of 11: two epochs
    given, where = in_graph(0)
    expected = batches(given, sources(folder), 2 * steps, **where)
    for workers in (1, 2, 4):
        found = batches(in_graph(workers)[0], sources(folder), 2 * steps, **where)
        assert all(same(*pair) for pair in zip(found, expected))
    for rank in (0, 1):
        ranks = batches(given, sources(folder), steps, rank=rank, world_size=2, **where)
        assert all(same(*pair) for pair in zip(ranks, expected[rank::2]))
    assert all(same(*pair) for pair in zip(batches(given, sources(folder), 4, first_step=3, **where), expected[6:]))


def test_the_gpu_path_outlives_a_killed_worker_and_passes_on_what_went_wrong(folder, tmp_path, monkeypatch):
    needs_dali()
    given, where = in_graph(1)
    expected = batches(given, sources(folder), 10, **where)
    with closing(Loader(given, sources(folder), **where)) as made:
        found = [next(made)]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        found += [next(made) for _ in range(9)]
        assert made.restarts >= 1
    assert all(same(*pair) for pair in zip(found, expected))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data ")]
    missing = {"clips": Source(name="videos", root=tmp_path, paths=[f"{k}.mp4" for k in range(60)], frames=FRAMES)}
    with closing(Loader(in_graph(1, streams=("clips",))[0], missing, **where)) as made:
        with pytest.raises(DataError, match="50 files in a row cannot be read"):
            next(made)

    def broken(*arguments):
        raise ValueError("a bug")

    monkeypatch.setattr(pipeline.DaliCrops, "__call__", broken)
    with closing(Loader(given, sources(folder), **where)) as made, pytest.raises(ValueError, match="a bug"):
        next(made)


def test_a_large_file_is_decoded_by_the_workers(folder, monkeypatch):
    needs_dali()
    stream = GraphReader(in_graph()[0], "clips", clips(folder), device=torch.device("cpu"))
    slots = [Slot(sampling.Place(0, k), k) for k in range(11)]
    ways = {("encoded" if "encoded" in stream.prepare(slot).inputs else "pictures") for slot in slots}
    assert ways == {"encoded", "pictures"}
    monkeypatch.setattr(pipeline, "LARGEST_FILE", 100)
    assert all("pictures" in stream.prepare(slot).inputs for slot in slots)


@pytest.mark.parametrize("dali_is_there", [True, False])
def test_a_machine_without_dalis_decoders_decodes_in_the_workers_and_says_so_once(
    folder, monkeypatch, caplog, dali_is_there
):
    if dali_is_there and not importlib.util.find_spec("nvidia"):
        pytest.skip("NVIDIA DALI is not installed")
    expected = batches(config(decoder="dali" if dali_is_there else "pyav"), sources(folder), 2)
    monkeypatch.setattr(pipeline, "lacking", lambda device: "libnvcuvid is missing")
    if not dali_is_there:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    loader._warn.cache_clear()
    for forced in (None, True):
        found = batches(config(decoder="dali"), sources(folder), 2, in_graph=forced)
        assert all(same(*pair) for pair in zip(found, expected))
    assert [record.message for record in caplog.records if "libnvcuvid" in record.message] == [
        "libnvcuvid is missing; until then the workers decode on the CPU"
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_samples_made_on_a_gpu_beside_the_reference(tmp_path, decoder):
    """PyAV: the same bits. DALI: the same frames, crops and masks, and another conversion of colours and kernel."""
    names = [f"{k}.mp4" for k in range(4)]
    for name in names:
        media.video(tmp_path / name, "libx264", frames=40, size=(160, 240), pixel_format="yuv420p")
    for k in range(8):
        Image.fromarray(media.picture(k, 160, 240)).save(tmp_path / f"{k}.jpg", quality=95)
    data = {
        "clips": Source(name="videos", root=tmp_path, paths=names, frames=FRAMES),
        "images": Source(name="pictures", root=tmp_path, paths=[f"{k}.jpg" for k in range(8)]),
    }
    view = {"size": 128, "short_side": [160, 160], "flip": 0.0}
    if decoder == "dali":
        needs_dali()
        assert pipeline.lacking(torch.device("cuda")) is None, pipeline.lacking(torch.device("cuda"))
    expected = batches(config(view=view), data, 6)
    found = batches(config(2, view=view, decoder=decoder), data, 6, device="cuda")
    for ours, reference in zip(found, expected):
        for one, other in zip(ours, reference):
            assert one is not None and other is not None
            assert one.pixels.is_cuda and not one.mask.is_cuda and torch.equal(one.mask, other.mask)
            if decoder == "pyav":
                assert torch.equal(one.pixels.cpu(), other.pixels)
                assert torch.equal(one.token_pixels.cpu(), other.token_pixels)
                continue
            # NVDEC's frames are exact; converting their colours rounds chroma in other places, by a few grey levels
            levels = abs(grey(one.pixels.cpu()) - grey(other.pixels)).float()
            assert levels.mean() < 4 and (levels > 16).float().mean() < 0.05
