"""What reads a frozen encoder: one linear layer, an attentive pooling before it, or the nearest training clips.

Their input is F4 after the final norm, (B, t, h, w, K), as `VideoSwin` gives it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwin


class Probe(nn.Module):
    """The part of a Classifier behind its encoder, under the same names."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.pool, self.dropout, self.class_head = classifier.pool, classifier.dropout, classifier.class_head

    def forward(self, features: Float[Tensor, "B t h w K"]) -> Float[Tensor, "B classes"]:
        """F4 to logits."""
        pooled = features.mean(dim=(1, 2, 3)) if self.pool is None else self.pool(features)
        return self.class_head(self.dropout(pooled))


class NearestNeighbours(nn.Module):
    """Logits whose softmax is the vote of the `neighbours` nearest training clips, weighted by exp(cosine /
    temperature) (Wu et al. 2018). It has no parameter that learns; the features and labels of the clips are saved with
    the encoder.
    """

    bank: Tensor
    labels: Tensor

    def __init__(
        self,
        encoder: VideoSwin,
        bank: Float[Tensor, "n K"],
        labels: Int64[Tensor, " n"],
        classes: int,
        neighbours: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self.encoder, self.classes, self.temperature = encoder, classes, temperature
        self.neighbours = min(neighbours, len(bank))
        self.register_buffer("bank", F.normalize(bank.float(), dim=1))
        self.register_buffer("labels", labels)

    def forward(self, pixels: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B classes"]:
        """Clips to log-votes."""
        features = F.normalize(self.encoder(pixels).float().mean(dim=(1, 2, 3)), dim=1)
        nearness, places = (features @ self.bank.T.float()).topk(self.neighbours, dim=1)
        weights = (nearness / self.temperature).softmax(dim=1)
        votes = torch.zeros(features.shape[0], self.classes, device=features.device)
        votes.scatter_add_(1, self.labels[places], weights)
        return votes.clamp_min(1e-12).log()
