"""HMDB51 by its official lists: for each class and fold a file <class>_test_split1.txt of `name.avi flag`, where 1 is
for training, 2 for testing, and 0 for neither.

Class ids are the places of the sorted class names. Videos are found by their names in the folder of their class, or
anywhere below the root, also where they are no longer .avi. Some names begin with #.
"""

from pathlib import Path
from typing import Literal

from bevt_fast.data.annotations import collect
from bevt_fast.data.folders import VIDEOS, check_root, named, walk
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.text_lists import Rows, shown, text_lines
from bevt_fast.errors import DataError

LISTS = ("testTrainMulti_7030_splits", "test_train_splits")  # the folder in the official archive, and in copies
FLAGS = {"train": "1", "test": "2"}


class Options(ClipOptions):
    """`lists` is the folder of the official lists, looked for below `root` if not given."""

    root: str
    split: Literal["train", "test"] = "train"
    fold: Literal[1, 2, 3] = 1
    lists: str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or lists that are missing or empty, or a faulty line."""
    root = check_root(options.root)
    places = [Path(options.lists), root / options.lists] if options.lists else [root, *(root / name for name in LISTS)]
    ending = f"_test_split{options.fold}.txt"
    files = next((found for place in places if (found := sorted(place.glob(f"*{ending}")))), [])
    if not files:
        looked = ", ".join(map(str, places))
        raise DataError(
            f"there are no lists like brush_hair{ending} in {looked}; set the option 'lists' to their folder"
        )
    classes = [file.name.removesuffix(ending) for file in files]
    paths, labels = [], []
    for label, file in enumerate(files):
        videos = _videos(file, FLAGS[options.split])
        paths += [f"{classes[label]}/{video}" for _, video in videos]
        labels += [label] * len(videos)
    listing = collect(f"{files[0].parent}:", "path label", [Rows(range(1, len(paths) + 1), paths, labels)])
    return Source(
        name=f"hmdb51 {options.split} {options.fold}",
        root=root,
        paths=named(listing.paths, walk(root, VIDEOS)),
        labels=listing.labels,
        classes=classes,
        frames=options.drawn(),
        min_frames=options.min_frames,
    )


def _videos(file: Path, wanted: str) -> list[tuple[int, str]]:
    """Line and name of the videos of a class that have the flag `wanted`."""
    videos = []
    for number, line in text_lines(file, comments=False):
        name, _, flag = line.rpartition(" ")
        if flag not in ("0", "1", "2") or not name.strip() or "/" in name or "\\" in name:
            raise DataError(f"{file}:{number}: expected 'name.avi flag', with a flag of 0, 1 or 2, got {shown(line)}")
        if flag == wanted:
            videos.append((number, name.strip()))
    return videos
