"""Images in parquet files, as Hugging Face's datasets have them (`data/train-00000-of-00040.parquet`), not unpacked.

`files` is a pattern (`data/train-*.parquet`) or a list of them, relative to `root`; without it all .parquet files below
`root` are read, so name the split where there are several. `image` and `label` name columns; without them they are the
ones the dataset's features call Image and ClassLabel, else those of the usual names. An image is {bytes, path} or
binary. A label is an integer, of the ClassLabel's names if it has them, or a word. The order of samples is drawn image
by image; reading one costs its row group, so groups of about a hundred rows (the libraries' own choice) read well.
"""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bevt_fast.config import Positive, Section
from bevt_fast.data.annotations import MOST_SAMPLES
from bevt_fast.data.class_names import Classes, Names, find_classes
from bevt_fast.data.file_patterns import find_files
from bevt_fast.data.folders import check_root
from bevt_fast.data.parquet_rows import LARGEST_GROUP, SUFFIX, Rows, library, open_parquet
from bevt_fast.data.sources import Source
from bevt_fast.data.text_lists import shown
from bevt_fast.errors import DataError

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "picture", "pixels")
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")


class Options(Section):
    """`classes` is the number of classes, or a file of their names: labels beyond it are refused."""

    root: str
    files: str | list[str] | None = None
    image: str | None = None
    label: str | None = None
    classes: Positive | str | None = None


@dataclass(frozen=True)
class _Columns:
    """Which columns the files have their images and labels in, and the names of a ClassLabel."""

    image: str
    label: str | None
    names: list[str] | None


def build(options: Options) -> Source:
    """The source. Raises DataError for files that are missing, damaged or of other columns, and for faulty labels;
    MachineError without pyarrow.
    """
    library()
    root = check_root(options.root)
    files = find_files(root, options.files, "files", (SUFFIX,))
    if other := next((name for name in files if not name.endswith(SUFFIX)), None):
        raise DataError(f"the option 'files': expected names that end in {SUFFIX}, got {other}")
    first: _Columns | None = None
    sizes, labels, large = [], [], 0
    for name in files:
        path = root / name
        parquet, columns = _opened(path, options)
        first = first or columns
        if columns != first:
            raise DataError(f"{path}: expected the columns and class names of {files[0]}; give them as two sources")
        about = parquet.metadata
        groups = [about.row_group(k) for k in range(about.num_row_groups)]
        if sum(group.num_rows for group in groups) != about.num_rows or min([0, *(g.num_rows for g in groups)]) < 0:
            raise DataError(f"{path} is damaged (its row groups have other rows than it says); fetch it again")
        if not about.num_rows:
            continue
        sizes.append((name, about.num_rows, path.stat().st_size))
        if sum(rows for _, rows, _ in sizes) > MOST_SAMPLES:
            raise DataError(f"{path}: expected at most {MOST_SAMPLES} images in all files; split them")
        large += sum(group.total_byte_size > LARGEST_GROUP for group in groups)
        labels.append(_labels(path, parquet, columns.label))
    assert first is not None
    if not sizes:
        raise DataError(f"{len(files)} files under {root} hold no rows; check the option 'files'")
    rows = Rows(sizes, first.image)
    if large:
        warnings.warn(
            f"{large} row groups of {root} are above {LARGEST_GROUP >> 20} MiB, and each image costs half of one to "
            "read; write the files again with about 100 rows a group",
            stacklevel=2,
        )
    known = find_classes(options.classes, root)
    found, classes = _settled(rows, root, labels, first, known)
    return Source(name="parquet", root=root, paths=rows, labels=found, classes=classes)


def _opened(path: Path, options: Options) -> tuple[Any, _Columns]:
    """A file and its columns. Raises DataError where it is damaged or has none for images."""
    try:
        parquet = open_parquet(path)
        schema = parquet.schema_arrow
    except Exception as error:  # pyarrow raises classes of its own, and any other of a damaged footer
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged, or not a parquet file ({reason}); fetch it again") from None
    features = _features(schema.metadata)
    types = {field.name: str(field.type) for field in schema}
    image = _column(path, types, features, ("image", options.image, "Image", IMAGE_COLUMNS))
    label = _column(path, types, features, ("label", options.label, "ClassLabel", LABEL_COLUMNS))
    if image is None:
        raise DataError(f"{path}: expected a column of images, got {_listed(types)}; name it with the option 'image'")
    kind = schema.field(image).type
    members = {kind.field(k).name: str(kind.field(k).type) for k in range(kind.num_fields)}
    if not _is_binary(types[image]) and not _is_binary(members.get("bytes", "")):
        raise DataError(f"{path}: expected {image!r} to be binary, or a struct of bytes and path, got {types[image]}")
    names = features.get(label or "", {}).get("names")
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return parquet, _Columns(image, label, names if named else None)


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    """What the datasets library says of the columns; nothing where it wrote none, or something else."""
    try:
        found = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: about for name, about in found.items() if isinstance(about, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _column(
    path: Path, types: dict[str, str], features: dict[str, dict[str, Any]], wanted: tuple[str, str | None, str, tuple]
) -> str | None:
    """The column that an option names, or a feature's type, or one of the usual names. Raises DataError."""
    option, named, feature, usual = wanted
    if named is not None:
        if named not in types:
            raise DataError(f"{path}: expected the column {named!r} of the option {option!r}, got {_listed(types)}")
        return named
    marked = [name for name, about in features.items() if about.get("_type") == feature and name in types]
    if len(marked) > 1:
        raise DataError(f"{path}: the columns {', '.join(marked)} are {feature}s; name one with the option {option!r}")
    return marked[0] if marked else next((name for name in usual if name in types), None)


def _listed(types: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in types.items())[:300] or "no column"


def _is_binary(kind: str) -> bool:
    return kind in ("binary", "large_binary")


def _labels(path: Path, parquet: Any, column: str | None) -> np.ndarray | list[str] | None:
    """The labels of a file: integers (n,) int64, or words; None where there are none. Raises DataError."""
    if column is None:
        return None
    try:
        read = parquet.read(columns=[column], use_threads=False).column(0)
        if str(read.type).startswith("dictionary"):
            read = read.cast(read.type.value_type)
        kind, count = str(read.type), read.null_count
        values = read.to_pylist() if kind in ("string", "large_string") else read.drop_null().to_numpy()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: the column {column!r} cannot be read ({reason}); fetch the file again") from None
    if len(read) != parquet.metadata.num_rows:
        raise DataError(f"{path}: expected {parquet.metadata.num_rows} labels, got {len(read)}; fetch the file again")
    if count == len(read):
        return None
    if count:
        row = int(np.argmax(read.is_null().to_numpy()))
        raise DataError(f"{path}/{column}/{row}: expected a label, as others have, got none")
    if isinstance(values, list):
        return values
    if values.dtype.kind not in "iu":
        raise DataError(f"{path}: expected the column {column!r} to hold integers or words, got {kind}")
    return values.astype(np.int64)


def _settled(
    rows: Rows, root: Path, labels: list[np.ndarray | list[str] | None], columns: _Columns, classes: Classes
) -> tuple[np.ndarray | None, list[str] | None]:
    """Class ids (n,) int64 and class names. Raises DataError for a label that is none of them."""

    def where(row: int) -> str:
        return str(rows.file(root, row))

    known = classes if isinstance(classes, list) else None
    there = [some for some in labels if some is not None]
    if not there:
        return None, known
    if len(there) < len(labels) or len({type(some) for some in there}) > 1:
        raise DataError(f"{root}: expected labels of one kind in every file, or in none; give them as two sources")
    names = Names()
    if isinstance(there[0], list):
        words = [word for some in there for word in some]
        numbers = np.array([names.one(word, where(row)) for row, word in enumerate(words)], dtype=np.int64)
        return names.settle(numbers, classes, where)
    numbers = np.concatenate(there)
    if (numbers == -1).all():  # how the datasets library writes a split without labels
        return None, known or columns.names
    count = len(columns.names) if columns.names else len(known) if known else classes
    bad = (numbers < 0) | (numbers >= (count if isinstance(count, int) else np.iinfo(np.int64).max))
    if bad.any():
        row = int(np.argmax(bad))
        wanted = f"from 0 to {count - 1}" if isinstance(count, int) else "of at least 0"
        raise DataError(f"{where(row)}: expected a label {wanted}, got {numbers[row]}")
    if columns.names is None:
        return numbers, known
    if len(set(columns.names)) < len(columns.names):
        raise DataError(f"{root}: expected each class name once, got {shown(columns.names)}")
    if known is None:
        if isinstance(classes, int) and classes < len(columns.names):
            raise DataError(f"{root}: expected {classes} classes, got the names of {len(columns.names)}")
        return numbers, columns.names
    names.ids = {name: number for number, name in enumerate(columns.names)}
    return names.settle(numbers, known, where)
