"""DALL-E's encoder as the official program runs it: every frame, every cell, channels first (SPEC 3.1)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_fast.data.batch import JointBatch, Targets

GAIN = 1 / 64  # SPEC 3.1: of a block's residual path
FRAMES = 4  # that the kinder contender hands over at a time


def convolution(weights: Mapping[str, Tensor], name: str, x: Tensor, exact: bool = False) -> Tensor:
    """In float16 on a GPU unless `exact`; the weights are cast at every call, as there."""
    dtype = torch.float16 if x.is_cuda and not exact else torch.float32
    w, b = weights[f"{name}.w"], weights[f"{name}.b"]
    return F.conv2d(x.to(dtype), w.to(dtype), b.to(dtype), padding=w.shape[-1] // 2)


def features(weights: Mapping[str, Tensor], frames: Tensor) -> Tensor:
    """(N, 3, H, W) to what the last convolution reads, (N, 8n, h, w)."""
    x = convolution(weights, "blocks.input", frames)
    for group in range(1, 5):
        for number in (1, 2):
            name = f"blocks.group_{group}.block_{number}"
            residual = x
            for layer in range(1, 5):
                residual = convolution(weights, f"{name}.res_path.conv_{layer}", F.relu(residual))
            same = f"{name}.id_path.w" not in weights
            x = (x if same else convolution(weights, f"{name}.id_path", x)) + GAIN * residual
        if group < 4:
            x = F.max_pool2d(x, 2)
    return F.relu(x)


def logits(weights: Mapping[str, Tensor], frames: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, V, h, w), float32."""
    return convolution(weights, "blocks.output.conv", features(weights, frames), exact=True)


class OfficialTokenizer:
    """Frames of both streams in one call, or `at_a_time`; the ids of all their cells."""

    def __init__(self, weights: Mapping[str, Tensor], at_a_time: int | None = None) -> None:
        self.weights, self.at_a_time, self.logits = weights, at_a_time, logits

    def ids(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, h, w)."""
        parts = frames.split(self.at_a_time or len(frames))
        return torch.cat([self.logits(self.weights, part).argmax(dim=1) for part in parts])

    @torch.no_grad()
    def __call__(self, batch: JointBatch) -> Targets:
        clips = batch.clips.token_pixels.flatten(0, 1) if batch.clips else None
        images = batch.images.token_pixels if batch.images else None
        with torch.autocast((batch.clips or batch.images).pixels.device.type, enabled=False):  # pyright: ignore
            ids = self.ids(torch.cat([frames for frames in (clips, images) if frames is not None]))
        count = 0 if clips is None else len(clips)
        of_clips = ids[:count].unflatten(0, batch.clips.token_pixels.shape[:2]) if batch.clips else None
        return Targets(ids[count:] if batch.images else None, of_clips)


class HiddenCells(OfficialTokenizer):
    """The same layers on frames that hide something, the last one on hidden cells only; 0 elsewhere."""

    @torch.no_grad()
    def __call__(self, batch: JointBatch) -> Targets:
        images, clips = batch.images, batch.clips
        of_images = self.hidden_ids(images.token_pixels, images.mask) if images else None
        if clips is None:
            return Targets(of_images, None)
        frames = clips.token_pixels.flatten(0, 1)
        mask = clips.mask.repeat_interleave(clips.token_pixels.shape[1] // clips.mask.shape[1], dim=1)
        ids = self.hidden_ids(frames, mask.flatten(0, 1))
        return Targets(of_images, ids.unflatten(0, clips.token_pixels.shape[:2]))

    def hidden_ids(self, frames: Tensor, mask: Tensor) -> Tensor:
        """(N, 3, H, W), (N, h, w) -> (N, h, w)."""
        ids = torch.zeros(mask.shape, dtype=torch.long, device=frames.device)
        weight, bias = self.weights["blocks.output.conv.w"].flatten(1), self.weights["blocks.output.conv.b"]
        wanted = mask.flatten(1).any(1).nonzero().flatten()
        for part in wanted.split(self.at_a_time or len(wanted)):
            cells = features(self.weights, frames[part.to(frames.device)]).movedim(1, -1)
            hidden = mask[part].to(frames.device)
            found = ids.new_zeros(hidden.shape)
            found[hidden] = F.linear(cells[hidden].float(), weight, bias).argmax(-1)
            ids[part.to(ids.device)] = found
        return ids
