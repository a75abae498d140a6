"""The four things that travel between data, tokenizer, model and objective.

Legend: B batch; T H W frames, pixel rows, pixel columns; t = T / 2 time steps of the encoder; g side of the mask and
target grid (16-pixel cells); V codebook size. In every mask `True` means hidden, and therefore predicted.

NamedTuples, because DeepSpeed ZeRO-3 looks for tensors inside tuples and does not open dataclasses.

Masks stay on the CPU: how much is hidden decides how much is computed, and to ask a GPU is to wait for everything it
was given before.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class Images(NamedTuple):
    """A batch of partly hidden images."""

    pixels: Float[Tensor, "B 3 H W"]  # normalised: what the encoder sees
    token_pixels: Float[Tensor, "B 3 half_H half_W"]  # in [0.1, 0.9]: what the tokenizer sees, 8 pixels a cell
    mask: Bool[Tensor, "B g g"]
    known: Int64[Tensor, "B g g"] | None = None  # of a token cache, on the CPU: see `unknown`


class Clips(NamedTuple):
    """A batch of partly hidden clips; the two frames of a tubelet hide together."""

    pixels: Float[Tensor, "B 3 T H W"]
    token_pixels: Float[Tensor, "B T 3 half_H half_W"]
    mask: Bool[Tensor, "B t g g"]
    known: Int64[Tensor, "B T g g"] | None = None


class JointBatch(NamedTuple):
    """One micro-batch of both streams; a stream the config leaves out is None."""

    images: Images | None
    clips: Clips | None


class Targets(NamedTuple):
    """What the tokenizer calls each cell: ids in [0, V)."""

    images: Int64[Tensor, "B g g"] | None
    clips: Int64[Tensor, "B T g g"] | None  # every frame is tokenized, so the clip decoder doubles time back to T
    ready: Any = None  # a torch.cuda.Event: until then the ids are being made on another stream


class Losses(NamedTuple):
    """Scalars of one micro-batch; a stream that is absent has loss and accuracy 0."""

    total: Float[Tensor, ""]
    image: Float[Tensor, ""]
    clip: Float[Tensor, ""]
    image_accuracy: Float[Tensor, ""]
    clip_accuracy: Float[Tensor, ""]


def unknown(known: Int64[Tensor, "B ..."]) -> Int64[Tensor, " n"]:
    """The samples of a batch whose ids a token cache does not have: -1 in every cell. Where there is a cache, token
    pixels are of these samples alone, in this order.
    """
    return (known.flatten(1)[:, 0] < 0).nonzero().flatten()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for what a GPU still has to do."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()  # from other memory the copy would wait its turn, and the host with it
    return tensor.to(device, non_blocking=True)
