"""The joint objective: both streams, either one, nothing hidden, and the two ways to take the mean."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt, hidden_rows
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_kernels import masked_cross_entropy
from bevt_kernels.exactness import assert_as_exact_as_torch

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
        images, clips = ([part[one] for part in stream[:3]] for stream in (whole.images, whole.clips))
        batch = JointBatch(Images(*images), Clips(*clips))
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


# -- hidden rows only --------------------------------------------------------------------------------------------------

MASKS = {
    "some": lambda *shape: torch.rand(shape) < 0.4,
    "one corner": lambda *shape: torch.zeros(shape, dtype=torch.bool).index_fill_(
        -1, torch.tensor([shape[-1] - 1]), True
    ),
    "one sample": lambda *shape: torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).expand(shape) == 1,
    "all": lambda *shape: torch.ones(shape, dtype=torch.bool),
    "none": lambda *shape: torch.zeros(shape, dtype=torch.bool),
}


def _by_all_positions(objective, batch, targets):
    """The same losses from features of every position."""
    model, masks = objective.model, (batch.images.mask, batch.clips.mask.repeat_interleave(2, dim=1))
    features = (
        model.image_features(batch.images.pixels, batch.images.mask),
        model.clip_features(batch.clips.pixels, batch.clips.mask),
    )
    return [masked_cross_entropy(x, model.head, ids, mask) for x, ids, mask in zip(features, targets, masks)]


def _odd_batch(mask, dtype) -> Any:
    """Clips of 3 time steps, sides that differ."""
    image_mask, clip_mask = mask(3, 4, 6), mask(2, 3, 6, 2)
    images = Images(torch.randn(3, 3, 64, 96, dtype=dtype), torch.empty(0), image_mask)
    clips = Clips(torch.randn(2, 3, 6, 96, 32, dtype=dtype), torch.empty(0), clip_mask)
    ids = torch.randint(VOCABULARY, (3, 4, 6)), torch.randint(VOCABULARY, (2, 6, 6, 2))
    return JointBatch(images, clips), Targets(*ids)


def _gradients(objective, loss):
    objective.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_hidden_rows_give_the_losses_and_gradients_of_all_positions(mask):
    objective = _objective().double()
    batch, targets = _odd_batch(mask, torch.float64)
    losses = objective(batch, targets)
    gradients = _gradients(objective, losses.total)
    (image, image_accuracy), (clip, clip_accuracy) = _by_all_positions(objective, batch, targets)
    expected = _gradients(objective, image + clip)
    torch.testing.assert_close(losses[1:], (image, clip, image_accuracy, clip_accuracy), rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-11, atol=1e-13), name


def test_hidden_rows_are_as_exact_as_all_positions_in_float32():
    objective = _objective()
    batch, targets = _odd_batch(MASKS["some"], torch.float32)
    rows = _gradients(objective, objective(batch, targets).total)
    eager = _gradients(objective, sum(loss for loss, _ in _by_all_positions(objective, batch, targets)))
    objective.double()
    exact = JointBatch(*(stream._replace(pixels=stream.pixels.double()) for stream in batch))
    truth = _gradients(objective, sum(loss for loss, _ in _by_all_positions(objective, exact, targets)))
    for name in truth:
        assert_as_exact_as_torch(name, rows[name], eager[name], truth[name])


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_rows_come_in_the_order_of_the_mask(mask):
    model = _objective().model.double()
    batch, _ = _odd_batch(mask, torch.float64)
    for stream, features_of, frames in ((batch.images, model.image_features, 1), (batch.clips, model.clip_features, 2)):
        rows = hidden_rows(stream.mask, frames)
        everywhere = stream.mask.repeat_interleave(frames, dim=1) if frames > 1 else stream.mask
        with torch.no_grad():
            whole, some = (features_of(stream.pixels, stream.mask, r) for r in (None, rows))
        assert rows.grid == everywhere.shape == whole.shape[:-1]
        assert torch.equal(rows.positions, everywhere.flatten().nonzero().flatten())
        torch.testing.assert_close(some, whole[everywhere], rtol=1e-12, atol=1e-13)


def test_the_hidden_rows_are_counted_once_and_first():
    class Calls(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    objective, (batch, targets) = _objective(), _batch()
    with Calls() as calls:
        objective(batch, targets, hidden=(3, 5))
    assert calls.names.count("nonzero") == 2
    assert max(place for place, name in enumerate(calls.names) if name == "nonzero") < calls.names.index("convolution")


def test_with_masks_on_the_cpu_the_device_is_asked_nothing():
    # a meta tensor has no value, so whatever would wait for one fails
    batch, targets = _batch()
    objective = _objective().to("meta")
    assert batch.images is not None and batch.clips is not None
    images, clips = (stream._replace(pixels=stream.pixels.to("meta")) for stream in (batch.images, batch.clips))
    ids = Targets(*(ids.to("meta") for ids in targets if ids is not None))
    losses = objective(JointBatch(images, clips), ids, hidden=(3.0, 5.0))  # pyright: ignore[reportArgumentType]
    losses.total.backward()
    assert losses.total.is_meta
    assert all(parameter.grad is not None for parameter in objective.parameters())


def test_targets_of_another_grid_are_named():
    batch, targets = _batch()
    assert targets.clips is not None
    fewer = Targets(targets.images, targets.clips[:, ::2])
    sentence = r"targets of the clips are \(2, 2, 4, 4\), but their masks cover \(2, 4, 4, 4\)"
    with pytest.raises(ConfigError, match=sentence):
        _objective()(batch, fewer)
