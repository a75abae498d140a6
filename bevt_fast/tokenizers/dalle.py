"""DALL-E's dVAE encoder, the tokenizer of BEVT: 8 x 8 pixels to one of 8192 ids (SPEC 3.1; Ramesh et al. 2021).

The weights are OpenAI's encoder.pkl. It is a pickled module, read here without running any of it; `prepare.py convert`
turns it into safetensors once, which loads faster and can carry nothing but tensors.
"""

import itertools
from pathlib import Path
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from bevt_fast.config import Positive, Section
from bevt_fast.errors import DataError
from bevt_fast.tokenizers import _frames, _restricted_pickle, _weights_file
from bevt_fast.tokenizers._dalle_body import LAST, Body, Precision
from bevt_kernels import codebook_argmax, products_cpu

PUBLISHED = "https://cdn.openai.com/dall-e/encoder.pkl"
FORMAT = "dall_e.encoder"
GPU_CHUNK = 64  # frames that exist as activations together
SCORED = 4  # frames scored at a time where all their scores exist at once, 6.4 MB a 112-pixel frame


class Options(Section):
    weights: str
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None  # refuse a file of another digest
    vocab_size: Positive = 8192
    precision: Precision = "official"
    compile: bool = False


class Dalle(nn.Module):
    """The encoder and its argmax. Weights have the official names (`blocks.group_1.block_1.res_path.conv_1.w`).

    Args:
        hidden: width n of the first group; the others have 2n, 4n and 8n.
        precision: dtype of all convolutions but the last, which is always float32. "official": float16 on a GPU,
            float32 elsewhere (SPEC 3.1). "fp32", "bf16": on any device; bf16 gives some cells another id.
        compile: torch.compile runs the convolutions. It compiles for 8, 16, 32 and 64 frames on a GPU, for 1, 2 and 4
            on a CPU, when they are first met; other numbers are filled up.
    """

    cell = 8

    def __init__(
        self, hidden: int = 256, vocab_size: int = 8192, precision: Precision = "official", compile: bool = False
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.blocks = Body(hidden, vocab_size, precision, compile)
        self.eval().requires_grad_(False)

    @property
    def precision(self) -> Precision:
        return self.blocks.precision

    @torch.no_grad()
    def logits(self, token_pixels: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N V h w"]:
        """Score of every id for every cell, float32. Raises ValueError for pixels not float32 or not in whole cells."""
        with torch.autocast(token_pixels.device.type, enabled=False):
            return self.blocks.last(self._features(token_pixels).float())

    @torch.no_grad()
    def forward(
        self, token_pixels: Float[Tensor, "*B 3 H W"], hidden: Bool[Tensor, "*B h w"] | None = None
    ) -> Int64[Tensor, "*B h w"]:
        """Pixels in [0.1, 0.9] to ids, any leading dimensions; of equal scores the first id wins. With `hidden` only
        those cells, and 0 elsewhere.
        """
        chunk = GPU_CHUNK if token_pixels.is_cuda else LAST
        return _frames.name_cells(self._name, token_pixels, hidden, self.cell, chunk)

    def _name(self, token_pixels: Tensor, hidden: Tensor | None) -> Tensor:
        with torch.autocast(token_pixels.device.type, enabled=False):
            cells = self._features(token_pixels).movedim(1, -1)  # (n, h, w, K)
            w, b = self.blocks.last.w.flatten(1), self.blocks.last.b
            part = GPU_CHUNK if cells.is_cuda or products_cpu.quicker() else SCORED
            masks = itertools.repeat(None) if hidden is None else hidden.split(part)
            return torch.cat([codebook_argmax(x.float(), w, b, mask) for x, mask in zip(cells.split(part), masks)])

    def _features(self, token_pixels: Tensor) -> Tensor:
        """What the last convolution reads, (N, K, h, w) in channels_last. The precision is part of the tokenizer's
        definition: callers switch a surrounding autocast off.
        """
        if token_pixels.dtype != torch.float32:
            raise ValueError(f"the tokenizer reads float32 pixels in [0.1, 0.9] (SPEC 3.2), got {token_pixels.dtype}")
        channels, height, width = token_pixels.shape[-3:]
        if channels != 3 or height % self.cell or width % self.cell:
            raise ValueError(
                f"the tokenizer reads 3 channels, sides in multiples of {self.cell}; got {channels}x{height}x{width}"
            )
        return self.blocks.features(token_pixels)

    def save(self, path: str | Path) -> None:
        """Write safetensors, whole or not at all. Raises DataError where that cannot be done."""
        _weights_file.write(path, self.state_dict(), {"format": FORMAT, "vocab_size": str(self.vocab_size)})


def load(path: str | Path, vocab_size: int | None = None) -> Dalle:
    """The encoder in a file: safetensors, or OpenAI's pickled module in either format of torch.save (never run).

    Width and codebook are read from the shapes. Raises DataError for a missing, damaged, malicious or other file.
    """
    return from_tensors(read(path), str(path), vocab_size)


def from_tensors(tensors: dict[str, Tensor], where: str, vocab_size: int | None = None) -> Dalle:
    """The encoder of these weights. `where` names them in errors. Raises DataError if they are not an encoder's."""
    first, last = tensors.get("blocks.input.w"), tensors.get("blocks.output.conv.w")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise DataError(
            f"{where} does not hold DALL-E's encoder (no blocks.input.w, blocks.output.conv.w; it has {some}, ...); "
            f"get it from {PUBLISHED}"
        )
    if vocab_size is not None and len(last) != vocab_size:
        raise DataError(
            f"{where} has a vocabulary of {len(last)} ids where {vocab_size} are expected; "
            "set tokenizer.options.vocab_size to its size, or use another file"
        )
    with torch.device("meta"):
        tokenizer = Dalle(hidden=len(first), vocab_size=len(last))
    expected = {name: tuple(weight.shape) for name, weight in tokenizer.state_dict().items()}
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != expected.get(name):
            raise DataError(
                f"{where} is not a DALL-E encoder of width {len(first)}: {name} is {found or 'missing'} where "
                f"{expected.get(name, 'no such weight')} is expected; get it from {PUBLISHED}"
            )
        if not tensors[name].isfinite().all():
            raise DataError(f"{where}: {name} holds values that are not finite; get the file again from {PUBLISHED}")
    tokenizer.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return tokenizer.eval().requires_grad_(False)


def read(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weights file; its first bytes tell its kind. Raises DataError, also for another digest."""
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"there is no tokenizer file {path}; download {PUBLISHED}, and `python bevt_fast/prepare.py convert "
            "encoder.pkl encoder.safetensors` turns it into plain tensors"
        )
    if sha256 is not None and (found := _weights_file.digest(path)) != sha256.lower():
        raise DataError(
            f"{path} has the SHA-256 digest {found} where {sha256} is expected: refused; "
            "get the file again, or correct tokenizer.options.sha256"
        )
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise DataError(f"{path} is empty (0 bytes); download it again from {PUBLISHED}")
    if start.lstrip()[:1] == b"<" or start.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path} is a text page, not weights: the download did not fetch the file itself; get it from {PUBLISHED}"
        )
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return _restricted_pickle.read(path)
    try:
        return load_safetensors(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is neither a whole safetensors file nor one that torch.save wrote ({error}); "
            f"download it again from {PUBLISHED}"
        ) from None


def build(options: Options) -> Dalle:
    """The encoder a configuration names."""
    tokenizer = from_tensors(read(options.weights, options.sha256), options.weights, options.vocab_size)
    tokenizer.blocks.precision, tokenizer.blocks.compiles = options.precision, options.compile
    return tokenizer
