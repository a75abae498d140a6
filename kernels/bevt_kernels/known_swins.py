"""What the attention half of other people's Swin blocks computes, said through `window_attention`.

An answer takes the module and its method's arguments by name. It returns what the method returns, or a sentence that
says why the original has to do it. It calls the layers that the original calls, and reads every parameter anew.

Legend: C channels in nH heads of width d on a (t, h, w) token grid; an image has t = 1.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .window_attention import DTYPES, LARGEST_WINDOW, WIDEST_HEAD, window_attention
from .window_geometry import BiasIndex, Triple, shift_mask, used_window

MARKS = "_bevt_kernels_marks"
NO_SHIFT: Triple = (0, 0, 0)

DROPOUT = "dropout of attention weights is on"
HOOKS = "hooks are set where its attention weights would pass"
OTHER_TABLE = "its bias table is for another window"
OTHER_MASK = "its mask is not the one that its shift implies"


class Known(NamedTuple):
    """How one kind of module is recognised, and who answers instead."""

    name: str  # of the class
    method: str  # that gives way
    arguments: tuple[str, ...]  # it has at least these
    attributes: tuple[str, ...]  # the module has at least these
    attention: str  # where the module keeps the attention it calls; "" if it is that itself
    answer: Callable[..., Any]


class Marks:
    """What a swapped module remembers besides its parameters, as the attribute MARKS."""

    def __init__(self, drops_in_eval: bool) -> None:
        self.drops_in_eval = drops_in_eval
        self.made_in_the_model = False  # the masks that this module is handed
        self.masks: dict[tuple, Triple | None] = {}  # geometry -> the shift that the mask belongs to


def triple(size: Sequence[int], missing: int = 1) -> Triple:
    """A window (1, h, w) of a 2-D one; with missing=0, a shift (0, h, w)."""
    t, h, w = (missing,) * (3 - len(size)) + tuple(size)
    return (t, h, w)


def _lacking(grid: Triple, window: Triple) -> Triple:
    """How much each axis lacks to be a multiple of the window."""
    t, h, w = [-length % size for length, size in zip(grid, window)]
    return (t, h, w)


def _clamped(shift: Triple, window: Triple, grid: Triple) -> Triple:
    """The shift, without the axes that are one window."""
    t, h, w = [0 if length <= size else step for step, size, length in zip(shift, window, grid)]
    return (t, h, w)


def _beyond(x: Tensor, width: int, window: Triple, shift: Triple) -> str | None:
    """Why the kernels cannot do this layer; None if they can."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not among the dtypes of the kernels"
    if width > WIDEST_HEAD:
        return f"its heads have {width} channels, the kernels take {WIDEST_HEAD}"
    if prod(window) > LARGEST_WINDOW or any([step >= size for step, size in zip(shift, window)]):
        return f"its window {window}, shifted by {shift}, is not one that the kernels take"
    return None


def _watched(*places: nn.Module | None) -> bool:
    """Whether somebody listens where the kernel passes by."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any([bool(getattr(place, kind, None)) for place in places for kind in kinds])


def _attend(
    x: Tensor,
    project: Callable[[Tensor], Tensor],
    table: Tensor,
    window: Triple,
    shift: Triple,
    mask_shift: Triple | None = None,
    clip: bool = False,
    bias_index: BiasIndex = "true",
) -> Tensor:
    """Pad, project, attend, crop: (B, [t,] h, w, C) -> (B, [t,] h, w, nH*d).

    `project` makes (B, t, h, w, 3, nH, d). Padding comes before it, so padded tokens hold the bias and are attended
    to, as in every original. `clip`: an axis shorter than the window is one smaller window; otherwise it is padded.
    """
    image, (t, h, w) = x.ndim == 4, triple(x.shape[1:-1])
    x = x.unsqueeze(1) if image else x
    lacking = _lacking((t, h, w), used_window((t, h, w), window) if clip else window)
    if any(lacking):
        x = F.pad(x, (0, 0, 0, lacking[2], 0, lacking[1], 0, lacking[0]))
    out = window_attention(project(x), table, window, shift, mask_shift, bias_index)
    out = out[:, :t, :h, :w].flatten(-2)
    return out.squeeze(1) if image else out


def _belongs_to(
    block: Any, mask: Tensor, grid: Triple, used: Triple, candidates: Sequence[Triple], own: bool = False
) -> Triple | None:
    """Which of these shifts the mask belongs to; None: to none. Its values are read once for each geometry.

    Under torch.compile there are no values: only a mask that the model makes is believed, the block's `own` too.
    """
    marks: Marks = block.__dict__[MARKS]
    geometry = (tuple(mask.shape), grid, used, tuple(candidates))
    if geometry in marks.masks:
        return marks.masks[geometry]
    if mask.shape != (prod(grid) // prod(used), prod(used), prod(used)):
        return None
    if torch.compiler.is_compiling():
        return candidates[0] if own or marks.made_in_the_model else None
    found = (s for s in candidates if torch.equal(mask, shift_mask(grid, used, s, mask.device, mask.dtype)))
    marks.masks[geometry] = next(found, None)
    return marks.masks[geometry]


def _heads(qkv: Tensor, heads: int) -> Tensor:
    return qkv.unflatten(-1, (3, heads, -1))


def _cosine(qkv: Tensor, logit_scale: Tensor) -> Tensor:
    """Swin v2's attention as a plain one: q and k of unit length, and the scale in q, divided by what will multiply it.

    The unit vectors and the scale are made in float32, and rounded once.
    """
    q, k, v = qkv.unbind(-3)  # (B, t, h, w, nH, d) each
    precise = torch.promote_types(qkv.dtype, torch.float32)
    scale = logit_scale.to(precise).clamp(max=math.log(100.0)).exp().view(-1, 1) * qkv.shape[-1] ** 0.5  # (nH, 1)
    q = F.normalize(q.to(precise), dim=-1) * scale
    k = F.normalize(k.to(precise), dim=-1)
    return torch.stack((q.to(v.dtype), k.to(v.dtype), v), dim=-3)


def _continuous_table(attention: Any) -> Tensor:
    """Swin v2's bias, made by an MLP from log-spaced offsets, as the table it stands for."""
    return 16 * torch.sigmoid(attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads))


def _torchvision(block: Any, x: Tensor) -> Tensor | str:
    """ShiftedWindowAttention, its V2 and its 3d: one module from (B, [t,] h, w, C) to the same."""
    dropping = block.training or block.__dict__[MARKS].drops_in_eval
    window, clip = triple(block.window_size), x.ndim == 5
    shift = _clamped(triple(block.shift_size, 0), window, triple(x.shape[1:-1]))
    if block.attention_dropout and dropping:
        return DROPOUT
    if reason := _beyond(x, x.shape[-1] // block.num_heads, window, shift):
        return reason
    bias, logit_scale = block.qkv.bias, getattr(block, "logit_scale", None)
    table = block.relative_position_bias_table if logit_scale is None else _continuous_table(block)
    if logit_scale is not None and bias is not None:  # the bias of the keys is held at zero
        q, _, v = bias.chunk(3)
        bias = torch.cat((q, torch.zeros_like(q), v))

    def project(x: Tensor) -> Tensor:
        qkv = _heads(F.linear(x, block.qkv.weight, bias), block.num_heads)
        return qkv if logit_scale is None else _cosine(qkv, logit_scale)

    out = _attend(x, project, table, window, shift, clip=clip, bias_index="official" if clip else "true")
    return F.dropout(F.linear(out, block.proj.weight, block.proj.bias), block.dropout, dropping)


def _plain(attention: Any, x: Tensor, window: Sequence[int], shift: Triple) -> str | None:
    """Why a WindowAttention cannot be answered for; None if it can."""
    if attention.training and attention.attn_drop.p:
        return DROPOUT
    if _watched(attention, attention.attn_drop, getattr(attention, "softmax", None)):
        return HOOKS
    if tuple(attention.window_size) != tuple(window):
        return OTHER_TABLE
    width = attention.qkv.out_features // (3 * attention.num_heads)
    if not math.isclose(getattr(attention, "scale", width**-0.5), width**-0.5):
        return f"it scales its queries by {attention.scale}"
    return _beyond(x, width, triple(window), shift)


def _project(attention: Any, x: Tensor) -> Tensor:
    """The fused layer of a WindowAttention; timm's v2 keeps the biases beside it."""
    if not hasattr(attention, "logit_scale"):
        return _heads(attention.qkv(x), attention.num_heads)
    if attention.q_bias is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        separate = getattr(attention, "qkv_bias_separate", False)
        qkv = attention.qkv(x) + bias if separate else F.linear(x, attention.qkv.weight, bias)
    return _cosine(_heads(qkv, attention.num_heads), attention.logit_scale)


def _monai_or_official(block: Any, x: Tensor, mask_matrix: Tensor | None, is_img: bool = False) -> Tensor | str:
    """The attention half of a block of MONAI, Video Swin or BEVT; the layer above hands the mask down.

    BEVT sends images (B, h, w, C) through its three-dimensional blocks: the shift is not clamped there, and every
    block is given the mask of the shifted ones (SPEC X3).
    """
    attention, window, grid = block.attn, triple(block.window_size), triple(x.shape[1:-1])
    used, shift = used_window(grid, window), triple(block.shift_size, 0)
    lacking = _lacking(grid, used)
    if is_img:
        if any(lacking) or window[1] != window[2]:
            return f"an image of {grid[1]} x {grid[2]} tokens is not divided by a square window"
        shift = (0, shift[1], shift[2])
        candidates, mask = [(0, window[1] // 2, window[2] // 2), shift], mask_matrix
    else:
        shift = _clamped(shift, window, grid)
        candidates, mask = [shift], mask_matrix if any(shift) else None
    if reason := _plain(attention, x, block.window_size, shift):
        return reason
    mask_shift: Triple | None = NO_SHIFT
    if mask is not None:
        t, h, w = [length + more for length, more in zip(grid, lacking)]
        mask_shift = _belongs_to(block, mask, (t, h, w), used, candidates)
        if mask_shift is None:
            return OTHER_MASK
    project, table = partial(_project, attention), attention.relative_position_bias_table
    out = _attend(block.norm1(x), project, table, window, shift, mask_shift, clip=True, bias_index="official")
    return attention.proj_drop(attention.proj(out))


def _timm(block: Any, x: Tensor) -> Tensor | str:
    """The attention half of timm's SwinTransformerBlock and SwinTransformerV2Block: (B, h, w, C) to the same."""
    attention, window, grid = block.attn, triple(block.window_size), triple(x.shape[1:-1])
    shift, lacking = triple(block.shift_size, 0), _lacking(grid, window)
    if reason := _plain(attention, x, block.window_size, shift):
        return reason
    mask_shift: Triple | None = shift
    if any(shift) and not getattr(block, "dynamic_mask", False):
        t, h, w = [length + more for length, more in zip(grid, lacking)]
        mask = block.attn_mask
        mask_shift = NO_SHIFT if mask is None else _belongs_to(block, mask, (t, h, w), window, [shift], own=True)
        if mask_shift is None:
            return OTHER_MASK
    continuous = hasattr(attention, "logit_scale")
    table = _continuous_table(attention) if continuous else attention.relative_position_bias_table
    project = partial(_project, attention)
    if any(shift) and any(lacking):  # timm rolls before it pads: the roll cannot be left to the kernel
        x = x.roll((-shift[1], -shift[2]), (1, 2))
        out = _attend(x, project, table, window, NO_SHIFT, mask_shift).roll((shift[1], shift[2]), (1, 2))
    else:
        out = _attend(x, project, table, window, shift, mask_shift)
    return attention.proj_drop(attention.proj(out))


def _three_linears(x: Tensor, linears: Sequence[nn.Module], heads: int) -> Tensor:
    """q, k and v of separate layers: one product where they are plain, so that nothing is copied to join them."""
    plain = [linear for linear in linears if type(linear) is nn.Linear and not _watched(linear)]
    weights: list[Tensor] = [linear.weight for linear in plain]
    biases: list[Tensor] = [linear.bias for linear in plain if linear.bias is not None]
    if len(weights) == 3 and len(biases) in (0, 3):
        return _heads(F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None), heads)
    return torch.stack([linear(x).unflatten(-1, (heads, -1)) for linear in linears], dim=-3)


def _transformers(
    layer: Any,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
    **others: Any,
) -> tuple | str:
    """transformers' SwinLayer, (B, h*w, C) to the same. The older one keeps an attention inside its attention."""
    outer, older = layer.attention, hasattr(layer.attention, "self")
    attention = outer.self if older else outer
    holder = attention if older else attention.relative_position_bias
    if output_attentions or (not older and getattr(attention.config, "output_attentions", False)):
        return "attention weights are asked for"
    if head_mask is not None or getattr(outer, "pruned_heads", None):
        return "heads are masked or pruned"
    if attention.training and (attention.dropout.p if older else attention.attention_dropout):
        return DROPOUT
    if _watched(outer, attention, holder, getattr(attention, "dropout", None)):
        return HOOKS
    if not always_partition:
        layer.set_shift_and_window_size(input_dimensions)
    size, step = int(layer.window_size), int(layer.shift_size)
    window, shift = (1, size, size), (0, step, step)
    if tuple(holder.window_size) != window[1:]:
        return OTHER_TABLE
    heads = attention.num_attention_heads
    if reason := _beyond(hidden_states, hidden_states.shape[-1] // heads, window, shift):
        return reason
    names = ("query", "key", "value") if older else ("q_proj", "k_proj", "v_proj")
    project = partial(_three_linears, linears=[getattr(attention, name) for name in names], heads=heads)
    x = layer.layernorm_before(hidden_states).unflatten(1, input_dimensions)  # (B, h, w, C)
    out = _attend(x, project, holder.relative_position_bias_table, window, shift).flatten(1, 2)
    if older:
        out = hidden_states + layer.drop_path(outer.output(out, hidden_states))
        return (out + layer.output(layer.intermediate(layer.layernorm_after(out))),)
    out = hidden_states + layer.drop_path(layer.dropout(attention.o_proj(out)))
    return out + layer.dropout(layer.mlp(layer.layernorm_after(out))), None


_WINDOWS = ("qkv.weight", "proj.weight", "attention_dropout", "dropout", "shift_size")
_BLOCK = ("attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop.p", "attn.num_heads", "norm1", "shift_size")
_LAYER = ("layernorm_before", "layernorm_after", "drop_path", "set_shift_and_window_size", "get_attn_mask")
_TABLE = ("relative_position_bias_table",)
_CONTINUOUS = ("cpb_mlp", "relative_coords_table", "logit_scale")
_NEWER = ("attention.q_proj", "attention.o_proj", "attention.relative_position_bias", "mlp", "dropout")
_OLDER = ("attention.self.query", "attention.self.relative_position_bias_table", "intermediate", "output")


def _inside(place: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{place}.{name}" for name in names)


_PARTS, _STATES, _MASKED = _inside("attn", _TABLE), ("hidden_states", "input_dimensions"), ("x", "mask_matrix")

# fmt: off
KNOWN = {
    "torchvision 3-D": Known("ShiftedWindowAttention3d", "forward", ("x",), _WINDOWS + _TABLE, "", _torchvision),
    "torchvision": Known("ShiftedWindowAttention", "forward", ("x",), _WINDOWS + _TABLE, "", _torchvision),
    "torchvision v2": Known("ShiftedWindowAttentionV2", "forward", ("x",), _WINDOWS + _CONTINUOUS, "", _torchvision),
    "timm": Known("SwinTransformerBlock", "_attn", ("x",), _BLOCK + _PARTS, "attn", _timm),
    "timm v2": Known("SwinTransformerV2Block", "_attn", ("x",), _BLOCK + _inside("attn", _CONTINUOUS), "attn", _timm),
    "transformers": Known(
        "SwinLayer", "forward", (*_STATES, "always_partition"), _LAYER + _NEWER, "attention", _transformers),
    "transformers, older": Known(
        "SwinLayer", "forward", (*_STATES, "output_attentions"), _LAYER + _OLDER, "attention.self", _transformers),
    "MONAI": Known("SwinTransformerBlock", "forward_part1", _MASKED, _BLOCK + _PARTS, "attn", _monai_or_official),
    "BEVT, Video Swin": Known(
        "SwinTransformerBlock3D", "forward_part1", _MASKED, _BLOCK + _PARTS, "attn", _monai_or_official),
}
# fmt: on
