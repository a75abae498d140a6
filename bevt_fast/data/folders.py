"""Folders of videos or images: what is in them, in the same order everywhere, without opening a file."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bevt_fast.errors import DataError

VIDEOS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv", ".3gp", ".ogv", ".ts")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def check_root(root: str) -> Path:
    """`root` as a path. Raises DataError if there is no such folder."""
    path = Path(root)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"the data folder {path} {what}; set the option 'root' to where the files are")
    return path


def walk(root: Path, suffixes: tuple[str, ...]) -> list[str]:
    """The files below `root` with one of `suffixes` (any case), relative to it, sorted; hidden ones are left out."""
    return sorted(_files(root, "", suffixes, set()))


def _files(folder: Path, prefix: str, suffixes: tuple[str, ...], above: set[tuple[int, int]]) -> Iterator[str]:
    try:
        here = folder.stat()
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}; check its permissions") from None
    place = (here.st_dev, here.st_ino)
    if place in above:  # a link back to a folder that holds it
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        wanted = entry.name.lower().endswith(suffixes)
        # a link with the suffix of a file is taken for one: asking costs a stat a file
        if wanted and (entry.is_symlink() or not entry.is_dir()):
            yield prefix + entry.name
        elif entry.is_dir():
            yield from _files(folder / entry.name, f"{prefix}{entry.name}/", suffixes, above | {place})


def by_class(paths: list[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """Labels (n,) int64 and class names of files in one folder per class, in the order of the sorted names.

    Both are None unless every file lies below a folder.
    """
    if not all("/" in path for path in paths):
        return None, None
    names = [path.split("/", 1)[0] for path in paths]
    classes = sorted(set(names))
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64), classes


def by_stem(paths: list[str]) -> dict[str, str]:
    """The path of each file by its name without folder and suffix; of several, the first."""
    found: dict[str, str] = {}
    for path in paths:
        found.setdefault(path.rsplit("/", 1)[-1].rsplit(".", 1)[0], path)
    return found


def named(listed: list[str], there: list[str]) -> list[str]:
    """For each of `listed` the file of `there` with its folder and stem, else with its stem, whatever the suffixes.

    What is not there keeps its name, for the check before the run to tell.
    """
    stems = by_stem(there)
    places = {"/".join(path.rsplit("/", 2)[-2:]).rsplit(".", 1)[0]: path for path in reversed(there)}
    keys = ["/".join(path.rsplit("/", 2)[-2:]).rsplit(".", 1)[0] for path in listed]
    return [places.get(key) or stems.get(key.rsplit("/", 1)[-1], path) for key, path in zip(keys, listed)]


def find_list(name: str, *folders: Path) -> Path:
    """A list file: as written, or inside one of `folders`. Raises DataError that names where it was looked for."""
    places = [Path(name), *(folder / name for folder in folders)]
    for place in places:
        if place.is_file():
            return place
    raise DataError(f"the list {name} does not exist, here or in {', '.join(map(str, folders))}; check the path")


def where_they_are(paths: list[str], *folders: Path) -> Path:
    """The one of `folders` that the first few of `paths` are relative to; the first folder where none of them is."""
    for folder in folders:
        if any((folder / path).exists() for path in paths[:10]):
            return folder
    return folders[0]


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Makes the folder and keeps other programs out of it. Raises DataError where another one writes to it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another program is writing {out}; wait for it, or choose another --out") from None
        yield
