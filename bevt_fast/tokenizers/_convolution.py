"""Convolutions of a frozen encoder over frames in channels_last, with what follows them: a ReLU, or a residual sum.

Three ways compute the same: plain layers; on a CPU oneDNN's own operators, which add bias, ReLU and sum while a result
is still in a register (Inductor emits the same calls); on a GPU weights that were cast once, cuDNN's convolution with
bias and ReLU, and for a 1 x 1 kernel a matrix product that adds its bias.

oneDNN wants weights in blocks of its own. Plain layers reorder them in every call and throw them away; here that is
done once for all frames of a stage and lasts as long as the stage, so nothing is kept beside the weights themselves.
"""

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import flop_registry, register_flop_formula

from bevt_fast.tokenizers import _winograd
from bevt_fast.tokenizers._winograd import Winograd


class Convolution(nn.Module):
    """The numbers of one convolution: stride 1, zero padding to the same size.

    gain: what its result is multiplied by before it is added to a residual. number: its place in the encoder.
    """

    number = 0

    def __init__(self, inputs: int, outputs: int, side: int, gain: float = 1.0):
        super().__init__()
        self.gain = gain
        # normal(0, 1/sqrt(fan-in)): without trained weights the logits still have a useful scale
        self.w = nn.Parameter(torch.randn(outputs, inputs, side, side) / math.sqrt(inputs * side**2))
        self.b = nn.Parameter(torch.zeros(outputs))
        self._kept: Kept | None = None

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)

    def cast(self, dtype: torch.dtype) -> "Weights":
        """Weights in `dtype` and channels_last, kept until the parameters are other ones or change."""
        now = [(parameter, parameter.detach(), _version(parameter)) for parameter in (self.w, self.b)]
        kept = self._kept
        if kept is None or kept.weights.w.dtype != dtype or not all(map(_same, kept.made_of, now)):
            kept = self._kept = Kept(now, self.weights(dtype))
        return kept.weights

    def weights(self, dtype: torch.dtype) -> "Weights":
        """Weights in `dtype` and channels_last; nothing is kept."""
        w = self.w.detach().to(dtype, memory_format=torch.channels_last)
        return Weights(w, self.b.detach().to(dtype), self.w.shape[-1] // 2, self.gain)

    def _apply(self, *arguments: Any, **options: Any) -> "Convolution":
        device = self.w.device
        super()._apply(*arguments, **options)
        if self.w.device != device:
            self._kept = None  # it would hold the memory that was left
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy casts its own
        return self.__dict__ | {"_kept": None}


class Weights(NamedTuple):
    """Of one convolution, laid out for one way."""

    w: Tensor
    b: Tensor
    padding: int
    gain: float


class Kept(NamedTuple):
    """Cast weights, and the parameters they were made of: each itself, its memory, its version."""

    made_of: Sequence[tuple[Tensor, Tensor, int | None]]
    weights: Weights


class Way(Protocol):
    """Computes convolutions, whose laid-out weights it holds by number."""

    def __call__(self, layer: Convolution, x: Tensor, relu: bool = False, onto: Tensor | None = None) -> Tensor:
        """conv(x), relu(conv(x)), or onto + gain * conv(x), which overwrites `onto`; a layer with a gain is always
        summed onto something. `x` is left as it is.
        """
        ...


class Plain:
    """torch's own layers. `linear`: a 1 x 1 kernel as a matrix product; `fused`: cuDNN's convolution with ReLU."""

    def __init__(self, weights: dict[int, Weights], linear: bool = False, fused: bool = False):
        self.weights, self.linear, self.fused = weights, linear, fused

    def __call__(self, layer: Convolution, x: Tensor, relu: bool = False, onto: Tensor | None = None) -> Tensor:
        w, b, padding, gain = self.weights[layer.number]
        if relu and self.fused:
            return _cudnn_relu(x, w, b, padding)
        if self.linear and not padding:
            y = functional.linear(x.movedim(1, -1), w.flatten(1), b).movedim(-1, 1)
        else:
            y = functional.conv2d(x, w, b, padding=padding)
        if onto is not None:
            return onto.add_(y, alpha=gain)
        return y.relu_() if relu else y


class OneDnn:
    """oneDNN's fused operators, with weights in its blocks for frames of `shape` (n, H, W), `frames` of them in all.
    Wide layers of many small frames take fewer products, by `Winograd`.

    The gain is multiplied into weights and bias: it is a power of two, so that only exponents change.
    """

    def __init__(self, layers: Iterable[Convolution], dtype: torch.dtype, shape: tuple[int, int, int], frames: int):
        self.weights: dict[int, Weights | Winograd] = {}
        for layer in layers:
            filtering = _winograd.suited(layer.w, dtype, (frames, shape[1], shape[2])) if layer.gain == 1 else None
            if filtering is not None:
                self.weights[layer.number] = Winograd.of(layer.w.detach(), layer.b.detach(), filtering)
            else:
                self.weights[layer.number] = self._packed(layer, dtype, shape)
        rooms = [laid_out.room(*shape) for laid_out in self.weights.values() if isinstance(laid_out, Winograd)]
        self.memory = _winograd.take(tuple(map(max, zip(*rooms)))) if rooms else None

    @staticmethod
    def _packed(layer: Convolution, dtype: torch.dtype, shape: Sequence[int]) -> Weights:
        padding = layer.w.shape[-1] // 2
        w, b = layer.w.detach().to(dtype), layer.b.detach().to(dtype)
        if layer.gain != 1:
            w, b = w * layer.gain, b * layer.gain
        n, height, width = shape
        size = [n, w.shape[1], height, width]
        packed = torch.ops.mkldnn._reorder_convolution_weight(w, [padding] * 2, [1, 1], [1, 1], 1, size)
        return Weights(packed, b, padding, layer.gain)

    def __call__(self, layer: Convolution, x: Tensor, relu: bool = False, onto: Tensor | None = None) -> Tensor:
        laid_out = self.weights[layer.number]
        if isinstance(laid_out, Winograd):
            return laid_out(x, relu, self.memory)
        w, b, padding, _ = laid_out
        how = ([padding] * 2, [1, 1], [1, 1], 1)
        if onto is not None:
            return torch.ops.mkldnn._convolution_pointwise_.binary(onto, x, w, b, *how, "add", 1.0, None, [], None)
        return torch.ops.mkldnn._convolution_pointwise(x, w, b, *how, "relu" if relu else "none", [], "")


def onednn_runs(dtype: torch.dtype) -> bool:
    """Whether this torch and this CPU have the fused operators, and torch's use of oneDNN is on."""
    if not torch.backends.mkldnn.enabled:
        return False
    with _disable_current_modes():  # whoever counts operations counts none of the probe's
        return _onednn_agrees(dtype)


@functools.cache
def _onednn_agrees(dtype: torch.dtype) -> bool:
    """Whether whole numbers come out of them as they should: every product and sum is exact in any dtype."""

    def numbers(values: int, *shape: int) -> Tensor:
        return (torch.arange(math.prod(shape), device="cpu") % values - 1).view(shape).to(dtype)

    with torch.device("meta"):  # draws no random number
        layers = [Convolution(16, 16, 3), Convolution(16, 16, 3, gain=0.5)]
    for number, layer in enumerate(layers):
        layer.w, layer.b = (nn.Parameter(x, requires_grad=False) for x in (numbers(3, 16, 16, 3, 3), numbers(7, 16)))
        layer.number = number
    x, onto = numbers(2, 2, 16, 4, 4), numbers(5, 2, 16, 4, 4)
    x, onto = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, onto))
    results = []
    try:
        for way in (
            Plain({n: layer.weights(dtype) for n, layer in enumerate(layers)}),
            OneDnn(layers, dtype, (2, 4, 4), 2),
        ):
            results.append((way(layers[0], x), way(layers[0], x, relu=True), way(layers[1], x, onto=onto.clone())))
    except (AttributeError, RuntimeError):
        return False
    return all(torch.equal(ours, plain) for ours, plain in zip(*results))


_refused: set[tuple[Any, ...]] = set()


def _cudnn_relu(x: Tensor, w: Tensor, b: Tensor, padding: int) -> Tensor:
    """relu(conv(x) + b) in one kernel, by the plain layers for a shape that cuDNN has no such kernel for."""
    asked = (x.shape, w.shape, x.dtype, x.device)
    if asked not in _refused:
        try:
            return torch.cudnn_convolution_relu(x, w, b, [1, 1], [padding] * 2, [1, 1], 1)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            _refused.add(asked)
    return functional.conv2d(x, w, b, padding=padding).relu_()


@contextlib.contextmanager
def ieee_float32(device: torch.device) -> Iterator[None]:
    """On a GPU float32 is float32, and not TensorFloat-32, in convolutions and matrix products."""
    known: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    switches = [known[0].conv, known[1]] if device.type == "cuda" else []
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


def _version(parameter: Tensor) -> int | None:
    """Rises whenever the tensor is written to; a tensor of inference mode counts nothing."""
    return None if parameter.is_inference() else parameter._version


def _same(before: tuple[Tensor, Tensor, int | None], now: tuple[Tensor, Tensor, int | None]) -> bool:
    # the memory is held, so no other tensor can have its address
    return before[0] is now[0] and before[1].data_ptr() == now[1].data_ptr() and before[2] == now[2]


def _flops(first: Sequence[int], second: Sequence[int], third: Sequence[int] | None, *_: Any, **told: Any) -> int:
    """Twice the multiplications of oneDNN's operators: (x, w, b, ...), (x, other, w, ...) or (other, x, w, ...)."""
    w = third if third is not None and len(third) > 1 else second
    return 2 * math.prod(told["out_shape"]) * math.prod(w[1:])


for _name in ("_convolution_pointwise", "_convolution_pointwise_"):
    _operator = getattr(torch.ops.mkldnn, _name, None)
    if _operator is not None and _operator not in flop_registry:
        register_flop_formula(_operator)(_flops)
