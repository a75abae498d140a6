"""Pictures of a run: its curves, and what the model puts into the cells it cannot see.

Drawn with matplotlib's Figure alone, without pyplot: no window and no global state, with or without a screen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor

IMAGE, CLIP = "#0072B2", "#D55E00"  # blue and vermilion of Okabe and Ito, told apart by colour-blind readers
RIGHT, WRONG = np.array([0x00, 0x9E, 0x73]) / 255, np.array([0xD5, 0x5E, 0x00]) / 255
HIDDEN = 0.5  # the grey of a hidden cell
FRAMES = 8  # of a clip that are drawn

Decode = Callable[[Tensor], Tensor]


def loss_curve(log: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Losses, share of hidden cells named right, and learning rate over the steps of a log (`metrics.read_log`)."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, accuracies, rates = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    for name, colour, kind, number in (("images", IMAGE, "image", "2d"), ("clips", CLIP, "video", "3d")):
        _line(losses, log, f"train/loss_{kind}", colour, name)
        _line(accuracies, log, f"train/mask_acc_{number}", colour, name, scale=100)
        steps, values = _series(log, f"val/mask_acc_{number}")
        if len(steps):
            label = f"{name}, never trained on: {100 * values[-1]:.1f} %"
            accuracies.plot(steps, 100 * values, "o", color=colour, markeredgecolor="black", label=label, zorder=3)
        _, commonest = _series(log, f"val/mask_acc_{number}_commonest")
        if len(commonest):
            label = f"{name}, always the commonest token: {100 * commonest[-1]:.1f} %"
            accuracies.axhline(100 * commonest[-1], color=colour, linestyle=":", linewidth=1.2, label=label)
    rates.plot(*_series(log, "train/lr"), color="black")
    losses.set(title="How well are the hidden cells predicted?", ylabel="loss (cross-entropy, nats)\nlower is better")
    accuracies.set(ylabel="hidden cells named right (%)\nhigher is better")
    accuracies.set_ylim(bottom=0)
    rates.set(ylabel="learning rate", xlabel="step")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (losses, accuracies, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(framealpha=0.9, edgecolor="none", fontsize=9)
    _save(figure, path)


def samples(
    path: str | Path,
    stream: Literal["images", "clips"],
    pixels: UInt8[Tensor, "..."] | None,
    token_pixels: Float[Tensor, "..."],
    mask: Bool[Tensor, "..."],
    targets: Int64[Tensor, "..."],
    predictions: Int64[Tensor, "..."],
    decode: Decode | None = None,
) -> None:
    """What is shown, what is hidden, what should be said and what is said, for every sample of a small batch.

    Shapes as in `data.batch`: pixels (B, 3, H, W) or (B, 3, T, H, W) uint8, None to draw `token_pixels` instead;
    mask (B, g, g) or (B, t, g, g); targets and predictions (B, g, g) or (B, T, g, g), predictions read where hidden.
    `decode` turns ids into pixels in [0.1, 0.9]; without it an id is a colour.
    """
    if stream == "images":
        mask, targets, predictions, token_pixels = (x.unsqueeze(1) for x in (mask, targets, predictions, token_pixels))
        pixels = pixels.unsqueeze(2) if pixels is not None else None
    else:
        mask = mask.repeat_interleave(targets.shape[1] // mask.shape[1], dim=1)
    shown = _unmap(token_pixels) if pixels is None else pixels.transpose(1, 2).float() / 255  # (B, T, 3, H, W)
    kept = np.linspace(0, shown.shape[1] - 1, min(FRAMES, shown.shape[1])).round().astype(int)
    rows = {
        "original": shown,
        "what the\nmodel sees": torch.where(_enlarge(mask, shown), torch.tensor(HIDDEN), shown),
        "target\ntokens": _draw(targets, decode),
        "predicted\ntokens": _draw(torch.where(mask, predictions, targets), decode),
        "right or\nwrong": _verdict(mask, predictions == targets),
    }
    rows = {name: _same_side(row[:, kept], shown.shape[-1]) for name, row in rows.items()}
    captions = [_caption(*sample) for sample in zip(mask, predictions == targets)]
    figure = _images(rows, captions) if stream == "images" else _clips(rows, captions, kept)
    figure.suptitle(f"{stream.capitalize()}: filling in the hidden cells", fontsize=14, fontweight="bold")
    figure.supxlabel(_legend(decode is not None), fontsize=9)
    _save(figure, path)


def _legend(decoded: bool) -> str:
    patch, colour = (
        "Tokens are drawn as the patches they stand for.",
        "Every token has a colour; like colours mean nothing.",
    )
    token = patch if decoded else colour
    return (
        "Grey cells are hidden from the model, which must name the token that the tokenizer gives them (the target). "
        f"{token}\nAmong the predicted tokens those of visible cells are the targets. "
        "Last: green = right token, orange = wrong token, white = was visible."
    )


def _images(rows: dict[str, np.ndarray], captions: list[str]) -> Figure:
    """A strip per sample, in it the kinds of picture side by side."""
    figure = Figure(figsize=(2.2 * len(rows), 2.45 * len(captions) + 1.6), layout="constrained")
    for sample, axes in enumerate(figure.subplots(len(captions), 1, squeeze=False)[:, 0]):
        names = [name.replace("\n", " ") for name in rows] if sample == 0 else []
        _strip(axes, [row[sample, 0] for row in rows.values()], names)
        axes.set_title(f"image {sample + 1}: {captions[sample]}", fontsize=10)
    return figure


def _clips(rows: dict[str, np.ndarray], captions: list[str], kept: np.ndarray) -> Figure:
    """A block per sample; in it a strip of frames per kind of picture."""
    height = (1.3 * len(rows) + 0.8) * len(captions) + 1.2
    figure = Figure(figsize=(1.3 * len(kept) + 1.2, height), layout="constrained")
    blocks = np.atleast_1d(np.asarray(figure.subfigures(len(captions), 1, hspace=0.02)))
    for sample, block in enumerate(blocks):
        block.suptitle(f"clip {sample + 1}: {captions[sample]}", fontsize=10)
        for line, axes in enumerate(block.subplots(len(rows), 1)):
            name = list(rows)[line]
            _strip(axes, list(rows[name][sample]), [f"frame {frame}" for frame in kept] if line == 0 else [])
            axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
    return figure


def _strip(axes: Any, pictures: list[np.ndarray], names: list[str]) -> None:
    """Pictures of one size side by side, with a name above each."""
    side = pictures[0].shape[1]
    gap = np.ones((pictures[0].shape[0], max(side // 16, 1), 3))
    parts = [part for picture in pictures for part in (picture, gap)][:-1]
    axes.imshow(np.concatenate(parts, axis=1), interpolation="nearest")
    step = side + gap.shape[1]
    axes.set_xticks([index * step + side / 2 for index in range(len(names))], names, fontsize=9)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _caption(hidden: Tensor, right: Tensor) -> str:
    count = int(hidden.sum())
    if not count:
        return "nothing hidden"
    named = int((right & hidden).sum())
    return f"{named} of {count} hidden cells right ({named / count:.0%})"


def _unmap(pixels: Tensor) -> Tensor:
    """[0.1, 0.9] (SPEC 3.2) to [0, 1]."""
    return ((pixels.float() - 0.1) / 0.8).clamp(0, 1)


def _draw(ids: Tensor, decode: Decode | None) -> Tensor:
    """ids (B, T, g, g) to pictures (B, T, 3, H, W) in [0, 1]."""
    if decode is not None:
        return _unmap(decode(ids))
    # a fixed random colour per id: neighbouring ids mean nothing, so they must not look alike
    palette = np.random.default_rng(0).uniform(0.15, 1.0, (int(ids.max()) + 1, 3))
    return torch.from_numpy(palette)[ids.cpu()].movedim(-1, 2)


def _verdict(mask: Tensor, right: Tensor) -> Tensor:
    """(B, T, g, g) to colours (B, T, 3, g, g)."""
    colours = torch.from_numpy(np.stack([np.ones(3) * 0.97, WRONG, RIGHT]))
    return colours[(mask.int() + (mask & right).int()).cpu()].movedim(-1, 2)


def _enlarge(mask: Tensor, pictures: Tensor) -> Tensor:
    """mask (B, T, g, g) to the pixels of pictures (B, T, 3, H, W): (B, T, 1, H, W)."""
    height, width = (pictures.shape[axis] // mask.shape[axis] for axis in (-2, -1))
    return mask.repeat_interleave(height, -2).repeat_interleave(width, -1).unsqueeze(2)


def _same_side(pictures: Tensor, side: int) -> np.ndarray:
    """(B, T, 3, h, w) enlarged by whole pixels to (B, T, H, W, 3), `side` wide."""
    times = side // pictures.shape[-1]
    pictures = pictures.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return pictures.detach().cpu().float().movedim(2, -1).numpy()


def _series(log: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one name, where it was logged."""
    points = [(row["step"], row[name]) for row in log if name in row]
    steps, values = zip(*points) if points else ((), ())
    return np.asarray(steps), np.asarray(values, dtype=float)


def _line(axes: Any, log: Sequence[dict[str, Any]], name: str, colour: str, label: str, scale: float = 1) -> None:
    steps, values = _series(log, name)
    if not len(steps):
        return
    values = scale * values
    width = len(values) // 30
    if width < 3:
        axes.plot(steps, values, color=colour, label=label, marker="." if width == 0 else None)
        return
    # a long run is noisy: the values pale, their running mean (shortened at the ends) strong
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    finite = np.isfinite(values)
    total, count = (np.convolve(x, np.ones(width), mode="same") for x in (np.where(finite, values, 0), finite))
    mean = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=f"{label} (running mean of {width})")


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
