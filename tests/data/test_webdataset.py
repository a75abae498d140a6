"""Images in tar shards: found as tarfile finds them, read as loose files are, and what is refused."""

import contextlib
import copy
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from bevt_fast.config import Config, Part, parse
from bevt_fast.data import shard_scan, sources, tar_index
from bevt_fast.data.decode import BadFile, probe_image, read_image
from bevt_fast.data.packed import Packed
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.shards import scan
from bevt_fast.data.sources import Source
from bevt_fast.data.tar_index import Damaged, entries
from bevt_fast.errors import CheckpointError, DataError, MachineError
from bevt_fast.training.assemble import fingerprint, require_same_data
from bevt_fast.training.checkpoint import Checkpoint
from tests.data import media

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def jpeg(number, kind="JPEG"):
    content = io.BytesIO()
    Image.fromarray(media.picture(number)).save(content, kind)
    return content.getvalue()


def shard(path, members, form=tarfile.USTAR_FORMAT, **about):
    """Writes a tar of (name, content) pairs; `about` is set on every member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in about.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first, count, label="cls"):
    for k in range(first, first + count):
        yield f"{k:06d}.jpg", jpeg(k % 60)
        if label == "cls":
            yield f"{k:06d}.cls", str(k % 7).encode()
        elif label == "json":
            yield f"{k:06d}.json", json.dumps({"label": k % 7, "caption": "x"}).encode()


def built(root, **options) -> Source:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sources.build(Part(name="webdataset", options={"root": str(root)} | options))


def refused(root, **options):
    with pytest.raises(DataError) as error:
        built(root, **options)
    return str(error.value).replace(f"{root}/", "")


def labels_of(source):
    return None if source.labels is None else source.labels.tolist()


@pytest.mark.parametrize("label, labels", [("cls", [0, 1, 2, 3, 4, 5]), ("json", [0, 1, 2, 3, 4, 5]), ("", None)])
def test_images_and_labels(tmp_path, label, labels):
    shard(tmp_path / "train-000000.tar", samples(0, 4, label))
    shard(tmp_path / "train-000001.tar", samples(4, 2, label))
    found = built(tmp_path, shards="train-{000000..000001}.tar")
    assert list(found.paths) == [f"train-00000{k // 4}.tar/{k:06d}.jpg" for k in range(6)]
    assert (labels_of(found), found.classes, found.frames, len(found)) == (labels, None, None, 6)
    for k in range(6):
        file = found.path(k)
        assert isinstance(file, Packed) and str(file) == f"{tmp_path}/{found.paths[k]}" and file.exists()
        loose = tmp_path / "loose.jpg"
        loose.write_bytes(jpeg(k))
        np.testing.assert_array_equal(read_image(file), read_image(loose))
        assert probe_image(file) == probe_image(loose) and file.read_bytes() == jpeg(k)
    assert sources.preflight(found) == 0


def test_every_way_to_name_shards(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/2.tar"):
        shard(tmp_path / name, samples(0, 1))
    every = ["a/0.tar", "a/1.tar", "b/2.tar"]
    for shards in (None, every, ["a/{0..1}.tar", "b/2.tar"], "{a/0,a/1,b/2}.tar", "*/*.tar", f"{tmp_path}/?/*.tar"):
        names = [name.rpartition("/")[0] for name in built(tmp_path, shards=shards).paths]
        assert [name.replace(f"{tmp_path}/", "") for name in names] == every
    assert "2 of 3 shards are not under" in refused(tmp_path, shards="a/{1..3}.tar")
    assert "a/2.tar, a/3.tar; check the option 'shards'" in refused(tmp_path, shards="a/{1..3}.tar")
    assert "names a/0.tar twice" in refused(tmp_path, shards=["a/0.tar", "a/{0..1}.tar"])
    assert "there are no shards" in refused(tmp_path, shards="c*.tar") and "no shards" in refused(tmp_path, shards=[])
    assert "names more than 100000 files" in refused(tmp_path, shards="{0..9999}/{0..9999}.tar")
    for wrong in ("{9..2}.tar", "{0..999999999}.tar"):
        assert "expected a range like 000000..000146" in refused(tmp_path, shards=wrong)


@pytest.mark.parametrize("about", [{}, {"mtime": 1.5}, {"uname": "größer"}, {"type": tarfile.AREGTYPE}])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_index_is_tarfiles(tmp_path, form, about):
    names = ["a.jpg", "./b/c.png", "n" * 90 + "/" + "m" * 60 + ".jpg", "größer/ü.jpg", "empty.cls", "x" * 95 + ".jpg"]
    # of a regular file in the oldest form, tarfile takes a cut name that ends with / for a folder
    if form != tarfile.USTAR_FORMAT and "type" not in about:
        names += ["long/" * 60 + "name.webp", "ö" * 150 + ".jpg"]
    file = shard(tmp_path / "a.tar", [(name, b"x" * (k * 300)) for k, name in enumerate(names)], form, **about)
    with tarfile.open(file) as tar:
        expected = [(info.name, info.offset_data, info.size, "file") for info in tar]
    assert list(map(tuple, entries(file))) == expected and [name for name, *_ in expected] == names


def test_names_as_people_have_them(tmp_path):
    members = [("./n01/17.JPEG", jpeg(1)), ("./n01/17.cls", b"3\n"), ("n01/._17.jpg", b"x"), ("__key__", b"x")]
    members += [("n02/17.png", jpeg(2, "PNG")), ("n02/17.cls", b"0"), ("n02/17.txt", b"a caption"), ("x.npy", b"")]
    shard(tmp_path / "a.tar", members)
    found = built(tmp_path)
    assert list(found.paths) == ["a.tar/./n01/17.JPEG", "a.tar/n02/17.png"] and labels_of(found) == [3, 0]
    assert media.number(read_image(found.path(1))) == 2


def test_class_names_are_numbered(tmp_path):
    members = [(f"{k}.{end}", value) for k, name in enumerate((b"run", b"jump high", b"run"))
               for end, value in (("jpg", jpeg(k)), ("cls", name))]  # fmt: skip
    shard(tmp_path / "a.tar", members)
    found = built(tmp_path)
    assert (labels_of(found), found.classes) == ([1, 0, 1], ["jump high", "run"])
    (tmp_path / "classes.txt").write_text("run\nswim\njump high\n")
    found = built(tmp_path, classes="classes.txt")
    assert (labels_of(found), found.classes) == ([0, 2, 0], ["run", "swim", "jump high"])
    (tmp_path / "classes.txt").write_text("runs\njump high\n")
    expected = "a.tar/0.jpg: expected one of the 2 class names, got 'run'; did you mean 'runs'?"
    assert refused(tmp_path, classes="classes.txt") == expected
    assert "expected the names of 1 classes" in refused(tmp_path, classes=1)


FAULTS = {
    "mixed": ([("a.jpg", b"x"), ("b.jpg", b"x"), ("b.cls", b"1")],
              "a.tar/a.jpg: expected a label (.cls or .json) beside it, as others have, got none (1 of 2"),
    "negative": ([("a.jpg", b"x"), ("a.cls", b"-1")], "a.tar/a.jpg: expected a label of at least 0, got -1"),
    "float": ([("a.jpg", b"x"), ("a.cls", b"1.5")], "a.tar/a.jpg: expected an integer label, got '1.5'"),
    "word": ([("a.jpg", b""), ("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"cat")],
             "a.tar/b.jpg: expected an integer label, got 'cat'"),
    "bytes": ([("a.jpg", b"x"), ("a.cls", b"\xff\xfe")], "a.tar/a.cls: expected a label, got b'\\xff\\xfe'"),
    "no json": ([("a.jpg", b"x"), ("a.json", b"{")], "a.tar/a.json: expected a label, got b'{'"),
    "deep json": ([("a.jpg", b"x"), ("a.json", b"[" * 60_000)], "a.tar/a.json: expected a label, got"),
    "list": ([("a.jpg", b"x"), ("a.json", b'{"label": [1]}')],
             "a.tar/a.json: expected a number or the name of a class, got [1]"),
    "large": ([("a.jpg", b"x"), ("a.cls", b"1" * 65537)],
              "a.tar/a.cls: expected a label of at most 65536 bytes, got 65537"),
    "two images": ([("a.jpg", b"x"), ("a.png", b"x")],
                   "a.tar: expected one image in the sample 'a', got a.jpg and a.png"),
    "twice": ([("a.jpg", b"x"), ("a.jpg", b"x")], "a.tar: expected one image in the sample 'a', got a.jpg and a.jpg"),
    "up": ([("../../etc/passwd.jpg", b"x")],
           "a.tar: expected names inside the shard, got '../../etc/passwd.jpg'; write the shard anew"),
    "up from inside": ([("a/../../b.jpg", b"x")], "a.tar: expected names inside the shard, got 'a/../../b.jpg'"),
    "the other slash": ([("..\\b.jpg", b"x")], "a.tar: expected names inside the shard, got '..\\\\b.jpg'"),
    "absolute": ([("/etc/passwd.jpg", b"x")], "a.tar: expected names inside the shard, got '/etc/passwd.jpg'"),
    "nothing": ([("a.txt", b"x")], "hold no images like 17.jpg; check the option 'shards'"),
}  # fmt: skip


@pytest.mark.parametrize("members, sentence", FAULTS.values(), ids=FAULTS)
def test_faults_name_shard_and_member(tmp_path, members, sentence):
    shard(tmp_path / "a.tar", members)
    assert sentence in refused(tmp_path)


def test_labels_must_be_below_the_number_of_classes(tmp_path):
    shard(tmp_path / "a.tar", samples(0, 4))
    expected = "a.tar/000003.jpg: expected a label below 3, the number of classes, got 3"
    assert refused(tmp_path, classes=3) == expected and labels_of(built(tmp_path, classes=4)) == [0, 1, 2, 3]


def test_what_is_no_shard_is_refused(tmp_path):
    for name, content, sentence in (
        ("a.tar", b"not a tar" * 100, "a.tar is not a tar shard"),
        ("a.tar", jpeg(1), "a.tar is not a tar shard"),
        ("a.tar.gz", b"\x1f\x8b" + bytes(600), "a.tar.gz is compressed, and its images cannot be found in it; unpack"),
        ("a.tar", b"\x28\xb5\x2f\xfd" + bytes(600), "unpack it with unzstd"),
        ("a.tar", bytes(1024), "hold no images"),
    ):
        (tmp_path / name).write_bytes(content)
        assert sentence in refused(tmp_path)
        (tmp_path / name).unlink()
    assert "there are no shards *.tar under" in refused(tmp_path)
    assert "does not exist; set the option 'root'" in refused(tmp_path / "nowhere")


def test_links_and_devices_are_left_out_and_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("l.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.CHRTYPE),
                           ("f", tarfile.DIRTYPE), ("a.b.jpg", tarfile.REGTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("good.jpg")
        info.size = len(jpeg(5))
        tar.addfile(info, io.BytesIO(jpeg(5)))
    with pytest.warns(UserWarning) as told:
        found = sources.build(Part(name="webdataset", options={"root": str(tmp_path)}))
    assert [str(warning.message).replace(f"{tmp_path}/", "") for warning in told] == [
        "a.tar: 2 links left out, first l.jpg",
        "a.tar: 1 devices left out, first d.jpg",
        "a.tar: 1 images with a second dot in their names left out, first a.b.jpg",
    ]
    assert list(found.paths) == ["a.tar/good.jpg"] and media.number(read_image(found.path(0))) == 5


@pytest.mark.parametrize("label", ["cls", "json", ""])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_what_is_before_a_cut_is_used(tmp_path, form, label):
    """A shard cut at any block, and within blocks: whole samples before the cut, and one sentence about the rest."""
    whole = shard(tmp_path / "whole.tar", samples(0, 3, label), form, mtime=1.5).read_bytes()
    ends = {entry.name: entry.offset + entry.size for entry in entries(tmp_path / "whole.tar")}
    every = list(ends)
    last = max(ends.values())
    for length in [*range(0, last, 512), *range(100, last, 1777)]:
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        found = scan(tmp_path / "cut.tar")
        parts = 2 if label else 1
        complete = sum(all(ends[name] <= length for name in every[k * parts : (k + 1) * parts]) for k in range(3))
        assert len(found.names) in (complete, complete + 1 if complete == 0 else complete), length
        assert len(found.remarks) >= 1 and "cut.tar is damaged from byte" in found.remarks[0]
    # nothing but the mark of the end is gone: every sample is there
    (tmp_path / "cut.tar").write_bytes(whole[: -(-last // 512) * 512])
    assert len(scan(tmp_path / "cut.tar").names) == 3


def test_a_shard_cut_after_the_index_was_made(tmp_path):
    file = shard(tmp_path / "a.tar", samples(0, 3))
    found = built(tmp_path)
    file.write_bytes(file.read_bytes()[: found.path(1).offset + 500])  # pyright: ignore[reportAttributeAccessIssue]
    assert sources.preflight(found, 0.7) == 2
    with pytest.raises(BadFile, match=r"a\.tar/000001\.jpg: truncated: OSError: truncated: .* ends within the member"):
        read_image(found.path(1))
    file.unlink()
    with pytest.raises(BadFile, match=r"a\.tar/000000\.jpg: missing"):
        read_image(found.path(0))


def test_bad_images_are_named_with_their_shard(tmp_path):
    shard(tmp_path / "a.tar", [("e.jpg", b""), ("t.jpg", jpeg(1)[:-400]), ("x.jpg", b"text")])
    found = built(tmp_path)
    for k, kind in enumerate(("empty", "truncated", "unreadable")):
        with pytest.raises(BadFile) as error:
            probe_image(found.path(k))
            read_image(found.path(k))
        assert error.value.kind == kind and error.value.path == f"{tmp_path}/a.tar/{'etx'[k]}.jpg"


def header(name, size, kind=b"0"):
    """A header with a right checksum, whatever it says."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"S", b"7"])
@pytest.mark.parametrize("size", [b"7" * 11 + b"\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000001000\0"])
def test_headers_that_lie_end_the_shard(tmp_path, kind, size):
    """Exabytes and negative sizes: neither memory nor an endless loop."""
    good = header("a.jpg", b"00000000004\0") + b"good" + bytes(508)
    (tmp_path / "a.tar").write_bytes(good + header("b.jpg", size, kind) + bytes(4096))
    tracemalloc.start()
    found, reader = [], entries(tmp_path / "a.tar")
    with contextlib.suppress(Damaged):  # tarfile does not look at the size of a sparse file's data
        for entry in reader:
            found.append(entry.name)
            assert len(found) < 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == "a.jpg" and peak < 3 * tar_index.LARGEST_HEADER


def test_many_processes_find_what_one_finds(tmp_path, monkeypatch):
    for number in range(6):
        shard(tmp_path / f"{number}.tar", samples(10 * number, 3 + number))
    damaged = tmp_path / "3.tar"
    damaged.write_bytes(damaged.read_bytes()[:-9000])
    found = {}
    for cores in (1, 3):
        monkeypatch.setattr(shard_scan.pace, "cores", lambda cores=cores: cores)
        with pytest.warns(UserWarning, match="3.tar is damaged from byte") as told:
            source = sources.build(Part(name="webdataset", options={"root": str(tmp_path)}))
        found[cores] = list(source.paths), labels_of(source), [str(one.message) for one in told]
        shard(tmp_path / "4.tar", samples(40, 7), tarfile.PAX_FORMAT)
        (tmp_path / "2.tar").rename(tmp_path / "aside")
        (tmp_path / "2.tar").write_bytes(b"\x1f\x8b" + b"x" * 99)
        shard(tmp_path / "5.tar", [("../a.jpg", jpeg(1))])
        assert refused(tmp_path).startswith("2.tar is compressed")  # the first in order
        (tmp_path / "aside").rename(tmp_path / "2.tar")
        shard(tmp_path / "4.tar", samples(40, 7))
        shard(tmp_path / "5.tar", samples(50, 8))
    assert found[1] == found[3] and multiprocessing.active_children() == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_scan_that_is_stopped_leaves_no_process(tmp_path, monkeypatch, request, how):
    def slow(path):
        if path.name == "0.tar":
            os.kill(os.getppid() if how == signal.SIGINT else os.getpid(), how)
        time.sleep(60)

    # whoever starts the tests in the background may have them ignore SIGINT
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    before = set(multiprocessing.active_children())
    monkeypatch.setattr(shard_scan.pace, "cores", lambda: 2)
    monkeypatch.setattr(shard_scan, "scan", slow)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt if how == signal.SIGINT else MachineError):
        list(shard_scan.scan_all([tmp_path / f"{k}.tar" for k in range(8)]))
    assert time.monotonic() < start + 30 and set(multiprocessing.active_children()) == before


def test_long_names_upon_long_names_end_the_shard(tmp_path):
    (tmp_path / "a.tar").write_bytes((header("L", b"00000001000\0", b"L") + b"x" * 512) * 5000)
    with pytest.raises(Damaged):
        list(entries(tmp_path / "a.tar"))


def test_an_index_is_kept_until_a_shard_changes(tmp_path, monkeypatch):
    for k in range(2):
        shard(tmp_path / f"{k}.tar", samples(3 * k, 3))
    index = tmp_path / "made/here.index"
    first = built(tmp_path, index=str(index))
    scans = []
    monkeypatch.setattr("bevt_fast.data.shard_scan.scan", lambda path: scans.append(path) or scan(path))
    again = built(tmp_path, index=str(index))
    assert not scans and list(again.paths) == list(first.paths) and labels_of(again) == labels_of(first)
    assert fingerprint(again) == fingerprint(first) and again.path(4) == first.path(4)
    shard(tmp_path / "1.tar", samples(3, 4))
    assert len(built(tmp_path, index=str(index))) == 7 and len(scans) == 2
    assert len(built(tmp_path, index=str(index))) == 7 and len(scans) == 2
    assert [file.name for file in index.parent.iterdir()] == ["here.index"]
    for damage in (index.read_bytes()[:-50], b"", b"\xff" * 4096, json.dumps({"a": 1}).encode()):
        index.write_bytes(damage)
        with pytest.warns(UserWarning, match="here.index is damaged and is made anew"):
            found = sources.build(Part(name="webdataset", options={"root": str(tmp_path), "index": str(index)}))
        assert len(found) == 7
    (tmp_path / "file").write_text("")
    assert "cannot write the index" in refused(tmp_path, index=str(tmp_path / "file/index"))


def test_the_fingerprint_knows_shards_members_and_labels(tmp_path):
    def print_of(members, name="0.tar"):
        for file in tmp_path.glob("*.tar"):
            file.unlink()
        shard(tmp_path / name, members)
        return json.dumps(fingerprint(built(tmp_path)))

    members = list(samples(0, 3))
    renamed, relabelled = [*members], [*members]
    renamed[0] = ("00000x.jpg", members[0][1])
    renamed[1] = ("00000x.cls", members[1][1])
    relabelled[1] = ("000000.cls", b"5")
    prints = [print_of(members), print_of(members, "1.tar"), print_of(renamed), print_of(relabelled)]
    assert len(set(prints)) == 4 and print_of(members) == prints[0]
    assert print_of(list(samples(0, 3, ""))) not in prints


def test_a_part_of_the_images(tmp_path):
    shard(tmp_path / "a.tar", samples(0, 5))
    found = built(tmp_path)
    some = found.take([3, 1])
    assert list(some.paths) == ["a.tar/000003.jpg", "a.tar/000001.jpg"] and labels_of(some) == [3, 1]
    assert media.number(read_image(some.path(0))) == 3
    copied = copy.deepcopy(found)
    assert list(copied.paths) == list(found.paths) and copied.path(2) == found.path(2)
    with pytest.raises(IndexError):
        found.paths[5]


def test_the_index_of_many_images_is_small(tmp_path):
    """Memory kept for each image: 28 bytes of numbers, 10 of its name, 8 of its label."""
    count = 2_000
    shard(tmp_path / "a.tar", ((f"{k:06d}.{end}", b"1") for k in range(count) for end in ("jpg", "cls")))
    built(tmp_path)  # what is imported and cached at first use
    tracemalloc.start()
    found = built(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == count and kept < 60 * count + 10_000 and peak < 1500 * count


CONFIG = {
    "images": {"source": {"name": "webdataset", "options": {}}, "mask": {"name": "blockwise"}, "batch": 4,
               "micro_batch": 4, "view": {"size": 64, "short_side": [64, 80], "colour_jitter": 0.4}},
    "tokenizer": {"name": "patch_kmeans", "options": {"weights": "none.safetensors"}},
    "train": {"steps": 1}, "output": "runs/x", "optim": {"lr": 1e-3},
}  # fmt: skip


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_batches_are_those_of_the_loose_files(tmp_path, decoder):
    """The same pixels, masks, order and substitutes, whatever the images lie in; and the record names the member."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    members = list(samples(0, 12, ""))
    members[5] = ("000005.jpg", jpeg(5)[:900])
    shard(tmp_path / "packed/a.tar", members[:6])
    shard(tmp_path / "packed/b.tar", members[6:])
    for name, content in members:
        (tmp_path / "loose").mkdir(exist_ok=True)
        (tmp_path / "loose" / name).write_bytes(content)
    config = parse(Config, CONFIG | {"data": {"decoder": decoder}}, "test")
    packed = StreamReader(config, "images", built(tmp_path / "packed"))
    names = [name for name, _ in members]
    loose = StreamReader(config, "images", Source(name="loose", root=tmp_path / "loose", paths=names))
    bad = []
    for number in range(6):
        ours, theirs = packed[number], loose[number]
        assert isinstance(ours, dict) and isinstance(theirs, dict)
        for key in ("pixels", "token_pixels", "mask"):
            assert torch.equal(ours[key], theirs[key])
        bad += ours["bad"]
        assert [record["index"] for record in ours["bad"]] == [record["index"] for record in theirs["bad"]]
    assert {record["path"] for record in bad} == {f"{tmp_path}/packed/a.tar/000005.jpg"}
    assert {record["kind"] for record in bad} == {"truncated"}


def test_a_checkpoint_that_knows_less_of_a_list_is_gone_on_from(tmp_path):
    shard(tmp_path / "a.tar", samples(0, 3))
    now = fingerprint(built(tmp_path))
    assert set(now) == {"files", "sha256", "sizes", "labels"}

    def resumed(then):
        found = Checkpoint(tmp_path, 1, {}, {}, {"data": {"images": then}})
        require_same_data(found, {"tokenizer": "", "data": {"images": now}})

    resumed(now)
    resumed({key: now[key] for key in ("files", "sha256")})
    for then in (None, {}, now | {"labels": "other"}, now | {"sha256": "other"}, {"files": 2}):
        with pytest.raises(CheckpointError, match="the list of images is not the one this run began with"):
            resumed(then)
