"""A clip some of whose frames cannot be decoded, kept all the same: `data.on_damage` "use_previous" (NEEDS D02)."""

from collections.abc import Sequence

import numpy as np

from bevt_fast.data.decode import BadFile, read_frames
from bevt_fast.data.packed import File


def read_good_frames(path: File, indices: Sequence[int], extent: tuple[int, int] = (0, -1)) -> np.ndarray:
    """As `read_frames`, with each frame that cannot be decoded, or is of another size, a repeat of the one before it in
    `indices`; those before the first good one repeat that. Raises BadFile where none can be decoded.
    """
    good: dict[int, np.ndarray] = {}
    fault: BadFile | None = None
    for i in dict.fromkeys(indices):
        try:
            good[i] = read_frames(path, [i], extent)[0]  # each by itself, so that one fault costs no other frame
        except BadFile as error:
            if error.kind != "corrupt":
                raise
            fault = error
    if not good:
        raise fault or BadFile("corrupt", path, "no frame is asked for")
    shown = next(good[i] for i in indices if i in good)
    clip = []
    for i in indices:
        shown = good[i] if i in good and good[i].shape == shown.shape else shown
        clip.append(shown)
    return np.stack(clip)
