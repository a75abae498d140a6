"""ImageNet-1K: class folders (`train/n01440764/*.JPEG`), or a `path label` list (ILSVRC2012_name_train_list.txt).

Class ids are the places of the sorted WordNet names. `val` may be one flat folder, and then has no labels.
"""

import re
from typing import Literal

from bevt_fast.config import Section
from bevt_fast.data.annotations import read_list
from bevt_fast.data.folders import IMAGES, by_class, check_root, find_list, walk, where_they_are
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError

CLASSES = 1000
# where the split folders are in the official archive and in its copies
PLACES = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")


class Options(Section):
    """`list` is relative to the working folder, `root` or the split folder; its paths to one of the latter two."""

    root: str
    split: Literal["train", "val"] = "train"
    list: str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty line."""
    root = check_root(options.root)
    folders = [root / place / options.split for place in PLACES]
    if options.list is not None:
        listing = read_list(find_list(options.list, root, *folders), classes=CLASSES)
        return Source(
            name="imagenet1k",
            root=where_they_are(listing.paths, root, *folders),
            paths=listing.paths,
            labels=listing.labels,
        )
    if any(re.fullmatch(r"n\d{8}", entry.name) for entry in root.iterdir()):
        folders.append(root)  # the class folders themselves
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise DataError(f"the data folder {root} has no folder {options.split!r}; set the option 'root' to its parent")
    paths = walk(folder, IMAGES)
    if not paths:
        raise DataError(f"the data folder {folder} holds no images ({', '.join(IMAGES)})")
    labels, classes = by_class(paths)
    return Source(name="imagenet1k", root=folder, paths=paths, labels=labels, classes=classes)
