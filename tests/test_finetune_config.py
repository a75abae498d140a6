"""Fine-tuning files: every shipped one loads, the recipes are the paper's, every mistake is one sentence."""

import json
from pathlib import Path

import pytest

from bevt_fast import config, finetune_config
from bevt_fast.errors import ConfigError
from bevt_fast.finetune_config import load_finetune

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "finetune").glob("*.json"))
DEMO = json.loads((ROOT / "configs" / "finetune" / "demo.json").read_text())


def refusal(tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(DEMO))
    with pytest.raises(ConfigError) as caught:
        load_finetune(path, overrides)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shipped_files_load_and_the_resolved_ones_say_the_same_run(path, tmp_path):
    loaded = load_finetune(path)
    values = finetune_config.resolved(loaded)
    (tmp_path / "again.json").write_text(json.dumps(values))
    assert finetune_config.resolved(load_finetune(tmp_path / "again.json")) == values
    assert {"root", "min_frames"} <= values["data"]["source"]["options"].keys() or path.stem.startswith("demo")
    assert config.accumulation(loaded, 1) >= 1
    assert config.deepspeed_config(loaded, 1)["gradient_clipping"] == loaded.optim.grad_clip


def test_the_recipes_are_those_of_the_specification():
    """SPEC 6.1."""
    kinetics, something = (load_finetune(ROOT / f"configs/finetune/{n}.json") for n in ("kinetics400", "something_v2"))
    assert (kinetics.optim.lr, kinetics.optim.weight_decay, kinetics.optim.layer_decay) == (3e-4, 0.001, 0.9)
    assert (something.optim.lr, something.optim.weight_decay, something.optim.encoder_lr) == (5e-4, 0.05, 0.1)
    for recipe, classes, clipped, dropped in ((kinetics, 400, 40.0, 0.3), (something, 174, 0.0, 0.4)):
        assert (recipe.model.classes, recipe.model.dropout, recipe.model.drop_path) == (classes, 0.5, dropped)
        assert (recipe.train.epochs, recipe.data.batch, recipe.optim.warmup_epochs) == (60, 64, 2.5)
        assert (recipe.optim.grad_clip, recipe.optim.cosine, recipe.optim.warmup_start) == (clipped, "epoch", 0.1)
        assert recipe.views.scale == (0.08, 1.0) and recipe.views.ratio == (0.75, 4 / 3)
    assert config.accumulation(kinetics, 8) == 4 and config.accumulation(something, 8) == 8
    assert (kinetics.views.flip, something.views.flip, something.views.erasing) == (0.5, 0.0, 0.25)
    assert something.views.randaugment and something.views.randaugment.hidden_flip_and_crop
    assert something.train.ema and something.train.label_smoothing == 0.1
    assert something.model.pretrained_window == (8, 7, 7) and something.model.window == (16, 7, 7)
    assert (kinetics.test.clips, kinetics.test.crops, something.test.clips) == (4, 3, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.modee=knn", "did you mean 'mode'"),
        ("views.randaugment.k=3", "RandAugment has no key 'k'"),
        ("train.mode=probe", "expected one of 'finetune', 'linear', 'attentive', 'knn', got 'probe'"),
        ("data.heldout=null", "no validation list"),
        ("optim.layer_decay=1.5", "optim: layer_decay"),
        ("views.scale=[0.5, 0.1]", "scale must be a range"),
        ("views.scale=[0.5, 2.0]", "at most 1, got 2"),
        ("views.size=100", "not a multiple of 32"),
        ("model.weights=x", "write pretrained"),
        ("model.pretrained_window=[2, 3, 3]", "pretrained, which is not set"),
        ("model.classes=1", "model: classes"),
        ("train.steps=null", "needs the key 'epochs' or 'steps'"),
        ("data.decoder=dali", "data: decoder"),
        ("data.micro_batch=1", "views.twins pairs the clips of a micro-batch, and data.micro_batch is 1; make it even"),
        ("views.twins=2", "views: twins"),
        ('deepspeed={"gradient_clipping": 1}', "optim.grad_clip"),
    ],
)
def test_mistakes_are_sentences(tmp_path, override, said):
    assert said in refusal(tmp_path, override)


def test_two_answers_to_one_question_are_refused(tmp_path):
    assert "write one of them" in refusal(tmp_path, "optim.layer_decay=0.9", "optim.encoder_lr=0.1")
    assert "a head alone" in refusal(tmp_path, "train.mode=linear", "train.ema=true")
    assert "probe_heads 7" in refusal(tmp_path, "train.mode=attentive", "train.probe_heads=7")
    assert "no validation list" in refusal(tmp_path, "train.mode=knn", "data.heldout=null", "train.validate_every=0")


def test_every_key_is_explained():
    page = (ROOT / "configs" / "README.md").read_text()
    sections = [getattr(finetune_config, name) for name in ("FinetuneConfig", "FinetuneData", "Views", "RandAugment")]
    sections += [getattr(finetune_config, name) for name in ("FinetuneModel", "FinetuneOptim", "FinetuneTrain", "Test")]
    for section in sections:
        for key in section.model_fields:
            assert f"`{key}`" in page or f'"{key}"' in page, f"{section.__name__}.{key} is not in configs/README.md"
