"""Lists of files in the forms that people have: read once, checked once, handed on as flat arrays (SPEC 5.3).

Every error names file, line, what was expected and what stood there. Nothing here touches the files a list names, so a
million lines load in seconds; a line, a JSON file or a list of absurd size is refused before it fills the memory.

Text lists are UTF-8 (a BOM and CRLF are fine), one sample a line; empty lines and lines that start with # are skipped.
Fields are split off from the right, so a path may contain blanks. The forms, recognised from the first lines:

    path label           mmaction2, Video-Swin, BEVT, VideoMAE's .csv; blanks, a tab, a comma or :: between them
    path                 no labels
    path start total     VideoMAEv2: a file (`path 0 -1`: all of it), or a folder of frames
    path total label     mmaction2's folders of frames
    path,label,...       csv with a header: a column path, filename, file or video, and perhaps label or class
    [{"path": ..., "label": ...}] or ["path", ...] in .json; one object or string a line in .jsonl

A label is a number from 0 or the name of a class; `class_names.py` says which id a name has.

Two integers after a folder are `start total` if the second is -1 anywhere or the first is never above 1, else `total
label`; `columns` says so where the guess is wrong. A start of 1 in every line numbers the first frame of a folder, and
becomes 0. An identical line is one sample, however often it is repeated; a path with two labels is an error.
"""

import contextlib
import gc
import posixpath
import re
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bevt_fast.data.class_names import Classes, Names
from bevt_fast.data.folders import VIDEOS
from bevt_fast.data.json_lists import json_batches, json_lines, json_rows
from bevt_fast.data.list_forms import Columns, Delimiter, read_text
from bevt_fast.data.text_lists import Rows, shown
from bevt_fast.errors import DataError

MOST_SAMPLES = 20_000_000


class Listing(NamedTuple):
    """What a list says: a row a sample. `labels` (n,) and `extents` (n, 2: first frame, count or -1) are int64."""

    paths: list[str]
    labels: np.ndarray | None
    extents: np.ndarray | None
    classes: list[str] | None = None  # names by label, for lists that name them


def read_list(
    file: Path, *, columns: Columns = "auto", delimiter: Delimiter = "auto", classes: Classes = None
) -> Listing:
    """Read a list in any of the forms above. Raises DataError `file:line: expected ..., got ...`.

    `classes` is the number of classes or their names, where known: a label that is none of them is an error.
    """
    suffix, names = file.suffix.lower(), Names()
    spot = f"{file}:"
    if suffix == ".json":
        spot = f"{file}:entry "
        form, rows = json_rows(spot, json_batches(file), names)
    elif suffix in (".jsonl", ".ndjson"):
        form, rows = json_rows(spot, json_lines(file), names)
    else:
        form, rows = read_text(file, names, columns, delimiter)
    with _no_search_for_cycles():
        return collect(spot, form, rows, classes, names)


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Python looks for cycles the more often the more lists are made: a quarter of the time, and lines have none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect(spot: str, form: str, rows: Iterable[Rows], classes: Classes = None, names: Names | None = None) -> Listing:
    """Check `rows`, whose `values` are the columns of `form` after the path, and put them side by side.

    `spot` and the number of a row stand before an error: "list.txt:" and 12. Labels are numbers of `names` if it has
    any.
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

    def where(row: int) -> str:
        return f"{spot}{numbers[row]}"

    if names is not None and names.ids:
        column["label"], known = names.settle(column["label"], classes, where)
    else:
        known = classes if isinstance(classes, list) else None
        _check(column, where, len(known) if known else classes)  # pyright: ignore[reportArgumentType]
    labels, extents = column.get("label"), _extents(column, paths)
    keep = _distinct(paths, labels, extents, where)
    if keep is None:
        return Listing(paths, labels, extents, known)
    again = len(paths) - len(keep)
    warnings.warn(f"{spot.rpartition(':')[0]}: {again} lines repeat a sample, which counts once", stacklevel=3)
    pick = np.array(keep)
    return Listing(
        [paths[i] for i in keep],
        None if labels is None else labels[pick],
        None if extents is None else extents[pick],
        known,
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
