"""The encoder against torchvision's Video Swin, and its own promises."""

import pytest
import torch

from bevt_fast.errors import ConfigError
from bevt_fast.models import official
from bevt_fast.models.residual import DropPath
from bevt_fast.models.video_swin import BiasIndex, Stem, VideoSwin, VideoSwinConfig
from tests.models.oracles import official_names, randomise, torchvision_features, torchvision_models

SMALL = VideoSwinConfig(embed_dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=(2, 3, 3), drop_path=0.2)

# SPEC 1.1: encoder parameters with the windows (8,7,7) and (16,7,7)
PARAMETERS = {
    "tiny": (27_850_470, 28_223_622),
    "small": (49_509_078, 50_271_606),
    "base": (87_638_984, 88_655_688),
    "large": (196_339_116, 197_864_172),
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts_of_the_specification(size):
    for window, count in zip(((8, 7, 7), (16, 7, 7)), PARAMETERS[size]):
        with torch.device("meta"):
            encoder = VideoSwin(VideoSwinConfig.preset(size, window=window))
        assert sum(parameter.numel() for parameter in encoder.parameters()) == count


def _agree(config, theirs, pixels, bias_index: BiasIndex = "true"):
    randomise(theirs)
    ours = VideoSwin(config, bias_index=bias_index).eval()
    ours.load_state_dict(official.from_official(official_names(theirs.state_dict())))
    with torch.no_grad():
        expected = torchvision_features(theirs, pixels)
        features = ours.stages(pixels)
        for mine, their in zip([*features, ours.norm(features[-1])], expected):
            torch.testing.assert_close(mine, their, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "clip, window",
    [
        ((4, 96, 96), (2, 3, 3)),  # whole windows, shifted in space
        ((8, 96, 90), (2, 3, 3)),  # shifted in time and space
        ((5, 75, 90), (2, 3, 3)),  # padded patches, windows and mergings
        ((7, 70, 110), (3, 2, 4)),
    ],
    ids=str,
)
def test_agrees_with_torchvision(clip, window):
    _same_as_torchvision(clip, window, "true")


@pytest.mark.parametrize("clip, window", [((4, 96, 64), (4, 4, 4)), ((3, 40, 40), (2, 4, 3))], ids=str)
def test_agrees_with_torchvision_where_height_or_width_is_clipped(clip, window):
    # torchvision has the official index (SPEC X2)
    _same_as_torchvision(clip, window, "official")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        _same_as_torchvision(clip, window, "true")


def _same_as_torchvision(clip, window, bias_index: BiasIndex):
    swin = torchvision_models().video.swin_transformer
    shape = VideoSwinConfig(embed_dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=window)
    theirs = swin.SwinTransformer3d([2, 4, 4], 12, [2, 2, 2, 2], [1, 2, 3, 4], list(window), num_classes=2)
    _agree(shape, theirs, torch.randn(2, 3, *clip), bias_index)


def test_agrees_with_torchvision_swin3d_t_at_full_size():
    theirs = torchvision_models().video.swin3d_t()
    _agree(VideoSwinConfig.preset("tiny"), theirs, torch.randn(1, 3, 16, 224, 224))


def test_inputs_are_zero_padded_to_whole_patches():
    stem, pixels = Stem(6, (2, 4, 4)), torch.randn(1, 3, 3, 6, 9)
    padded = torch.zeros(1, 3, 4, 8, 12)
    padded[:, :, :3, :6, :9] = pixels
    assert torch.equal(stem(pixels), stem(padded))


def test_drop_path_rates_grow_linearly_over_all_blocks():
    config = VideoSwinConfig(embed_dim=8, depths=(1, 2, 1, 3), heads=(1, 1, 1, 1), window=(1, 1, 1), drop_path=0.6)
    rates = [module.rate for module in VideoSwin(config).modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.6 * block / 6 for block in range(7)])


def test_evaluation_is_deterministic_and_training_is_not():
    encoder, pixels = randomise(VideoSwin(SMALL)), torch.randn(4, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder(pixels), encoder(pixels))
        encoder.train()
        assert not torch.equal(encoder(pixels), encoder(pixels))


def test_activation_checkpointing_changes_no_gradient():
    plain, saving = VideoSwin(SMALL), VideoSwin(SMALL, activation_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    pixels, gradients = torch.randn(2, 3, 4, 32, 32), []
    for encoder in (plain, saving):
        torch.manual_seed(5)  # drop path draws the same samples, and draws them again in the recomputation
        encoder(pixels).square().mean().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    for one, other in zip(*gradients):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_follow_float32(dtype):
    encoder, pixels = randomise(VideoSwin(SMALL)), torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        truth = encoder(pixels)
        out = encoder.to(dtype)(pixels.to(dtype))
        assert out.dtype is dtype
        # relative to features of size one: rounding of the narrower type through 8 blocks of two branches
        error = (out.double() - truth.double()).abs().mean()
        assert error < 16 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def test_initialisation_of_the_specification():
    encoder = VideoSwin(VideoSwinConfig(embed_dim=48, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), window=(4, 5, 5)))
    parameters = dict(encoder.named_parameters())
    for name, parameter in parameters.items():
        is_drawn = (name.endswith("weight") and "norm" not in name and "stem" not in name) or "table" in name
        if is_drawn:
            three_standard_errors = 3 * 0.02 / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std() - 0.02) < three_standard_errors, name
        elif "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif "stem" not in name:
            assert (parameter == 0).all(), name
    # the framework's default for convolutions: uniform up to 1/sqrt(fan-in)
    assert 0.9 * 96**-0.5 < parameters["stem.projection.weight"].abs().max() <= 96**-0.5


def test_fan_in_initialisation_keeps_variances():
    config = VideoSwinConfig(embed_dim=48, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2), window=(4, 5, 5))
    encoder = VideoSwin(config, initialisation="fan_in")
    for name, parameter in encoder.named_parameters():
        if name.endswith("weight") and "norm" not in name and "stem" not in name:
            three_standard_errors = 3 / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std() * parameter.shape[1] ** 0.5 - 1) < three_standard_errors, name
    table = encoder.get_parameter("stage.3.blocks.0.attention.relative_position_bias_table")
    assert abs(table.std() - 0.02) < 3 * 0.02 / (2 * table.numel()) ** 0.5


def test_names_the_optimizer_groups_rely_on():
    encoder = VideoSwin(SMALL)
    for module_name, module in encoder.named_modules():
        assert ("norm" in module_name.split(".")[-1]) == isinstance(module, torch.nn.LayerNorm), module_name
    tables = [name for name, _ in encoder.named_parameters() if name.endswith("relative_position_bias_table")]
    assert len(tables) == 8


def test_caches_are_neither_parameters_nor_buffers():
    encoder = VideoSwin(SMALL)
    before = set(encoder.state_dict())
    encoder(torch.randn(1, 3, 4, 64, 64))
    assert set(encoder.state_dict()) == before
    assert not list(encoder.buffers())


def test_wrong_sizes_are_named():
    with pytest.raises(ConfigError, match="'huge'; there are: tiny, small, base, large"):
        VideoSwinConfig.preset("huge")
    with pytest.raises(ConfigError, match="stage 2 is 48 wide, which 5 heads cannot share"):
        VideoSwinConfig(embed_dim=24, depths=(1, 1, 1, 1), heads=(2, 5, 8, 16))
