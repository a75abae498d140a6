"""Rows on the disk: what is written is read, and what is damaged, foreign or half-written is refused by name."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bevt_fast.data import token_cache
from bevt_fast.data.token_cache import UNKNOWN, CacheWriter, checksum, open_cache
from bevt_fast.errors import DataError

PARTS = {"format": 1, "files": 25, "data.views": 3, "seed": 0, "tokenizer.weights (digest)": "aa"}
CELLS = (2, 4, 4)
COMMAND = "python bevt_fast/prepare.py tokens --config c.json --out cache"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK", 10)  # 75 rows: seven chunks and a half


def pixels(number: int) -> np.ndarray:
    return np.full((2, 8, 8, 3), number % 256, np.uint8)


def row_ids(number: int) -> np.ndarray:
    return (np.arange(32).reshape(CELLS) * 7 + number * 31) % 128


def opened(path: Path, parts=PARTS, vocab_size=128):
    return open_cache(path, "clips", parts, CELLS, vocab_size)


def writer(path: Path, parts=PARTS, vocab_size=128) -> CacheWriter:
    return CacheWriter(path, "clips", parts, CELLS, vocab_size, COMMAND)


def fill(path: Path, stop_after: int | None = None, vocab_size: int = 128) -> list[int]:
    """Write what is missing, up to so many rows; returns the numbers of the rows written."""
    cache, wrote = writer(path, vocab_size=vocab_size), []
    try:
        for chunk, _, missing in cache.missing():
            for number in missing:
                if len(wrote) == stop_after:
                    return wrote
                cache.write([number], row_ids(number)[None], [number // 3], [checksum(pixels(number))])
                wrote.append(number)
            cache.finish(chunk)
    finally:
        cache.close()
    return wrote


def answers(path: Path) -> list[np.ndarray]:
    cache = opened(path)
    return [cache.ids(number % 3, number // 3, number // 3, pixels(number)) for number in range(75)]


def test_every_row_comes_back_in_every_pass(tmp_path):
    assert fill(tmp_path) == list(range(75))
    cache = opened(tmp_path)
    for number, found in enumerate(answers(tmp_path)):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, row_ids(number))
        later = cache.ids(number % 3 + 3 * 7, number // 3, number // 3, pixels(number))  # view e % K of pass e
        np.testing.assert_array_equal(later, found)


@pytest.mark.parametrize(("vocab_size", "ids"), [(2, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab_size, ids):
    assert fill(tmp_path, vocab_size=vocab_size)
    # a plain .npy file for anybody
    rows = np.load(tmp_path / "clips.npy", mmap_mode="r", allow_pickle=False)
    assert rows["ids"].dtype == ids and rows["ids"].shape == (75, *CELLS)
    np.testing.assert_array_equal(rows["ids"][74], row_ids(74))


def test_another_file_or_other_pixels_are_not_answered(tmp_path):
    fill(tmp_path)
    cache = opened(tmp_path)
    changed = pixels(4)
    changed[1, 7, 7, 2] ^= 1
    for file, seen in ((1, changed), (2, pixels(4)), (0, pixels(4))):
        assert (cache.ids(1, 1, file, seen) == UNKNOWN).all()
    np.testing.assert_array_equal(cache.ids(1, 1, 1, pixels(4)), row_ids(4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"data.views": 4}, "data.views is 3 there and 4 here"),
        ({"files": 24}, "files is 25 there and 24 here"),
        ({"format": 2}, "format is 1 there and 2 here"),
        ({"tokenizer.weights (digest)": "ab"}, 'tokenizer.weights (digest) is "aa" there and "ab" here'),
        ({"seed": 5, "files": 9}, "files is 25 there and 9 here; seed is 0 there and 5 here"),
        ({"new": [1, 2]}, "new is null there and [1, 2] here"),
    ],
)
def test_a_cache_of_something_else_is_refused_and_kept(tmp_path, change, says):
    fill(tmp_path)
    before = (tmp_path / "clips.npy").read_bytes()
    for open_it in (opened, writer):
        with pytest.raises(DataError) as refused:
            open_it(tmp_path, PARTS | change)
        assert says in str(refused.value) and str(tmp_path) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert (tmp_path / "clips.npy").read_bytes() == before


def test_any_flipped_bit_of_a_row_is_seen_when_the_row_is_read_and_mended(tmp_path):
    fill(tmp_path)
    file = tmp_path / "clips.npy"
    whole = file.read_bytes()
    size = token_cache.row_type(CELLS, 128).itemsize
    start = len(whole) - 75 * size
    for bit in range(0, size * 8, 7):
        damaged = bytearray(whole)
        damaged[start + 11 * size + bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        cache = opened(tmp_path)
        np.testing.assert_array_equal(cache.ids(1, 3, 3, pixels(10)), row_ids(10))
        with pytest.raises(DataError, match="row 11 is not as it was written") as refused:
            cache.ids(2, 3, 3, pixels(11))
        assert COMMAND in str(refused.value)
    assert fill(tmp_path) == [11]
    assert file.read_bytes() == whole


def test_rows_do_not_count_in_another_place_or_another_cache(tmp_path):
    fill(tmp_path / "a")
    file = tmp_path / "a" / "clips.npy"
    whole = file.read_bytes()
    size = token_cache.row_type(CELLS, 128).itemsize
    start = len(whole) - 75 * size
    file.write_bytes(whole[:start] + whole[start + size : start + 2 * size] + whole[start + size :])
    with pytest.raises(DataError, match="row 0 is not"):
        opened(tmp_path / "a").ids(0, 0, 0, pixels(0))
    other = writer(tmp_path / "b", PARTS | {"seed": 9})
    file.write_bytes(whole)
    (tmp_path / "b" / "clips.npy").write_bytes(whole)
    assert sum(len(missing) for _, _, missing in other.missing()) == 75


@pytest.mark.parametrize("size", [0, 5, 100, 300, -1, +1])
def test_a_file_of_another_length_is_refused_and_mended(tmp_path, size):
    fill(tmp_path)
    file = tmp_path / "clips.npy"
    whole = file.read_bytes()
    file.write_bytes((whole + b"\0")[: size if size > 1 or size == 0 else len(whole) + size])
    with pytest.raises(DataError, match=r"clips\.npy (has|cannot be read)") as refused:
        opened(tmp_path)
    assert COMMAND in str(refused.value)
    fill(tmp_path)
    assert file.read_bytes() == whole
    answers(tmp_path)


def test_a_file_cut_short_under_a_run_is_an_error_and_no_signal(tmp_path):
    fill(tmp_path)
    cache = opened(tmp_path)
    cache.ids(0, 0, 0, pixels(0))
    os.truncate(tmp_path / "clips.npy", 1000)
    with pytest.raises(DataError, match="cannot be read: it ends within row"):
        cache.ids(2, 24, 24, pixels(74))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"parts": 3}', "\x00" * 40, "[" * 100_000])
def test_a_header_that_is_none_is_refused(tmp_path, text):
    fill(tmp_path)
    (tmp_path / "clips.json").write_text(text)
    for open_it in (opened, writer):
        with pytest.raises(DataError, match=r"clips\.json .*remove that file"):
            open_it(tmp_path)
    (tmp_path / "clips.json").unlink()
    assert fill(tmp_path) == []  # every row is still good
    answers(tmp_path)


def test_a_stream_that_is_not_there_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(DataError, match="holds no cache of clips; make it with"):
            opened(place)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError):
        opened(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write a token cache to"):
        writer(tmp_path / "file")


@pytest.mark.parametrize("rows", [0, 1, 10, 74])
def test_a_half_finished_cache_is_refused_with_the_command_that_completes_it(tmp_path, rows):
    fill(tmp_path, stop_after=rows)
    with pytest.raises(DataError, match=r"is not finished \(\d+% of clips\)") as refused:
        opened(tmp_path)
    assert f"`{COMMAND}` completes it" in str(refused.value)
    assert fill(tmp_path) == list(range(rows, 75))  # not one row twice
    answers(tmp_path)


@pytest.mark.parametrize("done", [b"", b"\0" * 8, b"\x01" * 7, b"\x01\x03" * 4])
def test_a_wrong_map_of_what_is_done_is_not_believed(tmp_path, done):
    fill(tmp_path)
    (tmp_path / "clips.done").write_bytes(done)
    with pytest.raises(DataError, match="is not finished"):
        opened(tmp_path)
    assert fill(tmp_path) == []
    answers(tmp_path)


def _fill_slowly(path: str, seconds: float, report, permits=None) -> None:
    cache = writer(Path(path))
    while not cache.is_complete():
        for chunk, _, missing in cache.missing():
            for number in missing:
                if permits is not None:
                    permits.acquire()
                cache.write([number], row_ids(number)[None], [number // 3], [checksum(pixels(number))])
                report.put(number)
                time.sleep(seconds)
            cache.finish(chunk)
        time.sleep(0.01)


def test_killed_anywhere_while_writing_and_completed(tmp_path):
    processes = multiprocessing.get_context("fork")
    for round in range(4):
        report = processes.SimpleQueue()
        last = 7 * round + 1
        permits = processes.Semaphore(last + 3)  # however late the signal comes, 58 of 75 rows are written at most
        process = processes.Process(target=_fill_slowly, args=(str(tmp_path), 0.001, report, permits))
        process.start()
        for _ in range(last):
            report.get()
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with pytest.raises(DataError, match="is not finished"):
            opened(tmp_path)
    assert len(fill(tmp_path)) < 75 - 10  # what the killed ones wrote counts
    for number, found in enumerate(answers(tmp_path)):
        np.testing.assert_array_equal(found, row_ids(number))


def test_several_writers_share_the_work_and_one_that_dies_leaves_its_part(tmp_path):
    processes = multiprocessing.get_context("fork")
    report = processes.SimpleQueue()
    started = [processes.Process(target=_fill_slowly, args=(str(tmp_path), 0.01, report)) for _ in range(3)]
    for process in started:
        process.start()
    for _ in range(5):
        report.get()
    os.kill(started[0].pid or 0, signal.SIGKILL)
    for process in started:
        process.join(timeout=60)
    assert [process.exitcode for process in started] == [-signal.SIGKILL, 0, 0]
    written = Counter()
    while not report.empty():
        written[report.get()] += 1
    assert max(written.values()) <= 2 and sum(written.values()) <= 75 + 1  # at most the killed one's last row again
    for number, found in enumerate(answers(tmp_path)):
        np.testing.assert_array_equal(found, row_ids(number))


def test_a_full_disk_is_told_and_the_row_does_not_count(tmp_path):
    cache = writer(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, _, missing = next(cache.missing())
    try:
        # the file ends in the middle of row 3, as a disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (cache._start + 3 * cache.row.itemsize + 20, limit[1]))
        with pytest.raises(OSError):
            for number in missing:
                cache.write([number], row_ids(number)[None], [0], [0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    cache.close()
    _, there, lacking = next(writer(tmp_path).missing())
    assert there == 3 and lacking == list(range(3, 10))


def test_ten_million_rows_take_no_memory(tmp_path):
    """ImageNet with eight views: files of their full length, of which only what is written has blocks."""
    parts = PARTS | {"files": 1_281_167, "data.views": 8}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = CacheWriter(tmp_path, "images", parts, (14, 14), 8192, COMMAND)
    number = 1_281_167 * 8 - 1
    ids = np.arange(196).reshape(1, 14, 14)
    cache.write([number], ids, [1_281_166], [checksum(pixels(0))])
    os.pwrite(cache._done, b"\x01" * cache.chunks, 0)
    found = open_cache(tmp_path, "images", parts, (14, 14), 8192).ids(7, 1_281_166, 1_281_166, pixels(0))
    np.testing.assert_array_equal(found, ids[0])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (tmp_path / "images.npy").stat().st_size > 4e9
    assert (tmp_path / "images.npy").stat().st_blocks * 512 < 1e6
    assert grown < 50_000  # kB; the rows would be 4 million


def test_the_header_can_be_read_by_people(tmp_path):
    fill(tmp_path)
    assert json.loads((tmp_path / "clips.json").read_text()) == {"parts": PARTS, "command": COMMAND}
