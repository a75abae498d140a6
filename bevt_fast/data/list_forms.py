"""Text lists, one sample a line: which form they have, and their rows."""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from bevt_fast.data.class_names import Names, is_number
from bevt_fast.data.folders import IMAGES, VIDEOS
from bevt_fast.data.text_lists import Rows, blocks, careful, integer, plain, shown, text_lines
from bevt_fast.errors import DataError

Delimiter = Literal["auto", "blank", "tab", "comma", "::"]
Columns = Literal["auto", "path", "path label", "path start total", "path total label"]

PATH_COLUMNS = ("path", "filename", "file", "video", "video_path", "filepath", "file_path", "image")
LABEL_COLUMNS = ("label", "label_id", "class_id", "target", "class", "class_name", "category")

_DELIMITERS = {"blank": None, "tab": "\t", "comma": ",", "::": "::"}
_SHOWN = {None: " ", "\t": "<tab>", ",": ",", "::": "::"}
_SUFFIXES = VIDEOS + IMAGES
_SUFFIX_NAMES = {suffix[1:] for suffix in _SUFFIXES}
_SUFFIX = rf"(?:{'|'.join(map(re.escape, _SUFFIXES))})"
_SUFFIX_AND_MORE = re.compile(rf"{_SUFFIX}\"?(\s|,|::)", re.IGNORECASE)
# the last suffix ends the path, because a class name has none
_FILE_AND_NAME = re.compile(rf"\s*(.*{_SUFFIX})\s*(\s|,|::)\s*(.*?)\s*", re.IGNORECASE)
_QUOTED_AND_NAME = re.compile(r'\s*("(?:[^"]|"")+")\s*(,)\s*(.*?)\s*')


class Form(NamedTuple):
    """How lines are read: the columns, one line (raising DataError), and many at once (raising ValueError)."""

    columns: str
    line: Callable[[str, str], tuple[str, list[int]]]  # (spot, line) to path and values
    lines: Callable[[list[str]], tuple[list[str], list[int]]]
    header: int = 0  # the line that is one
    quotes: bool = False  # whether `lines` takes lines with quotes


def read_text(
    file: Path, names: Names, columns: Columns = "auto", delimiter: Delimiter = "auto"
) -> tuple[str, Iterator[Rows]]:
    """The columns of a text list, as in `Columns`, and its rows. Labels that are words are put into `names`.

    Raises DataError with file and line.
    """
    form = _form(file, names, columns, delimiter)
    return form.columns, _rows(file, form)


def _rows(file: Path, form: Form) -> Iterator[Rows]:
    for first, raw in blocks(file):
        try:
            paths, values = form.lines(plain(raw, first, form.quotes))
            yield Rows(range(first, first + len(paths)), paths, values)
        except (ValueError, IndexError, csv.Error):
            for number, line in careful(file, first, raw):
                if number != form.header:
                    path, values = form.line(f"{file}:{number}", line)
                    yield Rows([number], [path], values)


def _form(file: Path, names: Names, columns: Columns, delimiter: Delimiter) -> Form:
    """The form of most of the first lines, so that one damaged line does not decide."""
    head = list(islice(text_lines(file), 200))
    lines = [line for _, line in head]
    if head and columns == "auto" and (form := _header(file, head[0][0], lines, names)):
        return form
    votes = Counter(_looks_like(line, delimiter) for line in lines)
    (form, mark), _ = votes.most_common(1)[0] if votes else (("path label", None), 0)
    if form == "path name" and columns in ("auto", "path label"):
        return _named_form(mark, names)
    if columns != "auto":
        form = columns
    elif form == "path numbers":
        tails = [line.rsplit(mark, 2)[1:] for line in lines if _looks_like(line, delimiter) == (form, mark)]
        starts = {first.strip() for first, _ in tails} <= {"0", "1"} or any(last.strip() == "-1" for _, last in tails)
        form = "path start total" if starts else "path total label"
    return _split_form(form, mark)


def _looks_like(line: str, delimiter: Delimiter) -> tuple[str, str | None]:
    """The form of one line; "path numbers" stands for the two forms of a folder and two numbers, "path name" for a
    label that is a word.
    """
    mark = _DELIMITERS.get(delimiter)
    if delimiter == "auto":
        marks = [mark for mark in ("::", "\t", ",") if mark in line]
        comma_is_in_the_path = marks[:1] == [","] and not is_number(line.rsplit(",", 1)[1].strip())
        mark = marks[0] if marks and not comma_is_in_the_path else None
    fields = [field.strip() for field in line.rsplit(mark, 2)]
    numbers = [is_number(field) for field in fields[1:]]
    if numbers == [True, True]:
        return ("path start total" if fields[0].lower().endswith(VIDEOS) else "path numbers"), mark
    if numbers and numbers[-1] and not _has_more(line.rsplit(mark, 1)[0].rstrip()):
        return "path label", mark
    if named := _file_and_name(line):
        return "path name", mark if delimiter != "auto" else None if named[1].isspace() and mark != "\t" else named[1]
    if _has_more(line):
        return "path label", mark
    return ("path name" if mark and numbers else "path"), mark


def _file_and_name(line: str) -> tuple[str, str, str] | None:
    """The file, what separates, and the class name of a line like 'a b.mp4 riding a bike'."""
    found = _QUOTED_AND_NAME.fullmatch(line) or _FILE_AND_NAME.fullmatch(line)
    return (found[1], found[2], found[3]) if found and found[3] else None


def _has_more(path: str) -> bool:
    """Whether something stands behind a file name, as in 'a.mp4 cat'."""
    return not path.lower().endswith(_SUFFIXES) and _SUFFIX_AND_MORE.search(path) is not None


def _unquoted(field: str) -> str:
    whole = len(field) > 1 and field[0] == field[-1] == '"'
    return field[1:-1].replace('""', '"') if whole else field


def _named_form(mark: str | None, names: Names) -> Form:
    """A path, and all that follows it as the name of its class."""

    def one(spot: str, line: str) -> tuple[str, list[int]]:
        found = _file_and_name(line)
        if found:
            path, _, name = found
        else:
            path, name = line.rsplit(mark, 1) if len(line.split(mark)) > 1 else ("", "")
        path = _unquoted(path.strip())
        if not path or (not found and _has_more(path)):
            wanted = _SHOWN[mark].join(("path", "class name"))
            raise DataError(f"{spot}: expected {wanted!r}, got {shown(line)}")
        return path, [names.one(_unquoted(name.strip()), spot)]

    def many(lines: list[str]) -> tuple[list[str], list[int]]:
        found = [_FILE_AND_NAME.fullmatch(line) for line in lines]
        paths, labels = zip(*[(match[1], match[3]) for match in found if match])
        if len(paths) < len(lines):
            raise ValueError
        return list(paths), names.many(list(labels))

    return Form("path label", one, many)


def _split_form(columns: str, mark: str | None) -> Form:
    """Columns split off from the right at `mark`."""
    names = columns.split()[1:]

    def one(spot: str, line: str) -> tuple[str, list[int]]:
        path, *fields = (field.strip() for field in line.rsplit(mark, len(names)))
        path = _unquoted(path) if mark == "," else path
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


def _header(file: Path, number: int, lines: list[str], labels: Names) -> Form | None:
    """The form of a csv file, if the first of `lines` is its header. Raises DataError for a header without a path
    column.
    """
    for mark in (",", "\t", ";"):
        names = [name.strip(' "').lower() for name in lines[0].split(mark)]
        if len(names) < 2 and not (file.suffix.lower() in (".csv", ".tsv") and names[0] in PATH_COLUMNS):
            continue
        path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
        label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
        if (path is None and label is None) or any(map(is_number, names)):
            continue
        if path is None:
            hint = "; the source kinetics400 reads this form" if "youtube_id" in names else ""
            wanted = "a column path, filename, file or video"
            raise DataError(f"{file}:{number}: expected {wanted}, got {', '.join(names)}{hint}")
        return _csv_form(_Csv(number, mark, path, label), lines[1:], labels)
    return None


class _Csv(NamedTuple):
    """Where the header of a csv file stands and what it says: the sign between fields, and the columns by number."""

    header: int
    mark: str
    path: int
    label: int | None

    def rows(self, lines: list[str]) -> list[tuple[str, str]]:
        """Path and label ("" without a column) of each line. Raises csv.Error, IndexError, or ValueError where a quote
        joins two lines.
        """
        rows = list(csv.reader(lines, delimiter=self.mark, strict=True, skipinitialspace=True))
        if len(rows) != len(lines):
            raise ValueError
        return [(row[self.path], "" if self.label is None else row[self.label]) for row in rows]


def _csv_form(found: _Csv, lines: list[str], names: Names) -> Form:
    columns = "path" if found.label is None else "path label"

    def fields(line: str) -> tuple[str, str] | None:
        try:
            path, label = found.rows([line])[0]
        except (csv.Error, IndexError, ValueError):
            return None
        return (path.strip(), label.strip()) if path.strip() else None

    labels = [row[1] for line in lines if (row := fields(line))]
    named = found.label is not None and sum(map(is_number, labels)) * 2 < len(labels)

    def one(spot: str, line: str) -> tuple[str, list[int]]:
        row = fields(line)
        if row is None:
            wanted = "the column path" if found.label is None else "the columns path and label"
            raise DataError(f"{spot}: expected {wanted} of the header, got {shown(line)}")
        if found.label is None:
            return row[0], []
        return row[0], [names.one(row[1], spot) if named else integer(row[1], "label", spot)]

    def many(lines: list[str]) -> tuple[list[str], list[int]]:
        rows = found.rows(lines)
        paths = _simple([path for path, _ in rows])
        if found.label is None:
            return paths, []
        labels = [label for _, label in rows]
        return paths, names.many(labels) if named else _integers([labels])

    return Form(columns, one, many, found.header, quotes=True)


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
