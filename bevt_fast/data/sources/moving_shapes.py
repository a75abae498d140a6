"""Moving shapes: a dataset that draws itself, real VP9 clips and JPEG images in seconds, for a machine without data.

Two labels: `appearance`, the hue of the objects, seen in any frame; `motion`, told by no single frame, and by no
shuffled clip up to its direction. `bevt_fast.data.shapes` says why; it speaks of the drawn frames, before VP9 codes
them. Each of the 64 pairs of labels stands once in every 64 clips, so neither says anything about the other (of fewer
`motions` each of their pairs, in as many clips). The files are written on first use, and the same options give the same
bytes. Train and test never share a draw, whatever the two datasets they are taken from.

    root/dataset.json                    the options that made it
    root/annotations.csv                 one line a file: path, kind, split, motion, appearance, by name
    root/{clips,images}/{train,test}/    00000.webm ..., 00000.jpg ...
    root/lists/clips_train_motion.txt    lines of `path label`, per kind, split and label; classes_motion.txt the names
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.codec.context import Flags
from pydantic import model_validator
from tqdm import tqdm

from bevt_fast.config import Positive
from bevt_fast.data import shapes
from bevt_fast.data.shape_files import KINDS, SPLITS, Item, Recipe, draw, items, reversed_labels
from bevt_fast.data.sources import FrameCount, Frames, Source
from bevt_fast.errors import DataError

VERSION = 1  # of the drawing and the coding: another one makes other files from the same options
SHARE = 64  # files that are worth a process of their own
# constant quality without a target rate; one thread and no row threads, so that the bytes do not depend on the machine
VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "20", "row-mt": "0", "threads": "1"}
JPEG_QUALITY = 92


class Options(Recipe):
    """Which part of the dataset. `label` None is motion for clips and appearance for images, which have no motion.
    `limit`: only the first so many files of the split; all labels are as common as in the whole, up to a few.
    """

    root: str = "data/moving_shapes"
    split: Literal["train", "test"] = "train"
    kind: Literal["clips", "images"] = "clips"
    label: Literal["motion", "appearance"] | None = None
    limit: Positive | None = None
    frames: FrameCount = 8
    stride: Positive = 2

    @model_validator(mode="after")
    def _images_do_not_move(self) -> "Options":
        if self.kind == "images" and self.label == "motion":
            raise ValueError("images have no motion; take the label 'appearance', or the kind 'clips'")
        return self

    @model_validator(mode="after")
    def _limit_is_there(self) -> "Options":
        if self.limit is not None and self.limit > (there := self.count(self.kind, self.split)):
            raise ValueError(f"limit is {self.limit}, but there are {there} {self.kind} in the split {self.split!r}")
        return self

    def recipe(self) -> Recipe:
        """The options that make the files, without those that choose among them."""
        return Recipe(**{name: getattr(self, name) for name in Recipe.model_fields})


def build(options: Options) -> Source:
    """The source, its files written first if they are not there. Raises DataError if `root` holds something else."""
    root = ensure(options)
    label = options.label or ("motion" if options.kind == "clips" else "appearance")
    recipe = options.recipe()
    chosen = [item for item in items(recipe) if (item.kind, item.split) == (options.kind, options.split)]
    chosen = chosen[: options.limit]
    return Source(
        name=f"moving_shapes {options.kind} ({options.split})",
        root=root,
        paths=[item.path for item in chosen],
        labels=np.array([item.label(recipe, label) for item in chosen], dtype=np.int64),
        classes=recipe.classes(label),
        frames=Frames(options.frames, options.stride, "interval") if options.kind == "clips" else None,
        reversed_labels=reversed_labels(recipe, label) if options.kind == "clips" else None,
    )


def ensure(options: Options) -> Path:
    """The root of the dataset these options describe, written now unless it is there. Processes that meet here wait.

    Raises DataError if `root` holds another dataset or anything else, or cannot be written.
    """
    root, recipe = Path(options.root), options.recipe()
    try:
        if not _is_there(root, recipe):
            root.parent.mkdir(parents=True, exist_ok=True)
            with _locked(root.parent / f".{root.name}.lock"):
                # another process may have written it while this one waited
                if not _is_there(root, recipe):
                    write(root, recipe)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot write moving_shapes to {root}: {reason}; free some space or name another root"
        ) from None
    return root


def write(root: Path, recipe: Recipe, processes: int | None = None) -> None:
    """Writes the dataset beside `root` and renames it, so that `root` is whole or absent. The caller holds the lock.

    `processes` None takes one per core of this process; any number gives the same bytes.
    """
    aside = root.parent / f".{root.name}.partial"
    # what a killed process left
    shutil.rmtree(aside, ignore_errors=True)
    everything = items(recipe)
    for item in everything:
        (aside / item.path).parent.mkdir(parents=True, exist_ok=True)
    clips = sum(item.kind == "clips" for item in everything)
    print(f"writing moving_shapes: {clips} clips and {len(everything) - clips} images under {root}", file=sys.stderr)
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), -(-len(everything) // SHARE))
    done = _write_here(aside, recipe, 0, 1) if processes == 1 else _write_with(aside, recipe, processes)
    for _ in tqdm(done, total=len(everything), unit="file", leave=False, disable=not sys.stderr.isatty()):
        pass
    _write_lists(aside, recipe, everything)
    made_by = {"name": "moving_shapes", "version": VERSION, "recipe": recipe.model_dump()}
    (aside / "dataset.json").write_text(json.dumps(made_by, indent=2) + "\n")
    aside.rename(root)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Codes (T, H, W, 3) uint8 RGB frames as VP9 in WebM, with no date, no random identity and no rate control."""
    with av.open(str(path), "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options=VP9)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 0
        stream.codec_context.flags |= Flags.bitexact
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_image(path: Path, image: np.ndarray) -> None:
    """Codes an (H, W, 3) uint8 RGB image as JPEG."""
    _, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    path.write_bytes(coded.tobytes())


def _write_here(root: Path, recipe: Recipe, first: int, step: int) -> Iterator[str]:
    """Writes every `step`-th file from the `first` on; yields each path when it is written."""
    for item in items(recipe)[first::step]:
        scene = draw(recipe, item)
        if item.motion is None:
            write_image(root / item.path, shapes.render_frame(scene, 0, recipe.size))
        else:
            write_clip(root / item.path, shapes.render_clip(scene, item.motion, recipe.size, recipe.length))
        yield item.path


def _write_with(root: Path, recipe: Recipe, processes: int) -> Iterator[str]:
    """As `_write_here` for all files, by processes that share the work; they report on one pipe.

    Fresh interpreters on this module: a fork copies locks of other threads, and multiprocessing's spawn would import
    the user's whole training program again.
    """
    reading, writing = os.pipe()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OMP_NUM_THREADS": "1"}
    workers = []
    with open(reading) as reports, open(writing, "wb") as pipe, tempfile.TemporaryFile() as complaints:
        try:
            for first in range(processes):
                job = json.dumps({"root": str(root), "recipe": recipe.model_dump(), "first": first, "step": processes})
                command = [sys.executable, "-m", __name__, job]
                workers.append(subprocess.Popen(command, stdout=pipe, stderr=complaints, env=environment))
            # the workers hold the only other ends, so the reports end when all of them have
            pipe.close()
            for line in reports:
                yield line.rstrip()
            failed = sum(worker.wait() != 0 for worker in workers)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if failed:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines() or ["killed"]
            raise OSError(f"{failed} of {processes} writing processes failed: {said[-1]}")


def _write_lists(root: Path, recipe: Recipe, everything: list[Item]) -> None:
    """The annotations for people, and `path label` lists for any other program."""
    lines = ["path,kind,split,motion,appearance"]
    for item in everything:
        motion = "" if item.motion is None else shapes.MOTIONS[item.motion]
        lines.append(f"{item.path},{item.kind},{item.split},{motion},{shapes.HUES[item.appearance]}")
    (root / "annotations.csv").write_text("\n".join(lines) + "\n")
    lists = root / "lists"
    lists.mkdir()
    for label in ("motion", "appearance"):
        (lists / f"classes_{label}.txt").write_text("\n".join(recipe.classes(label)) + "\n")
        for kind in KINDS:
            for split in SPLITS:
                chosen = [item for item in everything if (item.kind, item.split) == (kind, split)]
                numbered = [(item.path, item.label(recipe, label)) for item in chosen]
                pairs = [f"{path} {number}\n" for path, number in numbered if number is not None]
                if pairs:
                    (lists / f"{kind}_{split}_{label}.txt").write_text("".join(pairs))


def _is_there(root: Path, recipe: Recipe) -> bool:
    """Whether the dataset stands at `root`. Raises DataError if something else does."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        made_by = json.loads((root / "dataset.json").read_text())
        kind, version, values = made_by["name"], made_by["version"], dict(made_by["recipe"])
    except (OSError, ValueError, KeyError, TypeError):
        kind, version, values = None, None, {}
    if kind != "moving_shapes":
        raise DataError(f"{root} holds something else than moving_shapes; name another root or remove what is there")
    wanted = recipe.model_dump() | {"version": VERSION}
    there = values | {"version": version}
    differences = [f"{key}={there.get(key)} (asked: {wanted[key]})" for key in wanted if there.get(key) != wanted[key]]
    if differences:
        raise DataError(f"{root} was made with {', '.join(differences)}; remove that directory or name another root")
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock file until the block ends; a killed process lets go of it by itself."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    for written in _write_here(Path(given["root"]), Recipe(**given["recipe"]), given["first"], given["step"]):
        print(written, flush=True)
