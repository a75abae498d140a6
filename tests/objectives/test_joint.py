"""The joint objective: both streams, either one, nothing hidden, and the two ways to take the mean."""

import math

import pytest
import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.0)
VOCABULARY = 11


def _objective(**weights):
    return JointObjective(Bevt(SHAPE, vocab_size=VOCABULARY, initialisation="fan_in"), **weights)


def _batch(clips=2, images=3, share=0.4):
    batch = JointBatch(
        Images(torch.randn(images, 3, 64, 64), torch.rand(images, 3, 32, 32), torch.rand(images, 4, 4) < share),
        Clips(torch.randn(clips, 3, 4, 64, 64), torch.rand(clips, 4, 3, 32, 32), torch.rand(clips, 2, 4, 4) < share),
    )
    targets = Targets(torch.randint(VOCABULARY, (images, 4, 4)), torch.randint(VOCABULARY, (clips, 4, 4, 4)))
    return batch, targets


def test_losses_are_those_of_all_positions_with_the_visible_ones_taken_out():
    objective, (batch, targets) = _objective(image_weight=0.5, clip_weight=2.0), _batch()
    losses = objective(batch, targets)
    assert batch.images is not None and batch.clips is not None
    assert targets.images is not None and targets.clips is not None
    model, expected = objective.model, []
    with torch.no_grad():
        for features, ids, mask in (
            (model.image_features(batch.images.pixels, batch.images.mask), targets.images, batch.images.mask),
            # frame f belongs to tubelet f // 2
            (
                model.clip_features(batch.clips.pixels, batch.clips.mask),
                targets.clips,
                batch.clips.mask[:, [0, 0, 1, 1]],
            ),
        ):
            logits = model.head(features)
            everywhere = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            expected.append((everywhere[mask].mean(), (logits.argmax(-1) == ids)[mask].float().mean()))
    (image, image_accuracy), (clip, clip_accuracy) = expected
    torch.testing.assert_close(losses.image, image)
    torch.testing.assert_close(losses.clip, clip)
    torch.testing.assert_close(losses.image_accuracy, image_accuracy)
    torch.testing.assert_close(losses.clip_accuracy, clip_accuracy)
    torch.testing.assert_close(losses.total, 0.5 * image + 2.0 * clip)
    assert all(loss.dtype is torch.float32 and loss.shape == () for loss in losses)


def test_every_parameter_learns_from_a_joint_batch():
    objective, (batch, targets) = _objective(), _batch()
    objective(batch, targets).total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_an_absent_stream_adds_nothing():
    objective, (batch, targets) = _objective(), _batch()
    both = objective(batch, targets)
    image_only = objective(JointBatch(batch.images, None), Targets(targets.images, None))
    clip_only = objective(JointBatch(None, batch.clips), Targets(None, targets.clips))
    assert image_only.clip == image_only.clip_accuracy == clip_only.image == clip_only.image_accuracy == 0
    assert torch.equal(image_only.total, both.image)
    assert torch.equal(clip_only.total, both.clip)


def test_nothing_hidden_is_zero_with_a_backward():
    objective, (batch, targets) = _objective(), _batch(share=0.0)
    losses = objective(batch, targets)
    assert all(loss == 0 for loss in losses)
    losses.total.backward()
    for name, parameter in objective.named_parameters():
        is_mask_token = "mask_token" in name
        assert parameter.grad is not None and (parameter.grad == 0).all(), name
        assert not is_mask_token or parameter.grad.shape == (1, 1, 8)
    assert objective(batch, targets, hidden=(0, 0)).total == 0


def test_micro_batches_with_a_count_average_to_the_mean_over_all_hidden_positions():
    objective, (whole, targets) = _objective(), _batch(clips=2, images=2)
    assert whole.images is not None and whole.clips is not None
    assert targets.images is not None and targets.clips is not None
    truth = objective(whole, targets)
    counts = (whole.images.mask.sum() / 2, whole.clips.mask.sum())  # over 2 micro-batches; a tubelet is 2 frames
    parts = []
    for one in (slice(0, 1), slice(1, 2)):
        batch = JointBatch(Images(*(part[one] for part in whole.images)), Clips(*(part[one] for part in whole.clips)))
        parts.append(objective(batch, Targets(targets.images[one], targets.clips[one]), counts))
    assert whole.clips.mask[0].sum() != whole.clips.mask[1].sum()
    for name in ("total", "image", "clip"):
        mean = (getattr(parts[0], name) + getattr(parts[1], name)) / 2
        torch.testing.assert_close(mean, getattr(truth, name))


def test_the_first_loss_is_that_of_a_guess():
    # SPEC 1.8: near-zero logits, so every id is as likely
    objective = JointObjective(Bevt(SHAPE, vocab_size=VOCABULARY))
    losses = objective(*_batch())
    assert losses.image.item() == pytest.approx(math.log(VOCABULARY), rel=0.05)
    assert losses.clip.item() == pytest.approx(math.log(VOCABULARY), rel=0.05)


def test_a_stream_without_targets_is_named():
    batch, targets = _batch()
    with pytest.raises(ConfigError, match="has clips but no targets"):
        _objective()(batch, Targets(targets.images, None))
