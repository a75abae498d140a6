"""Masked visual token modelling on both streams at once: what the engine wraps (BEVT eq. 2 to 5; SPEC 4)."""

import sys
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt
from bevt_kernels import masked_cross_entropy


class JointObjective(nn.Module):
    """image_weight * L_MIM + clip_weight * L_MVM; a stream that the batch leaves out adds nothing."""

    def __init__(self, model: Bevt, image_weight: float = 1.0, clip_weight: float = 1.0) -> None:
        super().__init__()
        self.model, self.image_weight, self.clip_weight = model, image_weight, clip_weight

    def forward(
        self, batch: JointBatch, targets: Targets, hidden: tuple[SupportsFloat, SupportsFloat] | None = None
    ) -> Losses:
        """The losses of one micro-batch, as float32 scalars.

        A loss is the mean over the hidden positions of this micro-batch, as official. With `hidden` (the image and the
        clip positions of one micro-batch, averaged over all micro-batches and processes of the step) it is this
        micro-batch's sum divided by that count instead: averaged over the step, that is the mean over all hidden
        positions (SPEC X9). Accuracies are always those of this micro-batch.
        """
        image_count, clip_count = hidden if hidden is not None else (None, None)
        image, image_accuracy = self._image_loss(batch.images, targets.images, image_count)
        clip, clip_accuracy = self._clip_loss(batch.clips, targets.clips, clip_count)
        total = self.image_weight * image + self.clip_weight * clip
        return Losses(total, image, clip, image_accuracy, clip_accuracy)

    def _image_loss(self, images: Images | None, ids: Tensor | None, count: SupportsFloat | None):
        if images is None:
            return self._nothing()
        if ids is None:
            raise ConfigError("the batch has images but no targets for them; tokenize them first")
        features = self.model.image_features(images.pixels, images.mask)  # (B, g, g, K)
        loss, accuracy = masked_cross_entropy(features, self.model.head, ids, images.mask)
        return _weigh(loss, images.mask, count), accuracy

    def _clip_loss(self, clips: Clips | None, ids: Tensor | None, count: SupportsFloat | None):
        if clips is None:
            return self._nothing()
        if ids is None:
            raise ConfigError("the batch has clips but no targets for them; tokenize them first")
        features = self.model.clip_features(clips.pixels, clips.mask)  # (B, T, g, g, K)
        # both frames of a tubelet hide together, so the mask has T/2 planes while the targets have T
        mask = clips.mask.repeat_interleave(features.shape[1] // clips.mask.shape[1], dim=1)
        loss, accuracy = masked_cross_entropy(features, self.model.head, ids, mask)
        return _weigh(loss, mask, count), accuracy

    def _nothing(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros((), device=self.model.head.weight.device)
        return zero, zero


def _weigh(loss: Tensor, mask: Tensor, count: SupportsFloat | None) -> Tensor:
    """The mean over the mask as a share of `count` positions; untouched without one."""
    return loss if count is None else loss * (float(mask.sum()) / max(float(count), sys.float_info.min))
