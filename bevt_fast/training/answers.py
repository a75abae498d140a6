"""A model's answers for other programs: class probabilities as JSON or csv, features as npz or parquet."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bevt_fast.data.sources import Source
from bevt_fast.errors import MachineError
from bevt_fast.models.video_swin import VideoSwin
from bevt_fast.training.scoring import Scores


def write_predictions(
    out: str | None, scores: Scores, source: Source, names: Sequence[str] | None, top: int
) -> list[str]:
    """The `top` most probable classes of each video, into a .json or .csv file, or as the lines that are returned."""
    rows = []
    probabilities, classes = scores.probabilities.sort(dim=1, descending=True, stable=True)
    for index, values, order in zip(scores.indices.tolist(), probabilities.tolist(), classes.tolist()):
        best = [_named(k, names) | {"probability": p} for k, p in list(zip(order, values))[:top]]
        rows.append({"path": str(source.path(index)), "classes": best})
    if out is None:
        return [f"{row['path']}\n" + "\n".join(_line(answer) for answer in row["classes"]) for row in rows]
    try:
        if Path(out).suffix == ".json":
            Path(out).write_text(json.dumps({"videos": rows, "bad": scores.bad}, indent=1) + "\n")
        else:
            _write_csv(Path(out), rows)
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror or error}; name another --out") from None
    return [f"wrote {out}: {len(rows)} videos"]


def features(encoder: VideoSwin, pixels: Tensor, stage: str) -> Tensor:
    """Clips (B, 3, T, H, W) to (B, D) float32: what the class head sees ("pooled"), a stage averaged over its grid, or
    all of these side by side, stage 1 first.
    """
    found = encoder.stages(pixels)
    parts = [*found, encoder.norm(found[-1])]
    if stage != "all":
        parts = parts[-1:] if stage == "pooled" else [found[int(stage) - 1]]
    return torch.cat([part.mean(dim=(1, 2, 3)).float() for part in parts], dim=1)


def write_features(out: Path, found: Scores, source: Source) -> None:
    """Rows of path, label (-1: none) and features. Raises MachineError where the disk or a library is missing."""
    paths = [str(source.path(index)) for index in found.indices.tolist()]
    rows, labels = found.probabilities.numpy(), found.labels.numpy()
    try:
        if out.suffix == ".npz":
            with out.open("wb") as file:
                np.savez(file, paths=np.array(paths), labels=labels, features=rows)
            return
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError:
            raise MachineError("pyarrow is not installed; pip install pyarrow, or write .npz") from None
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        parquet.write_table(pa.table({"path": paths, "label": labels, "features": vectors}), str(out))
    except OSError as error:
        raise MachineError(f"cannot write {out}: {error.strerror or error}; name another --out") from None


def _named(k: int, names: Sequence[str] | None) -> dict[str, Any]:
    return {"class": k} | ({"name": names[k]} if names is not None else {})


def _line(answer: dict[str, Any]) -> str:
    return f"  {answer['probability']:7.2%}  {answer['class']:4}  {answer.get('name', '')}".rstrip()


def _write_csv(out: Path, rows: list[dict[str, Any]]) -> None:
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "rank", "class", "name", "probability"])
        for row in rows:
            for rank, answer in enumerate(row["classes"], start=1):
                name = answer.get("name", "")
                writer.writerow([row["path"], rank, answer["class"], name, f"{answer['probability']:.6f}"])
