"""`swap`: other people's Swin transformers answer as before, outputs and every gradient, and can be had back.

Swapped against original in float32: no element differs by more than 1e-5 of the largest value of its tensor.
"""

import copy
import inspect
import pickle
import warnings
from typing import Any, cast

import pytest
import torch
import torch.fx
from torch import nn

import bevt_kernels
from bevt_kernels import exactness, known_swins, runtime, swap
from tests.kernels import video_swin
from tests.models.oracles import randomise, torchvision_models

WITHIN = 1e-5
WINDOW_3D, SHIFT_3D, WINDOW, SHIFT = [4, 3, 3], [2, 1, 1], [3, 3], [1, 1]


@pytest.fixture(autouse=True)
def _every_warning_anew():
    runtime._warned.clear()


@pytest.fixture
def calls(monkeypatch):
    """What `window_attention` is asked by swapped modules."""
    asked = []

    def counted(*arguments):
        asked.append(arguments)
        return bevt_kernels.window_attention(*arguments)

    monkeypatch.setattr(known_swins, "window_attention", counted)
    return asked


def torchvision_swin():
    torchvision_models()
    from torchvision.models import swin_transformer

    return swin_transformer


def torchvision_swin3d():
    torchvision_models()
    from torchvision.models.video import swin_transformer

    return swin_transformer


def attention_3d(window=WINDOW_3D, shift=SHIFT_3D, **options):
    return randomise(torchvision_swin3d().ShiftedWindowAttention3d(16, list(window), list(shift), 2, **options))


def attention_2d(window=WINDOW, shift=SHIFT, **options):
    return randomise(torchvision_swin().ShiftedWindowAttention(16, list(window), list(shift), 2, **options))


def attention_v2(window=WINDOW, shift=SHIFT, **options):
    return randomise(torchvision_swin().ShiftedWindowAttentionV2(16, list(window), list(shift), 2, **options))


def monai_layer(window, **options):
    nets = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is an oracle of the [test] extra")
    return randomise(nets.BasicLayer(16, 2, 2, window, [0.0, 0.0], qkv_bias=True, **options))


def video_layer(window=(4, 3, 3), **options):
    return randomise(video_swin.BasicLayer(16, 2, window, **options))


def timm_model(name="swin_tiny_patch4_window7_224", side=32, **options):
    torchvision_models()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"window_size": 4, "num_classes": 3, **options}
    return randomise(timm.create_model(name, img_size=side, depths=(2, 1), embed_dim=16, num_heads=(1, 2), **options))


def transformers_model(**options):
    torchvision_models()
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"image_size": 32, "depths": [2, 1], "embed_dim": 16, "num_heads": [1, 2], "window_size": 4}
    return randomise(transformers.SwinModel(transformers.SwinConfig(**sizes, drop_path_rate=0.0, **options)))


def swapped_copy(model):
    """A swapped deep copy. That nothing else is said about it is part of every comparison."""
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sum(swap(other).values())
    return other


def answer(model, x, call, dtype=None):
    """The output and all gradients, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = call(model, x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    (out * cotangent).sum().backward()
    return {"output": out, "input": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def scale(answers, name):
    """The largest value. A key's bias of its own has no gradient but rounding, and is measured by its query's."""
    for key, query in (("k_proj.bias", "q_proj.bias"), ("key.bias", "query.bias")):
        name = name.replace(key, query)
    return answers[name].abs().max()


def same(model, x, call=lambda model, x: model(x)):
    """The swapped model, after its output and every gradient were found equal to the original's."""
    other = swapped_copy(model)
    original, fused = answer(model, x, call), answer(other, x, call)
    assert fused["output"].stride() == original["output"].stride()
    for name, expected in original.items():
        assert (expected is None) == (fused[name] is None), name
        if expected is not None:
            error = (fused[name] - expected).abs().max()
            assert error <= WITHIN * scale(original, name), f"{name}: {error:.1e} of {scale(original, name):.1e}"
    return other


GRIDS_3D = {"divided": (8, 6, 6), "padded": (6, 7, 8), "time clipped": (3, 6, 6), "height clipped": (5, 2, 7)}
GRIDS = {"divided": (6, 9), "padded": (7, 8), "height below the window": (2, 7), "both below": (2, 2)}


@pytest.mark.parametrize("shift", [(0, 0, 0), SHIFT_3D], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("grid", GRIDS_3D.values(), ids=GRIDS_3D)
def test_torchvision_3d(grid, shift, calls):
    same(attention_3d(shift=shift), torch.randn(2, *grid, 16))
    assert len(calls) == 1


@pytest.mark.parametrize("attention", [attention_2d, attention_v2])
@pytest.mark.parametrize("shift", [(0, 0), SHIFT, (0, 1)], ids=["unshifted", "shifted", "shifted in width"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_torchvision_2d(attention, grid, shift, calls):
    same(attention(shift=shift), torch.randn(2, *grid, 16))
    assert len(calls) == 1


@pytest.mark.parametrize("attention", [attention_3d, attention_2d, attention_v2])
def test_layers_without_biases(attention):
    model = attention(qkv_bias=False, proj_bias=False)
    same(model, torch.randn(2, *([5] * len(model.window_size)), 16))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchvision_models(training, calls):
    options = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "num_classes": 3, "stochastic_depth_prob": 0.0}
    clips = torchvision_swin3d().SwinTransformer3d(patch_size=[2, 4, 4], window_size=[4, 3, 3], **options)
    other = same(randomise(clips).train(training), torch.randn(1, 3, 12, 28, 28))
    assert len(calls) == 4 and {type(m).__name__ for m in other.modules()} >= {"ShiftedWindowAttention3d"}
    plain = torchvision_swin()
    v1 = plain.SwinTransformer(patch_size=[4, 4], window_size=[3, 3], **options)
    v2 = plain.SwinTransformer(
        [4, 4], window_size=[3, 3], block=plain.SwinTransformerBlockV2, downsample_layer=plain.PatchMergingV2, **options
    )
    for model in (v1, v2):
        calls.clear()
        same(randomise(model).train(training), torch.randn(2, 3, 28, 32))
        assert len(calls) == 4


@pytest.mark.parametrize("grid", GRIDS_3D.values(), ids=GRIDS_3D)
def test_monai_3d(grid, calls):
    same(monai_layer((4, 3, 3)), torch.randn(2, 16, *grid))
    assert len(calls) == 2


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_monai_2d(grid, calls):
    same(monai_layer((3, 3)), torch.randn(2, 16, *grid))
    assert len(calls) == 2


@pytest.mark.parametrize(("training", "checkpointed"), [(True, True), (False, False)], ids=["train", "eval"])
def test_monai_swin_unetr(training, checkpointed, calls):
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is an oracle of the [test] extra")
    sizes = {"depths": (2, 1, 1, 1), "num_heads": (1, 2, 4, 8), "feature_size": 12}
    model = nets.SwinUNETR(1, 2, use_checkpoint=checkpointed, **sizes).swinViT  # the convolutions are not ours
    same(randomise(model).train(training), torch.randn(1, 1, 32, 32, 32), call=lambda model, x: model(x)[-1])
    assert len(calls) == 5 * (2 if checkpointed else 1)


@pytest.mark.parametrize("grid", GRIDS_3D.values(), ids=GRIDS_3D)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_video_swin(grid, checkpointed, calls):
    same(video_layer(use_checkpoint=checkpointed), torch.randn(2, *grid, 16))
    assert len(calls) == 2 * (2 if checkpointed else 1)


@pytest.mark.parametrize("grid", [(6, 9), (3, 3)], ids=["several windows", "one window"])
def test_images_of_bevt(grid, calls):
    same(video_layer(), torch.randn(2, *grid, 16), call=lambda model, x: model(x, is_img=True))
    assert [call[3] for call in calls] == [(0, 0, 0), (0, 1, 1)]  # the shift
    assert [call[4] for call in calls] == [(0, 1, 1), (0, 1, 1)]  # the mask's


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize(("side", "training"), [(32, False), (40, True)], ids=["divided, eval", "padded, train"])
def test_timm(name, side, training, calls):
    same(timm_model(name, side, drop_path_rate=0.0).train(training), torch.randn(2, 3, side, side))
    assert len(calls) == 3


@pytest.mark.parametrize(
    "options", [{"strict_img_size": False}, {"always_partition": True}, {"head_dim": 16}, {"qkv_bias": False}], ids=str
)
def test_timm_options(options, calls):
    side = 44 if "strict_img_size" in options else 32
    same(timm_model(**options), torch.randn(2, 3, side, side))
    assert len(calls) == 3


@pytest.mark.parametrize("size", [(32, 32), (40, 36), (16, 16)], ids=str)
@pytest.mark.parametrize(("training", "qkv_bias"), [(True, True), (False, False)], ids=["train", "eval, no bias"])
def test_transformers(size, training, qkv_bias, calls):
    model = transformers_model(qkv_bias=qkv_bias).train(training)
    if size == (16, 16):  # the second stage is smaller than its window, which transformers cannot do
        model.encoder.layers = model.encoder.layers[:1]
        model.encoder.layers[0].downsample = None
        model.layernorm = nn.Identity()
    same(model, torch.randn(2, 3, *size), call=lambda model, x: model(x).last_hidden_state)
    assert len(calls) == sum(len(stage.blocks) for stage in model.encoder.layers)


def test_transformers_gives_attentions_when_asked(calls):
    model = transformers_model(attn_implementation="eager")
    other, x = swapped_copy(model), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match="attention weights are asked for"):
        found = other(x, output_attentions=True).attentions
    expected = model(x, output_attentions=True).attentions
    assert not calls and len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_an_older_swin_layer_of_transformers(calls):
    """q, k and v under `attention.self`, a head mask, attention maps on demand."""
    model = transformers_model()
    if not hasattr(model.encoder.layers[0].blocks[1].attention, "self"):
        pytest.skip("this transformers has the newer layer")
    layer, other = model.encoder.layers[0].blocks[1], swapped_copy(model).encoder.layers[0].blocks[1]
    x, grid = torch.randn(2, 64, 16), (8, 8)
    for options in ({"output_attentions": True}, {"head_mask": torch.ones(1)}):
        if "head_mask" in options and "head_mask" not in type(layer).forward.__code__.co_varnames:
            continue
        with pytest.warns(UserWarning, match="asked for|masked or pruned"):
            found = other(x, grid, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, layer(x, grid, **options)))
        assert not calls


MODELS = {
    "torchvision 3-D": (attention_3d, (2, 6, 7, 8, 16)),
    "torchvision": (attention_2d, (2, 7, 8, 16)),
    "torchvision v2": (attention_v2, (2, 7, 8, 16)),
    "MONAI": (lambda **options: monai_layer((4, 3, 3), **options), (2, 16, 6, 7, 8)),
    "Video Swin": (video_layer, (2, 6, 7, 8, 16)),
}
every_model = pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)


@every_model
def test_undo_gives_the_original_back(build, shape):
    model, x = build(), torch.randn(shape)
    before = model(x)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count = swap(model)
    assert swap(model) == {}  # twice is once
    assert repr(count) and sum(count.values()) in (1, 2)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [type(module).__name__ for module in model.modules()] == [cls.__name__ for cls in classes]
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes))
    assert swap(model, undo=True) == count
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(x), before)
    assert swap(model, undo=True) == {}


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)


@every_model
def test_copies_pickles_and_loaded_weights(build, shape, calls):
    model, x = build(), torch.randn(shape)
    other = swapped_copy(build())
    other.load_state_dict(model.state_dict())  # into a swapped model: parameters are read when it is called
    expected = swapped_copy(model)(x)
    for one in (other, copy.deepcopy(other), _through_pickle(other)):
        calls.clear()
        assert torch.equal(one(x), expected)
        assert calls
        assert swap(one, undo=True)
    replica = swapped_copy(model)._replicate_for_data_parallel()  # bound to itself, not to what it is a replica of
    assert replica.forward.__self__ is replica
    assert swap(nn.DataParallel(build()))


@every_model
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_half_precision(build, shape, way, calls):
    """As exact as the original: at most twice its own error against float64, and one rounding.

    Over four draws together: a tensor as small as v2's `logit_scale` is now and then right by luck.
    """
    if way == "bfloat16" and isinstance(build(), video_swin.BasicLayer):
        pytest.skip("the original's mask is float32: it runs under autocast only")

    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            return model(x)

    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    truth, eager, fused = [], [], []
    for _ in range(4):
        model, x = build(), torch.randn(shape)
        truth.append(answer(copy.deepcopy(model).double(), x.double(), lambda model, x: model(x)))
        eager.append(answer(copy.deepcopy(model).to(dtype), x.to(dtype), call))
        fused.append(answer(swapped_copy(model).to(dtype), x.to(dtype), call))
    assert calls and all(arguments[0].dtype == torch.bfloat16 for arguments in calls)
    for name, expected in truth[0].items():
        if expected is not None:
            draws = [torch.stack([draw[name].detach() for draw in answers]) for answers in (fused, eager, truth)]
            exactness.assert_as_exact_as_torch(name, *draws)


@every_model
def test_compiles_without_a_break(build, shape, calls):
    model, x = swapped_copy(build()), torch.randn(shape)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    larger = torch.randn(shape[0] + 1, *shape[1:])
    assert torch.allclose(compiled(larger), model(larger), atol=1e-5)


@every_model
def test_what_cannot_be_exact_keeps_its_path(build, shape, calls):
    """Bits of the original, and one warning that gives the reason."""

    def keeps(model, x, reason, call=lambda model, x: model(x)):
        other = swapped_copy(model)
        with pytest.warns(UserWarning, match=f"keeps its original path: .*{reason}"):
            torch.manual_seed(0)
            found = call(other, x)
        torch.manual_seed(0)
        assert torch.equal(found, call(model, x)) and not calls
        with warnings.catch_warnings():  # said once
            warnings.simplefilter("error")
            call(other, x)

    x = torch.randn(shape)
    keeps(build().double(), x.double(), "float64 is not among")
    option = "attn_drop" if hasattr(build(), "blocks") else "attention_dropout"
    keeps(build(**{option: 0.5}).train(), x, "dropout of attention weights is on")
    assert swapped_copy(build(**{option: 0.5}).eval())(x) is not None and calls


def test_wide_heads_keep_their_path(calls):
    model = torchvision_swin().ShiftedWindowAttention(144, [3, 3], [1, 1], 2)
    with pytest.warns(UserWarning, match="its heads have 72 channels, the kernels take 64"):
        assert torch.equal(swapped_copy(model)(x := torch.randn(1, 6, 6, 144)), model(x))
    assert not calls


@pytest.mark.parametrize("layer", [video_layer, lambda: monai_layer((4, 3, 3))], ids=["Video Swin", "MONAI"])
def test_another_mask_keeps_the_original_path(layer, calls):
    model = layer()
    block, other, x = model.blocks[1], swapped_copy(model).blocks[1], torch.randn(2, 8, 6, 6, 16)
    implied = video_swin.mask_of((8, 6, 6), (4, 3, 3), (2, 1, 1))
    assert torch.allclose(other(x, implied), block(x, implied), atol=1e-5) and len(calls) == 1
    assert torch.allclose(other(x, None), block(x, None), atol=1e-5) and len(calls) == 2  # rolled, and nothing masked
    other = swapped_copy(model).blocks[1]
    with pytest.warns(UserWarning, match="its mask is not the one that its shift implies"):
        assert torch.equal(other(x, implied / 2), block(x, implied / 2))
    assert len(calls) == 2


def test_a_mask_from_elsewhere_is_not_believed_when_compiling(calls):
    """Values cannot be read there: a block keeps its path unless its layer makes the mask, or it was seen before."""
    block, x = video_layer().blocks[1], torch.randn(2, 8, 6, 6, 16)
    mask = video_swin.mask_of((8, 6, 6), (4, 3, 3), (2, 1, 1))
    other = swapped_copy(block)
    with pytest.warns(UserWarning, match="its mask is not"):
        torch.compile(other, backend="eager")(x, mask)
    assert not calls
    other(x, mask)
    torch.compiler.reset()
    torch.compile(other, backend="eager", fullgraph=True)(x, mask)
    assert len(calls) == 2


def test_hooks_on_attention_keep_the_original_path(calls):
    for part in ("attn", "attn.softmax"):
        model, seen = video_layer(), []
        other = swapped_copy(model)
        handle = (
            other.blocks[1].get_submodule(part).register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        )
        with pytest.warns(UserWarning, match="hooks are set"):
            other(torch.randn(2, 8, 6, 6, 16))
        assert len(seen) == 1 and len(calls) == 1
        handle.remove()
        calls.clear()
        runtime._warned.clear()


def test_tracing_sees_the_original():
    model, x = attention_2d(), torch.randn(1, 6, 6, 16)
    with pytest.warns(UserWarning, match="it is being traced"):
        traced = torch.fx.symbolic_trace(swapped_copy(model))
    assert torch.equal(traced(x), model(x))
    for one in (swapped_copy(model), model):
        traced = cast(nn.Module, torch.jit.trace(one, x, check_trace=False))
        assert torch.equal(traced(x), model(x))
        with pytest.warns(UserWarning, match="nothing was changed"):
            assert swap(traced) == {}


def test_a_model_of_something_else():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.warns(UserWarning, match=r"nothing was changed; none of these .* ShiftedWindowAttention3d \(torch"):
        assert swap(model) == {}
    assert swap(model, undo=True) == {}
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got list"):
        swap(cast(Any, [model]))


def test_what_only_resembles_is_left_alone():
    swin3d = torchvision_swin3d()

    class ShiftedWindowAttention3d(swin3d.ShiftedWindowAttention3d):  # the name, and a forward that is inherited
        pass

    resembling = ShiftedWindowAttention3d(16, WINDOW_3D, SHIFT_3D, 2)
    patched = attention_3d()
    patched.forward = lambda x: x
    turned = attention_3d()
    index = turned.get_buffer("relative_position_index")
    index.copy_(index.flip(0))
    model = nn.ModuleList([resembling, patched, turned])
    with pytest.warns(UserWarning) as said:
        assert swap(model) == {}
    first, second = (str(warning.message) for warning in said)
    assert "counts relative positions in another way" in first and "nothing was changed" in second


def test_a_scale_of_its_own_keeps_the_original_path(calls):
    model = video_layer(qk_scale=0.1)
    with pytest.warns(UserWarning, match=r"it scales its queries by 0\.1"):
        assert torch.equal(swapped_copy(model)(x := torch.randn(1, 4, 6, 6, 16)), model(x))
    assert not calls


def test_torchvision_whose_dropout_has_no_switch(monkeypatch, calls):
    """Before 0.15 the functional had no `training`: its dropout is on in eval too, and stays so."""
    swin3d = torchvision_swin3d()
    functional = swin3d.shifted_window_attention_3d

    def without_switch(*given, **named):
        return functional(*given, **{**named, "training": True})

    without_switch.__signature__ = inspect.signature(lambda input, qkv_weight, proj_weight, dropout=0.0: input)
    monkeypatch.setattr(swin3d, "shifted_window_attention_3d", without_switch)
    x = torch.randn(1, 4, 6, 6, 16)
    with pytest.warns(UserWarning, match="dropout of attention weights is on"):
        swapped_copy(attention_3d(attention_dropout=0.5))(x)
    assert not calls
    assert (swapped_copy(attention_3d(dropout=0.5))(x) == 0).any() and len(calls) == 1


@pytest.mark.skipif(not runtime.INTERPRETED, reason="the interpreter is chosen when the process starts")
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (attention_3d, (1, 4, 3, 4, 16)),
        (attention_v2, (1, 4, 5, 16)),
        (video_layer, (1, 3, 4, 5, 16)),
        (lambda: monai_layer((2, 2)), (1, 16, 3, 4)),
    ],
    ids=["torchvision 3-D", "torchvision v2", "Video Swin", "MONAI 2-D"],
)
def test_with_the_kernels_themselves(build, shape):
    with runtime.implementation("fused"):
        same(build(), torch.randn(shape))
