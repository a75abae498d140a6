"""Images in parquet files: read as loose files are, group by group, and what is refused."""

import json
import multiprocessing
import os
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from bevt_fast import prepare
from bevt_fast.config import Config, Part, parse
from bevt_fast.data import parquet_rows, sources
from bevt_fast.data.decode import BadFile, probe_image, read_image
from bevt_fast.data.loader import Loader
from bevt_fast.data.packed import Packed
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError, MachineError, UserError
from bevt_fast.training.assemble import fingerprint
from tests.data import media
from tests.data.test_webdataset import jpeg

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark"]


@pytest.fixture
def pa():
    return pytest.importorskip("pyarrow", exc_type=ImportError)


def table(pa, count, first=0, form="struct", labels=None, names=None, **columns):
    """Images `first` to `first + count` as a table; `labels` None: numbers of 3 classes."""
    contents = [jpeg((first + k) % 60) for k in range(count)]
    structs = [{"bytes": content, "path": f"{first + k}.JPEG"} for k, content in enumerate(contents)]
    labels = [(first + k) % 3 for k in range(count)] if labels is None else labels
    found = {"image": pa.array(structs if form == "struct" else contents), "label": pa.array(labels)} | columns
    schema = pa.table(found)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = json.dumps({"info": {"features": features if names else {}}})
    return schema.replace_schema_metadata({"huggingface": about})


def write(path, found, rows=4):
    import importlib

    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("pyarrow.parquet").write_table(found, path, row_group_size=rows)
    return path


def built(root, **options) -> Source:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sources.build(Part(name="parquet", options={"root": str(root)} | options))


def refused(root, **options):
    with pytest.raises(UserError) as error:
        built(root, **options)
    return str(error.value).replace(f"{root}/", "")


@pytest.mark.parametrize("form", ["struct", "binary"])
@pytest.mark.parametrize("large", [False, True], ids=["whole groups", "streamed"])
def test_any_image_at_any_time(pa, tmp_path, monkeypatch, form, large):
    monkeypatch.setattr(parquet_rows, "TOGETHER", 2)
    write(tmp_path / "data/train-00000-of-00002.parquet", table(pa, 10, form=form, names=NAMES))
    write(tmp_path / "data/train-00001-of-00002.parquet", table(pa, 3, 10, form, names=NAMES))
    found = built(tmp_path)
    assert (found.classes, found.frames, len(found)) == (NAMES, None, 13) and sources.preflight(found) == 0
    assert found.labels is not None and found.labels.tolist() == [k % 3 for k in range(13)]
    assert found.paths[11] == "data/train-00001-of-00002.parquet/image/1"
    monkeypatch.setattr(parquet_rows, "LARGEST_GROUP", 0 if large else 2**30)
    order = [*range(13), *np.random.RandomState(0).permutation(13).tolist(), 12, 12, 0]
    for keep in (0, 2**30):  # nothing kept, and all
        parquet_rows._reader.cache_clear()
        monkeypatch.setattr(parquet_rows, "CONTENTS", keep)
        for k in order:
            file = found.path(k)
            assert isinstance(file, Packed) and file.exists() and str(file) == f"{tmp_path}/{found.paths[k]}"
            assert file.read_bytes() == jpeg(k) and probe_image(file).codec == "JPEG"
            assert read_image(file).shape == media.picture(k).shape
    part = found.take([12, 3]).take([0])
    assert list(part.paths) == [found.paths[12]] and part.path(0).read_bytes() == jpeg(12)  # type: ignore[union-attr]


def test_what_is_kept_is_bounded(pa, tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", table(pa, 40), rows=4)
    found = built(tmp_path)
    monkeypatch.setattr(parquet_rows, "GROUPS", 8 * len(jpeg(0)))
    monkeypatch.setattr(parquet_rows, "CONTENTS", 5 * len(jpeg(0)))
    parquet_rows._reader.cache_clear()
    for k in range(40):
        found.path(k).read_bytes()  # type: ignore[union-attr]
    reader = parquet_rows._reader(os.getpid())
    for kept, most in ((reader._groups, 8), (reader._contents, 5)):
        assert 0 < kept._total <= most * len(jpeg(0)) and 0 < len(kept._kept) <= most
        assert kept._total == sum(map(kept._size, kept._kept.values()))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_loose_files(pa, tmp_path, workers):
    """Also in processes that are forked after this one has read."""
    write(tmp_path / "a.parquet", table(pa, 9), rows=2)
    loose = tmp_path / "loose"
    loose.mkdir()
    for k in range(9):
        (loose / f"{k}.jpg").write_bytes(jpeg(k))
    section = {
        "source": {"name": "x"}, "mask": {"name": "blockwise", "options": {"min_block": 2}},
        "batch": 4, "micro_batch": 4, "view": {"size": 64, "short_side": [64, 72]},
    }  # fmt: skip
    values = {"output": "u", "tokenizer": {"name": "x"}, "optim": {"lr": 1e-3}, "train": {"steps": 1}}
    config = parse(Config, values | {"images": section, "data": {"workers": workers}}, "test")
    packed = built(tmp_path, files="a.parquet")
    packed.path(0).read_bytes()  # type: ignore[union-attr]
    other = sources.build(Part(name="file_list", options={"root": str(loose), "kind": "images"}))
    batches = []
    for source in (packed, other):
        loader = Loader(config, {"images": source})
        batches.append([next(loader).images for _ in range(4)])
        loader.close()
    assert multiprocessing.active_children() == []
    for ours, theirs in zip(*batches):
        assert ours is not None and theirs is not None and torch.equal(ours.pixels, theirs.pixels)


def test_columns_are_found_or_named(pa, tmp_path):
    one = table(pa, 2).rename_columns(["photo", "kind"])
    write(tmp_path / "a.parquet", one)
    assert "a.parquet: expected a column of images, got photo (struct<" in refused(tmp_path)
    assert "with the option 'image'" in refused(tmp_path)
    assert built(tmp_path, image="photo").labels is None
    assert built(tmp_path, image="photo", label="kind").labels is not None
    assert "expected the column 'x' of the option 'label', got photo" in refused(tmp_path, image="photo", label="x")
    assert "expected 'kind' to be binary, or a struct of bytes and path, got int64" in refused(tmp_path, image="kind")
    both = table(pa, 2, second=pa.array([b"x"] * 2))
    about = json.dumps({"info": {"features": {name: {"_type": "Image"} for name in ("image", "second")}}})
    write(tmp_path / "a.parquet", both.replace_schema_metadata({"huggingface": about}))
    assert "the columns image, second are Images; name one with the option 'image'" in refused(tmp_path)
    for about in ("[]", "{", '{"info": 3}', '{"info": {"features": {"image": 3}}}', "[" * 100_000):
        write(tmp_path / "a.parquet", table(pa, 2).replace_schema_metadata({"huggingface": about}))
        assert len(built(tmp_path)) == 2


def test_labels(pa, tmp_path):
    def labelled(labels, names=None, **options):
        write(tmp_path / "a.parquet", table(pa, 3, labels=labels, names=names))
        found = built(tmp_path, **options)
        return None if found.labels is None else found.labels.tolist(), found.classes

    assert labelled([2, 0, 1]) == ([2, 0, 1], None)
    assert labelled(pa.array([2, 0, 1], pa.uint8()), NAMES) == ([2, 0, 1], NAMES)
    assert labelled([-1, -1, -1], NAMES) == (None, NAMES)
    assert labelled(pa.array([None] * 3, pa.int64())) == (None, None)
    assert labelled(["b", "a", "b"]) == ([1, 0, 1], ["a", "b"])
    assert labelled(pa.array(["b", "a", "b"]).dictionary_encode()) == ([1, 0, 1], ["a", "b"])
    (tmp_path / "classes.txt").write_text("\n".join(sorted(NAMES)))
    assert labelled([2, 0, 1], NAMES, classes="classes.txt") == ([1, 2, 0], sorted(NAMES))
    for labels, names, options, sentence in [
        ([2, -1, 1], NAMES, {}, "a.parquet/image/1: expected a label from 0 to 2, got -1"),
        ([2, 3, 1], NAMES, {}, "a.parquet/image/1: expected a label from 0 to 2, got 3"),
        ([2, 3, 1], None, {"classes": 3}, "a.parquet/image/1: expected a label from 0 to 2, got 3"),
        ([2, 0, -5], None, {}, "a.parquet/image/2: expected a label of at least 0, got -5"),
        ([0.5, 0, 1], None, {}, "a.parquet: expected the column 'label' to hold integers or words, got double"),
        ([[0], [1], [2]], None, {}, "expected the column 'label' to hold integers or words, got list"),
        ([0, None, 1], None, {}, "a.parquet/label/1: expected a label, as others have, got none"),
        ([0, 1, 2], NAMES, {"classes": 2}, "expected 2 classes, got the names of 3"),
        ([0, 1, 2], ["a", "a", "b"], {}, "expected each class name once"),
        (["a", "", "b"], None, {}, "a.parquet/image/1: expected the name of a class"),
    ]:
        with pytest.raises(DataError) as error:
            labelled(labels, names, **options)
        assert sentence in str(error.value)


def test_files_that_do_not_belong_together(pa, tmp_path):
    assert "there are no files *.parquet under" in refused(tmp_path)
    write(tmp_path / "a.parquet", table(pa, 3, names=NAMES))
    write(tmp_path / "b.parquet", table(pa, 3, names=NAMES[:2] + ["x"]))
    assert "b.parquet: expected the columns and class names of a.parquet" in refused(tmp_path)
    write(tmp_path / "b.parquet", table(pa, 3, names=NAMES).slice(0, 0))
    assert len(built(tmp_path)) == 3 and "hold no rows" in refused(tmp_path, files="b.parquet")
    (tmp_path / "c.parq").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert "expected names that end in .parquet, got c.parq" in refused(tmp_path, files="c.*")
    whole = (tmp_path / "a.parquet").read_bytes()
    spoilt = whole[:-60] + b"\xff" * 52 + whole[-8:]
    for content in (b"", b"PAR1", whole[:-9], whole[: len(whole) // 2], b"<html>", spoilt):
        (tmp_path / "b.parquet").write_bytes(content)
        assert "b.parquet is damaged, or not a parquet file (" in refused(tmp_path)


def test_bad_rows_are_bad_files(pa, tmp_path):
    """Empty, none, text, a name that leads out, a name of a pipe, a file that is not there; then one that is."""
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data/pipe.jpg")
    Image.fromarray(media.picture(0)).save(tmp_path / "data/there.png")
    (tmp_path / "secret.png").write_bytes((tmp_path / "data/there.png").read_bytes())
    names = ["../secret.png", str(tmp_path / "secret.png"), "pipe.jpg", "gone.jpg", "a\0b", "there.png"]
    rows = [{"bytes": b"", "path": None}, {"bytes": None, "path": None}, None, {"bytes": b"text", "path": "x"}]
    rows += [{"bytes": None, "path": name} for name in names]
    found = pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))})
    write(tmp_path / "data/a.parquet", found, rows=3)
    source, kinds = built(tmp_path), []
    for k in range(len(rows) - 1):
        with pytest.raises(BadFile) as error:
            read_image(source.path(k))
        kinds.append((error.value.kind, error.value.reason.split("; ")[0].split(": ", 1)[-1]))
        assert error.value.path == f"{tmp_path}/data/a.parquet/image/{k}"
    assert kinds[:3] == [("corrupt", "no bytes in this row")] * 3 and "cannot identify" in kinds[3][1]
    assert all("which is not below the folder" in reason for _, reason in (*kinds[4:6], kinds[8]))
    assert "not a regular file" in kinds[6][1] and kinds[7] == ("missing", "no such file")
    assert (read_image(source.path(9)) == media.picture(0)).all()


def test_damage_and_change_after_the_start(pa, tmp_path):
    file = write(tmp_path / "a.parquet", table(pa, 8), rows=2)
    source, whole = built(tmp_path), file.read_bytes()
    place = whole.index(jpeg(4))
    seen = []
    for content in (
        whole[: place - 30] + b"\xff" * 30 + whole[place:], whole[: len(whole) // 2],
        write(tmp_path / "other/b.parquet", table(pa, 2)).read_bytes(),
    ):  # fmt: skip
        parquet_rows._reader.cache_clear()
        file.write_bytes(content)
        with pytest.raises(BadFile) as error:
            read_image(source.path(5))
        seen.append(error.value.reason)
    assert "fewer rows than it had" in seen[2] and all(seen)
    parquet_rows._reader.cache_clear()
    file.unlink()
    assert not source.path(5).exists()
    with pytest.raises(BadFile, match="missing"):
        probe_image(source.path(5))
    with pytest.raises(DataError, match="8 of 8 files looked for"):
        sources.preflight(source)


def test_a_bad_row_has_its_substitute(pa, tmp_path):
    found = table(pa, 6, form="binary")
    images = [b"text" if k == 2 else jpeg(k) for k in range(6)]
    write(tmp_path / "a.parquet", pa.table({"image": images, "label": found["label"]}), rows=2)
    section = {"source": {"name": "x"}, "mask": {"name": "blockwise", "options": {"min_block": 2}}, "batch": 6}
    section |= {"micro_batch": 6, "view": {"size": 64, "short_side": [64, 72]}}
    values = {"output": "u", "tokenizer": {"name": "x"}, "optim": {"lr": 1e-3}, "train": {"steps": 1}}
    item = StreamReader(parse(Config, values | {"images": section}, "test"), "images", built(tmp_path))[0]
    assert isinstance(item, dict) and [record["path"] for record in item["bad"]] == [f"{tmp_path}/a.parquet/image/2"]
    assert item["bad"][0]["kind"] == "unreadable"


def test_the_fingerprint_knows_rows_and_size(pa, tmp_path):
    write(tmp_path / "a.parquet", table(pa, 6))
    first = fingerprint(built(tmp_path))
    assert fingerprint(built(tmp_path)) == first
    write(tmp_path / "a.parquet", table(pa, 6, 1, labels=[k % 3 for k in range(6)]))
    assert {key for key, value in fingerprint(built(tmp_path)).items() if value != first[key]} == {"sizes"}


def test_large_groups_are_told(pa, tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", table(pa, 4))
    monkeypatch.setattr("bevt_fast.data.sources.parquet.LARGEST_GROUP", 0)
    with pytest.warns(UserWarning, match="1 row groups of .* write the files again with about 100 rows a group"):
        sources.build(Part(name="parquet", options={"root": str(tmp_path)}))


def test_without_pyarrow_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MachineError, match="needs pyarrow, and it is not installed: pip install"):
        sources.build(Part(name="parquet", options={"root": str(tmp_path)}))


def test_verify_and_the_tokenizer_take_a_folder_of_them(pa, tmp_path, capsys):
    images = [b"text" if k == 2 else jpeg(k) for k in range(6)]
    write(tmp_path / "in/a.parquet", pa.table({"image": images}), rows=2)
    command = ["verify", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    for checked in (6, 0):
        assert prepare.main(command) == 3
        said = capsys.readouterr()
        assert f"{checked} checked" in said.out and "no list names images in shards" in said.out
        assert "1 of 6 files are bad" in said.err
    (record,) = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert record["path"] == f"{tmp_path}/in/a.parquet/image/2" and record["kind"] == "unreadable"
    fit = ["tokenizer", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "t.safetensors"), "--codes", "4"]
    assert prepare.main([*fit, "--samples", "8", "--size", "32"]) == 0
    assert "fitted 4 ids to" in capsys.readouterr().out
