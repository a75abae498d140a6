"""report.csv: a row a file, appended as files are checked, so that a killed program goes on where it was.

A row is one line, whatever its path holds. Of the rows only their places in the file are kept in memory.
"""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bevt_fast.data.verify.examine import DEPTHS, Depth, Job, Look
from bevt_fast.errors import DataError

COLUMNS = (
    *("path", "status", "reason", "container", "codec", "pixel_format", "width", "height", "rotation", "frames"),
    *("duration_s", "fps", "frame_rate", "keyframe_longest", "keyframe_mean", "phases"),
    *("exif_orientation", "bytes"),
    *("decoder", "nvdec", "depth", "kind", "first", "count", "min_frames", "shard", "changed_ns"),
)
ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r"})


class Report:
    """The rows of a report, by job. Rows of a report that is there are kept; a last one cut in two is dropped.

    Raises DataError where something else stands at `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[int, int] = {}
        self._file = path.open("a+b")
        self._take_over()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def add(self, job: Job, depth: Depth, row: dict[str, Any]) -> None:
        """Write a row; it is on its way to the disk when this returns."""
        place = self._file.seek(0, os.SEEK_END)
        reason = " ".join(str(row.get("reason", "")).split())[:500]
        row = row | job._asdict() | {"depth": depth, "reason": reason}
        self._file.write(line([row.get(column, "") for column in COLUMNS]))
        self._file.flush()
        self._places[_key(job)] = place

    def row(self, job: Job) -> dict[str, str] | None:
        """The newest row of a job, None where there is none."""
        if (place := self._places.get(_key(job))) is None:
            return None
        self._file.seek(place)
        return dict(zip(COLUMNS, _fields(self._file.readline())))

    def known(self, job: Job, depth: Depth) -> tuple[dict[str, str], Look] | None:
        """The row of a job and how its file looked, if it was checked at least at `depth`."""
        row = self.row(job)
        if row is None or not row["changed_ns"] or DEPTHS.index(depth) > _depth(row):
            return None
        return row, Look(int(row["bytes"]), int(row["changed_ns"]))

    def sort(self, jobs: Iterable[Job]) -> None:
        """Leave the rows of `jobs`, in their order."""
        aside = self.path.with_name(f".{self.path.name}.partial")
        places = {}
        with aside.open("wb") as sorted_rows:
            sorted_rows.write(line(COLUMNS))
            for job in jobs:
                key = _key(job)
                if key in places:
                    continue
                self._file.seek(self._places[key])
                places[key] = sorted_rows.tell()
                sorted_rows.write(self._file.readline())
        self._file.close()
        aside.replace(self.path)
        self._file, self._places = self.path.open("a+b"), places

    def _take_over(self) -> None:
        self._file.seek(0)
        head = self._file.readline()
        if head != line(COLUMNS):
            if head.endswith(b"\n"):
                raise DataError(f"{self.path} is not a report of this program's version; name another folder by --out")
            if not line(COLUMNS).startswith(head):
                raise DataError(f"{self.path} is not a report; name another folder by --out")
            self._file.truncate(0)
            self._file.write(line(COLUMNS))
            self._file.flush()
            return
        place = self._file.tell()
        for text in self._file:
            if not text.endswith(b"\n"):
                break
            row = dict(zip(COLUMNS, _fields(text)))
            if len(row) == len(COLUMNS) and _is_whole(row):
                self._places[_key(_job(row))] = place
            place += len(text)
        self._file.truncate(place)


def line(fields: Iterable[Any]) -> bytes:
    """A line of csv. Names of files that are not UTF-8 stay the bytes they are."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([str(field).translate(ESCAPES) for field in fields])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _fields(text: bytes) -> list[str]:
    return next(csv.reader([text.decode("utf-8", "surrogateescape").replace("\0", "")]), [])


def _is_whole(row: dict[str, str]) -> bool:
    """Whether the columns that are read back are what they must be."""
    numbers = [row[name] for name in ("first", "count", "min_frames")]
    look = [row[name] for name in ("bytes", "changed_ns")]
    return row["depth"] in DEPTHS and all(map(_is_integer, numbers)) and (all(map(_is_integer, look)) or not any(look))


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _depth(row: dict[str, str]) -> int:
    return DEPTHS.index(next(depth for depth in DEPTHS if depth == row["depth"]))


def _job(row: dict[str, str]) -> Job:
    numbers = (int(row[name]) for name in ("first", "count", "min_frames"))
    return Job(row["path"], row["kind"], *numbers, shard=row["shard"])


def _key(job: Job) -> int:
    # of this process only: 64 bits tell a million files apart, and a million of them are a tenth of the memory
    return hash((job.path.translate(ESCAPES), *job[1:]))
