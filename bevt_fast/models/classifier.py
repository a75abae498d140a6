"""Classifier: the encoder, its mean over the last grid, and one linear layer: fine-tuning (SPEC 1.7)."""

from jaxtyping import Float
from torch import Tensor, nn

from bevt_fast.models.video_swin import BiasIndex, Initialisation, VideoSwin, VideoSwinConfig


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
    ) -> None:
        super().__init__()
        self.encoder = VideoSwin(config, bias_index, initialisation, activation_checkpointing)
        self.dropout = nn.Dropout(dropout)
        self.class_head = nn.Linear(config.widths[-1], classes)
        nn.init.normal_(self.class_head.weight, std=0.01)
        nn.init.zeros_(self.class_head.bias)

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B classes"]:
        """Clips to logits."""
        return self.class_head(self.dropout(self.encoder(pixels).mean(dim=(1, 2, 3))))
