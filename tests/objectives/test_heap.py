"""What a process has freed goes back to the system where it is much, and only there."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bevt_fast.objectives import heap

ROOT = Path(__file__).resolve().parents[2]
HOLES = """
import sys
from pathlib import Path
import torch
from bevt_fast.objectives import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

blocks = [bytearray(100_000) for _ in range(int(sys.argv[1]))]  # below glibc's threshold for blocks of their own
for block in blocks:
    block[::4096] = bytes(len(range(0, 100_000, 4096)))
blocks[::2] = [None] * len(blocks[::2])
before = resident()
heap.give_back(torch.device(sys.argv[2]))
print(before - resident(), sum(block is not None and len(block) for block in blocks))
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


@glibc
@pytest.mark.parametrize("count, is_much", [(8000, True), (2000, False)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gaps_go_back_where_they_are_much(count, is_much, device):
    done = subprocess.run(
        [sys.executable, "-c", HOLES, str(count), device], cwd=ROOT, capture_output=True, text=True, check=True
    )
    given, kept = map(float, done.stdout.split())
    assert kept == count / 2 * 100_000
    assert given > 0.8 * count / 2 * 100_000 / 2**20 if is_much and device == "cpu" else abs(given) < 5


def test_another_c_library_is_left_alone(monkeypatch):
    class Other:
        def __getattr__(self, name):
            raise AttributeError(name)

    heap._library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: Other())
    heap.give_back(torch.device("cpu"))
    assert heap._library() is None
    heap._library.cache_clear()
