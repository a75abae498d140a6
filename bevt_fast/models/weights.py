"""Weight files in, weights into modules. No key is passed over in silence: what does not fit is named, or reported."""

import pickle
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bevt_fast.errors import CheckpointError

StateDict = Mapping[str, Tensor]
Checkpoint = Mapping[str, Any]  # a state dict, or a dictionary around one


class Report(NamedTuple):
    """What became of every key. `str` of it is for people."""

    loaded: list[str]
    missing: list[str]  # the module kept its own values
    unexpected: list[str]  # the module has no such parameter
    dropped: list[str]  # left out on purpose before loading

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for what in ("missing", "unexpected", "dropped"):
            keys = getattr(self, what)
            lines += [f"{len(keys)} {what}: {', '.join(keys)}"] if keys else []
        return "; ".join(lines)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a `torch.save` pickle, read without running code from the file.

    Raises CheckpointError for a file that is missing, damaged, not a checkpoint, or asks to run code.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(512).lstrip().lower()
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror}; check the path") from None
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not a checkpoint; download the file itself again")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise CheckpointError(f"{path} is damaged or not a checkpoint; copy or download it again") from None
        raise CheckpointError(
            f"{path} holds more than tensors and would run code when opened ({refused[1]}); "
            "where you trust it, save its state_dict alone, best as .safetensors"
        ) from None
    except Exception as error:  # what torch raises for a damaged file depends on where the damage is
        reason = type(error).__name__
        raise CheckpointError(f"{path} is truncated or damaged ({reason}); copy or download it again") from None
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of tensors")
    return unwrap(checkpoint)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}); copy it again") from None


def unwrap(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of a checkpoint: under `model`, else `module`, else `state_dict`, else at its top (SPEC 5.4)."""
    for key in ("model", "module", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {key: value for key, value in checkpoint.items() if isinstance(value, Tensor)}
    if not weights:
        raise CheckpointError(
            f"the checkpoint holds no tensors under 'model', 'module', 'state_dict' or at its top; "
            f"its keys are {', '.join(map(str, list(checkpoint)[:8])) or 'none'}"
        )
    return weights


def load(
    module: nn.Module,
    weights: StateDict,
    *,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    dropped: Sequence[str] = (),
) -> Report:
    """Copy weights into a module, all or nothing. `allow_*` are patterns of keys that may stay without a partner.

    Raises CheckpointError that lists every other missing or unexpected key and every tensor of another shape.
    """
    own = module.state_dict()
    both = [key for key in own if key in weights]
    report = Report(
        both,
        [key for key in own if key not in weights],
        [key for key in weights if key not in own],
        list(dropped),
    )
    faults = [
        f"{key} is {tuple(weights[key].shape)} in the checkpoint but {tuple(own[key].shape)} in the model"
        for key in both
        if weights[key].shape != own[key].shape
    ]
    remedy = _shape_remedy(faults)
    faults += [f"{key} is missing" for key in _not_allowed(report.missing, allow_missing)]
    faults += [f"{key} is unexpected" for key in _not_allowed(report.unexpected, allow_unexpected)]
    if faults:
        raise CheckpointError(f"the checkpoint does not fit the model: {'; '.join(faults)}{remedy}")
    module.load_state_dict({key: weights[key] for key in both}, strict=False)
    return report


def _not_allowed(keys: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in patterns)]


def _shape_remedy(faults: Sequence[str]) -> str:
    if not faults:
        return ""
    if all("relative_position_bias_table" in fault for fault in faults):
        return "; the bias tables belong to another window: set model.window, or use official.resize_bias_tables"
    if any("stem.projection.weight" in fault for fault in faults):
        return "; for a 2-D image checkpoint use official.inflate_image_checkpoint, else set model.size"
    return "; set model.size and model.window to those of the checkpoint"
