"""Lines of text lists and the values in them, with the file and the line for every error.

A list is read in blocks of whole lines. A block of plain lines is split as a whole, which keeps a million lines to
seconds; a block with anything unusual in it (a comment, an empty line, a quote, a fault) is read line by line, so every
error has its line. Lines are bounded, so no file can fill the memory with one.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bevt_fast.errors import DataError

LONGEST_LINE = 64 * 1024  # bytes
BLOCK = 1024 * 1024  # bytes
LARGEST_JSON = 64 * BLOCK  # of a file that is taken as a whole

# what separates fields; a blank before one makes a line unusual
SIGNS = ("\t", ",", "::")

_INTEGER = re.compile(r"-?[0-9]{1,18}")


class Rows(NamedTuple):
    """Samples of a list: line (or entry) numbers from 1, paths, and the integers beside them, row by row."""

    numbers: list[int] | range
    paths: list[str]
    values: list[int]


def text_lines(file: Path, comments: bool = True) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text file with their numbers, stripped; empty ones left out, and # comments if there are."""
    for number, raw in blocks(file):
        yield from careful(file, number, raw, comments)


def open_list(file: Path):
    """The file, open for reading bytes. Raises DataError where it is none."""
    if file.is_dir():
        raise DataError(f"{file} is a folder; expected a list file (to read a folder, leave the list out)")
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"cannot read the list {file}: {error.strerror}; check the path") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file that is no list of samples. Raises DataError where it is none, or above 64 MiB."""
    with open_list(file) as opened:
        if file.stat().st_size > LARGEST_JSON:
            raise DataError(f"{file}: expected a JSON file of at most {LARGEST_JSON} bytes")
        try:
            return json.loads(opened.read().decode("utf-8-sig"))
        except UnicodeDecodeError:
            raise DataError(f"{file}: expected UTF-8 text; save it as UTF-8") from None
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: expected JSON, got: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: expected JSON, got: {error}") from None


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


def blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of about a mebibyte together, and the number of the first."""
    with open_list(file) as opened:
        number = 1
        while raw := opened.read(BLOCK):
            raw += opened.readline(LONGEST_LINE + 1)
            yield number, raw
            number += raw.count(b"\n")


def careful(file: Path, first: int, raw: bytes, comments: bool = True) -> Iterator[tuple[int, str]]:
    """The lines of a block one by one, as `text_lines` has them. Raises DataError."""
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
        if line and not (comments and line[0] == "#"):
            yield number, line


def plain(raw: bytes, first: int, quotes: bool = False, signs: tuple[str, ...] = SIGNS) -> list[str]:
    """The lines of a block in which nothing is unusual; `quotes` may be in them. Raises ValueError or IndexError for
    others.
    """
    text = raw.decode().replace("\r\n", "\n")
    # the first block may hold a header or a BOM, and is all there is of a small list
    if first == 1 or "\r" in text or "\0" in text or ('"' in text and not quotes):
        raise ValueError
    if any(sign in text and f" {sign}" in text for sign in signs):
        raise ValueError
    lines = text.removesuffix("\n").split("\n")
    ends = {line[0] for line in lines} | {line[-1] for line in lines}
    if "#" in ends or any(map(str.isspace, ends)):
        raise ValueError
    if max(map(len, lines)) > LONGEST_LINE // 4:  # a character has up to four bytes
        raise ValueError
    return lines
