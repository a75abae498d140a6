"""Classifier: the encoder, its mean over the last grid, and one linear layer: fine-tuning (SPEC 1.7)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bevt_fast.finetune_config import FinetuneConfig
from bevt_fast.models.video_swin import BiasIndex, Initialisation, VideoSwin, VideoSwinConfig


class AttentivePool(nn.Module):
    """One learnt query that attends to every token, instead of their mean: the attentive probe (Bardes et al. 2024)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, features: Float[Tensor, "B t h w K"]) -> Float[Tensor, "B K"]:
        """F4 to one vector a clip."""
        tokens = self.norm(features.flatten(1, 3))
        query = self.query.expand(tokens.shape[0], -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]


class Classifier(nn.Module):
    """F4 after the final norm, averaged over time and space, dropped out, and scored."""

    def __init__(
        self,
        config: VideoSwinConfig,
        classes: int,
        dropout: float = 0.5,
        bias_index: BiasIndex = "true",
        initialisation: Initialisation = "normal",
        activation_checkpointing: bool = False,
        pool_heads: int = 0,
    ) -> None:
        """`pool_heads`: of an attentive pooling; 0: the mean."""
        super().__init__()
        self.encoder = VideoSwin(config, bias_index, initialisation, activation_checkpointing)
        self.pool = AttentivePool(config.widths[-1], pool_heads) if pool_heads else None
        self.dropout = nn.Dropout(dropout)
        self.class_head = nn.Linear(config.widths[-1], classes)
        nn.init.normal_(self.class_head.weight, std=0.01)
        nn.init.zeros_(self.class_head.bias)

    @classmethod
    def of(cls, config: FinetuneConfig) -> "Classifier":
        """The classifier that a fine-tuning configuration describes, with random weights."""
        section = config.model
        return cls(
            VideoSwinConfig.of(section),
            section.classes,
            section.dropout,
            section.bias_index,
            section.initialisation,
            section.activation_checkpointing,
            config.train.probe_heads if config.train.mode == "attentive" else 0,
        )

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B classes"]:
        """Clips to logits."""
        features = self.encoder(pixels)
        pooled = features.mean(dim=(1, 2, 3)) if self.pool is None else self.pool(features)
        return self.class_head(self.dropout(pooled))
