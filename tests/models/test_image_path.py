"""Images through the clip encoder: as a clip of one time step, and as the official code does it (SPEC 1.5, X3)."""

import pytest
import torch
import torch.nn.functional as F

from bevt_fast.errors import ConfigError
from bevt_fast.models import official
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig, WindowAttention
from tests.kernels.brute_force import attention
from tests.models.oracles import official_names, randomise, torchvision_features, torchvision_models

SHAPE = VideoSwinConfig(embed_dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=(4, 3, 3))


@pytest.mark.parametrize("size", [(96, 96), (80, 120)], ids=str)
def test_agrees_with_torchvision_swin_on_the_rows_of_temporal_offset_0(size):
    swin = torchvision_models().swin_transformer
    model = randomise(Bevt(SHAPE, vocab_size=5, streams=("images", "clips")))
    theirs = swin.SwinTransformer([4, 4], 12, [2, 2, 2, 2], [1, 2, 3, 4], [3, 3], num_classes=2).eval()
    plane = 5 * 5  # rows of one temporal offset
    ours = {name.removeprefix("backbone."): value for name, value in official.to_official(model.state_dict()).items()}
    weights = {}
    for name, value in official_names(theirs.state_dict(), clips=False).items():
        source = ours.get(name.replace("patch_embed.", "patch_embed_2d."), value)
        weights[name] = source[3 * plane : 4 * plane] if name.endswith("bias_table") else source
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values())))

    pixels = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert model.image_stem is not None
        features = model.encoder.stages_of(model.image_stem(pixels)[:, None])
        expected = torchvision_features(theirs, pixels, clips=False)
        for mine, their in zip([*features, model.encoder.norm(features[-1])], expected):
            torch.testing.assert_close(mine[:, 0], their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [3, 6], ids=["one-window", "four-windows"])
@pytest.mark.parametrize("shifted", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("style", ["t1", "official"])
def test_attention_of_one_block_pair_by_pair(side, shifted, style):
    module = randomise(WindowAttention(8, 2, (4, 3, 3), shifted, "true").double())
    x = torch.randn(2, 1, side, side, 8, dtype=torch.float64)
    # t1 shifts odd blocks where the grid is longer than the window; official masks every block and shifts every odd one
    moves = style == "official" or side > 3
    shift = (0, 1, 1) if shifted and moves else (0, 0, 0)
    mask_shift = (0, 1, 1) if style == "official" else shift
    qkv = module.qkv(x).unflatten(-1, (3, 2, 4))
    expected = attention(qkv, module.relative_position_bias_table, (4, 3, 3), shift, mask_shift)
    torch.testing.assert_close(module(x, style), module.projection(expected.flatten(-2)))


def test_official_mask_separates_the_first_4_from_the_last_3_in_the_last_window():
    # SPEC X3 (a), in numbers: window 7, side 14, even block
    module = WindowAttention(4, 1, (8, 7, 7), False, "true")
    with torch.no_grad():
        module.relative_position_bias_table.zero_()
        for linear in (module.qkv, module.projection):
            linear.weight.zero_()
            linear.bias.zero_()
        module.qkv.weight[8:, :] = module.projection.weight[:] = torch.eye(4)  # the mean of what a token attends to
        x = torch.zeros(1, 1, 14, 14, 4)
        x[..., 0] = torch.arange(14.0)[:, None].expand(14, 14)  # its own row
        rows = module(x, "official")[0, 0, :, 0, 0]
    torch.testing.assert_close(rows, torch.tensor([3.0] * 7 + [8.5] * 4 + [12.0] * 3))


def test_the_two_image_paths_differ_and_only_in_the_image_stream():
    t1 = randomise(Bevt(SHAPE, vocab_size=5))
    other = Bevt(SHAPE, vocab_size=5, image_attention="official").eval()
    other.load_state_dict(t1.state_dict())
    images, clips = torch.randn(1, 3, 96, 96), torch.randn(1, 3, 4, 96, 96)
    with torch.no_grad():
        assert torch.equal(t1.clip_features(clips), other.clip_features(clips))
        difference = t1.image_features(images) - other.image_features(images)
    assert difference.square().mean().sqrt() > 0.1


def test_official_path_refuses_stages_that_are_not_whole_windows():
    model = Bevt(SHAPE, vocab_size=5, image_attention="official")
    with pytest.raises(ConfigError, match=r"sides are multiples of the window \(3, 3\).* 96 x 96 pixels"):
        model.image_features(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("bias_index", ["true", "official"])
def test_clipped_windows_in_the_encoder_pair_by_pair(bias_index):
    module = randomise(WindowAttention(8, 2, (2, 4, 3), True, bias_index).double())
    x = torch.randn(1, 3, 3, 5, 8, dtype=torch.float64)  # height is clipped, time and width are padded
    padded = F.pad(x, (0, 0, 0, 1, 0, 0, 0, 1))
    qkv = module.qkv(padded).unflatten(-1, (3, 2, 4))
    table = module.relative_position_bias_table
    expected = attention(qkv, table, (2, 4, 3), (1, 0, 1), bias_index=bias_index)[:, :3, :3, :5]
    torch.testing.assert_close(module(x), module.projection(expected.flatten(-2)))


def test_an_image_encoder_has_no_clip_stem():
    encoder = VideoSwin(SHAPE, clip_stem=False)
    assert not any(name.startswith("stem") for name, _ in encoder.named_parameters())
    with pytest.raises(ConfigError, match="images only"):
        encoder.stages(torch.randn(1, 3, 4, 32, 32))
