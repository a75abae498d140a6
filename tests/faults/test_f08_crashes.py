"""Decoders that take their process along: the file is found out and replaced, the run goes on, and not for ever."""

import faulthandler
import multiprocessing
import os
import signal
from contextlib import closing
from multiprocessing import connection
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import dataloader

from bevt_fast.data import decode, loader
from bevt_fast.data.decode import BadFile
from bevt_fast.data.loader import Loader
from bevt_fast.data.pipeline import DaliViews
from bevt_fast.errors import DataError
from tests.data import media
from tests.faults import making
from tests.training.command import losses

FILES = [f"{k}.webm" for k in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("crashes")
    for name in FILES:
        media.video(place / name, "libvpx-vp9", frames=24, size=(64, 64))
    (place / "list.txt").write_text("".join(f"{name}\n" for name in FILES))
    return place


@pytest.fixture(autouse=True)
def _deaths_are_seen_at_once(monkeypatch):
    """torch looks every five seconds whether a worker is dead."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def crash(monkeypatch, function: str, when=lambda *_: True, name: str = "2.webm", with_signal=signal.SIGSEGV) -> None:
    """A worker that calls `decode`'s `function` for the file `name` ends, as `with_signal` ends it."""
    trainer, works = os.getpid(), getattr(decode, function)

    def crashing(path, *arguments):
        if Path(path).name == name and os.getpid() != trainer and when(*arguments):
            faulthandler.disable()
            os.kill(os.getpid(), with_signal)
        return works(path, *arguments)

    monkeypatch.setattr(decode, function, crashing)


def batches(folder: Path, **data) -> tuple[list[np.ndarray], list[dict], int]:
    source = making.clips(folder, *FILES, count=4, stride=2)
    with closing(Loader(making.given(**data), {"clips": source})) as made:
        found = [next(made).clips for _ in range(8)]
        return [making.shown(part.pixels) for part in found if part is not None], made.bad_files, made.restarts


def refusing(monkeypatch, function: str, when=lambda *_: True) -> None:
    """As `crash`, for the answer without crashes: the file is bad."""
    works = getattr(decode, function)

    def bad(path, *arguments):
        if Path(path).name == "2.webm" and when(*arguments):
            raise BadFile("corrupt", path, "as if it crashed")
        return works(path, *arguments)

    monkeypatch.setattr(decode, function, bad)


@pytest.mark.parametrize("function, when", [("probe", lambda *_: True), ("read_frames", lambda frames, _: 0 in frames)])
def test_the_file_is_replaced_whatever_the_number_of_workers(folder: Path, monkeypatch, function, when) -> None:
    with monkeypatch.context() as patch:
        refusing(patch, function, when)
        expected, records, _ = batches(folder, workers=0)
        assert records
    crash(monkeypatch, function, when)
    for workers in (1, 3):
        found, bad, restarts = batches(folder, workers=workers)
        assert all(map(np.array_equal, found, expected)) and len(found) == len(expected)
        assert {(record["kind"], Path(record["path"]).name) for record in bad} == {("crash", "2.webm")}
        assert [(r["index"], r["epoch"], r["substitute"]) for r in bad] == [
            (r["index"], r["epoch"], r["substitute"]) for r in records
        ]
        # a header, once and for all; of clips, each of the few that begin with the first frame
        assert restarts == 2 if function == "probe" else restarts >= 2


def test_a_worker_that_is_dead_before_the_trainer_looks_is_no_other_case(folder: Path, monkeypatch) -> None:
    starts = dataloader._MultiProcessingDataLoaderIter.__init__

    def late(self, made):
        starts(self, made)
        connection.wait([worker.sentinel for worker in self._workers], timeout=2)
        multiprocessing.active_children()  # reaps the dead

    crash(monkeypatch, "probe")
    with monkeypatch.context() as patch:
        patch.setattr(dataloader._MultiProcessingDataLoaderIter, "__init__", late)
        _, bad, restarts = batches(folder, workers=1)
    assert {(record["kind"], Path(record["path"]).name) for record in bad} == {("crash", "2.webm")} and restarts == 2


def test_of_files_that_dali_decodes_together_the_one_at_fault_is_found(folder: Path, monkeypatch) -> None:
    pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    works, trainer = DaliViews.__call__, os.getpid()

    def crashing(self, jobs):
        if os.getpid() != trainer and any(Path(job.path).name == "2.webm" and job.frames[0] < 9 for job in jobs):
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGABRT)
        return works(self, jobs)

    monkeypatch.setattr(DaliViews, "__call__", crashing)
    source = making.clips(folder, *FILES, count=4, stride=2)
    with closing(Loader(making.given(batch=6, decoder="dali", workers=1), {"clips": source})) as made:
        for _ in range(2):
            next(made)
        assert {Path(record["path"]).name for record in made.bad_files} == {"2.webm"} and made.restarts >= 3


def test_a_run_goes_on_and_names_the_file_once(folder: Path, clips_only, here, monkeypatch) -> None:
    crash(monkeypatch, "probe")
    config = clips_only(folder, data__workers=1, train__steps=2, data__quarantine_share=0.5)
    done = here(config)
    assert done.code == 0, done.error
    assert len(losses(config.with_suffix(""))) == 2
    (record,) = making.quarantined(config.with_suffix(""))
    assert record["kind"] == "crash" and record["path"].endswith("2.webm") and "died, twice" in record["reason"]


def test_killed_workers_accuse_no_file_and_end_the_run(folder: Path, monkeypatch) -> None:
    """As where memory runs out: three restarts, then the end."""
    crash(monkeypatch, "probe", with_signal=signal.SIGKILL)
    monkeypatch.setattr(loader, "MAX_RESTARTS", 1)
    with pytest.raises(DataError, match=r"a loader process died 2 times.*lower data\.workers or data\.prefetch"):
        batches(folder, workers=1)


def test_where_every_file_crashes_there_is_nothing_to_train_on(folder: Path, monkeypatch) -> None:
    for name in FILES[:2]:
        crash(monkeypatch, "probe", name=name)
    source = making.clips(folder, *FILES[:2], count=4, stride=2)
    with closing(Loader(making.given(workers=1), {"clips": source})) as made:
        with pytest.raises(DataError, match=r"files in a row cannot be read.*crash: the process that read it died"):
            next(made)
