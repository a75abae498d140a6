"""Text lists, one sample a line: which form they have, and their rows.

A list is read in blocks of whole lines. A block of plain lines is split as a whole, which keeps a million lines to
seconds; a block with anything unusual in it (a comment, an empty line, a quote, a fault) is read line by line, so every
error has its line. Lines are bounded, so no file can fill the memory with one.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bevt_fast.data.folders import IMAGES, VIDEOS
from bevt_fast.errors import DataError

LONGEST_LINE = 64 * 1024  # bytes
BLOCK = 1024 * 1024  # bytes

Delimiter = Literal["auto", "blank", "tab", "comma", "::"]
Columns = Literal["auto", "path", "path label", "path start total", "path total label"]

PATH_COLUMNS = ("path", "filename", "file", "video", "video_path", "filepath", "file_path", "image")
LABEL_COLUMNS = ("label", "label_id", "class_id", "target")

_DELIMITERS = {"blank": None, "tab": "\t", "comma": ",", "::": "::"}
_SHOWN = {None: " ", "\t": "<tab>", ",": ",", "::": "::"}
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")
_SUFFIXES = VIDEOS + IMAGES
_SUFFIX_NAMES = {suffix[1:] for suffix in _SUFFIXES}
_SUFFIX_AND_MORE = re.compile(rf"({'|'.join(map(re.escape, _SUFFIXES))})(\s|,|::)", re.IGNORECASE)


class Rows(NamedTuple):
    """Samples of a list: line (or entry) numbers from 1, paths, and the integers beside them, row by row."""

    numbers: list[int] | range
    paths: list[str]
    values: list[int]


class Form(NamedTuple):
    """How lines are read: the columns, one line (raising DataError), and many at once (raising ValueError)."""

    columns: str
    line: Callable[[str, str], tuple[str, list[int]]]  # (spot, line) to path and values
    lines: Callable[[list[str]], tuple[list[str], list[int]]]
    header: int = 0  # the line that is one


def read_text(file: Path, columns: Columns = "auto", delimiter: Delimiter = "auto") -> tuple[str, Iterator[Rows]]:
    """The columns of a text list, as in `Columns`, and its rows. Raises DataError with file and line."""
    form = _form(file, columns, delimiter)
    return form.columns, _rows(file, form)


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers, stripped; empty ones and # comments left out."""
    for number, raw in _blocks(file):
        yield from _careful(file, number, raw)


def open_list(file: Path):
    """The file, open for reading bytes. Raises DataError where it is none."""
    if file.is_dir():
        raise DataError(f"{file} is a folder; expected a list file (to read a folder, leave the list out)")
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the list {file}: {error.strerror}; check the path") from None


def integer(value: Any, what: str, spot: str) -> int:
    """`value` as an integer, if it is one or the digits of one. Raises DataError that starts with `spot`."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**18:
        return value
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    raise DataError(f"{spot}: expected an integer {what}, got {shown(value)}")


def shown(value: Any) -> str:
    """`value` for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of about a mebibyte together, and the number of the first."""
    with open_list(file) as opened:
        number = 1
        while raw := opened.read(BLOCK):
            raw += opened.readline(LONGEST_LINE + 1)
            yield number, raw
            number += raw.count(b"\n")


def _careful(file: Path, first: int, raw: bytes) -> Iterator[tuple[int, str]]:
    for number, piece in enumerate(raw.split(b"\n"), start=first):
        if len(piece) > LONGEST_LINE:
            raise DataError(f"{file}:{number}: expected a line of at most {LONGEST_LINE} bytes, got a longer one")
        try:
            line = piece.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            got = f"the byte 0x{piece[error.start]:02x}"
            raise DataError(f"{file}:{number}: expected UTF-8 text, got {got}; save it as UTF-8") from None
        if "\0" in line:
            raise DataError(f"{file}:{number}: expected text, got a zero byte; this is not a text file")
        if line and line[0] != "#":
            yield number, line


def _rows(file: Path, form: Form) -> Iterator[Rows]:
    for first, raw in _blocks(file):
        try:
            paths, values = form.lines(_plain(raw, first))
            yield Rows(range(first, first + len(paths)), paths, values)
        except (ValueError, IndexError, csv.Error):
            for number, line in _careful(file, first, raw):
                if number != form.header:
                    path, values = form.line(f"{file}:{number}", line)
                    yield Rows([number], [path], values)


def _plain(raw: bytes, first: int) -> list[str]:
    """The lines of a block in which nothing is unusual. Raises ValueError or IndexError for others."""
    text = raw.decode().replace("\r\n", "\n")
    # the first block may hold a header or a BOM, and is all there is of a small list
    if first == 1 or any(sign in text for sign in ("\r", "\0", '"')):
        raise ValueError
    if any(sign in text and f" {sign}" in text for sign in ("\t", ",", "::")):
        raise ValueError
    lines = text.removesuffix("\n").split("\n")
    ends = {line[0] for line in lines} | {line[-1] for line in lines}
    if "#" in ends or any(map(str.isspace, ends)):
        raise ValueError
    if max(map(len, lines)) > LONGEST_LINE // 4:  # a character has up to four bytes
        raise ValueError
    return lines


def _form(file: Path, columns: Columns, delimiter: Delimiter) -> Form:
    """The form of most of the first lines, so that one damaged line does not decide."""
    head = list(islice(text_lines(file), 200))
    if head and columns == "auto" and (form := _header(file, *head[0])):
        return form
    lines = [line for _, line in head]
    votes = Counter(_looks_like(line, delimiter) for line in lines)
    (form, mark), _ = votes.most_common(1)[0] if votes else (("path label", None), 0)
    if columns != "auto":
        form = columns
    elif form == "path numbers":
        tails = [line.rsplit(mark, 2)[1:] for line in lines if _looks_like(line, delimiter) == (form, mark)]
        starts = {first.strip() for first, _ in tails} <= {"0", "1"} or any(last.strip() == "-1" for _, last in tails)
        form = "path start total" if starts else "path total label"
    return _split_form(form, mark)


def _looks_like(line: str, delimiter: Delimiter) -> tuple[str, str | None]:
    """The form of one line; "path numbers" stands for the two forms of a folder and two numbers."""
    mark = _DELIMITERS.get(delimiter)
    if delimiter == "auto":
        marks = [mark for mark in ("::", "\t", ",") if mark in line]
        comma_is_in_the_path = marks[:1] == [","] and not _NUMBER.fullmatch(line.rsplit(",", 1)[1].strip())
        mark = marks[0] if marks and not comma_is_in_the_path else None
    fields = [field.strip() for field in line.rsplit(mark, 2)]
    numbers = [bool(_NUMBER.fullmatch(field)) for field in fields[1:]]
    if numbers == [True, True]:
        return ("path start total" if fields[0].lower().endswith(VIDEOS) else "path numbers"), mark
    if (numbers and numbers[-1]) or _has_more(line):
        return "path label", mark
    return "path", mark


def _has_more(path: str) -> bool:
    """Whether something stands behind a file name, as in 'a.mp4 cat'."""
    return not path.lower().endswith(_SUFFIXES) and _SUFFIX_AND_MORE.search(path) is not None


def _split_form(columns: str, mark: str | None) -> Form:
    """Columns split off from the right at `mark`."""
    names = columns.split()[1:]

    def one(spot: str, line: str) -> tuple[str, list[int]]:
        path, *fields = (field.strip() for field in line.rsplit(mark, len(names)))
        if mark == "," and len(path) > 1 and path[0] == path[-1] == '"':
            path = path[1:-1].replace('""', '"')
        if len(fields) != len(names) or not path or _has_more(path):
            raise DataError(f"{spot}: expected {_SHOWN[mark].join(columns.split())!r}, got {shown(line)}")
        return path, [integer(field, name, spot) for name, field in zip(names, fields)]

    def many(lines: list[str]) -> tuple[list[str], list[int]]:
        rows = [line.rsplit(mark, len(names)) for line in lines]
        paths, *fields = (list(column) for column in zip(*rows, strict=True))
        if len(fields) != len(names):
            raise ValueError
        return _simple(paths), _integers(fields)

    return Form(columns, one, many)


def _header(file: Path, number: int, line: str) -> Form | None:
    """The form of a csv file, if `line` is its header. Raises DataError for a header without a path column."""
    for mark in (",", "\t", ";"):
        names = [name.strip(' "').lower() for name in line.split(mark)]
        if len(names) < 2 and not (file.suffix.lower() in (".csv", ".tsv") and names[0] in PATH_COLUMNS):
            continue
        path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
        label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
        if (path is None and label is None) or any(_NUMBER.fullmatch(name) for name in names):
            continue
        if path is None:
            hint = "; the source kinetics400 reads this form" if "youtube_id" in names else ""
            wanted = "a column path, filename, file or video"
            raise DataError(f"{file}:{number}: expected {wanted}, got {', '.join(names)}{hint}")
        return _csv_form(number, mark, path, label)
    return None


def _csv_form(header: int, mark: str, path: int, label: int | None) -> Form:
    def fields(lines: list[str]) -> list[list[str]]:
        return list(csv.reader(lines, delimiter=mark, strict=True, skipinitialspace=True))

    def one(spot: str, line: str) -> tuple[str, list[int]]:
        try:
            row = fields([line])[0]
            name, number = row[path].strip(), [] if label is None else [row[label].strip()]
        except (csv.Error, IndexError):
            name, number = "", []
        if not name:
            wanted = "the column path" if label is None else "the columns path and label"
            raise DataError(f"{spot}: expected {wanted} of the header, got {shown(line)}")
        return name, [integer(field, "label", spot) for field in number]

    def many(lines: list[str]) -> tuple[list[str], list[int]]:
        rows = fields(lines)  # a row a line: a block with a quote is read line by line
        return _simple([row[path] for row in rows]), [] if label is None else _integers([[row[label] for row in rows]])

    return Form("path" if label is None else "path label", one, many, header)


def _simple(paths: list[str]) -> list[str]:
    """`paths`, if each is there and no more than a path. Raises ValueError."""
    unknown = {path.rpartition(".")[2] for path in paths} - _SUFFIX_NAMES
    if unknown and any(not path or _has_more(path) for path in paths):
        raise ValueError
    return paths


def _integers(columns: list[list[str]]) -> list[int]:
    """The numbers of `columns`, row by row. Raises ValueError where a field is none."""
    for column in columns:
        # int() takes signs, underscores and other scripts' digits, which are faults here; int64 takes 18 digits
        if not re.fullmatch("[-0-9,]*", ",".join(column)) or max(map(len, column)) > 18:
            raise ValueError
    if len(columns) == 1:
        return list(map(int, columns[0]))
    return [int(field) for row in zip(*columns) for field in row]
