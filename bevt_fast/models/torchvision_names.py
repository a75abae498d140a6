"""torchvision's names of swin3d: ours to theirs and back, a renaming and an index that follows from the window; and of
its 2-D swin, to ours alone.

torchvision has the official bias index (SPEC X2): its logits are those of a classifier with bias_index "official", and
of one with "true" wherever no stage is lower or narrower than the window.
"""

import re

import torch
from torch import Tensor

from bevt_fast.errors import CheckpointError
from bevt_fast.models.official import TABLE
from bevt_fast.models.video_swin import Triple, VideoSwinConfig
from bevt_fast.models.weights import StateDict

INDEX = "relative_position_index"
# ours, theirs; of what lies outside the stages, and within a block
AROUND = (
    ("encoder.stem.projection.", "patch_embed.proj."),
    ("encoder.stem.norm.", "patch_embed.norm."),
    ("encoder.norm.", "norm."),
    ("class_head.", "head."),
)
WITHIN = ((".attention.projection.", ".attn.proj."), (".attention.", ".attn."), (".mlp.fc1.", ".mlp.0."))
WITHIN += ((".mlp.fc2.", ".mlp.3."),)
OURS = re.compile(r"encoder\.stage\.(\d)\.(?:blocks\.(\d+)|(merging))\.(.+)")
THEIRS = re.compile(r"features\.(\d)\.(.+)")
FLAT_STEM = (("features.0.0.", "patch_embed.proj."), ("features.0.2.", "patch_embed.norm."))  # of 2-D, and of swin3d


def is_torchvision(weights: StateDict) -> bool:
    """Whether names are those of torchvision's swin3d or swin."""
    stems = ("patch_embed.proj.weight", f"{FLAT_STEM[0][0]}weight")
    return any(THEIRS.fullmatch(key) for key in weights) and any(stem in weights for stem in stems)


def to_torchvision(weights: StateDict, config: VideoSwinConfig) -> dict[str, Tensor]:
    """A Classifier's weights for the `load_state_dict` of torchvision's SwinTransformer3d, index buffers included.

    Raises CheckpointError for a name that torchvision has no place for.
    """
    theirs = {}
    for key, value in weights.items():
        name = _their_name(key)
        theirs[name] = value
        if name.endswith(TABLE):
            theirs[name.removesuffix(TABLE) + INDEX] = position_index(config.window)
    return theirs


def from_torchvision(weights: StateDict, dropped: list[str] | None = None) -> dict[str, Tensor]:
    """The weights of torchvision's swin3d in our names. Index buffers are left out and appended to `dropped`.

    Those of its 2-D swin keep their shapes: a stem of four axes, and tables of one plane.
    """
    if f"{FLAT_STEM[0][0]}weight" in weights:
        weights = {_of_swin3d(key): value for key, value in weights.items()}
    ours = {}
    for key, value in weights.items():
        if key.endswith(INDEX):
            if dropped is not None:
                dropped.append(key)
            continue
        ours[_our_name(key)] = value
    return ours


def position_index(window: Triple) -> Tensor:
    """The row of the bias table for each pair of a window's positions, (N, N) int64: time, then height, then width."""
    places = torch.cartesian_prod(*(torch.arange(size) for size in window))
    offsets = places[:, None] - places[None] + torch.tensor(window) - 1  # (N, N, 3), each from 0
    rows = torch.zeros(len(places), len(places), dtype=torch.int64)
    for axis, size in enumerate(window):
        rows = rows * (2 * size - 1) + offsets[..., axis]
    return rows


def _their_name(key: str) -> str:
    if match := OURS.fullmatch(key):
        stage, block, merging, rest = match.groups()
        if merging:
            return f"features.{2 * int(stage) + 1}.{rest}"
        name = f"features.{2 * int(stage)}.{block}.{rest}"
        for ours, theirs in WITHIN:
            name = name.replace(ours, theirs)
        return name
    for ours, theirs in AROUND:
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    raise CheckpointError(f"torchvision's swin3d has no place for {key}; export a classifier alone")


def _of_swin3d(key: str) -> str:
    """A name of the 2-D swin as swin3d has it, which keeps its stem elsewhere, so that its stages begin one earlier."""
    for flat, deep in FLAT_STEM:
        key = key.replace(flat, deep)
    match = THEIRS.fullmatch(key)
    return f"features.{int(match[1]) - 1}.{match[2]}" if match else key


def _our_name(key: str) -> str:
    if match := THEIRS.fullmatch(key):
        number, rest = int(match[1]), match[2]
        if number % 2:
            return f"encoder.stage.{number // 2}.merging.{rest}"
        name = f"encoder.stage.{number // 2}.blocks.{rest}"
        for ours, theirs in WITHIN:
            name = name.replace(theirs, ours)
        return name
    for ours, theirs in AROUND:
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return key
