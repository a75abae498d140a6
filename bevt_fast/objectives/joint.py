"""Masked visual token modelling on both streams at once: what the engine wraps (BEVT eq. 2 to 5; SPEC 4)."""

import sys
from collections.abc import Callable
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from bevt_fast.data.batch import Clips, Images, JointBatch, Losses, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt, HiddenRows, hidden_rows
from bevt_fast.objectives.heap import give_back
from bevt_fast.objectives.in_turn import Settled
from bevt_kernels import masked_cross_entropy


class JointObjective(nn.Module):
    """image_weight * L_MIM + clip_weight * L_MVM; a stream that the batch leaves out adds nothing."""

    def __init__(self, model: Bevt, image_weight: float = 1.0, clip_weight: float = 1.0, in_turn: bool = False) -> None:
        """in_turn: the images' backward pass before the clips' forward pass, which need not remember both then."""
        super().__init__()
        self.model, self.image_weight, self.clip_weight, self.in_turn = model, image_weight, clip_weight, in_turn

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
        image_features = _features(model.image_features, "images", images, targets.images, image_rows)
        if self.in_turn and images and clips and torch.is_grad_enabled():
            image, image_accuracy = self._loss(image_features, targets.images, image_rows, targets, image_count)
            settled = Settled(image, list(self.parameters()))
            del image, image_features  # and with them what the backward pass had needed
            give_back(clips.pixels.device)
            clip_features = _features(model.clip_features, "clips", clips, targets.clips, clip_rows)
            image = settled.loss()
        else:
            clip_features = _features(model.clip_features, "clips", clips, targets.clips, clip_rows)
            image, image_accuracy = self._loss(image_features, targets.images, image_rows, targets, image_count)
        clip, clip_accuracy = self._loss(clip_features, targets.clips, clip_rows, targets, clip_count)
        total = self.image_weight * image + self.clip_weight * clip
        return Losses(total, image, clip, image_accuracy, clip_accuracy)

    def _loss(
        self,
        features: Tensor | None,
        ids: Tensor | None,
        rows: HiddenRows | None,
        targets: Targets,
        count: SupportsFloat | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of one stream; `count` as in `forward`."""
        if features is None or ids is None or rows is None:
            zero = torch.zeros((), device=self.model.head.weight.device)
            return zero, zero
        if targets.ready is not None:
            targets.ready.wait()  # the GPU's, not the host's: until here nobody has read an id
        hidden = ids.flatten().index_select(0, rows.positions)  # (M,)
        loss, accuracy = masked_cross_entropy(features, self.model.head, hidden)
        # a mean over M positions, as a share of `count`
        return loss if count is None else loss * (len(hidden) / max(float(count), sys.float_info.min)), accuracy


def _features(
    features_of: Callable[..., Tensor],
    name: str,
    stream: Images | Clips | None,
    ids: Tensor | None,
    rows: HiddenRows | None,
) -> Tensor | None:
    """(M, K) of the hidden positions, for a stream that is there. Raises ConfigError for targets of another grid, or
    none.
    """
    if stream is None or rows is None:
        return None
    if ids is None:
        raise ConfigError(f"the batch has {name} but no targets for them; tokenize them first")
    if ids.shape != rows.grid:
        raise ConfigError(f"the targets of the {name} are {tuple(ids.shape)}, but their masks cover {rows.grid}")
    return features_of(stream.pixels, stream.mask, rows)
