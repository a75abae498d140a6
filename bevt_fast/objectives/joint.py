"""Masked visual token modelling on both streams at once: what the engine wraps (BEVT eq. 2 to 5; SPEC 4)."""

import sys
from collections.abc import Callable
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt, HiddenRows, hidden_rows
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
        images, clips, model = batch.images, batch.clips, self.model
        image_rows = hidden_rows(images.mask, device=images.pixels.device) if images else None
        clip_rows = hidden_rows(clips.mask, model.config.patch[0], clips.pixels.device) if clips else None
        image_ids = _hidden_ids("images", targets.images, image_rows)
        clip_ids = _hidden_ids("clips", targets.clips, clip_rows)
        image, image_accuracy = self._loss(model.image_features, images, image_rows, image_ids, image_count)
        clip, clip_accuracy = self._loss(model.clip_features, clips, clip_rows, clip_ids, clip_count)
        total = self.image_weight * image + self.clip_weight * clip
        return Losses(total, image, clip, image_accuracy, clip_accuracy)

    def _loss(
        self,
        features_of: Callable[..., Tensor],
        stream: Images | Clips | None,
        rows: HiddenRows | None,
        ids: Tensor | None,
        count: SupportsFloat | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of one stream; `count` as in `forward`."""
        if stream is None or ids is None:
            zero = torch.zeros((), device=self.model.head.weight.device)
            return zero, zero
        features = features_of(stream.pixels, stream.mask, rows)  # (M, K)
        loss, accuracy = masked_cross_entropy(features, self.model.head, ids)
        # a mean over M positions, as a share of `count`
        return loss if count is None else loss * (len(ids) / max(float(count), sys.float_info.min)), accuracy


def _hidden_ids(stream: str, ids: Tensor | None, rows: HiddenRows | None) -> Tensor | None:
    """(B, [T,] g, g) -> (M,), in the order of the rows. Raises ConfigError for targets of another grid, or none."""
    if rows is None:
        return None
    if ids is None:
        raise ConfigError(f"the batch has {stream} but no targets for them; tokenize them first")
    if ids.shape != rows.grid:
        raise ConfigError(f"the targets of the {stream} are {tuple(ids.shape)}, but their masks cover {rows.grid}")
    return ids.flatten().index_select(0, rows.positions)
