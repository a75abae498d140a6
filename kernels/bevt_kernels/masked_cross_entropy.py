"""Cross-entropy and accuracy of a linear head on hidden positions only (SPEC 4, X22).

Legend: K feature width, V codebook size, M hidden positions.

The head works row by row, so gathering the hidden rows before it changes no answer and the full (..., V) logits never
exist. The head is called as a module, so whatever watches its forward (ZeRO-3 gathering its weight) sees the call.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def reference(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `masked_cross_entropy`, in plain torch."""
    logits = head(features[mask])  # (M, V)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    ids = targets[mask]
    # a sum over no rows is 0 and keeps its graph, where a mean would be 0/0
    count = max(len(ids), 1)
    loss = F.cross_entropy(logits, ids, reduction="sum") / count
    accuracy = (logits.detach().argmax(dim=-1) == ids).sum() / count
    return loss.float(), accuracy.float()


def masked_cross_entropy(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and top-1 accuracy over the hidden positions.

    Args:
        features: (..., K).
        head: maps (M, K) to (M, V) logits; a linear layer.
        targets: (...) int64, ids in [0, V).
        mask: (...) bool, True = hidden, and therefore scored.
    Returns:
        Two float32 scalars. Both are 0, with a graph behind the loss, when nothing is hidden.
    Raises:
        ValueError: mask or targets of another shape than the positions of features.
    """
    positions = features.shape[:-1]
    if mask.shape != positions or targets.shape != positions:
        raise ValueError(
            f"masked_cross_entropy: features have positions {tuple(positions)}, but the mask is {tuple(mask.shape)} "
            f"and the targets are {tuple(targets.shape)}"
        )
    return reference(features, head, targets, mask)
