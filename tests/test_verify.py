"""prepare.py verify: the row of every kind of file, lists without the bad ones, and what must not end the program."""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from bevt_fast import prepare
from bevt_fast.config import Part, load
from bevt_fast.data import sources
from bevt_fast.data.sources import Frames
from bevt_fast.data.verify import processes, summary
from bevt_fast.data.verify.examine import Job, examine, look
from bevt_fast.training.quarantine import Quarantine
from tests.data import media
from tests.training.command import ROOT, environment

PREPARE = "bevt_fast/prepare.py"
FAST = {"deadline": "realtime", "cpu-used": "8"}
VP9 = {"codec": "libvpx-vp9", "options": FAST}
IRREGULAR = np.cumsum(np.random.RandomState(0).randint(10, 90, 40)).tolist()


def verify(*arguments, out):
    return prepare.main(["verify", *map(str, arguments), "--out", str(out), "--workers", "1"])


def report(out):
    with (out / "report.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def bad_files(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def settings(text):
    """The sources that the printed settings name, by key."""
    found = {}
    for line in text.splitlines():
        if " --set " in line:
            key, value = shlex.split(line.split(" --set ")[1])[0].split("=", 1)
            found[key] = sources.build(Part(**json.loads(value)))
    return found


def flip(path, good, number):
    """A copy of `good` in which the packet `number` is noise."""
    content = bytearray(good.read_bytes())
    at, size, _ = media.packets(good)[number]
    content[at + 8 : at + size] = np.random.RandomState(1).bytes(size - 8)
    path.write_bytes(content)


def folder_of_frames(folder, count=6):
    folder.mkdir(parents=True)
    for k in range(count):
        Image.fromarray(media.picture(k)).save(folder / f"{k + 1}.jpg")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """One file of every kind, and a list of them with labels."""
    folder = tmp_path_factory.mktemp("clips")
    good = media.video(folder / "good file, 1.mp4", "libx264")
    media.video(folder / "vp9.webm", **VP9)
    media.video(folder / "odd.webm", **VP9, size=(129, 171))
    media.video(folder / "bframes.avi", "mpeg4", options={"bf": "2"})
    media.video(folder / "ten.mkv", "ffv1", pixel_format="yuv422p10le", frames=6)
    media.video(folder / "turned.mp4", "libx264", rotation=90, frames=6)
    media.video(folder / "vfr.webm", **VP9, times=IRREGULAR)
    media.video(folder / "one.webm", **VP9, frames=1)
    media.sound(folder / "sound.mp4")
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 99)
    (folder / "cut.mp4").write_bytes(good.read_bytes()[:3000])
    flip(folder / "flipped.mp4", good, 20)
    Image.fromarray(media.picture(1)).save(folder / "x.png")
    (folder / "x.png").rename(folder / "picture.mp4")
    folder_of_frames(folder / "frames")
    (folder / "no frames").mkdir()
    names = sorted(path.name for path in folder.iterdir())
    (folder / "list.txt").write_text("".join(f"{name} {k}\n" for k, name in enumerate([*names, "gone.mp4"])))
    return folder


@pytest.fixture(scope="module")
def full(clips, tmp_path_factory):
    """The folder of a run to the depth full, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, PREPARE, "verify", "--data", clips / "list.txt", "--out", out, "--depth", "full"]
    done = subprocess.run([*command, "--workers", "2"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 9 of 17 files are bad; ") and "Traceback" not in done.stderr
    return out, done.stdout


H264 = {"codec": "h264", "pixel_format": "yuv420p", "nvdec": "yes (by table)", "decoder": "pyav"}
WEBM = {"codec": "vp9", "container": "matroska,webm", "nvdec": "yes (by table)"}
ROWS = {
    "good file, 1.mp4": H264 | {"status": "ok", "frames": "40", "width": "96", "height": "64", "rotation": "0",
        "container": "mov,mp4,m4a,3gp,3g2,mj2", "fps": "25.000", "duration_s": "1.600", "frame_rate": "constant",
        "keyframe_longest": "12", "keyframe_mean": "10.00", "depth": "full"},
    "vp9.webm": WEBM | {"status": "ok", "frame_rate": "constant"},
    "odd.webm": WEBM | {"status": "ok", "width": "171", "height": "129"},
    "vfr.webm": WEBM | {"status": "ok", "frame_rate": "variable"},
    "bframes.avi": {"status": "ok", "codec": "mpeg4", "frames": "40", "frame_rate": "unknown", "fps": "25.000"},
    "ten.mkv": {"status": "ok", "codec": "ffv1", "pixel_format": "yuv422p10le", "nvdec": "no (by table)"},
    "turned.mp4": H264 | {"status": "ok", "rotation": "90", "width": "64", "height": "96"},
    "frames": {"status": "ok", "container": "folder", "codec": "images", "frames": "6", "decoder": "pyav"},
    "one.webm": WEBM | {"status": "too_short", "frames": "1", "decoder": ""},
    "sound.mp4": {"status": "no_video"},
    "no frames": {"status": "no_video"},
    "empty.mp4": {"status": "empty", "bytes": "0"},
    "text.mp4": {"status": "unreadable"},
    "cut.mp4": {"status": "truncated", "bytes": "3000"},
    "flipped.mp4": H264 | {"status": "corrupt", "decoder": ""},
    "picture.mp4": {"status": "too_short", "codec": "png", "frames": "1"},
    "gone.mp4": {"status": "missing", "bytes": ""},
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_row_of_a_kind_of_file(full, clips, name):
    (row,) = [row for row in report(full[0]) if row["path"] == str(clips / name)]
    assert {column: row[column] for column in ROWS[name]} == ROWS[name]
    assert (row["reason"] == "") == (row["status"] == "ok")


def test_the_report_stands_in_the_order_of_the_list(full, clips):
    listed = [line.rsplit(" ", 1)[0] for line in (clips / "list.txt").read_text().splitlines()]
    assert [row["path"] for row in report(full[0])] == [str(clips / name) for name in listed]
    assert sorted(listed) == sorted(ROWS)


def test_what_decodes_up_to_the_damage_is_good_at_the_lesser_depths(clips, tmp_path):
    good = clips / "good file, 1.mp4"
    (tmp_path / "v").mkdir()
    flip(tmp_path / "v" / "middle.mp4", good, 28)  # the third of four groups
    flip(tmp_path / "v" / "between.mp4", good, 20)  # the second
    for depth, expected in (("headers", ["ok", "ok"]), ("ends", ["ok", "corrupt"]), ("full", ["corrupt", "corrupt"])):
        verify("--data", tmp_path / "v", "--depth", depth, out=tmp_path / depth)
        assert [row["status"] for row in report(tmp_path / depth)] == expected


def test_the_list_of_good_files_reads_back_as_the_same_samples(full, clips):
    source = settings(full[1])["clips.source"]
    labels = dict(line.rsplit(" ", 1) for line in (clips / "list.txt").read_text().splitlines())
    good = [name for name in labels if ROWS[name]["status"] == "ok"]
    assert source.paths == good and source.root == clips
    assert source.labels.tolist() == [int(labels[name]) for name in good]
    assert source.frames == Frames(16, 8) and source.min_frames == 2


def test_the_bad_files_are_written_as_a_run_writes_them(full, clips):
    bad = {name: row["status"] for name, row in ROWS.items() if row["status"] != "ok"}
    records = bad_files(full[0])
    assert {Path(record["path"]).name: record["kind"] for record in records} == bad and len(records) == len(bad)
    keys = {"stream", "path", "kind", "reason", "epoch", "index", "substitute"}
    assert all(record.keys() == keys and record["stream"] == "clips" for record in records)
    quarantine = Quarantine(full[0] / "quarantine.jsonl", {"clips": 17}, 0.25)
    assert len(quarantine) == 9 and "9 of 17 files of clips are bad" in (quarantine.verdict() or "")


def test_the_summary_says_what_there_is_and_what_to_do(full):
    text = (full[0] / "summary.txt").read_text()
    assert text == full[1]
    for part in (
        "17 files, 9 bad", "2 too_short", "1 missing", "1 corrupt", "3 vp9 yuv420p", "1 have a variable frame rate",
        "1 have no trustworthy times", "8 have fewer frames than the 121", "keyframes are up to 12 frames apart",
    ):  # fmt: skip
        assert part in text


def test_images(tmp_path, capsys):
    data, pixels = tmp_path / "images", Image.fromarray(media.picture(3))
    for label in ("cat", "dog"):
        (data / label).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels.save(data / "cat" / "turned.jpg", exif=exif)
    pixels.convert("CMYK").save(data / "cat" / "cmyk.jpg")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(data / "cat" / "deep.png")
    pixels.resize((1, 1)).save(data / "dog" / "dot.png")
    pixels.save(data / "dog" / "cut.jpg")
    (data / "dog" / "cut.jpg").write_bytes((data / "dog" / "cut.jpg").read_bytes()[:700])
    pixels.save(data / "dog" / "png.jpg", format="png")
    (data / "dog" / "text.png").write_text("no")
    assert verify("--data", data, out=tmp_path / "out") == 3
    rows = {Path(row["path"]).name: row for row in report(tmp_path / "out")}
    expected = {
        "turned.jpg": ("ok", "JPEG", "RGB", "6"),
        "cmyk.jpg": ("ok", "JPEG", "CMYK", ""),
        "deep.png": ("ok", "PNG", "I;16", ""),
        "dot.png": ("ok", "PNG", "RGB", ""),
        "cut.jpg": ("truncated", "JPEG", "RGB", ""),
        "png.jpg": ("ok", "PNG", "RGB", ""),
        "text.png": ("unreadable", "", "", ""),
    }
    columns = ("status", "codec", "pixel_format", "exif_orientation")
    assert {name: tuple(row[column] for column in columns) for name, row in rows.items()} == expected
    assert rows["turned.jpg"]["width"] == "96" and rows["dot.png"]["height"] == "1"
    said = capsys.readouterr().out
    source = settings(said)["images.source"]
    assert source.paths == ["cat/cmyk.jpg", "cat/deep.png", "cat/turned.jpg", "dog/dot.png", "dog/png.jpg"]
    assert source.labels is not None and source.labels.tolist() == [0, 0, 0, 1, 1] and source.frames is None
    assert (tmp_path / "out" / "images_source_classes.txt").read_text() == "cat\ndog\n"
    assert "1 have an EXIF orientation" in said


def test_parts_of_files_stay_parts(tmp_path, capsys):
    data = tmp_path / "data"
    folder_of_frames(data / "a b")
    media.video(data / "v.webm", **VP9)
    (data / "parts.txt").write_text("v.webm 0 10\nv.webm 10 30\nv.webm 20 30\nv.webm 0 -1\n")
    (data / "folders.csv").write_text("a b,6,3\n")
    assert verify("--data", data / "parts.txt", "--data", data / "folders.csv", out=tmp_path / "out") == 3
    rows = report(tmp_path / "out")
    assert [(row["first"], row["count"], row["frames"], row["status"]) for row in rows] == [
        ("0", "10", "10", "ok"), ("10", "30", "30", "ok"), ("20", "30", "40", "truncated"), ("0", "-1", "40", "ok"),
        ("0", "6", "6", "ok"),
    ]  # fmt: skip
    lists = sorted(path.name for path in (tmp_path / "out").glob("clips_source*"))
    assert lists == ["clips_source.txt", "clips_source_2.txt"]
    said = capsys.readouterr().out.splitlines()
    first, second = (settings(line)["clips.source"] for line in said if " --set " in line)
    assert first.paths == ["v.webm"] * 3 and first.labels is None
    assert [first.extent(k) for k in range(3)] == [(0, 10), (10, 30), (0, -1)]
    assert second.paths == ["a b"] and second.labels.tolist() == [3] and second.extent(0) == (0, 6)


def test_a_list_that_no_text_can_say_is_not_offered(tmp_path, capsys):
    data = tmp_path / "data"
    folder_of_frames(data / "a")
    (data / "parts.txt").write_text("a 0 7\na 1 4\n")
    assert verify("--data", data / "parts.txt", out=tmp_path / "out") == 3
    assert "no list can say these extents" in capsys.readouterr().out


def test_names_of_any_bytes(tmp_path, capsysbinary):
    data = tmp_path / "data"
    data.mkdir()
    names = ["two\nlines.webm", " blank #1.webm", os.fsdecode(b"latin\xe9.webm"), '"quoted", \t.webm']
    media.video(tmp_path / "v.webm", **VP9, frames=4)
    for name in names:
        (data / name).write_bytes((tmp_path / "v.webm").read_bytes())
    os.truncate(data / names[2], 100)
    for n in (1, 2):
        assert verify("--data", data, out=tmp_path / "out") == 3
        said = capsysbinary.readouterr().out.decode()
        assert f"{(0, 4)[n == 1]} checked" in said
    assert settings(said)["clips.source"].paths == sorted({*names} - {names[2]})
    assert [Path(record["path"]).name for record in bad_files(tmp_path / "out")] == [names[2]]


@pytest.fixture
def few(tmp_path):
    """Four small videos, and a place for the report."""
    data = tmp_path / "data"
    data.mkdir()
    media.video(data / "a.webm", **VP9, frames=8)
    for name in "bcd":
        (data / f"{name}.webm").write_bytes((data / "a.webm").read_bytes())
    return data, tmp_path / "out"


def checked(capsys):
    return int(capsys.readouterr().out.split(" checked in")[0].rsplit(" ", 1)[1])


def test_what_is_known_is_not_done_again(few, capsys):
    data, out = few
    counts = []
    for change in (
        lambda: None,
        lambda: None,
        lambda: os.utime(data / "b.webm", ns=(1, 1)),
        lambda: (data / "c.webm").write_bytes(b""),
        lambda: (out / "report.csv").write_bytes((out / "report.csv").read_bytes()[:-9]),  # cut within the last row
        lambda: (data / "d.webm").unlink(),
        lambda: None,
    ):
        change()
        verify("--data", data, out=out)
        counts.append(checked(capsys))
    assert counts == [4, 0, 1, 1, 1, 0, 0]
    assert [row["status"] for row in report(out)] == ["ok", "ok", "empty"]
    assert verify("--data", data, "--depth", "full", out=out) == 3 and checked(capsys) == 3
    assert verify("--data", data, "--depth", "headers", out=out) == 3 and checked(capsys) == 0
    assert {row["depth"] for row in report(out)} == {"full"}


def test_a_file_in_two_sources_is_checked_once_and_judged_in_each(few, capsys):
    data, out = few
    (data / "list.txt").write_text("d.webm 1\na.webm 0\n")
    os.truncate(data / "d.webm", 200)
    assert verify("--data", data, "--data", data / "list.txt", out=out) == 3
    assert len(report(out)) == 4 == checked(capsys)
    assert len(bad_files(out)) == 1
    assert (out / "clips_source_2.jsonl").read_text() == '{"path": "a.webm", "label": 0}\n'


def test_images_in_shards_are_checked_one_by_one(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    content = io.BytesIO()
    Image.fromarray(media.picture(1)).save(content, "JPEG")
    good = content.getvalue()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for name, data in (("a.jpg", good), ("b.jpg", good[: len(good) // 2]), ("sub/c.jpg", good)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    config = json.loads((ROOT / "configs" / "image.json").read_text())
    config["images"]["source"] = {"name": "webdataset", "options": {"root": str(tmp_path / "shards")}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    for checks in (3, 0):  # the second time all is known
        assert verify("--config", tmp_path / "run.json", out=tmp_path / "out") == 3
        assert checked(capsys) == checks
    for named in ("shards", "shards/0.tar"):
        assert verify("--data", tmp_path / named, out=tmp_path / "again") == 3
        assert checked(capsys) == (3 if named == "shards" else 0)
    rows = report(tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok", "truncated", "ok"]
    assert rows[0]["codec"] == rows[2]["codec"] == "JPEG"
    assert [Path(row["path"]).relative_to(tmp_path / "shards").as_posix() for row in rows] == [
        *("0.tar/a.jpg", "0.tar/b.jpg", "0.tar/sub/c.jpg")
    ]
    assert [bad["path"] for bad in bad_files(tmp_path / "out")] == [rows[1]["path"]]
    assert "no list names images in shards" in (tmp_path / "out" / "summary.txt").read_text()


def test_every_source_of_a_configuration(few, tmp_path, capsys):
    data, out = few
    Image.fromarray(media.picture(1)).save(data / "one.png")
    (data / "held.txt").write_text("b.webm\nc.webm\n")
    config = json.loads((ROOT / "configs" / "joint.json").read_text())
    source = {"name": "file_list", "options": {"root": "nowhere", "frames": 4, "stride": 2}}
    held = {"name": "file_list", "options": {"root": str(data), "list": "held.txt"}}
    config["clips"] |= {"source": source, "heldout": held}
    config["images"]["source"] = {"name": "file_list", "options": {"root": str(data), "kind": "images"}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    arguments = ["--config", tmp_path / "run.json"]
    assert verify(*arguments, out=out) == 3 and "nowhere" in capsys.readouterr().err
    assert verify(*arguments, "--set", f"clips.source.options.root={json.dumps(str(data))}", out=out) == 0
    said = capsys.readouterr().out
    found = settings(said)
    assert {key: len(source) for key, source in found.items()} == {
        "images.source": 1, "clips.source": 4, "clips.heldout": 2,
    }  # fmt: skip
    assert found["clips.source"].frames == Frames(4, 2)
    sets = [shlex.split(line.split(" --set ")[1])[0] for line in said.splitlines() if " --set " in line]
    clips = load(tmp_path / "run.json", sets).clips
    assert clips is not None and clips.source.options["list"] == str(out / "clips_source.jsonl")


@pytest.mark.parametrize(
    "arguments, code, sentence",
    [
        ([], 2, "give --data PATH, --config FILE"),
        (["--data", "{data}", "--workers", "0"], 2, "from 1, got 0"),
        (["--data", "{data}", "--timeout", "x"], 2, "--timeout"),
        (["--data", "{data}", "--depth", "deep"], 2, "--depth"),
        (["--data", "/nowhere"], 3, "there is nothing at /nowhere"),
        (["--data", "{data}/list.txt"], 3, "2 of 2 files looked for"),
        (["--config", "nowhere.json"], 2, "cannot read the configuration"),
        (["--data", "{data}", "--out", "{data}/a.webm"], 3, "cannot write under"),
        (["--data", "{data}", "--out", "{data}/other"], 3, "is not a report"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(few, capsys, arguments, code, sentence):
    data, out = few
    (data / "list.txt").write_text("x.mp4 1\ny.mp4 1\n")
    (data / "other").mkdir()
    (data / "other" / "report.csv").write_text("my,own,work\n")
    arguments = ["verify", "--out", str(out), *(part.format(data=data) for part in arguments)]
    try:
        assert prepare.main(arguments) == code
    except SystemExit as end:
        assert end.code == code
    assert sentence in capsys.readouterr().err
    assert (data / "other" / "report.csv").read_text() == "my,own,work\n"


def test_two_programs_do_not_write_the_same_report(few, capsys):
    import fcntl

    data, out = few
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert verify("--data", data, out=out) == 3
    assert "another program is writing" in capsys.readouterr().err and not (out / "report.csv").exists()


def test_help_needs_no_torch_and_no_decoder(program):
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'av', 'PIL', 'numpy'])); import runpy; "
    run = f"sys.argv = ['prepare.py', 'verify', '--help']; runpy.run_path({PREPARE!r}, run_name='__main__')"
    assert "--timeout" in program("-c", blocked + run, check=0).stdout


@pytest.fixture
def pipes_are_files(tmp_path_factory, monkeypatch):
    """Checking processes open named pipes as if they were files, and wait: so does a file on a disk that hangs."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text("import os; os.path.isfile = os.path.exists")
    monkeypatch.syspath_prepend(folder)
    return str(folder)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    found = examine(Job(str(tmp_path / "x.jpg"), "images"), "ends")
    assert (found["status"], found["reason"]) == ("unreadable", "not a regular file")


def children():
    """Of this process, which under pytest-xdist may have some of its own."""
    return psutil.Process().children()


def test_a_file_that_hangs_is_named_and_the_rest_goes_on(few, capsys, pipes_are_files):
    (data, out), before = few, children()
    folder_of_frames(data / "f", 3)
    (data / "f" / "1.jpg").unlink()
    os.mkfifo(data / "f" / "1.jpg")  # opening it waits for somebody to write
    (data / "list.txt").write_text("a.webm\nf\nb.webm\n")
    assert verify("--data", data / "list.txt", "--timeout", "1", out=out) == 3
    rows = report(out)
    assert [row["status"] for row in rows] == ["ok", "unreadable", "ok"] and rows[1]["reason"] == "not read within 1 s"
    assert children() == before
    capsys.readouterr()
    assert verify("--data", data / "list.txt", "--timeout", "1", out=out) == 3 and checked(capsys) == 0
    (data / "f" / "1.jpg").unlink()
    assert verify("--data", data / "list.txt", "--timeout", "2", out=out) == 0 and checked(capsys) == 1


def test_a_file_that_ends_its_process_twice_is_named(tmp_path, few, pipes_are_files):
    fifo, good, before = tmp_path / "x.jpg", few[0] / "a.webm", children()
    os.mkfifo(fifo)
    deaths = []

    def end_what_opens_it():
        while len(deaths) < 2:
            with fifo.open("w"):  # opens when the other side does
                (child,) = set(children()) - set(before)
                child.send_signal(signal.SIGSEGV)
                deaths.append(child.pid)
                while psutil.pid_exists(child.pid):  # its parent is who may ask how it ended
                    time.sleep(0.01)

    threading.Thread(target=end_what_opens_it, daemon=True).start()
    jobs = [
        (Job(str(fifo), "images"), None),
        (Job(str(good), "clips"), None),
        (Job(str(good), "clips"), look(str(good))),
    ]
    answers = list(processes.check(iter(jobs), 1, "headers", 60))
    (_, fault), (_, row), (_, known) = answers
    assert len(set(deaths)) == 2 and fault is not None and row is not None and known is None
    assert fault["status"] == "unreadable" and "Segmentation fault" in fault["reason"] and row["status"] == "ok"
    assert children() == before


def test_a_process_that_hangs_alone_ends_itself(tmp_path, pipes_are_files):
    os.mkfifo(tmp_path / "x.jpg")
    code = "from bevt_fast.data.verify import examine; examine.GRACE = 0; examine.main('1', '0.2')"
    job = json.dumps([Job(str(tmp_path / "x.jpg"), "images"), None])
    place = environment(PYTHONPATH=os.pathsep.join((pipes_are_files, str(ROOT))))
    done = subprocess.run([sys.executable, "-c", code], input=job + "\n", env=place, capture_output=True, text=True)
    assert done.returncode == -signal.SIGALRM, done.stderr
    assert done.stdout.splitlines()[0] == "null" and len(done.stdout.splitlines()) == 2


def test_processes_that_cannot_start_are_no_fault_of_the_files(few, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert verify("--data", few[0], out=few[1]) == 6
    assert "do not start" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_stopped_anywhere_and_gone_on_with(few, capsys, number, pipes_are_files):
    data, out = few
    folder_of_frames(data / "f", 2)
    (data / "f" / "1.jpg").unlink()
    os.mkfifo(data / "f" / "1.jpg")
    (data / "list.txt").write_text("a.webm\nb.webm\nf\nc.webm\n")
    command = [sys.executable, PREPARE, "verify", "--data", data / "list.txt", "--out", out, "--workers", "1"]
    # a shell without job control starts what it puts in the background deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = environment(PYTHONPATH=pipes_are_files)
    started = subprocess.Popen(command, cwd=ROOT, env=place, stderr=subprocess.PIPE, text=True)
    with (data / "f" / "1.jpg").open("w"):  # opens when the third file is being read
        workers = psutil.Process(started.pid).children()
        started.send_signal(number)
        said = started.communicate(timeout=60)[1]
    assert started.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL) and "Traceback" not in said
    # what it was reading has an end now, and so has its input
    assert workers and not psutil.wait_procs(workers, timeout=60)[1]
    with (out / "report.csv").open("ab") as file:
        file.write(b'/half/a/row,ok,,"mov,')
    (data / "f" / "1.jpg").unlink()
    assert verify("--data", data / "list.txt", out=out) == 3  # a folder of one frame is too short
    assert checked(capsys) == 2
    assert [row["status"] for row in report(out)] == ["ok", "ok", "too_short", "ok"]


def test_the_cost_of_keyframes():
    """The numbers of decoded frames by hand: half a group to the first frame and the span of 121, or half a group to
    each of the 16 frames.
    """
    interval = Frames(16, 8)
    assert summary.span(interval) == 121 and summary.span(Frames(16, 8, "uniform")) == 16
    assert summary.decoded(interval, 300, 250) == 121 + 124.5
    assert summary.decoded(interval, 300, 16) == 121 + 7.5
    assert summary.decoded(interval, 300, 8) == 16 * 4.5
    assert summary.decoded(interval, 300, 1) == 16
    assert summary.decoded(interval, 40, 250) == 40
    assert summary.decoded(Frames(16, 8, "uniform"), 300, 250) == 300
