"""UCF101 by its official lists: trainlist01.txt (`Class/v_Class_g08_c01.avi 1`), testlist01.txt (no labels), and
classInd.txt, which counts the classes from 1.

Class ids are one less than in classInd.txt, for both splits. Videos are found by their names anywhere below the root,
also where they are no longer .avi.
"""

from pathlib import Path
from typing import Literal

from bevt_fast.data.annotations import collect
from bevt_fast.data.class_names import read_classes
from bevt_fast.data.folders import VIDEOS, check_root, find_list, named, walk
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.text_lists import Rows, shown, text_lines
from bevt_fast.errors import DataError

LISTS = "ucfTrainTestlist"  # the folder in the official archive


class Options(ClipOptions):
    """`lists` is the folder of the official lists, looked for below `root` if not given."""

    root: str
    split: Literal["train", "test"] = "train"
    fold: Literal[1, 2, 3] = 1
    lists: str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty line."""
    root = check_root(options.root)
    above = [root / LISTS, root, root.parent / LISTS]
    folders = [Path(options.lists), root / options.lists] if options.lists else above
    file = find_list(f"{options.split}list{options.fold:02d}.txt", *folders)
    classes = read_classes(find_list("classInd.txt", file.parent))
    number = {name: k for k, name in enumerate(classes)}
    rows = [_row(f"{file}:{k}", k, line, number) for k, line in text_lines(file)]
    listing = collect(f"{file}:", "path label", rows)
    return Source(
        name=f"ucf101 {options.split} {options.fold}",
        root=root,
        paths=named(listing.paths, walk(root, VIDEOS)),
        labels=listing.labels,
        classes=classes,
        frames=options.drawn(),
        min_frames=options.min_frames,
    )


def _row(spot: str, k: int, line: str, number: dict[str, int]) -> Rows:
    """One line of a list; a label, where there is one, is the class's."""
    path, *label = line.rsplit(None, 1)
    name = path.split("/")[-2] if "/" in path else ""
    if name not in number:
        raise DataError(f"{spot}: expected Class/video.avi, with a class of classInd.txt, got {shown(line)}")
    if label and label[0] != str(number[name] + 1):
        raise DataError(f"{spot}: expected the label {number[name] + 1}, as classInd.txt has {name}, got {label[0]}")
    return Rows([k], [path], [number[name]])
