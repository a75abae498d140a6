"""The stopwatch: what it counts, in which order it lets contenders run, and how a row is written."""

import importlib
import statistics
import time

import pytest
import torch

from bench import measure
from bench.measure import Row, Trial

CPU = torch.device("cpu")
PROGRAMS = ("kernels", "loader", "open_questions", "throughput", "tokenizer")


@pytest.mark.parametrize("program", PROGRAMS)
def test_results_need_a_folder_and_a_gpu_the_gpu(tmp_path, capsys, monkeypatch, program):
    main = importlib.import_module(f"bench.{program}").main
    taken = tmp_path / "taken"
    taken.write_text("")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, code, words in (
        (["--out", str(taken), "--device", "cpu"], 2, f"--out {taken} is no folder one can write to: File exists"),
        (["--out", str(tmp_path / "new"), "--device", "cuda"], 6, "--device cuda needs an NVIDIA GPU"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capsys.readouterr()
        assert ended.value.code == code and words in said.err and not said.out
    assert not (tmp_path / "new").exists()


def test_quantiles_are_interpolated_and_count_every_sample():
    found = measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert found.median == statistics.median([1, 2, 3, 4, 5, 100]) == 3.5
    assert (found.low, found.high, found.rounds) == (2.0, 5.0, 6)
    one = measure.quantiles([7.0])
    assert (one.median, one.low, one.high) == (7.0, 7.0, 7.0)
    assert measure.quantiles([]).rounds == 0


def test_everybody_runs_once_a_round_in_changing_order():
    names = ["a", "b", "c", "d"]
    rounds = measure.orders(names, 40, seed=3)
    assert all(sorted(order) == names for order in rounds)
    assert len({tuple(order) for order in rounds}) > 10
    assert rounds == measure.orders(names, 40, seed=3)
    assert {order[0] for order in rounds} == set(names)


def test_a_race_interleaves_and_leaves_preparation_out():
    seen = []

    def trial(name):
        return Trial(lambda ready: seen.append((name, ready)), lambda: time.sleep(0.01) or "ready")

    found = measure.race({"a": trial("a"), "b": trial("b")}, CPU, rounds=6, seed=1)
    assert not found.failures
    assert [len(found.samples[name]) for name in "ab"] == [6, 6]
    timed = [name for name, ready in seen[2:] if ready == "ready"]  # the first two warm up
    assert timed == [name for order in measure.orders(["a", "b"], 6, seed=1) for name in order]
    assert max(found.samples["a"]) < 10  # milliseconds: the sleep is not in it


def test_one_contender_that_breaks_ends_alone():
    calls = []

    def breaks(_):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("broken\non purpose")

    found = measure.race({"good": Trial(lambda _: None), "bad": Trial(breaks)}, CPU, rounds=5)
    assert found.failures == {"bad": "RuntimeError: broken on purpose"}
    assert len(found.samples["good"]) == 5 and len(found.samples["bad"]) == 1


def test_a_spent_budget_still_runs_three_rounds():
    found = measure.race({"slow": Trial(lambda _: time.sleep(0.02))}, CPU, rounds=50, budget=0.01)
    assert len(found.samples["slow"]) == measure.FEWEST


def test_rows_come_back_as_they_were_written(tmp_path):
    row = Row(
        benchmark="kernels", kernel="k", case="a, b", contender="ours", mode="both", median_ms=1.25, rounds=50,
        reason='said "no"', hardware="a GPU",
    )  # fmt: skip
    measure.write_rows(tmp_path / "rows.csv", [row, Row(kernel="other")])
    text = (tmp_path / "rows.csv").read_text().splitlines()
    assert text[0].split(",") == measure.COLUMNS
    for column in ("hardware", "torch", "triton", "driver", "commit", "command", "date", "low_ms", "high_ms", "sm_mhz"):
        assert column in measure.COLUMNS
    back = measure.read_rows(tmp_path / "rows.csv")
    assert back == [row, Row(kernel="other")]
    assert not list(tmp_path.glob("*.part"))


def test_a_machine_is_named_with_its_versions():
    found = measure.machine(CPU)
    assert found.hardware.startswith("CPU") and found.torch == torch.__version__ and found.date
    assert found.torch in found.line() and f"Python {found.python}" in found.line()
    assert measure.peaks(found.hardware) is None
    assert measure.peaks("NVIDIA H100 80GB HBM3") == (989.4, 3.35)


def test_memory_is_not_measured_on_a_cpu():
    assert measure.peak_memory(lambda: None, CPU) is None


@pytest.mark.gpu
def test_events_time_what_ran_on_the_gpu():
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    trials = {"small": Trial(lambda _: x[:512] @ x), "large": Trial(lambda _: x @ x)}
    found = measure.race(trials, device, rounds=20)
    small, large = (measure.quantiles(found.samples[name]).median for name in ("small", "large"))
    assert not found.failures and 0 < small < large
    peak = measure.peak_memory(lambda: x @ x, device)
    assert peak is not None and peak >= 64  # the product alone
