"""k-means over 8 x 8 pixel cells: a tokenizer fitted in about a second, whose centroids draw what an id looks like.

A cell's nearest centroid is the largest of 2 x.c - |c|^2, so one linear layer on cells and an argmax find it. Pixels
come from 8-bit pictures and centroids are whole grey levels, both shifted by 128: every product and sum is a whole
number below 2^24, which float32 holds exactly. Hence the same ids, and the same fit, for any device, thread count or
batch.
"""

import random
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from bevt_fast.config import Positive, Section
from bevt_fast.errors import DataError
from bevt_fast.tokenizers import _frames, _weights_file
from bevt_kernels import codebook_argmax

CELL = 8
FORMAT = "bevt_fast.patch_kmeans/1"
MAKE = "`python bevt_fast/prepare.py tokenizer --data VIDEOS_OR_IMAGES --out FILE`"


class Options(Section):
    weights: str
    vocab_size: Positive | None = None  # refuse a file of another size; the size to fit
    fit_if_missing: bool = False  # the training program fits the tokenizer to its own data when there is no file


class PatchKMeans(nn.Module):
    """The codebook and its use. centroids: grey levels 0 ... 255."""

    cell = CELL
    centroids: Tensor

    def __init__(self, centroids: UInt8[Tensor, "V 3 8 8"], source: str = ""):
        super().__init__()
        self.vocab_size = len(centroids)
        self.source = source  # what it was fitted to, in words
        self.register_buffer("centroids", centroids)
        self.eval()

    @torch.no_grad()
    def logits(self, token_pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N V h w"]:
        """2 x.c - |c|^2 in squared grey levels. Raises ValueError for pixels not float32 or not in whole cells."""
        with torch.autocast(token_pixels.device.type, enabled=False):
            return functional.linear(_cells(token_pixels), *self._codebook()).movedim(-1, 1)

    @torch.no_grad()
    def forward(
        self, token_pixels: Float[Tensor, "*B 3 H W"], hidden: Bool[Tensor, "*B h w"] | None = None
    ) -> Int64[Tensor, "*B h w"]:
        """Pixels in [0.1, 0.9] to ids, any leading dimensions; of equally near centroids the first wins. With `hidden`
        only those cells, and 0 elsewhere.
        """
        return _frames.name_cells(self._name, token_pixels, hidden, CELL, 64)

    def _name(self, token_pixels: Tensor, hidden: Tensor | None) -> Tensor:
        with torch.autocast(token_pixels.device.type, enabled=False):
            return codebook_argmax(_cells(token_pixels), *self._codebook(), hidden)

    def _codebook(self) -> tuple[Tensor, Tensor]:
        """Weight (V, 192) and bias (V,) of the linear layer."""
        centroids = self.centroids.flatten(1).float() - 128
        return 2 * centroids, -centroids.square().sum(1)

    @torch.no_grad()
    def decode(self, ids: Int64[Tensor, "*B h w"]) -> Float[Tensor, "*B 3 H W"]:
        """The picture these ids stand for, in [0.1, 0.9]: each cell is its centroid."""
        *leading, rows, columns = ids.shape
        cells = _pixels(self.centroids)[ids].movedim(-3, -5)  # (*B, 3, h, w, 8, 8)
        return cells.transpose(-3, -2).reshape(*leading, 3, rows * CELL, columns * CELL)

    def save(self, path: str | Path) -> None:
        """Write safetensors, whole or not at all. Raises DataError where that cannot be done."""
        metadata = {"format": FORMAT, "cell": str(CELL), "vocab_size": str(self.vocab_size), "source": self.source}
        _weights_file.write(path, {"centroids": self.centroids}, metadata)


def fit(
    pixels: Float[Tensor, "n 3 H W"],
    vocab_size: int = 128,
    seed: int = 0,
    iterations: int = 10,
    cells: int = 20_000,
    source: str = "",
) -> PatchKMeans:
    """Lloyd's k-means on at most `cells` random cells of token pixels in [0.1, 0.9].

    The same pixels and seed give the same bits on any machine. Raises DataError for fewer distinct cells than ids.
    """
    rng = random.Random(seed)
    views = _levels(pixels.cpu().float())
    n, _, height, width = views.shape
    if height % CELL or width % CELL:
        raise ValueError(f"views of {height} x {width} pixels are not made of {CELL}-pixel cells")
    total = n * (height // CELL) * (width // CELL)
    rows = _unfold(views).reshape(total, -1)
    if total > cells:
        rows = rows[sorted(rng.sample(range(total), cells))]
    start = _start(rows, vocab_size, rng)
    if len(start) < vocab_size:
        raise DataError(
            f"{len(rows)} cells of {n} pictures show only {len(start)} different things, too few for {vocab_size} ids; "
            "give more or more varied pictures, or ask for fewer ids"
        )
    centroids = rows[start]
    nearest = torch.full((len(rows),), -1)
    for _ in range(iterations):
        before, (nearest, distance) = nearest, _assign(rows, centroids)
        if torch.equal(before, nearest):
            break
        centroids = _update(rows, nearest, distance, vocab_size)
    return PatchKMeans((centroids + 128).to(torch.uint8).reshape(vocab_size, 3, CELL, CELL), source)


def load(path: str | Path, vocab_size: int | None = None) -> PatchKMeans:
    """The tokenizer in a file that `save` wrote. Raises DataError for a missing, damaged or other file."""
    if not Path(path).is_file():
        raise DataError(f"there is no tokenizer file {path}; {MAKE} makes one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            centroids = file.get_tensor("centroids") if "centroids" in file.keys() else None
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path} is not a whole safetensors file ({error}); {MAKE} makes one") from None
    if metadata.get("format") != FORMAT or centroids is None or centroids.dtype != torch.uint8:
        raise DataError(f"{path} does not hold a patch_kmeans tokenizer of this version; {MAKE} makes one")
    if centroids.shape[1:] != (3, CELL, CELL) or not len(centroids):
        raise DataError(
            f"{path} has centroids of {tuple(centroids.shape)}, not (ids, 3, {CELL}, {CELL}); {MAKE} makes one"
        )
    if vocab_size is not None and len(centroids) != vocab_size:
        raise DataError(
            f"{path} has a vocabulary of {len(centroids)} ids where {vocab_size} are expected; "
            f"set tokenizer.options.vocab_size to its size, or make another with {MAKE}"
        )
    return PatchKMeans(centroids, metadata.get("source", ""))


def build(options: Options) -> PatchKMeans:
    """The tokenizer a configuration names; the file must be there, whatever `fit_if_missing` says."""
    return load(options.weights, options.vocab_size)


def _levels(pixels: Tensor) -> Tensor:
    """Token pixels back to grey levels less 128, whole numbers in [-128, 127] (the inverse of SPEC 3.2's map)."""
    return ((pixels - 0.1) * (255 / 0.8)).round_().clamp_(0, 255) - 128


def _cells(token_pixels: Tensor) -> Tensor:
    """(N, 3, H, W) token pixels -> (N, h, w, 192) whole numbers. Raises ValueError for what it cannot read."""
    if token_pixels.dtype != torch.float32:
        raise ValueError(f"the tokenizer reads float32 pixels in [0.1, 0.9] (SPEC 3.2), got {token_pixels.dtype}")
    channels, height, width = token_pixels.shape[-3:]
    if channels != 3 or height % CELL or width % CELL:
        raise ValueError(
            f"the tokenizer reads 3 channels, sides in multiples of {CELL}; got {channels}x{height}x{width}"
        )
    return _unfold(_levels(token_pixels))


def _unfold(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, h, w, 192): every cell a row, in the order of a centroid's pixels."""
    n, _, height, width = pictures.shape
    blocks = pictures.reshape(n, 3, height // CELL, CELL, width // CELL, CELL)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)


def _pixels(levels: Tensor) -> Tensor:
    """Grey levels to token pixels (SPEC 3.2)."""
    return 0.8 * (levels.float() / 255) + 0.1


def _start(rows: Tensor, count: int, rng: random.Random) -> list[int]:
    """Random different cells as first centroids; fewer than `count` when there are not so many.

    Not k-means++: it begins at the rarest cells, which costs a quarter of the perplexity and gains no nearness.
    """
    chosen: dict[bytes, int] = {}
    for i in rng.sample(range(len(rows)), len(rows)):
        chosen.setdefault(rows[i].numpy().tobytes(), i)
        if len(chosen) == count:
            break
    return list(chosen.values())


def _assign(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid of each cell, the first of equals, and the squared distance to it."""
    score, nearest = (2 * (rows @ centroids.T) - centroids.square().sum(1)).max(1)
    return nearest, rows.square().sum(1) - score


def _update(rows: Tensor, nearest: Tensor, distance: Tensor, count: int) -> Tensor:
    """Means, rounded half up to whole levels; an id that nothing is nearest to moves to the cell worst off."""
    members = nearest.bincount(minlength=count)
    sums = torch.zeros(count, rows.shape[1], dtype=torch.int64).index_add_(0, nearest, rows.long())
    size = members.clamp(min=1)[:, None]
    centroids = torch.div(2 * sums + size, 2 * size, rounding_mode="floor").float()
    empty = (members == 0).nonzero().flatten()
    worst = distance.sort(descending=True, stable=True).indices[: len(empty)]
    centroids[empty] = rows[worst]
    return centroids
