"""The tokenizer's benchmark: a rehearsal from end to end, and no speed for tokens that are not the same."""

import csv

import pytest
import torch

from bench import tokenizer as bench
from bevt_fast.tokenizers import dalle


def run(tmp_path, *more):
    return bench.main(["--out", str(tmp_path), "--device", "cpu", "--quick", "--frames", "2", *more])


def rows(tmp_path):
    with open(tmp_path / "tokenizer.csv", newline="") as file:
        return {row["contender"]: row for row in csv.DictReader(file)}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """A narrow encoder whatever is asked for, two rounds, no figure."""
    make, race = dalle.Dalle, bench.race
    monkeypatch.setattr(dalle, "Dalle", lambda hidden=256, vocab_size=8192: make(min(hidden, 8), min(vocab_size, 32)))
    monkeypatch.setattr(bench, "race", lambda *given, **options: race(*given, **(options | {"rounds": 2})))
    monkeypatch.setattr(bench.plot, "kernels", lambda *_: "no figure")


def test_a_rehearsal_gives_every_contender_a_row_and_ends_with_the_headline(tmp_path, capsys):
    assert run(tmp_path) == 0
    found = rows(tmp_path)
    assert list(found) == [
        bench.AT_ONCE, bench.BY_FEW, "channels_last, a few at a time", bench.OURS, "ours, bf16"
    ]  # fmt: skip
    for row in found.values():
        assert row["status"] == "ok" and float(row["frames_per_s"]) > 0 and float(row["tflops"]) > 0
        assert row["dtype"] == "bf16" or row["same_on_noise"] == row["same_on_shapes"] == "1"
    assert float(found[bench.OURS]["speedup"]) == 1
    assert float(found["ours, bf16"]["score_difference"]) > float(found[bench.OURS]["score_difference"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("tokenizer: ") and "frames/s" in last and "100.00% of tokens as plain float32" in last
    assert (tmp_path / "tokenizer.md").read_text().splitlines()[-1] == last


def test_a_float32_contender_with_another_token_gets_no_speed(tmp_path, monkeypatch, capsys):
    call = dalle._frames.name_cells

    def wrong(*arguments):
        ids = call(*arguments)
        ids.view(-1)[0] += 1
        return ids

    monkeypatch.setattr(dalle._frames, "name_cells", wrong)
    assert run(tmp_path) == 0
    found = rows(tmp_path)
    assert found[bench.OURS]["status"] == "differs" and found[bench.OURS]["median_ms"] == ""
    assert found["ours, bf16"]["status"] == "ok"  # another precision may differ, and says how much
    assert float(found["ours, bf16"]["same_on_noise"]) < 1
    assert found[bench.BY_FEW]["status"] == "ok" and found[bench.BY_FEW]["speedup"] == ""
    assert "no speed, for ours is differs" in capsys.readouterr().out.splitlines()[-1]


def test_a_contender_that_breaks_is_a_row_with_its_reason(tmp_path, monkeypatch, capsys):
    everybody = bench.contenders

    def fails(_):
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(
        bench,
        "contenders",
        lambda *given: [c._replace(ids=fails) if "bf16" in c.name else c for c in everybody(*given)],
    )
    assert run(tmp_path) == 0
    row = rows(tmp_path)["ours, bf16"]
    assert (row["status"], row["reason"]) == ("left out", "RuntimeError: no such kernel")


def test_weights_come_from_a_file(tmp_path, capsys):
    dalle.Dalle(8, 32).save(tmp_path / "encoder.safetensors")
    assert run(tmp_path / "out", "--weights", str(tmp_path / "encoder.safetensors")) == 0
    assert "weights from a file" in capsys.readouterr().out.splitlines()[-1]


def test_without_quick_the_compiled_one_takes_part():
    names = [c.name for c in bench.contenders(dalle.Dalle(8, 32), torch.device("cpu"), quick=False)]
    assert names[-1] == "ours, compiled"


def test_pictures_are_token_pixels_of_8_bits():
    for picture in (bench.noise(3, 32), bench.shapes(3, 32)):
        levels = (picture - 0.1) * 255 / 0.8
        assert picture.shape == (3, 3, 32, 32) and picture.dtype == torch.float32
        assert 0.1 <= picture.min() and picture.max() <= 0.9 + 1e-6
        assert (levels - levels.round()).abs().max() < 1e-3
        assert not torch.equal(picture[0], picture[1])
    assert torch.equal(bench.shapes(2, 16), bench.shapes(2, 16))


def test_the_operations_of_a_frame_are_those_of_the_specification(monkeypatch):
    monkeypatch.undo()  # the whole width
    with torch.device("meta"):
        tokenizer = dalle.Dalle()
    assert round(bench._flop(tokenizer, 112) / 1e9, 1) == 52.1  # SPEC 8


@pytest.mark.parametrize("frames", ["0", "-3", "1000000", "many"])
def test_bad_counts_are_one_sentence(tmp_path, frames, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--frames", frames)
    assert end.value.code == 2 and "--frames" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"<html>"])
def test_bad_weights_are_one_sentence(tmp_path, content, capsys):
    path = tmp_path / "encoder.pkl"
    if content is not None:
        path.write_bytes(content)
    assert run(tmp_path / "out", "--weights", str(path)) == 3
    assert capsys.readouterr().out.startswith("tokenizer.py: ")


def test_the_figure_reads_its_rows(tmp_path, monkeypatch):
    monkeypatch.undo()
    row = bench.TokenRow(benchmark="tokenizer", kernel="dalle", case="2 frames", mode="forward", contender="ours")
    row.median_ms, row.low_ms, row.high_ms, row.frames_per_s = 2.0, 1.0, 3.0, 1000.0
    bench.write_rows(tmp_path / "tokenizer.csv", [row])
    assert bench.plot.kernels(tmp_path / "tokenizer.csv", tmp_path / "tokenizer.png") is None
    assert (tmp_path / "tokenizer.png").stat().st_size > 1000
