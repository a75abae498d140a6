"""The convolutions of DALL-E's encoder (SPEC 3.1), by the way that the device and the precision allow.

A CPU takes a few frames through some of the layers, then the next few: activations stay near its caches, and weights
are laid out once for all frames. A GPU takes all frames through all layers.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bevt_fast.tokenizers import _convolution
from bevt_fast.tokenizers._convolution import Convolution, Way

GROUPS, BLOCKS = 4, 2  # SPEC 3.1
GAIN = 1 / (GROUPS * BLOCKS) ** 2  # of a block's residual path
FIRST = 2  # frames in a CPU's first group at a time; its widest layer has 12.8 MB a 112-pixel frame
LAST = 16  # and in its last
COMPILED = 4  # frames that a CPU takes through all compiled layers at a time
SMALLEST = {"cuda": 8, "cpu": 1}  # frames that are compiled for

Precision = Literal["official", "fp32", "bf16"]


class Block(nn.Module):
    """id(x) + res(x) / 64, with a bottleneck of a quarter of the width."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        inner = outputs // 4
        self.id_path = Convolution(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        sizes = [(inputs, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, outputs, 1)]
        for i, size in enumerate(sizes, start=1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = Convolution(*size, gain=GAIN if i == len(sizes) else 1.0)
        self.res_path = nn.Sequential(layers)

    def run(self, x: Tensor, way: Way) -> Tensor:
        """(n, C, H, W), which is overwritten, through convolutions that `way` computes."""
        first, second, third, last = (cast(Convolution, self.res_path[i]) for i in (1, 3, 5, 7))
        if isinstance(self.id_path, Convolution):
            onto, y = way(self.id_path, x), x.relu_()
        else:
            onto, y = x, x.relu()
        for layer in (first, second, third):
            y = way(layer, y, relu=True)
        return way(last, y, onto=onto)


class Stage(NamedTuple):
    """Layers whose weights are held together, and how many frames go through them at a time."""

    layers: list[nn.Module]
    frames: int

    def convolutions(self) -> list[Convolution]:
        return [module for layer in self.layers for module in layer.modules() if isinstance(module, Convolution)]

    def run(self, x: Tensor, way: Way) -> Tensor:
        for layer in self.layers:
            if isinstance(layer, Convolution):
                x = way(layer, x)
            else:
                x = layer.run(x, way) if isinstance(layer, Block) else layer(x)
        return x


class Body(nn.Sequential):
    """All layers, by their official names. `features` runs all but the last.

    Args:
        hidden: width n of the first group; the others have 2n, 4n and 8n.
        precision, compile: as in `dalle.Dalle`; either may be set at any time.
    """

    def __init__(self, hidden: int, vocab_size: int, precision: Precision, compile: bool):
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Convolution(3, hidden, 7))
        width = hidden
        for group in range(GROUPS):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(BLOCKS):
                layers[f"block_{block + 1}"] = Block(width, hidden * 2**group)
                width = hidden * 2**group
            if group < GROUPS - 1:
                layers["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{group + 1}"] = nn.Sequential(layers)
        head: OrderedDict[str, nn.Module] = OrderedDict(relu=nn.ReLU())
        head["conv"] = Convolution(width, vocab_size, 1)
        blocks["output"] = nn.Sequential(head)
        super().__init__(blocks)
        for number, layer in enumerate(Stage(list(self), 0).convolutions()):
            layer.number = number
        self.precision: Precision = precision
        self.compiles = compile
        self._compiled: Callable[..., Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy compiles for itself
        return self.__dict__ | {"_compiled": None}

    @property
    def last(self) -> Convolution:
        """The last convolution: features to scores."""
        return cast(Convolution, self.get_submodule("output.conv"))

    def features(self, token_pixels: Tensor) -> Tensor:
        """(n, 3, H, W) float32 -> (n, K, h, w) in channels_last, after the last ReLU. Callers switch autocast off."""
        x = token_pixels.to(self._dtype(token_pixels.device), memory_format=torch.channels_last)
        exact = x.dtype == torch.float32
        with _convolution.ieee_float32(x.device) if exact else contextlib.nullcontext():
            if self.compiles and len(x) and x.device.type in SMALLEST:
                return self._run_compiled(x)
            return self._run(x).relu_()

    def _dtype(self, device: torch.device) -> torch.dtype:
        """Of all convolutions but the last."""
        if self.precision == "official":
            return torch.float16 if device.type == "cuda" else torch.float32
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def _stages(self) -> list[Stage]:
        """The body in parts that fit a CPU: a frame's activations halve with each group, its weights quadruple."""
        first, *groups, _ = self
        groups = [list(cast(nn.Sequential, group)) for group in groups]
        groups[0].insert(0, first)
        *early, last = groups
        stages = [Stage(layers, FIRST << i) for i, layers in enumerate(early)]
        # three quarters of the weights are in the last group
        return stages + [Stage([block], LAST) for block in last]

    def _run(self, x: Tensor) -> Tensor:
        """(n, 3, H, W) in its dtype and channels_last -> (n, K, h, w)."""
        if x.is_cuda:
            way = self._plain_way(x)
            for stage in self._stages():
                x = stage.run(x, way)
            return x
        fused = x.device.type == "cpu" and len(x) > 0 and _convolution.onednn_runs(x.dtype)
        for stage in self._stages():
            layers, (height, width) = stage.convolutions(), x.shape[-2:]
            if fused:
                way = _convolution.OneDnn(layers, x.dtype, (min(len(x), stage.frames), height, width), len(x))
            else:
                way = _convolution.Plain({layer.number: layer.weights(x.dtype) for layer in layers})
            x = _joined([stage.run(part, way) for part in x.split(stage.frames)])
        return x

    def _plain_way(self, x: Tensor) -> _convolution.Plain:
        """Weights that were cast once."""
        layers = [layer for stage in self._stages() for layer in stage.convolutions()]
        weights = {layer.number: layer.cast(x.dtype) for layer in layers}
        return _convolution.Plain(weights, linear=True, fused=True)

    def _run_compiled(self, x: Tensor) -> Tensor:
        """Frames in powers of two, filled up with black ones, so that few shapes are compiled."""
        if self._compiled is None:
            # on a CPU autotuning takes minutes, and the convolutions are oneDNN's either way
            mode = "max-autotune-no-cudagraphs" if x.is_cuda else "default"
            self._compiled = torch.compile(self._all, mode=mode, dynamic=False)
        weights = self._plain_way(x).weights
        done = []
        for part in x.split(len(x) if x.is_cuda else COMPILED):
            missing = bucket(len(part), SMALLEST[x.device.type]) - len(part)
            filled = functional.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
            done.append(self._compiled(filled, weights)[: len(part)])
        return _joined(done)

    def _all(self, x: Tensor, weights: dict[int, _convolution.Weights]) -> Tensor:
        way = _convolution.Plain(weights)
        for stage in self._stages():
            x = stage.run(x, way)
        return x.relu()


def bucket(frames: int, smallest: int) -> int:
    """The power of two that holds so many frames, at least `smallest`."""
    return max(smallest, 1 << (frames - 1).bit_length())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
