"""3 x 3 convolutions of a CPU by Winograd's minimal filtering (Winograd 1980; Lavin and Gray 2016, section 4.1).

The m x m results of a tile take (m + 2)^2 products of input and output channels instead of 9 m^2: 16 instead of 36 for
m = 2, 36 instead of 144 for m = 4. All other work is sums of pixels of one channel, so it is worth it where channels
are many. Pixels are read as the coefficients of a polynomial, whose values at m + 1 points and at infinity are what is
multiplied. At 0 and +-1 these are plain differences, and the error is below that of a direct convolution, whose sums
are nine times as long. For m = 4 the points are 0, +-1/sqrt(2) and +-sqrt(2): with them the largest error is 0.9 to 2
times a direct convolution's, with the usual 0, +-1 and +-2 it is 3 to 9 times that (2 frames, 64 to 1,024 channels).
"""

import contextlib
import math
import mmap
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bevt_kernels import products_cpu

TILES = 196  # at a time; all products of them are held
LEAST = 1024  # pixels in all frames: with fewer, laying out the weights takes longer than is won
NEAR, FAR = math.sqrt(0.5), math.sqrt(2)  # points of m = 4


class Filtering(NamedTuple):
    """F(m x m, 3 x 3), by what happens along one axis."""

    size: int  # m
    weights: Sequence[Sequence[float]]  # (m + 2, 3): of three weights in a row, their m + 2 values
    spread: Callable[[Sequence[Tensor], Tensor], None]  # m + 2 pixels in a row to their m + 2 values, which it writes
    collect: Callable[[Tensor, Tensor], None]  # (m + 2, ...) products to (m, ...) results, which it writes
    # least harmonic mean, halved, of input and output channels: products grow with both, sums with one of them
    channels: int


class Winograd(NamedTuple):
    """conv(x) + b of one layer, and its ReLU."""

    filtering: Filtering
    v: Tensor  # ((m + 2)^2, K, C), of the weights
    b: Tensor

    @classmethod
    def of(cls, w: Tensor, b: Tensor, filtering: Filtering) -> "Winograd":
        """Lays out weights (K, C, 3, 3)."""
        one = torch.tensor(filtering.weights, dtype=torch.float64, device="cpu")
        both = torch.kron(one, one).to(w.dtype).view(len(one), len(one), 9).transpose(0, 1).reshape(-1, 9)
        v = _pages(len(both) * len(w) * w.shape[1], w.dtype).view(len(both), *w.shape[:2])  # (column, row) first
        torch.mm(both, w.reshape(-1, 9).T, out=v.flatten(1))
        return cls(filtering, v, b)

    def __call__(self, x: Tensor, relu: bool, memory: "Memory | None" = None) -> Tensor:
        """(n, C, H, W) -> (n, K, H, W), both in channels_last; H and W are multiples of m. `memory` as of `room`."""
        n, _, height, width = x.shape
        out = x.new_empty(n, height, width, len(self.b))
        frames, memory = self._frames(n, height, width), memory or take(self.room(n, height, width), x.dtype)
        for some, done in zip(x.movedim(1, -1).split(frames), out.split(frames)):
            self._tiles(some, relu, done, memory)
        return out.movedim(-1, 1)

    def _frames(self, n: int, height: int, width: int) -> int:
        """How many go at a time."""
        return min(n, max(1, self.filtering.size**2 * TILES // (height * width)))

    def room(self, n: int, height: int, width: int) -> tuple[int, int]:
        """How many numbers n frames need, in two places: what is read from one is written to the other."""
        size, (_, outputs, inputs) = self.filtering.size, self.v.shape
        frames, values = self._frames(n, height, width), size + 2
        tiles, across = height * width // size**2, height // size * (width + 2)
        here = ((height + 2) * (width + 2) * inputs, values**2 * tiles * inputs, size * values * tiles * outputs)
        there = (values * across * inputs, values**2 * tiles * outputs, size**2 * tiles * outputs)
        return frames * max(here), frames * max(there)

    def _tiles(self, x: Tensor, relu: bool, out: Tensor, memory: "Memory") -> None:
        """(n, H, W, C) -> out (n, H, W, K)."""
        (n, height, width, inputs), outputs = x.shape, len(self.b)
        size, _, spread, collect, _ = self.filtering
        high, wide, values = height // size, width // size, size + 2
        here, there = memory
        padded = _view(here, n, height + 2, width + 2, inputs)
        for edge in (padded[:, 0], padded[:, -1], padded[:, :, 0], padded[:, :, -1]):
            edge.zero_()
        padded[:, 1:-1, 1:-1] = x
        rows = _view(there, values, n, high, width + 2, inputs)
        spread([padded[:, k : k + height : size] for k in range(values)], rows)
        sums = _view(here, values, values, n, high, wide, inputs)  # (column, row, ...)
        spread([rows[:, :, :, k : k + width : size] for k in range(values)], sums)
        products = _view(there, values, values, n, high, wide, outputs)
        torch.bmm(sums.view(values**2, -1, inputs), self.v.mT, out=products.view(values**2, -1, outputs))
        half = _view(here, size, values, n, high, wide, outputs)
        collect(products, half)
        whole = _view(there, size, size, n, high, wide, outputs)  # (row, column, ...)
        collect(half.transpose(0, 1), whole)
        whole += self.b
        places = out.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(2, 4, 0, 1, 3, 5)
        torch.clamp_min(whole, 0 if relu else -math.inf, out=places)


Memory = tuple[Tensor, Tensor]


def take(room: tuple[int, int], dtype: torch.dtype = torch.float32) -> Memory:
    """Uninitialised numbers."""
    return _pages(room[0], dtype), _pages(room[1], dtype)


def _pages(count: int, dtype: torch.dtype) -> Tensor:
    """Memory of its own for so many numbers, in huge pages where the system has them: first writing to 64 MB of small
    ones takes longer than making the weights that come there.
    """
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def suited(w: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> Filtering | None:
    """What a layer with weights w (K, C, side, side) on frames (n, H, W) is fastest by; None: a direct convolution.

    That it is everywhere on a machine whose BLAS, which would multiply here, uses half of the processor.
    """
    outputs, inputs, side = w.shape[:3]
    n, height, width = shape
    if dtype != torch.float32 or side != 3 or n * height * width < LEAST or products_cpu.quicker():
        return None
    for filtering in (BY_4, BY_2):
        if height % filtering.size == width % filtering.size == 0:
            return filtering if inputs * outputs >= filtering.channels * (inputs + outputs) else None
    return None


def _view(memory: Tensor, *shape: int) -> Tensor:
    return memory[: math.prod(shape)].view(shape)


def _spread_2(d: Sequence[Tensor], out: Tensor) -> None:
    """At 0, 1, -1 and infinity."""
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _collect_2(m: Tensor, out: Tensor) -> None:
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


def _spread_4(d: Sequence[Tensor], out: Tensor) -> None:
    """At 0, NEAR, -NEAR, FAR, -FAR and infinity. Values at p and -p are an even part and p times an odd one, added and
    subtracted.
    """
    # the parts stand in places that are written to last
    even, odd = out[0], out[5]
    for k, point, other in ((1, NEAR, FAR), (3, FAR, NEAR)):
        torch.add(d[4], d[2], alpha=-(other**2), out=even)
        torch.add(d[3], d[1], alpha=-(other**2), out=odd)
        torch.add(even, odd, alpha=point, out=out[k])
        torch.add(even, odd, alpha=-point, out=out[k + 1])
    even.sub_(d[2], alpha=FAR**2).add_(d[0])
    torch.sub(d[5], odd, alpha=FAR**2, out=odd).sub_(d[3], alpha=NEAR**2)


def _collect_4(m: Tensor, out: Tensor) -> None:
    near, far = out.new_empty(2, *out.shape[1:])
    torch.add(m[1], m[2], out=near)
    torch.add(m[3], m[4], out=far)
    torch.add(m[0], near, out=out[0]).add_(far)
    torch.mul(near, NEAR**2, out=out[2]).add_(far, alpha=FAR**2)
    torch.sub(m[1], m[2], out=near)
    torch.sub(m[3], m[4], out=far)
    torch.mul(near, NEAR, out=out[1]).add_(far, alpha=FAR)
    torch.add(m[5], near, alpha=NEAR**3, out=out[3]).add_(far, alpha=FAR**3)


def _values(point: float, scale: float) -> tuple[float, float, float]:
    return scale, scale * point, scale * point**2


BY_2 = Filtering(2, ((1, 0, 0), _values(1, 0.5), _values(-1, 0.5), (0, 0, 1)), _spread_2, _collect_2, 128)
# scales: one over the product of a point's distances to the others
BY_4 = Filtering(
    4,
    ((1, 0, 0), *(_values(sign * p, s) for p, s in ((NEAR, -2 / 3), (FAR, 1 / 6)) for sign in (1, -1)), (0, 0, 1)),
    _spread_4,
    _collect_4,
    64,
)
