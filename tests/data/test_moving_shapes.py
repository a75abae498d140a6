"""The drawn dataset: what its labels promise, and files that are whole, equal and readable."""

import csv
import dataclasses
import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from bevt_fast.config import Part
from bevt_fast.data import shape_files, shapes, sources
from bevt_fast.data.sources import Frames, moving_shapes
from bevt_fast.errors import ConfigError, DataError

SMALL = {"clips": 64, "test_clips": 8, "images": 16, "test_images": 8, "size": 32, "length": 6, "objects": 2}
MOTIONS = range(len(shapes.MOTIONS))


def scene_of(seed, hue=0, objects=3):
    return shapes.draw_scene(np.random.default_rng(seed), hue, objects)


def lone_object(**changes):
    """One object in the middle of a plain background, slow enough that nothing wraps."""
    scene = scene_of(0, objects=1)
    speeds = (2 / 64, 3 / 64, 1 / 4, 0.05)
    item = dataclasses.replace(scene.objects[0], middle=shapes.State(0.5, 0.5, 0.1, 0.4), speeds=speeds, **changes)
    return dataclasses.replace(scene, colours=((0.0, 0.0, 0.0),) * 2, waves=(), objects=(item,))


def digests(root):
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("shapes") / "small"
    moving_shapes.write(place, shape_files.Recipe.model_validate(SMALL), processes=1)
    return place


def source(root, **options):
    return sources.build(Part(name="moving_shapes", options={**SMALL, "root": str(root), **options}))


def labels_of(some):
    assert some.labels is not None
    return some.labels.tolist()


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("length", [6, 16])
def test_a_reversed_clip_is_the_reverse_motion(motion, length):
    for seed in range(4):
        scene = scene_of(seed)
        clip = shapes.render_clip(scene, motion, 48, length)
        np.testing.assert_array_equal(clip[::-1], shapes.render_clip(scene, motion ^ 1, 48, length))
        assert (clip[0] != clip[-1]).any()


def test_all_motions_meet_in_the_middle():
    for seed in range(4):
        middles = [shapes.render_clip(scene_of(seed), motion, 48, 5)[2] for motion in MOTIONS]
        for middle in middles:
            np.testing.assert_array_equal(middle, middles[0])


def test_motions_are_what_they_are_called():
    # texture 2 is light on one side only
    scene = lone_object(shape=0, texture=2)
    clips = {name: shapes.render_clip(scene, motion, 64, 2) for motion, name in enumerate(shapes.MOTIONS)}

    def assert_equal_up_to_rounding(first, second):
        assert np.abs(first.astype(int) - second).max() <= 1

    first, second = clips["right"]
    assert_equal_up_to_rounding(np.roll(first, 2, axis=1), second)
    first, second = clips["left"]
    assert_equal_up_to_rounding(np.roll(first, -2, axis=1), second)
    first, second = clips["down"]
    assert_equal_up_to_rounding(np.roll(first, 3, axis=0), second)
    first, second = clips["up"]
    assert_equal_up_to_rounding(np.roll(first, -3, axis=0), second)
    first, second = clips["clockwise"]
    assert_equal_up_to_rounding(np.rot90(first, -1), second)
    first, second = clips["anticlockwise"]
    assert_equal_up_to_rounding(np.rot90(first, 1), second)
    first, second = ((frame.max(axis=-1) > 0).sum() for frame in clips["grow"])
    # a disc's area grows with the square of its radius; its outline is one pixel wide
    assert abs(second / first - (0.27 / 0.12) ** (2 * 0.05)) < 4 / math.sqrt(first)
    first, second = ((frame.max(axis=-1) > 0).sum() for frame in clips["shrink"])
    assert second < first


def test_objects_leave_on_one_side_and_enter_on_the_other():
    scene = lone_object()
    item = scene.objects[0]
    centre = shapes.render_frame(scene, 0, 64)
    corner = dataclasses.replace(item, middle=item.middle._replace(x=0.0, y=0.0))
    wrapped = shapes.render_frame(dataclasses.replace(scene, objects=(corner,)), 0, 64)
    np.testing.assert_array_equal(np.roll(centre, (-32, -32), axis=(0, 1)), wrapped)


def test_states_are_uniform_at_every_frame_of_every_motion():
    scenes, squares = 300, []
    for motion in MOTIONS:
        for offset in (-7.5, -2.5, 7.5):
            rng = np.random.default_rng((5, motion, int(offset * 2) % 16))
            states = [shapes.state(shapes.draw_scene(rng, 0, 1).objects[0], motion, offset) for _ in range(scenes)]
            # a radius beyond the ladder's ends would tell growing from shrinking
            assert ((np.array(states) >= 0) & (np.array(states) <= 1)).all()
            angles = 2 * math.pi * np.array(states)
            # of a uniform angle, cosine and sine have mean 0 and variance 1/2, at the first two harmonics as well
            for harmonic in (angles, 2 * angles):
                squares += [np.cos(harmonic).sum(axis=0) ** 2, np.sin(harmonic).sum(axis=0) ** 2]
    values = np.concatenate(squares) / (scenes / 2)
    assert abs(values.sum() - values.size) <= 3 * math.sqrt(2 * values.size)


def ridge_accuracy(features, labels, held_out_features, held_out_labels):
    """Held-out accuracy of least squares onto one-hot labels, with a penalty of a tenth of the mean variance."""
    mean = features.mean(axis=0)
    x, targets = features - mean, np.eye(8)[labels] - 1 / 8
    covariance = x.T @ x
    penalty = 0.1 * np.trace(covariance) / len(covariance)
    weights = np.linalg.solve(covariance + penalty * np.eye(len(covariance)), x.T @ targets)
    return ((held_out_features - mean) @ weights).argmax(axis=1) == held_out_labels


@pytest.mark.parametrize("offset", [-7.5, 7.5])
def test_single_frames_tell_the_hue_and_not_the_motion(offset):
    count = 512
    recipe = shape_files.Recipe(clips=count, test_clips=count, images=8, test_images=8, size=32)
    clips = [item for item in shape_files.items(recipe) if item.kind == "clips"]
    frames = np.stack([shapes.render_frame(shape_files.draw(recipe, i), i.motion or 0, 32, offset) for i in clips])
    small = frames.reshape(len(clips), 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(clips), -1) / 255
    # how much of the picture has which strong colour
    chroma = frames.reshape(len(clips), -1, 3) / 255
    chroma = np.maximum(chroma - chroma.mean(axis=2, keepdims=True) - 0.2, 0)
    colour = np.concatenate([chroma.mean(axis=1), np.sqrt(chroma).mean(axis=1), (chroma > 0).mean(axis=1)], axis=1)
    features = np.concatenate([small, colour], axis=1)
    motions = np.array([item.motion for item in clips])
    hues = np.array([item.appearance for item in clips])
    split = slice(None, count), slice(count, None)
    right = ridge_accuracy(features[split[0]], motions[split[0]], features[split[1]], motions[split[1]])
    assert abs(right.mean() - 1 / 8) <= 3 * math.sqrt(1 / 8 * 7 / 8 / count)
    centroids = np.stack([features[split[0]][motions[split[0]] == motion].mean(axis=0) for motion in MOTIONS])
    distances = ((features[split[1]][:, None] - centroids) ** 2).sum(axis=2)
    nearest = distances.argmin(axis=1) == motions[split[1]]
    assert abs(nearest.mean() - 1 / 8) <= 3 * math.sqrt(1 / 8 * 7 / 8 / count)
    # the same features and classifier do see what a frame shows
    seen = ridge_accuracy(colour[split[0]], hues[split[0]], colour[split[1]], hues[split[1]])
    assert seen.mean() > 0.5


def test_every_pair_of_labels_stands_once_in_64_clips(root):
    motion, appearance = labels_of(source(root)), labels_of(source(root, label="appearance"))
    assert sorted(zip(motion, appearance)) == [(m, h) for m in range(8) for h in range(8)]
    images = source(root, kind="images")
    assert np.bincount(labels_of(images), minlength=8).tolist() == [2] * 8
    assert images.frames is None
    assert source(root).frames == Frames(8, 2, "interval")
    assert source(root).classes == list(shapes.MOTIONS)
    assert images.classes == list(shapes.HUES)


def test_lists_and_annotations_say_what_the_source_says(root):
    with open(root / "annotations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 64 + 8 + 16 + 8
    for kind, split, label in [
        ("clips", "train", "motion"),
        ("clips", "test", "appearance"),
        ("images", "train", "appearance"),
        ("images", "test", "appearance"),
    ]:
        ours = source(root, kind=kind, split=split, label=label)
        lines = (root / "lists" / f"{kind}_{split}_{label}.txt").read_text().splitlines()
        assert [line.split() for line in lines] == [[p, str(k)] for p, k in zip(ours.paths, labels_of(ours))]
        names = (root / "lists" / f"classes_{label}.txt").read_text().split()
        named = [row[label] for row in rows if (row["kind"], row["split"]) == (kind, split)]
        assert named == [names[k] for k in labels_of(ours)]
        assert all(ours.path(index).exists() for index in range(len(ours)))
    assert not (root / "lists" / "images_train_motion.txt").exists()


def test_some_motions_make_a_dataset_of_their_own(tmp_path):
    few = {"clips": 32, "test_clips": 16, "images": 8, "motions": ["shrink", "grow"]}
    ours = source(tmp_path / "two", **few)
    assert ours.classes == ["shrink", "grow"] and ours.reversed_labels == [1, 0]
    hues = source(tmp_path / "two", **few, label="appearance")
    assert hues.reversed_labels == list(range(8))
    assert sorted(zip(labels_of(ours), labels_of(hues))) == sorted([(m, h) for m in range(2) for h in range(8)] * 2)
    assert (tmp_path / "two" / "lists" / "classes_motion.txt").read_text() == "shrink\ngrow\n"
    recipe = shape_files.Recipe.model_validate(SMALL | few)
    item = next(item for item in shape_files.items(recipe) if item.kind == "clips")
    assert item.motion is not None and shapes.MOTIONS[item.motion] == recipe.classes("motion")[labels_of(ours)[0]]
    drawn = shapes.render_clip(shape_files.draw(recipe, item), item.motion, 32, 6).astype(float)
    read = read_clip(tmp_path / "two" / item.path)
    assert np.mean((read - drawn) ** 2) < np.mean((read - drawn[::-1]) ** 2)
    # the first clips have all labels alike; a reverse that has no label of its own is not made up
    assert np.bincount(labels_of(source(tmp_path / "two", **few, limit=16))).tolist() == [8, 8]
    for motions, known in ((["right", "up"], None), (["right", "down", "left"], None), (["grow", "shrink"], [1, 0])):
        recipe = shape_files.Recipe.model_validate({"motions": motions})
        assert shape_files.reversed_labels(recipe, "motion") == known


def test_no_test_clip_is_drawn_as_a_training_clip(root):
    """Whatever the motions, so that a model may be tested on another dataset than the one it has seen."""
    drawn = {}
    for split in ("train", "test"):
        scenes = set()
        for motions in (None, ["right", "left"], ["grow", "shrink"]):
            recipe = shape_files.Recipe.model_validate({"clips": 64, "test_clips": 64, "motions": motions})
            items = [item for item in shape_files.items(recipe) if item.split == split]
            scenes |= {shape_files.draw(recipe, item).objects[0].middle for item in items}
        drawn[split] = scenes
    assert drawn["train"] and not drawn["train"] & drawn["test"]


def read_clip(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec.canonical_name == "vp9"
        assert stream.codec_context.pix_fmt == "yuv420p"
    return np.stack(frames)


def read_image(path):
    image = cv2.imread(str(path))
    assert image is not None
    return image[..., ::-1]


def test_files_decode_to_what_was_drawn(root):
    recipe = shape_files.Recipe.model_validate(SMALL)
    for kind, shape in (("clips", (6, 32, 32, 3)), ("images", (32, 32, 3))):
        chosen = [item for item in shape_files.items(recipe) if (item.kind, item.split) == (kind, "test")]
        drawn, read = [], []
        for item in chosen:
            scene = shape_files.draw(recipe, item)
            if kind == "clips":
                drawn.append(shapes.render_clip(scene, item.motion or 0, 32, 6))
                read.append(read_clip(root / item.path))
            else:
                drawn.append(shapes.render_frame(scene, 0, 32))
                read.append(read_image(root / item.path))
            assert read[-1].shape == shape
        differences = np.array([[np.mean((r.astype(float) - d) ** 2) for d in drawn] for r in read])
        np.testing.assert_array_equal(differences.argmin(axis=1), np.arange(len(chosen)))
        # in a clip the right order is nearer than the reversed one
        if kind == "clips":
            for r, d in zip(read, drawn):
                assert np.mean((r.astype(float) - d) ** 2) < np.mean((r.astype(float) - d[::-1]) ** 2)


def test_same_options_give_the_same_bytes(root, tmp_path):
    moving_shapes.write(tmp_path / "two", shape_files.Recipe.model_validate(SMALL), processes=2)
    files = digests(root)
    assert files == digests(tmp_path / "two")
    media = [value for name, value in files.items() if name.endswith((".webm", ".jpg"))]
    assert len(media) == len(set(media)) == 96


def test_another_seed_gives_other_files(root, tmp_path):
    recipe = shape_files.Recipe.model_validate(
        {**SMALL, "clips": 1, "test_clips": 1, "images": 1, "test_images": 1, "seed": 1}
    )
    moving_shapes.write(tmp_path / "other", recipe, processes=1)
    media = {v for name, v in digests(tmp_path / "other").items() if name.endswith((".webm", ".jpg"))}
    assert len(media) == 4
    assert not media & set(digests(root).values())


def test_files_are_written_once(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert len(source(root)) == 64
    assert capsys.readouterr().err == ""
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


def test_a_root_made_otherwise_is_refused(root, tmp_path):
    with pytest.raises(
        DataError, match=r"made with clips=64 \(asked: 63\); remove that directory or name another root"
    ):
        source(root, clips=63)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="holds something else"):
        source(tmp_path / "photos")
    with pytest.raises(DataError, match="cannot write moving_shapes"):
        source(tmp_path / "photos" / "cat.jpg" / "shapes")


def test_wrong_options_are_refused(root):
    with pytest.raises(ConfigError, match="images have no motion"):
        source(root, kind="images", label="motion")
    with pytest.raises(ConfigError, match="limit is 65, but there are 64 clips in the split 'train'"):
        source(root, limit=65)
    with pytest.raises(ConfigError, match="motions must differ from one another, got right, right"):
        source(root, motions=["right", "right"])
    with pytest.raises(ConfigError, match=r"motions.*'shrink', got 'sideways'"):
        source(root, motions=["sideways"])
    with pytest.raises(ConfigError, match="motions"):
        source(root, motions=[])
    with pytest.raises(DataError, match=r"made with motions=None \(asked: \['left', 'right'\]\)"):
        source(root, motions=["left", "right"])
    with pytest.raises(ConfigError, match="size"):
        source(root, size=95)
    with pytest.raises(ConfigError, match="did you mean 'clips'"):
        source(root, clip=64)


ENSURE = "import sys; from bevt_fast.data.sources.moving_shapes import Options, ensure; "
ENSURE += "ensure(Options.model_validate_json(sys.argv[1]))"


def start(root):
    options = moving_shapes.Options.model_validate({**SMALL, "root": str(root)})
    environment = os.environ | {"PYTHONPATH": str(Path(moving_shapes.__file__).parents[3])}
    command = [sys.executable, "-c", ENSURE, options.model_dump_json()]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def test_two_processes_write_one_dataset(root, tmp_path):
    processes = [start(tmp_path / "shared") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sum("writing moving_shapes: 72 clips and 24 images" in text for text in said) == 1
    assert digests(tmp_path / "shared") == digests(root)


def test_a_killed_generation_is_done_again(root, tmp_path):
    place = tmp_path / "killed"
    process = start(place)
    while not list(tmp_path.glob(".killed.partial/clips/train/*.webm")):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not place.exists()
    source(place)
    assert digests(place) == digests(root)
    assert not (tmp_path / ".killed.partial").exists()


def test_a_failing_writer_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(moving_shapes.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="2 of 2 writing processes failed: killed"):
        moving_shapes.write(tmp_path / "none", shape_files.Recipe.model_validate(SMALL), processes=2)
    assert not (tmp_path / "none").exists()
