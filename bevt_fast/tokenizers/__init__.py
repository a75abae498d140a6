"""Open room: one frozen image tokenizer per file. A tokenizer never trains here, never sits in a checkpoint, and
returns integers.
"""

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bevt_fast.config import Part, open_part


class Tokenizer(Protocol):
    """Names every `cell` x `cell` pixels of a picture with an id in [0, vocab_size)."""

    vocab_size: int
    cell: int

    def __call__(
        self, token_pixels: Float[Tensor, "*B 3 H W"], hidden: Bool[Tensor, "*B h w"] | None = None
    ) -> Int64[Tensor, "*B h w"]:
        """Pixels in [0.1, 0.9] (SPEC 3.2) to ids; h = H / cell. With `hidden` only cells where it is True are named,
        the others are 0, and a frame that hides nothing costs nothing.
        """
        ...

    def to(self, device: torch.device) -> "Tokenizer":
        """Itself, on another device."""
        ...


def build(part: Part) -> Tokenizer:
    """The tokenizer a configuration names, in evaluation mode. Raises DataError for missing or foreign weights.

    A tokenizer that can draw has `decode(ids (*B, h, w)) -> pixels (*B, 3, H, W)` in [0.1, 0.9] as well.
    """
    module, options = open_part(__name__, part)
    return module.build(options)
