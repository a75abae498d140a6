"""Kinetics-400, however it was fetched: the official csv, a `path label` list (k400_train.txt), or class folders.

The official csv (label, youtube_id, time_start, time_end, split) names videos that have since left the web: those not
found are left out and counted in a warning. Files are found by their name `<id>_%06d_%06d` anywhere in the split's
folder, so class folders may have blanks or underscores in their names, or be missing. Class ids are the places of the
sorted class names of the whole csv.
"""

import csv
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import model_validator

from bevt_fast.data.annotations import read_list
from bevt_fast.data.folders import VIDEOS, by_class, by_stem, check_root, find_list, walk, where_they_are
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.text_lists import shown, text_lines
from bevt_fast.errors import DataError

CLASSES = 400
NAMES = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}  # as folders and in the csv
COLUMNS = ("label", "youtube_id", "time_start", "time_end")


class Options(ClipOptions):
    """`list` is a `path label` list, `annotations` the official csv; without either, class folders are read."""

    root: str
    split: Literal["train", "val", "test"] = "train"
    list: str | None = None
    annotations: str | None = None

    @model_validator(mode="after")
    def _one_list(self) -> "Options":
        if self.list is not None and self.annotations is not None:
            raise ValueError("list and annotations are two ways to say the same; write one of them")
        return self


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty line."""
    root = check_root(options.root)
    folders = [root / name for name in NAMES[options.split]]
    folder = next((folder for folder in folders if folder.is_dir()), root)
    labels, classes = None, None
    if options.list is not None:
        listing = read_list(find_list(options.list, root), classes=CLASSES)
        paths, labels, folder = listing.paths, listing.labels, where_they_are(listing.paths, root, folder)
    else:
        there = walk(folder, VIDEOS)
        if not there:
            raise DataError(f"the data folder {folder} holds no videos ({', '.join(VIDEOS)})")
        if options.annotations is not None:
            file = find_list(options.annotations, root)
            paths, labels, classes = _official(file, options.split, there, folder)
        else:
            paths = there
            labels, classes = by_class(paths)
    return Source(
        name="kinetics400",
        root=folder,
        paths=paths,
        labels=labels,
        classes=classes,
        frames=options.drawn(),
        min_frames=options.min_frames,
    )


def _official(file: Path, split: str, there: list[str], folder: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths, labels and class names of the rows of `split` whose videos are `there`."""
    rows = _read(file)
    classes = sorted({label for label, _, _ in rows})
    number = {label: k for k, label in enumerate(classes)}
    splits = {row_split for _, _, row_split in rows}
    rows = [row for row in rows if row[2] in (*NAMES[split], "")]
    if not rows:
        raise DataError(f"{file}: expected rows of the split {split!r}, got only {', '.join(sorted(splits))}")
    stems = by_stem(there)
    found = [(stems[stem], number[label]) for label, stem, _ in rows if stem in stems]
    if not found:
        raise DataError(
            f"{file}: none of its {len(rows)} videos, like {rows[0][1]}.mp4, is in {folder}; check the root"
        )
    if len(found) < len(rows):
        first = next(stem for _, stem, _ in rows if stem not in stems)
        missing = f"{len(rows) - len(found)} of {len(rows)} videos of {file}"
        warnings.warn(f"{missing} are not in {folder} and are left out, first {first}", stacklevel=3)
    return [path for path, _ in found], np.array([label for _, label in found], dtype=np.int64), classes


def _read(file: Path) -> list[tuple[str, str, str]]:
    """Class name, file name without suffix, and split ("" if the csv has no such column) of each row of the csv."""
    lines = text_lines(file)
    number, line = next(lines, (1, ""))
    header = [name.strip().lower() for name in _fields(f"{file}:{number}", line)]
    if not set(COLUMNS) <= set(header):
        raise DataError(f"{file}:{number}: expected the columns {', '.join(COLUMNS)}, got {shown(line)}")
    rows = []
    for number, line in lines:
        spot = f"{file}:{number}"
        row = dict(zip(header, _fields(spot, line)))
        label, video, start, end = (row.get(name, "").strip() for name in COLUMNS)
        if not (label and video and start.isdecimal() and end.isdecimal() and len(start + end) < 20):
            raise DataError(f"{spot}: expected label, youtube_id, and a start and end in seconds, got {shown(line)}")
        rows.append((label, f"{video}_{int(start):06d}_{int(end):06d}", row.get("split", "").strip()))
    if not rows:
        raise DataError(f"{file}: expected a row for each video, got none")
    return rows


def _fields(spot: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        raise DataError(f"{spot}: expected a csv line, got {shown(line)} ({error})") from None
