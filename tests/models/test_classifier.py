"""The fine-tuning model (SPEC 1.7)."""

import torch
import torch.nn.functional as F

from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from tests.models.oracles import randomise

SHAPE = VideoSwinConfig(embed_dim=8, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), window=(2, 3, 3), drop_path=0.0)


def test_parameter_counts_of_the_specification():
    for window, classes, count in (((8, 7, 7), 400, 88_048_984), ((16, 7, 7), 174, 88_834_038)):
        with torch.device("meta"):
            model = Classifier(VideoSwinConfig.preset("base", window=window), classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_is_the_mean_of_the_normalised_last_stage_scored():
    model, clips = randomise(Classifier(SHAPE, classes=7)), torch.randn(2, 3, 6, 64, 96)
    with torch.no_grad():
        stage4 = model.encoder.stages(clips)[3]
        norm, head = model.encoder.norm, model.class_head
        normal = F.layer_norm(stage4, (64,), norm.weight, norm.bias, 1e-5)
        expected = normal.flatten(1, 3).mean(1) @ head.weight.T + head.bias
        torch.testing.assert_close(model(clips), expected)


def test_dropout_only_while_training():
    model, clips = randomise(Classifier(SHAPE, classes=7, dropout=0.5)), torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(clips), model(clips))
        model.train()
        assert not torch.equal(model(clips), model(clips))


def test_the_class_head_starts_at_normal_001():
    weight = Classifier(SHAPE, classes=200).class_head.weight
    assert abs(weight.std() - 0.01) < 3 * 0.01 / (2 * weight.numel()) ** 0.5
