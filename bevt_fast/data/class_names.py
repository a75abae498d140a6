"""Class names and their ids. The id of a name is its place in a file of classes or, without one, among the sorted names
of the list: the ids of two lists agree only where both name every class, so a part of a dataset needs the file.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bevt_fast.data.folders import find_list
from bevt_fast.data.text_lists import integer, read_json, shown, text_lines
from bevt_fast.errors import DataError

Classes = int | list[str] | None  # how many, or their names by id, where known

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_NUMBERED = re.compile(r"([0-9]{1,9})[\s,:]+(\S.*)")


def is_number(text: str) -> bool:
    """Whether a label is meant as a number, if perhaps a wrong one."""
    return _NUMBER.fullmatch(text) is not None


class Names:
    """The class names met while a list is read, numbered as they come."""

    def __init__(self):
        self.ids: dict[str, int] = {}

    def one(self, name: Any, spot: str) -> int:
        """The number of a name. Raises DataError that starts with `spot` for what is none."""
        if not isinstance(name, str) or not name.strip() or is_number(name.strip()):
            raise DataError(f"{spot}: expected the name of a class, as in the first lines, got {shown(name)}")
        return self.ids.setdefault(name.strip(), len(self.ids))

    def many(self, names: list[str]) -> list[int]:
        """The numbers of names. Raises ValueError where one is none."""
        fresh = set(names) - self.ids.keys()
        if any(not name or name != name.strip() or is_number(name) for name in fresh):
            raise ValueError
        return [self.ids.setdefault(name, len(self.ids)) for name in names]

    def settle(self, labels: np.ndarray, classes: Classes, spot: Callable[[int], str]) -> tuple[np.ndarray, list[str]]:
        """Class ids of the numbers in `labels`, and all class names. Raises DataError, which starts with `spot(row)`,
        for a name that `classes` has not.
        """
        known = classes if isinstance(classes, list) else sorted(self.ids)
        if isinstance(classes, int) and len(known) > classes:
            row = int(np.argmax(labels == classes))
            got = f"one more, {shown(list(self.ids)[classes])}"
            raise DataError(f"{spot(row)}: expected the names of {classes} classes, got {got}")
        place = {name: k for k, name in enumerate(known)}
        for name, number in self.ids.items():
            if name not in place:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                row = int(np.argmax(labels == number))
                raise DataError(f"{spot(row)}: expected one of the {len(known)} class names, got {shown(name)}{hint}")
        return np.array([place[name] for name in self.ids], dtype=np.int64)[labels], known


def find_classes(classes: int | str | None, *folders: Path) -> Classes:
    """The option `classes`: a number as it is, a file of names read. Raises DataError."""
    return read_classes(find_list(classes, *folders)) if isinstance(classes, str) else classes


def read_classes(file: Path) -> list[str]:
    """The class names of a file by id: a name a line; `id name` a line (UCF's classInd.txt, a csv with the header
    id,name), counted from 0 or 1; a JSON list of names, or a JSON object of name and id. Raises DataError.
    """
    if file.suffix.lower() == ".json":
        table = read_json(file)
        if isinstance(table, dict):
            return _by_id(
                file, {name: integer(value, "class id", f"{file}: {shown(name)}") for name, value in table.items()}
            )
        names = table
    else:
        lines = [line for _, line in text_lines(file)]
        if lines and re.fullmatch(r'"?id"?,"?(name|label|class)"?', lines[0].lower()):
            lines = lines[1:]
        numbered = [_NUMBERED.fullmatch(line) for line in lines]
        found = {match[2].strip('" '): int(match[1]) for match in numbered if match}
        if numbered and len(found) == len(lines):
            return _by_id(file, found)
        names = lines
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{file}: expected the names of the classes, a line each, got {shown(names)}")
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise DataError(f"{file}: expected the name of each class once, got {shown(twice)} twice")
    return names


def _by_id(file: Path, ids: dict[str, int]) -> list[str]:
    first = min(ids.values(), default=0)
    ordered = sorted(ids, key=ids.__getitem__)
    if first not in (0, 1) or [ids[name] for name in ordered] != list(range(first, first + len(ids))):
        raise DataError(
            f"{file}: expected the class ids 0 to {len(ids) - 1}, each once, got {shown(sorted(ids.values()))}"
        )
    return ordered
