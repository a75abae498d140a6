"""What a newcomer runs first learns what it promises: the demo, whole, from the files it writes to the pictures."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(900)
def test_the_demo_learns_both_streams(program, tmp_path: Path) -> None:
    """Held-out accuracy at least 2.5 times the commonest token's share and 8 points above it, in both streams."""
    config = json.loads((ROOT / "configs" / "demo.json").read_text())
    for stream in ("clips", "images"):
        for source in ("source", "heldout"):
            config[stream][source]["options"]["root"] = str(tmp_path / "moving_shapes")
    config["tokenizer"]["options"]["weights"] = str(tmp_path / "tokens.safetensors")
    config["output"] = str(tmp_path / "run")
    (tmp_path / "demo.json").write_text(json.dumps(config))
    done = program("bevt_fast/train.py", "--config", tmp_path / "demo.json", timeout=800, check=0)

    reached = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert reached.keys() == {"clips", "images"}
    for stream, score in reached.items():
        assert score["accuracy"] >= 2.5 * score["commonest"], stream
        assert score["accuracy"] >= score["commonest"] + 0.08, stream
        assert f"held-out {stream}: {score['accuracy']:.1%}" in done.stderr
    for picture in ("clips.png", "images.png", "loss_curve.png"):
        assert (tmp_path / "run" / "pictures" / picture).read_bytes().startswith(b"\x89PNG")
    steps = config["train"]["steps"]
    assert load_file(tmp_path / "run" / "checkpoints" / f"step_{steps:08d}" / "model.safetensors")
