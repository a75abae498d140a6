"""The DALL-E encoder against OpenAI's own package, and its files: which load, which are refused, with what sentence."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dall_e.encoder import Encoder
from safetensors.torch import save_file

from bevt_fast.config import Part
from bevt_fast.errors import DataError
from bevt_fast.tokenizers import build, dalle
from tests.training.command import environment

ROOT = Path(__file__).parents[2]
WIDTH, IDS = 64, 512  # the least that OpenAI's class allows


@pytest.fixture(scope="module")
def official():
    torch.manual_seed(0)
    return Encoder(n_hid=WIDTH, vocab_size=IDS)


@pytest.fixture(scope="module")
def files(official, tmp_path_factory):
    """The same weights in every kind of file."""
    folder = tmp_path_factory.mktemp("encoders")
    weights = {name: tensor.detach() for name, tensor in official.state_dict().items()}
    torch.save(official, folder / "zip.pkl")
    torch.save(official, folder / "legacy.pkl", _use_new_zipfile_serialization=False)
    torch.save(weights, folder / "weights.pt")
    torch.save(weights, folder / "weights_legacy.pt", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "encoder.safetensors")
    return folder


def pixels(*shape):
    return 0.8 * torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.1


@pytest.mark.parametrize("name", ["zip.pkl", "legacy.pkl", "weights.pt", "weights_legacy.pt", "encoder.safetensors"])
def test_every_format_gives_the_same_bits(files, official, name):
    loaded, expected = dalle.load(files / name).state_dict(), official.state_dict()
    assert list(loaded) == list(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


def test_the_pickled_module_needs_no_dall_e(files):
    program = (
        "import sys; sys.modules['dall_e'] = None\n"
        "from bevt_fast.tokenizers import dalle\n"
        "import torch\n"
        "folder = sys.argv[1]\n"
        "plain = dalle.load(folder + '/encoder.safetensors').state_dict()\n"
        "for name in ('zip.pkl', 'legacy.pkl'):\n"
        "    pickled = dalle.load(f'{folder}/{name}').state_dict()\n"
        "    assert all(torch.equal(plain[key], pickled[key]) for key in plain)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(files)], cwd=ROOT, env=environment(), check=True)


def test_logits_and_ids_equal_the_official_ones(files, official):
    tokenizer, pictures = dalle.load(files / "zip.pkl"), pixels(6, 3, 48, 64)
    logits = official(pictures)
    torch.testing.assert_close(tokenizer.logits(pictures), logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokenizer(pictures), logits.argmax(1))


def test_full_size_equals_the_official_one():
    torch.manual_seed(0)
    official = Encoder()
    tokenizer = dalle.from_tensors(official.state_dict(), "memory", 8192)
    assert sum(weight.numel() for weight in tokenizer.parameters()) == 53_786_240  # SPEC 3.1
    picture = pixels(1, 3, 112, 112)
    logits = official(picture)
    torch.testing.assert_close(tokenizer.logits(picture), logits, rtol=1e-5, atol=1e-5)
    ids = tokenizer(picture)
    assert ids.shape == (1, 14, 14) and ids.dtype == torch.int64
    assert torch.equal(ids, logits.argmax(1))


def test_any_leading_dimensions():
    tokenizer, clips = dalle.Dalle(hidden=8, vocab_size=16), pixels(2, 5, 3, 16, 24)
    ids = tokenizer(clips)
    assert ids.shape == (2, 5, 2, 3)
    assert torch.equal(ids[1, 2], tokenizer(clips[1, 2]))
    assert tokenizer(clips[:0]).shape == (0, 5, 2, 3)


def test_the_first_of_equal_scores_wins():
    tokenizer = dalle.Dalle(hidden=8, vocab_size=16)
    output = tokenizer.blocks.get_submodule("output.conv")
    output.get_parameter("w").zero_()
    output.get_parameter("b").copy_(torch.tensor([0.0] * 5 + [1.0] * 11))
    assert (tokenizer(pixels(1, 3, 16, 16)) == 5).all()


def test_a_tokenizer_is_frozen_and_its_ids_may_be_targets():
    tokenizer = dalle.Dalle(hidden=8, vocab_size=16)
    assert not tokenizer.training and not any(weight.requires_grad for weight in tokenizer.parameters())
    ids = tokenizer(pixels(1, 3, 16, 16))
    scores = torch.zeros(4, 16, requires_grad=True)
    torch.nn.functional.cross_entropy(scores, ids.flatten()).backward()
    assert scores.grad is not None


def test_a_surrounding_autocast_changes_nothing():
    tokenizer, picture = dalle.Dalle(hidden=8, vocab_size=16), pixels(1, 3, 16, 16)
    expected = tokenizer.logits(picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.logits(picture), expected)


def test_the_first_weights_are_scaled_by_fan_in():
    weight = dalle.Dalle(hidden=64, vocab_size=512).state_dict()["blocks.group_4.block_2.res_path.conv_2.w"]
    n, fan_in = weight.numel(), weight[0].numel()
    assert abs(weight.mean()) < 3 * fan_in**-0.5 / n**0.5
    assert abs(weight.std() * fan_in**0.5 - 1) < 3 / (2 * n) ** 0.5  # standard error of a normal's deviation


@pytest.mark.parametrize(
    "picture, sentence",
    [
        (pixels(1, 3, 16, 16).double(), "float32"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "float32"),
        (pixels(1, 3, 16, 20), "in multiples of 8"),
        (pixels(1, 1, 16, 16), "3 channels"),
    ],
)
def test_other_pixels_are_refused(picture, sentence):
    with pytest.raises(ValueError, match=sentence):
        dalle.Dalle(hidden=8, vocab_size=16)(picture)


@pytest.mark.parametrize("name", ["zip.pkl", "legacy.pkl", "encoder.safetensors"])
@pytest.mark.parametrize("share", [0.0005, 0.3, 0.999])
def test_a_truncated_file_is_refused(files, tmp_path, name, share):
    whole = (files / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match="again"):
        dalle.load(tmp_path / name)


def test_a_flipped_bit_in_the_zip_format_is_refused(files, tmp_path):
    data = bytearray((files / "zip.pkl").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.pkl").write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        dalle.load(tmp_path / "flipped.pkl")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b"", "0 bytes"),
        (b"\n<!DOCTYPE html><html><title>Access denied</title></html>", "not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "not weights"),
        (b"\x00" * 4096, "neither"),
        (b"\xff" * 4096, "neither"),  # a safetensors header of 2**64 bytes
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x80\x02}q\x00.", "damaged"),  # a pickled {}, without what torch.save puts around it
    ],
)
def test_other_content_is_refused(tmp_path, content, sentence):
    (tmp_path / "encoder.pkl").write_bytes(content)
    with pytest.raises(DataError, match=sentence) as refusal:
        dalle.load(tmp_path / "encoder.pkl")
    assert "\n" not in str(refusal.value)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match=r"there is no tokenizer file .*nowhere.*cdn.openai.com.*prepare.py convert"):
        dalle.load(tmp_path / "nowhere.pkl")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda weights: weights.pop("blocks.group_2.block_1.id_path.b"), "id_path.b is missing"),
        (lambda weights: weights.update(extra=torch.zeros(1)), "extra is .* no such weight"),
        (lambda weights: weights.update({"blocks.input.b": torch.zeros(65)}), r"blocks.input.b is \(65,\)"),
        (lambda weights: weights["blocks.input.b"].fill_(float("nan")), "not finite"),
        (lambda weights: weights.pop("blocks.input.w"), "does not hold"),
        (lambda weights: weights.update({"blocks.input.w": torch.zeros(())}), "does not hold"),
    ],
)
def test_other_weights_are_refused(official, change, sentence):
    weights = {name: tensor.detach().clone() for name, tensor in official.state_dict().items()}
    change(weights)
    with pytest.raises(DataError, match=sentence):
        dalle.from_tensors(weights, "encoder.safetensors")


def test_the_configuration_says_vocabulary_and_digest(files):
    path = files / "encoder.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    part = {"weights": str(path), "vocab_size": 512}
    assert build(Part(name="dalle", options=part | {"sha256": digest.upper()})).vocab_size == 512
    with pytest.raises(DataError, match=f"{digest} where {'0' * 64} is expected: refused"):
        build(Part(name="dalle", options=part | {"sha256": "0" * 64}))
    with pytest.raises(DataError, match="vocabulary of 512 ids where 8192 are expected"):
        build(Part(name="dalle", options={"weights": str(path)}))
