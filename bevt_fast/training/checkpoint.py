"""Checkpoints that cannot be half-written or silently wrong.

A checkpoint is a directory. It is written aside, every file flushed to the disk, a manifest with the digest of every
file added, and then renamed: the rename is the commit. No common format notices a flipped bit (safetensors and
torch.save load it), so reading checks the digests first. State is stored by parameter name, whole and in float32: any
number of processes and any ZeRO stage can go on from it.

    step_00000400/model.safetensors        the weights, loadable with safetensors alone
                  optimizer.safetensors    AdamW's moments, `parameter.exp_avg` and `parameter.exp_avg_sq`
                  trainer.json             step, counters, loss scaler, what the run was
                  config.json              the resolved configuration
                  MANIFEST.json            bytes and SHA-256 of the files above
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bevt_fast import __version__
from bevt_fast.errors import CheckpointError

log = logging.getLogger("bevt_fast")

FORMAT = 1
NAME = re.compile(r"step_(\d{8})")
PARTS = ("model.safetensors", "optimizer.safetensors", "trainer.json", "config.json")


class Checkpoint(NamedTuple):
    """What a run goes on from. `weights` and `moments` by parameter name, float32."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    trainer: dict[str, Any]


def write(
    directory: Path,
    step: int,
    weights: Iterator[tuple[str, Tensor]],
    moments: Iterator[tuple[str, Tensor]],
    trainer: dict[str, Any],
    config: str,
    keep: int,
) -> Path:
    """Commit one checkpoint and remove all but the newest `keep`. Raises OSError with earlier commits intact."""
    final = directory / f"step_{step:08d}"
    aside = directory / f".step_{step:08d}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        metadata = {"format": "pt"}  # one key: safetensors writes several in random order, and equal runs would differ
        try:
            save_file(dict(weights), aside / PARTS[0], metadata=metadata)
            save_file(dict(moments), aside / PARTS[1], metadata=metadata)
        except SafetensorError as error:  # a full disk arrives as this class
            raise OSError(str(error)) from error
        (aside / "trainer.json").write_text(json.dumps({"format": FORMAT, "step": step} | trainer, indent=1))
        (aside / "config.json").write_text(config)
        manifest = {name: _digest(aside / name) for name in PARTS}
        (aside / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
        for name in (*PARTS, "MANIFEST.json"):
            _flush(aside / name)
        _flush(aside)
        replaced = directory / f".{final.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():  # the same step again, after going on from an older checkpoint
            final.rename(replaced)
        aside.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
        _flush(directory)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _point_latest(directory, final.name)
    for old in sorted(commits(directory))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def commits(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest step first. What was never renamed is not among them."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def set_aside(directory: Path, step: int) -> list[Path]:
    """Rename the commits beyond `step` to `step_XXXXXXXX.aside`; returns the new names.

    A run that goes on from an earlier one than the newest would lose its own commits to them, which are older, and
    would be resumed from them.
    """
    moved = []
    for path in commits(directory):
        if int(path.name.removeprefix("step_")) > step:
            aside = path.with_name(f"{path.name}.aside")
            shutil.rmtree(aside, ignore_errors=True)
            moved.append(path.rename(aside))
    return moved


def newest_valid(directory: Path) -> Checkpoint | None:
    """The newest commit whose files match their digests; damaged ones are named and passed over.

    None where there is no commit at all. Raises CheckpointError where there are only damaged ones.
    """
    there = commits(directory)
    for path in reversed(there):
        try:
            return read(path)
        except CheckpointError as error:
            log.warning("%s; trying the one before", error)
    if there:
        raise CheckpointError(
            f"{directory}: none of {len(there)} checkpoints is intact; remove them or name another with --resume DIR"
        )
    return None


def read(path: Path) -> Checkpoint:
    """One checkpoint, checked against its digests. Raises CheckpointError naming the damaged or missing file."""
    manifest = _read_json(path, "MANIFEST.json")
    for name in PARTS:
        if name not in manifest or not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing, the checkpoint is not complete")
        if _digest(path / name) != manifest[name]:
            raise CheckpointError(f"{path}: {name} does not match its digest, the file is damaged")
    trainer = _read_json(path, "trainer.json")
    if trainer.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {trainer.get('format')} is not {FORMAT}, which bevt_fast {__version__} reads"
        )
    try:
        return Checkpoint(path, trainer["step"], load_file(path / PARTS[0]), load_file(path / PARTS[1]), trainer)
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def require_same_architecture(checkpoint: Checkpoint, module: torch.nn.Module) -> None:
    """Raises CheckpointError listing every parameter that is missing, unexpected or of another shape."""
    ours = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    faults = [f"missing: {name} {shape}" for name, shape in ours.items() if name not in theirs]
    faults += [f"unexpected: {name} {shape}" for name, shape in theirs.items() if name not in ours]
    faults += [
        f"reshaped: {name} {theirs[name]} in the checkpoint, {shape} in the model"
        for name, shape in ours.items()
        if name in theirs and theirs[name] != shape
    ]
    if faults:
        listing = "\n  ".join(faults)
        raise CheckpointError(
            f"{checkpoint.path} is of another architecture than this configuration "
            f"(set `model` as in its config.json, or train into another output):\n  {listing}"
        )


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((path / name).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {name} is missing, the checkpoint is not complete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point_latest(directory: Path, name: str) -> None:
    """A text file `latest`, for people and scripts that look for one; resuming does not read it, and the commit stands
    without it.
    """
    aside = directory / ".latest.writing"
    try:
        aside.write_text(name + "\n")
        _flush(aside)
        os.replace(aside, directory / "latest")
    except OSError as error:
        log.warning("%s could not be written: %s", directory / "latest", error)
