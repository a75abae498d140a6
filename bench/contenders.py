"""Who is raced against our kernels. Every contender has the signature of the kernel's `reference` and starts and ends
where it does: layout copies, expansion of the bias and the gradient of its table are its own affair, inside the clock.

Legend: B clips, (t, h, w) token grid, nH heads of width d, nW windows of N tokens. A contender that cannot run raises,
and the sentence it raises with is printed in its row.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_kernels.check import Kernel, ours

OURS = "ours"
TUNED = "max-autotune-no-cudagraphs"
Triple = tuple[int, int, int]


class Contender(NamedTuple):
    """`build` gets the arguments of a case and returns the function to time; it may raise.

    Those of tier 0 are raced over every case before one of tier 1 is compiled, and so on: a budget that ends early has
    cost the dearest contenders and not the last cases.
    """

    name: str
    build: Callable[[Sequence[Any]], Callable[..., Any]]
    tier: int = 0
    seconds: float = 0.0  # what building and compiling it is expected to take


class CannotRun(Exception):
    """A sentence: why a contender does not take part."""


def contenders(kernel: Kernel, device: torch.device) -> list[Contender]:
    """Everybody for one kernel: ours first, then eager, then who needs no compilation, then the rest."""
    seconds, tuning = (10.0, 30.0) if device.type == "cuda" else (30.0, 60.0)
    attention = kernel.name == "window_attention"
    first = [
        Contender(OURS, lambda _: ours(kernel)),
        Contender("eager", lambda _: eager_attention if attention else kernel.reference),
    ]

    def plain(arguments: Sequence[Any]) -> Callable[..., Any]:
        return _eager_for(geometry(*arguments)) if attention else kernel.reference

    compiled = [Contender("torch.compile", lambda a: _compiled(plain(a)), 1, seconds)]
    if kernel.name == "window_attention":
        flex = [
            Contender("FlexAttention", lambda a: _flex(a, device, read_table=True), 1, seconds),
            Contender("FlexAttention expanded bias", lambda a: _flex(a, device, read_table=False), 2, seconds),
        ]
        tuned = [
            Contender(
                "torch.compile max-autotune", lambda a: _on_gpu(device, lambda: _compiled(plain(a), TUNED)), 2, tuning
            ),
            Contender(
                "FlexAttention max-autotune",
                lambda a: _on_gpu(device, lambda: _flex(a, device, read_table=False, mode=TUNED)),
                2,
                tuning,
            ),
        ]
        return [*first, *_sdpa(device), *_packages(), *compiled, *flex, *tuned]
    if kernel.name == "masked_cross_entropy":
        official = Contender("eager, all tokens (official)", lambda _: all_tokens)
        compiled += [Contender("torch.compile, all tokens", lambda _: _compiled(all_tokens_static), 1, seconds)]
        losses = [Contender("cut-cross-entropy", _cut_cross_entropy), Contender("Liger", _liger)]
        return [*first, official, *losses, *compiled]
    return [*first, *compiled]


# Window attention.


class Geometry(NamedTuple):
    """What a window attention layer of other codebases keeps as buffers; made outside the clock, as there."""

    used: Triple  # the window after clipping
    shift: Triple
    rows: Tensor  # (N, N) int64, rows of the bias table
    regions: Tensor | None  # (nW, N) int64: tokens of a window see one another where these agree; None: everywhere
    mask: Tensor | None  # (nW, N, N) 0 or -100


def geometry(
    qkv: Tensor, bias_table: Tensor, window: Triple, shift: Triple = (0, 0, 0), mask_shift: Triple | None = None,
    bias_index: str = "true",
) -> Geometry:  # fmt: skip
    """Read off the arguments of a call."""
    grid = (int(qkv.shape[1]), int(qkv.shape[2]), int(qkv.shape[3]))
    return _geometry(grid, tuple(window), tuple(shift), tuple(mask_shift or shift), bias_index, qkv.device)


@lru_cache(maxsize=8)
def _geometry(
    grid: Triple, window: Triple, shift: Triple, mask_shift: Triple, bias_index: str, device: torch.device
) -> Geometry:
    used = (min(grid[0], window[0]), min(grid[1], window[1]), min(grid[2], window[2]))
    extent = used if bias_index == "true" else window
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in extent), indexing="ij")).flatten(1)  # (3, N)
    offset = place[:, :, None] - place[:, None, :]
    strides = ((2 * window[1] - 1) * (2 * window[2] - 1), 2 * window[2] - 1, 1)
    rows = sum((offset[axis] + window[axis] - 1) * strides[axis] for axis in range(3))
    assert isinstance(rows, Tensor)
    rows = rows[: prod(used), : prod(used)].contiguous().to(device)
    if not any(mask_shift):
        return Geometry(used, shift, rows, None, None)
    # regions as the official compute_mask cuts them: before the last window, its first part, its last `shift` tokens
    region = torch.zeros(1, *grid, 1, dtype=torch.long)
    for axis, step in enumerate(mask_shift):
        if step:
            along = torch.zeros(grid[axis], dtype=torch.long)
            along[max(grid[axis] - used[axis], 0) :] = 1
            along[max(grid[axis] - step, 0) :] = 2
            region += (along * 3**axis).view([-1 if n == axis + 1 else 1 for n in range(5)])
    regions = _split(region, used).reshape(-1, prod(used)).to(device)
    apart = regions[:, :, None] != regions[:, None, :]
    return Geometry(used, shift, rows, regions, torch.zeros(apart.shape, device=device).masked_fill_(apart, -100.0))


def _split(x: Tensor, used: Triple) -> Tensor:
    """(B, t, h, w, ...) -> (B, t/wt, h/wh, w/ww, wt, wh, ww, ...)."""
    b, t, h, w, *rest = x.shape
    x = x.reshape(b, t // used[0], used[0], h // used[1], used[1], w // used[2], used[2], *rest)
    return x.permute(0, 1, 3, 5, 2, 4, 6, *range(7, x.ndim))


def partition(qkv: Tensor, g: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """Roll and cut: q, k, v, each (B*nW, nH, N, d) and contiguous."""
    if any(g.shift):
        qkv = torch.roll(qkv, [-s for s in g.shift], (1, 2, 3))
    windows = _split(qkv, g.used)  # (B, nt, nh, nw, wt, wh, ww, 3, nH, d)
    heads, width = windows.shape[-2:]
    q, k, v = windows.permute(7, 0, 1, 2, 3, 8, 4, 5, 6, 9).reshape(3, -1, heads, prod(g.used), width)
    return q, k, v


def merge(out: Tensor, like: Tensor, g: Geometry) -> Tensor:
    """(B*nW, nH, N, d) back to (B, t, h, w, nH, d), rolled back."""
    b, t, h, w, _, heads, width = like.shape
    counts = (t // g.used[0], h // g.used[1], w // g.used[2])
    out = out.reshape(b, *counts, heads, *g.used, width)
    out = out.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(b, t, h, w, heads, width)
    return torch.roll(out, list(g.shift), (1, 2, 3)) if any(g.shift) else out


def eager_attention(
    qkv: Tensor, bias_table: Tensor, window: Triple, shift: Triple = (0, 0, 0), mask_shift: Triple | None = None,
    bias_index: str = "true",
) -> Tensor:  # fmt: skip
    """What the official module does under autocast: products in the dtype of qkv; bias, mask, softmax in float32."""
    return _eager(qkv, bias_table, geometry(qkv, bias_table, window, shift, mask_shift, bias_index))


def _eager(qkv: Tensor, bias_table: Tensor, g: Geometry) -> Tensor:
    q, k, v = partition(qkv, g)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B*nW, nH, N, N)
    n, heads = scores.shape[-1], scores.shape[1]
    bias = bias_table.to(torch.promote_types(torch.float32, bias_table.dtype))
    bias = bias[g.rows.view(-1)].view(n, n, heads).permute(2, 0, 1).contiguous()
    scores = scores + bias[None]
    if g.mask is not None:
        scores = scores.view(-1, len(g.mask), heads, n, n) + g.mask[None, :, None]
        scores = scores.view(-1, heads, n, n)
    return merge(scores.softmax(dim=-1).to(v.dtype) @ v, qkv, g)


def _eager_for(g: Geometry) -> Callable[..., Tensor]:
    """The same with its buffers made beforehand, for a compiler that would make them again in every call."""
    return lambda qkv, bias_table, *_: _eager(qkv, bias_table, g)


def _sdpa(device: torch.device) -> list[Contender]:
    from torch.nn.attention import SDPBackend

    if device.type == "cuda":
        flash = CannotRun("the flash backend takes no attn_mask, so neither bias nor shift mask")
    else:
        flash = CannotRun("the flash backend of a CPU gives no gradient to attn_mask, so the table would get none")
    return [
        Contender("SDPA math", lambda a: _sdpa_by(SDPBackend.MATH, a)),
        Contender("SDPA efficient", lambda a: _sdpa_by(SDPBackend.EFFICIENT_ATTENTION, a)),
        Contender("SDPA cuDNN", lambda a: _sdpa_by(SDPBackend.CUDNN_ATTENTION, a)),
        Contender("SDPA flash", lambda _: _raise(flash)),
    ]


def _sdpa_by(backend: Any, arguments: Sequence[Any]) -> Callable[..., Tensor]:
    """The first padding of N that the backend takes, forward and backward: none, to a multiple of 8, of 64."""
    tokens = prod(geometry(*arguments).used)
    tried: dict[str, None] = {}  # reasons, each once
    for multiple in (1, 8, 64):
        padded = -(-tokens // multiple) * multiple
        if multiple > 1 and padded == tokens:
            continue
        function = _sdpa_padded(backend, padded)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                _forward_and_backward(function, arguments)
            except Exception as problem:
                why = [str(w.message).split(" (Triggered")[0].strip() for w in said]
                reason = " ".join(dict.fromkeys([str(problem).split("\n")[0], *why]))
                tried[reason[:300]] = None
            else:
                return function
    raise CannotRun("; ".join(tried))


def _sdpa_padded(backend: Any, padded: int) -> Callable[..., Tensor]:
    from torch.nn.attention import sdpa_kernel

    def attend(
        qkv: Tensor, bias_table: Tensor, window: Triple, shift: Triple = (0, 0, 0), mask_shift: Triple | None = None,
        bias_index: str = "true",
    ) -> Tensor:  # fmt: skip
        g = geometry(qkv, bias_table, window, shift, mask_shift, bias_index)
        q, k, v = partition(qkv, g)
        n, heads = q.shape[2], q.shape[1]
        if padded > n:
            q, k, v = (F.pad(x, (0, 0, 0, padded - n)) for x in (q, k, v))
        bias = expanded_bias(bias_table, g, q.dtype, padded)  # (nH or nW*nH, padded, padded)
        # windows that share a bias are the batch, so that the bias is stored once and expanded
        q, k, v = (x.reshape(-1, len(bias), padded, x.shape[-1]) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].expand(len(q), -1, -1, -1))
        return merge(out.reshape(-1, heads, padded, q.shape[-1])[:, :, :n], qkv, g)

    return attend


def expanded_bias(bias_table: Tensor, g: Geometry, dtype: torch.dtype, padded: int) -> Tensor:
    """Bias and mask as one attn_mask, rows aligned to 16 elements as the efficient backend wants them.

    (nH, padded, padded) without a shift mask, (nW*nH, ...) with one. Padding keys carry the lowest number.
    """
    n = len(g.rows)
    aligned = -(-padded // 16) * 16
    rows = F.pad(g.rows, (0, aligned - n, 0, padded - n))
    bias = bias_table.to(dtype).t().contiguous()[:, rows]  # (nH, padded, aligned)
    if padded > n:
        bias = bias.masked_fill(torch.arange(aligned, device=bias.device) >= n, torch.finfo(dtype).min)
    if g.mask is not None:
        mask = F.pad(g.mask.to(dtype), (0, aligned - n, 0, padded - n))
        bias = (bias[None] + mask[:, None]).flatten(0, 1)
    return bias[..., :padded]


def _flex(
    arguments: Sequence[Any], device: torch.device, read_table: bool, mode: str | None = None
) -> Callable[..., Tensor]:
    """score_mod reads the captured table, or the bias expanded from it; either way with a gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    if device.type != "cuda":
        # the forward runs there; its race would have no backward to go with it
        raise CannotRun("NotImplementedError on a CPU: FlexAttention does not support backward there")
    g = geometry(*arguments)
    windows = 1 if g.regions is None else len(g.regions)

    def attend(qkv: Tensor, bias_table: Tensor, *_: Any) -> Tensor:
        q, k, v = partition(qkv, g)
        bias = bias_table.float() if read_table else bias_table.float().t().contiguous()[:, g.rows]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_place: Tensor, k_place: Tensor) -> Tensor:
            added = bias[g.rows[q_place, k_place], h] if read_table else bias[h, q_place, k_place]
            score = score + added
            if g.regions is None:
                return score
            together = g.regions[b % windows, q_place] == g.regions[b % windows, k_place]
            return torch.where(together, score, score - 100.0)

        return merge(flex_attention(q, k, v, score_mod=score_mod), qkv, g)  # pyright: ignore

    return _compiled(attend, mode)


def _packages() -> list[Contender]:
    return [
        Contender("xformers", _xformers),
        Contender("flash-window-attention", _flash_window_attention),
        Contender("flash-attn score_mod", _flash_attn),
        Contender("NATTEN", _natten),
    ]


def _xformers(_: Sequence[Any]) -> Callable[..., Tensor]:
    package = _import("xformers.ops")

    def attend(qkv: Tensor, bias_table: Tensor, *rest: Any) -> Tensor:
        g = geometry(qkv, bias_table, *rest)
        q, k, v = partition(qkv, g)  # (B*nW, nH, N, d)
        bias = expanded_bias(bias_table, g, q.dtype, len(g.rows))
        q, k, v = (x.view(-1, len(bias), *x.shape[2:]).transpose(1, 2) for x in (q, k, v))
        bias = bias[None].expand(len(q), -1, -1, -1)
        out = package.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)
        return merge(out.reshape(-1, qkv.shape[5], *out.shape[2:]), qkv, g)

    return attend


def _flash_window_attention(arguments: Sequence[Any]) -> Callable[..., Tensor]:
    package = _import("flash_swin_attn")
    if geometry(*arguments).mask is not None:
        raise CannotRun("flash-window-attention has no shift mask")

    def attend(qkv: Tensor, bias_table: Tensor, *rest: Any) -> Tensor:
        g = geometry(qkv, bias_table, *rest)
        q, k, v = partition(qkv, g)
        bias = bias_table.to(q.dtype).t().contiguous()[:, g.rows].contiguous()
        return merge(package.flash_swin_attn_func(q, k, v, bias, q.shape[-1] ** -0.5), qkv, g)

    return attend


def _flash_attn(_: Sequence[Any]) -> Callable[..., Tensor]:
    _import("flash_attn.cute")
    raise CannotRun("flash-attn's score_mod gives no gradient to its aux_tensors, so the bias table gets none")


def _natten(_: Sequence[Any]) -> Callable[..., Tensor]:
    _import("natten")
    raise CannotRun("NATTEN has no relative position bias (removed), so it computes another function")


# Masked cross-entropy: (features, head, targets, mask or None) -> (loss, accuracy).


def all_tokens(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As official: the head on every token, then the hidden rows of the logits."""
    logits, ids = (_hidden(x, mask) for x in (head(features), targets))
    logits = logits.float()
    accuracy = (logits.detach().argmax(dim=-1) == ids).float().mean()
    return F.cross_entropy(logits, ids), accuracy


def all_tokens_static(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same without boolean indexing, which torch.compile cannot see through."""
    if mask is None:
        return all_tokens(features, head, targets, None)
    logits = head(features).float().flatten(0, -2)
    count = mask.sum().clamp(min=1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none") * mask.flatten()
    right = (logits.detach().argmax(dim=-1) == targets.flatten()) & mask.flatten()
    return losses.sum() / count, right.sum() / count


def _hidden(x: Tensor, mask: Tensor | None) -> Tensor:
    """The hidden rows of (..., K), or the hidden ids of (...)."""
    if mask is not None:
        return x[mask]
    return x.flatten(0, -2) if x.is_floating_point() else x.flatten()


def _cut_cross_entropy(_: Sequence[Any]) -> Callable[..., Any]:
    package = _import("cut_cross_entropy")

    def loss(features: Tensor, head: Any, targets: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        rows, ids = _hidden(features, mask), _hidden(targets, mask)
        return (package.linear_cross_entropy(rows, head.weight, ids, bias=head.bias),)

    return loss


def _liger(_: Sequence[Any]) -> Callable[..., Any]:
    loss = _import("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def call(features: Tensor, head: Any, targets: Tensor, mask: Tensor | None) -> tuple[Tensor]:
        return (loss(head.weight, _hidden(features, mask), _hidden(targets, mask), head.bias),)

    return call


# Shared.


def _compiled(function: Callable[..., Any], mode: str | None = None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, mode=mode)


def _on_gpu(device: torch.device, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    if device.type != "cuda":
        raise CannotRun("max-autotune chooses between GPU kernels")
    return build()


def _import(name: str) -> Any:
    try:
        with _quiet():
            return importlib.import_module(name)
    except Exception as problem:  # a broken installation raises anything
        raise CannotRun(f"{type(problem).__name__}: {problem}") from problem


def _raise(problem: Exception) -> Any:
    raise problem


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _forward_and_backward(function: Callable[..., Tensor], arguments: Sequence[Any]) -> None:
    out = function(*arguments)
    torch.autograd.grad(out, [a for a in arguments if isinstance(a, Tensor) and a.requires_grad], torch.ones_like(out))
