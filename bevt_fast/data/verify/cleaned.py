"""A source without its bad files, as a list that `file_list` reads back as the very same samples."""

import contextlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from bevt_fast.config import Part
from bevt_fast.data import sources
from bevt_fast.data.sources import Source


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file to write, which takes the place of `path` when it is whole."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield file
    aside.replace(path)


def write(source: Source, good: array, name: Path) -> Part | None:
    """Write the samples `good` of a source to the list `name` (its suffix is added), and its class names beside it.

    Returns the part of a configuration that reads it; None where a list cannot say it (every extent starts at 1).
    """
    labels, extents = source.labels, source.extents
    options: dict[str, Any] = {"root": str(source.root.absolute()), "kind": "clips" if source.frames else "images"}
    if source.frames is not None:
        count, stride, mode = source.frames
        options |= {"frames": count, "stride": stride, "mode": mode, "min_frames": source.min_frames}
    file = name.absolute().with_name(name.name + (".jsonl" if extents is None else ".txt"))
    options["list"] = str(file)
    if extents is not None:
        options |= {"columns": "path start total" if labels is None else "path total label", "delimiter": "tab"}
    if source.classes is not None:
        options["classes"] = len(source.classes)
        with replacing(file.with_name(f"{name.name}_classes.txt")) as names:
            names.writelines(f"{' '.join(class_name.split())}\n" for class_name in source.classes)
    with replacing(file) as lines:
        lines.writelines(_line(source, index) for index in good)
    part = Part(name="file_list", options=options)
    return part if _same(source, good, sources.build(part)) else None


def _line(source: Source, index: int) -> str:
    """A line of JSON where there are no extents, because it can say every path; else fields with tabs between them."""
    path = source.paths[index]
    label = None if source.labels is None else int(source.labels[index])
    if source.extents is None:
        return json.dumps(path if label is None else {"path": path, "label": label}) + "\n"
    first, count = source.extent(index)
    return f"{path}\t{first}\t{count}\n" if label is None else f"{path}\t{count}\t{label}\n"


def _same(source: Source, good: array, read: Source) -> bool:
    pick = np.frombuffer(good, np.int64)
    if len(read) != len(good) or any(source.paths[index] != path for index, path in zip(good, read.paths)):
        return False
    pairs = ((source.labels, read.labels), (source.extents, read.extents))
    return all(
        there is None if kept is None else there is not None and np.array_equal(kept[pick], there)
        for kept, there in pairs
    )
