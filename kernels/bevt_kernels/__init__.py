"""Kernels for masked Video Swin: each a function on tensors that opens with its plain PyTorch reference."""

from .codebook_argmax import codebook_argmax
from .masked_cross_entropy import masked_cross_entropy
from .masked_embedding import masked_embedding
from .runtime import implementation
from .swap import swap
from .window_attention import window_attention

__all__ = [
    "codebook_argmax",
    "implementation",
    "masked_cross_entropy",
    "masked_embedding",
    "swap",
    "window_attention",
]
