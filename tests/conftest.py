"""What every test stands on: fixed seeds, few threads, the programs' own way of starting; where there is no GPU, the
kernels in Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.command import environment

# read when a kernel is defined, so before anything imports bevt_kernels; programs that tests start do not inherit it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
# minutes of training each: they begin first, so that the others fill the processes beside them
LONGEST = {"test_demo.py", "test_study.py", "test_curve.py", "test_integration.py", "test_token_targets.py"}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def program():
    """Run one of our programs as a user would: `program("bevt_fast/train.py", "--config", ...)`. Returns the finished
    process.
    """

    def start(*arguments, timeout=240, check=None, env=None):
        command = [sys.executable, *map(str, arguments)]
        place = environment(**(env or {}))
        done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, timeout=timeout)
        if check is not None:
            assert done.returncode == check, (
                f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        return done

    return start


def pytest_configure(config):
    # xdist would begin with the files of most tests, and end with minutes of waiting for one that trains
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
