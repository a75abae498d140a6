"""Lists of files in the forms that people have: read once, checked once, handed on as flat arrays (SPEC 5.3).

Every error names file, line, what was expected and what stood there. Nothing here touches the files a list names, so a
million lines load in seconds; a line, a JSON file or a list of absurd size is refused before it fills the memory.

Text lists are UTF-8 (a BOM and CRLF are fine), one sample a line; empty lines and lines that start with # are skipped.
Fields are split off from the right, so a path may contain blanks. The forms, recognised from the first lines:

    path label           mmaction2, Video-Swin, BEVT, VideoMAE's .csv; blanks, a tab, a comma or :: between them
    path                 no labels
    path start total     VideoMAEv2: a file (`path 0 -1`: all of it), or a folder of frames
    path total label     mmaction2's folders of frames
    path,label,...       csv with a header: a column path, filename, file or video, and perhaps label
    [{"path": ..., "label": ...}] or ["path", ...] in .json; one object or string a line in .jsonl

Two integers after a folder are `start total` if the second is -1 anywhere or the first is never above 1, else `total
label`; `columns` says so where the guess is wrong. A start of 1 in every line numbers the first frame of a folder, and
becomes 0. An identical line is one sample, however often it is repeated; a path with two labels is an error.
"""

import json
import posixpath
import re
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bevt_fast.data.folders import VIDEOS
from bevt_fast.data.text_lists import (
    PATH_COLUMNS,
    Columns,
    Delimiter,
    Rows,
    integer,
    open_list,
    read_text,
    shown,
    text_lines,
)
from bevt_fast.errors import DataError

LARGEST_JSON = 1024**3  # bytes
MOST_SAMPLES = 20_000_000


class Listing(NamedTuple):
    """What a list says: a row a sample. `labels` (n,) and `extents` (n, 2: first frame, count or -1) are int64."""

    paths: list[str]
    labels: np.ndarray | None
    extents: np.ndarray | None


def read_list(
    file: Path, *, columns: Columns = "auto", delimiter: Delimiter = "auto", classes: int | None = None
) -> Listing:
    """Read a list in any of the forms above. Raises DataError `file:line: expected ..., got ...`.

    `classes` is the number of classes, where known: a label that is not in [0, classes) is an error.
    """
    suffix = file.suffix.lower()
    if suffix == ".json":
        form, rows = _json_rows(f"{file}:entry ", json_entries(file))
        return collect(f"{file}:entry ", form, rows, classes)
    if suffix in (".jsonl", ".ndjson"):
        form, rows = _json_rows(f"{file}:", _json_lines(file))
    else:
        form, rows = read_text(file, columns, delimiter)
    return collect(f"{file}:", form, rows, classes)


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises DataError where it is not one, or larger than 1 GiB."""
    with open_list(file) as opened:
        if file.stat().st_size > LARGEST_JSON:
            raise DataError(f"{file}: expected a JSON file of at most {LARGEST_JSON} bytes; use a text list instead")
        try:
            return json.loads(opened.read().decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError(f"{file}: expected UTF-8 text; save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: expected JSON, got: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: expected a JSON list of samples, got: {error}") from None


def json_entries(file: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list, numbered from 1."""
    entries = read_json(file)
    if not isinstance(entries, list):
        raise DataError(f"{file}: expected a JSON list of samples, got one {type(entries).__name__}")
    return iter(enumerate(entries, start=1))


def collect(spot: str, form: str, rows: Iterable[Rows], classes: int | None = None) -> Listing:
    """Check `rows`, whose `values` are the columns of `form` after the path, and put them side by side.

    `spot` and the number of a row stand before an error: "list.txt:" and 12.
    """
    paths: list[str] = []
    numbers, flat = array("q"), array("q")
    for some in rows:
        paths += [
            path if ".." not in path else _inside(path, f"{spot}{number}")
            for number, path in zip(some.numbers, some.paths)
        ]
        numbers.extend(some.numbers)
        flat.extend(some.values)
        if len(paths) > MOST_SAMPLES:
            raise DataError(f"{spot}{numbers[MOST_SAMPLES]}: expected at most {MOST_SAMPLES} samples; split the list")
    if not paths:
        raise DataError(f"{spot.rpartition(':')[0]}: expected lines like 'path label', got no sample at all")
    table = np.array(flat, dtype=np.int64).reshape(len(paths), -1)
    column = {name: table[:, k] for k, name in enumerate(form.split()[1:])}
    _check(column, lambda i: f"{spot}{numbers[i]}", classes)
    labels, extents = column.get("label"), _extents(column, paths)
    keep = _distinct(paths, labels, extents, lambda i: f"{spot}{numbers[i]}")
    if keep is None:
        return Listing(paths, labels, extents)
    again = len(paths) - len(keep)
    warnings.warn(f"{spot.rpartition(':')[0]}: {again} lines repeat a sample, which counts once", stacklevel=3)
    pick = np.array(keep)
    return Listing(
        [paths[i] for i in keep],
        None if labels is None else labels[pick],
        None if extents is None else extents[pick],
    )


def _inside(path: str, spot: str) -> str:
    """`path` without its `..` steps. Raises DataError if a relative path leaves the root with them."""
    plain = posixpath.normpath(path.replace("\\", "/")) if ".." in re.split(r"[/\\]", path) else path
    if plain == ".." or plain.startswith("../"):
        raise DataError(f"{spot}: expected a path inside the root, got {shown(path)}; write an absolute path instead")
    return plain


def _check(column: dict[str, np.ndarray], spot: Callable[[int], str], classes: int | None) -> None:
    """Every number is one it can be; the first that is not is an error with its line."""

    def refuse(bad: np.ndarray, name: str, allowed: str) -> None:
        if bad.any():
            first = int(np.argmax(bad))
            raise DataError(f"{spot(first)}: expected a {name} {allowed}, got {column[name][first]}")

    if "label" in column:
        refuse(column["label"] < 0, "label", "of at least 0")
        if classes is not None:
            refuse(column["label"] >= classes, "label", f"below {classes}, the number of classes")
    if "start" in column:
        refuse(column["start"] < 0, "start", "of at least 0")
        refuse((column["total"] < 1) & (column["total"] != -1), "total", "of at least 1, or -1 for all frames")
    elif "total" in column:
        refuse(column["total"] < 1, "total", "of at least 1")


def _extents(column: dict[str, np.ndarray], paths: list[str]) -> np.ndarray | None:
    """First frame and number of frames, (n, 2), for the forms that have them."""
    if "total" not in column:
        return None
    total = column["total"]
    first = column.get("start", np.zeros_like(total))
    # folders number their frames from 1, files from 0
    if (first == 1).all() and not paths[0].lower().endswith(VIDEOS):
        first = first - 1
    return np.stack([first, total], axis=1)


def _distinct(
    paths: list[str], labels: np.ndarray | None, extents: np.ndarray | None, spot: Callable[[int], str]
) -> list[int] | None:
    """The first row of each sample, or None where all differ. Raises DataError for one sample with two labels."""
    if len(set(paths)) == len(paths):
        return None
    seen: dict[Any, int] = {}
    for i, path in enumerate(paths):
        sample = path if extents is None else (path, int(extents[i, 0]), int(extents[i, 1]))
        first = seen.setdefault(sample, i)
        if labels is not None and labels[first] != labels[i]:
            expected = f"the label {labels[first]}, as {spot(first)} says of {shown(path)}"
            raise DataError(f"{spot(i)}: expected {expected}, got {labels[i]}")
    return None if len(seen) == len(paths) else list(seen.values())


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in text_lines(file):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number}: expected one JSON object or string a line, got: {error}") from None


def _json_rows(spot: str, entries: Iterator[tuple[int, Any]]) -> tuple[str, Iterator[Rows]]:
    """The form and rows of a JSON list; either all entries have labels or none has."""
    head = list(islice(entries, 1))
    labelled = any(isinstance(entry, dict) and entry.get("label") is not None for _, entry in head)

    def rows() -> Iterator[Rows]:
        for number, entry in chain(head, entries):
            fields = {"path": entry} if isinstance(entry, str) else entry if isinstance(entry, dict) else {}
            path = next((fields[name] for name in PATH_COLUMNS if name in fields), None)
            if not isinstance(path, str) or not path or "\0" in path:
                raise DataError(
                    f"{spot}{number}: expected a path, or an object with path and label, got {shown(entry)}"
                )
            label = fields.get("label")
            if labelled != (label is not None):
                wanted = "a label" if labelled else "no label"
                raise DataError(f"{spot}{number}: expected {wanted}, as in the first, got {shown(entry)}")
            yield Rows([number], [path], [integer(label, "label", f"{spot}{number}")] if labelled else [])

    return ("path label" if labelled else "path"), rows()
