"""Cross-entropy and accuracy of a linear head on hidden positions only (SPEC 4, X22).

Legend: P positions, K feature width, V codebook size, M hidden positions.

The head works row by row, so gathering the hidden rows before it changes no answer and the full (P, V) logits never
exist. A gradient's logits live for a chunk of rows at a time: the head's product writes them in the features' dtype
beside each row's maximum and sums, they turn into softmax minus one-hot where they stand, and two products make the
features' and the weight's gradients of them, all in the forward pass. Nothing is computed twice and the backward pass
only scales. Without a gradient the logits are never written at all.

Loss and accuracy come from the float32 scores. The gradient's softmax sums the rounded logits that it is made of, so
that a row of it sums to zero however coarse the dtype is. Sums run in a fixed order: two runs give equal bits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _cross_entropy_kernels as kernels
from . import runtime
from ._hidden_rows import Product, hidden_rows, refusal
from .cross_entropy_cpu import ROWS as ROWS_ON_A_CPU
from .cross_entropy_cpu import ScoredRows
from .runtime import cdiv, launch, power_of_2

NAME = "masked_cross_entropy"


# 1. The specification.


def reference(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The specification of `masked_cross_entropy`, in plain torch."""
    if mask is None:
        rows, ids = features.reshape(-1, features.shape[-1]), targets.reshape(-1)
    else:
        rows, ids = features[mask], targets[mask]
    logits = head(rows)  # (M, V)
    if logits.ndim != 2 or len(logits) != len(rows):
        raise ValueError(f"{NAME}: the head made {tuple(logits.shape)} of {tuple(rows.shape)}, expected (M, V)")
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    _check_targets(targets, mask, logits.shape[-1])
    inside = (ids >= 0) & (ids < logits.shape[-1])
    # a sum over no rows is 0 and keeps its graph, where a mean would be 0/0
    count = max(len(ids), 1)
    loss = F.cross_entropy(logits, ids.where(inside, 0), reduction="sum") / count
    accuracy = (logits.detach().argmax(dim=-1) == ids).sum() / count
    return (loss * torch.where(inside.all(), 1.0, float("nan"))).float(), accuracy.float()


# 2. The Triton kernels: _cross_entropy_kernels.py.


# 3. Autograd: allocate, launch, save.

# each is a multiple of the next
CHUNK = 4096  # rows whose logits live at once: enough tiles for every multiprocessor in both gradient products
SLICE = 2048  # rows that are scored and turned at a time: 32 MiB of 16-bit logits of 8192 ids stay in an H100's L2
STRIP = 256  # rows that a program turns, one after another
PAD = 128  # the highest tile of rows
ROWS = 32  # rows whose losses one program merges


class Products(NamedTuple):
    score: Product
    dx: Product
    dw: Product


def products(dtype: torch.dtype, capability: int, width: int, vocabulary: int) -> Products:
    """Tiles by dtype, chip and sizes. From machine code (no spill, shared memory), not from a stopwatch."""
    if dtype == torch.float32 or width % 16:
        small = Product(64, 64, 32, 4, 2)
        return Products(small, small, small._replace(num_warps=8))  # with four, ptxas spills a little
    wide, square = Product(128, 256, 64, 8, 3), Product(128, 128, 64, 8, 3)
    # a wide tile has no registers left for masks, nor, where products read registers, for its operands
    if capability < 90 or width % 256 or vocabulary % 256:
        return Products(square, square, square)
    return Products(wide, wide, wide) if capability < 100 else Products(square, wide, square)


class Work(NamedTuple):
    """One call's inputs, and the list of the rows that count."""

    x: Tensor  # (P, K), contiguous rows of any stride
    weight: Tensor  # (V, K), likewise
    bias: Tensor | None  # (V,)
    targets: Tensor  # (P,)
    rows: Tensor  # (P,) int32; unread where every row counts
    count: Tensor  # (1,) int32, likewise
    tiles: Products
    constants: dict[str, Any]  # of every kernel that looks at rows

    @property
    def padded(self) -> int:
        return cdiv(len(self.weight), self.tiles.score.n) * self.tiles.score.n

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    want_x: bool,
    want_w: bool,
    want_b: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, (loss, accuracy, scale), and the gradients of x, weight and bias, still to be multiplied by the scale.

    Those of the parameters are float32. A gradient that is not wanted is an empty tensor.
    """
    (positions, width), vocabulary = x.shape, len(weight)
    rows, count = (targets, targets) if mask is None else hidden_rows(mask)
    tiles = products(x.dtype, runtime.capability(x.device), width, vocabulary)
    work = Work(x, weight, bias, targets, rows, count, tiles, {"GATHER": mask is not None})
    chunk = min(CHUNK, cdiv(positions, PAD) * PAD)
    keep = want_x or want_w or want_b
    logits = work.new(chunk if keep else 0, work.padded, dtype=x.dtype)
    columns = work.new(cdiv(positions, STRIP) if want_b else 0, work.padded)
    losses = work.new(cdiv(positions, ROWS), dtype=torch.float64)
    right = work.new(cdiv(positions, ROWS), dtype=torch.int32)
    dx, dw, db = _gradients(x, weight, want_x, want_w, want_b)
    if mask is not None:
        dx.zero_()  # for the rows that are not hidden; where every row counts, each is written
    if not positions:
        dw.zero_()
    for start in range(0, positions, CHUNK):
        slots = min(chunk, positions - start)
        for first in range(0, slots, SLICE):
            _score_and_turn(work, logits[first:], columns, losses, right, start + first, keep, want_b)
        if want_x:
            _launch_gradient_x(work, logits, dx, start, slots)
        if want_w:
            _launch_gradient_w(work, logits, dw, start, slots)
    if want_b:
        _launch_gradient_b(work, columns, db)
    out = work.new(3)
    launch(
        kernels.finish, (1,), losses, right, count, out, positions, num_warps=4, ROWS=ROWS, BLOCK=256, **work.constants
    )
    # two results of an operator may not share memory
    return out[0].clone(), out, dx, dw, db


def _gradients(x: Tensor, weight: Tensor, want_x: bool, want_w: bool, want_b: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the gradients of x, weight and bias, those of the parameters in float32; empty what is not wanted."""
    (positions, width), vocabulary = x.shape, weight.shape[0]
    dx = torch.empty(positions if want_x else 0, width, dtype=x.dtype, device=x.device)
    dw = torch.empty(vocabulary if want_w else 0, width, dtype=torch.float32, device=x.device)
    return dx, dw, torch.empty(vocabulary if want_b else 0, dtype=torch.float32, device=x.device)


def _score_and_turn(
    work: Work, logits: Tensor, columns: Tensor, losses: Tensor, right: Tensor, start: int, keep: bool, want_b: bool
) -> None:
    """One slice of rows: scores, losses, and in `logits` the gradient of the scores."""
    x, weight, _, targets, rows, count, (tile, *_), constants = work
    (positions, width), vocabulary = x.shape, len(weight)
    slots, cut = min(SLICE, positions - start), tile.n // 128 or 1
    parts = work.padded // tile.n * cut
    sums = work.new(3 if keep else 2, parts, SLICE)
    first, hit = work.new(parts, SLICE, dtype=torch.int32), work.new(SLICE)
    bias = weight if work.bias is None else work.bias
    sizes: dict[str, Any] = {"V": vocabulary, "SLICE": SLICE, "KEEP": keep}
    launch(
        kernels.score,
        (cdiv(slots, tile.m) * (work.padded // tile.n),),
        *(x, weight, bias, targets, rows, count, logits, sums, first, hit),
        *(start, positions, slots, x.stride(0), weight.stride(0), width),
        **tile.launch(waste=work.padded / vocabulary),
        **constants,
        **sizes,
        EVEN_K=width % tile.k == 0,
        HAS_BIAS=work.bias is not None,
        PARTS=cut,
    )
    norm = work.new(2, SLICE if keep else 0)
    launch(
        kernels.merge,
        (cdiv(slots, ROWS),),
        *(sums, first, hit, targets, rows, count, norm, losses, right, start, positions),
        num_warps=4,
        **constants,
        **sizes,
        PARTS=parts,
        ROWS=ROWS,
        BLOCK_P=min(32, power_of_2(parts)),
    )
    if keep:
        launch(
            kernels.turn,
            (work.padded // 64, cdiv(slots, STRIP)),
            *(logits, norm, targets, rows, count, columns, start, positions),
            num_warps=8,
            **constants,
            VP=work.padded,
            SLICE=SLICE,
            HAS_BIAS=want_b,
            STRIP=STRIP,
            PAD=PAD,
            BLOCK_M=32,
            BLOCK_N=64,
        )


def _launch_gradient_x(work: Work, logits: Tensor, dx: Tensor, start: int, slots: int) -> None:
    (positions, width), tile = work.x.shape, work.tiles.dx
    tiles = cdiv(slots, tile.m), cdiv(width, tile.n)
    launch(
        kernels.gradient_x,
        (tiles[0] * tiles[1],),
        *(logits, work.weight, work.rows, work.count, dx, start, positions, slots, work.weight.stride(0)),
        **tile.launch(waste=tiles[1] * tile.n / width),
        **work.constants,
        K=width,
        V=len(work.weight),
        VP=work.padded,
    )


def _launch_gradient_w(work: Work, logits: Tensor, dw: Tensor, start: int, slots: int) -> None:
    (positions, width), tile = work.x.shape, work.tiles.dw
    tiles = cdiv(len(work.weight), tile.m), cdiv(width, tile.n)
    launch(
        kernels.gradient_w,
        (tiles[0] * tiles[1],),
        *(logits, work.x, work.rows, work.count, dw, start, positions, slots, work.x.stride(0)),
        **tile.launch(waste=tiles[0] * tile.m * tiles[1] * tile.n / work.weight.numel()),
        **work.constants,
        K=width,
        V=len(work.weight),
        VP=work.padded,
    )


def _launch_gradient_b(work: Work, columns: Tensor, db: Tensor) -> None:
    launch(
        kernels.gradient_b,
        (cdiv(len(db), 64),),
        *(columns, work.count, db, len(work.x)),
        num_warps=4,
        **work.constants,
        V=len(db),
        VP=work.padded,
        STRIP=STRIP,
        BLOCK_M=32,
        BLOCK_N=64,
    )


def _backward(upstream: Tensor, out: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of `_forward` times its scale and what arrives."""
    scaled = torch.empty_like(gradient, dtype=dtype)
    arguments = gradient, scaled, upstream, out[2:], gradient.numel()
    launch(kernels.scale, (cdiv(gradient.numel(), 2048),), *arguments, num_warps=8, BLOCK=2048)
    return scaled


_op = torch.library.custom_op(f"{runtime.NAMESPACE}::masked_cross_entropy", _forward, mutates_args=())
_op_backward = torch.library.custom_op(
    f"{runtime.NAMESPACE}::masked_cross_entropy_backward", _backward, mutates_args=()
)


@_op.register_fake
def _(x, weight, bias, targets, mask, want_x, want_w, want_b):
    loss, out = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in ((), (3,)))
    return loss, out, *_gradients(x, weight, want_x, want_w, want_b)


@_op_backward.register_fake
def _(upstream, out, gradient, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, *ctx.wanted = inputs
    _, out, *gradients = output
    ctx.dtypes = [tensor.dtype if wanted else None for tensor, wanted in zip((x, weight, bias), ctx.wanted)]
    ctx.save_for_backward(out, *gradients)
    ctx.mark_non_differentiable(out, *gradients)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    out, *gradients = ctx.saved_tensors
    scaled = [
        _op_backward(upstream, out, gradient, dtype) if dtype is not None else None
        for gradient, dtype in zip(gradients, ctx.dtypes)
    ]
    return (*scaled, None, None, None, None, None)


_op.register_autograd(_differentiate, setup_context=_setup)


# 4. The public function.


def masked_cross_entropy(
    features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and top-1 accuracy over the hidden positions.

    Fused for a plain nn.Linear whose forward nobody watches; under ZeRO-3 the head is called as the module it is, so
    that its weight is there. Any other head is called on the hidden rows, and the reference does the rest. Under
    autocast the head computes in autocast's dtype, in both.

    Args:
        features: (..., K).
        head: maps (M, K) to (M, V) logits; a linear layer.
        targets: (...) int64, ids in [0, V). There is no id that is ignored.
        mask: (...) bool, True = hidden, and therefore scored. None: every position is.
    Returns:
        Two float32 scalars. Both are 0, with a graph behind the loss, when nothing is hidden. Where a hidden position's
        target lies outside [0, V), the loss is NaN and so are its gradients: on a GPU, which is not asked to wait.
    Raises:
        ValueError: mask or targets of another shape than the positions of features, of another dtype or device;
            features of another width than the head's; on a CPU, a hidden target outside [0, V).
    """
    _check(features, head, targets, mask)
    refused = _refusal(features, head)
    if not runtime.fused(NAME, features.device, refused):
        if refused is None and _fits_a_cpu(features, head, targets):
            return _by_rows(cast(nn.Linear, head), features, targets, mask)
        return reference(features, head, targets, mask)
    linear = cast(nn.Linear, head)
    _check_targets(targets, mask, linear.out_features)
    if not hasattr(linear.weight, "ds_id"):
        return _fused(linear, targets, mask, features)
    # ZeRO-3 puts the weight together for the module's own forward alone; its hooks see a loss instead of logits
    answers: list[Tensor] = []

    def forward(input: Tensor) -> Tensor:
        loss, accuracy = _fused(linear, targets, mask, input)
        answers.append(accuracy)
        return loss

    linear.forward = forward
    try:
        loss = linear(features)
    finally:
        del linear.forward
    return loss, answers[0]


def _fits_a_cpu(features: Tensor, head: nn.Module, targets: Tensor) -> bool:
    """Whether a CPU takes some rows at a time: of few rows the reference keeps no more."""
    if not runtime.cpu_way(features.device) or runtime.simulated() or torch.is_autocast_enabled("cpu"):
        return False
    return features.dtype == torch.float32 and not hasattr(head.weight, "ds_id") and targets.numel() > ROWS_ON_A_CPU


def _by_rows(head: nn.Linear, features: Tensor, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_targets(targets, mask, head.out_features)
    if mask is None:
        rows, ids = features.reshape(-1, features.shape[-1]), targets.reshape(-1)
    else:
        rows, ids = features[mask], targets[mask]
    return ScoredRows.apply(rows, head.weight, head.bias, ids)  # pyright: ignore[reportReturnType]


def _fused(head: nn.Linear, targets: Tensor, mask: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor]:
    tensors = [features.reshape(-1, features.shape[-1]), head.weight, head.bias]
    device = features.device.type
    if torch.is_autocast_enabled(device):
        tensors = [None if tensor is None else tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
    # rows may lie apart, but a row is one piece
    x, weight, bias = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in tensors)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    mask = None if mask is None else mask.reshape(-1)
    loss, out, *_ = _op(x, weight, bias, targets.reshape(-1), mask, *wanted)
    # the backward pass needs `out` as it is, whatever the caller does to the accuracy
    return loss, out[1].clone()


def _check(features: Tensor, head: nn.Module, targets: Tensor, mask: Tensor | None) -> None:
    runtime.expect_tensors(NAME, features=features, targets=targets, **({} if mask is None else {"mask": mask}))
    if not callable(head):
        raise TypeError(f"{NAME}: head is of type {type(head).__name__}, expected a module")
    if features.ndim == 0 or not features.shape[-1]:
        raise ValueError(f"{NAME}: features are {tuple(features.shape)}, expected (..., K) with K of at least 1")
    positions = features.shape[:-1]
    if targets.shape != positions or (mask is not None and mask.shape != positions):
        shape = "None" if mask is None else tuple(mask.shape)
        raise ValueError(
            f"{NAME}: features have positions {tuple(positions)}, but the mask is {shape} "
            f"and the targets are {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64 or (mask is not None and mask.dtype != torch.bool):
        dtype = "None" if mask is None else mask.dtype
        raise ValueError(
            f"{NAME}: targets must be torch.int64 and the mask torch.bool, got {targets.dtype} and {dtype}"
        )
    devices = {str(tensor.device) for tensor in (features, targets, mask) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"{NAME}: features, targets and mask must be on one device, got {', '.join(sorted(devices))}")
    if features.is_meta and mask is not None:
        raise ValueError(f"{NAME}: on the meta device nobody knows what is hidden; gather the rows and give no mask")
    if not isinstance(head, nn.Linear):
        return
    if features.shape[-1] != head.in_features:
        raise ValueError(f"{NAME}: features {tuple(features.shape)} do not end in the head's width {head.in_features}")
    if head.weight.device != features.device:
        raise ValueError(f"{NAME}: features are on {features.device}, the head is on {head.weight.device}")
    others = [p.dtype for p in (head.weight, head.bias) if p is not None and p.dtype != features.dtype]
    if others and not torch.is_autocast_enabled(features.device.type):
        raise ValueError(f"{NAME}: features are {features.dtype}, the head is {others[0]}; use one dtype")


def _check_targets(targets: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """On a CPU only: a GPU would have to be waited for."""
    if targets.device.type != "cpu" or runtime.simulated():
        return
    ids = targets if mask is None else targets[mask]
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < vocabulary):
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{NAME}: targets must lie in [0, V) with V = {vocabulary} at hidden positions, got {found}")


def _refusal(features: Tensor, head: nn.Module) -> str | None:
    """Why the kernels cannot take this head or these features; None if they can."""
    if type(head) is not nn.Linear or "forward" in vars(head) or type(head.weight) not in (Tensor, nn.Parameter):
        return f"the head is a {type(head).__name__} of its own kind, not a plain nn.Linear"
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) and not hasattr(head.weight, "ds_id"):
        return "the head has hooks, which wait for logits"
    return refusal(features)


# 5. Where it is meant to run.


@dataclass(frozen=True, kw_only=True)
class Case:
    """Samples of frames of cells; each frame hides `hidden` of its cells, the same ones along a tube."""

    samples: int
    frames: int = 1
    cells: int
    hidden: int | None  # None: the hidden rows are gathered already
    tube: float = 1.0  # the share of frames that hide anything
    width: int = 1024
    vocabulary: int = 8192
    bias: bool = True
    small: bool = False

    def __str__(self) -> str:
        rows = f"S{self.samples}-T{self.frames}-C{self.cells}"
        hidden = "gathered" if self.hidden is None else f"hidden{self.hidden}x{self.tube:g}"
        return f"{rows}-{hidden}-K{self.width}-V{self.vocabulary}" + ("" if self.bias else "-nobias")


CASES = [
    Case(samples=64, cells=196, hidden=98),  # BEVT's images: half of 14 x 14 cells
    Case(samples=8, frames=16, cells=196, hidden=98, tube=0.75),  # its clips: tubes of 4 to 8 of 8 time steps
    Case(samples=1, cells=15_680, hidden=None),  # both, gathered by the model
    Case(samples=1, cells=4096, hidden=None, width=768, vocabulary=20_736),  # VideoBERT's centroids
    Case(samples=1, cells=37, hidden=None, width=48, vocabulary=100, small=True),
    Case(samples=1, frames=4, cells=40, hidden=17, tube=0.5, width=80, vocabulary=260, small=True),
    Case(samples=3, cells=50, hidden=0, width=32, vocabulary=128, small=True),
    Case(samples=2, cells=40, hidden=17, width=36, vocabulary=200, bias=False, small=True),
]


def inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> tuple[Tensor, nn.Linear, Tensor, Tensor | None]:
    """Features, head, targets and mask. A third of the targets are what the head answers, so that some are right."""
    shape = case.samples, case.frames, case.cells
    options: dict[str, Any] = {"device": device, "generator": generator}
    features = torch.randn(*shape, case.width, **options)
    head = nn.Linear(case.width, case.vocabulary, bias=case.bias, device=device)
    with torch.no_grad():
        # scores with a deviation of 2: a softmax with peaks
        head.weight.copy_(torch.randn(head.weight.shape, **options) * 2 / case.width**0.5)
        if case.bias:
            head.bias.copy_(torch.randn(head.bias.shape, **options) / 2)
        targets = torch.randint(case.vocabulary, shape, **options)
        targets = torch.where(torch.rand(shape, **options) < 1 / 3, head(features).argmax(-1), targets)
    mask = None
    if case.hidden is not None:
        order = torch.rand(case.samples, 1, case.cells, **options).argsort(-1)
        seen = torch.arange(case.frames, device=device)[:, None] >= round(case.tube * case.frames)
        mask = (order < case.hidden) & ~seen
    return features.to(dtype).requires_grad_(), head.to(dtype), targets, mask


def rehearse(case: Case, dtype: torch.dtype) -> None:
    """Every launch of a forward with all gradients, of its backward, and of a forward without gradients."""
    positions = case.samples * case.frames * case.cells
    x = torch.empty(positions, case.width, dtype=dtype, device="meta")
    weight = x.new_empty(case.vocabulary, case.width)
    bias = x.new_empty(case.vocabulary) if case.bias else None
    targets = x.new_empty(positions, dtype=torch.int64)
    mask = None if case.hidden is None else x.new_empty(positions, dtype=torch.bool)
    loss, out, *gradients = _forward(x, weight, bias, targets, mask, True, True, case.bias)
    for gradient in gradients:
        _backward(loss, out, gradient, dtype)
    _forward(x, weight, bias, targets, mask, False, False, False)
