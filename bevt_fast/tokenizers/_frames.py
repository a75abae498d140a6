"""Frames through a tokenizer a few at a time, those without a hidden cell left out."""

from collections.abc import Callable

import torch
from torch import Tensor

from bevt_fast.data.batch import send

Name = Callable[[Tensor, Tensor | None], Tensor]  # (n, 3, H, W) and the hidden cells (n, h, w) or None -> ids (n, h, w)


def name_cells(name: Name, token_pixels: Tensor, hidden: Tensor | None, cell: int, chunk: int) -> Tensor:
    """(*B, 3, H, W) -> (*B, h, w) ids, `chunk` frames at a time; 0 where `hidden` (*B, h, w) is False.

    `hidden` may lie on the CPU whatever the device; there the host knows at once which frames count, and waits for no
    GPU. Raises ValueError for hidden cells of another grid.
    """
    *leading, _, height, width = token_pixels.shape
    shape = (*leading, height // cell, width // cell)
    frames = token_pixels.reshape(-1, *token_pixels.shape[-3:])
    if hidden is None:
        return torch.cat([name(part, None) for part in frames.split(chunk)]).reshape(shape)
    if hidden.shape != shape or hidden.dtype is not torch.bool:
        raise ValueError(f"the hidden cells are {tuple(hidden.shape)} {hidden.dtype}, expected {shape} torch.bool")
    masks = hidden.reshape(len(frames), *shape[-2:])
    wanted = masks.flatten(1).any(dim=1).nonzero().flatten()
    masks, wanted = send(masks[wanted], frames.device), send(wanted, frames.device)
    parts = zip(frames[wanted].split(chunk), masks.split(chunk))
    ids = torch.zeros((len(frames), *shape[-2:]), dtype=torch.long, device=frames.device)
    ids[wanted] = torch.cat([name(*part) for part in parts])
    return ids.reshape(shape)
