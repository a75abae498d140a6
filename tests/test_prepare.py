"""prepare.py as a user runs it, and the service behind it: fitting a tokenizer to a run's own files."""

import hashlib
import json

import av
import numpy as np
import pytest
import torch
from dall_e.encoder import Encoder
from PIL import Image
from safetensors.torch import load_file

from bevt_fast import prepare
from bevt_fast.config import Part, View
from bevt_fast.data.pipeline_reference import map_pixels
from bevt_fast.data.sources import Frames, Source
from bevt_fast.errors import ConfigError, DataError
from bevt_fast.tokenizers import build, dalle, patch_kmeans
from bevt_fast.training import tokenizer_fit

PREPARE = "bevt_fast/prepare.py"


def picture(seed, side=64):
    """Smooth coloured noise (side, side, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 images and 10 videos of 6 frames, all different."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "videos"):
        (folder / kind).mkdir()
    for i in range(20):
        Image.fromarray(picture(i)).save(folder / "images" / f"{i:02d}.png")
    for i in range(10):
        with av.open(str(folder / "videos" / f"{i}.avi"), "w") as container:
            stream = container.add_stream("mjpeg", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuvj420p"
            for t in range(6):
                frame = np.roll(picture(100 + i), 4 * t, axis=1)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    return folder


def videos(data, **changes):
    paths = sorted(path.name for path in (data / "videos").iterdir())
    return Source(**{"name": "videos", "root": data / "videos", "paths": paths, "frames": Frames(4, 1)} | changes)


def images(data, **changes):
    paths = sorted(path.name for path in (data / "images").iterdir())
    return Source(**{"name": "images", "root": data / "images", "paths": paths} | changes)


VIEW = View(size=32, short_side=(32, 48))


def test_help_needs_no_torch(program):
    blocked = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = ['prepare.py', *sys.argv[2:]]; "
    run = f"runpy.run_path({PREPARE!r}, run_name='__main__')"
    for arguments in (["--help"], ["tokenizer", "--help"], ["convert", "--help"], ["moving_shapes", "--help"]):
        done = program("-c", blocked + run, PREPARE, *arguments, check=0)
        assert done.stdout.startswith("usage: prepare.py")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "required"),
        (["tokenizer", "--out", "x"], "--data"),
        (["tokenizer", "--data", "x", "--out", "y", "--codes", "0"], "from 1, got 0"),
        (["tokenise"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_is_refused(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        prepare.main(arguments)
    assert end.value.code == 2 and sentence in capsys.readouterr().err


def test_a_tokenizer_for_own_files(program, data, tmp_path):
    out = tmp_path / "made" / "codes.safetensors"
    (data / "list.txt").write_text("".join(f"videos/{i}.avi {i % 2}\n" for i in range(10)))
    arguments = ["--data", data / "images", "--data", data / "list.txt", "--out", out, "--codes", 16, "--size", 32]
    done = program(PREPARE, "tokenizer", *arguments, "--samples", 40, check=0)
    assert "fitted 16 ids to 40 pictures" in done.stdout and "on 10 held-out pictures: " in done.stdout
    assert hashlib.sha256(out.read_bytes()).hexdigest() in done.stdout
    setting = done.stdout.split("--set 'tokenizer=")[1].rstrip().rstrip("'")
    assert build(Part(**json.loads(setting))).vocab_size == 16

    again = program(PREPARE, "tokenizer", *arguments, check=3)
    assert again.stderr.startswith("error: ") and "--overwrite" in again.stderr and again.stderr.count("\n") == 1


def test_a_folder_of_both_kinds_and_few_files(data, tmp_path, capsys):
    arguments = ["tokenizer", "--data", str(data), "--codes", "16", "--size", "32", "--samples", "40"]
    assert prepare.main([*arguments, "--out", str(tmp_path / "both.safetensors")]) == 0
    assert "fitted 16 ids to 40 pictures" in capsys.readouterr().out
    few = tmp_path / "few"
    few.mkdir()
    for i in range(2):
        Image.fromarray(picture(i)).save(few / f"{i}.png")
    arguments = ["tokenizer", "--data", str(few), "--codes", "4", "--size", "32", "--samples", "8"]
    assert prepare.main([*arguments, "--out", str(tmp_path / "few.safetensors")]) == 0
    assert "too few files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, code, sentence",
    [
        (["--data", "/nowhere"], 3, "there is nothing at /nowhere"),
        (["--data", "{empty}"], 3, "holds no videos, no images, and no .tar or .parquet files"),
        (["--size", "40"], 2, "size 40 is not a multiple of 32"),
        (["--codes", "100000"], 3, "too few for 100000 ids"),
        (["--samples", "1"], 0, ""),
    ],
)
def test_what_cannot_be_done_is_one_sentence(data, tmp_path, capsys, change, code, sentence):
    (tmp_path / "empty").mkdir()
    change = [part.format(empty=tmp_path / "empty") for part in change]
    arguments = ["tokenizer", "--data", str(data / "images"), "--out", str(tmp_path / "codes"), "--size", "32"]
    assert prepare.main([*arguments, "--codes", "2", *change]) == code
    assert sentence in capsys.readouterr().err


def test_moving_shapes_and_a_tokenizer_for_them(tmp_path, capsys):
    root = tmp_path / "shapes"
    numbers = [
        "--clips",
        "6",
        "--images",
        "6",
        "--test-clips",
        "1",
        "--test-images",
        "1",
        "--size",
        "32",
        "--length",
        "4",
    ]
    assert prepare.main(["moving_shapes", "--root", str(root), *numbers]) == 0
    assert "6 + 1 clips and 6 + 1 images" in capsys.readouterr().out
    assert len(list(root.rglob("*.webm"))) == 7 and len(list(root.rglob("*.jpg"))) == 7
    arguments = ["tokenizer", "--data", str(root), "--codes", "8", "--size", "32", "--samples", "30"]
    assert prepare.main([*arguments, "--out", str(tmp_path / "codes.safetensors")]) == 0
    assert prepare.main(["moving_shapes", "--root", str(root), "--size", "31"]) == 2
    assert "size" in capsys.readouterr().err
    two = ["moving_shapes", "--root", str(tmp_path / "two"), *numbers, "--motions", "left", "right"]
    assert prepare.main(two) == 0
    assert (tmp_path / "two" / "lists" / "classes_motion.txt").read_text().split() == ["left", "right"]
    assert prepare.main([*two[:-1], "sideways"]) == 2
    assert "'anticlockwise'" in capsys.readouterr().err


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_convert(tmp_path, capsys, legacy):
    official = Encoder(n_hid=64, vocab_size=512)
    source, target = tmp_path / "encoder.pkl", tmp_path / "encoder.safetensors"
    torch.save(official, source, _use_new_zipfile_serialization=not legacy)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert prepare.main(["convert", str(source), str(target), "--sha256", digest]) == 0
    said = capsys.readouterr().out
    assert "74 tensors, 2,585,504 parameters, 512 ids" in said
    assert digest in said and hashlib.sha256(target.read_bytes()).hexdigest() in said
    written, expected = load_file(target), official.state_dict()
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert dalle.load(target).vocab_size == 512

    assert prepare.main(["convert", str(source), str(target)]) == 3
    assert prepare.main(["convert", str(source), str(tmp_path / "other"), "--sha256", "0" * 64]) == 3
    assert "refused" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_views_are_drawn_as_in_training_and_repeat(data):
    streams = {"images": (images(data), VIEW), "clips": (videos(data), VIEW)}
    views = list(tokenizer_fit.sample_views(streams, 0, 60))
    assert sum(map(len, views)) == 60 and {len(view) for view in views} <= {1, 2, 4}
    black, white = map_pixels(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)).flatten()
    assert all(view.shape[1:] == (3, 16, 16) and view.min() >= black and view.max() <= white for view in views)
    again = list(tokenizer_fit.sample_views(streams, 0, 60))
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    other = list(tokenizer_fit.sample_views(streams, 1, 60))
    assert not torch.equal(torch.cat(views), torch.cat(other))


def test_bad_files_are_passed_over_until_there_are_no_others(data):
    good = images(data)
    some_bad = images(data, paths=[*good.paths[:10], *(f"missing{i}.png" for i in range(10))])
    views = list(tokenizer_fit.sample_views({"images": (some_bad, VIEW)}, 0, 15))
    assert len(views) == 15
    all_bad = images(data, paths=[f"missing{i}.png" for i in range(10)])
    with pytest.raises(DataError, match=r"none of 10 files of images can be read.*missing\d.png: missing"):
        list(tokenizer_fit.sample_views({"images": (all_bad, VIEW)}, 0, 15))


def test_views_of_different_sizes_are_fitted_together(tmp_path):
    path = tmp_path / "codes.safetensors"
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randint(0, 256, (4, side, side, 3), generator=generator, dtype=torch.uint8) for side in (16, 24)]
    part = Part(name="patch_kmeans", options={"weights": str(path), "vocab_size": 52})
    tokenizer_fit.fit_tokenizer([map_pixels(level) for level in levels], part, source="noise")
    # 4 * 4 + 4 * 9 different cells and as many ids: every cell is its own centroid
    tokenizer = patch_kmeans.load(path)
    assert tokenizer.source == "noise"
    for level in levels:
        pixels = map_pixels(level)
        assert torch.equal(tokenizer.decode(tokenizer(pixels)), pixels)


def test_what_cannot_be_fitted_is_refused(tmp_path):
    path = str(tmp_path / "codes.safetensors")
    with pytest.raises(ConfigError, match="'dalle' is not one that is fitted"):
        tokenizer_fit.fit_tokenizer([torch.zeros(1, 3, 8, 8)], Part(name="dalle", options={"weights": path}))
    with pytest.raises(DataError, match="no pictures"):
        tokenizer_fit.fit_tokenizer([], Part(name="patch_kmeans", options={"weights": path}))
    assert not list(tmp_path.iterdir())


def run_config(path, **options):
    from bevt_fast.config import Config

    part = {"name": "patch_kmeans", "options": {"weights": str(path), "vocab_size": 16} | options}
    stream = {
        "source": {"name": "file_list"}, "mask": {"name": "blockwise"}, "batch": 2, "micro_batch": 2,
        "view": {"size": 32, "short_side": [32, 48]},
    }  # fmt: skip
    return Config.model_validate(
        {"output": "x", "images": stream, "tokenizer": part, "optim": {"lr": 1e-3}, "train": {"steps": 1}}
    )


def test_only_a_missing_file_that_may_be_fitted_is_fitted(data, tmp_path):
    path, sources = tmp_path / "codes.safetensors", {"images": images(data)}
    assert not tokenizer_fit.fit_if_missing(run_config(path), sources)
    assert not path.exists()
    allowed = run_config(path, fit_if_missing=True)
    assert tokenizer_fit.fit_if_missing(allowed, sources)
    assert build(allowed.tokenizer).vocab_size == 16
    before = path.stat().st_mtime_ns
    assert not tokenizer_fit.fit_if_missing(allowed, sources)
    assert path.stat().st_mtime_ns == before


def test_usage_counts_ids_as_shannon_does():
    usage = tokenizer_fit.codebook_usage(torch.tensor([[0, 1], [2, 3]]), 8)
    assert usage.used == 4 and usage.perplexity == pytest.approx(4) and usage.commonest == 0.25
    assert tokenizer_fit.codebook_usage(torch.zeros(5, dtype=torch.int64), 8) == (1, 1.0, 1.0)
