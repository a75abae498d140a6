"""Why training waits: each cause is told apart by what the workers did, and names the setting that helps."""

import time

import pytest
import torch

from bevt_fast.data import pace
from bevt_fast.data.pace import Busy, Pace, Stopwatch, measured

# 10 s, of which 2 were waited; 2 streams of 2 workers; all of them computing
COMPUTING = Pace(10.0, 2.0, "clips", Busy(20.0, 19.0, 0.5), 0.0, 2, 5, 16)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, ("free", "raise data.workers to 3")),
        ({"waited": 8.0}, ("raise data.workers to 10",)),
        ({"waited": 9.99}, ("raise data.workers to 16",)),
        ({"cores": 5}, ("takes all 5 cores", "prepare.py transcode", "data.decoder", "dali")),
        ({"busy": Busy(20.0, 12.0, 8.0)}, ("takes all 16 cores", "transcode")),
        ({"busy": Busy(19.0, 4.0, 1.0)}, ("74% of their time waiting for storage", "faster disk")),
        ({"busy": Busy(9.0, 9.0, 0.0)}, ("bursts", "raise data.prefetch")),
        ({"cutting": 9.5}, ("GPU's decoders", "transcode")),
        ({"workers": 0, "busy": Busy()}, ("training process itself", "raise data.workers")),
        ({"seconds": 0.0, "waited": 0.0, "busy": Busy()}, ("clips",)),
    ],
)
def test_each_cause_has_its_remedy(changes, words):
    advice = COMPUTING._replace(**changes).advice()
    assert all(word in advice for word in words), advice
    assert "\n" not in advice and not advice.endswith(".")


def test_measured_tells_computing_from_waiting():
    def work():
        time.sleep(0.2)
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
        return "done"

    result, busy = measured(work)
    assert result == "done" and busy.wall >= 0.25 and 0.1 <= busy.cpu < 0.25
    assert 0 < busy.blocked < 1


def test_a_stopwatch_adds_up_by_stream_and_forgets():
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.waiting("clips"):
            time.sleep(0.02)
    with watch.waiting("images"):
        pass
    taken = watch.taken()
    assert taken["clips"] >= 0.04 > taken["images"] and watch.taken() == {}


def test_a_stopwatch_of_a_gpu_counts_what_the_gpu_stands_idle(monkeypatch):
    """Between two marks in its queue, not on the host's clock."""
    clock = iter([3.0, 3.5])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = next(clock)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 1e3 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watch = Stopwatch(torch.device("cuda"))
    with watch.waiting("clips"):
        time.sleep(0.05)
    assert watch.taken() == {"clips": 0.5}


def test_the_cores_of_a_container_are_its_quota(monkeypatch):
    whole = pace.cores()
    assert whole >= 1
    for text, expected in (("150000 100000\n", 1), ("max 100000\n", whole), ("", whole)):
        monkeypatch.setattr(pace.Path, "read_text", lambda path, text=text: text)
        assert pace.cores() == expected
