"""The pretraining model: its parts, its decoders beside hand-composed ones, and what ZeRO-3 asks of it."""

import pytest
import torch
import torch.nn.functional as F

from bevt_fast.errors import ConfigError
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwinConfig
from tests.models.oracles import randomise

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.0)


def _count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_specification():
    with torch.device("meta"):
        model = Bevt(VideoSwinConfig.preset("base"))
    # SPEC 1.1, joint Base
    assert _count(model.encoder.stem) == 12_672
    assert _count(model.image_stem) == 6_528
    assert _count(model.mask_token) == 128
    assert _count(model.encoder.stage) == 87_624_264
    assert _count(model.encoder.norm) == 2_048
    assert _count(model.image_decoder) == 4_195_328 + 1_573_888
    assert _count(model.clip_decoder) == 4_195_328 + 1_573_888 + 2_098_176
    assert _count(model.head) == 8_396_800
    assert _count(model) == 109_679_048
    # SPEC 5.2: of 344 tensors, 132 carry a name that is not decayed
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == 344
    assert sum("norm" in name or "relative_position_bias_table" in name for name in names) == 132


@pytest.mark.parametrize("cells", [(2, 2), (6, 4)], ids=str)
def test_both_decoders_beside_hand_composed_ones(cells):
    model, grid = randomise(Bevt(SHAPE, vocab_size=5).double()), cells
    size = (16 * grid[0], 16 * grid[1])
    clips, images = torch.randn(2, 3, 4, *size).double(), torch.randn(2, 3, *size).double()
    with torch.no_grad():
        weights = model.state_dict()
        stage3, stage4 = model.encoder.stages(clips)[2:]
        up = F.conv_transpose3d(
            stage4.permute(0, 4, 1, 2, 3),
            weights["clip_decoder.upsample.weight"],
            weights["clip_decoder.upsample.bias"],
            stride=(1, 2, 2),
        )
        x = torch.cat([stage3, up.permute(0, 2, 3, 4, 1)], -1)
        x = F.linear(x, weights["clip_decoder.fuse.weight"], weights["clip_decoder.fuse.bias"])
        x = F.conv_transpose3d(
            x.permute(0, 4, 1, 2, 3),
            weights["clip_decoder.double_time.weight"],
            weights["clip_decoder.double_time.bias"],
            stride=(2, 1, 1),
        ).permute(0, 2, 3, 4, 1)
        expected = F.layer_norm(x, (64,), weights["encoder.norm.weight"], weights["encoder.norm.bias"])
        features = model.clip_features(clips)
        assert features.shape == (2, 4, *grid, 64)
        torch.testing.assert_close(features, expected)

        assert model.image_stem is not None
        stage3, stage4 = (stage[:, 0] for stage in model.encoder.stages_of(model.image_stem(images)[:, None])[2:])
        up = F.conv_transpose2d(
            stage4.permute(0, 3, 1, 2),
            weights["image_decoder.upsample.weight"],
            weights["image_decoder.upsample.bias"],
            stride=2,
        )
        x = torch.cat([stage3, up.permute(0, 2, 3, 1)], -1)
        x = F.linear(x, weights["image_decoder.fuse.weight"], weights["image_decoder.fuse.bias"])
        expected = F.layer_norm(x, (64,), weights["encoder.norm.weight"], weights["encoder.norm.bias"])
        features = model.image_features(images)
        assert features.shape == (2, *grid, 64)
        torch.testing.assert_close(features, expected)


def test_what_is_hidden_cannot_be_seen():
    model, mask = randomise(Bevt(SHAPE, vocab_size=5)), torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    mask[0, 1, 1:3, 2] = True
    clips = torch.randn(1, 3, 4, 64, 64)
    changed = clips.clone()
    changed[:, :, 2:, 16:48, 32:48] = 7.0
    visible = clips.clone()
    visible[:, :, :2, 16:48, 32:48] = 7.0
    with torch.no_grad():
        assert torch.equal(model.clip_features(clips, mask), model.clip_features(changed, mask))
        assert not torch.equal(model.clip_features(clips, mask), model.clip_features(visible, mask))
        assert torch.equal(model.image_features(clips[:, :, 0]), model.image_features(clips[:, :, 0], mask[:, 0]))
        hidden = model.image_features(clips[:, :, 2], mask[:, 1])
        assert torch.equal(hidden, model.image_features(changed[:, :, 2], mask[:, 1]))


@pytest.mark.parametrize("stream", ["images", "clips"])
def test_one_stream_builds_no_part_it_would_not_use(stream):
    model = Bevt(SHAPE, vocab_size=5, streams=(stream,)).train()
    mask = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask[..., 0] = True
    if stream == "images":
        features = model.image_features(torch.randn(1, 3, 32, 32), mask[:, 0])
    else:
        features = model.clip_features(torch.randn(1, 3, 4, 32, 32), mask)
    model.head(features).square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    with pytest.raises(ConfigError, match="built without the stream"):
        model.clip_features(torch.randn(1, 3, 4, 32, 32)) if stream == "images" else model.image_features(
            torch.randn(1, 3, 32, 32)
        )


def test_every_parameter_is_read_inside_the_forward_of_its_owner():
    """ZeRO-3 keeps a parameter whole only while the forward of the module that owns it runs; so does this test."""
    model = randomise(Bevt(SHAPE, vocab_size=5))
    clips, images = torch.randn(1, 3, 4, 64, 64), torch.randn(1, 3, 64, 64)
    mask = torch.rand(1, 2, 4, 4) < 0.5

    def answers():
        with torch.no_grad():
            clip, image = model.clip_features(clips, mask), model.image_features(images, mask[:, 0])
            return model.head(clip), model.head(image)

    expected = answers()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        kept = [parameter.data.clone() for parameter in own]

        def gather(module, inputs, own=own, kept=kept):
            for parameter, data in zip(own, kept):
                parameter.data = data.clone()

        def put_away(module, inputs, output, own=own):
            for parameter in own:
                parameter.data.fill_(torch.nan)
                parameter.data = torch.empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(put_away)
        put_away(module, None, None)
    for answer, truth in zip(answers(), expected):
        assert torch.equal(answer, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_runs_in_every_dtype(dtype):
    model = Bevt(SHAPE, vocab_size=5).to(dtype)
    mask = torch.rand(1, 2, 4, 4) < 0.5
    features = model.clip_features(torch.randn(1, 3, 4, 64, 64, dtype=dtype), mask)
    assert features.dtype is dtype
    model.head(features).sum().backward()
    model.image_features(torch.randn(1, 3, 64, 64, dtype=dtype), mask[:, 0]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_token_head_and_decoders_start_as_the_specification_says():
    model = Bevt(VideoSwinConfig(embed_dim=32, depths=(1, 1, 1, 1), heads=(1, 1, 1, 1), window=(1, 2, 2)), 512)
    for linear in (model.head, model.image_decoder.fuse, model.clip_decoder.fuse):  # pyright: ignore[reportOptionalMemberAccess]
        three_standard_errors = 3 * 0.02 / (2 * linear.weight.numel()) ** 0.5
        assert abs(linear.weight.std() - 0.02) < three_standard_errors
        assert (linear.bias == 0).all()
    assert 0 < model.mask_token.vector.abs().max() < 0.02 * 6


def test_wrong_views_and_masks_are_named():
    model = Bevt(SHAPE, vocab_size=5)
    with pytest.raises(ConfigError, match=r"48 x 64 pixels .* multiples of 32"):
        model.image_features(torch.randn(1, 3, 48, 64))
    with pytest.raises(ConfigError, match="64 x 64 pixels has 4 x 4 cells of 16 pixels, but the mask has 14 x 14"):
        model.clip_features(torch.randn(1, 3, 4, 64, 64), torch.zeros(1, 2, 14, 14, dtype=torch.bool))
    with pytest.raises(ConfigError, match="got audio"):
        Bevt(SHAPE, streams=("audio",))
