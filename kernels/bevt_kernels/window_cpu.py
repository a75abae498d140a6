"""Window attention on a CPU: a few windows at a time, so that their scores stay in its caches.

The reference writes (B*nW, nH, N, N) scores several times and keeps them for the backward pass. Here a chunk of windows
is gathered, its scores are made, used and forgotten, and the backward pass makes them again; only qkv and the table are
kept. Chunks follow each other in a fixed order, so two runs with as many threads give equal bits. It computes in
float32, whatever the inputs are. Pairs of different regions are not computed where lengths of queries and keys show
that none can count.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .window_geometry import SEPARATED, BiasIndex, Triple, bias_rows, kinds, roll, used_window, windows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHUNK = 1 << 19  # scores a thread: 2 MiB
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
    return Layer(prod(grid), used, whole, apart, rows)


def forward(qkv: Tensor, table: Tensor, layer: Layer) -> Tensor:
    """(B, t, h, w, 3, nH, d) -> (B, t, h, w, nH, d)."""
    heads, width = qkv.shape[5:]
    flat, bias = qkv.reshape(-1, 3, heads, width), _bias(table, layer)
    out = qkv.new_empty(len(flat), 1, heads, width)
    for kind in _kinds(flat, bias, layer):
        its_bias = _within(bias, layer, kind)
        for chunk in _chunks(kind, layer, len(qkv)):
            made = _gather(flat, chunk)
            for part in _parts(chunk, heads):
                q, k, v = _matrices(made, part)
                # the queries are not read again, so the result may stand in their place
                q.copy_(_weights(q, k, its_bias[part], chunk) @ v)
            _scatter(made[:, :, :1], out, chunk)
    return out.view(*qkv.shape[:4], heads, width)


def backward(grad: Tensor, qkv: Tensor, table: Tensor, layer: Layer, table_too: bool) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the table (empty where it is not wanted)."""
    heads, width = qkv.shape[5:]
    flat, bias = qkv.reshape(-1, 3, heads, width), _bias(table, layer)
    upstream, dqkv, scale = grad.reshape(-1, 1, heads, width), torch.empty_like(flat), width**-0.5
    dbias = torch.zeros_like(bias) if table_too else None
    for kind in _kinds(flat, bias, layer):
        its_bias = _within(bias, layer, kind)
        its_dbias = dbias if dbias is None or kind.box is None else torch.zeros_like(its_bias)
        for chunk in _chunks(kind, layer, len(qkv)):
            made, given = _gather(flat, chunk), _gather(upstream, chunk)
            for part in _parts(chunk, heads):
                (q, k, v), (do,) = _matrices(made, part), _matrices(given, part)
                p = _weights(q, k, its_bias[part], chunk)
                ds = torch._softmax_backward_data(do @ v.mT, p, -1, torch.float32)
                if its_dbias is not None:
                    its_dbias[part] += ds.sum(dim=1)
                # each gradient stands where its operand stood, once that is not read again
                v.copy_(p.mT @ do)
                dq = ds @ k
                torch.mul(ds.mT @ q, scale, out=k)
                torch.mul(dq, scale, out=q)
            _scatter(made, dqkv, chunk)
        if dbias is not None and its_dbias is not None and its_dbias is not dbias:
            place = _boxes(dbias, layer, kind)
            place += its_dbias.view(place.shape)
    return dqkv.view(qkv.shape), table.new_empty(0) if dbias is None else _table_gradient(dbias, table, layer)


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


def _boxes(x: Tensor, layer: Layer, kind: Kind) -> Tensor:
    """(nH, N, N) -> (nH, t, h, w, t, h, w) of the tokens in a kind's box: a view."""
    assert kind.box is not None
    return x.view(-1, *layer.window, *layer.window)[(slice(None), *kind.box, *kind.box)]


def _within(bias: Tensor, layer: Layer, kind: Kind) -> Tensor:
    """(nH, N, N) -> (nH, n, n), of a kind's tokens."""
    count = kind.places.shape[1]
    return bias if kind.box is None else _boxes(bias, layer, kind).reshape(-1, count, count)


def _bias(table: Tensor, layer: Layer) -> Tensor:
    """(nH, N, N) float32."""
    return table.T.float().contiguous().index_select(1, layer.rows.flatten()).view(-1, *layer.rows.shape)


def _table_gradient(dbias: Tensor, table: Tensor, layer: Layer) -> Tensor:
    """(nH, N, N) -> that of the table: every row of it sums the pairs that read it, in their order."""
    rows = layer.rows.flatten()
    sums = [torch.zeros(len(table), device="cpu").index_add_(0, rows, head.flatten()) for head in dbias]
    return torch.stack(sums, dim=1).to(table.dtype)


def _chunks(kind: Kind, layer: Layer, batch: int) -> Iterator[Chunk]:
    """All windows of a kind of all samples, as many at a time as there is room for scores of one head."""
    if not batch:
        return
    starts = torch.arange(batch, device="cpu") * layer.tokens
    tokens = (starts[:, None, None] + kind.places).flatten(0, 1)  # (B * windows, n)
    for some in tokens.split(_room(tokens.shape[1] ** 2)):
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
    """(tokens, parts, nH, d) -> (n, N, parts, nH, d) float32 of the chunk's tokens."""
    return flat.index_select(0, chunk.tokens).float().view(chunk.windows, -1, *flat.shape[1:])


def _scatter(made: Tensor, flat: Tensor, chunk: Chunk) -> None:
    """The reverse of `_gather`, into `flat`."""
    flat.index_copy_(0, chunk.tokens, made.flatten(0, 1).to(flat.dtype))


def _matrices(made: Tensor, heads: slice) -> tuple[Tensor, ...]:
    """(n, N, parts, nH, d) -> the parts of some heads, each (heads, n, N, d): views."""
    return made[:, :, :, heads].permute(2, 3, 0, 1, 4).unbind()


def _weights(q: Tensor, k: Tensor, bias: Tensor, chunk: Chunk) -> Tensor:
    """softmax(q kT d**-0.5 + bias): (heads, n, N, N)."""
    scores = torch.empty(*q.shape[:2], *bias.shape[1:], device="cpu").copy_(bias[:, None])
    if chunk.foreign is not None:
        scores += chunk.foreign
    scores.flatten(0, 1).baddbmm_(q.flatten(0, 1), k.mT.flatten(0, 1), alpha=q.shape[-1] ** -0.5)
    if chunk.foreign is not None:
        scores -= scores.amax(dim=-1, keepdim=True)
        torch.threshold_(scores, NEGLIGIBLE, -torch.inf)  # leaves NaN alone
    return torch.softmax(scores, dim=-1)
