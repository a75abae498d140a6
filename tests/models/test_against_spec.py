"""The whole model beside a slow one written from SPEC 1 alone: functions over official names, one window after another.

Other tests look at parts. Here a checkpoint with the official names goes through `from_official` into a model, and what
comes out (features, losses, every gradient) is compared with what the same tensors give by the letter.
"""

import itertools
import math

import pytest
import torch

from bevt_fast.data.batch import Clips, Images, JointBatch, Targets
from bevt_fast.models import official
from bevt_fast.models.bevt import Bevt
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwin, VideoSwinConfig
from bevt_fast.objectives.joint import JointObjective
from bevt_fast.tokenizers.dalle import Dalle

DEPTHS, HEADS = (2, 2, 2, 2), (1, 2, 2, 4)
VOCABULARY, CLASSES = 13, 5
BLOCK_SHAPES = {  # in widths C; the table apart
    "norm1.weight": (1,),
    "norm1.bias": (1,),
    "attn.qkv.weight": (3, 1),
    "attn.qkv.bias": (3,),
    "attn.proj.weight": (1, 1),
    "attn.proj.bias": (1,),
    "norm2.weight": (1,),
    "norm2.bias": (1,),
    "mlp.fc1.weight": (4, 1),
    "mlp.fc1.bias": (4,),
    "mlp.fc2.weight": (1, 4),
    "mlp.fc2.bias": (1,),
}


def encoder_shapes(c, depths, heads, window):
    """The table of SPEC 7, less what only pretraining has."""
    k, offsets = 8 * c, math.prod(2 * size - 1 for size in window)
    shapes = {"patch_embed.proj.weight": (c, 3, 2, 4, 4), "patch_embed.proj.bias": (c,), "norm.weight": (k,)}
    shapes |= {"patch_embed.norm.weight": (c,), "patch_embed.norm.bias": (c,), "norm.bias": (k,)}
    for stage, depth in enumerate(depths):
        width = c * 2**stage
        for b in range(depth):
            block = f"layers.{stage}.blocks.{b}."
            shapes |= {block + name: tuple(n * width for n in shape) for name, shape in BLOCK_SHAPES.items()}
            shapes[block + "attn.relative_position_bias_table"] = (offsets, heads[stage])
        if stage < 3:
            merging = f"layers.{stage}.downsample."
            shapes |= {merging + "norm.weight": (4 * width,), merging + "norm.bias": (4 * width,)}
            shapes[merging + "reduction.weight"] = (2 * width, 4 * width)
    return {"backbone." + name: shape for name, shape in shapes.items()}


def joint_shapes(c, depths, heads, window, vocabulary):
    k = 8 * c
    shapes = {"patch_embed_2d.proj.weight": (c, 3, 4, 4), "mask_token": (1, 1, c)}
    shapes |= {"patch_embed_2d." + name: (c,) for name in ("proj.bias", "norm.weight", "norm.bias")}
    shapes |= {"fpn.0.weight": (k, k, 2, 2), "fpn_s.0.weight": (k, k, 1, 2, 2), "fpn_t.0.weight": (k, k, 2, 1, 1)}
    shapes |= {"lm_down.weight": (k, k + k // 2), "lm_down_st.0.weight": (k, k + k // 2)}
    shapes |= {name + ".bias": (k,) for name in ("fpn.0", "fpn_s.0", "fpn_t.0", "lm_down", "lm_down_st.0")}
    shapes = encoder_shapes(c, depths, heads, window) | {"backbone." + name: shape for name, shape in shapes.items()}
    return shapes | {"cls_head.lm_head.weight": (vocabulary, k), "cls_head.lm_head.bias": (vocabulary,)}


def checkpoint(shapes):
    """float32 values in float64, far from any initialisation."""
    drawn = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    return {name: (x + 1 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else x).double()
            for name, x in drawn.items()}  # fmt: skip


def norm(x, p, name):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[name + ".weight"] + p[name + ".bias"]


def linear(x, p, name):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0)


def padded(x, multiples):
    for axis, multiple in zip((1, 2, 3), multiples):
        shape = list(x.shape)
        shape[axis] = -shape[axis] % multiple
        x = torch.cat([x, x.new_zeros(shape)], axis)
    return x


def roll(x, shift):
    """Place i takes what stood at i + shift."""
    for axis, s in zip((1, 2, 3), shift):
        x = x[(slice(None),) * axis + ([(i + s) % x.shape[axis] for i in range(x.shape[axis])],)]
    return x


def bias_rows(used, window, quirk):
    places = list(itertools.product(*map(range, window if quirk else used)))[: math.prod(used)]
    (dw, hw, ww), rows = window, []
    for da, ha, wa in places:
        row = [
            ((da - d + dw - 1) * (2 * hw - 1) + ha - h + hw - 1) * (2 * ww - 1) + wa - w + ww - 1 for d, h, w in places
        ]
        rows.append(row)
    return torch.tensor(rows)


def region(i, length, window, shift):
    return 0 if not shift or i < length - window else 1 if i < length - shift else 2


def attend(x, p, name, heads, used, window, mask_shift, quirk):
    """Windows in place: x is normed, padded and rolled."""
    grid, width, out = x.shape[1:4], x.shape[-1] // heads, torch.zeros_like(x)
    bias = p[name + ".relative_position_bias_table"][bias_rows(used, window, quirk)]
    qkv = linear(x, p, name + ".qkv")
    for corner in itertools.product(*(range(0, length, size) for length, size in zip(grid, used))):
        places = list(itertools.product(*(range(start, start + size) for start, size in zip(corner, used))))
        d, h, w = torch.tensor(places).T
        regions = [tuple(map(region, place, grid, used, mask_shift)) for place in places]
        numbers = torch.tensor([sorted(set(regions)).index(each) for each in regions])
        apart = -100.0 * (numbers[:, None] != numbers).double()
        q, k, v = qkv[:, d, h, w].unflatten(-1, (3, heads, width)).unbind(2)  # (B, N, heads, width)
        result = []
        for head in range(heads):
            logits = (q[:, :, head] * width**-0.5) @ k[:, :, head].transpose(1, 2) + bias[:, :, head] + apart
            result.append(logits.softmax(-1) @ v[:, :, head])
        out = out.index_put((torch.arange(len(x))[:, None], d, h, w), torch.cat(result, -1))
    return linear(out, p, name + ".proj")


def stages(x, p, window, quirk=False, official_image=False):
    features = []
    for stage, depth in enumerate(DEPTHS):
        for b in range(depth):
            name, grid = f"layers.{stage}.blocks.{b}", x.shape[1:4]
            used = tuple(min(size, length) for size, length in zip(window, grid))
            shift = tuple(size // 2 if length > size else 0 for size, length in zip(window, grid))
            if official_image:  # SPEC X3: masked in every block, shifted in every stage
                shift = (0, window[1] // 2, window[2] // 2)
            by = shift if b % 2 else (0, 0, 0)
            y = roll(padded(norm(x, p, name + ".norm1"), used), by)
            y = attend(y, p, name + ".attn", HEADS[stage], used, window, shift if official_image else by, quirk)
            x = x + roll(y, [-s for s in by])[:, : grid[0], : grid[1], : grid[2]]
            y = linear(norm(x, p, name + ".norm2"), p, name + ".mlp.fc1")
            x = x + linear(y * (1 + torch.erf(y / 2**0.5)) / 2, p, name + ".mlp.fc2")
        features.append(x)
        if stage < 3:
            x = padded(x, (1, 2, 2))
            x = torch.cat([x[:, :, 0::2, 0::2], x[:, :, 1::2, 0::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 1::2]], -1)
            x = linear(norm(x, p, f"layers.{stage}.downsample.norm"), p, f"layers.{stage}.downsample.reduction")
    return features


def stem(pixels, p, name, patch, mask=None):
    """Clips (B, 3, T, H, W); an image has T = 1 and a patch of (1, 4, 4)."""
    x = padded(pixels.movedim(1, -1), patch).unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).unflatten(1, (-1, patch[0]))
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # (B, t, h, w, pixels of a patch)
    x = norm(x @ p[name + ".proj.weight"].flatten(1).T + p[name + ".proj.bias"], p, name + ".norm")
    if mask is None:
        return x
    m = mask.double().repeat_interleave(4, 2).repeat_interleave(4, 3)[..., None]
    return x * (1 - m) + p["mask_token"] * m


def enlarged(x, p, name, factors):
    """A transposed convolution whose kernel is its stride."""
    batch, *grid, _ = x.shape
    weight = p[name + ".weight"].reshape(x.shape[-1], -1, *factors)
    out = x.new_zeros(batch, *(n * f for n, f in zip(grid, factors)), weight.shape[1])
    for i, j, k in itertools.product(*map(range, factors)):
        out[:, i :: factors[0], j :: factors[1], k :: factors[2]] = x @ weight[:, :, i, j, k] + p[name + ".bias"]
    return out


def clip_features(p, pixels, mask, window, quirk=False):
    _, _, f3, f4 = stages(stem(pixels, p, "patch_embed", (2, 4, 4), mask), p, window, quirk)
    x = linear(torch.cat([f3, enlarged(f4, p, "fpn_s.0", (1, 2, 2))], -1), p, "lm_down_st.0")
    return norm(enlarged(x, p, "fpn_t.0", (2, 1, 1)), p, "norm")


def image_features(p, pixels, mask, window, quirk=False, official_image=False):
    mask = None if mask is None else mask[:, None]
    tokens = stem(pixels[:, :, None], p, "patch_embed_2d", (1, 4, 4), mask)
    _, _, f3, f4 = stages(tokens, p, window, quirk, official_image)
    x = torch.cat([f3, enlarged(f4, p, "fpn.0", (1, 2, 2))], -1)
    return norm(linear(x, p, "lm_down"), p, "norm")[:, 0]


def pair(window, **switches):
    """A model in float64, and the tensors it was loaded from under the names inside their owners."""
    config = VideoSwinConfig(embed_dim=8, depths=DEPTHS, heads=HEADS, window=window)
    weights = checkpoint(joint_shapes(8, DEPTHS, HEADS, window, VOCABULARY))
    model = Bevt(config, vocab_size=VOCABULARY, **switches).double().eval()
    model.load_state_dict(official.from_official(weights))
    bare = {name.removeprefix("backbone."): x.clone().requires_grad_() for name, x in weights.items()}
    return model, {name.removeprefix("cls_head."): x for name, x in bare.items()}


def assert_equal_with_gradients(model, p, ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(expected)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = official.to_official({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    gradients = {name.removeprefix("backbone.").removeprefix("cls_head."): x for name, x in gradients.items()}
    assert gradients.keys() == {name for name, x in p.items() if x.grad is not None}
    for name, gradient in gradients.items():
        scale = float(p[name].grad.abs().max())
        torch.testing.assert_close(gradient, p[name].grad, rtol=0, atol=1e-9 * max(scale, 1), msg=name)


@pytest.mark.parametrize("bias_index", ["true", "official"])
@pytest.mark.parametrize(
    "window, frames, sides, hidden",
    [
        ((8, 7, 7), 18, (96, 64), 0.4),  # time is padded to 16 steps and shifted
        ((8, 7, 7), 2, (224, 224), None),  # stage 4 is one window
        ((16, 7, 7), 16, (64, 96), 1.0),
        ((4, 3, 3), 10, (96, 96), 0.4),
        ((2, 2, 2), 6, (64, 32), 0.0),
    ],
    ids=str,
)
def test_clip_features_and_gradients(window, frames, sides, hidden, bias_index):
    model, p = pair(window, bias_index=bias_index)
    pixels = torch.randn(2 if frames > 2 else 1, 3, frames, *sides).double()
    grid = (len(pixels), frames // 2, sides[0] // 16, sides[1] // 16)
    mask = None if hidden is None else torch.rand(grid) < hidden
    expected = clip_features(p, pixels, mask, window, bias_index == "official")
    assert_equal_with_gradients(model, p, model.clip_features(pixels, mask), expected)


@pytest.mark.parametrize(
    "window, side, bias_index, image_attention",
    [
        ((8, 7, 7), 224, "true", "t1"),
        ((8, 7, 7), 224, "true", "official"),
        ((8, 7, 7), 96, "official", "t1"),
        ((4, 3, 3), 96, "official", "official"),
        ((4, 3, 3), 96, "true", "t1"),
        ((2, 2, 2), 64, "true", "official"),
    ],
    ids=str,
)
def test_image_features_and_gradients(window, side, bias_index, image_attention):
    model, p = pair(window, bias_index=bias_index, image_attention=image_attention)
    pixels, mask = torch.randn(2, 3, side, side).double(), torch.rand(2, side // 16, side // 16) < 0.5
    expected = image_features(p, pixels, mask, window, bias_index == "official", image_attention == "official")
    assert_equal_with_gradients(model, p, model.image_features(pixels, mask), expected)


@pytest.mark.parametrize("window", [(8, 7, 7), (4, 3, 3)], ids=str)
@pytest.mark.parametrize("clip", [(1, 4, 4), (3, 72, 104), (5, 60, 36), (17, 30, 50), (2, 180, 252)], ids=str)
def test_an_encoder_and_a_classifier_on_clips_of_any_size(window, clip):
    config = VideoSwinConfig(embed_dim=8, depths=DEPTHS, heads=HEADS, window=window)
    weights = checkpoint(encoder_shapes(8, DEPTHS, HEADS, window))
    weights |= checkpoint({"cls_head.fc_cls.weight": (CLASSES, 64), "cls_head.fc_cls.bias": (CLASSES,)})
    classifier = Classifier(config, classes=CLASSES).double().eval()
    classifier.load_state_dict(official.from_official(weights))
    encoder = VideoSwin(config).double()
    encoder.load_state_dict(classifier.encoder.state_dict())
    p = {name.removeprefix("backbone.").removeprefix("cls_head."): x for name, x in weights.items()}
    pixels = torch.randn(1, 3, *clip).double()
    with torch.no_grad():
        expected = stages(stem(pixels, p, "patch_embed", (2, 4, 4)), p, window)
        for ours, theirs in zip(encoder.eval().stages(pixels), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        scores = linear(norm(expected[3], p, "norm").mean((1, 2, 3)), p, "fc_cls")
        torch.testing.assert_close(classifier(pixels), scores, rtol=1e-9, atol=1e-9)


def test_losses_and_accuracies_one_position_after_another():
    window = (4, 3, 3)
    model, p = pair(window)
    images, clips = torch.randn(3, 3, 64, 64).double(), torch.randn(2, 3, 6, 32, 64).double()
    image_mask, clip_mask = torch.rand(3, 4, 4) < 0.5, torch.rand(2, 3, 2, 4) < 0.4
    ids = torch.randint(VOCABULARY, (3, 4, 4)), torch.randint(VOCABULARY, (2, 6, 2, 4))
    batch = JointBatch(Images(images, images, image_mask), Clips(clips, clips, clip_mask))
    with torch.no_grad():
        losses = JointObjective(model, image_weight=0.5, clip_weight=2.0)(batch, Targets(*ids))
        expected = []
        for features, names, mask in (
            (image_features(p, images, image_mask, window), ids[0], image_mask),
            (clip_features(p, clips, clip_mask, window), ids[1], clip_mask[:, [0, 0, 1, 1, 2, 2]]),
        ):
            terms, hits = [], []
            for place in itertools.product(*map(range, mask.shape)):
                if mask[place]:
                    logits, name = linear(features[place], p, "lm_head"), names[place]
                    terms.append(float(logits.exp().sum().log() - logits[name]))
                    hits.append(float(logits.argmax() == name))
            expected.append((sum(terms) / len(terms), sum(hits) / len(hits)))
    (image, image_accuracy), (clip, clip_accuracy) = expected
    assert [float(loss) for loss in losses] == pytest.approx(
        [0.5 * image + 2.0 * clip, image, clip, image_accuracy, clip_accuracy], rel=1e-6
    )


def test_a_joint_checkpoint_of_base_with_all_its_keys_loads_strictly():
    depths, heads, window = (2, 2, 18, 2), (4, 8, 16, 32), (8, 7, 7)
    with torch.device("meta"):
        weights = {n: torch.empty(s) for n, s in joint_shapes(128, depths, heads, window, 8192).items()}
        learnt = set(weights)
        for stage, depth in enumerate(depths):
            for b in range(depth):
                index = f"backbone.layers.{stage}.blocks.{b}.attn.relative_position_index"
                weights[index] = torch.empty(392, 392, dtype=torch.long)
        weights |= {"cls_head.vae_encoder." + name: x for name, x in Dalle().state_dict().items()}
        model = Bevt(VideoSwinConfig.preset("base", window=window))
        model.load_state_dict(official.from_official({"meta": {}, "state_dict": weights}), assign=True)
    assert sum(weights[name].numel() for name in learnt) == 109_679_048  # SPEC 1.1
    assert set(official.to_official(model.state_dict())) == learnt
