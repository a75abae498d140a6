"""The kernels wing: functions on tensors, each with its plain PyTorch reference."""

from .masked_cross_entropy import masked_cross_entropy
from .masked_embedding import masked_embedding
from .window_attention import window_attention

__all__ = ["masked_cross_entropy", "masked_embedding", "window_attention"]
