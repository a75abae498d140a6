"""What a model is asked about: the run's own test data, a source by its JSON, or any file, folder or list."""

import json
from pathlib import Path

from bevt_fast.config import Part, parse
from bevt_fast.data import sources
from bevt_fast.data.annotations import read_list
from bevt_fast.data.class_names import read_classes
from bevt_fast.data.folders import VIDEOS, where_they_are
from bevt_fast.data.sources import ClipOptions, Source
from bevt_fast.data.views import Views
from bevt_fast.errors import ConfigError, DataError
from bevt_fast.training import labels
from bevt_fast.training.restored import Restored

LISTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".lst", ".list", ".parquet")
ALMOST_ALL = 0.99  # what is missing is counted; where next to everything is, the root is wrong


def open_source(
    restored: Restored,
    clip: ClipOptions,
    data: str | None,
    source: str | None,
    classes: str | int | None = None,
) -> Source:
    """The videos of `data` (a file, folder or list), of `source` (JSON, or a file of it), or of the run's own part for
    the test. `classes`, where labels are scored, is a file of class names or how many there are: a list's label beyond
    them is refused with its line. Raises ConfigError and DataError.
    """
    if data is not None and source is not None:
        raise ConfigError("--data and --source both say what to look at; give one of them")
    if data is not None:
        found = of_path(Path(data), clip, classes)
    elif source is not None:
        found = sources.build(_told(_part(source), classes))
    else:
        parts = {name: part for name, part in restored.parts.items() if name != "source"}
        if not parts:
            raise DataError(
                f"{restored.path} names no test data; give --data with a list or folder of labelled videos, or --source"
            )
        found = sources.build(_told(next(iter(parts.values())), classes))
    if len(found) > 1:
        sources.preflight(found, ALMOST_ALL)
    return found


def of_path(path: Path, clip: ClipOptions, classes: str | int | None = None) -> Source:
    """A video, the videos of a folder (labelled by its folders), or those of a list."""
    options = clip.model_dump()
    if path.is_dir():
        return sources.build(Part(name="file_list", options=options | {"root": str(path)}))
    if not path.is_file():
        raise DataError(f"there is nothing at {path}; give a video, a folder of videos, or a list of them")
    if path.suffix.lower() in VIDEOS or path.suffix.lower() not in LISTS:
        return Source(
            name=path.name, root=path.parent, paths=[path.name], frames=clip.drawn(), min_frames=clip.min_frames
        )
    names = read_list(path).paths
    here = path.absolute().parent
    options |= {"root": str(where_they_are(names, here, here.parent, Path.cwd())), "list": str(path.absolute())}
    named = str(Path(classes).absolute()) if isinstance(classes, str) else classes
    return sources.build(Part(name="file_list", options=options | ({"classes": named} if named else {})))


def check_class_names(restored: Restored, source: Source) -> None:
    """Raises DataError where the checkpoint and the data both name their classes, and differently: the numbers would
    mean other things.
    """
    ours, theirs = restored.description.class_names, source.classes
    if (k := labels.first_difference(ours, theirs)) is not None:
        assert ours and theirs
        raise DataError(
            f"class {k} is {ours[k]!r} for the checkpoint but {theirs[k]!r} in the source {source.name!r}; give the "
            "data's classes in the checkpoint's order"
        )


def views_of(restored: Restored, clips: int | None, crops: int | None, pixels: int | None) -> Views:
    """The views of the description with what the command line changes; a test of three crops has no margin around
    them (SPEC 6.6).
    """
    test = restored.description.test
    views = Views(test.clips, test.crops, test.size, test.short_side)
    if pixels is not None:
        views = views._replace(size=pixels, short_side=round(views.short_side * pixels / views.size))
    if crops is not None and crops != views.crops:
        views = views._replace(crops=crops, short_side=views.size if crops == 3 else views.size * 8 // 7)
    return views if clips is None else views._replace(clips=clips)


def names_of(restored: Restored, file: str | None) -> list[str] | None:
    """The class names of a file, or else those of the checkpoint. Raises DataError for another number of them."""
    names = read_classes(Path(file)) if file is not None else restored.class_names()
    if names is not None and len(names) != restored.description.classes:
        raise DataError(f"{file} names {len(names)} classes, the checkpoint has {restored.description.classes}")
    return names


def _told(part: Part, classes: str | int | None) -> Part:
    return labels.told(part, classes) if isinstance(classes, int) else part


def _part(text: str) -> Part:
    """A source as `{"name": ..., "options": ...}`, written out or in a file."""
    where = "--source"
    if not text.lstrip().startswith("{"):
        where = text
        try:
            text = Path(text).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"--source {where}: neither JSON nor a file that can be read: {error.strerror}") from None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f'{where}: expected {{"name": ..., "options": ...}}, got {type(values).__name__}')
    return parse(Part, values, where)
