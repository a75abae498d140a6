"""Put `window_attention` under the blocks of other people's Swin transformers, in place, and take it out again.

A module is known by its class name, by the methods its class defines itself and by its attributes; no other codebase is
imported. A swapped module is given a class of the same name, derived from its own, in which one method is replaced: the
one inside which the original rolls, pads, partitions and masks. Parameters, buffers, hooks and names are not touched,
parameters are read when the module is called, and the original method answers wherever the kernel could not be exact.

`known_swins` is the table of what is known.
"""

import functools
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from . import runtime
from .known_swins import KNOWN, MARKS, Marks, triple
from .window_geometry import bias_rows

ORIGINAL = "_bevt_kernels_original"  # on a swapped class: the class it was derived from


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
            module.__dict__[MARKS] = Marks(_drops_in_eval(type(module)))
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
            runtime.warn_once(f"swap: a {known.name} counts relative positions in another way; it is left as it is")
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
    window = triple(size)
    if index.numel() != prod(window) ** 2 or index.is_meta:  # a model on the meta device has no values yet
        return not index.is_meta
    return not torch.equal(index.flatten().cpu(), bias_rows(window, window, "true", torch.device("cpu")).flatten())


def _drops_in_eval(cls: type[nn.Module]) -> bool:
    """In torchvision before 0.15 the functional attention has no `training`, and its dropout is never off."""
    beside = vars(sys.modules[cls.__module__])
    functional = [value for name, value in beside.items() if name.startswith("shifted_window_attention")]
    return any("training" not in inspect.signature(f).parameters for f in functional)


def _note_who_makes_the_masks(model: nn.Module) -> None:
    """A layer that makes the masks of its blocks is believed where values cannot be read, under torch.compile."""
    for parent in model.modules():
        if type(parent).__name__ == "BasicLayer" and _own_method(parent, "forward"):
            for block in parent.modules():
                if ORIGINAL in vars(type(block)):
                    block.__dict__[MARKS].made_in_the_model = True


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
    return type(original.__name__, (original,), body)


def _empty(original: type[nn.Module], which: str) -> Any:
    """A swapped module before it is filled: what pickle and deepcopy begin with."""
    derived: Any = _derived(original, which)
    return derived.__new__(derived)


@runtime.constant
def _say(sentence: str) -> None:
    runtime.warn_once(sentence)
