"""Diving48: the json of {vid_name, label, start_frame, end_frame}, or a `path label` list. Use the V2 files.

V2 corrects the labels of the first release, which has the same fields: nothing in a file tells the two apart. The
videos are cut to the dive, so start_frame and end_frame describe the whole file and are not needed. Class ids are as
they stand in the file.
"""

from pathlib import Path
from typing import Any

from bevt_fast.data.annotations import Listing, collect, read_list
from bevt_fast.data.folders import VIDEOS, by_stem, check_root, find_list, walk, where_they_are
from bevt_fast.data.json_lists import json_entries
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.text_lists import Rows, integer, shown
from bevt_fast.errors import DataError

CLASSES = 48


class Options(ClipOptions):
    """`annotations` is Diving48_V2_train.json, Diving48_V2_test.json, or a `path label` list."""

    root: str
    annotations: str


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty entry."""
    root = check_root(options.root)
    file = find_list(options.annotations, root)
    if file.suffix.lower() == ".json":
        listing = _official(file, root)
    else:
        listing = read_list(file, classes=CLASSES)
        folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
        root = where_they_are(listing.paths, root, *folders)
    return Source(
        name="diving48",
        root=root,
        paths=listing.paths,
        labels=listing.labels,
        frames=options.drawn(),
        min_frames=options.min_frames,
    )


def _official(file: Path, root: Path) -> Listing:
    stems = by_stem(walk(root, VIDEOS))
    rows = []
    for k, entry in json_entries(file):
        spot = f"{file}:entry {k}"
        video = _video(entry, spot)
        # a video that is not there keeps its place, for the check before the run to name it
        rows.append(Rows([k], [stems.get(video, video + ".mp4")], [integer(entry.get("label"), "label", spot)]))
    return collect(f"{file}:entry ", "path label", rows, CLASSES)


def _video(entry: Any, spot: str) -> str:
    video = entry.get("vid_name") if isinstance(entry, dict) else None
    if not isinstance(video, str) or not video or "\0" in video:
        raise DataError(f"{spot}: expected an object with vid_name and label, got {shown(entry)}")
    return video
