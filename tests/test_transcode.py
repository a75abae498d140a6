"""`prepare.py transcode` as a user runs it: what is written, what is refused, and that a wrong file is noticed."""

import fcntl
import json
import os
import resource
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from bevt_fast import prepare
from bevt_fast.config import Part
from bevt_fast.data import coding, decode, phases, sources, transcode
from bevt_fast.data.coding import Recipe, Task
from bevt_fast.data.decode import BadFile, probe, read_frames
from bevt_fast.errors import DataError
from tests.data import media
from tests.data.test_decode import VIDEOS
from tests.training.command import environment

ROOT = Path(__file__).resolve().parents[1]
SMALL = Recipe(short_side=48, stride=4)


def run(capsys, data, out, *more):
    """Exit code, output and errors of the program, in this process."""
    code = prepare.main(["transcode", "--data", str(data), "--out", str(out), "--workers", "1", *more])
    said = capsys.readouterr()
    return code, said.out, said.err


def numbers(path):
    return [media.number(frame) for frame in decode.each_frame(path)]


@pytest.fixture
def data(tmp_path):
    """Three videos in two classes, with blanks in their names."""
    folder = tmp_path / "data"
    for name, codec in (("a cat/one 1.mp4", "libx264"), ("a cat/two.avi", "mpeg4"), ("dog/one 1.mp4", "libx264")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        media.video(folder / name, codec, frames=20)
    return folder


def test_a_folder_keeps_its_paths_classes_and_frames(data, tmp_path, capsys):
    out = tmp_path / "out"
    code, said, errors = run(capsys, data, out, "--short-side", "48", "--stride", "3")
    assert (code, errors) == (0, "") and "3 videos written" in said and "0 were there already" in said
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.mp4"))
    assert files == ["a cat/one 1.mp4", "a cat/two.mp4", "dog/one 1.mp4"]
    assert (out / "list.txt").read_text() == "a cat/one 1.mp4 0\na cat/two.mp4 0\ndog/one 1.mp4 1\n"
    assert not (out / "quarantine.jsonl").exists()
    for name in files:
        assert numbers(out / name) == list(range(20))
        assert probe(out / name)[:3] == (20, 48, 72) and probe(out / name).layout == phases.Layout(3, 20)
    setting = said.split("--set '")[1].split("'\n")[0]
    key, value = setting.split("=", 1)
    source = sources.build(Part(**json.loads(value)))
    assert key == "clips.source" and source.paths == files and source.frames is not None and source.frames.stride == 3
    assert source.labels is not None and source.labels.tolist() == [0, 0, 1]
    assert sources.build(Part(name="file_list", options={"root": str(out)})).paths == files  # and as a folder


def test_what_is_finished_is_kept_and_what_changed_is_written_again(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(capsys, data, out, "--short-side", "48")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert "0 videos written; 3 were there" in run(capsys, data, out, "--short-side", "48")[1]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == before
    media.video(data / "dog" / "one 1.mp4", "libx264", frames=31)
    (out / "a cat" / "two.mp4").unlink()
    (out / "a cat" / "one 1.mp4").write_bytes(b"")  # as a crash of the machine leaves it
    assert "3 videos written" in run(capsys, data, out, "--short-side", "48")[1]
    assert len(numbers(out / "dog" / "one 1.mp4")) == 31
    for change in (["--short-side", "32"], ["--short-side", "32", "--crf", "30"], ["--layout", "plain"]):
        assert "3 videos written" in run(capsys, data, out, *change)[1]
    assert probe(out / "dog" / "one 1.mp4").layout is None


def test_bad_files_are_named_once_and_the_others_are_written(data, tmp_path, capsys):
    (data / "dog" / "empty.mp4").write_bytes(b"")
    (data / "dog" / "text.mp4").write_text("not a video" * 100)
    media.sound(data / "a cat" / "sound.mp4")
    whole = media.video(data / "a cat" / "cut.mp4", "libx264").read_bytes()
    (data / "a cat" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    for _ in range(2):
        code, _, errors = run(capsys, data, out, "--short-side", "48")
        assert code == 3 and errors.count("\n") == 1 and "4 of 7 videos could not be transcoded" in errors
        records = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
        assert [Path(record["path"]).name for record in records] == ["cut.mp4", "sound.mp4", "empty.mp4", "text.mp4"]
        assert [record["kind"] for record in records] == ["truncated", "no_video", "empty", "unreadable"]
        assert all(set(record) == {"stream", "path", "kind", "reason"} for record in records)
        assert len((out / "list.txt").read_text().splitlines()) == 3
    (data / "a cat" / "cut.mp4").write_bytes(whole)
    for name in ("dog/empty.mp4", "dog/text.mp4", "a cat/sound.mp4"):
        (data / name).unlink()
    assert run(capsys, data, out, "--short-side", "48")[0] == 0
    assert not (out / "quarantine.jsonl").exists() and len((out / "list.txt").read_text().splitlines()) == 4
    assert not list(out.rglob("*.part"))


def test_processes_write_what_one_would(data, tmp_path, program):
    """As JPEGs: of equal pixels libx264 makes other bytes now and then (5 of 7,570 files of 20 frames, one thread)."""
    (data / "dog" / "bad.mp4").write_bytes(b"")
    trees = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        arguments = ["transcode", "--data", data, "--out", out, "--workers", workers, "--short-side", 48]
        arguments += ["--codec", "mjpeg"]
        done = program("bevt_fast/prepare.py", *arguments, check=3)
        assert "3 videos written" in done.stdout and done.stderr.startswith("error: 1 of 4")
        trees.append({path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert trees[0] == trees[1]


def _die(task):
    os._exit(1)


def test_a_process_that_dies_is_one_sentence():
    with pytest.raises(DataError, match="a process that was coding died"):
        with transcode._many(_die, [Task("", "")] * 3, 2) as outcomes:
            list(outcomes)


@pytest.mark.parametrize("name", [*VIDEOS, "turned.mp4"])
def test_any_video_becomes_one_of_the_shown_frames(name, tmp_path):
    """Frame k stays frame k, also of files with irregular times or none; even sizes, upright, never larger."""
    given: dict = VIDEOS.get(name, {"codec": "libx264", "rotation": 90})
    source = media.video(tmp_path / name, frames=23, **given)
    out = tmp_path / "out.mp4"
    assert coding.write(Task(str(source), str(out)), Recipe(short_side=256, stride=4))
    height, width = read_frames(source, [0]).shape[1:3]
    found = probe(out)
    assert tuple(found)[:6] == (23, height // 2 * 2, width // 2 * 2, "h264", "yuv420p", 0)
    upright = [cv2.rotate(f, cv2.ROTATE_90_CLOCKWISE) if name == "turned.mp4" else f for f in decode.each_frame(out)]
    assert [media.number(frame) for frame in upright] == list(range(23))


@pytest.mark.parametrize("codec", coding.CODINGS)
@pytest.mark.parametrize("stride", [1, 8])
def test_every_codec(codec, stride, tmp_path):
    source = media.video(tmp_path / "source.webm", "libvpx-vp9", frames=20, rate=30)
    out = tmp_path / "out"
    coding.write(Task(str(source), str(out)), SMALL._replace(codec=codec, stride=stride, crf=30))
    assert numbers(out) == list(range(20)) and probe(out).codec == codec
    assert probe(out).rate == pytest.approx(Fraction(30), rel=0.01)  # webm counts in milliseconds


@pytest.mark.parametrize(
    "size, short, expected",
    [
        ((1080, 1920), 256, (256, 454)),
        ((256, 341), 256, (256, 340)),
        ((129, 171), 256, (128, 170)),
        ((1920, 1080), 255, (452, 254)),
        ((1, 1), 256, (2, 2)),
        ((2, 5000), 256, (2, 5000)),
    ],
)
def test_sizes_are_even_and_never_larger(size, short, expected):
    height, width = size
    assert coding.target_size(height, width, short) == expected


def test_a_list_keeps_labels_parts_and_absolute_paths(data, tmp_path, capsys):
    lists = {
        "labels": ("a cat/one 1.mp4 7\ndog/one 1.mp4 5\n", "a cat/one 1.mp4 7\ndog/one 1.mp4 5\n"),
        "parts": ("a cat/one 1.mp4 3 10\na cat/one 1.mp4 0 -1\n", "a cat/one 1.mp4 3 10\na cat/one 1.mp4 0 -1\n"),
        "names": (f"{data}/a cat/two.avi\n", "a cat/two.mp4\n"),
    }
    for name, (text, expected) in lists.items():
        (data / f"{name}.txt").write_text(text)
        out = tmp_path / name
        assert run(capsys, data / f"{name}.txt", out, "--short-side", "48")[0] == 0
        assert (out / "list.txt").read_text() == expected
    source = sources.build(Part(name="file_list", options={"root": str(tmp_path / "parts"), "list": "list.txt"}))
    found = [numbers_of_part(source, i) for i in range(2)]
    assert found == [list(range(3, 13)), list(range(20))]
    assert len(list((tmp_path / "labels").rglob("*.mp4"))) == 2


def numbers_of_part(source, i):
    count = probe(source.path(i), source.extent(i)).frames
    return [media.number(frame) for frame in read_frames(source.path(i), range(count), source.extent(i))]


def test_folders_of_frames_become_videos(tmp_path, capsys):
    for folder, count in (("frames/v1.2", 9), ("frames/w", 6)):
        (tmp_path / folder).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(media.picture(k)).save(tmp_path / folder / f"img_{k + 1:05d}.png")
    (tmp_path / "list.txt").write_text("frames/v1.2 8 3\nframes/w 6 4\n")
    out = tmp_path / "out"
    assert run(capsys, tmp_path / "list.txt", out, "--stride", "4")[0] == 0
    assert (out / "list.txt").read_text() == "frames/v1.2.mp4 3\nframes/w.mp4 4\n"
    assert numbers(out / "frames" / "v1.2.mp4") == list(range(8))  # as many as the list says
    assert numbers(out / "frames" / "w.mp4") == list(range(6))


def test_names_that_lists_find_hard(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    one = media.video(data / "plain.mp4", "libx264", frames=5).read_bytes()
    for name in ("#1.mp4", " lead.mp4", 'a "b".mp4', "x, 5.mp4", "3 4.mp4", "tief ☃.mp4", "plain.MKV"):
        (data / name).write_bytes(one)
    code, said, errors = run(capsys, data, tmp_path / "out", "--no-check")
    assert (code, errors) == (0, "") and "8 videos written" in said
    source = sources.build(Part(name="file_list", options={"root": str(tmp_path / "out"), "list": "list.txt"}))
    assert len(source) == 8 and all(probe(source.path(i)).frames == 5 for i in range(8))
    (data / "a\nb.mp4").write_bytes(one)
    code, _, errors = run(capsys, data, tmp_path / "out", "--no-check")
    assert code == 3 and "a list cannot hold all of their names" in errors and errors.count("\n") == 1
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 9


@pytest.mark.parametrize(
    "data, out, more, code, sentence",
    [
        ("{data}", "{data}", [], 3, "lies inside the data"),
        ("{data}", "{data}/small", [], 3, "lies inside the data"),
        ("{data}", "{tmp}/link/small", [], 3, "lies inside the data"),
        ("{data}/list.txt", "{data}/dog/small", [], 3, "lies inside the data"),
        ("{data}", "{data}/list.txt/x", [], 3, "lies inside the data"),
        ("{data}", "{tmp}/file", [], 3, "cannot write to"),
        ("{data}", "/proc/none", [], 3, "cannot write to"),
        ("{tmp}/nowhere", "{tmp}/out", [], 3, "there is nothing at"),
        ("{tmp}/images", "{tmp}/out", [], 3, "transcode takes videos"),
        ("{data}", "{tmp}/out", ["--crf", "52"], 2, "--crf 52 is not between 1 and 51"),
        ("{data}", "{tmp}/out", ["--short-side", "2"], 2, "--short-side 2 is not between"),
        ("{data}", "{tmp}/out", ["--stride", "99999999999999999999"], 2, "--stride 99999999999999999999 is not"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(fresh, capsys, data, out, more, code, sentence):
    places = {"data": fresh / "data", "tmp": fresh}
    found, _, errors = run(capsys, data.format(**places), out.format(**places), *more)
    assert found == code and sentence in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not (fresh / "out").exists()


@pytest.fixture
def fresh(tmp_path):
    (tmp_path / "data" / "dog").mkdir(parents=True)
    media.video(tmp_path / "data" / "dog" / "a.mp4", "libx264", frames=3)
    (tmp_path / "data" / "list.txt").write_text("dog/a.mp4 1\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    return tmp_path


def test_files_of_others_are_never_replaced(fresh, capsys):
    (fresh / "out" / "dog").mkdir(parents=True)
    mine = media.video(fresh / "out" / "dog" / "a.mp4", "libx264", frames=9)
    for content in (mine.read_bytes(), b"my thesis"):
        mine.write_bytes(content)
        code, _, errors = run(capsys, fresh / "data", fresh / "out")
        assert code == 3 and "was not written by transcode" in errors and mine.read_bytes() == content
    (fresh / "data" / "data").mkdir()
    (fresh / "data" / "data" / "x.mp4").write_bytes(b"x")
    (fresh / "data" / "x.mp4").write_bytes(b"x")
    code, _, errors = run(capsys, fresh / "data", fresh)
    assert code == 3 and not (fresh / "quarantine.jsonl").exists() and "is part of the data" in errors


def test_two_runs_do_not_write_to_one_folder(fresh, capsys):
    (fresh / "out").mkdir()
    with (fresh / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, errors = run(capsys, fresh / "data", fresh / "out")
    assert code == 3 and "another program is writing" in errors


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "bevt_fast/prepare.py", "transcode", "--data", data, "--out", out, "--workers", "1"]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert done.returncode == 3 and done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert "run the same command again" in done.stderr
    assert not list(out.rglob("*.mp4")) and not list(out.rglob("*.part"))


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    return media.video(tmp_path_factory.mktemp("moving") / "v.mkv", "ffv1", pixel_format="bgr0", frames=37)


PICTURES = {
    "one late": lambda frames: [frames[0], *frames[:-1]],
    "one early": lambda frames: [*frames[1:], frames[-1]],
    "four late": lambda frames: [*frames[:4], *frames[:-4]],
    "backwards": lambda frames: frames[::-1],
    "two swapped": lambda frames: [frames[k + 1 - 2 * (k % 2)] if k < 36 else frames[k] for k in range(37)],
    "mirrored": lambda frames: [frame[:, ::-1].copy() for frame in frames],
    "red is blue": lambda frames: [frame[..., ::-1].copy() for frame in frames],
    "grey": lambda frames: [np.repeat(frame[..., 1:2], 3, axis=2) for frame in frames],
    "blurred": lambda frames: [cv2.blur(frame, (9, 9)) for frame in frames],
    "dark": lambda frames: [frame // 2 for frame in frames],
    "mixed": lambda frames: [frame // 2 + after // 2 for frame, after in zip(frames, [*frames[1:], frames[0]])],
    "stopped": lambda frames: [frames[0]] * 37,
    "one lost": lambda frames: frames[:-1],
    "one more": lambda frames: [*frames, frames[-1]],
}


@pytest.mark.parametrize("codec", ["h264", "vp9"])
@pytest.mark.parametrize("fault", [None, *PICTURES])
def test_wrong_pictures_are_found(fault, codec, moving, tmp_path, monkeypatch):
    if fault:
        frames = list(decode.each_frame(moving))
        monkeypatch.setattr(decode, "each_frame", lambda path: iter(PICTURES[fault](frames)))
        whole = decode.probe
        lost = {"one lost": 36, "one more": 38}.get(fault, 37)
        monkeypatch.setattr(coding.decode, "probe", lambda *given: whole(*given)._replace(frames=lost))
    written = tmp_path / "out"
    recipe = SMALL._replace(codec=codec)
    coding.write(Task(str(moving), str(written)), recipe, check=False)
    monkeypatch.undo()
    if fault is None:
        return coding.compare(Task(str(moving), "x"), recipe, written)
    with pytest.raises(BadFile, match="does not show it"):
        coding.compare(Task(str(moving), "x"), recipe, written)


shown = phases.shown  # as it is before a test puts another in its place
ORDERS = {
    "ordinary": lambda n, layout: list(range(n)),
    "another stride": lambda n, layout: shown(range(n), phases.Layout(layout.stride + 1, n)),
    "inverse": lambda n, layout: phases.stored(range(n), layout),
    "phases swapped": lambda n, layout: sorted(range(n), key=lambda k: (-(k % layout.stride), k)),
}


@pytest.mark.parametrize("fault", ORDERS)
def test_a_wrong_order_is_found(fault, moving, tmp_path, monkeypatch):
    monkeypatch.setattr(coding.phases, "shown", lambda given, layout: ORDERS[fault](len(given), layout))
    target = tmp_path / "out.mp4"
    with pytest.raises(BadFile, match="does not show it and was deleted: frame"):
        coding.write(Task(str(moving), str(target)), SMALL)
    assert not list(tmp_path.iterdir())


def test_too_few_keyframes_are_found(moving, tmp_path):
    target = tmp_path / "out.mp4"
    coding.write(Task(str(moving), str(target)), SMALL._replace(gop=5))
    with pytest.raises(BadFile, match="stored at 4 is no keyframe"):
        coding.compare(Task(str(moving), str(target)), SMALL._replace(gop=4), target)


@pytest.mark.parametrize("codec", coding.CODINGS)
@pytest.mark.parametrize("crf", [10, 18, 30, 45])
def test_hard_pictures_raise_no_false_alarm(codec, crf, tmp_path):
    """Noise, the most that a codec can be asked for; a still scene with grain; and a still scene without."""
    rng = np.random.default_rng(0)
    still = cv2.resize(rng.integers(0, 256, (8, 12, 3), np.uint8), (96, 64))
    scenes = {
        "noise": rng.integers(0, 256, (12, 64, 96, 3), np.uint8),
        "grain": np.clip(still + rng.normal(0, 12, (12, 64, 96, 3)), 0, 255).astype(np.uint8),
        "still": np.repeat(still[None], 12, axis=0),
    }
    for name, frames in scenes.items():
        folder = tmp_path / name
        folder.mkdir()
        for k, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{k}.png")
        assert coding.write(Task(str(folder), str(tmp_path / f"{name}.out")), Recipe(64, 4, 4, crf, codec))


def test_long_videos_wait_on_the_disk_and_are_compared_in_pieces(moving, tmp_path, monkeypatch):
    monkeypatch.setattr(coding, "IN_MEMORY", 10_000)
    monkeypatch.setattr(coding, "AT_ONCE", 1)
    assert coding.write(Task(str(moving), str(tmp_path / "out.mp4")), SMALL)
    assert numbers(tmp_path / "out.mp4") == list(range(37))
    # and a transcode is a video like any other
    assert coding.write(Task(str(tmp_path / "out.mp4"), str(tmp_path / "again.mp4")), SMALL._replace(stride=7))
    assert numbers(tmp_path / "again.mp4") == list(range(37))


def test_sound_is_left_out_and_a_moving_shapes_folder_is_taken(tmp_path, capsys):
    root = tmp_path / "shapes"
    assert prepare.main(["moving_shapes", "--root", str(root), "--clips", "3", "--images", "2", "--size", "32",
                         "--test-clips", "1", "--test-images", "1", "--length", "6"]) == 0  # fmt: skip
    code, said, _ = run(capsys, root, tmp_path / "out", "--codec", "vp9", "--stride", "2")
    assert code == 0 and "3 videos written" in said and "images stay as they are" in said
    assert len(list((tmp_path / "out").rglob("*.webm"))) == 3
    both = tmp_path / "both.mp4"
    with av.open(str(both), "w") as output:
        picture, sound = output.add_stream("libx264", rate=25), output.add_stream("aac", rate=16000, layout="mono")
        picture.width, picture.height, picture.pix_fmt = 96, 64, "yuv420p"
        for k in range(8):
            output.mux(picture.encode(av.VideoFrame.from_ndarray(media.picture(k), format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate, samples.pts = 16000, 1024 * k
            output.mux(sound.encode(samples))
        output.mux(picture.encode())
        output.mux(sound.encode())
    coding.write(Task(str(both), str(tmp_path / "quiet.mp4")), SMALL)
    with av.open(str(tmp_path / "quiet.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_help_says_what_players_show(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["transcode", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "A plain player shows the phases one after another" in said
