"""Where a classifier may start: our own runs, official BEVT and Video Swin, torchvision's, and 2-D Swins, inflated.

Names of every family become the official ones first, and those ours (`official.py`). Every key of the checkpoint and of
the model is accounted for, and a checkpoint of another width, depth, patch or window is refused with one sentence.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bevt_fast.errors import CheckpointError
from bevt_fast.models import official, torchvision_names
from bevt_fast.models.official import TABLE
from bevt_fast.models.video_swin import Triple, VideoSwinConfig
from bevt_fast.models.weights import unwrap

# a block's names in transformers (its newer and its older form), and the official ones
IN_A_BLOCK = (
    (".attention.relative_position_bias.", ".attn."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.self.", ".attn."),
    (".attention.", ".attn."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
TRANSFORMERS = (
    ("swin.", ""),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("encoder.layers.", "layers."),
    ("layernorm.", "norm."),
    ("classifier.", "head."),
)
PARTS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))


class Start(NamedTuple):
    """What became of every key: those of the checkpoint, and under `missing` those of the model that kept their own
    values. `str` of it is for people.
    """

    used: list[str]
    resized: list[str]
    unused: list[str]
    missing: list[str]

    def __str__(self) -> str:
        lines = [f"{len(self.used)} tensors used"]
        if self.resized:
            lines.append(f"{len(self.resized)} of them resized to the window")
        for what, keys in (("unused", self.unused), ("missing, so they start anew", self.missing)):
            lines += [f"{len(keys)} {what}: {', '.join(keys)}"] if keys else []
        return "; ".join(lines)


def start(
    module: nn.Module,
    state_dict: Mapping[str, Tensor],
    config: VideoSwinConfig,
    pretrained_window: Triple | None = None,
) -> Start:
    """Load a checkpoint of any family into a Classifier of the shape `config`; what became of every key.

    The encoder must fit whole; its bias tables are resized if `pretrained_window` is given, and only then. A class head
    is taken if it has the same size. Raises CheckpointError in one sentence.
    """
    weights, unused, is_flat = _in_our_names(state_dict, config, pretrained_window)
    _require_same_shape(weights, config, pretrained_window, is_flat)
    tables = [key for key in weights if key.endswith(TABLE)]
    if is_flat:
        resized = tables if pretrained_window and pretrained_window[1:] != config.window[1:] else []
    elif pretrained_window is not None:
        weights = official.resize_bias_tables(weights, pretrained_window, config.window)
        resized = tables if pretrained_window != config.window else []
    else:
        resized = []
    own = module.state_dict()
    head = [key for key in weights if key.startswith("class_head.") and own[key].shape != weights[key].shape]
    left = [key for key in weights if key not in own or key in head]
    kept = {key: value for key, value in weights.items() if key not in left}
    if absent := [key for key in own if key not in kept and key.startswith("encoder.")]:
        raise CheckpointError(f"the checkpoint lacks {len(absent)} tensors of the encoder, the first is {absent[0]}")
    if other := [key for key in kept if kept[key].shape != own[key].shape]:
        raise CheckpointError(
            f"{len(other)} tensors of the checkpoint have another shape than the model's, the first is {other[0]}: "
            f"{tuple(kept[other[0]].shape)} instead of {tuple(own[other[0]].shape)}; set model.size to that of the "
            "checkpoint"
        )
    module.load_state_dict(kept, strict=False)
    return Start(list(kept), resized, unused + left, [key for key in own if key not in kept])


def _in_our_names(
    state_dict: Mapping[str, Tensor], config: VideoSwinConfig, pretrained_window: Triple | None
) -> tuple[dict[str, Tensor], list[str], bool]:
    """The weights in our names, the keys left out, and whether they are of a 2-D Swin, now inflated."""
    weights, unused = unwrap(state_dict), []
    if any(key.startswith(("encoder.stage.", "model.encoder.stage.")) for key in weights):
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
        if "encoder.stem.projection.weight" in weights:
            return weights, unused, False
        return official.inflate_image_checkpoint(weights, config, unused), unused, True
    weights = as_official(weights, unused)
    kernel = next((value for key, value in weights.items() if key.endswith("patch_embed.proj.weight")), None)
    if kernel is None:
        raise CheckpointError(
            "the checkpoint is of no Swin that is known here (BEVT, Video Swin, torchvision, timm, transformers, "
            f"Microsoft): it has no patch embedding; its first keys are {', '.join(list(weights)[:3])}"
        )
    _require_same_kernel(kernel, config)
    if kernel.ndim == 4:
        _require_flat_window(weights, config, pretrained_window)
        return official.inflate_image_checkpoint(weights, config, unused), unused, True
    return official.from_official(weights, unused), unused, False


def as_official(weights: Mapping[str, Tensor], dropped: list[str] | None = None) -> dict[str, Tensor]:
    """torchvision's, timm's and transformers' names to Microsoft's; those stay as they are. What is recomputed may be
    left out, and is then appended to `dropped`.
    """
    if torchvision_names.is_torchvision(weights):
        return official.to_official(torchvision_names.from_torchvision(weights, dropped))
    if any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in weights):
        return _from_transformers(weights)
    # timm puts a merging at the beginning of the stage behind it, Microsoft at the end of the one before
    if any(re.match(r"layers\.3\.downsample\.", key) for key in weights):
        pattern = re.compile(r"layers\.(\d+)\.downsample\.")
        return {pattern.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", k): v for k, v in weights.items()}
    return dict(weights)


def _from_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values are three layers there and one here."""
    renamed = {}
    for key, value in weights.items():
        for theirs, ours in TRANSFORMERS:
            key = ours + key.removeprefix(theirs) if key.startswith(theirs) else key
        if ".blocks." in key:
            for theirs, ours in IN_A_BLOCK:
                key = key.replace(theirs, ours)
        renamed[key] = value
    for key in [key for key in renamed if any(f".attn.{name}." in key for name in PARTS[0])]:
        names = next(names for names in zip(*PARTS) if f".{names[0]}." in key)
        parts = [renamed.pop(key.replace(names[0], name)) for name in names]
        renamed[key.replace(names[0], "qkv")] = torch.cat(parts)
    return renamed


def _require_same_kernel(kernel: Tensor, config: VideoSwinConfig) -> None:
    """Raises CheckpointError for a stem of another width or patch."""
    if len(kernel) != config.embed_dim:
        raise CheckpointError(
            f"the checkpoint is {len(kernel)} wide after its stem, the model {config.embed_dim}; set model.size to "
            "that of the checkpoint"
        )
    patch = tuple(kernel.shape[2:])
    if patch != config.patch[-len(patch) :]:
        raise CheckpointError(f"the checkpoint has patches of {patch}, the model of {config.patch}; take another one")


def _require_flat_window(
    weights: Mapping[str, Tensor], config: VideoSwinConfig, pretrained_window: Triple | None
) -> None:
    """Raises CheckpointError for 2-D tables of another window than the one they are said to have."""
    rows = next((len(value) for key, value in weights.items() if key.endswith(TABLE)), 0)
    said = pretrained_window or config.window
    if rows != (2 * said[1] - 1) * (2 * said[2] - 1):
        raise CheckpointError(
            f"the 2-D checkpoint's bias tables have {rows} rows, which is another window than {said[1:]}; set "
            "model.pretrained_window to [any, height, width] of the checkpoint to have them resized"
        )


def _require_same_shape(
    weights: Mapping[str, Tensor], config: VideoSwinConfig, pretrained_window: Triple | None, is_flat: bool
) -> None:
    """Raises CheckpointError for the first of width, patch, depths, heads and window that differs."""
    if (kernel := weights.get("encoder.stem.projection.weight")) is not None:
        _require_same_kernel(kernel, config)
    blocks = {tuple(key.split(".")[2:5:2]) for key in weights if ".blocks." in key}
    depths = tuple(sum(stage == str(k) for stage, _ in blocks) for k in range(4))
    if depths != config.depths:
        raise CheckpointError(
            f"the checkpoint has {depths} blocks, the model {config.depths}; set model.size to that of the checkpoint"
        )
    name = f"encoder.stage.0.blocks.0.attention.{TABLE}"
    if (table := weights.get(name)) is None or table.ndim != 2:
        raise CheckpointError(
            f"the checkpoint has no {name}, so it is no Swin with relative positions; take another one"
        )
    if table.shape[1] != config.heads[0]:
        raise CheckpointError(
            f"the checkpoint has {table.shape[1]} heads in its first stage, the model {config.heads[0]}; set "
            "model.size to that of the checkpoint"
        )
    rows = [2 * size - 1 for size in config.window]
    if not is_flat and pretrained_window is None and len(table) != rows[0] * rows[1] * rows[2]:
        raise CheckpointError(
            f"the checkpoint's bias tables have {len(table)} rows, which is another window than the model's "
            f"{config.window}; set model.pretrained_window to the window of the checkpoint to have them resized"
        )
