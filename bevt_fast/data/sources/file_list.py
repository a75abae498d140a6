"""Any own data: a folder of files, or a list of them in any form that `bevt_fast.data.annotations` reads.

Without a list, the videos (or images) anywhere below `root` are taken in sorted order, and the first folder level names
the class if every file lies in a folder. With one, paths are relative to `root` or absolute.
"""

from typing import Literal

from bevt_fast.config import Positive
from bevt_fast.data.annotations import read_list
from bevt_fast.data.class_names import find_classes
from bevt_fast.data.folders import IMAGES, VIDEOS, by_class, check_root, find_list, walk
from bevt_fast.data.list_forms import Columns, Delimiter
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.errors import DataError


class Options(ClipOptions):
    """`classes` is the number of classes of a list, or a file of their names: labels beyond it are refused. `kind` says
    what the files are.
    """

    root: str
    list: str | None = None
    kind: Literal["clips", "images"] = "clips"
    columns: Columns = "auto"
    delimiter: Delimiter = "auto"
    classes: Positive | str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty line."""
    root = check_root(options.root)
    frames = options.drawn() if options.kind == "clips" else None
    if options.list is not None:
        file = find_list(options.list, root)
        classes = find_classes(options.classes, root, file.parent)
        listing = read_list(file, columns=options.columns, delimiter=options.delimiter, classes=classes)
        return Source(name="file_list", root=root, frames=frames, min_frames=options.min_frames, **listing._asdict())
    wanted, others = (VIDEOS, IMAGES) if options.kind == "clips" else (IMAGES, VIDEOS)
    paths = walk(root, wanted)
    if not paths:
        hint = (
            f"; there are files for the kind {'images' if others is IMAGES else 'clips'!r}"
            if walk(root, others)
            else ""
        )
        raise DataError(f"the data folder {root} holds no {options.kind} ({', '.join(wanted)}){hint}")
    labels, classes = by_class(paths)
    return Source(
        name="file_list",
        root=root,
        paths=paths,
        labels=labels,
        classes=classes,
        frames=frames,
        min_frames=options.min_frames,
    )
