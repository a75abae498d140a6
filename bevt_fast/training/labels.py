"""Labels that belong to a classifier: what training and scoring both ask of a source before they use it.

Who asks says what to do about it; here is only what is wrong.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bevt_fast.config import Part, open_part
from bevt_fast.data.sources import Source


def told(part: Part, classes: int) -> Part:
    """The part of a list that does not say how many classes there are, told: a label beyond them is then refused with
    its line.
    """
    options: Any = open_part("bevt_fast.data.sources", part)[1]
    if getattr(options, "list", None) is not None and getattr(options, "classes", classes) is None:
        return part.model_copy(update={"options": part.options | {"classes": classes}})
    return part


def outside(source: Source, classes: int) -> np.ndarray:
    """The samples whose label is none of so many classes, (n,) int64; all where there are no labels."""
    if source.labels is None:
        return np.arange(len(source))
    return np.flatnonzero((source.labels < 0) | (source.labels >= classes))


def first_difference(ours: Sequence[str] | None, theirs: Sequence[str] | None) -> int | None:
    """The first class that two sources name differently: their numbers would mean other things. None where they agree,
    or one of them has no names.
    """
    if ours is None or theirs is None or len(ours) != len(theirs):
        return None
    return next((k for k, (one, other) in enumerate(zip(ours, theirs)) if one != other), None)
