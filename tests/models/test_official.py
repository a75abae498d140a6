"""Official names in and out, inflation and resizing, against the formulas of SPEC 5.4, 6.5 and 7."""

import pytest
import torch
import torch.nn.functional as F

from bevt_fast.errors import CheckpointError
from bevt_fast.models import official
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig
from tests.models.oracles import official_names, randomise, torchvision_features, torchvision_models

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=(2, 3, 3))
BLOCK = "layers.2.blocks.1."

# the table of SPEC 7: official key inside backbone, shape at Base
BASE = {
    "patch_embed.proj.weight": (128, 3, 2, 4, 4),
    "patch_embed.norm.bias": (128,),
    "patch_embed_2d.proj.weight": (128, 3, 4, 4),
    "patch_embed_2d.norm.weight": (128,),
    "mask_token": (1, 1, 128),
    BLOCK + "norm1.weight": (512,),
    BLOCK + "norm2.bias": (512,),
    BLOCK + "attn.qkv.weight": (1536, 512),
    BLOCK + "attn.proj.bias": (512,),
    BLOCK + "attn.relative_position_bias_table": (2535, 16),
    BLOCK + "mlp.fc1.weight": (2048, 512),
    BLOCK + "mlp.fc2.weight": (512, 2048),
    "layers.1.downsample.norm.weight": (1024,),
    "layers.1.downsample.reduction.weight": (512, 1024),
    "norm.weight": (1024,),
    "fpn.0.weight": (1024, 1024, 2, 2),
    "fpn.0.bias": (1024,),
    "lm_down.weight": (1024, 1536),
    "fpn_s.0.weight": (1024, 1024, 1, 2, 2),
    "lm_down_st.0.bias": (1024,),
    "fpn_t.0.weight": (1024, 1024, 2, 1, 1),
}


def test_names_and_shapes_of_the_specification():
    with torch.device("meta"):
        weights = official.to_official(Bevt(VideoSwinConfig.preset("base")).state_dict())
    for name, shape in BASE.items():
        assert tuple(weights["backbone." + name].shape) == shape, name
    assert tuple(weights["cls_head.lm_head.weight"].shape) == (8192, 1024)
    assert all(key.startswith(("backbone.", "cls_head.lm_head.")) for key in weights)


@pytest.mark.parametrize("model", [Bevt(SHAPE, vocab_size=5), Classifier(SHAPE, classes=3)], ids=["bevt", "classifier"])
def test_round_trip_is_bit_equal(model):
    ours = model.state_dict()
    there = official.to_official(ours)
    back = official.from_official(there)
    assert list(back) == list(ours)
    assert all(torch.equal(back[key], ours[key]) for key in ours)
    for wrap in (
        lambda key: key.removeprefix("backbone.").removeprefix("cls_head."),
        lambda key: "module." + key,
        lambda key: key.replace("backbone.", "backbone.encoder."),
    ):
        other = {wrap(key): value for key, value in there.items()}
        assert list(official.from_official({"meta": {"epoch": 1}, "state_dict": other})) == list(ours)
    model.load_state_dict(back)


def test_an_encoder_on_its_own_goes_out_and_comes_back():
    encoder = VideoSwin(SHAPE)
    there = official.to_official(encoder.state_dict())
    assert "backbone.layers.0.blocks.0.attn.qkv.weight" in there
    other = VideoSwin(SHAPE)
    other.load_state_dict(official.from_official(there))
    for key, value in other.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[key])


def test_what_is_left_out_is_exposed_and_what_is_unknown_stays():
    there = official.to_official(Bevt(SHAPE, vocab_size=5).state_dict())
    extra = {
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(18, 18, dtype=torch.long),
        "backbone.layers.0.attn_mask": torch.zeros(1),
        "cls_head.vae_encoder.blocks.input.w": torch.zeros(1),
    }
    dropped = []
    ours = official.from_official({**there, **extra, "backbone.novelty": torch.zeros(1)}, dropped)
    assert dropped == list(extra)
    assert "novelty" in ours
    with pytest.raises(CheckpointError, match="novelty is unexpected"):
        official.load(Bevt(SHAPE, vocab_size=5), ours)


def test_moving_averages_are_a_choice():
    plain = official.to_official(Classifier(SHAPE, classes=3).state_dict())
    averages = {"ema_" + key.replace(".", "_"): value + 1 for key, value in plain.items()}
    both, key = {**plain, **averages}, "encoder.norm.weight"
    with pytest.warns(UserWarning, match="ema=True or ema=False"):
        assert official.from_official(both)[key][0] == 1
    dropped = []
    assert official.from_official(both, dropped, ema=False)[key][0] == 1
    assert official.from_official(both, ema=True)[key][0] == 2
    assert dropped == list(averages)
    del both["ema_backbone_norm_weight"]
    with pytest.raises(CheckpointError, match=r"no moving average of backbone\.norm\.weight"):
        official.from_official(both, ema=True)


def _image_checkpoint(window=3):
    """A 2-D Swin as Microsoft's code names it, with a fine-tuning norm and a classifier of its own."""
    swin = torchvision_models().swin_transformer
    model = swin.SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 2, 2, 4], [window, window], num_classes=6)
    weights = official_names(randomise(model).state_dict(), clips=False)
    return model, weights


def test_an_inflated_image_model_sees_a_still_clip_as_the_image():
    theirs, weights = _image_checkpoint()
    model = Bevt(VideoSwinConfig(**{**vars(SHAPE), "window": (1, 3, 3)}), vocab_size=5).eval()
    official.initialise(model, {"model": weights}, model.config)
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = torchvision_features(theirs, image, clips=False)
        still = model.encoder.stages(image[:, :, None].repeat(1, 1, 4, 1, 1))
        assert model.image_stem is not None
        alone = model.encoder.stages_of(model.image_stem(image)[:, None])
    # time steps of a window of one never meet, and both frames of a tubelet carry half the patch
    for clip, picture, their in zip(still, alone, expected):
        for step in (clip[:, 0], clip[:, 1], picture[:, 0]):
            torch.testing.assert_close(step, their, atol=1e-5, rtol=1e-5)


def test_inflation_formulas_and_what_is_not_transferred():
    _, weights = _image_checkpoint()
    table = weights["layers.2.blocks.1.attn.relative_position_bias_table"]
    weights |= {"fc_norm.weight": torch.full((64,), 3.0), "fc_norm.bias": torch.full((64,), 4.0)}
    weights |= {"mask_token": torch.ones(1, 1, 8), "lm_head.weight": torch.zeros(5, 64), "layers.0.attn_mask": table}
    dropped = []
    ours = official.inflate_image_checkpoint({"module": weights}, SHAPE, dropped)
    kernel = weights["patch_embed.proj.weight"]
    assert torch.equal(ours["encoder.stem.projection.weight"], torch.stack([kernel / 2, kernel / 2], dim=2))
    assert torch.equal(ours["image_stem.projection.weight"], kernel)
    for stem in ("encoder.stem.", "image_stem."):
        assert torch.equal(ours[stem + "projection.bias"], weights["patch_embed.proj.bias"])
        assert torch.equal(ours[stem + "norm.weight"], weights["patch_embed.norm.weight"])
    inflated = ours["encoder.stage.2.blocks.1.attention.relative_position_bias_table"]
    assert torch.equal(inflated.view(3, 25, 2), table.expand(3, 25, 2))
    assert (ours["encoder.norm.weight"] == 3).all() and (ours["encoder.norm.bias"] == 4).all()
    assert (ours["mask_token.vector"] == 1).all()
    indices = [key for key in weights if key.endswith("relative_position_index")]
    assert set(dropped) == {"head.weight", "head.bias", "lm_head.weight", "layers.0.attn_mask", *indices}
    assert not any(key.startswith(("head.", "class_head.", "fc_norm")) for key in ours)


def test_inflation_resizes_another_spatial_window_bicubically():
    _, weights = _image_checkpoint(window=4)
    ours = official.inflate_image_checkpoint(weights, SHAPE)
    table = weights["layers.3.blocks.0.attn.relative_position_bias_table"]  # (49, 4)
    square = F.interpolate(table.T.view(1, 4, 7, 7), size=(5, 5), mode="bicubic", align_corners=False)
    expected = square.view(4, 25).T.repeat(3, 1)
    assert torch.equal(ours["encoder.stage.3.blocks.0.attention.relative_position_bias_table"], expected)


def test_our_own_image_model_starts_a_joint_one():
    image_model = randomise(Bevt(SHAPE, vocab_size=5, streams=("images",)))
    joint = Bevt(SHAPE, vocab_size=5).eval()
    report = official.initialise(joint, {"model." + k: v for k, v in image_model.state_dict().items()}, SHAPE)
    assert all(key.startswith(("clip_decoder.", "head.")) for key in report.missing)
    assert set(report.dropped) == {"head.weight", "head.bias"}
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    with torch.no_grad():
        assert torch.equal(joint.image_features(images, mask), image_model.image_features(images, mask))
    # an image only ever used the plane of temporal offset 0
    key = "encoder.stage.1.blocks.0.attention.relative_position_bias_table"
    planes = joint.state_dict()[key].view(3, 25, 2)
    assert torch.equal(planes, image_model.state_dict()[key][25:50].expand(3, 25, 2))


def test_inflation_refuses_clip_checkpoints():
    there = official.to_official(Bevt(SHAPE, vocab_size=5, streams=("clips",)).state_dict())
    with pytest.raises(CheckpointError, match=r"of 4 axes, here is one of shape \(8, 3, 2, 4, 4\)"):
        official.inflate_image_checkpoint(there, SHAPE)


def test_bias_tables_resize_trilinearly():
    weights = {"a.relative_position_bias_table": torch.randn(15 * 13 * 13, 4), "b": torch.randn(3)}
    resized = official.resize_bias_tables(weights, (8, 7, 7), (16, 7, 7))
    table = weights["a.relative_position_bias_table"]
    volume = F.interpolate(table.T.view(1, 4, 15, 13, 13), size=(31, 13, 13), mode="trilinear", align_corners=False)
    assert torch.equal(resized["a.relative_position_bias_table"], volume.view(4, -1).T)
    assert resized["b"] is weights["b"]
    unchanged = official.resize_bias_tables(weights, (8, 7, 7), (8, 7, 7))
    assert torch.equal(unchanged["a.relative_position_bias_table"], table)
    with pytest.raises(CheckpointError, match=r"has 2535 rows but the window \(16, 7, 7\) needs 5239"):
        official.resize_bias_tables(weights, (16, 7, 7), (8, 7, 7))


def test_fine_tuning_starts_from_the_joint_model_with_a_longer_window():
    joint = randomise(Bevt(SHAPE, vocab_size=5))
    longer = VideoSwinConfig(**{**vars(SHAPE), "window": (4, 3, 3)})
    classifier = Classifier(longer, classes=3)
    head = classifier.class_head.weight.clone()
    with pytest.warns(UserWarning, match=r"from the window \(2, 3, 3\) to \(4, 3, 3\)"):
        report = official.initialise(classifier, official.to_official(joint.state_dict()), longer)
    assert report.missing == ["class_head.weight", "class_head.bias"]
    assert torch.equal(classifier.class_head.weight, head)
    expected = official.resize_bias_tables(joint.state_dict(), (2, 3, 3), (4, 3, 3))
    for key, value in classifier.encoder.state_dict().items():
        assert torch.equal(value, expected["encoder." + key]), key
    assert {key.split(".")[0] for key in report.unexpected} == {
        "image_stem",
        "mask_token",
        "image_decoder",
        "clip_decoder",
        "head",
    }


def test_a_class_head_of_another_dataset_is_left_out_and_reported():
    source, target = Classifier(SHAPE, classes=400), Classifier(SHAPE, classes=174)
    report = official.initialise(target, source.state_dict(), SHAPE)
    assert report.dropped == ["class_head.weight", "class_head.bias"] == report.missing
    assert "2 dropped: class_head.weight, class_head.bias" in str(report)


def test_an_encoder_that_does_not_fit_whole_is_refused():
    weights = Bevt(SHAPE, vocab_size=5).state_dict()
    del weights["encoder.stage.2.blocks.1.mlp.fc1.weight"]
    with pytest.raises(CheckpointError, match=r"encoder\.stage\.2\.blocks\.1\.mlp\.fc1\.weight is missing"):
        official.initialise(Bevt(SHAPE, vocab_size=5), weights, SHAPE)
