"""The samples of tar shards in the form WebDataset has them: members with the same name up to its first dot.

`n01/17.jpg` and `n01/17.cls` are the image and the label of one sample. A label is a number or the name of a class, in
a .cls file or as the entry "cls" or "label" of a .json file. An index of a million images is four arrays of numbers and
the names in one piece.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bevt_fast.data.folders import IMAGES
from bevt_fast.data.packed import PackedPaths, Part, inside
from bevt_fast.data.tar_index import Damaged, Entry, entries
from bevt_fast.data.text_lists import shown
from bevt_fast.errors import DataError

LARGEST_LABEL = 64 * 1024  # bytes of a .cls or .json file
_LABELS = (".cls", ".json")


class Members(PackedPaths):
    """Images of tar shards by number, each named <shard>/<member>."""

    def __init__(self, shards: list[str], arrays: dict[str, np.ndarray]):
        """`arrays`: for each image its `shard` int32, `offset` and `size` int64; `names` uint8, the names on end in
        UTF-8, and `ends` int64, where each ends there.
        """
        self.shards, self.arrays = shards, arrays
        self._names = arrays["names"].tobytes()

    def __len__(self) -> int:
        return len(self.arrays["offset"])

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"{self.shards[self.arrays['shard'][self._checked(index)]]}/{self._name(index)}"

    def file(self, root: Path, index: int) -> Part:
        index = self._checked(index)
        offset, size = int(self.arrays["offset"][index]), int(self.arrays["size"][index])
        return Part(inside(root, self.shards[self.arrays["shard"][index]]), self._name(index), offset, size)

    def take(self, indices: np.ndarray) -> "Members":
        names = [self._name(index).encode("utf-8", "surrogateescape") for index in indices.tolist()]
        chosen = {name: self.arrays[name][indices] for name in ("shard", "offset", "size")}
        return Members(self.shards, chosen | _joined(names))

    def _name(self, index: int) -> str:
        ends = self.arrays["ends"]
        start = int(ends[index - 1]) if index else 0
        return self._names[start : int(ends[index])].decode("utf-8", "surrogateescape")

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return index


class Scanned(NamedTuple):
    """What one shard holds: a row an image, and a sentence for each thing that is left out."""

    names: list[bytes]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    remarks: list[str]


def joined(shards: list[str], scanned: Sequence[Scanned]) -> Members:
    """The images of all shards, in order."""
    lengths = [len(some.names) for some in scanned]
    arrays = {
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), lengths),
        "offset": np.array([offset for some in scanned for offset in some.offsets], dtype=np.int64),
        "size": np.array([size for some in scanned for size in some.sizes], dtype=np.int64),
    }
    return Members(shards, arrays | _joined([name for some in scanned for name in some.names]))


def scan(path: Path) -> Scanned:
    """The images of a shard and their labels. What cannot be used is left out with a remark.

    Raises DataError for a file that is no tar, a name that leads out of the shard, two images or labels in one sample.
    """
    samples: dict[str, dict[str, Entry]] = {}
    left_out: dict[str, list[str]] = {}
    cut: str | None = None
    remarks: list[str] = []
    try:
        for entry in entries(path):
            cut, suffix = _key(path, entry)
            kind = _kind(entry, cut, suffix)
            if kind in ("image", *_LABELS):
                sample = samples.setdefault(cut, {})
                if kind in sample:
                    got = f"{sample[kind].name} and {entry.name}"
                    raise DataError(f"{path}: expected one {kind} in the sample {shown(cut)}, got {got}")
                sample[kind] = entry
            elif kind:
                left_out.setdefault(kind, []).append(entry.name)
        cut = None
    except Damaged as fault:
        after = f"the samples after {cut} are" if cut else "all it held is"
        remarks = [f"{path} is damaged from byte {fault.position} on ({fault.reason}): {after} left out"]
    remarks += [f"{path}: {len(names)} {kind} left out, first {names[0]}" for kind, names in left_out.items()]
    return _rows(path, samples, remarks, cut)


def _key(path: Path, entry: Entry) -> tuple[str, str]:
    """The name of the sample a member belongs to, and the rest of the member's name in lower case."""
    name = entry.name.removeprefix("./")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        raise DataError(f"{path}: expected names inside the shard, got {shown(entry.name)}; write the shard anew")
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _kind(entry: Entry, key: str, suffix: str) -> str | None:
    """The part of a sample a member is ("image", ".cls", ".json"), what is left out with it, or None for neither."""
    if entry.kind == "folder" or not key.rpartition("/")[2]:  # a hidden file has no key
        return None
    if entry.kind != "file":
        return f"{entry.kind}s"
    if suffix in _LABELS:
        return suffix
    if suffix in IMAGES:
        return "image"
    return "images with a second dot in their names" if suffix.endswith(IMAGES) else None


def _rows(path: Path, samples: dict[str, dict[str, Entry]], remarks: list[str], cut: str | None) -> Scanned:
    """The samples that have an image. Of the one a shard is `cut` after, the label may be lost."""
    found = Scanned([], [], [], [], remarks)
    labelled = any("image" in sample and len(sample) > 1 for sample in samples.values())
    if cut in samples and labelled and len(samples[cut]) < 2:
        del samples[cut]
    shard = os.open(path, os.O_RDONLY)
    try:
        for sample in samples.values():
            if "image" in sample:
                image = sample["image"]
                found.names.append(image.name.encode("utf-8", "surrogateescape"))
                found.offsets.append(image.offset)
                found.sizes.append(image.size)
                found.labels.append(_label(path, shard, sample))
    finally:
        os.close(shard)
    if alone := [key for key, sample in samples.items() if "image" not in sample]:
        remarks.append(f"{path}: {len(alone)} labels without an image are left out, first {alone[0]}")
    return found


def _label(path: Path, shard: int, sample: dict[str, Entry]) -> str | None:
    """What the label of a sample says, as text."""
    entry = next((sample[part] for part in _LABELS if part in sample), None)
    if entry is None:
        return None
    spot = f"{path}/{entry.name}"
    if entry.size > LARGEST_LABEL:
        raise DataError(f"{spot}: expected a label of at most {LARGEST_LABEL} bytes, got {entry.size}")
    raw = os.pread(shard, entry.size, entry.offset)
    try:
        if entry.name.lower().endswith(".cls"):
            return raw.decode().strip()
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{spot}: expected a label, got {shown(raw)} ({error})") from None
    if isinstance(value, dict):
        value = next((value[name] for name in ("cls", "label") if name in value), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise DataError(f"{spot}: expected a number or the name of a class, got {shown(value)}")
    return None if value is None else str(value)


def _joined(names: list[bytes]) -> dict[str, np.ndarray]:
    """The arrays `names` and `ends` of `Members`."""
    ends = np.cumsum(np.array([len(name) for name in names], dtype=np.int64))
    return {"names": np.frombuffer(b"".join(names), np.uint8), "ends": ends}
