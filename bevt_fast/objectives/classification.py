"""Classification with shares of classes as targets: what the engine wraps in fine-tuning and probing (SPEC 1.7)."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class ClassLoss(NamedTuple):
    """Scalars of one micro-batch."""

    total: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]


class ClassificationObjective(nn.Module):
    """Mean over the samples of -sum(target * log-softmax(logits)); `model` gives logits (B, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Float[Tensor, "B classes"]) -> ClassLoss:
        """Inputs of the model: clips, or what a frozen encoder made of them. The loss is of float32."""
        logits = self.model(inputs).float()
        loss = -(targets * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
        right = (logits.argmax(dim=-1) == targets.argmax(dim=-1)).float().mean()
        return ClassLoss(loss, right.detach())
