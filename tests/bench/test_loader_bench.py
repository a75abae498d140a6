"""The loader's benchmark: a rehearsal from end to end, and what a row says of a contender that reads something else."""

import argparse
import importlib.util
from pathlib import Path

import pytest
import torch

from bench import loader as bench
from bench import loader_contenders as field_of
from bench import loader_damage
from bench.loader import Bench, Row
from bench.loader_contenders import OURS, PLAIN, Batches, CannotRun, Contender, Others, Workload
from bevt_fast.data.reader import StreamReader

QUICK = ["--quick", "--device", "cpu"]
NO_OTHERS = Others(*3 * [lambda _: pytest.fail("not asked")])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[argparse.Namespace, Path]:
    folder = tmp_path_factory.mktemp("bench")
    options = bench.options([*QUICK, "--out", str(folder)])
    bench.make_files(folder / "made", options)
    return options, folder


def workload(made, stream="clips"):
    options, folder = made
    config = Bench(options, folder).config(stream)
    return Workload(stream, config, bench.source(folder / "made", stream, options), torch.device("cpu"))


def test_a_rehearsal_gives_every_contender_a_row_and_a_headline(tmp_path, capsys):
    assert bench.main([*QUICK, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    header, *lines = (tmp_path / "loader.csv").read_text().splitlines()
    assert len(lines) == 9 + 6 and {"hardware", "libraries", "low_per_s", "high_per_s"} <= set(header.split(","))
    for name in (OURS, PLAIN, "torchcodec", "decord", "DALI on the GPU", "phase-split"):
        assert any(name in line for line in lines), name
    assert sum(",ok," in line for line in lines) >= 4
    assert "is waiting for data" in said and f"times {PLAIN}" in said.splitlines()[-1]
    page = (tmp_path / "loader.md").read_text()
    assert page.count("| torchcodec DataLoader |") == 1 and "is waiting for data" in page
    assert (tmp_path / "loader.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.parametrize("stream, plain", [("clips", PLAIN), ("images", "plain OpenCV DataLoader")])
def test_contenders_read_the_same_samples(made, stream, plain):
    everybody = {contender.name: contender for contender in field_of.contenders(NO_OTHERS)}
    found = {}
    for name in (OURS, plain):
        batches = everybody[name].open(workload(made, stream), 0, 4)
        found[name] = [batches.next() for _ in range(2)]
        batches.close()
    for ours, theirs in zip(found[OURS], found[plain]):
        assert ours[0].shape == theirs[0].shape and ours[1].reshape(theirs[1].shape).shape == theirs[1].shape
        assert (ours[0] - theirs[0]).abs().mean() * 58 < bench.SAME


def test_other_frames_are_said_and_a_failure_is_a_row(made, monkeypatch, tmp_path):
    def other(workload, workers, count):
        ours = field_of.contenders(NO_OTHERS)[0].open(workload, workers, count)

        def following():
            pixels, token_pixels = ours.next()
            return pixels.flip(2), token_pixels

        return Batches(following, ours.close)

    def missing(workload, workers, count):
        raise CannotRun("is not there")

    def broken(workload, workers, count):
        raise ValueError("two\nlines")

    cast = [Contender("backwards", other), Contender("missing", missing), Contender("broken", broken)]
    ours = field_of.contenders(NO_OTHERS)[0]
    monkeypatch.setattr(bench, "contenders", lambda _: [ours, *cast])
    run = Bench(made[0], made[1])
    run.race(workload(made), 0)
    rows: dict[str, Row] = {row.contender: row for row in run.rows}
    assert rows[OURS].status == "ok" and rows[OURS].levels == 0 and rows[OURS].rounds == 1
    assert rows["backwards"].status == "differs" and "not the same frames" in rows["backwards"].reason
    assert (rows["missing"].status, rows["missing"].reason) == ("left out", "is not there")
    assert rows["broken"].reason == "ValueError: two lines" and rows["broken"].median_per_s is None


@pytest.mark.parametrize("stream", ["clips", "images"])
def test_a_tenth_is_bad_and_verify_leaves_the_rest(made, tmp_path, stream):
    clean = workload(made, stream)
    bad, good = loader_damage.damaged(clean, tmp_path), loader_damage.verified(clean, tmp_path)
    assert len(bad) - len(clean.source) == -(-len(clean.source) // loader_damage.EVERY) and bad.frames == good.frames
    assert [Path(p) for p in good.paths] == [Path(str(clean.source.path(k))) for k in range(len(clean.source))]
    reader = StreamReader(clean.config, stream, bad)
    found = [record for number in range(len(bad)) if isinstance(item := reader[number], dict) for record in item["bad"]]
    assert {record["path"] for record in found} == set(bad.paths) - set(good.paths) != set()
