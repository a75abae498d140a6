"""Something-Something V2: the official json of {id, template, ...}, or a list (sthv2_train_list_videos.txt).

The class of a video is its template without the brackets, and its id stands in labels.json. Files are `<id>.webm` or
`<id>.mp4` anywhere below the root. SPEC 6.1 fine-tunes with the mode "uniform". Left and right matter in some classes.
"""

from pathlib import Path
from typing import Any

from bevt_fast.data.annotations import Listing, collect, read_list
from bevt_fast.data.folders import VIDEOS, by_stem, check_root, find_list, walk, where_they_are
from bevt_fast.data.json_lists import json_entries
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.text_lists import Rows, integer, read_json, shown
from bevt_fast.errors import DataError

CLASSES = 174
LABEL_FILES = ("labels.json", "something-something-v2-labels.json")


class Options(ClipOptions):
    """`annotations` is the official json or a list. `labels` is looked for beside it if not given."""

    root: str
    annotations: str
    labels: str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for a root or list that is missing or empty, or a faulty entry."""
    root = check_root(options.root)
    file = find_list(options.annotations, root)
    classes = None
    if file.suffix.lower() == ".json":
        classes = _classes(file, options.labels, root)
        listing = _official(file, root, classes)
    else:
        listing = read_list(file, classes=CLASSES)
        videos = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
        root = where_they_are(listing.paths, root, *videos)
    return Source(
        name="something_v2",
        root=root,
        paths=listing.paths,
        labels=listing.labels,
        classes=classes,
        frames=options.drawn(),
        min_frames=options.min_frames,
    )


def _classes(file: Path, labels: str | None, root: Path) -> list[str] | None:
    """The templates by class id."""
    beside = next((file.with_name(name) for name in LABEL_FILES if file.with_name(name).is_file()), None)
    found = find_list(labels, root, file.parent) if labels is not None else beside
    if found is None:
        return None
    table = read_json(found)
    if not isinstance(table, dict):
        raise DataError(f"{found}: expected an object of template and class id, got {shown(table)}")
    ids = {integer(value, "class id", f"{found}: {shown(name)}"): name for name, value in table.items()}
    if sorted(ids) != list(range(len(table))):
        raise DataError(f"{found}: expected the class ids 0 to {len(table) - 1}, each once, got {shown(sorted(ids))}")
    return [ids[k] for k in range(len(table))]


def _official(file: Path, root: Path, classes: list[str] | None) -> Listing:
    """The entries of the official json; those of the test set have no template, and then no entry has a label."""
    stems = by_stem(walk(root, VIDEOS))
    suffix = next((Path(path).suffix for path in stems.values()), ".webm")
    number = {name: k for k, name in enumerate(classes or [])}
    labelled = classes is not None and any(
        isinstance(entry, dict) and "template" in entry for _, entry in json_entries(file)
    )
    rows = []
    for k, entry in json_entries(file):
        video = _video(entry, f"{file}:entry {k}")
        values = []
        if labelled:
            template = str(entry.get("template", "")).replace("[", "").replace("]", "")
            if template not in number:
                raise DataError(f"{file}:entry {k}: expected a template that labels.json has, got {shown(template)}")
            values = [number[template]]
        # a video that is not there keeps its place, for the check before the run to name it
        rows.append(Rows([k], [stems.get(video, video + suffix)], values))
    return collect(f"{file}:entry ", "path label" if labelled else "path", rows, len(number) if labelled else None)


def _video(entry: Any, spot: str) -> str:
    """The id of an entry: a number, as text or not."""
    video = str(entry.get("id", "")) if isinstance(entry, dict) else ""
    if not (video.isascii() and video.isdigit() and len(video) < 20):
        raise DataError(f"{spot}: expected an object with a number as id, got {shown(entry)}")
    return video
