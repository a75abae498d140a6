"""The nearest entry of a codebook: a linear layer and its argmax, without the logits (SPEC 3.1, 3.4).

Legend: K feature width, V codebook size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(features: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The specification of `codebook_argmax`, in plain torch."""
    hidden = torch.ones(features.shape[:-1], dtype=torch.bool, device=features.device) if mask is None else mask
    ids = torch.zeros(features.shape[:-1], dtype=torch.long, device=features.device)
    ids[hidden] = F.linear(features[hidden], weight, bias).argmax(dim=-1)
    return ids


def codebook_argmax(features: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """The id with the largest score at every hidden position; of equal scores the first.

    Args:
        features: (..., K), any strides with a contiguous last dimension.
        weight: (V, K). bias: (V,) or None.
        mask: (...) bool, True = hidden. None asks for every position.
    Returns:
        (...) int64; 0 where the mask is False. Not differentiable.
    """
    return reference(features, weight, bias, mask)
