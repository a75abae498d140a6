"""Reading files that may be damaged or hostile, and loading that names every key."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bevt_fast.errors import CheckpointError
from bevt_fast.models.weights import load, read, unwrap


@pytest.fixture
def weights():
    return {"weight": torch.randn(3, 2), "bias": torch.randn(3)}


@pytest.mark.parametrize("wrap", ["model", "module", "state_dict", None])
def test_reads_pickles_and_safetensors(tmp_path, weights, wrap):
    torch.save({wrap: weights, "meta": {"epoch": 3, "config": "text"}} if wrap else weights, tmp_path / "a.pth")
    save_file(weights, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        found = read(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)


def test_the_outer_name_that_counts_is_the_official_one(weights):
    other = {"weight": torch.zeros(1)}
    assert unwrap({"state_dict": other, "module": other, "model": weights}) == weights
    assert unwrap({"state_dict": other, "module": weights}) == weights
    with pytest.raises(CheckpointError, match=r"no tensors .* its keys are epoch"):
        unwrap({"epoch": 3})


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_never_runs_code_from_a_file(tmp_path, legacy):
    target = tmp_path / "ran"
    file = tmp_path / "hostile.pth"
    torch.save({"state_dict": _Hostile(target)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match="would run code"):
        read(file)
    file.write_bytes(pickle.dumps(_Hostile(target), protocol=2))
    with pytest.raises(CheckpointError, match=r"would run code when opened \(posix\.mkdir\)"):
        read(file)
    assert not target.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoint_are_named(tmp_path, weights, suffix):
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*absent"):
        read(tmp_path / f"absent{suffix}")
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        read(tmp_path)
    page = tmp_path / f"page{suffix}"
    page.write_text("\n<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        read(page)
    whole = tmp_path / f"whole{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(weights, whole)
    content = whole.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"whole\.\w+ is (truncated|damaged)"):
            read(whole)
    whole.write_bytes(b"not a checkpoint at all, only text that goes on for a while")
    with pytest.raises(CheckpointError, match=r"whole\.\w+ is (truncated|damaged)"):
        read(whole)


def test_a_pickle_of_something_else_is_named(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        read(tmp_path / "list.pth")


def test_every_key_that_does_not_fit_is_listed_and_nothing_is_loaded(weights):
    module = nn.Linear(2, 3)
    before = module.weight.clone()
    with pytest.raises(CheckpointError) as raised:
        load(module, {"weight": weights["weight"].T, "one": weights["bias"], "two": weights["bias"]})
    for fault in ("weight is (2, 3) in the checkpoint but (3, 2) in the model", "bias is missing", "one is unexpected"):
        assert fault in str(raised.value)
    assert "two is unexpected" in str(raised.value)
    assert "set model.size" in str(raised.value)
    with pytest.raises(CheckpointError, match="bias is missing"):
        load(module, {"weight": weights["weight"]})
    assert torch.equal(module.weight, before)


def test_what_is_allowed_is_reported(weights):
    module = nn.Linear(2, 3)
    bias = module.bias.clone()
    patterns = {"allow_missing": ["bi*"], "allow_unexpected": ["extra.*"]}
    report = load(module, {"weight": weights["weight"], "extra.a": weights["bias"]}, **patterns)
    assert report == (["weight"], ["bias"], ["extra.a"], [])
    assert str(report) == "1 tensors loaded; 1 missing: bias; 1 unexpected: extra.a"
    assert torch.equal(module.weight, weights["weight"])
    assert torch.equal(module.bias, bias)


def test_a_table_of_another_window_names_its_remedy():
    module = nn.Module()
    module.relative_position_bias_table = nn.Parameter(torch.zeros(5, 2))
    with pytest.raises(CheckpointError, match=r"is \(9, 2\) .* but \(5, 2\).*resize_bias_tables"):
        load(module, {"relative_position_bias_table": torch.zeros(9, 2)})
