"""Which files a dataset of moving shapes has, and what is in each: pure functions of the options and of its place."""

from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from bevt_fast.config import Positive, Section
from bevt_fast.data import shapes

Motion = Literal["right", "left", "down", "up", "clockwise", "anticlockwise", "grow", "shrink"]
KINDS = ("clips", "images")
SPLITS = ("train", "test")


class Recipe(Section):
    """What makes the files: how many, how large, from which seed. Train and test never share a draw."""

    clips: Positive = 512
    images: Positive = 1024
    test_clips: Positive = 128
    test_images: Positive = 256
    size: Annotated[int, Field(ge=16, multiple_of=2, strict=True)] = 96  # pixels a side
    length: Annotated[int, Field(ge=2, strict=True)] = 16  # frames a clip
    objects: Positive = 3
    motions: Annotated[list[Motion], Field(min_length=1)] | None = None  # those there are, in the order of their labels
    seed: Annotated[int, Field(ge=0, strict=True)] = 0

    @model_validator(mode="after")
    def _motions_differ(self) -> "Recipe":
        if self.motions is not None and len(set(self.motions)) < len(self.motions):
            raise ValueError(f"motions must differ from one another, got {', '.join(self.motions)}")
        return self

    def count(self, kind: str, split: str) -> int:
        """How many files there are of a kind in a split."""
        return getattr(self, kind if split == "train" else f"test_{kind}")

    def classes(self, label: str) -> list[str]:
        """The names of the labels, in their order."""
        return list(self.motions or shapes.MOTIONS) if label == "motion" else list(shapes.HUES)


class Item(NamedTuple):
    """One file: its path below the root and its labels; images have a motion of None."""

    path: str
    kind: str
    split: str
    index: int
    motion: int | None  # of `shapes.MOTIONS`
    appearance: int

    def label(self, recipe: Recipe, label: str) -> int | None:
        """The number of its class among `recipe.classes(label)`; None for the motion of an image."""
        if label == "appearance" or self.motion is None:
            return self.appearance if label == "appearance" else None
        return recipe.classes(label).index(shapes.MOTIONS[self.motion])


def reversed_labels(recipe: Recipe, label: str) -> list[int] | None:
    """For each label that of the clip played backwards: a hue stays, a motion becomes its reverse. None if the reverse
    of a motion has no label.
    """
    names = recipe.classes(label)
    if label == "appearance":
        return list(range(len(names)))
    backwards = [shapes.MOTIONS[shapes.MOTIONS.index(name) ^ 1] for name in names]
    return [names.index(name) for name in backwards] if set(backwards) <= set(names) else None


def items(recipe: Recipe) -> list[Item]:
    """Every file of the dataset. In each block of 64 clips (of 8 times the motions there are) all pairs of labels stand
    once, of 8 images all hues.
    """
    listed, motions = [], [shapes.MOTIONS.index(name) for name in recipe.classes("motion")]
    for kind in KINDS:
        ending = "webm" if kind == "clips" else "jpg"
        pairs = len(motions) * len(shapes.HUES) if kind == "clips" else len(shapes.HUES)
        for split in SPLITS:
            order = np.empty(0, dtype=np.int64)
            for index in range(recipe.count(kind, split)):
                block, place = divmod(index, pairs)
                if place == 0:
                    order = _rng(recipe, "order", kind, split, block).permutation(pairs)
                motion, hue = divmod(int(order[place]), len(shapes.HUES))
                path = f"{kind}/{split}/{index:05d}.{ending}"
                listed.append(Item(path, kind, split, index, motions[motion] if kind == "clips" else None, hue))
    return listed


def draw(recipe: Recipe, item: Item) -> shapes.Scene:
    """The scene of a file. It depends on the hue, never on the motion."""
    return shapes.draw_scene(_rng(recipe, "scene", item.kind, item.split, item.index), item.appearance, recipe.objects)


def _rng(recipe: Recipe, purpose: str, kind: str, split: str, index: int) -> np.random.Generator:
    """A generator of its own for every purpose and file, so that files can be drawn in any order and place."""
    key = (recipe.seed, ("order", "scene").index(purpose), KINDS.index(kind), SPLITS.index(split), index)
    return np.random.default_rng(key)
