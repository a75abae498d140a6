"""The stem's LayerNorm, then one learnt vector in place of every hidden token (SPEC 1.2, 1.3).

Legend: B samples, (t, h, w) token grid of width C, (t, gh, gw) mask grid whose cells cover whole blocks of tokens.

The norm comes first: the mask token itself is not normalised (SPEC X16).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask_token: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """The specification of `masked_embedding`, in plain torch."""
    tokens = F.layer_norm(tokens, norm_weight.shape, norm_weight, norm_bias, eps)
    if mask is None or mask_token is None:
        return tokens
    rows, columns = tokens.shape[-3] // mask.shape[-2], tokens.shape[-2] // mask.shape[-1]
    hidden = mask.repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)
    return torch.where(hidden[..., None], mask_token.reshape(-1).to(tokens.dtype), tokens)


def masked_embedding(
    tokens: Tensor,
    mask: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mask_token: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every token, then put the mask token where the mask is True.

    Args:
        tokens: (B, t, h, w, C), or (B, h, w, C) for images. Any strides.
        mask: (B, t, gh, gw) or (B, gh, gw) bool, True = hidden; h and w are multiples of gh and gw. None hides nothing.
        norm_weight, norm_bias: (C,).
        mask_token: C values of any shape; None only where the mask is None.
    Returns:
        The shape of tokens.
    Raises:
        ValueError: a mask whose cells do not cover the token grid, or a mask without a mask token.
    """
    if mask is not None:
        if mask_token is None:
            raise ValueError("masked_embedding: a mask needs a mask token to put in place of the hidden tokens")
        same_outside = mask.shape[:-2] == tokens.shape[:-3]
        if not same_outside or tokens.shape[-3] % mask.shape[-2] or tokens.shape[-2] % mask.shape[-1]:
            raise ValueError(
                f"masked_embedding: the mask {tuple(mask.shape)} does not divide the tokens {tuple(tokens.shape[:-1])}"
            )
    return reference(tokens, mask, norm_weight, norm_bias, mask_token, eps)
