"""What an uninitialised buffer holds is never right: in these tests it is NaN (or the largest integer). Tensors are so
small that a second thread would only wait.
"""

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _nan_in_fresh_buffers():
    """For a whole module, because fixtures of a module run kernels too."""
    settings: Any = torch.utils.deterministic
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = settings.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    settings.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1], warn_only=only_warned)
    torch.set_num_threads(threads)
