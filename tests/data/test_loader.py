"""A batch depends on the seed and its number alone: not on workers, processes, restarts or where a run began."""

import gc
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from bevt_fast import config as configuration
from bevt_fast.config import Config
from bevt_fast.data import decode, faults, loader, masking, pipeline, pipeline_reference, sampling
from bevt_fast.data.decode import BadFile
from bevt_fast.data.loader import Loader
from bevt_fast.data.reader import StreamReader, draw
from bevt_fast.data.sources import Frames, Source
from bevt_fast.errors import DataError, UserError
from tests.data import media

ROOT = Path(__file__).resolve().parents[2]
FRAMES = Frames(count=8, stride=3)
PLAIN = {"size": 64, "short_side": [64, 64], "flip": 0.0}
AUGMENTED = {"size": 64, "short_side": [64, 80], "flip": 0.5}


def config(workers=0, view=AUGMENTED, seed=3, micro_batch=2, decoder="pyav", streams=("clips", "images")) -> Config:
    """Steps of 4 clips and 8 images, in micro-batches of `micro_batch` clips and twice as many images."""
    tube = {"name": "tube", "options": {"ratio": 0.5, "min_block": 2}}
    plane = {"name": "blockwise", "options": {"ratio": 0.5, "min_block": 2}}
    colour = view | {"colour_jitter": 0.4}
    whole = {
        "clips": {"source": {"name": "x"}, "mask": tube, "batch": 4, "micro_batch": micro_batch, "view": view},
        "images": {"source": {"name": "x"}, "mask": plane, "batch": 8, "micro_batch": 2 * micro_batch, "view": colour},
    }
    values = {name: whole[name] for name in streams} | {
        "seed": seed,
        "output": "unused",
        "tokenizer": {"name": "x"},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
        "data": {"workers": workers, "decoder": decoder},
    }
    return configuration.parse(Config, values, "test")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """10 videos of 11 to 20 frames (a span is 24, so all are looped) and one of 40, in four formats, and 12 JPEGs."""
    folder = tmp_path_factory.mktemp("data")
    formats = [("a.webm", "libvpx-vp9", "yuv420p"), ("b.mp4", "libx264", "yuv420p"), ("c.avi", "mjpeg", "yuvj420p")]
    for k in range(11):
        name, codec, pixel_format = formats[k % 3]
        media.video(folder / f"{k}{name}", codec, frames=11 + k if k < 10 else 40, pixel_format=pixel_format)
    for k in range(12):
        Image.fromarray(media.picture(k)).save(folder / f"{k}.jpg", quality=90)
    return folder


def clips(folder, **changes):
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".webm", ".mp4", ".avi"))
    return Source(**{"name": "videos", "root": folder, "paths": names, "frames": FRAMES} | changes)


def images(folder, **changes):
    names = sorted(path.name for path in folder.glob("*.jpg"))
    return Source(**{"name": "pictures", "root": folder, "paths": names} | changes)


def sources(folder):
    return {"clips": clips(folder), "images": images(folder)}


def batches(given, data, count, **where):
    with closing(Loader(given, data, **where)) as batches:
        return [next(batches) for _ in range(count)]


def needs_dali():
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")


def same(one, other):
    return all(torch.equal(a, b) for left, right in zip(one, other) for a, b in zip(left[:3], right[:3]))


def test_a_batch_has_the_shapes_and_ranges_of_its_type(folder):
    (batch,) = batches(config(), sources(folder), 1)
    assert batch.clips is not None and batch.images is not None
    assert [tuple(part.shape) for part in batch.clips[:3]] == [(2, 3, 8, 64, 64), (2, 8, 3, 32, 32), (2, 4, 4, 4)]
    assert [tuple(part.shape) for part in batch.images[:3]] == [(4, 3, 64, 64), (4, 3, 32, 32), (4, 4, 4)]
    for part in (batch.clips, batch.images):
        assert part.known is None  # there is no token cache
        assert [tensor.dtype for tensor in part[:3]] == [torch.float32, torch.float32, torch.bool]
        assert part.token_pixels.min() >= 0.1 and part.token_pixels.max() <= 0.9
        assert all(tensor.is_contiguous() for tensor in part[:3])


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_the_number_of_workers_changes_no_bit_of_two_epochs(folder, decoder):
    if decoder == "dali":
        needs_dali()
    steps = 6  # 24 clips of 11, 48 images of 12: two passes and more
    expected = batches(config(0, decoder=decoder), sources(folder), 2 * steps)
    for workers in (1, 2, 4) if decoder == "pyav" else (2,):
        for found, batch in zip(batches(config(workers, decoder=decoder), sources(folder), 2 * steps), expected):
            assert same(found, batch)


def test_the_number_of_processes_changes_no_sample_and_no_order(folder):
    steps = 3
    alone = batches(config(micro_batch=2), sources(folder), 2 * steps)
    ranks = [batches(config(micro_batch=2), sources(folder), steps, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(steps):
        for rank in (0, 1):  # a step's second micro-batch is what the second of two processes gets
            assert same(alone[2 * step + rank], ranks[rank][step])
    whole = batches(config(micro_batch=4), sources(folder), steps)
    for step, batch in enumerate(whole):
        first, second = alone[2 * step], alone[2 * step + 1]
        joined = [
            [torch.cat(pair) for pair in zip(getattr(first, s)[:3], getattr(second, s)[:3])] for s in first._fields
        ]
        assert same(batch, joined)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_begins_later_gets_the_same_batches(folder, workers):
    expected = batches(config(), sources(folder), 10)
    found = batches(config(workers), sources(folder), 4, first_step=3)
    assert all(same(*pair) for pair in zip(found, expected[6:]))


def test_another_seed_or_epoch_gives_other_draws(folder):
    data = clips(folder)
    draws = [
        draw(config(seed=seed), "clips", data, epoch, index) for seed in (0, 1) for epoch in (0, 1) for index in (10, 9)
    ]
    assert len({(drawn.crop, tuple(drawn.frames or ()), drawn.mask.tobytes()) for drawn in draws}) == len(draws)


def test_a_batch_is_what_its_draws_say(folder):
    """Positions, frames (read off the pictures), crops and masks, each by the function that owns it."""
    given, data = config(view=PLAIN), sources(folder)
    tube = masking.build(given.clips.mask)  # type: ignore[union-attr]
    found = batches(given, data, 4)
    for number, batch in enumerate(found):
        assert batch.clips is not None
        for k in range(2):
            place = sampling.place(given.seed, "clips", 2 * number + k, 11)
            drawn = draw(given, "clips", data["clips"], *place)
            assert (drawn.epoch, drawn.index) == place and drawn.frames is not None
            total = decode.probe(data["clips"].path(place.index)).frames
            view = sampling.random_for(given.seed, "clips", *place, "view")
            assert drawn.frames == sampling.clip_frames(total, FRAMES, view)
            assert drawn.crop == sampling.draw_crop(64, 96, given.clips.view, view)  # type: ignore[union-attr]
            mask = tube((4, 4), 4, sampling.random_for(given.seed, "clips", *place, "mask"))
            np.testing.assert_array_equal(drawn.mask, mask)
            np.testing.assert_array_equal(batch.clips.mask[k], mask)
            left = drawn.crop.left
            shown = decode.read_frames(data["clips"].path(place.index), drawn.frames)
            assert [media.number(frame) for frame in shown] == drawn.frames
            expected = pipeline_reference.normalise(torch.from_numpy(shown[:, :, left : left + 64].copy()))
            assert torch.equal(batch.clips.pixels[k], expected.transpose(0, 1))


@pytest.mark.parametrize("name, decoder", [("10b.mp4", "pyav"), ("9a.webm", "pyav"), ("9a.webm", "dali")])
def test_a_part_of_a_file_is_read_as_the_list_says(folder, name, decoder):
    if decoder == "dali":
        needs_dali()
    data = clips(folder, paths=[name], extents=np.array([[7, 12]]))
    given = config(view=PLAIN, streams=("clips",), decoder=decoder)
    drawn = draw(given, "clips", data, 0, 0)
    assert drawn.frames is not None and max(drawn.frames) < 12
    views = StreamReader(given, "clips", data).read([sampling.Place(0, 0)], [])[0]
    expected = decode.read_frames(folder / name, [7 + k for k in drawn.frames])
    expected = expected[:, :, drawn.crop.left : drawn.crop.left + 64]
    if decoder == "dali":
        media.assert_same_but_for_chroma(views.pixels, expected, rescaled=False)
    else:
        np.testing.assert_array_equal(views.pixels, expected)


def test_held_out_views_are_the_same_in_every_run_and_not_augmented(folder):
    data = sources(folder)
    one, other = (batches(config(seed=seed), data, 3, heldout=True) for seed in (1, 2))
    assert all(same(*pair) for pair in zip(one, other))
    assert not same(one[0], batches(config(seed=1), data, 1)[0])
    for name, source in data.items():
        for index in range(len(source)):
            drawn = draw(config(), name, source, 0, index, heldout=True)
            assert (drawn.crop.height, drawn.crop.flip, drawn.crop.jitter) == (64, False, None)


def test_a_stream_left_out_is_none(folder):
    (batch,) = batches(config(streams=("images",)), sources(folder), 1)
    assert batch.clips is None and batch.images is not None
    (batch,) = batches(config(), {"clips": clips(folder), "images": None}, 1)
    assert batch.images is None and batch.clips is not None


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_leaves_torchs_generator_alone(folder, workers):
    before = torch.get_rng_state()
    batches(config(workers), sources(folder), 3)
    assert torch.equal(torch.get_rng_state(), before)


def spoiled(folder, tmp_path):
    """The sources of `folder` with six clips and two images spoiled, each in another way; what is wrong, by path."""
    data = sources(folder)
    for source in data.values():
        for name in source.paths:
            (tmp_path / name).write_bytes((folder / name).read_bytes())
    one, two, three, four, five, six = data["clips"].paths[:6]
    (tmp_path / one).unlink()
    (tmp_path / two).write_bytes(b"")
    (tmp_path / three).write_text("no video")
    media.sound(tmp_path / "sound.mp4").replace(tmp_path / four)
    content = (tmp_path / five).read_bytes()
    (tmp_path / five).write_bytes(content[: len(content) // 2])
    media.video(
        tmp_path / f"short{Path(six).suffix}", "mpeg4" if six.endswith("avi") else "libvpx-vp9", frames=1
    ).replace(tmp_path / six)
    (tmp_path / "0.jpg").write_bytes(b"")
    (tmp_path / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-200])
    kinds = dict(zip(data["clips"].paths, ("missing", "empty", "unreadable", "no_video", "truncated", "too_short")))
    return sources_at(data, tmp_path), kinds | {"0.jpg": "empty", "1.jpg": "truncated"}


def sources_at(data, root):
    return {
        "clips": Source(name="videos", root=root, paths=data["clips"].paths, frames=FRAMES),
        "images": Source(name="pictures", root=root, paths=data["images"].paths),
    }


def substituted(given, name, source, place, file):
    """What a place holds when `file` is read for it: that file's picture in the place's own crop."""
    drawn = StreamReader(given, name, source).draw(place.epoch, place.index, file)
    path, size = source.path(file), drawn.crop.size // 2
    if drawn.frames is None:
        image, order = decode.read_image(path), sampling.jitter_order(given.seed)
        pixels, _ = pipeline_reference.image_views(image, drawn.crop, size, order)
        return pipeline_reference.normalise(torch.from_numpy(pixels))
    pixels, _ = pipeline_reference.clip_views(decode.read_frames(path, drawn.frames), drawn.crop, size)
    return pipeline_reference.normalise(torch.from_numpy(pixels)).transpose(0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_named_and_change_no_other_sample(folder, tmp_path, workers):
    data, kinds = spoiled(folder, tmp_path)
    given = config(workers)
    steps = 12
    clean = batches(config(), sources(folder), steps)
    with closing(Loader(given, data)) as found:
        got = [next(found) for _ in range(steps)]
        records = found.bad_files
        assert found.bad_files == []  # handed over once
    # 24 clips of 11 and 48 images of 12: every file has been met
    assert {Path(record["path"]).name: record["kind"] for record in records} == kinds
    assert json.loads(json.dumps(records)) == records
    for record in records:
        source = data[record["stream"]]
        assert record["path"] == str(source.path(record["index"])) and record["reason"]
        assert record["substitute"] != record["index"] and record["epoch"] in (0, 1, 2, 3)
    for name, size in (("clips", 2), ("images", 4)):
        source = data[name]
        for position in range(size * steps):
            epoch, index = sampling.place(given.seed, name, position, len(source))
            file, attempt = index, 0
            while source.paths[file] in kinds:
                file = sampling.substitute(given.seed, name, epoch, index, attempt, len(source))
                attempt += 1
            number, k = divmod(position, size)
            part, untouched = getattr(got[number], name), getattr(clean[number], name)
            assert torch.equal(part.mask[k], untouched.mask[k])  # a mask belongs to the place, not to the file
            if file == index:
                assert torch.equal(part.pixels[k], untouched.pixels[k])
            else:
                assert torch.equal(part.pixels[k], substituted(given, name, source, sampling.Place(epoch, index), file))


def test_dali_gives_the_same_batches_and_replaces_the_same_files(folder, tmp_path):
    """In a source of VP9, MJPEG and H.264, of which DALI takes the first two without a GPU, in colours of its own."""
    needs_dali()
    data, _ = spoiled(folder, tmp_path)
    key = ("stream", "path", "epoch", "index", "substitute")
    found, records = {}, {}
    for decoder in ("pyav", "dali"):
        with closing(Loader(config(decoder=decoder), data)) as made:
            found[decoder] = [next(made) for _ in range(8)]
            records[decoder] = {tuple(record[k] for k in key) for record in made.bad_files}
    assert records["pyav"] == records["dali"]
    equal = [0, 0]
    for one, other in zip(found["pyav"], found["dali"]):
        assert same([one.images], [other.images]) and torch.equal(one.clips.mask, other.clips.mask)
        for clip, again in zip(one.clips.pixels, other.clips.pixels):
            media.assert_same_but_for_chroma(shown(again), shown(clip))
            equal[torch.equal(clip, again)] += 1
    assert all(equal)  # what DALI does not take are PyAV's own bits


def shown(clip):
    """What the encoder sees of a clip (3, T, H, W), as pictures (T, H, W, 3)."""
    return pipeline_reference.denormalise(clip[None])[0].movedim(0, -1).numpy()


def test_both_decoders_take_a_clip_that_lies_behind_a_damaged_frame(tmp_path):
    """DALI decodes from the beginning of a file and refuses it; PyAV seeks to the clip and reads it."""
    needs_dali()
    file = media.video(tmp_path / "a.webm", "libvpx-vp9", frames=60)
    with av.open(str(file)) as container:
        first = bytes(next(container.demux(video=0)))
    file.write_bytes(file.read_bytes().replace(first, bytes(len(first))))
    media.video(tmp_path / "b.webm", "libvpx-vp9", frames=60)
    data = {"clips": Source(name="videos", root=tmp_path, paths=["a.webm", "b.webm"], frames=FRAMES)}
    with pytest.raises(BadFile):
        decode.read_frames(file, [0])
    found, records = {}, {}
    for decoder in ("pyav", "dali"):
        with closing(Loader(config(decoder=decoder, streams=("clips",)), data)) as made:
            found[decoder] = [next(made).clips for _ in range(8)]  # 8 epochs: eight clips of each file
            records[decoder] = made.bad_files
    assert records["pyav"] == records["dali"] and len(records["pyav"]) < 8
    assert all(torch.equal(one.mask, other.mask) for one, other in zip(found["pyav"], found["dali"]))
    clips = [torch.cat([part.pixels for part in found[decoder]]) for decoder in ("pyav", "dali")]
    equal = [torch.equal(*pair) for pair in zip(*clips)]
    assert any(equal) and not all(equal)  # PyAV reads the file that DALI refuses
    for clip, again in zip(*clips):
        media.assert_same_but_for_chroma(shown(again), shown(clip))


def test_a_fault_of_one_clip_does_not_condemn_the_file(folder, monkeypatch):
    """Else the order of reading, and so the number of workers, would decide what is replaced."""
    data = clips(folder)
    stream = StreamReader(config(streams=("clips",)), "clips", data)
    good = stream.read([sampling.Place(0, 5)], [])[0]
    read, calls = decode.read_frames, []

    def failing_once(path, *arguments):
        calls.append(path)
        if len(calls) == 1:
            raise BadFile("corrupt", path, "damaged here")
        return read(path, *arguments)

    monkeypatch.setattr(decode, "read_frames", failing_once)
    bad = []
    stream.read([sampling.Place(0, 5)], bad)
    assert [(record["index"], record["kind"]) for record in bad] == [(5, "corrupt")]
    np.testing.assert_array_equal(stream.read([sampling.Place(0, 5)], bad)[0].pixels, good.pixels)
    assert len(bad) == 1


def test_a_file_known_to_be_bad_is_not_opened_again(folder, tmp_path, monkeypatch):
    data, _ = spoiled(folder, tmp_path)
    stream = StreamReader(config(streams=("clips",)), "clips", data["clips"])
    probe, calls, bad = decode.probe, [], []

    def counting(path, *arguments):
        calls.append(path)
        return probe(path, *arguments)

    monkeypatch.setattr(decode, "probe", counting)
    for epoch in range(3):
        stream.read([sampling.Place(epoch, 1)], bad)
    assert sum(path == data["clips"].file(1) for path in calls) == 1
    assert [record["epoch"] for record in bad if record["index"] == 1] == [0, 1, 2]


def test_a_passing_fault_is_tried_once_more(folder, monkeypatch):
    stream = StreamReader(config(streams=("clips",)), "clips", clips(folder))
    read, calls = decode.read_frames, []

    def stalling_once(path, *arguments):
        calls.append(path)
        if len(calls) == 1:
            raise BadFile("io", path, "the storage stalls")
        return read(path, *arguments)

    monkeypatch.setattr(decode, "read_frames", stalling_once)
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)
    bad = []
    stream.read([sampling.Place(0, 5)], bad)
    assert bad == [] and len(calls) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_is_all_bad_ends_with_one_sentence(tmp_path, workers):
    names = [f"{k}.mp4" for k in range(60)]
    data = {"clips": Source(name="videos", root=tmp_path, paths=names, frames=FRAMES)}
    with closing(Loader(config(workers, streams=("clips",)), data)) as made:
        with pytest.raises(DataError, match=r"50 files in a row cannot be read.*\(missing: no such file\)") as caught:
            next(made)
    assert "\n" not in str(caught.value)


def test_an_empty_source_is_refused(tmp_path):
    with pytest.raises(DataError, match="'videos' has no files"):
        Loader(config(), {"clips": Source(name="videos", root=tmp_path, paths=[], frames=FRAMES)})


def test_a_killed_worker_is_replaced_and_no_batch_changes(folder):
    expected = batches(config(), sources(folder), 12)
    with closing(Loader(config(2), sources(folder))) as made:
        found = [next(made) for _ in range(2)]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        found += [next(made) for _ in range(10)]
        assert 1 <= made.restarts <= 2  # both streams lost their workers; one may have had all batches ready
    assert all(same(*pair) for pair in zip(found, expected))
    assert multiprocessing.active_children() == []


def test_garbage_of_the_trainer_is_freed_before_workers_are_forked(folder):
    """Freed in a worker, a decoder with threads would wait for ever for threads that only the trainer has."""
    freed = []

    class Decoder:
        def __init__(self):
            self.itself = self  # only the collector frees it

        def __del__(self):
            freed.append(os.getpid())

    gc.disable()
    try:
        Decoder()
        with closing(Loader(config(1), sources(folder))) as made:
            next(made)
            assert freed == [os.getpid()]
    finally:
        gc.enable()


def test_a_worker_that_collects_garbage_copies_none_of_the_trainers_pages(folder, monkeypatch):
    works, said, trainer = decode.read_frames, multiprocessing.SimpleQueue(), os.getpid()

    def collecting(*arguments):
        if os.getpid() != trainer:
            before = own_memory()
            gc.collect()
            said.put(own_memory() - before)
        return works(*arguments)

    monkeypatch.setattr(decode, "read_frames", collecting)
    with closing(Loader(config(1, streams=("clips",)), sources(folder))) as made:
        next(made)
        assert said.get() < 4  # of the some 50 MiB of Python objects that the trainer has
    assert gc.get_freeze_count() == 0


def own_memory() -> float:
    """MiB that this process shares with no other and has written to."""
    found = re.search(r"^Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def test_workers_that_keep_dying_end_with_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(loader, "MAX_RESTARTS", 0)
    with closing(Loader(config(1), sources(folder))) as made:
        next(made)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
        with pytest.raises(DataError, match=r"a loader process died 1 times.*lower data\.workers or data\.prefetch"):
            for _ in range(20):
                next(made)


def test_an_error_in_a_worker_is_not_taken_for_its_death(folder, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(decode, "read_frames", broken)
    with closing(Loader(config(1, streams=("clips",)), sources(folder))) as made:
        with pytest.raises(RuntimeError, match="a bug"):
            next(made)
        assert made.restarts == 0


def test_workers_leave_interrupts_to_the_trainer_and_go_when_it_is_killed(folder, tmp_path):
    program = f"""
import multiprocessing, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from pathlib import Path
from typing import Any
from tests.data import test_loader
from bevt_fast.data.loader import Loader
made = Loader(test_loader.config(2), test_loader.sources(Path({str(folder)!r})))
next(made)
print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
for _ in sys.stdin:
    next(made)
    print("next", made.restarts, flush=True)
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert trainer.stdin is not None and trainer.stdout is not None
    try:
        workers = [int(word) for word in trainer.stdout.readline().split()]
        assert len(workers) == 4
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
        for _ in range(8):
            trainer.stdin.write("\n")
            assert trainer.stdout.readline().split() == ["next", "0"]
    finally:
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 30  # torch looks for the parent every 5 seconds
    while any(running(worker) for worker in workers):
        assert time.monotonic() < deadline, "loader processes outlive the trainer"
        time.sleep(0.2)


def running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_errors_for_the_user_travel_as_they_are(folder):
    assert isinstance(StreamReader(config(), "clips", clips(folder, paths=["no.mp4"]))[0], UserError)


def test_decoding_and_drawing_leave_the_training_thread_alone(folder, monkeypatch):
    """With a worker: no draw, no file, no view in the thread that trains; the same for the path of a GPU."""
    here = os.getpid(), threading.main_thread()

    def guarded(function):
        def call(*arguments, **options):
            assert (os.getpid(), threading.current_thread()) != here, f"{function.__name__} runs in the training thread"
            return function(*arguments, **options)

        return call

    watched = [
        (sampling, "random_for"), (sampling, "draw_crop"), (sampling, "permutation"), (decode, "probe"),
        (decode, "read_frames"), (decode, "read_image"), (pipeline_reference, "clip_pixels"),
        (pipeline_reference, "image_pixels"), (pipeline_reference, "token_view"), (pipeline.DaliCrops, "__call__"),
    ]  # fmt: skip
    given: list[tuple[Config, dict[str, Any]]] = [(config(1), {})]
    if importlib.util.find_spec("nvidia"):
        given.append((config(1, decoder="dali"), {"in_graph": True}))
    made = [Loader(one, sources(folder), **where) for one, where in given]
    alone = Loader(config(0), sources(folder))
    for module, name in watched:
        monkeypatch.setattr(module, name, guarded(getattr(module, name)))
    for loaded in made:
        with closing(loaded):
            for _ in range(3):
                next(loaded)
    with closing(alone), pytest.raises(AssertionError, match="training thread"):
        next(alone)  # it can fail


def test_the_pace_is_that_of_the_interval_and_leaves_out_the_first_batch(folder, monkeypatch):
    def slow(*arguments, read=decode.read_frames):
        time.sleep(0.1)
        return read(*arguments)

    monkeypatch.setattr(decode, "read_frames", slow)
    with closing(Loader(config(0), sources(folder))) as made:
        next(made)
        first = made.pace()
        assert first.waited == 0.0 and first.busy.wall == 0.0 and first.seconds < 0.2
        start = time.perf_counter()
        for _ in range(3):
            next(made)
        passed, pace = time.perf_counter() - start, made.pace()
        assert pace.stream == "clips" and 0.6 <= pace.waited <= pace.seconds
        assert pace.busy.wall >= 0.6 and pace.busy.cpu < pace.busy.wall - 0.5 and pace.seconds >= passed
        assert made.pace().waited == 0.0  # handed over once


def test_the_encoders_pixels_come_in_the_precision_asked_for(folder):
    (whole,), (half,) = (batches(config(), sources(folder), 1, dtype=t) for t in (torch.float32, torch.bfloat16))
    for name in ("clips", "images"):
        assert torch.equal(getattr(half, name).pixels, getattr(whole, name).pixels.bfloat16())
        assert torch.equal(getattr(half, name).token_pixels, getattr(whole, name).token_pixels)


def test_what_a_gpu_is_sent_is_pinned_and_copied_without_waiting(folder, monkeypatch):
    made = Loader(config(), sources(folder), device="cuda")  # nothing touches CUDA before the first batch
    assert all(feed.pin and not feed.reader.token_views for feed in made._feeds.values())  # type: ignore[union-attr]
    asked, move = [], torch.Tensor.to

    def to(tensor, *where, **options):
        asked.append(options.get("non_blocking", "device" not in options and where[0] is not made.device))
        return move(tensor, "cpu")

    item = StreamReader(config(), "clips", clips(folder))[0]
    assert isinstance(item, dict)
    monkeypatch.setattr(torch.Tensor, "to", to)
    made._batch("clips", item["pixels"], item["mask"], item["token_pixels"])
    assert len(asked) >= 2 and all(asked)


@pytest.mark.parametrize("name", ["clips", "images", "folders"])
def test_reading_puts_nothing_into_the_interpreters_table_of_strings(folder, tmp_path, name):
    data = sources(folder)
    if name == "folders":  # of frames, as some data come
        (tmp_path / "a b").mkdir()
        for number in range(40):
            Image.fromarray(media.picture(number)).save(tmp_path / "a b" / f"{number}.jpg")
        data, name = {"clips": Source(name="x", root=tmp_path, paths=["a b"], frames=FRAMES)}, "clips"
    stream, interned = StreamReader(config(streams=(name,)), name, data[name]), []

    def called(frame, event, function):
        if event == "c_call" and function is sys.intern:
            interned.append(frame)

    stream[0]  # what is imported and looked up once
    sys.setprofile(called)
    try:
        for item in range(1, 4):
            stream[item]
        in_reading = len(interned)
        assert Path("a/b").name  # as one that is seen
    finally:
        sys.setprofile(None)
    assert interned and not in_reading
