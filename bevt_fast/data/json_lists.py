"""Lists of samples in JSON: one list (.json), or an object or a string a line (.jsonl).

A list is read from pieces of the file, so it takes no more memory than its samples do: many entries at once where they
are objects, or strings, one after another; entry by entry where anything else stands between them, or is wrong.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from bevt_fast.data.class_names import Names, is_number
from bevt_fast.data.list_forms import LABEL_COLUMNS, PATH_COLUMNS
from bevt_fast.data.text_lists import BLOCK, Rows, blocks, careful, integer, open_list, plain, shown
from bevt_fast.errors import DataError

LARGEST_ENTRY = BLOCK  # characters
KEYS = (PATH_COLUMNS, LABEL_COLUMNS)
_BLANKS = re.compile(r"[ \t\r\n]+")
_DECODE = json.JSONDecoder().raw_decode
# an entry's last sign where another of its kind follows
_LAST = {"{": re.compile(r"\}(?=\s{0,99},\s{0,99}\{)"), '"': re.compile(r'"(?=\s{0,99},\s{0,99}")')}
_LAST_WITHIN = 4096  # characters before the end of a piece


def json_entries(file: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON list, numbered from 1. Raises DataError with the file, and the line where it is no JSON."""
    return chain.from_iterable(json_batches(file))


def json_batches(file: Path) -> Iterator[list[tuple[int, Any]]]:
    """As `json_entries`, some at a time."""
    with open_list(file):
        pass
    number = 1
    with file.open(encoding="utf-8-sig", newline="") as opened:
        try:
            for entries in _parsed(file, opened):
                yield list(enumerate(entries, start=number))
                number += len(entries)
        except UnicodeDecodeError:
            raise DataError(f"{file}: expected UTF-8 text; save it as UTF-8") from None


def json_rows(spot: str, batches: Iterator[list[tuple[int, Any]]], names: Names) -> tuple[str, Iterator[Rows]]:
    """The form and rows of JSON entries, which come some at a time; either all have labels or none has.

    Labels that are words are put into `names`.
    """
    head = next(batches, [])
    first = head[0][1] if head else None
    label = _label(first)
    kind = None if label is None else int if isinstance(label, int) or is_number(str(label)) else str
    keys = [
        next((name for name in columns if name in first), "") if isinstance(first, dict) else "" for columns in KEYS
    ]

    def rows() -> Iterator[Rows]:
        for batch in chain([head], batches):
            numbers, entries = [number for number, _ in batch], [entry for _, entry in batch]
            try:
                paths, values = _plain(entries, keys, kind, names)
            except (ValueError, KeyError, TypeError):
                checked = [_checked(f"{spot}{number}", entry, kind, names) for number, entry in batch]
                paths, values = [path for path, _ in checked], [value for _, value in checked if value is not None]
            yield Rows(numbers, paths, values)

    return ("path label" if kind else "path"), rows()


def _plain(entries: list[Any], keys: list[str], kind: type | None, names: Names) -> tuple[list[str], list[int]]:
    """Paths and labels of entries that are all as the first. Raises ValueError, KeyError or TypeError for others."""
    path, label = keys
    plain_strings = kind is None and set(map(type, entries)) == {str}
    paths = entries if plain_strings else [entry[path] for entry in entries]
    if set(map(type, paths)) != {str} or not all(paths) or any("\0" in path for path in paths):
        raise ValueError
    if kind is None:
        # an entry with a label among those that have none
        if not plain_strings and any(not entry.keys().isdisjoint(LABEL_COLUMNS) for entry in entries):
            raise ValueError
        return paths, []
    labels = [entry[label] for entry in entries]
    if set(map(type, labels)) != {kind} or (kind is int and max(map(abs, labels)) >= 10**18):
        raise ValueError
    return paths, labels if kind is int else names.many(labels)


def _checked(spot: str, entry: Any, kind: type | None, names: Names) -> tuple[str, int | None]:
    """Path and label of an entry. Raises DataError for what is none, or has a label of another kind than the first."""
    path = entry if isinstance(entry, str) else _path(entry)
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{spot}: expected a path, or an object with path and label, got {shown(entry)}")
    label = _label(entry)
    if (kind is None) != (label is None):
        wanted = "a label" if kind else "no label"
        raise DataError(f"{spot}: expected {wanted}, as in the first, got {shown(entry)}")
    if kind is None:
        return path, None
    return path, names.one(label, spot) if kind is str else integer(label, "label", spot)


def batched(entries: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """`entries`, some thousand at a time."""
    entries = iter(entries)
    while batch := list(islice(entries, 4096)):
        yield batch


def json_lines(file: Path) -> Iterator[list[tuple[int, Any]]]:
    """The values of a file with one a line and the numbers of their lines, some at a time. Raises DataError."""
    for first, raw in blocks(file):
        try:
            yield list(enumerate(_together(plain(raw, first, quotes=True, signs=())), start=first))
        except (ValueError, IndexError, RecursionError):
            yield from batched((number, _one(f"{file}:{number}", line)) for number, line in careful(file, first, raw))


def _together(lines: list[str]) -> list[Any]:
    """The values of many lines, parsed at once. Raises ValueError where a line is not one value."""
    if {(line[0], line[-1]) for line in lines} - {("{", "}"), ('"', '"')}:
        raise ValueError
    values = json.loads(f"[{','.join(lines)}]")
    if len(values) != len(lines):
        raise ValueError
    return values


def _one(spot: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{spot}: expected one JSON object or string a line, got: {error}") from None


def _path(entry: Any) -> Any:
    fields = entry if isinstance(entry, dict) else {}
    return next((fields[name] for name in PATH_COLUMNS if name in fields), None)


def _label(entry: Any) -> Any:
    fields = entry if isinstance(entry, dict) else {}
    return next((fields[name] for name in LABEL_COLUMNS if fields.get(name) is not None), None)


def _parsed(file: Path, opened: TextIO) -> Iterator[list[Any]]:
    """The entries of the list in an open file, some at a time, from as much of its text as the next of them needs."""
    text = _Text(opened)
    if (first := text.next()) != "[":
        got = "one dict" if first == "{" else shown(text.text[text.at :][:40])
        raise DataError(f"{file}: expected a JSON list of samples, got {got}")
    text.at += 1
    if text.next() == "]":
        return
    while True:
        text.next()
        yield text.several() or [_entry(file, text)]
        if (sign := text.next()) == "]":
            return
        if sign != ",":
            raise DataError(f"{file}:{text.line}: expected JSON, got: Expecting ',' delimiter")
        text.at += 1


def _entry(file: Path, text: "_Text") -> Any:
    """The next entry. Raises DataError with its line."""
    try:
        value, text.at = _DECODE(text.text, text.at)
        return value
    except json.JSONDecodeError as error:
        text.at = min(error.pos, len(text.text))
        raise DataError(f"{file}:{text.line}: expected JSON, got: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}:{text.line}: expected JSON, got: {error}") from None


class _Text:
    """The text of a file from `at` on: an entry of the largest size, or all that is left."""

    def __init__(self, opened: TextIO):
        self._opened, self._more, self._lines = opened, True, 1
        self._singly = 0  # to here entries are not tried together
        self.text, self.at = "", 0

    @property
    def line(self) -> int:
        return self._lines + self.text.count("\n", 0, self.at)

    def next(self) -> str:
        """The next sign that is no blank, to which it goes; "" at the end."""
        # most signs follow at once, or after one blank
        self.at += self.text.startswith(" ", self.at)
        sign = self.text[self.at : self.at + 1]
        if sign > " " and (not self._more or len(self.text) - self.at >= LARGEST_ENTRY):
            return sign
        while True:
            if self._more and len(self.text) - self.at < LARGEST_ENTRY:
                read = self._opened.read(4 * LARGEST_ENTRY)
                self._lines = self.line
                self._singly -= self.at
                self.text, self.at, self._more = self.text[self.at :] + read, 0, bool(read)
            if (blanks := _BLANKS.match(self.text, self.at)) is not None:
                self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more:
                return ""

    def several(self) -> list[Any]:
        """The next entries, to which it goes over, up to the last of a piece; none where they are not of one kind."""
        last = _LAST.get(self.text[self.at : self.at + 1])
        if last is None or self.at < self._singly:
            return []
        piece = self.text[self.at : self.at + LARGEST_ENTRY]
        ends = [found.end() for found in last.finditer(piece, len(piece) - _LAST_WITHIN)]
        try:
            # what is a list of whole entries when it is closed here is one in the file too
            entries = json.loads(f"[{piece[: ends[-1]]}]")
        except (ValueError, IndexError, RecursionError):
            self._singly = self.at + len(piece)
            return []
        self.at += ends[-1]
        return entries
