"""Naming hidden cells only: the same ids there, nothing elsewhere, and no work for frames that hide nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.tokenizers import _frames, dalle, patch_kmeans
from bevt_fast.train import hidden_targets, joint_step


def _dalle():
    return dalle.Dalle(hidden=8, vocab_size=16)


def _patch_kmeans():
    return patch_kmeans.PatchKMeans(torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8))


both = pytest.mark.parametrize("make", [_dalle, _patch_kmeans])


def _pixels(*shape):
    return 0.8 * torch.randint(0, 256, shape) / 255 + 0.1


@both
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_hidden_cells_have_the_ids_they_always_have(make, share):
    tokenizer, clips = make(), _pixels(3, 5, 3, 16, 24)
    hidden = torch.rand(3, 5, 2, 3) < share
    hidden[1, 2:] = False
    ids = tokenizer(clips, hidden)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, torch.where(hidden, tokenizer(clips), 0))


@both
def test_a_frame_without_a_hidden_cell_is_not_encoded(make, monkeypatch):
    tokenizer, clips = make(), _pixels(2, 4, 3, 16, 16)
    hidden = torch.zeros(2, 4, 2, 2, dtype=torch.bool)
    hidden[0, 1, 0, 1] = hidden[1, 3] = True
    seen, name = [], tokenizer._name
    monkeypatch.setattr(tokenizer, "_name", lambda part, mask: (seen.append(part), name(part, mask))[1])
    tokenizer(clips, hidden)
    assert torch.equal(torch.cat(seen), torch.stack([clips[0, 1], clips[1, 3]]))


def test_with_hidden_cells_on_the_cpu_the_device_is_asked_nothing():
    # a meta tensor has no value, so whatever would wait for one fails
    hidden, seen = torch.rand(3, 5, 2, 3) < 0.2, []

    def name(part, mask):
        seen.append((part.shape, mask.device.type))
        return mask.long()

    ids = _frames.name_cells(name, torch.empty(3, 5, 3, 16, 24, device="meta"), hidden, cell=8, chunk=4)
    assert ids.is_meta and ids.shape == hidden.shape
    assert sum(shape[0] for shape, _ in seen) == hidden.flatten(2).any(2).sum()
    assert {where for _, where in seen} == {"meta"}


@both
def test_a_surrounding_autocast_changes_no_id(make):
    tokenizer, picture = make(), _pixels(4, 3, 32, 32)
    expected = tokenizer(picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(picture), expected)


@both
def test_hidden_cells_of_another_grid_are_named(make):
    sentence = r"hidden cells are \(1, 2, 3\) torch.bool, expected \(1, 2, 2\) torch.bool"
    with pytest.raises(ValueError, match=sentence):
        make()(_pixels(1, 3, 16, 16), torch.ones(1, 2, 3, dtype=torch.bool))


def _objective():
    shape = VideoSwinConfig(embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.0)
    return JointObjective(Bevt(shape, vocab_size=16, initialisation="fan_in"))


def _engine(objective) -> Any:
    class Engine(SimpleNamespace):
        def __call__(self, *arguments: Any):
            return objective(*arguments)

    return Engine(backward=torch.Tensor.backward, step=lambda: None)


def _batch():
    batch = JointBatch(
        Images(torch.randn(3, 3, 64, 64), _pixels(3, 3, 32, 32), torch.rand(3, 4, 4) < 0.5),
        Clips(torch.randn(2, 3, 4, 64, 64), _pixels(2, 4, 3, 32, 32), torch.rand(2, 2, 4, 4) < 0.4),
    )
    assert batch.images is not None and batch.clips is not None
    batch.clips.mask[1, 1] = False  # two frames without a hidden cell
    return batch


@both
def test_a_step_computes_the_bits_it_computes_from_all_ids(make):
    tokenizer, objective, batch = make(), _objective(), _batch()
    assert batch.images is not None and batch.clips is not None
    everywhere = Targets(tokenizer(batch.images.token_pixels), tokenizer(batch.clips.token_pixels))
    expected = objective(batch, everywhere)
    losses = joint_step(_engine(objective), tokenizer, batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(losses, expected))
    assert hidden_targets(tokenizer, batch._replace(images=None)).images is None
    clip_ids = hidden_targets(tokenizer, batch).clips
    assert clip_ids is not None and (clip_ids[1, 2:] == 0).all()


@pytest.mark.gpu
@both
def test_a_step_on_a_gpu_waits_for_nothing(make):
    tokenizer, engine, batch = make().to("cuda"), _engine(_objective().to("cuda")), _batch()
    assert batch.images is not None and batch.clips is not None
    images, clips = (
        stream._replace(pixels=stream.pixels.cuda(), token_pixels=stream.token_pixels.cuda())
        for stream in (batch.images, batch.clips)
    )
    batch = JointBatch(images, clips)  # pyright: ignore[reportArgumentType]
    joint_step(engine, tokenizer, batch)  # kernels are compiled and tables made
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        joint_step(engine, tokenizer, batch)
    finally:
        torch.cuda.set_sync_debug_mode(before)
