"""The gradient of the relative position bias on a CPU, summed in long pieces on its way to the table.

A row of the table belongs to an offset (dt, dh, dw) between two tokens. The pairs of a window, or of a box of its
tokens, are summed by one axis of the offset after the other: frames first, because for one frame of queries the keys of
all frames are one piece of memory; what is left for rows and columns is a quarter of it and less.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .window_geometry import Triple


class Sums(Protocol):
    """Adds up what pairs of tokens owe to the table."""

    def add(self, heads: slice, pairs: Tensor) -> None:
        """pairs: (heads, n, n) float32, of the tokens in the box, queries by keys."""
        ...

    def rows(self) -> Tensor:
        """For every row of the table its sum: (rows, nH) float32."""
        ...


class ByOffset:
    """Where the row of a pair is that of the offset between its tokens, in a table for the nominal `window`."""

    def __init__(self, heads: int, box: Triple, window: Triple) -> None:
        self.box, self.window = box, window
        t, h, w = box
        self._memory = torch.zeros(heads, h * w, (2 * t - 1) * h * w, device="cpu")

    def add(self, heads: slice, pairs: Tensor) -> None:
        t, h, w = self.box
        by_frame, memory = pairs.view(-1, t, h * w, t * h * w), self._memory[heads]
        for frame, place in _against(t):
            memory[:, :, place.start * h * w : place.stop * h * w] += by_frame[:, frame]

    def rows(self) -> Tensor:
        t, h, w = self.box
        by_frame = self._memory.view(-1, h, w, 2 * t - 1, h, w)
        by_row = self._memory.new_zeros(len(by_frame), w, 2 * t - 1, 2 * h - 1, w)
        for row, place in _against(h):
            by_row[:, :, :, place] += by_frame[:, row]
        by_column = self._memory.new_zeros(len(by_frame), *(2 * size - 1 for size in self.box))
        for column, place in _against(w):
            by_column[..., place] += by_row[:, column]
        table = self._memory.new_zeros(len(by_frame), *(2 * size - 1 for size in self.window))
        centre = (slice(size - some, size + some - 1) for size, some in zip(self.window, self.box))
        table[(slice(None), *centre)] = by_column.flip(1, 2, 3)  # keys minus queries -> queries minus keys
        return table.flatten(1).T


class ByPair:
    """Where it may be any: `index` (n, n) int64 says which of `rows` rows."""

    def __init__(self, heads: int, index: Tensor, rows: int) -> None:
        self.index, self.count = index, rows
        self._memory = torch.zeros(heads, *index.shape, device="cpu")

    def add(self, heads: slice, pairs: Tensor) -> None:
        self._memory[heads] += pairs

    def rows(self) -> Tensor:
        index = self.index.flatten()
        sums = [torch.zeros(self.count, device="cpu").index_add_(0, index, head.flatten()) for head in self._memory]
        return torch.stack(sums, dim=1)


def _against(size: int) -> Iterator[tuple[int, slice]]:
    """A query's place along an axis, and where the offsets of all keys from it lie among the 2 size - 1."""
    return ((query, slice(size - 1 - query, 2 * size - 1 - query)) for query in range(size))
