"""Images in tar shards, as WebDataset writes them, read where they are: any image at any time, nothing unpacked.

`shards` is a pattern (`train-{000000..000146}.tar`, `train-*.tar`) or a list of them, relative to `root`; without it
all .tar files below `root` are read. The order of samples is drawn image by image, as of every source: shards play no
part in it. Reading the headers of a million images takes half a minute of all cores together at each start; `index`
names a file that keeps what was found, for as long as the shards have the same sizes and times.
"""

import contextlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from bevt_fast.config import Positive, Section
from bevt_fast.data.class_names import Classes, Names, find_classes, is_number
from bevt_fast.data.file_patterns import find_files
from bevt_fast.data.folders import check_root
from bevt_fast.data.shard_scan import scan_all
from bevt_fast.data.shards import Members, Scanned, joined
from bevt_fast.data.sources import Source
from bevt_fast.data.text_lists import integer
from bevt_fast.errors import DataError

VERSION = "1"


class Options(Section):
    """`classes` is the number of classes, or a file of their names: labels beyond it are refused."""

    root: str
    shards: str | list[str] | None = None
    classes: Positive | str | None = None
    index: str | None = None


def build(options: Options) -> Source:
    """The source. Raises DataError for shards that are missing or none, names that lead out of one, faulty labels."""
    root = check_root(options.root)
    shards = find_files(root, options.shards, "shards", (".tar", ".tar.gz", ".tgz"))
    state = [[name, status.st_size, status.st_mtime_ns] for name in shards for status in [(root / name).stat()]]
    found = _Index.read(Path(options.index), state) if options.index else None
    if found is None:
        found = _Index.of(root, shards)
        if options.index:
            found.write(Path(options.index), state)
    for remark in found.remarks:
        warnings.warn(remark, stacklevel=2)
    if not len(found.members):
        raise DataError(f"{len(shards)} shards under {root} hold no images like 17.jpg; check the option 'shards'")
    labels, classes = found.settled(find_classes(options.classes, root))
    return Source(name="webdataset", root=root, paths=found.members, labels=labels, classes=classes)


class _Index:
    """What the headers of all shards say."""

    def __init__(self, members: Members, labels: np.ndarray | None, names: list[str], remarks: list[str]):
        """`labels` (n,) int64 are numbers of `names` if there are any."""
        self.members, self.labels, self.names, self.remarks = members, labels, names, remarks

    @classmethod
    def of(cls, root: Path, shards: list[str]) -> "_Index":
        """Reads all headers, of which a bar tells."""
        found = scan_all([root / name for name in shards])
        bar = tqdm(found, desc="reading the headers of shards", total=len(shards), leave=False, disable=None)
        with contextlib.closing(found):
            scanned = list(bar)
        members = joined(shards, scanned)
        labels, names = _numbers(members, root, scanned)
        return cls(members, labels, names, [remark for some in scanned for remark in some.remarks])

    @classmethod
    def read(cls, file: Path, state: list[list[Any]]) -> "_Index | None":
        """What `write` wrote; None if there is nothing, or the shards have changed since."""
        if not file.is_file():
            return None
        try:
            with safe_open(file, "np") as opened:
                about = opened.metadata() or {}
                if about.get("version") != VERSION or json.loads(about["shards"]) != state:
                    return None
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}
            labels, names, remarks = (
                arrays.pop("labels", None),
                json.loads(about["names"]),
                json.loads(about["remarks"]),
            )
            members = Members([name for name, _, _ in state], arrays)
            _check(members, labels, names, [size for _, size, _ in state])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError):
            warnings.warn(f"the index {file} is damaged and is made anew", stacklevel=3)
            return None
        return cls(members, labels, names, remarks)

    def write(self, file: Path, state: list[list[Any]]) -> None:
        """Writes the index, at once or not at all: several processes may do so together."""
        about = {"shards": state, "names": self.names, "remarks": self.remarks}
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        arrays = self.members.arrays | ({} if self.labels is None else {"labels": self.labels})
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            texts = {"version": VERSION} | {name: json.dumps(value) for name, value in about.items()}
            aside.write_bytes(save(arrays, texts))
            aside.replace(file)
        except OSError as error:
            raise DataError(f"cannot write the index {file}: {error.strerror or error}; name another 'index'") from None
        finally:
            with contextlib.suppress(OSError):
                aside.unlink()

    def settled(self, classes: Classes) -> tuple[np.ndarray | None, list[str] | None]:
        """Class ids and class names. Raises DataError for a label that `classes` has not."""
        known = classes if isinstance(classes, list) else None
        if self.labels is None:
            return None, known
        if self.names:
            names = Names()
            names.many(self.names)
            return names.settle(self.labels, classes, self._where)
        count = len(known) if known else classes
        if isinstance(count, int) and (self.labels >= count).any():
            row = int(np.argmax(self.labels >= count))
            got = self.labels[row]
            raise DataError(f"{self._where(row)}: expected a label below {count}, the number of classes, got {got}")
        return self.labels, known

    def _where(self, row: int) -> str:
        return self.members[row]


def _numbers(members: Members, root: Path, scanned: list[Scanned]) -> tuple[np.ndarray | None, list[str]]:
    """The labels as numbers, and the names these stand for if they are names. All images have labels, or none has."""
    labels = [label for some in scanned for label in some.labels]
    without = sum(label is None for label in labels)
    if without == len(labels):
        return None, []
    if without:
        row = labels.index(None)
        raise DataError(
            f"{root / members[row]}: expected a label (.cls or .json) beside it, as others have, got none "
            f"({without} of {len(labels)} images)"
        )
    texts = [label for label in labels if label is not None]
    names = Names()
    if is_number(texts[0]):
        numbers = np.array([integer(text, "label", members[row]) for row, text in enumerate(texts)], dtype=np.int64)
        if (numbers < 0).any():
            row = int(np.argmax(numbers < 0))
            raise DataError(f"{members[row]}: expected a label of at least 0, got {numbers[row]}")
        return numbers, []
    numbers = np.array([names.one(text, members[row]) for row, text in enumerate(texts)], dtype=np.int64)
    return numbers, list(names.ids)


def _check(members: Members, labels: np.ndarray | None, names: list[str], sizes: list[int]) -> None:
    """Raises ValueError, KeyError or IndexError where the arrays of an index do not belong together."""
    arrays, n = members.arrays, len(members)
    ends, shard = arrays["ends"], arrays["shard"]
    beyond = arrays["offset"] + arrays["size"] > np.array(sizes, dtype=np.int64)[shard]
    fine = ends.shape == shard.shape == arrays["size"].shape == (n,) and (labels is None or labels.shape == (n,))
    fine = fine and not beyond.any() and (np.diff(ends, prepend=0) > 0).all() and (shard >= 0).all()
    fine = fine and (arrays["offset"] >= 0).all() and (arrays["size"] >= 0).all()
    fine = fine and (n == 0 or int(ends[-1]) == len(arrays["names"]))
    fine = fine and (not names or (labels is not None and 0 <= labels.min() and labels.max() < len(names)))
    if not fine:
        raise ValueError("arrays of different lengths")
