"""Many files under one name, as shards are named: `train-{000000..000146}.tar`, `data/train-*.parquet`, or a list."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bevt_fast.data.folders import walk
from bevt_fast.errors import DataError

MOST_FILES = 100_000
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")


def find_files(root: Path, named: str | list[str] | None, option: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that the option `option` names, relative to `root` or absolute; all with one of `suffixes` below `root`
    where it names none. Raises DataError where one is not there, or is named twice.
    """
    if named is None:
        names = walk(root, suffixes)
    else:
        patterns = [named] if isinstance(named, str) else named
        names = [name for pattern in patterns for name in _expanded(root, pattern, option)]
    check = f"check the option {option!r}"
    if not names:
        raise DataError(
            f"there are no {option} {named or '*' + suffixes[0]} under {root}; check the options 'root' and {option!r}"
        )
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        first = f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        raise DataError(f"{len(missing)} of {len(names)} {option} are not under {root}: {first}; {check}")
    if len(set(names)) < len(names):
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise DataError(f"the option {option!r} names {twice} twice; name each file once")
    return names


def _expanded(root: Path, pattern: str, option: str) -> Iterator[str]:
    """The names a pattern stands for: {a,b} and {000..146} each of them, * and ? what is there."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(pattern, piece, option) if k % 2 else [piece] for k, piece in enumerate(pieces)]
    if np.prod([float(len(choice)) for choice in choices]) > MOST_FILES:
        raise DataError(
            f"the option {option!r} names more than {MOST_FILES} files: {pattern}; name fewer, larger files"
        )
    for name in map("".join, itertools.product(*choices)):
        if any(sign in name for sign in "*?"):
            base = Path(name).anchor or root
            for found in sorted(Path(base).glob(name.removeprefix(Path(name).anchor))):
                yield str(found if Path(name).anchor else found.relative_to(root))
        else:
            yield name


def _choices(pattern: str, braces: str, option: str) -> list[str] | range:
    if not (found := _RANGE.fullmatch(braces)):
        return braces.split(",")
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MOST_FILES:
        raise DataError(f"the option {option!r}: expected a range like 000000..000146 in {pattern}, got {braces}")
    return [f"{number:0{len(found[1])}d}" for number in range(first, last + 1)]
