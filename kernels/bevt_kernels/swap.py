"""Put `window_attention` under the blocks of other people's Swin transformers, in place, and take it out again.

A module is known by its class name, by the methods its class defines itself and by its attributes; no other codebase is
imported. A swapped module is given a class of the same name, derived from its own, in which one method is replaced: the
one inside which the original rolls, pads, partitions and masks. Parameters, buffers, hooks and names are not touched,
parameters are read when the module is called, and the original method answers wherever the kernel could not be exact.

Legend as in `window_attention`: (t, h, w) token grid, nH heads of width d, N tokens in a window; an image has t = 1.
"""

import functools
import inspect
import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import runtime
from .window_attention import DTYPES, LARGEST_WINDOW, WIDEST_HEAD, window_attention
from .window_geometry import BiasIndex, Triple, bias_rows, shift_mask, used_window

NO_SHIFT: Triple = (0, 0, 0)
ORIGINAL = "_bevt_kernels_original"  # on a swapped class: the class it was derived from
MARKS = "_bevt_kernels_marks"  # on a swapped module: what it remembers besides its parameters


class Known(NamedTuple):
    """How one kind of module is recognised, and who answers instead."""

    name: str  # of the class
    method: str  # that gives way
    arguments: tuple[str, ...]  # it has at least these
    attributes: tuple[str, ...]  # the module has at least these
    attention: str  # where the module keeps the attention it calls; "" if it is that itself
    # (module, arguments by name) -> what the method returns, or a sentence: why the original has to answer
    answer: Callable[..., Any]


class Marks:
    """What a swapped module remembers besides its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.masks: dict[tuple, Triple | None] = {}  # geometry -> the shift that the mask handed in belongs to
        self.parent_makes_masks = False
        # torchvision before 0.15 has no `training` there, and its dropout is never off
        functional = [
            f for n, f in vars(sys.modules[type(module).__module__]).items() if n.startswith("shifted_window")
        ]
        self.drops_in_eval = any("training" not in inspect.signature(f).parameters for f in functional)


def swap(model: nn.Module, undo: bool = False) -> dict[str, int]:
    """Let `window_attention` answer in every module of `model` that is known, in place.

    Works before and after `.to`, `.half`, `load_state_dict`, `deepcopy` and `DataParallel`; a module that is swapped
    already stays as it is. `undo` gives every swapped module its original class back.

    Returns:
        How many modules were changed, by class name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: expected a torch.nn.Module, got {type(model).__name__}")
    changed: Counter[str] = Counter()
    met = False
    for module in model.modules():
        if ORIGINAL in vars(type(module)):
            met = True
            if undo:
                module.__class__ = vars(type(module))[ORIGINAL]
                del module.__dict__[MARKS]
                changed[type(module).__name__] += 1
        elif not undo and (which := _recognise(module)) is not None:
            module.__dict__[MARKS] = Marks(module)
            module.__class__ = _derived(type(module), which)
            changed[type(module).__name__] += 1
    if not undo:
        _note_who_makes_the_masks(model)
        if not changed and not met:
            looked_for = ", ".join(f"{known.name} ({which})" for which, known in KNOWN.items())
            warnings.warn(f"swap: nothing was changed; none of these is in the model: {looked_for}", stacklevel=2)
    return dict(changed)


def _recognise(module: nn.Module) -> str | None:
    """The key in KNOWN of what this module is; None if it is something else, however similar."""
    for which, known in KNOWN.items():
        if type(module).__name__ != known.name or not _own_method(module, known.method, known.arguments):
            continue
        attention = _find(module, known.attention)
        if any(_find(module, path) is None for path in known.attributes) or not _own_method(attention, "forward"):
            continue
        if _counts_differently(attention):
            runtime.warn_once(
                f"swap: a {known.name} numbers its relative positions in another way; it is left as it is"
            )
            continue
        return which
    return None


def _own_method(module: Any, method: str, arguments: tuple[str, ...] = ()) -> bool:
    """The method and `forward` are the class's own: neither inherited nor replaced on the instance."""
    own = vars(type(module))
    if any(name not in own or name in vars(module) for name in (method, "forward")):
        return False
    return set(arguments) <= set(inspect.signature(own[method]).parameters)


def _find(module: Any, path: str) -> Any:
    """module.path; None if any step is missing."""
    return functools.reduce(lambda found, step: getattr(found, step, None), filter(None, path.split(".")), module)


def _counts_differently(attention: nn.Module) -> bool:
    """Whether the module looks its bias up in another order than `window_attention` does."""
    holder = _find(attention, "relative_position_bias") or attention  # transformers gives the table a module
    index, size = _find(holder, "relative_position_index"), _find(holder, "window_size")
    if not isinstance(index, Tensor) or not isinstance(size, Sequence):
        return True
    window = _triple(size)
    if index.numel() != prod(window) ** 2 or index.is_meta:  # a model on the meta device has no values yet
        return not index.is_meta
    return not torch.equal(index.flatten().cpu(), bias_rows(window, window, "true", torch.device("cpu")).flatten())


@functools.cache
def _derived(original: type[nn.Module], which: str) -> type[nn.Module]:
    """The class a known module gets: the original one with one method replaced."""
    known = KNOWN[which]
    method = getattr(original, known.method)
    names = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def replaced(self: nn.Module, *given: Any, **named: Any) -> Any:
        arguments = {**dict(zip(names, given)), **named}
        if torch.jit.is_tracing() or isinstance(arguments.get(names[0]), torch.fx.Proxy):
            result = "it is being traced"
        else:
            result = known.answer(self, **arguments)
        if not isinstance(result, str):
            return result
        _say(f"swap: {known.name} ({which}) keeps its original path: {result}")
        return method(self, *given, **named)

    def pickled(self: nn.Module, protocol: Any) -> tuple:
        return (_empty, (original, which), *original.__reduce_ex__(self, protocol)[2:])

    body = {key: getattr(original, key) for key in ("__module__", "__qualname__", "__doc__")}
    body |= {known.method: replaced, "__reduce_ex__": pickled, ORIGINAL: original}
    return type(original)(original.__name__, (original,), body)


def _empty(original: type[nn.Module], which: str) -> nn.Module:
    """A swapped module before it is filled: what pickle and deepcopy begin with."""
    derived = _derived(original, which)
    return derived.__new__(derived)


def _note_who_makes_the_masks(model: nn.Module) -> None:
    """A layer that makes the masks of its blocks is believed where values cannot be read, under torch.compile."""
    for parent in model.modules():
        if type(parent).__name__ == "BasicLayer" and _own_method(parent, "forward"):
            for block in parent.modules():
                if ORIGINAL in vars(type(block)):
                    block.__dict__[MARKS].parent_makes_masks = True


@torch.compiler.assume_constant_result
def _say(sentence: str) -> None:
    runtime.warn_once(sentence)


def _triple(size: Sequence[int]) -> Triple:
    t, h, w = (1,) * (3 - len(size)) + tuple(size)
    return (t, h, w)


def _shift(block: Any) -> Triple:
    t, h, w = (0,) * (3 - len(block.shift_size)) + tuple(block.shift_size)
    return (t, h, w)


def _grid(x: Tensor) -> Triple:
    """The token grid of (B, h, w, C) or (B, t, h, w, C)."""
    return _triple(x.shape[1:-1])


def _clamped(shift: Triple, window: Triple, grid: Triple) -> Triple:
    """The shift, without the axes that are one window."""
    t, h, w = (0 if length <= size else step for step, size, length in zip(shift, window, grid))
    return (t, h, w)


def _missing(grid: Triple, window: Triple) -> Triple:
    """How many rows each axis lacks to be a multiple of the window."""
    t, h, w = (-length % size for length, size in zip(grid, window))
    return (t, h, w)


def _beyond(x: Tensor, width: int, window: Triple, shift: Triple) -> str | None:
    """Why the kernels cannot do this layer; None if they can."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} is not among the dtypes of the kernels"
    if width > WIDEST_HEAD:
        return f"its heads have {width} channels, the kernels take {WIDEST_HEAD}"
    if prod(window) > LARGEST_WINDOW or any(step >= size for step, size in zip(shift, window)):
        return f"its window {window}, shifted by {shift}, is not one that the kernels take"
    return None


def _watched(attention: nn.Module, *parts: str) -> bool:
    """Whether somebody listens where the kernel passes by: at the attention, or at its named parts."""
    places = [attention, *(getattr(attention, part) for part in parts if hasattr(attention, part))]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(place, kind, None) for place in places for kind in kinds)


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
    image, (t, h, w) = x.ndim == 4, _grid(x)
    x = x.unsqueeze(1) if image else x
    missing = _missing((t, h, w), used_window((t, h, w), window) if clip else window)
    if any(missing):
        x = F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
    out = window_attention(project(x), table, window, shift, mask_shift, bias_index)
    out = out[:, :t, :h, :w].flatten(-2)
    return out.squeeze(1) if image else out


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


def _three_linears(x: Tensor, linears: Sequence[nn.Module], heads: int) -> Tensor:
    """q, k and v of separate layers: one product where they are plain, so that nothing is copied to join them."""
    plain = all(type(linear) is nn.Linear and not _watched(linear) for linear in linears)
    if plain and len({getattr(linear, "bias", None) is None for linear in linears}) == 1:
        biases = [linear.bias for linear in linears if isinstance(linear.bias, Tensor)]
        weight = torch.cat([linear.get_parameter("weight") for linear in linears])
        return _heads(F.linear(x, weight, torch.cat(biases) if biases else None), heads)
    return torch.stack([linear(x).unflatten(-1, (heads, -1)) for linear in linears], dim=-3)


def _belongs_to(block: Any, mask: Tensor, grid: Triple, used: Triple, candidates: Sequence[Triple]) -> Triple | None:
    """Which of these shifts the mask that was handed in belongs to; its values are read once for each geometry."""
    marks: Marks = block.__dict__[MARKS]
    geometry = (tuple(mask.shape), grid, used, tuple(candidates))
    if geometry in marks.masks:
        return marks.masks[geometry]
    if mask.shape != (prod(grid) // prod(used), prod(used), prod(used)):
        return None
    if torch.compiler.is_compiling():
        return candidates[0] if marks.parent_makes_masks else None
    found = (s for s in candidates if torch.equal(mask, shift_mask(grid, used, s, mask.device, mask.dtype)))
    marks.masks[geometry] = next(found, None)
    return marks.masks[geometry]


def _torchvision(block: Any, x: Tensor) -> Tensor | str:
    """ShiftedWindowAttention, its V2 and its 3d: one module from (B, [t,] h, w, C) to the same."""
    dropping = block.training or block.__dict__[MARKS].drops_in_eval
    if block.attention_dropout and dropping:
        return "dropout of attention weights is on"
    window, clip = _triple(block.window_size), x.ndim == 5
    bias, logit_scale = block.qkv.bias, getattr(block, "logit_scale", None)
    if logit_scale is None:
        table = block.relative_position_bias_table
    else:
        table = _continuous_table(block)
        if bias is not None:  # the bias of the keys is held at zero
            q, _, v = bias.chunk(3)
            bias = torch.cat((q, torch.zeros_like(q), v))

    def project(x: Tensor) -> Tensor:
        qkv = _heads(F.linear(x, block.qkv.weight, bias), block.num_heads)
        return qkv if logit_scale is None else _cosine(qkv, logit_scale)

    shift = _clamped(_shift(block), window, _grid(x))
    out = _attend(x, project, table, window, shift, clip=clip, bias_index="official" if clip else "true")
    return F.dropout(F.linear(out, block.proj.weight, block.proj.bias), block.dropout, dropping)


def _handed_a_mask(block: Any, x: Tensor, mask_matrix: Tensor | None, is_img: bool = False) -> Tensor | str:
    """The first half of a block of MONAI, Video Swin or BEVT: (B, [t,] h, w, C) to the same, the layer gives the mask.

    BEVT sends images (B, h, w, C) through its three-dimensional blocks: the shift is not clamped there, and every
    block is given the mask of the shifted ones (SPEC X3).
    """
    attention = block.attn
    if reason := _plain(attention, block.window_size):
        return reason
    window, grid = _triple(block.window_size), _grid(x)
    used, shift = used_window(grid, window), _shift(block)
    if is_img:
        if any(_missing(grid, used)) or window[1] != window[2]:
            return f"an image of {grid[1]} x {grid[2]} tokens is no multiple of a square window"
        shift, masked = (0, shift[1], shift[2]), True
        candidates = [(0, window[1] // 2, window[2] // 2), shift]
    else:
        shift = _clamped(shift, window, grid)
        masked, candidates = any(shift), [shift]
    mask_shift: Triple | None = NO_SHIFT
    if mask_matrix is not None and masked:
        t, h, w = (length + more for length, more in zip(grid, _missing(grid, used)))
        mask_shift = _belongs_to(block, mask_matrix, (t, h, w), used, candidates)
        if mask_shift is None:
            return "the mask it is handed is not the one that its shift implies"
    project = functools.partial(_project, attention)
    table = attention.relative_position_bias_table
    out = _attend(block.norm1(x), project, table, window, shift, mask_shift, clip=True, bias_index="official")
    return attention.proj_drop(attention.proj(out))


def _timm(block: Any, x: Tensor) -> Tensor | str:
    """The attention half of timm's SwinTransformerBlock and SwinTransformerV2Block: (B, h, w, C) to the same."""
    attention = block.attn
    if reason := _plain(attention, block.window_size):
        return reason
    window, shift, grid = _triple(block.window_size), _shift(block), _grid(x)
    missing = _missing(grid, window)
    mask_shift: Triple | None = shift
    if any(shift) and not getattr(block, "dynamic_mask", False):
        if block.attn_mask is None:
            mask_shift = NO_SHIFT
        else:
            t, h, w = (length + more for length, more in zip(grid, missing))
            block.__dict__[MARKS].parent_makes_masks = True  # the block itself, rather
            mask_shift = _belongs_to(block, block.attn_mask, (t, h, w), window, [shift])
            if mask_shift is None:
                return "its mask is not the one that its shift implies"
    v2 = hasattr(attention, "logit_scale")
    table = _continuous_table(attention) if v2 else attention.relative_position_bias_table
    project = functools.partial(_project_v2 if v2 else _project, attention)
    if any(shift) and any(missing):  # timm rolls before it pads: the roll cannot be left to the kernel
        x = x.roll((-shift[1], -shift[2]), (1, 2))
        out = _attend(x, project, table, window, NO_SHIFT, mask_shift).roll((shift[1], shift[2]), (1, 2))
    else:
        out = _attend(x, project, table, window, shift, mask_shift)
    return attention.proj_drop(attention.proj(out))


def _plain(attention: Any, window: Sequence[int]) -> str | None:
    """Why a WindowAttention cannot be answered for; None if it can."""
    if attention.training and attention.attn_drop.p:
        return "dropout of attention weights is on"
    if _watched(attention, "softmax", "attn_drop"):
        return "hooks are set where its attention weights would be"
    width = attention.qkv.out_features // (3 * attention.num_heads)
    if not math.isclose(getattr(attention, "scale", width**-0.5), width**-0.5):
        return "it scales its queries in a way of its own"
    if tuple(attention.window_size) != tuple(window):
        return "its bias table is for another window"
    return None


def _project(attention: Any, x: Tensor) -> Tensor:
    return _heads(attention.qkv(x), attention.num_heads)


def _project_v2(attention: Any, x: Tensor) -> Tensor:
    """timm's v2 keeps the biases beside the layer."""
    if attention.q_bias is None:
        qkv = attention.qkv(x)
    else:
        bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
        separate = getattr(attention, "qkv_bias_separate", False)
        qkv = attention.qkv(x) + bias if separate else F.linear(x, attention.qkv.weight, bias)
    return _cosine(_heads(qkv, attention.num_heads), attention.logit_scale)


def _transformers(
    layer: Any,
    hidden_states: Tensor,
    input_dimensions: tuple[int, int],
    head_mask: Tensor | None = None,
    output_attentions: bool | None = False,
    always_partition: bool | None = False,
    **others: Any,
) -> tuple | str:
    """transformers' SwinLayer, (B, h*w, C) to the same; until 4.x the attention had a `self` and an `output`."""
    older = hasattr(layer.attention, "self")
    attention = layer.attention.self if older else layer.attention
    table = attention if older else attention.relative_position_bias
    dropout = attention.dropout.p if older else attention.attention_dropout
    if output_attentions or (not older and getattr(attention.config, "output_attentions", False)):
        return "attention weights are asked for"
    if head_mask is not None or getattr(layer.attention, "pruned_heads", None):
        return "heads are masked or pruned"
    if attention.training and dropout:
        return "dropout of attention weights is on"
    if _watched(layer.attention, "self", "output", "relative_position_bias") or _watched(attention, "dropout"):
        return "hooks are set where its attention weights would be"
    if not always_partition:
        layer.set_shift_and_window_size(input_dimensions)
    if tuple(table.window_size) != (layer.window_size, layer.window_size):
        return "its bias table is for another window"
    names = ("query", "key", "value") if older else ("q_proj", "k_proj", "v_proj")
    linears = [getattr(attention, name) for name in names]
    x = layer.layernorm_before(hidden_states).unflatten(1, input_dimensions)  # (B, h, w, C)
    project = functools.partial(_three_linears, linears=linears, heads=attention.num_attention_heads)
    size, step = int(layer.window_size), int(layer.shift_size)
    out = _attend(x, project, table.relative_position_bias_table, (1, size, size), (0, step, step)).flatten(1, 2)
    if older:
        out = hidden_states + layer.drop_path(layer.attention.output(out, hidden_states))
        return (out + layer.output(layer.intermediate(layer.layernorm_after(out))),)
    out = hidden_states + layer.drop_path(layer.dropout(attention.o_proj(out)))
    return out + layer.dropout(layer.mlp(layer.layernorm_after(out))), None


_TABLE = ("relative_position_bias_table", "qkv.weight", "proj.weight", "attention_dropout", "dropout", "shift_size")
_CONTINUOUS = ("cpb_mlp", "relative_coords_table", "logit_scale")
_BLOCK = ("attn.qkv", "attn.proj", "attn.proj_drop", "attn.attn_drop.p", "attn.num_heads", "norm1", "shift_size")
_LAYER = ("layernorm_before", "layernorm_after", "drop_path", "set_shift_and_window_size", "get_attn_mask")

KNOWN = {
    "torchvision swin3d": Known("ShiftedWindowAttention3d", "forward", ("x",), _TABLE, "", _torchvision),
    "torchvision swin": Known("ShiftedWindowAttention", "forward", ("x",), _TABLE, "", _torchvision),
    "torchvision swin v2": Known(
        "ShiftedWindowAttentionV2", "forward", ("x",), (*_TABLE[1:], *_CONTINUOUS), "", _torchvision
    ),
    "timm": Known(
        "SwinTransformerBlock", "_attn", ("x",), (*_BLOCK, "attn.relative_position_bias_table"), "attn", _timm
    ),
    "timm v2": Known(
        "SwinTransformerV2Block", "_attn", ("x",), (*_BLOCK, *(f"attn.{a}" for a in _CONTINUOUS)), "attn", _timm
    ),
    "transformers": Known(
        "SwinLayer",
        "forward",
        ("hidden_states", "input_dimensions", "always_partition"),
        (*_LAYER, "attention.q_proj", "attention.o_proj", "attention.relative_position_bias", "mlp"),
        "attention",
        _transformers,
    ),
    "transformers 4": Known(
        "SwinLayer",
        "forward",
        ("hidden_states", "input_dimensions", "output_attentions"),
        (*_LAYER, "attention.self.query", "attention.self.relative_position_bias_table", "intermediate", "output"),
        "attention.self",
        _transformers,
    ),
    "MONAI": Known(
        "SwinTransformerBlock",
        "forward_part1",
        ("x", "mask_matrix"),
        (*_BLOCK, "attn.relative_position_bias_table"),
        "attn",
        _handed_a_mask,
    ),
    "BEVT, Video Swin": Known(
        "SwinTransformerBlock3D",
        "forward_part1",
        ("x", "mask_matrix"),
        (*_BLOCK, "attn.relative_position_bias_table"),
        "attn",
        _handed_a_mask,
    ),
}
