"""Lists in every form, with every fault: what is read, and the sentence that refuses."""

import json
import re
import tracemalloc
import warnings

import numpy as np
import pytest

from bevt_fast.data import annotations, json_lists, text_lists
from bevt_fast.data.annotations import read_list
from bevt_fast.errors import DataError


def listed(tmp_path, text, name="list.txt", **options):
    file = tmp_path / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_list(file, **options)


def refused(tmp_path, text, name="list.txt", **options):
    """The error, without the folder."""
    with pytest.raises(DataError) as error:
        listed(tmp_path, text, name, **options)
    return str(error.value).replace(f"{tmp_path}/", "")


PATHS = ["a/one.mp4", "b/two words here.mp4", "/data/three.webm"]
LABELS = [3, 0, 173]
LABELLED = {
    "blank": "{} {}\n",
    "two blanks": "{}  {}\n",
    "tab": "{}\t{}\n",
    "comma": "{},{}\n",
    "comma and blank": "{}, {}\n",
    "colons": "{}::{}\n",
    "CRLF": "{} {}\r\n",
    "comments and empty lines": "# a list\n\n{} {}\n   \n",
    "blanks around": "  {} {}  \n",
}


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
@pytest.mark.parametrize("pattern", LABELLED.values(), ids=LABELLED)
def test_path_and_label(tmp_path, pattern, name):
    text = "".join(pattern.format(path, label) for path, label in zip(PATHS, LABELS))
    for written in (text, text.rstrip(), "\ufeff" + text):
        paths, labels, extents, _ = listed(tmp_path, written, name)
        assert (paths, extents) == (PATHS, None)
        assert labels is not None and labels.dtype == np.int64 and labels.tolist() == LABELS


HEADED = {
    "csv": ("list.csv", "path,label\na/one.mp4,3\nb/two.mp4,0\n"),
    "in txt": ("list.txt", "path,label\na/one.mp4,3\nb/two.mp4,0\n"),
    "other order, more columns": ("list.csv", "id,label,Video,caption\n7,3,a/one.mp4,x\n8,0,b/two.mp4,\n"),
    "tabs": ("list.tsv", "filename\tlabel\na/one.mp4\t3\nb/two.mp4\t0\n"),
    "semicolons": ("list.csv", "file;target\na/one.mp4;3\nb/two.mp4;0\n"),
    "quotes": ("list.csv", '"path","label"\n"a/one.mp4","3"\n"b/two.mp4",0\n'),
    "BOM and CRLF": ("list.csv", "\ufeffpath,label\r\na/one.mp4,3\r\n\r\nb/two.mp4,0\r\n"),
}


@pytest.mark.parametrize("name, text", HEADED.values(), ids=HEADED)
def test_csv_with_a_header(tmp_path, name, text):
    paths, labels, extents, _ = listed(tmp_path, text, name)
    assert (paths, extents) == (["a/one.mp4", "b/two.mp4"], None)
    assert labels is not None and labels.tolist() == [3, 0]


def test_csv_paths_with_commas_and_quotes(tmp_path):
    paths, labels, *_ = listed(tmp_path, 'path,label\n"a, b.mp4",1\n"say ""hi"".mp4",2\n', "list.csv")
    assert paths == ["a, b.mp4", 'say "hi".mp4'] and labels is not None and labels.tolist() == [1, 2]
    paths, labels, *_ = listed(tmp_path, '"a, b.mp4",1\n"say ""hi"".mp4",2\n', "list.csv")
    assert paths == ["a, b.mp4", 'say "hi".mp4'] and labels is not None and labels.tolist() == [1, 2]
    paths, labels, *_ = listed(tmp_path, "a, b.mp4 1\nc.mp4 2\n")
    assert paths == ["a, b.mp4", "c.mp4"] and labels is not None and labels.tolist() == [1, 2]


@pytest.mark.parametrize("text", ["a.mp4\nb c.webm\nd/e.JPEG\n", "path\na.mp4\nb c.webm\nd/e.JPEG\n"])
def test_paths_alone(tmp_path, text):
    assert listed(tmp_path, text, "list.csv") == (["a.mp4", "b c.webm", "d/e.JPEG"], None, None, None)
    assert listed(tmp_path, "folder one\nfolder two\n") == (["folder one", "folder two"], None, None, None)


EXTENTS = {
    "VideoMAEv2, whole files": ("a.mp4 0 -1\nb c.mp4 0 -1\n", ["a.mp4", "b c.mp4"], [[0, -1], [0, -1]], None),
    "VideoMAEv2, parts of files": ("a.mp4 10 300\na.mp4 400 32\n", ["a.mp4", "a.mp4"], [[10, 300], [400, 32]], None),
    "VideoMAEv2, commas": ("a.mp4,0,-1\nb.mp4,5,7\n", ["a.mp4", "b.mp4"], [[0, -1], [5, 7]], None),
    "VideoMAEv2, folders from 0": ("a b 0 300\nc 0 20\n", ["a b", "c"], [[0, 300], [0, 20]], None),
    "VideoMAEv2, folders from 1": ("a b 1 300\nc 1 20\n", ["a b", "c"], [[0, 300], [0, 20]], None),
    "mmaction2, folders": ("a b 300 5\nc 20 0\n", ["a b", "c"], [[0, 300], [0, 20]], [5, 0]),
}


@pytest.mark.parametrize("text, paths, extents, labels", EXTENTS.values(), ids=EXTENTS)
def test_parts_and_folders_of_frames(tmp_path, text, paths, extents, labels):
    found = listed(tmp_path, text)
    assert found.paths == paths and found.extents is not None and found.extents.tolist() == extents
    assert (found.labels is None) if labels is None else (found.labels is not None and found.labels.tolist() == labels)


def test_the_form_can_be_said(tmp_path):
    found = listed(tmp_path, "day 1 300\nday 2 20\n", columns="path label")
    assert found.paths == ["day 1", "day 2"] and found.labels is not None and found.labels.tolist() == [300, 20]
    found = listed(tmp_path, "a 3 300\nb 7 20\n", columns="path start total")
    assert found.extents is not None and found.extents.tolist() == [[3, 300], [7, 20]] and found.labels is None
    found = listed(tmp_path, "a,1 2\nb,2 3\n", delimiter="blank")
    assert found.paths == ["a,1", "b,2"] and found.labels is not None and found.labels.tolist() == [2, 3]


@pytest.mark.parametrize(
    "name, text, labels",
    [
        ("list.json", json.dumps([{"path": "a.mp4", "label": 3}, {"path": "b.mp4", "label": "0"}]), [3, 0]),
        ("list.json", json.dumps(["a.mp4", "b.mp4"]), None),
        ("list.json", "\ufeff" + json.dumps([{"video": "a.mp4"}, "b.mp4"]), None),
        ("list.jsonl", '{"file": "a.mp4", "label": 3}\n\n{"file": "b.mp4", "label": 0}\n', [3, 0]),
        ("list.jsonl", '"a.mp4"\r\n"b.mp4"\r\n', None),
    ],
)
def test_json(tmp_path, name, text, labels):
    found = listed(tmp_path, text, name)
    assert found.paths == ["a.mp4", "b.mp4"] and found.extents is None
    assert (found.labels is None) if labels is None else (found.labels is not None and found.labels.tolist() == labels)


FAULTS = {
    "empty": ("", "list.txt: expected lines like 'path label', got no sample at all"),
    "only comments": ("# nothing\n\n", "list.txt: expected lines like 'path label', got no sample at all"),
    "no label": ("a.mp4 1\nb.mp4\nc.mp4 2\n", "list.txt:2: expected 'path label', got 'b.mp4'"),
    "no label, commas": ("a.mp4,1\nb.mp4,2\nc.mp4\n", "list.txt:3: expected 'path,label', got 'c.mp4'"),
    "no path": ("a.mp4 1\n7\n", "list.txt:2: expected 'path label', got '7'"),
    "more columns": ("a.mp4 1\nb.mp4 2 3\nc.mp4 4\n", "list.txt:2: expected 'path label', got 'b.mp4 2 3'"),
    "negative": ("a.mp4 1\nb.mp4 -3\n", "list.txt:2: expected a label of at least 0, got -3"),
    "minus one": ("a.mp4 -1\n", "list.txt:1: expected a label of at least 0, got -1"),
    "float": ("a.mp4 1\n\nb.mp4 2.0\n", "list.txt:3: expected an integer label, got '2.0'"),
    "all floats": ("a.mp4 1.0\nb.mp4 2.0\n", "list.txt:1: expected an integer label, got '1.0'"),
    "word": ("a.mp4 3\nb.mp4 1\nc.mp4 cat\n", "list.txt:3: expected an integer label, got 'cat'"),
    "underscore": ("a.mp4 1\nb.mp4 1_0\n", "list.txt:2: expected an integer label, got '1_0'"),
    "huge": (
        "a.mp4 1\nb.mp4 99999999999999999999\n",
        "list.txt:2: expected an integer label, got '99999999999999999999'",
    ),
    "other digits": ("a.mp4 1\nb.mp4 \u0663\n", "list.txt:2: expected an integer label, got '\u0663'"),
    "total": ("a 0 300\nb 0 0\n", "list.txt:2: expected a total of at least 1, or -1 for all frames, got 0"),
    "start": ("a.mp4 0 300\nb.mp4 -2 5\n", "list.txt:2: expected a start of at least 0, got -2"),
    "two labels": (
        "a.mp4 1\nb.mp4 2\na.mp4 3\n",
        "list.txt:3: expected the label 1, as list.txt:1 says of 'a.mp4', got 3",
    ),
    "not UTF-8": (b"a.mp4 1\nb\xff.mp4 2\n", "list.txt:2: expected UTF-8 text, got the byte 0xff; save it as UTF-8"),
    "UTF-16": ("a.mp4 1\n".encode("utf-16"), "list.txt:1: expected UTF-8 text, got the byte 0xff; save it as UTF-8"),
    "binary": (b"a\0b 1\n", "list.txt:1: expected text, got a zero byte; this is not a text file"),
    "up": (
        "a.mp4 1\n../../etc/passwd 2\n",
        "list.txt:2: expected a path inside the root, got '../../etc/passwd'; write an absolute path instead",
    ),
    "up from inside": (
        "a/../../b.mp4 1\n",
        "list.txt:1: expected a path inside the root, got 'a/../../b.mp4'; write an absolute path instead",
    ),
    "up, the other slash": (
        "..\\b.mp4 1\n",
        "list.txt:1: expected a path inside the root, got '..\\\\b.mp4'; write an absolute path instead",
    ),
}


@pytest.mark.parametrize("text, sentence", FAULTS.values(), ids=FAULTS)
def test_faults_have_a_file_and_a_line(tmp_path, text, sentence):
    assert refused(tmp_path, text) == sentence


INSIDE = "; write an absolute path instead"
OTHER_FAULTS = [
    ("l.csv", "path,label\na,1\nb\n", "l.csv:3: expected the columns path and label of the header, got 'b'"),
    ("l.csv", "path,label\na,1.5\n", "l.csv:2: expected an integer label, got '1.5'"),
    ("l.csv", 'path,label\n"a,1\n', "l.csv:2: expected the columns path and label of the header, got '\"a,1'"),
    ("l.csv", "name,label\na,1\n", "l.csv:1: expected a column path, filename, file or video, got name, label"),
    ("l.csv", "path,label\n", "l.csv: expected lines like 'path label', got no sample at all"),
    ("l.json", "[]", "l.json: expected lines like 'path label', got no sample at all"),
    ("l.json", '{"path": "a"}', "l.json: expected a JSON list of samples, got one dict"),
    ("l.json", '["a.mp4",\n"b.mp4"', "l.json:2: expected JSON, got: Expecting ',' delimiter"),
    ("l.json", '["a.mp4", 3]', "l.json:entry 2: expected a path, or an object with path and label, got 3"),
    ("l.json", '[{"path": "a", "label": 1}, "b"]', "l.json:entry 2: expected a label, as in the first, got 'b'"),
    ("l.json", '[{"path": "a", "label": true}]', "l.json:entry 1: expected an integer label, got True"),
    ("l.json", '[{"path": "a", "label": 2.0}]', "l.json:entry 1: expected an integer label, got 2.0"),
    ("l.json", '[{"path": "a", "label": -2}]', "l.json:entry 1: expected a label of at least 0, got -2"),
    ("l.json", '["../a"]', f"l.json:entry 1: expected a path inside the root, got '../a'{INSIDE}"),
    ("l.jsonl", '"a"\n\n{', "l.jsonl:3: expected one JSON object or string a line, got: "),
]


@pytest.mark.parametrize("name, text, sentence", OTHER_FAULTS)
def test_faults_of_other_forms(tmp_path, name, text, sentence):
    assert refused(tmp_path, text, name).startswith(sentence)


NAMED = {
    "blank": ("l.txt", "a/one.mp4 riding a bike\nb c.mp4 abseiling\n"),
    "numbers in names": ("l.txt", "a/one.mp4 riding a bike\nb c.mp4 abseiling\nc.mp4 class 3\nd.mp4 class 12\n"),
    "tab": ("l.txt", "a/one.mp4\triding a bike\nb c.mp4\tabseiling\n"),
    "comma": ("l.csv", "a/one.mp4,riding a bike\nb c.mp4,abseiling\n"),
    "quotes": ("l.csv", '"a/one.mp4","riding a bike"\n"b c.mp4","abseiling"\n'),
    "colons": ("l.txt", "a/one.mp4::riding a bike\nb c.mp4::abseiling\n"),
    "header": ("l.csv", "video,class\na/one.mp4,riding a bike\nb c.mp4,abseiling\n"),
    "json": ("l.json", '[{"path": "a/one.mp4", "label": "riding a bike"}, {"path": "b c.mp4", "label": "abseiling"}]'),
    "jsonl": ("l.jsonl", '{"path": "a/one.mp4", "class": "riding a bike"}\n{"path": "b c.mp4", "class": "abseiling"}'),
    "folders": ("l.txt", "a/one\triding a bike\nb c\tabseiling\n"),
    "BOM, CRLF, blanks": ("l.txt", "\ufeffa/one.mp4  riding a bike \r\n\r\n  b c.mp4 abseiling\r\n"),
}


@pytest.mark.parametrize("name, text", NAMED.values(), ids=NAMED)
def test_class_names_as_labels(tmp_path, name, text):
    paths, labels, extents, classes = listed(tmp_path, text, name)
    assert classes is not None and classes == sorted(classes) and {"abseiling", "riding a bike"} <= set(classes)
    assert [path.removesuffix(".mp4") for path in paths[:2]] == ["a/one", "b c"] and extents is None
    assert labels is not None and [classes[label] for label in labels[:2]] == ["riding a bike", "abseiling"]
    known = ["x", *reversed(classes)]
    found = listed(tmp_path, text, name, classes=known)
    assert found.labels is not None and [known[label] for label in found.labels[:2]] == ["riding a bike", "abseiling"]
    assert found.classes == known


def test_names_in_all_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_lists, "BLOCK", 300)
    rows = [(f"class {k % 7}/video {k}.mp4", f"class {'gfedcba'[k % 7]}") for k in range(500)]
    texts = {
        "l.txt": "".join(f"{path} {name}\n" for path, name in rows),
        "l.csv": "path,label\n" + "".join(f'"{path}",{name}\n' for path, name in rows),
        "l.jsonl": "".join(json.dumps({"path": path, "label": name}) + "\n" for path, name in rows),
        "l.json": json.dumps([{"path": path, "label": name} for path, name in rows], indent=1),
    }
    for name, text in texts.items():
        found = listed(tmp_path, text, name)
        assert found.paths == [path for path, _ in rows] and found.classes == [f"class {x}" for x in "abcdefg"]
        assert found.labels is not None and found.labels.tolist() == [6 - k % 7 for k in range(500)]


NAME_FAULTS = [
    ("l.txt", "a.mp4 cat\nb.mp4 dog\nc.mp4 3\n", "l.txt:3: expected the name of a class, as in the first lines, got "),
    ("l.txt", "a.mp4 cat\nb.mp4 dog\nc.mp4\n", "l.txt:3: expected 'path class name', got 'c.mp4'"),
    ("l.txt", "a.mp4 cat\nb.mp4 dog\na.mp4 dog\n", "l.txt:3: expected the label 0, as l.txt:1 says of 'a.mp4', got 1"),
    ("l.csv", "path,label\na,cat\nb,dog\nc,\n", "l.csv:4: expected the name of a class, as in the first lines, got ''"),
    ("l.csv", "path,label\na,cat\nb,dog\nc,7\n", "l.csv:4: expected the name of a class"),
    ("l.csv", "path,label\na,1\nb,2\nc,dog\n", "l.csv:4: expected an integer label, got 'dog'"),
    ("l.json", '[{"path": "a", "label": "x"}, {"path": "b", "label": 1}]', "l.json:entry 2: expected the name of a"),
    ("l.json", '[{"path": "a", "label": 1}, {"path": "b", "label": "x"}]', "l.json:entry 2: expected an integer label"),
]  # fmt: skip


@pytest.mark.parametrize("name, text, sentence", NAME_FAULTS)
def test_faults_of_class_names(tmp_path, name, text, sentence):
    assert refused(tmp_path, text, name).startswith(sentence)


def test_an_unknown_class_has_its_line(tmp_path):
    for name, text in (("l.txt", "a.mp4 cat\nb.mp4 dgo\n"), ("l.csv", "path,label\nb.mp4,dgo\n")):
        expected = "l.{}:2: expected one of the 2 class names, got 'dgo'; did you mean 'dog'?"
        assert refused(tmp_path, text, name, classes=["cat", "dog"]) == expected.format(name[2:])


def test_json_is_read_in_pieces(tmp_path, monkeypatch):
    """Every place a piece can end: within a number, a string, an escape, between entries."""
    entries = [{"path": f'a\\u00e9"{k}.mp4', "label": 10**k} for k in range(9)]
    for size in range(60, 90):
        monkeypatch.setattr(json_lists, "LARGEST_ENTRY", size)
        for indent in (None, 1):
            found = listed(tmp_path, json.dumps(entries, indent=indent), "l.json")
            assert found.labels is not None and found.labels.tolist() == [10**k for k in range(9)]
            assert found.paths == [entry["path"] for entry in entries]
    assert refused(tmp_path, "[" + " " * 5000 + "]", "l.json").startswith("l.json: expected lines like")
    assert (
        refused(tmp_path, '["a.mp4",\n' + "\n" * 5000 + "?]", "l.json")
        == "l.json:5002: expected JSON, got: Expecting value"
    )


@pytest.mark.parametrize("between", [", ", " ,\r\n ", ",\n" + " " * 150])
def test_entries_together_and_one_by_one_are_the_same(tmp_path, monkeypatch, between):
    """Whatever stands in an entry that looks like the end of one; and a fault, with its line."""
    words = ['"}, {"', '", "', "}, {", "[{", "\\", 'a\\"', "é", "x" * 40]
    inner = [{"a": 1}, [{"b": word} for word in words], {"c": {"d": [{}, {}]}}]
    entries = [{"path": word, "more": inner[k % 3], "label": k} for k, word in enumerate(words * 20)]
    entries += words * 20 + [3, None, [entries[0], entries[1]]] + entries
    text = f"[{between.join(json.dumps(entry, ensure_ascii=False) for entry in entries)}]"
    monkeypatch.setattr(json_lists, "_LAST_WITHIN", 300)
    file, found = tmp_path / "l.json", {}
    for together in (True, False):
        if not together:
            monkeypatch.setattr(json_lists, "_LAST", {})
        for cut in (len(text), len(text) * 3 // 4, len(text) // 3):
            file.write_text(text[:cut] + ("" if cut == len(text) else "?"), newline="")
            for size in (500, 3000):
                monkeypatch.setattr(json_lists, "LARGEST_ENTRY", size)
                seen = found.setdefault((together, cut, size), [])
                try:
                    seen += json_lists.json_entries(file)
                except DataError as error:
                    seen.append(str(error))
    assert found[True, len(text), 3000] == list(enumerate(entries, start=1))
    for (_, cut, size), seen in found.items():
        assert seen == found[False, cut, size]


def test_a_bomb_of_json_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lists, "LARGEST_ENTRY", 1000)
    for name, text in (
        ("l.json", '["a.mp4", [' + "[]," * 500_000 + "[]]]"),
        ("l.json", '["a.mp4", "' + "x" * 1_500_000),
    ):
        (tmp_path / name).write_text(text)
        tracemalloc.start()
        with pytest.raises(DataError, match=r"l\.json:(1: expected JSON|entry 2: expected a path)"):
            read_list(tmp_path / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 500_000


FORMS = {
    "l.txt": ("", "{} {}\n"),
    "l.csv": ("path,label\n", '"{}",{}\n'),
    "l.jsonl": ("", '{{"path": "{}", "label": {}}}\n'),
    "l.json": ("[\n", '{{"path": "{}", "label": {}}},\n'),
    "names.txt": ("", "{} riding a bike {}\n"),
}


@pytest.mark.parametrize("name, head, line", [(name, *form) for name, form in FORMS.items()], ids=FORMS)
def test_a_long_list_takes_what_its_samples_take(tmp_path, monkeypatch, name, head, line):
    """A million lines are to load in 1 GB; of the 300 bytes a line may take here, 110 are its path."""
    monkeypatch.setattr(text_lists, "BLOCK", 64 * 1024)
    monkeypatch.setattr(json_lists, "LARGEST_ENTRY", 16 * 1024)
    count = 20_000
    lines = (line.format(f"riding a bike/video {k:07d}_000010_000020.mp4", k % 400) for k in range(count))
    end = '{"path": "last.mp4", "label": 0}]' if name == "l.json" else ""
    (tmp_path / name).write_text(head + "".join(lines) + end)
    tracemalloc.start()
    found = read_list(tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # what a block and 4096 entries of JSON take does not grow with the list
    assert len(found.paths) in (count, count + 1) and peak < 300 * count + 2_500_000


def test_the_official_kinetics_csv_is_pointed_to_its_source(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\nabseiling,abc,1,11,train\n"
    assert "the source kinetics400 reads this form" in refused(tmp_path, header, "train.csv")


def test_labels_must_be_below_the_number_of_classes(tmp_path):
    text = "# fine\na.mp4 173\nb.mp4 174\n"
    assert (
        refused(tmp_path, text, classes=174) == "list.txt:3: expected a label below 174, the number of classes, got 174"
    )
    assert listed(tmp_path, text, classes=175).paths == ["a.mp4", "b.mp4"]


def test_steps_up_that_stay_inside_are_taken(tmp_path):
    assert listed(tmp_path, "a/../b.mp4 1\nc..d.mp4 2\n/x/../y.mp4 3\n").paths == ["b.mp4", "c..d.mp4", "/y.mp4"]


def test_repeated_lines_count_once_and_are_told(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a.mp4 1\nb.mp4 2\na.mp4 1\nb.mp4 2\n")
    with pytest.warns(UserWarning, match=r"list.txt: 2 lines repeat a sample, which counts once"):
        found = read_list(file)
    assert found.paths == ["a.mp4", "b.mp4"] and found.labels is not None and found.labels.tolist() == [1, 2]


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"cannot read the list .*nowhere.txt: No such file or directory; check the path"
    ):
        read_list(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="is a folder; expected a list file"):
        read_list(tmp_path)


def test_blocks_and_single_lines_read_the_same(tmp_path, monkeypatch):
    """A list of many blocks, most of them plain; each kind of unusual line somewhere."""
    monkeypatch.setattr(text_lists, "BLOCK", 300)
    rows = [(f"class {k % 7}/video_{k}.mp4", k % 7) for k in range(500)]
    for mark in (" ", "\t", ","):
        for end in ("\n", "\r\n"):
            lines = [f"{path}{mark}{label}{end}" for path, label in rows]
            for k, unusual in enumerate([f"#note{mark}3{end}", end, f"   {end}", f"\t# note{end}"]):
                lines.insert(90 * k + 55, unusual)
            lines[300] = "  " + lines[300]
            found = listed(tmp_path, "".join(lines))
            assert found.paths == [path for path, _ in rows]
            assert found.labels is not None and found.labels.tolist() == [label for _, label in rows]
    quoted = [f'{label},"{path}"\n' if label == 3 else f"{label},{path}\n" for path, label in rows]
    found = listed(tmp_path, "label,path\n" + "".join(quoted), "list.csv")
    assert found.paths == [path for path, _ in rows]
    assert found.labels is not None and found.labels.tolist() == [label for _, label in rows]


LATER = ("no label", "no path", "more columns", "negative", "float", "word", "underscore", "huge", "other digits")
LATER += ("two labels", "not UTF-8", "binary", "up", "up from inside")


@pytest.mark.parametrize("fault", LATER)
def test_faults_in_later_blocks_have_their_line_too(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(text_lists, "BLOCK", 300)
    text, sentence = FAULTS[fault]
    before = "".join(f"before/{k}.mp4 1\n" for k in range(400)).encode()
    expected = re.sub(r"list\.txt:(\d+)", lambda found: f"list.txt:{int(found[1]) + 400}", sentence)
    assert refused(tmp_path, before + (text if isinstance(text, bytes) else text.encode())) == expected


def test_memory_is_bounded(tmp_path, monkeypatch):
    file = tmp_path / "list.txt"
    file.write_bytes(b"a.mp4 1\n" + b"x" * (text_lists.LONGEST_LINE + 1) + b" 2\n")
    with pytest.raises(DataError, match=r"list.txt:2: expected a line of at most 65536 bytes, got a longer one"):
        read_list(file)
    with file.open("wb") as opened:  # a file of holes: 64 GiB without a line's end
        opened.truncate(64 * 1024**3)
    with pytest.raises(DataError, match=r"list.txt:1: expected a line of at most 65536 bytes"):
        read_list(file)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as opened:
        opened.truncate(text_lists.LARGEST_JSON + 1)
    with pytest.raises(DataError, match=r"expected a JSON file of at most 67108864 bytes"):
        text_lists.read_json(huge)
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 200_000)
    with pytest.raises(DataError, match=r"deep\.json"):
        read_list(deep)
    monkeypatch.setattr(annotations, "MOST_SAMPLES", 10)
    file.write_text("".join(f"{k}.mp4 1\n" for k in range(11)))
    with pytest.raises(DataError, match=r"list.txt:11: expected at most 10 samples; split the list"):
        read_list(file)
