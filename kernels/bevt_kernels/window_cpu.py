"""Window attention on a CPU: a few windows at a time, so that their scores stay in its caches.

The reference writes (B*nW, nH, N, N) scores several times and keeps them for the backward pass. Here a chunk of windows
is gathered, its scores are made, used and forgotten, and the backward pass makes them again; only qkv and the table are
kept. Chunks follow each other in a fixed order, so two runs with as many threads give equal bits. It computes in
float32, whatever the inputs are. Pairs of different regions are not computed where lengths of queries and keys show
that none can count.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .relative_bias_cpu import ByOffset, ByPair, Sums
from .window_geometry import SEPARATED, BiasIndex, Triple, bias_rows, kinds, roll, used_window, windows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 19  # scores a thread: 2 MiB
GATHERED = 1 << 22  # numbers of queries, keys and values: 16 MiB; glibc takes 32 MiB anew from the system every time
# weights below exp(-64) of the largest become 0: 4,096 of them lack 2**-80 of a row's sum. Left alone, the exp(-100) of
# two tokens that the shift brought together is too small for a normal float32, and products with such take a CPU many
# times as long
NEGLIGIBLE = -64.0
FEWEST = 196  # tokens of a window whose regions are worth products of their own


class Kind(NamedTuple):
    """Windows with the same regions, or one region of each of them."""

    places: Tensor  # (windows, n) int64, their tokens in the sample
    box: tuple[slice, slice, slice] | None  # frames, rows and columns of a window that these tokens are; None: all
    foreign: Tensor | None  # (n, n), -100 where two tokens are of different regions; None: nowhere


class Layer(NamedTuple):
    """One layer's geometry."""

    tokens: int  # of a sample, S
    window: Triple  # as used, N tokens
    whole: list[Kind]
    apart: list[Kind]  # the same windows, none with several regions; `whole` itself where that is not worth it
    rows: Tensor  # (N, N) int64, into the bias table
    nominal: Triple | None  # the window whose table it is, where a row is that of the offset of two tokens


class Chunk(NamedTuple):
    """Some windows of one kind, of any samples."""

    tokens: Tensor  # (windows * n,) int64, into the tokens of all samples
    windows: int
    foreign: Tensor | None


@lru_cache(maxsize=64)
def layer(grid: Triple, window: Triple, shift: Triple, mask_shift: Triple, bias_index: BiasIndex) -> Layer:
    """The geometry of a layer, computed once."""
    used, cpu = used_window(grid, window), torch.device("cpu")
    with torch.inference_mode(False), cpu:
        token = windows(roll(torch.arange(prod(grid)).view(1, *grid, 1), shift, -1), used).reshape(-1, prod(used))
        patterns, kind = kinds(grid, used, mask_shift)
        whole, apart = [], []
        for number, label in enumerate(patterns):
            places = token[kind == number]
            foreign = torch.where(label[:, None] != label[None, :], SEPARATED, 0.0) if bool(label.any()) else None
            whole.append(Kind(places, None, foreign))
            for region in range(int(label.max()) + 1):
                members = label == region
                apart.append(Kind(places[:, members], _box(members, used), None))
        if prod(used) < FEWEST or len(apart) == len(whole):
            apart = whole
    rows = bias_rows(window, used, bias_index, cpu)
    by_offset = torch.equal(rows, bias_rows(window, used, "true", cpu))
    return Layer(prod(grid), used, whole, apart, rows, window if by_offset else None)


def forward(qkv: Tensor, table: Tensor, layer: Layer) -> Tensor:
    """(B, t, h, w, 3, nH, d) -> (B, t, h, w, nH, d)."""
    heads, width = qkv.shape[5:]
    flat, bias = qkv.reshape(-1, 3, heads, width), _bias(table, layer)
    out, scores = qkv.new_empty(len(flat), 1, heads, width), _Scratch()
    for kind in _kinds(flat, bias, layer):
        its_bias = _within(bias, layer, kind)
        for chunk in _chunks(kind, layer, qkv):
            qkv_there, made = _gather(flat, chunk), _rows(1, heads, width, chunk)
            for part in _parts(chunk, heads):
                q, k, v = qkv_there[:, part]
                (o,) = _matrices(made, part)
                o.copy_(_weights(q, k, its_bias[part], chunk, scores) @ v)
            _scatter(made, out, chunk)
    return out.view(*qkv.shape[:4], heads, width)


def backward(grad: Tensor, qkv: Tensor, table: Tensor, layer: Layer, table_too: bool) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the table (empty where it is not wanted)."""
    heads, width = qkv.shape[5:]
    flat, bias = qkv.reshape(-1, 3, heads, width), _bias(table, layer)
    upstream, dqkv, scale = grad.reshape(-1, 1, heads, width), torch.empty_like(flat), width**-0.5
    dtable = torch.zeros(table.shape, device="cpu") if table_too else None
    weights, scores = _Scratch(), _Scratch()
    for kind in _kinds(flat, bias, layer):
        its_bias = _within(bias, layer, kind)
        sums = None if dtable is None else _sums(layer, kind, table)
        for chunk in _chunks(kind, layer, qkv):
            qkv_there, given, made = _gather(flat, chunk), _gather(upstream, chunk), _rows(3, heads, width, chunk)
            for part in _parts(chunk, heads):
                (q, k, v), (do,) = qkv_there[:, part], given[:, part]
                dq, dk, dv = _matrices(made, part)
                p = _weights(q, k, its_bias[part], chunk, weights)
                dv.copy_(p.mT @ do)
                ds = scores.of(p.shape)
                torch.bmm(do.flatten(0, 1), v.mT.flatten(0, 1), out=ds.flatten(0, 1))
                torch._softmax_backward_data(ds, p, -1, torch.float32, grad_input=ds)
                if sums is not None:
                    sums.add(part, ds.sum(dim=1))
                torch.mul(ds @ k, scale, out=dq)
                torch.mul(ds.mT @ q, scale, out=dk)
            _scatter(made, dqkv, chunk)
        if dtable is not None and sums is not None:
            dtable += sums.rows()
    return dqkv.view(qkv.shape), table.new_empty(0) if dtable is None else dtable.to(table.dtype)


def _kinds(flat: Tensor, bias: Tensor, layer: Layer) -> list[Kind]:
    """Windows region by region if no token of another region can have a weight that is not negligible.

    A score lies within |q| |k| d**-0.5 of its bias, and a row's largest is at least that of the token with itself.
    """
    if layer.apart is layer.whole or not len(flat):
        return layer.whole
    queries, keys = torch.linalg.vector_norm(flat[:, :2], dim=-1, dtype=torch.float32).amax(dim=0)
    itself = bias.diagonal(dim1=1, dim2=2).amin(dim=1)
    above = 2 * queries * keys * flat.shape[-1] ** -0.5 + bias.amax(dim=(1, 2)) - itself
    return layer.apart if bool((above + SEPARATED <= NEGLIGIBLE).all()) else layer.whole  # also for NaN


def _box(members: Tensor, window: Triple) -> tuple[slice, slice, slice]:
    """The frames, rows and columns of a window (N,) that the members are; a region is such a box."""
    t, h, w = (range(int(x.min()), int(x.max()) + 1) for x in torch.nonzero(members.view(window)).unbind(1))
    return slice(t.start, t.stop), slice(h.start, h.stop), slice(w.start, w.stop)


def _within(pairs: Tensor, layer: Layer, kind: Kind) -> Tensor:
    """(..., N, N) -> (..., n, n), of a kind's tokens."""
    if kind.box is None:
        return pairs
    count, before = kind.places.shape[1], pairs.shape[:-2]
    box = pairs.view(*before, *layer.window, *layer.window)[(..., *kind.box, *kind.box)]
    return box.reshape(*before, count, count)


def _sums(layer: Layer, kind: Kind, table: Tensor) -> Sums:
    """What adds up the gradient of the table over windows of a kind."""
    if layer.nominal is None:
        return ByPair(table.shape[1], _within(layer.rows, layer, kind), len(table))
    box = layer.window if kind.box is None else tuple(axis.stop - axis.start for axis in kind.box)
    return ByOffset(table.shape[1], box, layer.nominal)


def _bias(table: Tensor, layer: Layer) -> Tensor:
    """(nH, N, N) float32."""
    return table.T.float().contiguous().index_select(1, layer.rows.flatten()).view(-1, *layer.rows.shape)


def _chunks(kind: Kind, layer: Layer, qkv: Tensor) -> Iterator[Chunk]:
    """All windows of a kind of all samples, as many at a time as there is room for scores of one head."""
    if not len(qkv):
        return
    starts = torch.arange(len(qkv), device="cpu") * layer.tokens
    tokens = (starts[:, None, None] + kind.places).flatten(0, 1)  # (B * windows, n)
    count = tokens.shape[1]
    for some in tokens.split(min(_room(count**2), max(1, GATHERED // (count * prod(qkv.shape[4:]))))):
        yield Chunk(some.flatten(), len(some), kind.foreign)


def _room(scores: int) -> int:
    """How many times so many scores are made at a time: the same number for every thread, where there are enough."""
    threads = torch.get_num_threads()
    count = CHUNK * threads // scores
    return max(1, count // threads * threads or count)


def _parts(chunk: Chunk, heads: int) -> Iterator[slice]:
    """Which heads of a chunk are one batch of products: as many as there is room for."""
    tokens = len(chunk.tokens) // chunk.windows
    step = _room(chunk.windows * tokens**2)
    for first in range(0, heads, step):
        yield slice(first, first + step)


def _gather(flat: Tensor, chunk: Chunk) -> Tensor:
    """(tokens, parts, nH, d) -> (parts, nH, n, N, d) float32 of the chunk's tokens, each matrix in one piece: a product
    takes up to a third less time than with rows that lie apart.
    """
    found = flat.permute(1, 2, 0, 3).index_select(2, chunk.tokens).float()
    return found.view(*found.shape[:2], chunk.windows, -1, found.shape[3])


def _rows(parts: int, heads: int, width: int, chunk: Chunk) -> Tensor:
    """Room for results of a chunk's tokens, (n, N, parts, nH, d) float32: `_scatter` is quickest with whole rows."""
    return torch.empty(chunk.windows, len(chunk.tokens) // chunk.windows, parts, heads, width, device="cpu")


def _scatter(made: Tensor, flat: Tensor, chunk: Chunk) -> None:
    """(n, N, parts, nH, d) -> the chunk's tokens in (tokens, parts, nH, d)."""
    flat.index_copy_(0, chunk.tokens, made.flatten(0, 1).to(flat.dtype))


def _matrices(made: Tensor, heads: slice) -> tuple[Tensor, ...]:
    """(n, N, parts, nH, d) -> the parts of some heads, each (heads, n, N, d): views."""
    return made[:, :, :, heads].permute(2, 3, 0, 1, 4).unbind()


class _Scratch:
    """Memory that is used again and again, so that it stays in the caches."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, device="cpu")

    def of(self, shape: Sequence[int]) -> Tensor:
        """Any numbers, float32; what was asked for before is lost."""
        if self._memory.numel() < prod(shape):
            self._memory = torch.empty(prod(shape), device="cpu")
        return self._memory[: prod(shape)].view(shape)


def _weights(q: Tensor, k: Tensor, bias: Tensor, chunk: Chunk, scratch: _Scratch) -> Tensor:
    """softmax(q kT d**-0.5 + bias): (heads, n, N, N), in `scratch`."""
    scores = scratch.of((*q.shape[:2], *bias.shape[1:])).copy_(bias[:, None])
    if chunk.foreign is not None:
        scores += chunk.foreign
    scores.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.mT.flatten(0, 1), alpha=q.shape[-1] ** -0.5)
    if chunk.foreign is not None:
        scores -= scores.amax(dim=-1, keepdim=True)
        torch.threshold_(scores, NEGLIGIBLE, -torch.inf)  # leaves NaN alone
    return torch.softmax(scores, dim=-1, out=scores)
