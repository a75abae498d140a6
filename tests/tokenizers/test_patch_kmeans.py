"""patch_kmeans against a search of all centroids in whole numbers, its fit, and its file."""

import random

import pytest
import torch
from safetensors.torch import save_file

from bevt_fast.config import Part
from bevt_fast.errors import ConfigError, DataError
from bevt_fast.tokenizers import build, patch_kmeans

FORMAT = {"format": "bevt_fast.patch_kmeans/1"}


def draw(seed, *shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def as_pixels(levels):
    """SPEC 3.2, as written there: /255, then 0.8 v + 0.1."""
    return 0.8 * (levels.float() / 255) + 0.1


def textures(n, seed=0, side=48):
    """8-bit pictures of gratings: colour, direction, wavelength and phase vary from picture to picture."""
    generator = torch.Generator().manual_seed(seed)
    angle, phase, wave = (torch.rand(n, 1, 1, 1, generator=generator) * scale for scale in (3.14, 6.28, 12))
    colours = torch.rand(2, n, 3, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    share = 0.5 + 0.5 * torch.sin((x * angle.cos() + y * angle.sin()) * 6.28 / (6 + wave) + phase)
    return as_pixels((255 * (share * colours[0] + (1 - share) * colours[1])).to(torch.uint8))


def nearest(levels, centroids):
    """The first centroid with the least sum of squared grey-level differences, in whole numbers: (n, h, w)."""
    n, _, height, width = levels.shape
    cells = levels.long().reshape(n, 3, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3, 5)
    distance = (cells[..., None, :, :, :] - centroids.long()).square().sum((-3, -2, -1))
    least = distance == distance.min(-1, keepdim=True).values
    return least.int().argmax(-1)


def test_ids_name_the_nearest_centroid():
    centroids, levels = draw(0, 40, 3, 8, 8), draw(1, 9, 3, 24, 40)
    tokenizer = patch_kmeans.PatchKMeans(centroids)
    assert torch.equal(tokenizer(as_pixels(levels)), nearest(levels, centroids))
    assert len(tokenizer(as_pixels(levels)).unique()) > 20


def test_the_first_of_equally_near_centroids_wins():
    centroids = draw(0, 4, 3, 8, 8)
    tokenizer = patch_kmeans.PatchKMeans(torch.cat([centroids, centroids]))
    levels = draw(1, 2, 3, 32, 32)
    assert torch.equal(tokenizer(as_pixels(levels)), nearest(levels, centroids))


def test_black_and_white_cells_stay_exact():
    # the largest sums there are: 192 times 255 squared
    centroids = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 8, 8).contiguous()
    levels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    assert patch_kmeans.PatchKMeans(centroids)(as_pixels(levels)).flatten().tolist() == [0, 0, 1, 1]


def test_logits_are_the_squared_distance_up_to_the_cell_alone():
    centroids, levels = draw(0, 16, 3, 8, 8), draw(1, 1, 3, 8, 8)
    logits = patch_kmeans.PatchKMeans(centroids).logits(as_pixels(levels))[0, :, 0, 0]
    distance = (levels.long() - centroids.long()).square().sum((1, 2, 3))
    assert torch.equal((logits + distance).unique(), (levels.float() - 128).square().sum()[None])


def test_a_picture_of_centroids_comes_back_whole():
    tokenizer = patch_kmeans.PatchKMeans(draw(0, 12, 3, 8, 8))
    ids = torch.arange(12).reshape(2, 1, 2, 3)
    picture = tokenizer.decode(ids)
    assert picture.shape == (2, 1, 3, 16, 24)
    assert torch.equal(tokenizer(picture), ids)
    assert torch.equal(tokenizer.decode(tokenizer(picture)), picture)
    assert torch.equal(picture[0, 0, :, 8:, :8], as_pixels(tokenizer.centroids[3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's sums are summed on a GPU only")
@pytest.mark.parametrize("tf32", [False, True])
def test_a_gpu_gives_the_same_logits(monkeypatch, tf32):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    tokenizer, pixels = patch_kmeans.PatchKMeans(draw(0, 128, 3, 8, 8)), as_pixels(draw(1, 70, 3, 48, 48))
    expected, ids = tokenizer.logits(pixels), tokenizer(pixels)
    tokenizer.cuda()
    assert torch.equal(tokenizer.logits(pixels.cuda()).cpu(), expected)
    assert torch.equal(tokenizer(pixels.cuda()).cpu(), ids)


def test_any_leading_dimensions():
    tokenizer = patch_kmeans.PatchKMeans(draw(0, 12, 3, 8, 8))
    clips = as_pixels(draw(1, 2, 5, 3, 16, 24))
    ids = tokenizer(clips)
    assert ids.shape == (2, 5, 2, 3) and ids.dtype == torch.int64
    assert torch.equal(ids[1, 2], tokenizer(clips[1, 2]))
    assert tokenizer(clips[:0]).shape == (0, 5, 2, 3)


@pytest.mark.parametrize(
    "picture, sentence",
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float32"),
        (torch.zeros(1, 3, 16, 20), "in multiples of 8"),
        (torch.zeros(1, 1, 16, 16), "3 channels"),
    ],
)
def test_other_pixels_are_refused(picture, sentence):
    with pytest.raises(ValueError, match=sentence):
        patch_kmeans.PatchKMeans(draw(0, 12, 3, 8, 8))(picture)


def test_a_fit_repeats_bit_for_bit_on_any_number_of_threads():
    views, threads = textures(120), torch.get_num_threads()
    try:
        fits = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            fits.append(patch_kmeans.fit(views, 64, seed=3).centroids)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])
    assert not torch.equal(fits[0], patch_kmeans.fit(views, 64, seed=4).centroids)


def test_a_fitted_codebook_is_used_evenly_on_pictures_not_fitted_to():
    tokenizer = patch_kmeans.fit(textures(400, seed=0), 128)
    share = tokenizer(textures(200, seed=1)).flatten().bincount(minlength=128) / (200 * 36)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    # worse than this is no codebook to learn from: a tenth of the ids idle, or half of them as good as idle
    assert (share > 0).sum() >= 115 and entropy.exp() > 64 and share.max() < 0.1


def test_a_fit_that_has_settled_is_where_each_centroid_is_its_cells_mean():
    levels = draw(0, 30, 3, 16, 16)
    tokenizer = patch_kmeans.fit(as_pixels(levels), 4, iterations=200)
    ids = tokenizer(as_pixels(levels)).flatten()
    cells = levels.double().reshape(30, 3, 2, 8, 2, 8).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 8, 8)
    for i in range(4):
        mean = cells[ids == i].mean(0)
        assert (tokenizer.centroids[i].double() - mean).abs().max() <= 0.5


def test_an_id_nothing_is_nearest_to_moves_to_the_cell_worst_off():
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [50.0, 50.0], [9.0, 9.0]])
    nearest, distance = patch_kmeans._assign(rows, torch.tensor([[0.0, 0.0], [-100.0, -100.0]]))
    assert nearest.tolist() == [0, 0, 0, 0] and distance.tolist() == [0, 4, 5000, 162]
    updated = patch_kmeans._update(rows, nearest, distance, 2)
    assert updated.tolist() == [[15, 15], [50, 50]]  # means 15.25 and 14.75, in whole levels


def test_the_first_cells_are_all_different():
    rows = torch.tensor([[1.0], [1.0], [1.0], [2.0], [7.0]])
    start = patch_kmeans._start(rows, 3, random.Random(0))
    assert sorted(rows[start].flatten().tolist()) == [1, 2, 7]


def test_too_few_different_cells_are_refused():
    with pytest.raises(DataError, match="20 cells of 5 pictures show only 1 different things, too few for 128 ids"):
        patch_kmeans.fit(torch.full((5, 3, 16, 16), 0.5))


def test_a_file_gives_the_same_tokenizer(tmp_path):
    tokenizer = patch_kmeans.PatchKMeans(draw(0, 12, 3, 8, 8), "six clips")
    path = tmp_path / "made" / "codes.safetensors"
    tokenizer.save(path)
    loaded = patch_kmeans.load(path)
    assert torch.equal(loaded.centroids, tokenizer.centroids) and loaded.source == "six clips"
    assert (loaded.vocab_size, loaded.cell, loaded.training) == (12, 8, False)
    assert [file.name for file in path.parent.iterdir()] == ["codes.safetensors"]
    assert build(Part(name="patch_kmeans", options={"weights": str(path), "vocab_size": 12})).vocab_size == 12
    with pytest.raises(DataError, match="12 ids where 128 are expected"):
        build(Part(name="patch_kmeans", options={"weights": str(path), "vocab_size": 128}))


@pytest.mark.parametrize("fit_if_missing", [False, True])
def test_a_missing_file_says_how_to_make_one(tmp_path, fit_if_missing):
    options = {"weights": str(tmp_path / "none.safetensors"), "fit_if_missing": fit_if_missing}
    with pytest.raises(DataError, match=r"no tokenizer file .*none.safetensors.*bevt_fast/prepare.py tokenizer --data"):
        build(Part(name="patch_kmeans", options=options))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "codes.safetensors"
    for content in (b"", b"<html>", b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(DataError, match="not a whole safetensors file"):
            patch_kmeans.load(path)
    cases = [
        ({"weight": torch.zeros(3)}, FORMAT),
        ({"centroids": draw(0, 4, 3, 8, 8)}, {"format": "another"}),
        ({"centroids": torch.zeros(4, 3, 8, 8)}, FORMAT),
        ({"centroids": draw(0, 4, 3, 16, 16)}, FORMAT),
        ({"centroids": draw(0, 0, 3, 8, 8)}, FORMAT),
    ]
    for tensors, metadata in cases:
        save_file(tensors, path, metadata)
        with pytest.raises(DataError, match=r"prepare\.py tokenizer"):
            patch_kmeans.load(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        patch_kmeans.PatchKMeans(draw(0, 4, 3, 8, 8)).save(tmp_path / "file" / "codes.safetensors")


def test_a_misspelt_option_is_named():
    with pytest.raises(ConfigError, match="vocab_size"):
        build(Part(name="patch_kmeans", options={"weights": "x", "vocab": 3}))
