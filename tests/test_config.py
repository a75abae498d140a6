"""A run is a file: every shipped file loads, and every mistake is named in one sentence."""

import json
from pathlib import Path

import pytest

from bevt_fast import config
from bevt_fast.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.json"))  # those of fine-tuning: test_finetune_config.py


def values(**changes):
    stream = {"source": {"name": "file_list", "options": {"root": "x"}}, "batch": 8, "micro_batch": 4}
    return {
        "output": "runs/x",
        "clips": stream | {"mask": {"name": "tube"}},
        "images": stream | {"mask": {"name": "blockwise"}},
        "tokenizer": {"name": "dalle", "options": {"weights": "w"}},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2},
    } | changes


def refusal(tmp_path, text, *overrides):
    path = tmp_path / "run.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ConfigError) as caught:
        config.load(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_files_load_and_name_parts_that_exist(path):
    loaded = config.load(path)
    rooms = [("bevt_fast.tokenizers", loaded.tokenizer)]
    for stream in (loaded.clips, loaded.images):
        if stream:
            rooms += [("bevt_fast.data.sources", stream.source), ("bevt_fast.data.masking", stream.mask)]
    for room, part in rooms:
        config.open_part(room, part)
    assert config.accumulation(loaded, 1) >= 1


def test_the_paper_recipe_is_the_papers():
    joint = config.load(ROOT / "configs/joint.json")  # SPEC 4, 5.2
    assert joint.clips and joint.images
    assert (joint.clips.batch, joint.images.batch) == (256, 2048)
    assert (joint.optim.lr, joint.optim.betas, joint.optim.weight_decay, joint.optim.grad_clip) == (
        5e-4,
        (0.9, 0.999),
        0.05,
        3.0,
    )
    assert (joint.train.epochs, joint.optim.warmup_epochs, joint.model.drop_path) == (150, 10, 0.3)
    assert config.accumulation(joint, 32) == 1 and config.accumulation(joint, 8) == 4


@pytest.mark.parametrize(
    "key", [k for k in values()] + ["clips.mask", "clips.source.options", "optim.lr", "train.steps"]
)
def test_every_misspelling_is_named_with_its_remedy(tmp_path, key):
    wrong = json.loads(json.dumps(values()))
    *outer, last = key.split(".")
    place = wrong
    for name in outer:
        place = place[name]
    place[last[:-1] + "_"] = place.pop(last)
    message = refusal(tmp_path, wrong)
    assert f"has no key {last[:-1] + '_'!r}" in message and last in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"train": {"steps": 2, "precision": "int8"}},
            "train: precision: expected one of 'bf16', 'fp16', 'fp32', got 'int8'",
        ),
        ({"seed": "zero"}, "seed: "),
        ({"seed": True}, "seed: "),
        ({"clips": None, "images": None}, "needs the key 'clips' or 'images'"),
        ({"train": {}}, "needs the key 'epochs' or 'steps'"),
        (
            {"deepspeed": {"gradient_clipping": 1.0}},
            "deepspeed.gradient_clipping is set by optim.grad_clip; write it there",
        ),
        (
            {"deepspeed": {"bf16": {"enabled": True}}},
            "deepspeed.bf16.enabled is set by train.precision; write it there",
        ),
        ({"optim": {"lr": 1e-3, "warmup_steps": 1, "warmup_epochs": 1}}, "write one of them"),
        ({"model": {"size": "huge"}}, "model: size: expected one of 'tiny', 'small', 'base', 'large', got 'huge'"),
        ({"optim": {"lr": -1}}, "optim: lr: "),
        (
            {"clips": values()["clips"] | {"view": {"colour_jitter": 0.4}}},
            "clips.view.colour_jitter is 0.4, but only images are jittered (SPEC 5.3); leave it out",
        ),
    ],
)
def test_wrong_values_are_sentences(tmp_path, change, said):
    assert said in refusal(tmp_path, values(**change))


def test_files_that_are_no_configuration(tmp_path):
    assert "run.json:2: not valid JSON" in refusal(tmp_path, '{\n"a": }')
    assert "'seed' is written twice" in refusal(tmp_path, '{"seed": 1, "seed": 2}')
    assert "expected one JSON object" in refusal(tmp_path, "[]")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*missing\.json"):
        config.load(tmp_path / "missing.json")


def test_overrides_are_typed_and_checked(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(values()))
    loaded = config.load(path, ["train.steps=7", "output=runs/other", "optim.betas=[0.8, 0.9]", "model.size=tiny"])
    assert (loaded.train.steps, loaded.output, loaded.optim.betas, loaded.model.size) == (
        7,
        "runs/other",
        (0.8, 0.9),
        "tiny",
    )
    assert "did you mean 'steps'" in refusal(tmp_path, values(), "train.stepz=7")
    assert "expected KEY=VALUE" in refusal(tmp_path, values(), "train.steps")
    assert "which has no keys" in refusal(tmp_path, values(), "output.x=1")


def test_unknown_parts_list_what_there_is():
    with pytest.raises(
        ConfigError, match=r"bevt_fast.tokenizers has no part 'dale'; it has: dalle, .*did you mean 'dalle'"
    ):
        config.open_part("bevt_fast.tokenizers", config.Part(name="dale"))
    with pytest.raises(ConfigError, match=r"options: .*has no key 'wieghts'; did you mean 'weights'"):
        config.open_part("bevt_fast.tokenizers", config.Part(name="dalle", options={"wieghts": "x"}))


def test_batch_numbers_must_agree():
    loaded = config.parse(config.Config, values(), "here")
    assert config.accumulation(loaded, 1) == 2 and config.accumulation(loaded, 2) == 1
    with pytest.raises(ConfigError, match=r"8 / \(4 \* 3\)"):
        config.accumulation(loaded, 3)
    uneven = values()
    uneven["images"] = uneven["images"] | {"micro_batch": 8}
    with pytest.raises(ConfigError, match="same number of micro-batches"):
        config.accumulation(config.parse(config.Config, uneven, "here"), 1)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_resolved_file_is_the_same_run_with_every_default_said(path, tmp_path):
    loaded = config.load(path)
    values = config.resolved(loaded)
    (tmp_path / "again.json").write_text(json.dumps(values))
    assert config.resolved(config.load(tmp_path / "again.json")) == values
    assert values["optim"]["eps"] == 1e-8  # torch's default, in no shipped file
    for name in loaded.streams:
        assert {"ratio", "min_block"} <= values[name]["mask"]["options"].keys()
        assert "root" in values[name]["source"]["options"]


def test_deepspeed_gets_what_other_sections_own():
    loaded = config.parse(
        config.Config, values(deepspeed={"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}), "here"
    )
    assert config.deepspeed_config(loaded, 1) == {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 3.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }


def test_every_key_is_explained():
    page = (ROOT / "configs" / "README.md").read_text()
    sections = [config.Config, config.Stream, config.View, config.Model, config.CustomSize, config.Optim]
    for section in [*sections, config.Train, config.Data]:
        for key in section.model_fields:
            assert f"`{key}`" in page or f'"{key}"' in page, f"{section.__name__}.{key} is not in configs/README.md"
