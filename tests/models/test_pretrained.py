"""Starts: every family's weights give every family's features, and every key is accounted for."""

import importlib
from dataclasses import replace

import pytest
import torch

from bevt_fast.errors import CheckpointError
from bevt_fast.models import official, pretrained, torchvision_names
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from tests.models.oracles import randomise, torchvision_models

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.0)
FLAT = {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)}


def started(weights, shape=SHAPE, classes=5, **options):
    classifier = Classifier(shape, classes).eval()
    return classifier, pretrained.start(classifier, weights, shape, **options)


def accounted_for(report, classifier) -> None:
    """Each key of the model is used or missing, and none is said twice."""
    assert sorted([*report.used, *report.missing]) == sorted(classifier.state_dict())
    assert len(set(report.unused)) == len(report.unused) and set(report.resized) <= set(report.used)


def library(name: str):
    torchvision_models()  # timm and transformers import torchvision, which may lack its compiled part
    return pytest.importorskip(name, reason="an oracle of the [test] extra")


def flat_model(family: str) -> torch.nn.Module:
    """A 2-D Swin of another library, 96 pixels, window 3."""
    if family == "torchvision":
        swin = importlib.import_module("torchvision.models.swin_transformer")
        return swin.SwinTransformer([4, 4], 8, [1, 1, 2, 1], [1, 2, 2, 4], [3, 3], stochastic_depth_prob=0.0)
    if family == "timm":
        return library("timm").models.SwinTransformer(img_size=96, window_size=3, drop_path_rate=0.0, **FLAT)
    transformers = library("transformers")
    config = transformers.SwinConfig(image_size=96, window_size=3, drop_path_rate=0.0, **FLAT)
    return transformers.SwinForImageClassification(config)


def flat_features(family: str, model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The mean over the last grid after the final norm."""
    if family == "torchvision":
        return model.norm(model.features(images)).mean(dim=(1, 2))  # pyright: ignore[reportCallIssue]
    if family == "timm":
        return model.forward_features(images).mean(dim=(1, 2))  # pyright: ignore[reportCallIssue]
    return model.swin(images).pooler_output  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("family", ["torchvision", "timm", "transformers"])
def test_a_2d_swin_sees_a_still_clip_as_its_own_image(family):
    torchvision_models()
    model = randomise(flat_model(family))
    classifier, report = started(model.state_dict())
    accounted_for(report, classifier)
    assert report.missing == ["class_head.weight", "class_head.bias"] and not report.resized
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        theirs = flat_features(family, model, images)
        ours = classifier.encoder(images[:, :, None].repeat(1, 1, 2, 1, 1)).mean(dim=(1, 2, 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_torchvision_video_weights():
    swin = torchvision_models().video.swin_transformer
    model = randomise(swin.SwinTransformer3d([2, 4, 4], 8, [1, 1, 2, 1], [1, 2, 2, 4], [2, 3, 3]))
    classifier, report = started(model.state_dict())
    accounted_for(report, classifier)
    assert {"class_head.weight", "class_head.bias"} <= set(report.unused)  # of 400 classes
    assert sum(key.endswith("relative_position_index") for key in report.unused) == 5
    clips = torch.randn(1, 3, 4, 96, 96)
    with torch.no_grad():
        x = model.pos_drop(model.patch_embed(clips))
        theirs = model.norm(model.features(x)).mean(dim=(1, 2, 3))
        torch.testing.assert_close(classifier.encoder(clips).mean(dim=(1, 2, 3)), theirs, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def swin3d_t():
    return randomise(torchvision_models().video.swin3d_t())


@pytest.mark.parametrize(
    ("clip", "bias_index"), [((4, 224, 224), "true"), ((18, 64, 96), "official")], ids=["whole", "clipped"]
)
def test_the_classifier_agrees_with_torchvisions_swin3d_t(swin3d_t, clip, bias_index):
    """Their weights here and back: the same logits, the same bits. Windows clipped in height or width have the official
    index there (SPEC X2).
    """
    shape, theirs = VideoSwinConfig.preset("tiny"), swin3d_t.state_dict()
    ours = Classifier(shape, 400, bias_index=bias_index).eval()
    report = pretrained.start(ours, theirs, shape)
    accounted_for(report, ours)
    assert not report.missing and len(report.used) == len(ours.state_dict())  # the head of 400 classes too
    pixels = torch.randn(1, 3, *clip)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), swin3d_t(pixels), rtol=1e-5, atol=1e-5)
    back = torchvision_names.to_torchvision(ours.state_dict(), shape)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], value) for key, value in theirs.items())


def test_a_swin_without_tables_is_one_sentence():
    weights = {k: v for k, v in Bevt(SHAPE, vocab_size=7).state_dict().items() if not k.endswith(official.TABLE)}
    with pytest.raises(CheckpointError, match="no Swin with relative positions"):
        started(weights)


def test_our_pretraining_and_the_official_one_give_the_same_start():
    model = Bevt(SHAPE, vocab_size=7)
    ours, report = started(model.state_dict())
    theirs, official_report = started({"state_dict": official.to_official(model.state_dict())})
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(ours.encoder.state_dict()[name], value)
        assert torch.equal(theirs.encoder.state_dict()[name], value)
    for found, classifier in ((report, ours), (official_report, theirs)):
        accounted_for(found, classifier)
        assert {"mask_token.vector", "head.weight", "image_stem.projection.weight"} <= set(found.unused)
        assert found.missing == ["class_head.weight", "class_head.bias"]
    assert "unused: " in str(report) and "start anew" in str(report)


def test_a_fine_tuned_head_is_taken_where_it_fits():
    weights = official.to_official(Classifier(SHAPE, 5).state_dict())
    classifier, report = started(weights)
    assert not report.missing and torch.equal(classifier.class_head.weight, weights["cls_head.fc_cls.weight"])
    _, report = started(weights, classes=6)
    assert report.missing == ["class_head.weight", "class_head.bias"] and "class_head.weight" in report.unused


def test_tables_are_resized_only_when_told():
    weights = Bevt(SHAPE, vocab_size=7).state_dict()
    wide = replace(SHAPE, window=(4, 3, 3))
    with pytest.raises(CheckpointError, match=r"75 rows.*\(4, 3, 3\).*set model.pretrained_window"):
        started(weights, wide)
    classifier, report = started(weights, wide, pretrained_window=(2, 3, 3))
    name = "encoder.stage.2.blocks.1.attention.relative_position_bias_table"
    assert name in report.resized and len(report.resized) == 5
    expected = official.resize_bias_tables(weights, (2, 3, 3), (4, 3, 3))[name]
    assert torch.equal(classifier.state_dict()[name], expected)
    with pytest.raises(CheckpointError, match="75 rows but the window"):
        started(weights, wide, pretrained_window=(3, 3, 3))
    _, report = started(weights, pretrained_window=(2, 3, 3))
    assert not report.resized


def test_2d_tables_are_resized_only_when_told():
    torchvision_models()
    weights = flat_model("torchvision").state_dict()
    wide = replace(SHAPE, window=(2, 4, 4))
    with pytest.raises(CheckpointError, match=r"25 rows.*set\s+model.pretrained_window"):
        started(weights, wide)
    _, report = started(weights, wide, pretrained_window=(1, 3, 3))
    assert len(report.resized) == 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embed_dim": 16}, "8 wide after its stem, the model 16; set model.size"),
        ({"patch": (2, 2, 2)}, r"patches of \(2, 4, 4\), the model of \(2, 2, 2\)"),
        ({"depths": (1, 1, 4, 1)}, r"\(1, 1, 2, 1\) blocks, the model \(1, 1, 4, 1\)"),
        ({"heads": (2, 2, 2, 4)}, "1 heads in its first stage, the model 2"),
        ({"window": (2, 5, 5)}, "another window"),
        ({"mlp_ratio": 2.0}, "fc1.weight"),
    ],
)
def test_another_shape_is_one_sentence(change, said):
    weights = Bevt(SHAPE, vocab_size=7).state_dict()
    with pytest.raises(CheckpointError, match=said) as caught:
        started(weights, replace(SHAPE, **change))
    assert "\n" not in str(caught.value)


def test_what_is_no_swin_is_refused():
    with pytest.raises(CheckpointError, match="no patch embedding"):
        started({"layer1.0.conv.weight": torch.zeros(3)})
    weights = Bevt(SHAPE, vocab_size=7).state_dict()
    del weights["encoder.stage.3.blocks.0.mlp.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of the encoder, the first is .*fc2\.bias"):
        started(weights)
