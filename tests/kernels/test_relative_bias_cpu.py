"""The bias table's gradient on a CPU: every row of the table sums exactly the pairs that read it."""

import pytest
import torch

from bevt_kernels import window_cpu
from bevt_kernels.relative_bias_cpu import ByOffset, ByPair
from bevt_kernels.window_geometry import bias_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((2, 3, 4), (2, 3, 4)),
        ((1, 7, 7), (8, 7, 7)),
        ((8, 4, 3), (8, 7, 7)),
        ((3, 1, 2), (4, 5, 6)),
        ((1, 1, 1), (2, 2, 2)),
    ],
)
def test_by_offset_and_by_pair_agree_to_the_last_whole_number(box, window):
    index, rows = bias_rows(window, box, "true", CPU), (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
    one, other = ByOffset(3, box, window), ByPair(3, index, rows)
    torch.manual_seed(0)
    for heads in (slice(0, 2), slice(2, 3), slice(0, 3)):
        # whole numbers: float32 adds them without rounding, in any order
        pairs = torch.randint(-50, 50, (heads.stop - heads.start, *index.shape)).float()
        one.add(heads, pairs)
        other.add(heads, pairs)
    assert one.rows().shape == (rows, 3) and torch.equal(one.rows(), other.rows())
    assert int((one.rows() != 0).any(dim=1).sum()) <= len(index.unique())


@pytest.mark.parametrize(
    ("grid", "bias_index", "by_offset"),
    [
        ((8, 14, 14), "true", True),
        ((8, 14, 14), "official", True),
        ((2, 14, 14), "official", True),  # clipped in time: the first rows are those of the first frames
        ((8, 4, 4), "true", True),
        ((8, 4, 4), "official", False),  # SPEC X2: other offsets than the tokens'
    ],
)
def test_which_layers_have_rows_by_offset(grid, bias_index, by_offset):
    layer = window_cpu.layer(grid, (8, 7, 7), (0, 0, 0), (0, 0, 0), bias_index)
    assert layer.nominal == ((8, 7, 7) if by_offset else None)
