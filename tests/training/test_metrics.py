"""log.jsonl is exact and survives a kill; TensorBoard may fail; rates are counts over the time that passed."""

import json
import math
from pathlib import Path

import pytest
import torch

from bevt_fast.errors import MachineError
from bevt_fast.training import metrics
from bevt_fast.training.metrics import Metrics, peak_flops, read_log


class Clock:
    """A wall clock the test sets, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def start(output: Path, first_step: int = 0, is_main: bool = True, **changes) -> Metrics:
    sizes = {"total_steps": 100, "images_per_step": 64, "clips_per_step": 8, "flops_per_step": 1e12} | changes
    return Metrics(output, first_step=first_step, is_main=is_main, **sizes)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_floats_round_trip_bit_by_bit(tmp_path: Path) -> None:
    losses = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist() + [0.1 + 0.2, 1e-310]
    log = start(tmp_path)
    for step, loss in enumerate(losses):
        log.log(step, {"train/loss": loss})
    log.close()
    assert [row["train/loss"] for row in read_log(tmp_path / "log.jsonl")] == losses
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl")] == list(range(len(losses)))


def test_a_value_that_is_not_finite_keeps_the_file_valid_json(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.log(0, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 1e-3})
    log.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_log(tmp_path / "log.jsonl")
    assert math.isnan(row["train/loss"]) and math.isnan(row["train/grad_norm"]) and row["train/lr"] == 1e-3


def test_every_line_is_in_the_file_before_the_next_step(tmp_path: Path) -> None:
    log = start(tmp_path)
    for step in range(3):
        log.log(step, {"train/loss": 1.0})
        assert len(read_log(tmp_path / "log.jsonl")) == step + 1
    log.close()


def test_resume_drops_steps_to_be_repeated_and_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    kept = ['{"step": 0, "train/loss": 9.010000}', '{"step": 10, "train/loss": 8.5}']
    path.write_text("\n".join([*kept, '{"step": 20, "train/loss": 8.1}', '{"step": 3']))
    log = start(tmp_path, first_step=20)
    log.log(20, {"train/loss": 8.0})
    log.close()
    assert path.read_text().splitlines()[:2] == kept  # byte for byte
    assert [(row["step"], row["train/loss"]) for row in read_log(path)] == [(0, 9.01), (10, 8.5), (20, 8.0)]


def test_tensorboard_has_every_value_and_no_step_twice_after_a_resume(tmp_path: Path) -> None:
    first = start(tmp_path)
    for step in range(4):
        first.log(step, {"train/loss": 1.0, "val/mask_acc_2d": 0.5})
    first.close()
    second = start(tmp_path, first_step=2)
    second.log(2, {"train/loss": 2.0})
    second.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss"] == [(0, 1.0), (1, 1.0), (2, 2.0)]
    assert found["val/mask_acc_2d"] == [(0, 0.5), (1, 0.5)]


def test_without_tensorboard_there_is_one_warning_and_the_log_goes_on(tmp_path: Path, caplog) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = start(tmp_path)
    for step in range(3):
        log.log(step, {"train/loss": 1.0})
    log.close()
    assert len(caplog.records) == 1 and "TensorBoard" in caplog.text
    assert len(read_log(tmp_path / "log.jsonl")) == 3


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"log\.jsonl.*output"):
        start(tmp_path / "file")


def test_rates_are_of_the_time_since_the_last_log(tmp_path: Path, clock: Clock) -> None:
    log = start(tmp_path, first_step=5)
    clock.now += 4
    log.log(5, {"train/loss": 1.0}, waited=3.0)
    clock.now += 20
    log.log(15, {"train/loss": 1.0}, waited=5.0)
    log.log(15, {"val/mask_acc_2d": 0.1})
    log.close()
    first, second, heldout = read_log(tmp_path / "log.jsonl")
    assert (first["perf/clips_per_s"], first["perf/images_per_s"], first["perf/data_wait_frac"]) == (2, 16, 0.75)
    assert (second["perf/clips_per_s"], second["perf/images_per_s"], second["perf/data_wait_frac"]) == (4, 32, 0.25)
    assert heldout == {"step": 15, "val/mask_acc_2d": 0.1}
    assert "perf/mfu" not in first  # no peak is known for a CPU


def test_mfu_and_memory_on_a_known_accelerator(tmp_path: Path, clock: Clock, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    log = start(tmp_path, flops_per_step=312e12)
    clock.now += 4
    log.log(0, {}, waited=0.0)
    log.close()
    (row,) = read_log(tmp_path / "log.jsonl")
    assert row["perf/mfu"] == 0.25 and row["perf/gpu_mem_gib"] == 3


@pytest.mark.parametrize(
    "device, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("Tesla V100-SXM2-32GB", 125),
    ],
)
def test_peaks_by_device_name(device: str, teraflops: float) -> None:
    assert peak_flops(device) == teraflops * 1e12


@pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H20"])
def test_no_peak_is_better_than_a_wrong_one(device: str) -> None:
    assert peak_flops(device) is None


def test_waiting_for_data_is_said_once_and_not_of_the_start(tmp_path: Path, clock: Clock, caplog) -> None:
    log = start(tmp_path)
    for step, share in enumerate([0.9, 0.05, 0.2, 0.3]):
        clock.now += 1
        log.log(step, {"train/loss": 1.0}, waited=share)
        assert len(caplog.records) == (1 if step >= 2 else 0)
    log.close()
    assert "20 %" in caplog.text and "data.workers" in caplog.text


def test_the_warning_says_what_the_loader_found_out(tmp_path: Path, clock: Clock, caplog) -> None:
    log = start(tmp_path)
    for step, remedy in enumerate(["the start", "no fault", "storage is slow; put the files on a faster disk", "late"]):
        clock.now += 1
        log.log(step, {"train/loss": 1.0}, waited=0.05 if step == 1 else 0.5, remedy=remedy)
    log.close()
    assert [record.message for record in caplog.records] == [
        "training waits for data 50 % of the time: storage is slow; put the files on a faster disk"
    ]


def test_a_line_has_the_figures_of_the_streams_there_are(tmp_path: Path, clock: Clock, capsys) -> None:
    log = start(tmp_path, clips_per_step=0)
    values = {"train/loss": 4.5, "train/loss_image": 4.5, "train/loss_video": 0.0, "train/mask_acc_2d": 0.125}
    for step in (0, 10):
        clock.now += 10
        log.log(step, values, waited=0.5)
    log.log(99, {"val/mask_acc_2d": 0.25})
    log.close()
    _, line, heldout = capsys.readouterr().err.splitlines()
    assert line.startswith("step 11/100  loss 4.5000  image 4.5000 (12.5% right)  64 images/s  data wait 5%")
    assert line.endswith("ETA 0:01:29")  # 89 steps left, 10 in ten seconds
    assert heldout.startswith("step 100/100  val/mask_acc_2d 0.25")


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    log = start(tmp_path, first_step=9)
    log.log(49, {"train/loss": 4.5})
    assert log.bar.n == 50
    log.close()
    assert "50/100" in capsys.readouterr().err


def test_other_processes_are_quiet(tmp_path: Path, capsys, caplog) -> None:
    log = start(tmp_path, is_main=False)
    log.log(0, {"train/loss": 1.0}, waited=0.1)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "") and caplog.record_tuples == []


def test_a_full_disk_is_said_once_and_does_not_stop_training(tmp_path: Path, caplog) -> None:
    log = start(tmp_path)
    assert log.file is not None
    log.file.close()
    # every flush to this device fails with ENOSPC
    log.file = open("/dev/full", "w")
    for step in range(2):
        log.log(step, {"train/loss": 1.0})
    log.close()
    assert caplog.text.count("No space left") == 1
