"""Official names in, official names out: a pure renaming, because no tensor needs to be transposed (SPEC 7).

Also what the official loaders do to tensors: 2-D weights inflated to clips (SPEC 5.4), bias tables resized to another
window (SPEC 6.5). Functions that leave keys out append them to the list passed as `dropped`.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bevt_fast.errors import CheckpointError
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.models.weights import Checkpoint, Report, StateDict, load, read, unwrap

__all__ = [
    "Report",
    "from_official",
    "inflate_image_checkpoint",
    "initial_weights",
    "initialise",
    "load",
    "read",
    "resize_bias_tables",
    "to_official",
    "unwrap",
]

# ours, the official owner, the official name
NAMES = (
    ("encoder.stem.projection.", "backbone.", "patch_embed.proj."),
    ("encoder.stem.norm.", "backbone.", "patch_embed.norm."),
    ("image_stem.projection.", "backbone.", "patch_embed_2d.proj."),
    ("image_stem.norm.", "backbone.", "patch_embed_2d.norm."),
    ("mask_token.vector", "backbone.", "mask_token"),
    ("encoder.stage.", "backbone.", "layers."),
    ("encoder.norm.", "backbone.", "norm."),
    ("image_decoder.upsample.", "backbone.", "fpn.0."),
    ("image_decoder.fuse.", "backbone.", "lm_down."),
    ("clip_decoder.upsample.", "backbone.", "fpn_s.0."),
    ("clip_decoder.fuse.", "backbone.", "lm_down_st.0."),
    ("clip_decoder.double_time.", "backbone.", "fpn_t.0."),
    ("head.", "cls_head.", "lm_head."),
    ("class_head.", "cls_head.", "fc_cls."),
)
WITHIN_A_STAGE = ((".attention.projection.", ".attn.proj."), (".attention.", ".attn."), (".merging.", ".downsample."))
TABLE = "relative_position_bias_table"

# an encoder starts whole or not at all; what stands around it may start from its own values
AROUND_THE_ENCODER = ("image_stem.*", "mask_token.*", "image_decoder.*", "clip_decoder.*", "head.*", "class_head.*")


def from_official(
    state_dict: Checkpoint, dropped: list[str] | None = None, ema: bool | None = None
) -> dict[str, Tensor]:
    """Names of the official BEVT, Video Swin and SSv2 checkpoints to ours, with or without `backbone.` and the like.

    Index buffers, the tokenizer and a 2-D Swin's classifier are left out; a name that is not in the table stays as it
    is, so that loading reports it. `ema=True` takes the moving averages instead of the plain weights of the same names;
    without a choice a checkpoint that holds both gives the plain ones and a warning, since which is which depends on
    the version that wrote it (SPEC 6.3).
    """
    weights = unwrap(state_dict)
    averages = {key for key in weights if key.startswith("ema_")}
    if averages and ema is None:
        warnings.warn("the checkpoint holds moving averages too; say ema=True or ema=False", stacklevel=2)
    ours, left_out = {}, []
    for key, value in weights.items():
        name = _stripped(key)
        average = "ema_" + key.replace(".", "_")
        if key in averages or _is_unused(name):
            left_out.append(key)
        elif ema and average not in averages:
            raise CheckpointError(f"ema=True, but the checkpoint has no moving average of {key}; say ema=False")
        else:
            ours[_our_name(name)] = weights[average] if ema else value
    if dropped is not None:
        dropped += left_out
    return ours


def to_official(state_dict: StateDict) -> dict[str, Tensor]:
    """Our names (of a Bevt, a Classifier or a VideoSwin) to the official ones, with `backbone.` and `cls_head.`."""
    return {_official_name(key): value for key, value in state_dict.items()}


def inflate_image_checkpoint(
    state_dict: Checkpoint, config: VideoSwinConfig, dropped: list[str] | None = None
) -> dict[str, Tensor]:
    """A 2-D Swin, BEVT-I or our own image-only checkpoint to the joint model's names and shapes (SPEC 5.4).

    The image stem becomes both stems, the clip one spread evenly over the patch's frames; a bias table is repeated for
    every temporal offset, after a bicubic resize where the spatial window differs. The classifier is not transferred.
    Raises CheckpointError where there is no 2-D stem to start from.
    """
    weights, left_out = unwrap(state_dict), []
    is_ours = any("image_stem." in key for key in weights)
    names = {key: _stripped(_official_name(key) if is_ours else key) for key in weights}
    stem = "patch_embed_2d." if is_ours else "patch_embed."
    kernel = next((weights[key] for key, name in names.items() if name == stem + "proj.weight"), None)
    if kernel is None or kernel.ndim != 4:
        found = "none" if kernel is None else f"one of shape {tuple(kernel.shape)}"
        raise CheckpointError(f"a 2-D checkpoint has a {stem}proj.weight of 4 axes, here is {found}; use from_official")
    official: dict[str, Tensor] = {}
    for key, name in names.items():
        if _is_unused(name) or name.startswith(("lm_head.", "fc_cls.")):
            left_out.append(key)
        elif name.endswith(TABLE):
            official[name] = _inflated_table(name, weights[key], config, is_ours)
        else:
            official[name] = weights[key]
    for part in ("weight", "bias"):
        if "fc_norm." + part in official:
            official["norm." + part] = official.pop("fc_norm." + part)
    for part in ("proj.weight", "proj.bias", "norm.weight", "norm.bias"):
        if stem + part not in official:
            raise CheckpointError(f"the image checkpoint has no {stem}{part}")
        official["patch_embed_2d." + part] = official["patch_embed." + part] = official[stem + part]
    frames = config.patch[0]
    official["patch_embed.proj.weight"] = kernel[:, :, None].repeat(1, 1, frames, 1, 1) / frames
    if dropped is not None:
        dropped += left_out
    return {_our_name(name): value for name, value in official.items()}


def resize_bias_tables(
    state_dict: StateDict, old_window: Sequence[int], new_window: Sequence[int]
) -> dict[str, Tensor]:
    """Every bias table from one window to another: trilinear in 3-D (SPEC 6.5), bicubic in 2-D (SPEC 5.4).

    Other tensors pass through. Raises CheckpointError for a table that does not belong to `old_window`.
    """
    old, new = [2 * size - 1 for size in old_window], [2 * size - 1 for size in new_window]
    if len(old) != len(new) or len(old) not in (2, 3):
        raise CheckpointError(f"windows {tuple(old_window)} and {tuple(new_window)} must both have two or three axes")
    rows = old[0] * old[1] * (old[2] if len(old) == 3 else 1)
    resized = dict(state_dict)
    for key, table in state_dict.items():
        if not key.endswith(TABLE):
            continue
        if len(table) != rows:
            raise CheckpointError(f"{key} has {len(table)} rows but the window {tuple(old_window)} needs {rows}")
        resized[key] = _resized(table, old, new)
    return resized


def initial_weights(
    state_dict: Checkpoint, config: VideoSwinConfig, dropped: list[str] | None = None
) -> dict[str, Tensor]:
    """Weights in our names for an encoder of this window, from a checkpoint of ours, an official one, or a 2-D one.

    Tables of another window are resized, with a warning, where only the window's time can differ.
    """
    weights = unwrap(state_dict)
    is_ours = any(key.startswith(("encoder.stage.", "model.encoder.stage.")) for key in weights)
    if is_ours:
        weights = {key.removeprefix("model."): value for key, value in weights.items()}
    kernel = next((value for key, value in weights.items() if key.endswith("patch_embed.proj.weight")), None)
    if (is_ours and "encoder.stem.projection.weight" not in weights) or (kernel is not None and kernel.ndim == 4):
        return inflate_image_checkpoint(weights, config, dropped)
    if not is_ours:
        weights = from_official(weights, dropped)
    rows = next((len(value) for key, value in weights.items() if key.endswith(TABLE)), 0)
    planes, rest = divmod(rows, (2 * config.window[1] - 1) * (2 * config.window[2] - 1))
    if planes % 2 and not rest and planes != 2 * config.window[0] - 1:
        window = ((planes + 1) // 2, *config.window[1:])
        warnings.warn(f"bias tables resized from the window {window} to {config.window}", stacklevel=2)
        weights = resize_bias_tables(weights, window, config.window)
    return weights


def initialise(module: nn.Module, state_dict: Checkpoint, config: VideoSwinConfig) -> Report:
    """Start a Bevt or a Classifier from any checkpoint `initial_weights` understands.

    The encoder must fit whole. Other parts are taken where the checkpoint has them; a head of another size is not, and
    is reported as dropped. Raises CheckpointError as `load` does.
    """
    dropped: list[str] = []
    weights = initial_weights(state_dict, config, dropped)
    own = module.state_dict()
    for key in [key for key in weights if key.startswith(("head.", "class_head."))]:
        if key in own and own[key].shape != weights[key].shape:
            dropped.append(key)
            del weights[key]
    around = AROUND_THE_ENCODER
    if "encoder.stem.projection.weight" not in own:
        around += ("encoder.stem.*",)
    return load(module, weights, allow_missing=AROUND_THE_ENCODER, allow_unexpected=around, dropped=dropped)


def _stripped(key: str) -> str:
    """An official key without its owners, each once and in the official order (SPEC 5.4)."""
    for prefix in ("module.", "backbone.", "cls_head.", "encoder."):
        key = key.removeprefix(prefix)
    return key


def _is_unused(name: str) -> bool:
    """Buffers that are recomputed, the frozen tokenizer, and the classifier of a 2-D Swin."""
    return name.endswith(("relative_position_index", "attn_mask")) or name.startswith(("vae_encoder.", "head."))


def _our_name(name: str) -> str:
    for ours, _, official in NAMES:
        if name.startswith(official):
            name = ours + name.removeprefix(official)
            if ours == "encoder.stage.":
                for inner, official_inner in WITHIN_A_STAGE:
                    name = name.replace(official_inner, inner)
            return name
    return name


def _official_name(key: str) -> str:
    name = key.removeprefix("module.").removeprefix("model.")
    if name.startswith(("stem.", "stage.", "norm.")):  # a VideoSwin on its own
        name = "encoder." + name
    for ours, owner, official in NAMES:
        if name.startswith(ours):
            name = owner + official + name.removeprefix(ours)
            if ours == "encoder.stage.":
                for inner, official_inner in WITHIN_A_STAGE:
                    name = name.replace(inner, official_inner)
            return name
    return key


def _inflated_table(name: str, table: Tensor, config: VideoSwinConfig, is_ours: bool) -> Tensor:
    """A 2-D table, repeated for every temporal offset. Of our own 3-D tables an image only ever used offset 0."""
    planes, height, width = (2 * size - 1 for size in config.window)
    side = round(len(table) ** 0.5)
    if is_ours and len(table) % (height * width) == 0:
        table = table.unflatten(0, (-1, height * width))
        table = table[len(table) // 2]
    elif is_ours:
        raise CheckpointError(
            f"{name} has {len(table)} rows, which no window of {config.window[1]} x {config.window[2]} has; set "
            "model.window as in the configuration that trained it"
        )
    elif side * side != len(table):
        raise CheckpointError(f"{name} has {len(table)} rows, which no square 2-D window has; use from_official")
    elif (side, side) != (height, width):
        table = _resized(table, [side, side], [height, width])
    return table.repeat(planes, 1)


def _resized(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """(prod(old), nH) -> (prod(new), nH), interpolated over the offsets; itself when nothing changes."""
    if list(old) == list(new):
        return table
    volume = table.to(torch.promote_types(table.dtype, torch.float32)).T.reshape(1, -1, *old)
    mode = "trilinear" if len(old) == 3 else "bicubic"
    return F.interpolate(volume, size=tuple(new), mode=mode, align_corners=False).flatten(2)[0].T.to(table.dtype)
