"""3 x 3 convolutions of a CPU by Winograd's minimal filtering, F(2 x 2, 3 x 3) (Lavin and Gray 2016, section 4.1).

Four results of a 2 x 2 tile take 16 products of input and output channels instead of 36. All other work is sums of
pixels of one channel, and halves, which are exact. Sums over channels are shorter than those of a direct convolution:
in float32 the result is no further from the exact one. Worth it where channels are many and pixels few.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

TILES = 196  # at a time; 16 sums of each channel of them are held
LEAST = 256  # tiles in all frames: with fewer, laying out the weights takes longer than is won
# harmonic mean, halved, of input and output channels: products grow with both, sums with one of them
CHANNELS = 128
# of three weights in a row: g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2
FILTERED = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


class Winograd(NamedTuple):
    """conv(x) + b of one layer, and its ReLU."""

    v: Tensor  # (16, K, C), of the weights
    b: Tensor

    @classmethod
    def of(cls, w: Tensor, b: Tensor) -> "Winograd":
        """Lays out weights (K, C, 3, 3)."""
        one = torch.tensor(FILTERED, dtype=w.dtype, device=w.device)
        both = torch.kron(one, one)  # (column, row) of 16 to (row, column) of 9
        both = both.view(4, 4, 3, 3).transpose(0, 1).reshape(16, 9)
        return cls((both @ w.reshape(-1, 9).T).view(16, *w.shape[:2]), b)

    def __call__(self, x: Tensor, relu: bool) -> Tensor:
        """(n, C, H, W) -> (n, K, H, W), both in channels_last; H and W are even."""
        n, _, height, width = x.shape
        out = x.new_empty(n, height, width, len(self.b))
        frames = max(1, 4 * TILES // (height * width))
        for some, done in zip(x.movedim(1, -1).split(frames), out.split(frames)):
            self._tiles(some, relu, done)
        return out.movedim(-1, 1)

    def _tiles(self, x: Tensor, relu: bool, out: Tensor) -> None:
        """(n, H, W, C) -> out (n, H, W, K)."""
        n, height, width, channels = x.shape
        rows = x.new_empty(4, n, height // 2, width, channels)
        _differences(x, rows, 1)
        sums = x.new_empty(4, 4, n, height // 2, width // 2, channels)  # (column, row, ...)
        _differences(rows, sums, 3)
        products = torch.bmm(sums.view(16, -1, channels), self.v.mT).view(4, 4, *sums.shape[2:5], -1)
        both = _collected(_collected(products).transpose(0, 1))  # (row, column, n, h, w, K)
        both += self.b
        places = out.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(2, 4, 0, 1, 3, 5)
        torch.clamp_min(both, 0 if relu else -math.inf, out=places)


def applies(w: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> bool:
    """Whether a layer with weights w (K, C, side, side) on frames (n, H, W) is faster so."""
    outputs, inputs, side = w.shape[:3]
    n, height, width = shape
    if dtype != torch.float32 or side != 3 or height % 2 or width % 2 or n * height * width < 4 * LEAST:
        return False
    return inputs * outputs >= CHANNELS * (inputs + outputs)


def _differences(x: Tensor, out: Tensor, dim: int) -> None:
    """Of the pixels d0 to d3 around each pair along `dim`: d0 - d2, d1 + d2, d2 - d1, d1 - d3; zeros lie outside."""
    first, second = x.unflatten(dim, (-1, 2)).unbind(dim + 1)  # d1 and d2; d0 is the d2 before, d3 the d1 behind
    pairs = first.shape[dim]
    torch.sub(second.narrow(dim, 0, pairs - 1), second.narrow(dim, 1, pairs - 1), out=out[0].narrow(dim, 1, pairs - 1))
    torch.neg(second.narrow(dim, 0, 1), out=out[0].narrow(dim, 0, 1))
    torch.add(first, second, out=out[1])
    torch.sub(second, first, out=out[2])
    torch.sub(first.narrow(dim, 0, pairs - 1), first.narrow(dim, 1, pairs - 1), out=out[3].narrow(dim, 0, pairs - 1))
    out[3].narrow(dim, pairs - 1, 1).copy_(first.narrow(dim, pairs - 1, 1))


def _collected(m: Tensor) -> Tensor:
    """(4, ...) -> (2, ...): m0 + m1 + m2, m1 - m2 - m3."""
    out = m.new_empty(2, *m.shape[1:])
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
    return out
