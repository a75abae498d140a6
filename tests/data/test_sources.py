"""The datasets on small trees of real (empty) files: what is found, how it is labelled, and what is refused."""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from bevt_fast.config import Part
from bevt_fast.data import sources
from bevt_fast.data.sources import Frames, Source
from bevt_fast.errors import ConfigError, DataError


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def built(source, **options):
    """Build without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sources.build(Part(name=source, options={k: _plain(v) for k, v in options.items()}))


def _plain(value):
    return str(value) if isinstance(value, os.PathLike) else value


def labels_of(source: Source):
    return None if source.labels is None else source.labels.tolist()


def refused(name, **options):
    with pytest.raises(DataError) as error:
        built(name, **options)
    return str(error.value)


# file_list


def test_a_folder_of_classes(tmp_path):
    tree(tmp_path, "run/b.mp4", "run/a.MP4", "jump high/c/d.webm", "jump high/notes.txt", "run/._a.mp4", ".cache/x.mp4")
    found = built("file_list", root=tmp_path)
    assert found.paths == ["jump high/c/d.webm", "run/a.MP4", "run/b.mp4"]
    assert labels_of(found) == [0, 1, 1] and found.classes == ["jump high", "run"]
    assert found.labels is not None and found.labels.dtype == np.int64
    assert (found.name, found.frames, found.min_frames) == ("file_list", Frames(16, 8, "interval"), 2)
    assert found.path(1) == tmp_path / "run/a.MP4" and found.extent(1) == (0, -1) and len(found) == 3


@pytest.mark.parametrize("root", ["/data", ".", "here/../there", "/data//x/"])
@pytest.mark.parametrize("name", ["a.mp4", "./a b.mp4", "x//y/./a.mp4", "../a.mp4", "x/../a.mp4", "/other/a.mp4", "d/"])
def test_a_file_is_written_as_its_path_is(root, name):
    source = Source(name="x", root=Path(root), paths=[name])
    assert source.path(0) == Path(root) / name and source.file(0) == str(Path(root) / name)


def test_a_flat_folder_has_no_classes(tmp_path):
    tree(tmp_path, "b.jpg", "a.JPEG", "c.mp4", "d/e.png")
    found = built("file_list", root=tmp_path, kind="images")
    assert (found.paths, found.labels, found.classes, found.frames) == (
        ["a.JPEG", "b.jpg", "d/e.png"],
        None,
        None,
        None,
    )


def test_the_order_of_a_folder_is_the_sorted_one(tmp_path):
    names = [f"{k % 3}/{k:03d}.mp4" for k in range(60)]
    tree(tmp_path, *np.random.RandomState(0).permutation(names).tolist())
    assert built("file_list", root=tmp_path).paths == sorted(names)


def test_links_are_followed_once(tmp_path):
    tree(tmp_path / "elsewhere", "b.mp4")
    tree(tmp_path / "data", "real/a.mp4")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/real/loop").symlink_to(tmp_path / "data")
    found = built("file_list", root=tmp_path / "data")
    assert found.paths == ["linked/b.mp4", "real/a.mp4"]


def test_a_list_with_options(tmp_path):
    (tmp_path / "train.txt").write_text("a b.mp4 1\n/data/c.mp4 0\n")
    for name in ("train.txt", tmp_path / "train.txt"):
        found = built(
            "file_list", root=tmp_path, list=name, frames=32, stride=2, mode="uniform", min_frames=32, classes=2
        )
        assert found.paths == ["a b.mp4", "/data/c.mp4"] and labels_of(found) == [1, 0]
        assert (found.frames, found.min_frames) == (Frames(32, 2, "uniform"), 32)
        assert found.path(0) == tmp_path / "a b.mp4" and str(found.path(1)) == "/data/c.mp4"
    assert "train.txt:1: expected a label below 1" in refused("file_list", root=tmp_path, list="train.txt", classes=1)


def test_folders_of_frames_have_extents(tmp_path):
    (tmp_path / "train.txt").write_text("a 300 1\nb 20 0\n")
    found = built("file_list", root=tmp_path, list="train.txt")
    assert labels_of(found) == [1, 0] and [found.extent(0), found.extent(1)] == [(0, 300), (0, 20)]


def test_what_file_list_refuses(tmp_path):
    assert refused("file_list", root=tmp_path / "no") == (
        f"the data folder {tmp_path / 'no'} does not exist; set the option 'root' to where the files are"
    )
    assert "holds no clips (.mp4, " in refused("file_list", root=tmp_path)
    tree(tmp_path, "a.jpg")
    assert refused("file_list", root=tmp_path).endswith("there are files for the kind 'images'")
    assert "is not a folder" in refused("file_list", root=tmp_path / "a.jpg")
    assert f"the list no.txt does not exist, here or in {tmp_path}" in refused(
        "file_list", root=tmp_path, list="no.txt"
    )
    for options in ({"frames": 0}, {"mode": "random"}, {"lists": "a"}, {"stride": 2.5}):
        with pytest.raises(ConfigError):
            built("file_list", root=tmp_path, **options)


# imagenet1k


@pytest.mark.parametrize("place", ["train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", ""])
def test_imagenet_folders(tmp_path, place):
    tree(tmp_path / place, "n02/n02_1.JPEG", "n01440764/n01440764_2.JPEG", "n01440764/n01440764_10.JPEG")
    found = built("imagenet1k", root=tmp_path)
    assert found.root == tmp_path / place
    assert found.paths == ["n01440764/n01440764_10.JPEG", "n01440764/n01440764_2.JPEG", "n02/n02_1.JPEG"]
    assert labels_of(found) == [0, 0, 1] and found.classes == ["n01440764", "n02"] and found.frames is None


def test_imagenet_flat_validation_folder(tmp_path):
    tree(tmp_path, "val/ILSVRC2012_val_00000001.JPEG", "train/n01/a.JPEG")
    found = built("imagenet1k", root=tmp_path, split="val")
    assert (found.paths, found.labels) == (["ILSVRC2012_val_00000001.JPEG"], None)


@pytest.mark.parametrize("list_at, prefix", [("", "train/"), ("", ""), ("train/", "")])
def test_imagenet_list(tmp_path, list_at, prefix):
    tree(tmp_path, "train/n01/a.JPEG", "train/n02/b.JPEG")
    name = "ILSVRC2012_name_train_list.txt"
    (tmp_path / list_at / name).write_text(f"{prefix}n02/b.JPEG 1\n{prefix}n01/a.JPEG 0\n")
    found = built("imagenet1k", root=tmp_path, list=name)
    assert labels_of(found) == [1, 0] and all(found.path(k).exists() for k in range(2))


def test_what_imagenet_refuses(tmp_path):
    assert "has no folder 'train'; set the option 'root' to its parent" in refused("imagenet1k", root=tmp_path)
    (tmp_path / "train").mkdir()
    assert "holds no images" in refused("imagenet1k", root=tmp_path)
    (tmp_path / "list.txt").write_text("n01/a.JPEG 1000\n")
    assert "list.txt:1: expected a label below 1000" in refused("imagenet1k", root=tmp_path, list="list.txt")


# kinetics400

CSV = """label,youtube_id,time_start,time_end,split,is_cc
riding a bike,-abc_1,9,19,train,0
"cooking, outside",XYZ,120,130,train,0
archery,val1,0,10,validate,0
archery,gone,3,13,train,0
riding a bike,late,1000000,1000010,train,0
"""


@pytest.mark.parametrize("folder", ["train/", "train/riding a bike/", "train/riding_a_bike/", "riding a bike/", ""])
def test_kinetics_official_csv(tmp_path, folder):
    (tmp_path / "k400.csv").write_text(CSV)
    tree(tmp_path, *(folder + name for name in ("-abc_1_000009_000019.mp4", "XYZ_000120_000130.mkv")))
    tree(tmp_path, folder + "late_1000000_1000010.mp4", folder + "unlisted.mp4")
    with pytest.warns(
        UserWarning, match=r"1 of 4 videos of .*k400.csv are not in .*left out, first gone_000003_000013"
    ):
        found = sources.build(Part(name="kinetics400", options={"root": str(tmp_path), "annotations": "k400.csv"}))
    assert [Path(found.path(k)).name for k in range(3)] == [
        "-abc_1_000009_000019.mp4", "XYZ_000120_000130.mkv", "late_1000000_1000010.mp4"
    ]  # fmt: skip
    assert all(found.path(k).exists() for k in range(3))
    assert found.classes == ["archery", "cooking, outside", "riding a bike"] and labels_of(found) == [2, 1, 2]
    assert found.frames == Frames(16, 8, "interval")


def test_kinetics_validation_rows(tmp_path):
    (tmp_path / "k400.csv").write_text(CSV)
    tree(tmp_path, "validate/val1_000000_000010.mp4", "train/gone_000003_000013.mp4")
    found = built("kinetics400", root=tmp_path, annotations="k400.csv", split="val")
    assert found.paths == ["val1_000000_000010.mp4"] and labels_of(found) == [0]


def test_kinetics_list_and_folders(tmp_path):
    tree(tmp_path, "train/riding a bike/a.mp4", "train/archery/b.mp4", "val/archery/c.mp4")
    for prefix in ("", "train/"):
        (tmp_path / "k400_train.txt").write_text(f"{prefix}riding a bike/a.mp4 273\n{prefix}archery/b.mp4 5\n")
        found = built("kinetics400", root=tmp_path, list="k400_train.txt")
        assert labels_of(found) == [273, 5] and all(found.path(k).exists() for k in range(2))
    found = built("kinetics400", root=tmp_path)
    assert found.paths == ["archery/b.mp4", "riding a bike/a.mp4"] and labels_of(found) == [0, 1]
    assert found.classes == ["archery", "riding a bike"] and found.root == tmp_path / "train"


def test_what_kinetics_refuses(tmp_path):
    assert "holds no videos" in refused("kinetics400", root=tmp_path)
    tree(tmp_path, "a.mp4")
    file = tmp_path / "k400.csv"
    cases = {
        "label,youtube_id\nx,y\n": r"k400.csv:1: expected the columns label, youtube_id, time_start, time_end, got",
        "": r"k400.csv:1: expected the columns",
        CSV.splitlines()[0]: r"k400.csv: expected a row for each video, got none",
        CSV: r"k400.csv: none of its 4 videos, like -abc_1_000009_000019.mp4, is in ",
        CSV.replace(",120,", ",x,"): r"k400.csv:3: expected label, youtube_id, and a start and end in seconds",
        CSV.replace("archery", ""): r"k400.csv:4: expected label, youtube_id",
        CSV.replace(",train,", ",test,"): r"expected rows of the split 'train', got only test, validate",
    }
    for text, sentence in cases.items():
        file.write_text(text)
        assert sentence in refused("kinetics400", root=tmp_path, annotations="k400.csv")
    (tmp_path / "list.txt").write_text("a.mp4 400\n")
    assert "list.txt:1: expected a label below 400" in refused("kinetics400", root=tmp_path, list="list.txt")
    with pytest.raises(ConfigError, match="write one of them"):
        built("kinetics400", root=tmp_path, list="list.txt", annotations="k400.csv")


# something_v2

SSV2 = [
    {"id": "78687", "label": "holding potato", "template": "Holding [something]", "placeholders": ["potato"]},
    {"id": 42326, "label": "x", "template": "Putting [something] into [something]", "placeholders": []},
]
TEMPLATES = {"Putting something into something": "0", "Holding something": "1"}


@pytest.mark.parametrize("folder, suffix", [("", ".webm"), ("20bn-something-something-v2/", ".webm"), ("v/", ".mp4")])
def test_something_v2_json(tmp_path, folder, suffix):
    (tmp_path / "train.json").write_text(json.dumps(SSV2))
    (tmp_path / "labels.json").write_text(json.dumps(TEMPLATES))
    tree(tmp_path, f"{folder}42326{suffix}", f"{folder}78687{suffix}", f"{folder}1{suffix}")
    found = built("something_v2", root=tmp_path, annotations="train.json", mode="uniform", frames=32)
    assert found.paths == [f"{folder}78687{suffix}", f"{folder}42326{suffix}"] and labels_of(found) == [1, 0]
    assert found.classes == ["Putting something into something", "Holding something"]
    assert found.frames == Frames(32, 8, "uniform") and all(found.path(k).exists() for k in range(2))


def test_something_v2_without_labels(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(SSV2))
    tree(tmp_path, "42326.webm")
    found = built("something_v2", root=tmp_path, annotations="train.json")
    # a missing video stays in the list, for the check before the run to name
    assert (found.paths, found.labels, found.classes) == (["78687.webm", "42326.webm"], None, None)
    (tmp_path / "labels.json").write_text(json.dumps(TEMPLATES))
    (tmp_path / "test.json").write_text('[{"id": "42326"}]')
    assert built("something_v2", root=tmp_path, annotations="test.json").labels is None


def test_something_v2_list(tmp_path):
    tree(tmp_path, "videos/1.mp4", "videos/2.mp4")
    (tmp_path / "sthv2_train_list_videos.txt").write_text("1.mp4 173\n2.mp4 0\n")
    found = built("something_v2", root=tmp_path, annotations="sthv2_train_list_videos.txt")
    assert labels_of(found) == [173, 0] and found.root == tmp_path / "videos"


def test_what_something_v2_refuses(tmp_path):
    def refused_with(entries, table=TEMPLATES):
        (tmp_path / "train.json").write_text(json.dumps(entries))
        (tmp_path / "labels.json").write_text(json.dumps(table))
        return refused("something_v2", root=tmp_path, annotations="train.json")

    assert "train.json:entry 2: expected a template that labels.json has, got 'Other'" in refused_with(
        [SSV2[0], {"id": "1", "template": "[Other]"}]
    )
    assert "train.json:entry 2: expected a template" in refused_with([SSV2[0], {"id": "1"}])
    for entry in ({"id": "../../etc/passwd"}, {"template": "x"}, "1", None):
        assert "train.json:entry 1: expected an object with a number as id" in refused_with([entry])
    assert "got no sample at all" in refused_with([])
    assert "expected a JSON list of samples, got one dict" in refused_with({})
    assert "labels.json: expected the class ids 0 to 1, each once, got [0, 2]" in refused_with(SSV2, {"a": 0, "b": 2})
    assert "expected an integer class id, got 'x'" in refused_with(SSV2, {"a": "x"})
    assert "expected an object of template and class id" in refused_with(SSV2, [1])
    (tmp_path / "list.txt").write_text("1.mp4 174\n")
    assert "list.txt:1: expected a label below 174" in refused("something_v2", root=tmp_path, annotations="list.txt")


# diving48


@pytest.mark.parametrize("folder", ["", "rgb/"])
def test_diving48(tmp_path, folder):
    entries = [
        {"vid_name": "_8Vy3dlHg2w_00000", "label": 26, "start_frame": 0, "end_frame": 158},
        {"vid_name": "a.b_00001", "label": 0, "start_frame": 0, "end_frame": 9},
        {"vid_name": "gone_00002", "label": 47, "start_frame": 0, "end_frame": 9},
    ]
    (tmp_path / "Diving48_V2_train.json").write_text(json.dumps(entries))
    tree(tmp_path, f"{folder}_8Vy3dlHg2w_00000.mp4", f"{folder}a.b_00001.mp4")
    found = built("diving48", root=tmp_path, annotations="Diving48_V2_train.json")
    assert found.paths == [f"{folder}_8Vy3dlHg2w_00000.mp4", f"{folder}a.b_00001.mp4", "gone_00002.mp4"]
    assert labels_of(found) == [26, 0, 47] and found.extents is None
    (tmp_path / "list.txt").write_text("_8Vy3dlHg2w_00000.mp4 26\n")
    found = built("diving48", root=tmp_path, annotations="list.txt")
    assert labels_of(found) == [26] and found.path(0).exists()


@pytest.mark.parametrize(
    "entry, sentence",
    [
        ({"vid_name": "a", "label": 48}, "entry 1: expected a label below 48, the number of classes, got 48"),
        ({"vid_name": "a", "label": -1}, "entry 1: expected a label of at least 0, got -1"),
        ({"vid_name": "a"}, "entry 1: expected an integer label, got None"),
        ({"label": 1}, "entry 1: expected an object with vid_name and label"),
        ({"vid_name": "../../etc/passwd", "label": 1}, "entry 1: expected a path inside the root"),
        ("a", "entry 1: expected an object with vid_name and label, got 'a'"),
    ],
)
def test_what_diving48_refuses(tmp_path, entry, sentence):
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    assert sentence in refused("diving48", root=tmp_path, annotations="train.json")


# ucf101 and hmdb51

UCF = {
    "classInd.txt": "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n",
    "trainlist01.txt": "HandstandPushups/v_H_g08_c01.avi 2\r\nApplyEyeMakeup/v_A_g08_c01.avi 1\r\n",
    "testlist01.txt": "HandstandPushups/v_H_g01_c01.avi\n",
}


def written(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("lists", ["ucfTrainTestlist", "", "elsewhere"])
@pytest.mark.parametrize("videos", ["UCF-101/HandstandPushups/{}.avi", "HandstandPushups/{}.mp4", "flat/{}.avi"])
def test_ucf101(tmp_path, lists, videos):
    written(tmp_path / lists, UCF)
    tree(tmp_path, videos.format("v_H_g08_c01"), videos.format("v_H_g01_c01"))
    options = {"lists": lists} if lists == "elsewhere" else {}
    found = built("ucf101", root=tmp_path, **options)
    # ids count from 0; a missing video stays in the list
    assert labels_of(found) == [1, 0] and found.classes == ["ApplyEyeMakeup", "HandstandPushups"]
    assert found.paths == [videos.format("v_H_g08_c01"), "ApplyEyeMakeup/v_A_g08_c01.avi"]
    found = built("ucf101", root=tmp_path, split="test", frames=32, **options)
    assert labels_of(found) == [1] and found.path(0).exists() and found.frames == Frames(32, 8, "interval")


@pytest.mark.parametrize(
    "file, text, sentence",
    [
        ("trainlist01.txt", "ApplyEyeMakeup/a.avi 1\nApplyEyeMakeup/b.avi 2\n",
         "trainlist01.txt:2: expected the label 1, as classInd.txt has ApplyEyeMakeup, got 2"),
        ("trainlist01.txt", "Other/a.avi 1\n", "trainlist01.txt:1: expected Class/video.avi, with a class of classInd"),
        ("trainlist01.txt", "a.avi 1\n", "trainlist01.txt:1: expected Class/video.avi"),
        ("trainlist01.txt", "../../ApplyEyeMakeup/a.avi 1\n", "trainlist01.txt:1: expected a path inside the root"),
        ("trainlist01.txt", "\n", "trainlist01.txt: expected lines like"),
        ("classInd.txt", "1 A\n3 B\n", "classInd.txt: expected the class ids 0 to 1, each once, got [1, 3]"),
    ],
)  # fmt: skip
def test_what_ucf101_refuses(tmp_path, file, text, sentence):
    written(tmp_path, UCF | {file: text})
    assert sentence in refused("ucf101", root=tmp_path)
    assert "the list trainlist02.txt does not exist" in refused("ucf101", root=tmp_path, fold=2)


HMDB = {"clap_test_split1.txt": "#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 1 \nb(1)&c.avi 2 \nneither.avi 0 \n",
        "brush_hair_test_split1.txt": "a.avi 1\nc.avi 1\n", "clap_test_split2.txt": "b(1)&c.avi 1\n"}  # fmt: skip


@pytest.mark.parametrize("lists", ["testTrainMulti_7030_splits", "test_train_splits", "", "elsewhere"])
def test_hmdb51(tmp_path, lists):
    written(tmp_path / lists, HMDB)
    tree(tmp_path, "clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", "clap/b(1)&c.mp4", "clap/a.avi", "brush_hair/a.avi")
    options = {"lists": str(tmp_path / lists)} if lists == "elsewhere" else {}
    found = built("hmdb51", root=tmp_path, **options)
    assert found.classes == ["brush_hair", "clap"] and labels_of(found) == [0, 0, 1]
    assert found.paths == ["brush_hair/a.avi", "brush_hair/c.avi", "clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi"]
    found = built("hmdb51", root=tmp_path, split="test", **options)
    assert labels_of(found) == [1] and found.path(0) == tmp_path / "clap/b(1)&c.mp4"
    assert labels_of(built("hmdb51", root=tmp_path, fold=2, **options)) == [0]


def test_what_hmdb51_refuses(tmp_path):
    assert "there are no lists like brush_hair_test_split1.txt in" in refused("hmdb51", root=tmp_path)
    for line in ("a.avi 3", "a.avi", "1", "../a.avi 1", "/etc/passwd 1"):
        written(tmp_path, {"clap_test_split1.txt": f"fine.avi 1\n{line}\n"})
        assert "clap_test_split1.txt:2: expected 'name.avi flag', with a flag of 0, 1 or 2" in refused(
            "hmdb51", root=tmp_path
        )


# classes


def test_a_file_of_classes_for_lists(tmp_path):
    (tmp_path / "train.txt").write_text("a.mp4 run\nb.mp4 jump high\n")
    assert built("file_list", root=tmp_path, list="train.txt").classes == ["jump high", "run"]
    for name, text in (
        ("classes.txt", "run\nswim\njump high\n"),
        ("ind.txt", "1 run\n2 swim\n3 jump high\n"),
        ("labels.csv", "id,name\n0,run\n1,swim\n2,jump high\n"),
        ("labels.json", '{"swim": 1, "run": "0", "jump high": 2}'),
        ("names.json", '["run", "swim", "jump high"]'),
    ):
        (tmp_path / name).write_text(text)
        found = built("file_list", root=tmp_path, list="train.txt", classes=name)
        assert labels_of(found) == [0, 2] and found.classes == ["run", "swim", "jump high"]
    for text, sentence in (
        ("runs\njump high\n", "train.txt:1: expected one of the 2 class names, got 'run'; did you mean 'runs'?"),
        ("run\nrun\n", "classes.txt: expected the name of each class once, got 'run' twice"),
        ("", "classes.txt: expected the names of the classes, a line each, got []"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        assert sentence in refused("file_list", root=tmp_path, list="train.txt", classes="classes.txt")
    assert "the list no.txt does not exist" in refused("file_list", root=tmp_path, list="train.txt", classes="no.txt")
    assert "train.txt:2: expected the names of 1 classes" in refused(
        "file_list", root=tmp_path, list="train.txt", classes=1
    )


# preflight


def test_preflight_counts_what_is_missing(tmp_path):
    tree(tmp_path, *(f"{k}.mp4" for k in range(0, 100, 2)))
    paths = [f"{k}.mp4" for k in range(100)]
    source = Source(name="mine", root=tmp_path, paths=paths)
    assert sources.preflight(Source(name="mine", root=tmp_path, paths=paths[::2]), 0.0) == 0
    assert sources.preflight(source, 0.5) == 50
    with pytest.raises(DataError) as error:
        sources.preflight(source, 0.49)
    assert str(error.value) == (
        f"mine: 50 of 100 files looked for (of 100 listed) are not under {tmp_path}: "
        "1.mp4, 3.mp4, 5.mp4, 7.mp4, 9.mp4, ...; check the option 'root'"
    )
    with pytest.raises(DataError, match=r"1 of 1 files .*: x\.mp4; check the option"):
        sources.preflight(Source(name="mine", root=tmp_path, paths=["x.mp4"]), 0.99)
    folder_of_frames = Source(name="mine", root=tmp_path.parent, paths=[tmp_path.name, str(tmp_path)])
    assert sources.preflight(folder_of_frames, 0.0) == 0
    assert sources.preflight(Source(name="mine", root=tmp_path, paths=["x" * 5000, "0.mp4/x"]), 1.0) == 2


def test_preflight_looks_for_some_files_of_a_large_source(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "_exists", lambda path: asked.append(int(path.name)) or True)
    sources.preflight(Source(name="mine", root=tmp_path, paths=[str(k) for k in range(20_000)]), 0.0)
    assert sorted(asked) == list(range(20_000))
    asked.clear()
    sources.preflight(Source(name="mine", root=tmp_path, paths=[str(k) for k in range(50_000)]), 0.0)
    assert sorted(asked) == list(range(0, 50_000, 25))
