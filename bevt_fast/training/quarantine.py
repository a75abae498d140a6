"""Bad files: named once in `quarantine.jsonl`, counted, and too many of them stop the run. Never fatal alone, never
silent.
"""

import fcntl
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("bevt_fast")


class Quarantine:
    """The bad files of a run, shared by its processes through one file that each appends to."""

    def __init__(self, path: Path, files: dict[str, int], share: float) -> None:
        """`files`: how many files each stream has; `share`: of them that may be bad."""
        self.path, self.files, self.share = path, files, share
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self._read_to = 0
        self._read()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, records: list[dict[str, Any]]) -> None:
        """Write down the files that no process has named before. A record has at least `stream`, `path`, `kind`,
        `reason`.
        """
        self._read()
        if all((record["stream"], record["path"]) in self._known for record in records):
            return
        try:
            with self.path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # processes that meet the same file in the same step
                self._read()
                for record in self._new(records):
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s; the bad files are still counted", self.path, error)
            for _ in self._new(records):
                pass

    def _new(self, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The records of files not known yet, said aloud and known from now on."""
        for record in records:
            key = (record["stream"], record["path"])
            if key not in self._known:
                self._known[key] = record
                log.warning("quarantined %s: %s: %s", record["path"], record["kind"], record["reason"])
                yield record

    def verdict(self) -> str | None:
        """The sentence to stop with, or None while every stream has few enough bad files."""
        self._read()
        for stream, count in self.files.items():
            bad = [record for (name, _), record in self._known.items() if name == stream]
            if len(bad) > self.share * count:
                return (
                    f"{len(bad)} of {count} files of {stream} are bad, more than data.quarantine_share = "
                    f"{self.share:g} allows; they are listed in {self.path}, "
                    f"the first is {bad[0]['path']} ({bad[0]['kind']})"
                )
        return None

    def _read(self) -> None:
        """Take over what was appended since the last look; a line still being written waits for the next."""
        if not self.path.exists() or self.path.stat().st_size <= self._read_to:
            return
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            whole, _, _ = file.read().rpartition(b"\n")
        self._read_to += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                self._known.setdefault((record["stream"], record["path"]), record)
            except (ValueError, KeyError):
                log.warning("%s holds a line that is not a record; ignored", self.path)
