"""The ways through the DALL-E encoder: the tokens of the plain layers, scores as exact, and no stale weights."""

import copy
import threading

import pytest
import torch
from dall_e.encoder import Encoder
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bevt_fast.config import Part
from bevt_fast.errors import ConfigError
from bevt_fast.tokenizers import _convolution, _dalle_body, build, dalle
from bevt_fast.training.assemble import tokenizer_fingerprint
from bevt_kernels.exactness import assert_as_exact_as_torch, assert_choice_as_exact_as_torch

WIDTH, IDS = 64, 512  # the least that OpenAI's class allows
SHAPES = [(1, 112, 112), (5, 64, 96), (5, 8, 8), (1, 8, 8), (19, 16, 24), (3, 40, 8)]


@pytest.fixture(scope="module")
def official():
    torch.manual_seed(0)
    encoder = Encoder(n_hid=WIDTH, vocab_size=IDS)
    for name, bias in encoder.named_parameters():
        if name.endswith(".b"):
            bias.data.normal_()
    return encoder


@pytest.fixture
def ours(official):
    return dalle.from_tensors({name: x.detach().clone() for name, x in official.state_dict().items()}, "memory")


def pixels(n, height, width):
    return 0.8 * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) + 0.1


def plain(encoder, x):
    """The encoder as published, written out for any dtype: (n, 3, H, W) -> (n, V, h, w)."""
    weights = {name: weight.detach().to(x.dtype) for name, weight in encoder.state_dict().items()}

    def convolve(name, x):
        w = weights[f"blocks.{name}.w"]
        return functional.conv2d(x, w, weights[f"blocks.{name}.b"], padding=w.shape[-1] // 2)

    x = convolve("input", x)
    for group in (1, 2, 3, 4):
        for block in (1, 2):
            name = f"group_{group}.block_{block}"
            y = x
            for i in (1, 2, 3, 4):
                y = convolve(f"{name}.res_path.conv_{i}", y.relu())
            x = (convolve(f"{name}.id_path", x) if group > 1 and block == 1 else x) + y / 64
        x = functional.max_pool2d(x, 2) if group < 4 else x
    return convolve("output.conv", x.relu())


def assert_scores(name, tokenizer, official, pictures):
    """Scores within the law, tokens equal to the official package's."""
    theirs, truth = official(pictures).detach(), plain(official, pictures.double())
    assert_as_exact_as_torch(name, tokenizer.logits(pictures), theirs, truth)
    assert torch.equal(tokenizer(pictures), theirs.argmax(1))


def _fused(monkeypatch):
    assert _convolution.onednn_runs(torch.float32), "torch 2.13 has the operators on every x86 CPU"
    calls, way = [], _convolution.OneDnn.__call__
    monkeypatch.setattr(_convolution.OneDnn, "__call__", lambda *a, **k: (calls.append(0), way(*a, **k))[1])
    return calls


@pytest.mark.parametrize("n, height, width", SHAPES)
def test_fused_operators_give_the_official_tokens(official, ours, n, height, width, monkeypatch):
    calls = _fused(monkeypatch)
    assert_scores("fused", ours, official, pixels(n, height, width))
    assert calls


@pytest.mark.parametrize("n, height, width", SHAPES[1:4])
def test_without_onednn_the_plain_layers_run(official, ours, n, height, width, monkeypatch):
    calls = _fused(monkeypatch)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_scores("plain", ours, official, pixels(n, height, width))
    assert not calls


@pytest.mark.parametrize("fault", ["absent", "refused", "wrong"])
def test_operators_that_are_absent_refused_or_wrong_are_not_used(official, ours, fault, monkeypatch):
    def call(self, layer, x, relu=False, onto=None):
        if fault == "wrong":
            return torch.zeros_like(x)
        raise AttributeError("no such operator") if fault == "absent" else RuntimeError("could not create a primitive")

    monkeypatch.setattr(_convolution.OneDnn, "__call__", call)
    monkeypatch.setattr(_convolution, "_onednn_agrees", _convolution._onednn_agrees.__wrapped__)
    assert not _convolution.onednn_runs(torch.float32)
    assert_scores("fallback", ours, official, pixels(2, 16, 24))


def test_looking_for_the_operators_draws_no_random_number():
    _convolution._onednn_agrees.cache_clear()
    before = torch.get_rng_state()
    _convolution.onednn_runs(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_any_strides_of_the_pixels_and_they_stay_as_they_are(official, ours, layout):
    x = pixels(3, 32, 32)
    given = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": x.repeat_interleave(2, dim=3)[..., ::2],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    before = given.clone()
    assert torch.equal(ours(given), official(before.contiguous()).argmax(1))
    assert torch.equal(given, before)


def test_two_runs_and_other_chunks_give_the_same_tokens(ours, monkeypatch):
    x = pixels(19, 16, 16)
    logits, ids = ours.logits(x), ours(x)
    assert torch.equal(ours.logits(x), logits)
    monkeypatch.setattr(_dalle_body, "FIRST", 1)
    monkeypatch.setattr(_dalle_body, "LAST", 8)
    assert torch.equal(ours(x), ids)


def test_inference_mode_and_autocast_change_nothing(ours):
    x = pixels(2, 16, 16)
    expected = ours.logits(x)
    with torch.inference_mode():
        assert torch.equal(ours.logits(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.logits(x), expected)
    assert torch.equal(ours.logits(x.requires_grad_()), expected)


@pytest.mark.parametrize("way", ["cpu", "gpu"])
def test_changed_weights_are_seen_at_once(official, ours, way, monkeypatch):
    if way == "gpu":
        monkeypatch.setattr(_dalle_body.Body, "_run", _run_as_on_a_gpu)
    x = pixels(2, 16, 16)
    first = ours.logits(x)
    layer = ours.blocks.get_submodule("group_1.block_1.res_path.conv_2")
    weight = layer.w.clone()
    layer.w.mul_(20)
    changed = ours.logits(x)
    assert not torch.equal(changed, first)
    layer.w = torch.nn.Parameter(weight, requires_grad=False)
    assert torch.equal(ours.logits(x), first)
    ours.load_state_dict({name: tensor * 0 for name, tensor in ours.state_dict().items()}, assign=True)
    assert not ours.logits(x).any()


def test_copies_files_and_devices_keep_weights_and_tokens(official, ours, tmp_path):
    x = pixels(2, 16, 24)
    ids, names = ours(x), list(official.state_dict())
    copied = copy.deepcopy(ours)
    ours.save(tmp_path / "encoder.safetensors")
    loaded = dalle.load(tmp_path / "encoder.safetensors")
    for tokenizer in (copied, loaded, ours.to("cpu"), ours.to("meta").to_empty(device="cpu")):
        if tokenizer is ours:
            tokenizer.load_state_dict(official.state_dict())
        assert torch.equal(tokenizer(x), ids)
        assert list(tokenizer.state_dict()) == names == [name for name, _ in tokenizer.named_parameters()]
        assert all(torch.equal(w, official.state_dict()[name]) for name, w in tokenizer.state_dict().items())


def test_threads_at_once_get_the_same_tokens(ours):
    x = pixels(4, 16, 16)
    expected, found = ours(x), [None] * 4

    def name(i):
        found[i] = ours(x)

    threads = [threading.Thread(target=name, args=(i,)) for i in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ids is not None and torch.equal(ids, expected) for ids in found)


def test_nothing_is_kept_beside_the_weights_on_a_cpu(ours):
    ours(pixels(2, 16, 16))
    assert all(m._kept is None for m in ours.modules() if isinstance(m, _convolution.Convolution))


def _run_as_on_a_gpu(self, x):
    way = self._plain_way(x)
    for stage in self._stages():
        x = stage.run(x, way)
    return x


def _cudnn(x, w, b, stride, padding, dilation, groups):
    assert x.is_contiguous(memory_format=torch.channels_last) and w.is_contiguous(memory_format=torch.channels_last)
    return functional.conv2d(x, w, b, stride, padding, dilation, groups).relu()


@pytest.mark.parametrize("cudnn", ["runs", "refuses"])
@pytest.mark.parametrize("n, height, width", SHAPES[1:4])
def test_the_way_of_a_gpu_is_the_same_network(official, ours, n, height, width, cudnn, monkeypatch):
    if cudnn == "runs":
        monkeypatch.setattr(torch, "cudnn_convolution_relu", _cudnn)
    monkeypatch.setattr(_convolution, "_refused", set())
    monkeypatch.setattr(_dalle_body.Body, "_run", _run_as_on_a_gpu)
    assert_scores("gpu", ours, official, pixels(n, height, width))
    assert bool(_convolution._refused) == (cudnn == "refuses")


def test_a_gpu_casts_once_and_for_another_precision_again(ours, monkeypatch):
    monkeypatch.setattr(_dalle_body.Body, "_run", _run_as_on_a_gpu)
    x, layer = pixels(1, 16, 16), ours.blocks.get_submodule("input")
    ours(x)
    kept = layer._kept
    ours.to("cpu")(x)
    assert layer._kept is kept
    assert copy.deepcopy(layer)._kept is None
    ours.blocks.precision = "bf16"
    ours(x)
    assert layer._kept is not kept and layer._kept.weights.w.dtype == torch.bfloat16
    ours.to("meta")
    assert layer._kept is None


def test_out_of_memory_is_not_taken_for_a_refusal(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", full)
    with pytest.raises(torch.OutOfMemoryError):
        _convolution._cudnn_relu(torch.zeros(1, 2, 4, 4), torch.zeros(2, 2, 3, 3), torch.zeros(2), 1)


def test_bf16_scores_are_as_exact_as_plain_bf16(official, ours):
    x = pixels(5, 32, 32)
    ours.blocks.precision = "bf16"
    truth = plain(official, x.double())
    own = ours.logits(x)
    assert own.dtype == torch.float32
    assert_as_exact_as_torch("bf16", own.bfloat16(), plain(official, x.bfloat16()), truth)
    assert not torch.equal(own, official(x))


def test_precision_is_part_of_what_a_run_began_with(ours):
    official_digest = tokenizer_fingerprint(ours)
    ours.blocks.precision = "bf16"
    assert tokenizer_fingerprint(ours) != official_digest


def test_compiled_shapes_are_powers_of_two(official, ours, monkeypatch):
    compiled, seen = [], []

    def compile(function, **options):
        compiled.append(options)
        return lambda x, weights: (seen.append(len(x)), function(x, weights))[1]

    monkeypatch.setattr(torch, "compile", compile)
    ours.blocks.compiles = True
    for n in (1, 2, 3, 4, 5, 7, 11):
        x = pixels(n, 8, 16)
        assert torch.equal(ours(x), official(x).argmax(1))
    assert len(compiled) == 1 and compiled[0]["dynamic"] is False
    assert set(seen) == {1, 2, 4}
    assert ours(pixels(2, 8, 16)[:0]).shape == (0, 1, 2)


def test_a_gpu_compiles_for_four_sizes():
    sizes = [_dalle_body.bucket(n, _dalle_body.SMALLEST["cuda"]) for n in range(1, dalle.GPU_CHUNK + 1)]
    assert set(sizes) == {8, 16, 32, 64}
    assert all(size >= n for n, size in enumerate(sizes, start=1))


def test_torch_compile_reads_the_body_in_one_piece(official, ours):
    x = pixels(3, 16, 16)
    ours.blocks._compiled = torch.compile(ours.blocks._all, backend="aot_eager", dynamic=False, fullgraph=True)
    ours.blocks.compiles = True
    assert_scores("compiled", ours, official, x)
    assert torch.equal(copy.deepcopy(ours).logits(x[:0]), official(x)[:0])


def test_torch_counts_the_operations_of_the_fused_operators(official, ours):
    x = pixels(3, 32, 48)
    counts = []
    _convolution._onednn_agrees.cache_clear()  # the probe's own operations do not count
    for network in (ours.logits, official):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_equal_scores_go_to_the_first_id(ours):
    ours.blocks.last.w.zero_()
    ours.blocks.last.b.copy_((torch.arange(IDS) % 7 == 3).float())
    assert (ours(pixels(5, 16, 16)) == 3).all()


@pytest.mark.parametrize(
    "options", [{"precision": "fp8"}, {"precision": "fp16"}, {"compile": "perhaps"}, {"compile": 2}]
)
def test_other_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build(Part(name="dalle", options={"weights": "encoder.safetensors", **options}))


def test_options_reach_the_tokenizer(ours, tmp_path):
    path = str(tmp_path / "encoder.safetensors")
    ours.save(path)
    options = {"weights": path, "vocab_size": IDS, "precision": "bf16", "compile": True}
    tokenizer = build(Part(name="dalle", options=options))
    assert isinstance(tokenizer, dalle.Dalle)
    assert (tokenizer.precision, tokenizer.blocks.compiles) == ("bf16", True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the float16 rule holds on a GPU only")
@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_scores_are_as_exact_as_the_official_float16(official, ours, compiles):
    theirs = Encoder(n_hid=WIDTH, vocab_size=IDS, device=torch.device("cuda"))
    theirs.load_state_dict(official.state_dict())
    tokenizer, pictures = ours.cuda(), pixels(6, 48, 64).cuda()
    tokenizer.blocks.compiles = compiles
    truth, logits = plain(theirs, pictures.double()), theirs(pictures)
    assert tokenizer.logits(pictures).dtype == torch.float32
    half, theirs_half = tokenizer.logits(pictures).half(), logits.half()
    assert_as_exact_as_torch("float16", half, theirs_half, truth)
    rows = truth.movedim(1, -1).flatten(0, -2)
    ids = tokenizer(pictures).flatten()
    assert_choice_as_exact_as_torch("ids", ids, logits.argmax(1).flatten(), rows)
    assert torch.equal(ids, tokenizer(pictures).flatten())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="TensorFloat-32 is a GPU's")
def test_fp32_on_a_gpu_is_float32(official, ours):
    x = pixels(4, 32, 32)
    ours.cuda().blocks.precision = "fp32"
    assert torch.equal(ours(x.cuda()).cpu(), official(x).argmax(1))
