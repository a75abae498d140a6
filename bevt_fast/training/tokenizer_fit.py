"""Fits a tokenizer to the run's own pictures where the configuration allows it and there is no file yet.

The pictures go through the same functions as those of training, so the tokenizer is fitted to what it will read.
"""

import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from bevt_fast.config import Config, Part, View, open_part
from bevt_fast.data.decode import BadFile, probe, read_frames, read_image
from bevt_fast.data.pipeline_reference import clip_views, image_views, map_pixels
from bevt_fast.data.sampling import clip_frames, draw_crop, jitter_order, place, random_for
from bevt_fast.data.sources import Source
from bevt_fast.errors import ConfigError, DataError

VIEWS = 1024  # DEMO: the views of 1,000 pictures are enough for a codebook of hundreds
FRAMES = 4  # of a clip: neighbours in time are nearly one picture, and a video is dear to open
PATIENCE = 100  # bad files in a row

log = logging.getLogger("bevt_fast")


class Usage(NamedTuple):
    """How a codebook is used: ids that occur, exp(entropy) of their shares, share of the commonest."""

    used: int
    perplexity: float
    commonest: float


def fit_if_missing(config: Config, sources: Mapping[str, Source]) -> bool:
    """Fit and write the configured tokenizer, if it may be and is not there. Returns whether it did.

    sources: the training sources, by stream. One process calls this; the others wait for the file.
    """
    _, options = open_part("bevt_fast.tokenizers", config.tokenizer)
    if not getattr(options, "fit_if_missing", False) or Path(options.weights).exists():
        return False
    streams = {name: (source, config.streams[name].view) for name, source in sources.items()}
    log.info("fitting the tokenizer %s to %s", config.tokenizer.name, " and ".join(streams))
    what = ", ".join(source.name for source, _ in streams.values())
    fit_tokenizer(sample_views(streams, config.seed, VIEWS), config.tokenizer, config.seed, what)
    log.info("wrote the tokenizer to %s", options.weights)
    return True


def fit_tokenizer(views: Iterable[Float[Tensor, "n 3 H W"]], part: Part, seed: int = 0, source: str = "") -> None:
    """Fit the tokenizer `part` names to token pixels in [0.1, 0.9] and write its weights, whole or not at all.

    source: where the views come from, kept with the weights. Views may differ in size. Raises ConfigError for a
    tokenizer that is not fitted, DataError for views that are too few or too alike.
    """
    module, options = open_part("bevt_fast.tokenizers", part)
    if not hasattr(module, "fit"):
        raise ConfigError(
            f"the tokenizer {part.name!r} is not one that is fitted; name the file of its weights instead"
        )
    # a cell is a picture of one cell, which makes views of any size alike
    cells = [_cells(view, module.CELL) for view in views]
    if not cells:
        raise DataError(f"there are no pictures to fit the tokenizer {part.name!r} to; check the data paths")
    size = {} if options.vocab_size is None else {"vocab_size": options.vocab_size}
    module.fit(torch.cat(cells), seed=seed, source=source, **size).save(options.weights)


def sample_views(
    streams: Mapping[str, tuple[Source, View]], seed: int, count: int = VIEWS
) -> Iterator[Float[Tensor, "n 3 H W"]]:
    """About `count` token views in all, as many from each stream, drawn as in training. Bad files are passed over.

    Yields the views of one file at a time: up to FRAMES frames of a clip, or one image. Raises DataError where no file
    of a stream can be read.
    """
    for name, (source, view) in streams.items():
        missing, position, bad = count // len(streams), 0, 0
        while missing > 0:
            index = place(seed, f"tokenizer {name}", position, len(source)).index
            rng = random_for(seed, "tokenizer", name, position)
            position += 1
            try:
                views = (_image if source.frames is None else _frames)(source, index, view, rng, seed)[:missing]
            except BadFile as error:
                bad += 1
                if bad >= min(len(source), PATIENCE):
                    raise DataError(
                        f"none of {bad} files of {source.name} can be read, so no tokenizer can be fitted to them; "
                        f"the last is {error}"
                    ) from None
                continue
            bad, missing = 0, missing - len(views)
            yield map_pixels(torch.from_numpy(views))


def codebook_usage(ids: Int64[Tensor, "..."], vocab_size: int) -> Usage:
    """How evenly ids are used; perplexity equals `vocab_size` when all occur equally often."""
    share = ids.flatten().bincount(minlength=vocab_size).double() / ids.numel()
    entropy = -torch.special.xlogy(share, share).sum()
    return Usage(int((share > 0).sum()), float(entropy.exp()), float(share.max()))


def _frames(source: Source, index: int, view: View, rng: random.Random, _: int) -> np.ndarray:
    """Token views (n, s, s, 3) uint8 of a few frames of one training clip."""
    assert source.frames is not None
    path, extent = source.path(index), source.extent(index)
    found = probe(path, extent, source.min_frames)
    frames = clip_frames(found.frames, source.frames, rng)
    few = [frames[i] for i in np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).astype(int)]
    crop = draw_crop(found.height, found.width, view, rng)
    return clip_views(read_frames(path, few, extent), crop, view.size // 2)[1]


def _image(source: Source, index: int, view: View, rng: random.Random, seed: int) -> np.ndarray:
    """The token view (1, s, s, 3) uint8 of one training image."""
    image = read_image(source.path(index))
    crop = draw_crop(image.shape[0], image.shape[1], view, rng)
    return image_views(image, crop, view.size // 2, jitter_order(seed))[1][None]


def _cells(views: Tensor, side: int) -> Tensor:
    """(n, 3, H, W) to (n * h * w, 3, side, side)."""
    n, channels, height, width = views.shape
    cells = views.reshape(n, channels, height // side, side, width // side, side)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, side, side)
