"""Many videos written once more (`coding.py`): which files, in parallel, what is left over, and a list of the result.

    DIR/<relative path>.mp4      each video, under the path it has in the data
    DIR/list.txt                 the samples that were written, for `file_list`
    DIR/quarantine.jsonl         the videos that were not, one JSON object a line, if there are any

Run again, it writes what is missing or has changed, and nothing else.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from bevt_fast.data.annotations import read_list
from bevt_fast.data.coding import CODINGS, Recipe, Task, write
from bevt_fast.data.decode import BadFile
from bevt_fast.data.folders import locked
from bevt_fast.data.sources import Source
from bevt_fast.errors import ConfigError, DataError

LIST, QUARANTINE = "list.txt", "quarantine.jsonl"


class Done(NamedTuple):
    """What a run did: files written now, files that were up to date, records of bad files; bytes before and after."""

    written: int
    kept: int
    bad: list[dict[str, Any]]
    bytes_before: int
    bytes_after: int


class Plan(NamedTuple):
    """The files to write, and for each sample of the source the one it needs, relative to the output."""

    tasks: list[Task]
    names: list[str]


def program(sources: list[Source], options: Any, recipe: Recipe) -> None:
    """`prepare.py transcode`: the videos among `sources`, then what was done. Raises DataError if some could not be."""
    clips = [source for source in sources if source.frames is not None]
    if not clips:
        raise DataError(f"{options.data} holds images; transcode takes videos")
    (source,), out = clips, Path(options.out)
    refuse_inside(out, source, Path(options.data).is_dir())
    done = transcode(source, out, recipe, options.workers, options.check)
    size = f": {done.bytes_before / 1e6:,.1f} MB became {done.bytes_after / 1e6:,.1f} MB" if done.written else ""
    print(f"{done.written:,} videos written{size}; {done.kept:,} were there already")
    if len(clips) < len(sources):
        print("images stay as they are")
    if done.written + done.kept:
        print(f"they are listed in {out / LIST}; use it: --set {shlex.quote(setting(out, recipe))}")
    if done.bad:
        first = done.bad[0]
        raise DataError(
            f"{len(done.bad)} of {len(done.bad) + done.written + done.kept} videos could not be transcoded and are "
            f"listed in {out / QUARANTINE}, the first is {first['path']} ({first['kind']}: {first['reason']})"
        )


def transcode(source: Source, out: Path, recipe: Recipe, workers: int = 1, check: bool = True) -> Done:
    """Write the videos of `source` below `out`, and list those that could be written.

    Raises ConfigError for a recipe that makes no sense, DataError where `out` cannot be used or the program cannot go
    on. A video that cannot be used is recorded, not raised.
    """
    _check_recipe(recipe)
    plan = lay_out(source, out, recipe)
    with _alone(out):
        done = _run(plan.tasks, out, recipe, workers, check)
        good = {task.target for task in plan.tasks} - {record.pop("target") for record in done.bad}
        write_list(source, out, plan, good)
    return done


def lay_out(source: Source, out: Path, recipe: Recipe) -> Plan:
    """Which file of `out` each video becomes. Raises DataError where that is not possible, or would harm the data."""
    paths = [os.path.normpath(os.path.abspath(source.path(i))) for i in range(len(source))]
    root = os.path.abspath(source.root)
    if not all(path.startswith(root + os.sep) for path in paths):
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    counts = _counts(source, paths)
    names, suffix, taken = {}, "." + CODINGS[recipe.codec].container, set()
    for path in dict.fromkeys(paths):
        name = os.path.relpath(path, root)
        if not os.path.isdir(path):  # the dots in the name of a folder of frames are no suffix
            name = os.path.splitext(name)[0]
        if name + suffix in taken:  # a.avi beside a.webm
            name = os.path.relpath(path, root)
        taken.add(name + suffix)
        names[path] = (name + suffix).replace(os.sep, "/")
    if harmed := {os.path.abspath(os.path.join(out, name)) for name in names.values()}.intersection(names):
        raise DataError(f"{min(harmed)} would be written over, and it is part of the data; choose another --out")
    if len(taken) < len(names):
        raise DataError(f"two videos of {root} would be written to one file; give them names that differ in more")
    return Plan(
        [Task(path, os.path.join(out, name), counts[path]) for path, name in names.items()],
        [names[path] for path in paths],
    )


def refuse_inside(out: Path, source: Source, is_folder: bool) -> None:
    """Raises DataError where `out` is the data itself or lies inside it: the next walk would find both.

    The data are the folder that was given, or the one that holds all files of a list.
    """
    folders = {Path(source.path(i)).parent.resolve() for i in range(len(source))}
    root = source.root.resolve() if is_folder else Path(os.path.commonpath(folders))
    if out.resolve().is_relative_to(root):
        raise DataError(f"--out {out} lies inside the data, {root}; choose a folder outside, beside it for example")


def write_list(source: Source, out: Path, plan: Plan, good: set[str]) -> None:
    """Write the samples whose file is there, with the labels or parts of the source, and read them back."""
    chosen = [i for i, name in enumerate(plan.names) if os.path.join(out, name) in good]
    if not chosen:
        return
    # a name that starts like a comment or with a blank is kept by a step that goes nowhere
    names = ["./" + name if name[0] in '# \t"' else name for name in (plan.names[i] for i in chosen)]
    lines = [" ".join(map(str, row)) for row in zip(*_rows(names, *_columns(source, chosen)))]
    part = out / f".{LIST}.part"
    try:
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        same = _rows(*read_list(part)[:3]) == _rows(names, *_columns(source, chosen))
    except (UnicodeEncodeError, DataError):
        same = False
    if not same:
        part.unlink(missing_ok=True)
        raise DataError(
            f"the videos are written, but a list cannot hold all of their names (line breaks, tabs, '::' or other "
            f"than UTF-8); use {out} as a folder, or rename the videos and run again"
        )
    part.replace(out / LIST)


def setting(out: Path, recipe: Recipe) -> str:
    """The part of a configuration that reads what was written, as --set takes it."""
    stride = {"stride": recipe.stride} if recipe.stride > 1 else {}
    options = {"root": str(out), "list": LIST, "kind": "clips", **stride}
    return "clips.source=" + json.dumps({"name": "file_list", "options": options})


def _columns(source: Source, chosen: list[int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels and parts of the samples `chosen`; what is labelled is written whole, so it has no parts."""
    if source.labels is not None:
        return source.labels[chosen], None
    return None, None if source.extents is None else source.extents[chosen]


def _rows(paths: list[str], labels: np.ndarray | None, extents: np.ndarray | None) -> list[list[Any]]:
    columns = [labels, *([None] if extents is None else extents.T)]
    return [paths, *(column.tolist() for column in columns if column is not None)]


def _counts(source: Source, paths: list[str]) -> dict[str, int]:
    """How many frames of each file to keep: -1 for all, but for lists of `path total label`, which say how many.

    No text list holds both labels and parts, so what such a sample leaves out is not written.
    """
    if source.extents is None or source.labels is None:
        return dict.fromkeys(paths, -1)
    counts: dict[str, int] = {}
    for path, (first, count) in zip(paths, source.extents.tolist()):
        if first or counts.setdefault(path, count) != count:
            raise DataError(f"{path} is listed with a label and in several parts, which no list can say; split it")
    return counts


def _check_recipe(recipe: Recipe) -> None:
    if recipe.codec not in CODINGS:
        raise ConfigError(f"--codec {recipe.codec} is unknown; choose one of {', '.join(CODINGS)}")
    limits = {"short_side": (16, 8192), "stride": (1, 10_000), "gop": (1, 10_000), "crf": (1, 51)}
    for name, (low, high) in limits.items():
        if not low <= (value := getattr(recipe, name)) <= high:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Makes `out`, and keeps other runs out of it. Raises DataError, also where it cannot be written to later."""
    try:
        with locked(out):
            yield
    except OSError as error:
        raise DataError(
            f"cannot write to {error.filename or out}: {error.strerror}; make room or choose another --out, then run "
            "the same command again: what is finished is kept"
        ) from None


def _run(tasks: list[Task], out: Path, recipe: Recipe, workers: int, check: bool) -> Done:
    bad: list[dict[str, Any]] = []
    written = before = after = 0
    (out / QUARANTINE).unlink(missing_ok=True)
    with _many(partial(_one, recipe=recipe, check=check), tasks, workers) as outcomes:
        bar = tqdm(outcomes, total=len(tasks), unit="video", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        for task, outcome in zip(tasks, bar):
            if isinstance(outcome, DataError):
                raise outcome
            if isinstance(outcome, BadFile):
                record = {"stream": "clips", "path": task.source, "kind": outcome.kind, "reason": outcome.reason}
                bad.append(record | {"target": task.target})
                with (out / QUARANTINE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                continue
            written += outcome
            before += os.path.getsize(task.source)
            after += os.path.getsize(task.target)
    return Done(written, len(tasks) - written - len(bad), bad, before, after)


def _one(task: Task, recipe: Recipe, check: bool) -> "bool | BadFile | DataError":
    """`write`, with what goes wrong as a result: so it reaches the first process as it is."""
    try:
        return write(task, recipe, check)
    except (BadFile, DataError) as fault:
        return fault
    except MemoryError:
        return DataError(f"the memory does not suffice for {task.source}; give fewer --workers and run again")


@contextlib.contextmanager
def _many(work: Callable[[Task], Any], tasks: list[Task], workers: int) -> Iterator[Iterator[Any]]:
    """The outcomes of `work`, in order, from so many processes; one works in this process."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield map(work, tasks)
        return
    # started anew, because FFmpeg's locks do not survive a fork
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin)
    try:
        yield pool.map(work, tasks)
    except BrokenProcessPool:
        raise DataError(
            "a process that was coding died, for lack of memory perhaps; run the same command again, with fewer "
            "--workers: what is finished is kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In each process: ends with the first one, which also decides about an interrupt from the keyboard."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if first := parent_process():
        threading.Thread(target=lambda: (first.join(), os._exit(1)), daemon=True).start()
