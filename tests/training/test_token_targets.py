"""A run with a token cache is the run without it, bit for bit; and a cache of anything else is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bevt_fast import prepare, tokenizers
from bevt_fast.config import load
from bevt_fast.data import token_cache
from bevt_fast.data.loader import Loader
from bevt_fast.data.reader import StreamReader, draw
from bevt_fast.data.sources import build
from bevt_fast.errors import DataError
from bevt_fast.tokenizers.patch_kmeans import PatchKMeans
from bevt_fast.train import hidden_targets
from bevt_fast.training import token_targets
from tests.training.command import ROOT, alone, changed, environment, rows, train_here, written

VIEWS = {"data.views": 2, "train.steps": 14}  # 14 steps are two and a third passes over the clips


def compared(output: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "data/not_cached"} for row in rows(output)]


def not_cached(output: Path) -> int:
    return rows(output)[-1]["data/not_cached"]


def prepared(*arguments: str | Path | int) -> int:
    return prepare.main(["tokens", *map(str, arguments)])


def using(cache: Path) -> dict[str, Any]:
    return VIEWS | {"data.token_cache": str(cache)}


@pytest.fixture(scope="module")
def repeated(tiny, tmp_path_factory) -> Path:
    """The output of the tiny run with two views of each sample, tokenized in training."""
    output = tmp_path_factory.mktemp("repeated") / "run"
    config = written(
        changed(tiny, {"output": str(output), "train.save_every": 100} | VIEWS), output.with_suffix(".json")
    )
    with alone(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("bevt_fast.training.run.Run.finish", lambda run: None)
        assert train_here("--config", config) == 0
    return output


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cache")
    config = written(changed(tiny, {"output": "unused"} | VIEWS), place / "tiny.json")
    assert prepared("--config", config, "--out", place / "ids", "--batch", 7, "--workers", 0) == 0
    return place / "ids"


# -- the same run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_with_the_cache_has_the_bits_of_the_run_without(repeated, cache, settings, here, monkeypatch, workers):
    def asked(*_: Any) -> Any:
        raise AssertionError("the tokenizer was asked")

    monkeypatch.setattr(PatchKMeans, "forward", asked)
    config = settings(using(cache) | {"data.workers": workers})
    done = here(config)
    assert done.code == 0, done.error
    assert compared(config.with_suffix("")) == compared(repeated)
    assert not_cached(config.with_suffix("")) == 0


def test_frames_and_crops_repeat_while_masks_and_order_do_not(tiny, tmp_path):
    for stream in ("images", "clips"):
        drawn = []
        for views in ({}, {"data.views": 2}):
            wide = {f"{stream}.view.short_side": [64, 96], "output": "unused"}
            config = load(written(changed(tiny, wide | views), tmp_path / "c.json"))
            source = build(config.streams[stream].source)
            drawn.append([[draw(config, stream, source, epoch, index) for index in range(20)] for epoch in range(5)])
        free, repeated = drawn
        for epoch, samples in enumerate(repeated):
            for index, sample in enumerate(samples):
                first = free[epoch % 2][index]
                assert (sample.frames, sample.crop) == (first.frames, first.crop)
                assert (sample.mask == free[epoch][index].mask).all()
        assert [s.crop for s in repeated[2]] != [s.crop for s in free[2]]
        assert any((s.mask != t.mask).any() for s, t in zip(repeated[0], repeated[2]))


def test_killed_and_resumed_with_the_cache_has_the_bits_of_the_run_without(repeated, cache, settings, here, background):
    config = settings(using(cache) | {"train.save_every": 3, "data.workers": 1})
    output = config.with_suffix("")
    process = background("--config", config)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / "step_00000003" / "MANIFEST.json").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = here(config, "--resume", "auto")
    assert done.code == 0, done.error
    assert compared(output) == compared(repeated)


def test_the_end_of_a_run_still_has_its_tokenizer(cache, settings, here):
    config = settings(using(cache) | {"clips": None, "train.steps": 2})
    done = here(config, ending=True)
    assert done.code == 0, done.error
    assert (config.with_suffix("") / "pictures" / "images.png").exists()
    assert set(json.loads((config.with_suffix("") / "heldout.json").read_text())) == {"images"}


def test_a_cache_made_anywhere_has_the_same_bytes(tiny, cache, tmp_path):
    config = written(changed(tiny, {"output": "unused"} | VIEWS), tmp_path / "tiny.json")
    assert (
        prepared("--config", config, "--out", tmp_path / "ids", "--batch", 32, "--workers", 2, "--device", "cpu") == 0
    )
    for name in ("images.npy", "clips.npy"):
        assert (tmp_path / "ids" / name).read_bytes() == (cache / name).read_bytes()


# -- bad files and changed files ---------------------------------------------------------------------------------------


def test_substitutes_have_targets_of_their_own_whenever_a_file_goes_bad(tiny, tmp_path, settings):
    """Bad before the cache is made: cached. Bad, mended or changed afterwards: tokenized in training. Never wrong."""
    root = tmp_path / "shapes"
    old = Path(tiny["clips"]["source"]["options"]["root"])
    shutil.copytree(old, root)
    early = [root / "clips" / "train" / "00003.webm", root / "images" / "train" / "00007.jpg"]
    for file in early:
        file.write_bytes(file.read_bytes()[:100])
    here_now = {f"{stream}.source.options.root": str(root) for stream in ("clips", "images")}
    config = settings(VIEWS | here_now)
    assert prepared("--config", config, "--out", tmp_path / "ids") == 0
    bad = [json.loads(line)["path"] for line in (tmp_path / "ids" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(bad) == sorted(map(str, early))

    def both() -> int:
        """Compares the targets of three passes over the clips; returns how many the cache did not have."""
        plain = load(config)
        cached = plain.model_copy(update={"data": plain.data.model_copy(update={"token_cache": str(tmp_path / "ids")})})
        tokenizer = tokenizers.build(plain.tokenizer)
        sources = {name: build(stream.source) for name, stream in plain.streams.items()}
        caches = token_targets.open_caches(cached, sources, tokenizer)
        with closing(Loader(plain, sources)) as theirs, closing(Loader(cached, sources, caches=caches)) as ours:
            for _ in range(36):
                batches = next(ours), next(theirs)
                found, expected = (hidden_targets(tokenizer, batch) for batch in batches)
                for mine, other, ids, wanted in zip(*batches, found, expected):
                    assert mine and other and ids is not None and wanted is not None
                    assert torch.equal(mine.pixels, other.pixels) and torch.equal(mine.mask, other.mask)
                    hidden = mine.mask if ids.ndim == 3 else mine.mask.repeat_interleave(2, dim=1)
                    assert torch.equal(ids[hidden], wanted[hidden])
            assert ours.bad_files == theirs.bad_files
            return ours.not_cached

    assert both() == 0
    (root / "clips" / "train" / "00005.webm").write_bytes(b"")
    (root / "images" / "train" / "00001.jpg").unlink()
    late = both()
    assert late > 0
    for file in early:  # mended
        shutil.copy(old / file.relative_to(root), file)
    mended = both()
    assert mended > late
    shutil.copy(old / "images" / "train" / "00010.jpg", root / "images" / "train" / "00020.jpg")  # another picture
    assert both() > mended


def test_too_many_bad_files_stop_the_making(tiny, tmp_path, capsys):
    root = tmp_path / "shapes"
    shutil.copytree(tiny["images"]["source"]["options"]["root"], root)
    for number in range(9):
        (root / "images" / "train" / f"{number:05}.jpg").write_bytes(b"no picture")
    change = {"output": "unused", "clips": None, "images.source.options.root": str(root), "data.quarantine_share": 0.1}
    config = written(changed(tiny, change | VIEWS), tmp_path / "c.json")
    assert prepared("--config", config, "--out", tmp_path / "ids") == 3
    assert "files of images are bad, more than data.quarantine_share" in capsys.readouterr().err


def test_the_cache_answers_for_the_pixels_it_was_made_of_and_no_others(tiny, cache):
    pytest.importorskip("nvidia.dali")
    config = load(written(changed(tiny, {"output": "unused"} | VIEWS), cache.parent / "dali.json"))
    tokenizer = tokenizers.build(config.tokenizer)
    for name, stream in config.streams.items():
        source = build(stream.source)
        made_of = token_targets.parts(config, name, source, tokenizer)
        shape = token_targets.cells(config, name, source, tokenizer)
        ids = token_cache.open_cache(cache, name, made_of, shape, tokenizer.vocab_size)
        found = []
        for decoder in ("pyav", "dali"):
            data = config.data.model_copy(update={"decoder": decoder, "token_cache": "x"})
            reader = StreamReader(config.model_copy(update={"data": data}), name, source)
            reader.take_targets_from(ids)
            found.append([reader[number] for number in range(3)])
        for ours, theirs in zip(*found):
            assert (ours["known"] >= 0).all()
            for k, pixels in enumerate(theirs["pixels"]):  # DALI converts the colours of videos in its own way
                same = pixels.equal(ours["pixels"][k])
                assert same == (name == "images")
                assert theirs["known"][k].equal(ours["known"][k]) if same else (theirs["known"][k] == -1).all()


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"data.views": 3}, "data.views is 2 there and 3 here"),
        ({"data.decoder": "dali"}, 'data.decoder is "pyav" there and "dali" here'),
        ({"clips.view.flip": 0.0}, "clips.view.flip is 0.5 there and 0.0 here"),
        ({"clips.view.short_side": [64, 80]}, "clips.view.short_side is [64, 64] there and [64, 80] here"),
        ({"clips.view.size": 32}, "clips.view.size is 64 there and 32 here"),
        ({"images.view.colour_jitter": 0.4}, "images.view.colour_jitter is 0.0 there and 0.4 here"),
        ({"clips.source.options.frames": 2}, "clips.source.frames is 4 there and 2 here"),
        ({"clips.source.options.stride": 1}, "clips.source.stride is 2 there and 1 here"),
        ({"images.source.options.split": "test"}, "files is 48 there and 24 here"),
    ],
)
def test_a_cache_of_another_run_is_refused(tiny, cache, tmp_path, change, says):
    config = load(written(changed(tiny, {"output": "unused"} | using(cache) | change), tmp_path / "c.json"))
    sources = {name: build(stream.source) for name, stream in config.streams.items()}
    with pytest.raises(DataError) as refused:
        token_targets.open_caches(config, sources, tokenizers.build(config.tokenizer))
    assert says in str(refused.value)


def test_another_mode_list_or_tokenizer_is_refused(tiny, cache, tmp_path):
    config = load(written(changed(tiny, {"output": "unused"} | using(cache)), tmp_path / "c.json"))
    source, tokenizer = build(config.streams["clips"].source), tokenizers.build(config.tokenizer)

    def refusal(source, tokenizer) -> str:
        with pytest.raises(DataError) as refused:
            token_targets.open_caches(config, {"clips": source}, tokenizer)
        return str(refused.value)

    assert source.frames and isinstance(tokenizer, PatchKMeans)
    uniform = replace(source, frames=source.frames._replace(mode="uniform"))
    assert 'clips.source.mode is "interval" there and "uniform" here' in refusal(uniform, tokenizer)
    assert "clips.source.min_frames is 2 there and 3 here" in refusal(replace(source, min_frames=3), tokenizer)
    order = replace(source, paths=source.paths[::-1])
    assert "clips.source (digest of the list) is" in refusal(order, tokenizer)
    centroids = tokenizer.centroids.clone()
    centroids[0, 0, 0, 0] ^= 1
    assert "tokenizer.weights (digest) is" in refusal(source, PatchKMeans(centroids))
    assert "tokenizer.vocab_size is 32 there and 31 here" in refusal(source, PatchKMeans(centroids[:31]))


def test_the_program_ends_with_3_where_the_cache_does_not_fit(cache, settings, here):
    config = settings(using(cache))
    assert here(config, "--set", "train.steps=4").code == 0
    for more in ([], ["--resume", "auto"], ["--dry-run"]):
        done = here(config, "--set", "clips.view.flip=0.25", *more)
        assert done.code == 3 and "clips.view.flip is 0.5 there and 0.25 here" in done.error
        assert "Traceback" not in done.error


def test_a_damaged_row_ends_the_run_with_3(cache, settings, here, tmp_path):
    shutil.copytree(cache, tmp_path / "ids")
    file = tmp_path / "ids" / "images.npy"
    blob = bytearray(file.read_bytes())
    blob[len(blob) // 2] ^= 4
    file.write_bytes(blob)
    config = settings(using(tmp_path / "ids"))
    done = here(config)
    assert done.code == 3 and "is damaged: row" in done.error and "prepare.py tokens" in done.error
    file.write_bytes(blob[:-1])
    assert here(config).code == 3
    assert prepared("--config", cache.parent / "tiny.json", "--out", tmp_path / "ids") == 0
    assert file.read_bytes() == (cache / "images.npy").read_bytes()


def test_dry_run_says_what_there_is(cache, settings, here, tmp_path):
    done = here(settings(using(cache)), "--dry-run")
    assert done.code == 0, done.error
    assert "2 views of each of 48 images, whole, made for this run" in done.out
    done = here(settings(using(tmp_path / "none")), "--dry-run")
    assert done.code == 3 and "holds no cache of images; make it with" in done.error


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.token_cache": "x"}, "token_cache needs the key 'views'"),
        ({"data.views": 0}, "views: input should be greater than 0"),
        ({"data.views": 2, "data.token_cache": ""}, "token_cache: string should have"),
        ({"data.views": 2, "data.token_cashe": "x"}, "token_cache"),
    ],
)
def test_wrong_keys_are_refused(settings, here, change, says):
    done = here(settings(change))
    assert done.code == 2 and says in done.error


# -- making ------------------------------------------------------------------------------------------------------------


def test_what_the_program_says_and_refuses(tiny, cache, tmp_path, capsys):
    config = written(changed(tiny, {"output": "unused"}), tmp_path / "my run.json")
    assert prepared("--config", config, "--out", tmp_path / "ids") == 2
    assert "--views K" in capsys.readouterr().err
    for wrong in (["--views", "0"], ["--workers", "-1"], ["--batch", "x"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as ended:
            prepared("--config", config, "--out", tmp_path / "ids", *wrong)
        assert ended.value.code == 2
    assert not (tmp_path / "ids").exists()
    assert prepared("--config", config, "--out", cache, "--views", 2, "--set", "seed=4") == 3
    assert "seed is 0 there and 4 here" in capsys.readouterr().err
    assert prepared("--config", config, "--out", cache, "--views", 2) == 0
    use = f"--config '{config}' --set data.views=2 --set data.token_cache={cache}"
    assert use in capsys.readouterr().out


def test_no_gpu_is_told(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = written(changed(tiny, {"output": "unused"} | VIEWS), tmp_path / "c.json")
    assert prepared("--config", config, "--out", tmp_path / "ids", "--device", "cuda") == 6
    assert "no GPU" in capsys.readouterr().err


def test_the_program_killed_while_writing_goes_on(tiny, cache, tmp_path):
    config = written(changed(tiny, {"output": "unused", "data.workers": 1} | VIEWS), tmp_path / "c.json")
    command = [sys.executable, "bevt_fast/prepare.py", "tokens", "--config", config, "--out", tmp_path / "ids"]
    process = subprocess.Popen([*command, "--batch", "1"], cwd=ROOT, env=environment(), start_new_session=True)
    size = token_cache.row_type((4, 4), 32).itemsize
    deadline = time.monotonic() + 120
    there = 0
    while there < 5:  # of 96 rows of the images
        assert process.poll() is None and time.monotonic() < deadline
        with_rows = tmp_path / "ids" / "images.npy"
        body = with_rows.read_bytes()[-96 * size :] if with_rows.exists() else b""
        there = sum(any(body[k : k + size]) for k in range(0, len(body), size))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert prepared(*command[3:]) == 0
    for name in ("images.npy", "clips.npy"):
        assert (tmp_path / "ids" / name).read_bytes() == (cache / name).read_bytes()
