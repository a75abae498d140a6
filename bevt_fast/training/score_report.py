"""What an evaluation leaves behind: results.json, per_class.csv, confusion.png, bad.jsonl, and lines for the screen."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bevt_fast.data.views import Views
from bevt_fast.training import scoring
from bevt_fast.training.scoring import Scores

NAMED = 40  # classes up to which a confusion matrix has room for their names
COLUMNS = ("class", "name", "samples", "right", "top1", "top5", "taken_for", "taken_for_name", "taken_for_count")
TITLES = {"normal": "normal", "single_frame": "single frame", "shuffled": "random shuffling"}


def measures(scores: Scores) -> dict[str, Any]:
    """The numbers of one pass: shares of the videos that could be read."""
    return {
        "scored": len(scores.indices),
        "bad": len(scores.bad),
        "top1": scoring.top_k(scores, 1),
        "top5": scoring.top_k(scores, 5),
        "mean_class_accuracy": scoring.mean_class_accuracy(scores),
    }


def drops(found: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What top-1 loses without motion, and without the order of frames (SPEC 6.8)."""
    normal = found["normal"]["top1"]
    return {name: normal - values["top1"] for name, values in found.items() if name != "normal"}


def lines(found: Mapping[str, Mapping[str, Any]], views: Views) -> list[str]:
    """The result for people; of several orders of the frames also the paper's Table 2 for this model."""
    normal = found["normal"]
    said = [
        f"top-1 {normal['top1']:.2%}  top-5 {normal['top5']:.2%}  mean class accuracy "
        f"{normal['mean_class_accuracy']:.2%}  ({normal['scored']:,} videos, {views.clips} x {views.crops} views)"
    ]
    if normal["bad"]:
        said.append(f"videos that cannot be read, which were not scored: {normal['bad']:,}")
    if len(found) > 1:
        said.append(f"{'frames':<18}{'top-1':>9}{'drop':>9}")
        for name, values in found.items():
            drop = "" if name == "normal" else f"{100 * (normal['top1'] - values['top1']):9.2f}"
            said.append(f"{TITLES[name]:<18}{100 * values['top1']:9.2f}{drop}")
    return said


def write(out: Path, results: Mapping[str, Any], scores: Scores, names: Sequence[str] | None) -> list[str]:
    """Writes everything; returns what could not be made. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in scores.bad))
    with (out / "per_class.csv").open("w", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in scoring.per_class(scores):
            other = row["taken_for"]
            named = {"name": _name(names, row["class"]), "taken_for_name": _name(names, other)}
            writer.writerow(row | named)
    return picture(out / "confusion.png", scoring.confusion(scores), names)


def picture(path: Path, table: Tensor, names: Sequence[str] | None) -> list[str]:
    """The confusion matrix (classes, classes) as shares of each row; says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [f"{path.name} is not drawn: matplotlib is not installed; pip install matplotlib"]
    counts = table.double()
    shares = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = min(14.0, 5 + 0.18 * len(table))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, interpolation="nearest")
    axes.set(title="What is each class taken for?", xlabel="class named by the model", ylabel="true class")
    if len(table) <= NAMED:
        labels = [_name(names, k) or str(k) for k in range(len(table))]
        axes.set_xticks(range(len(table)), labels, rotation=90)
        axes.set_yticks(range(len(table)), labels)
    figure.colorbar(shown, ax=axes, label="share of the true class's videos (%)", shrink=0.8)
    figure.savefig(path, dpi=120)
    return []


def _name(names: Sequence[str] | None, k: int | None) -> str:
    return "" if k is None or names is None else names[k]
