"""Check every file of some sources, and write what a run needs to know: a report, the bad files, lists without them.

out/report.csv              one row a file, in the order of the sources
out/quarantine.jsonl        the bad files, as a run names them
out/clips_source.jsonl ...  each source without its bad files, for the source `file_list`; .txt where it has extents
out/clips_source_classes.txt  its class names, one a line, where it has them
out/summary.txt             what is printed
"""

import contextlib
import itertools
import json
import shlex
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from bevt_fast.config import Config
from bevt_fast.data import decode, pipeline, sources
from bevt_fast.data.decode import Probe
from bevt_fast.data.folders import locked
from bevt_fast.data.packed import PackedPaths, Part
from bevt_fast.data.parquet_rows import Row
from bevt_fast.data.sources import Source
from bevt_fast.data.verify import cleaned, processes
from bevt_fast.data.verify.examine import Depth, Job
from bevt_fast.data.verify.report import Report
from bevt_fast.data.verify.summary import Tally, printable
from bevt_fast.errors import ConfigError, DataError, MachineError

ALMOST_ALL = 0.9999  # of the files missing: the root is wrong, and there is nothing to report on
SILENCE = 30.0  # seconds between two lines of progress where there is no terminal


class How(NamedTuple):
    """How files are checked: how far each is decoded, by how many processes, within how many seconds."""

    depth: Depth = "ends"
    workers: int = 1
    timeout: float = 120.0


class Listed(NamedTuple):
    """A source, and where a configuration has it ("clips.source")."""

    key: str
    source: Source

    @property
    def stream(self) -> str:
        """The stream it belongs to, as quarantine.jsonl has it."""
        return self.key.split(".")[0]


def of_config(config: Config) -> list[Listed]:
    """Every source of a run, held-out ones too. Raises DataError where there is nothing to check."""
    found = []
    for name, stream in config.streams.items():
        for key, part in (("source", stream.source), ("heldout", stream.heldout)):
            if part is not None:
                found.append(Listed(f"{name}.{key}", sources.build(part)))
                sources.preflight(found[-1].source, ALMOST_ALL)
    return found


def of_data(found: Sequence[Source]) -> list[Listed]:
    """Sources that no configuration names."""
    return [Listed(f"{'images' if source.frames is None else 'clips'}.source", source) for source in found]


def verify(listed: Sequence[Listed], out: Path, how: How, config: str | None) -> None:
    """Check the files, write the reports under `out` and print the summary; `config` is the one to be run.

    Raises DataError, with everything written, where files are bad; and where `out` cannot be written.
    """
    if not listed:
        raise ConfigError("there is nothing to verify; give --data PATH, --config FILE, or both")
    start = time.perf_counter()
    try:
        with locked(out), contextlib.closing(Report(out / "report.csv")) as report:
            checked = _check(listed, report, how)
            report.sort(job for one in listed for job in _jobs(one.source))
            seconds = time.perf_counter() - start
            lines, bad = _results(listed, report, out, config or "configs/joint.json")
            total = sum(len(one.source) for one in listed)
            lines.insert(
                0,
                f"{total:,} files to the depth {how.depth!r}: {checked:,} checked in {seconds:.1f} s "
                f"({checked / seconds:.1f} a second), the rest known from before",
            )
            with cleaned.replacing(out / "summary.txt") as file:
                file.write("\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(
            f"cannot write under {out}: {error.strerror or error}; what was checked is kept; make room and go on"
        ) from None
    print("\n".join(lines))
    if bad:
        raise DataError(f"{bad:,} of {total:,} files are bad; {out / 'quarantine.jsonl'} names them")


def _check(listed: Sequence[Listed], report: Report, how: How) -> int:
    """Add a row of every file that has none, or has changed since; returns how many."""
    dali, total, bad, checked = _has_dali(), sum(len(one.source) for one in listed), 0, 0
    asked = _asked(listed, report, how)
    with (
        contextlib.closing(processes.check(asked, min(how.workers, total), how.depth, how.timeout)) as answers,
        contextlib.closing(_Progress(total)) as progress,
    ):
        for job, row in answers:
            if row is not None:
                report.add(job, how.depth, row | {"decoder": _decoder(row, dali)})
                bad += row["status"] != "ok"
                checked += 1
            progress.step(bad)
    return checked


def _asked(listed: Sequence[Listed], report: Report, how: How) -> Iterator[processes.Asked]:
    """Each file once, with its look where its row would be the same again."""
    seen: set[int] = set()
    for one in listed:
        for job in _jobs(one.source):
            if len(listed) > 1:
                if hash(job) in seen:
                    continue
                seen.add(hash(job))
            known = report.known(job, how.depth)
            yield job, None if known is None or _may_pass(known[0], how) else known[1]


def _may_pass(row: dict[str, str], how: How) -> bool:
    """Whether a fault may be gone though the file is the same: one of the storage, or too little time."""
    slow = row["reason"].startswith(processes.TOO_SLOW) and row["reason"] != processes.too_slow(how.timeout)
    return slow or row["status"] in decode.PASSING_FAULTS


def _jobs(source: Source) -> Iterator[Job]:
    for index in range(len(source)):
        file = source.path(index)
        path = str(file)
        if isinstance(file, Part):
            yield Job(path, "images", file.offset, file.size, shard=str(file.file))
        elif isinstance(file, Row):
            yield Job(path, "images", shard=str(file.file_path))
        elif source.frames is None:
            yield Job(path, "images")
        else:
            yield Job(path, "clips", *source.extent(index), source.min_frames)


def _has_dali() -> bool:
    try:
        pipeline.require()
    except MachineError:
        return False
    return True


def _decoder(row: dict[str, Any], dali: bool) -> str:
    """The decoder that reads such a file here where data.decoder is "dali"."""
    if row["status"] != "ok":
        return ""
    return (
        "dali"
        if dali and pipeline.takes(Probe(**{name: row[name] for name in Probe._fields if name in row}))
        else "pyav"
    )


def _results(listed: Sequence[Listed], report: Report, out: Path, config: str) -> tuple[list[str], int]:
    """Write the bad files and the lists without them; returns the lines of the summary and how many are bad."""
    lines: list[str] = []
    named: set[int] = set()  # by hash: there may be a million
    names: set[str] = set()
    with cleaned.replacing(out / "quarantine.jsonl") as quarantine:
        for one in listed:
            tally, good = Tally(one.source), array("q")
            for index, job in enumerate(_jobs(one.source)):
                row = report.row(job)
                assert row is not None
                tally.add(row)
                if row["status"] == "ok":
                    good.append(index)
                elif (key := hash((one.stream, job.path))) not in named:
                    named.add(key)
                    quarantine.write(json.dumps(_record(one.stream, job.path, row, index)) + "\n")
            name = next(n for n in (one.key.replace(".", "_") + end for end in _endings()) if n not in names)
            names.add(name)
            lines += ["", printable(f"{one.key}: {one.source.name} in {one.source.root}"), *tally.lines()]
            lines += [f"  {line}" for line in _use(one, good, out / name, config)]
    return lines, len(named)


def _endings() -> Iterator[str]:
    yield ""
    yield from (f"_{k}" for k in itertools.count(2))


def _record(stream: str, path: str, row: dict[str, str], index: int) -> dict[str, Any]:
    """A line of quarantine.jsonl; no epoch met the file, and nothing took its place."""
    fault = {"stream": stream, "path": path, "kind": row["status"], "reason": row["reason"]}
    return fault | {"epoch": None, "index": index, "substitute": None}


def _use(one: Listed, good: array, name: Path, config: str) -> list[str]:
    """Write the list of the good files; how to train on it."""
    if not good:
        return ["no file is good, so there is no list"]
    if isinstance(one.source.paths, PackedPaths):
        return ["no list names images in shards; a run replaces the bad ones, or write the shards without them"]
    part = cleaned.write(one.source, good, name)
    if part is None:
        return ["no list can say these extents; leave out of your own what quarantine.jsonl names"]
    setting = shlex.quote(f"{one.key}={json.dumps(part.model_dump())}")
    return [
        f"use the {len(good):,} good ones: python bevt_fast/train.py --config {shlex.quote(config)} --set {setting}"
    ]


class _Progress:
    """A bar on a terminal, else a line every now and then."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(total=total, unit=" files", disable=not sys.stderr.isatty())
        self._total, self._done, self._said = total, 0, time.monotonic()

    def step(self, bad: int) -> None:
        """One more file is done, and `bad` were bad."""
        self._done += 1
        self._bar.set_postfix(bad=bad, refresh=False)
        self._bar.update()
        if self._bar.disable and time.monotonic() > self._said + SILENCE:
            self._said = time.monotonic()
            print(f"{self._done:,} of {self._total:,} files, {bad:,} bad", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()
