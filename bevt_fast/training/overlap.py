"""The tokenizer beside the encoder: on a GPU both run at once, each on a stream of its own.

The encoder needs no target until it has features to score, and the tokenizer needs nothing of the encoder. What one
leaves of the GPU, where it waits for memory, the other can use.
"""

from collections.abc import Callable
from typing import Any

import torch

from bevt_fast.data.batch import JointBatch, Targets


def beside(
    side: "torch.cuda.Stream | None", name: Callable[[Any, JointBatch], Targets], tokenizer: Any, batch: JointBatch
) -> Targets:
    """name(tokenizer, batch), run on the stream `side`; None: at once, on the current one.

    The ids of what `side` runs may be read once their event `ready` has been waited for.
    """
    if side is None:
        return name(tokenizer, batch)
    here = torch.cuda.current_stream(side.device)
    side.wait_stream(here)  # for the pixels
    with torch.cuda.stream(side):
        targets = name(tokenizer, batch)
        ready = side.record_event()
    # memory is given away again when the stream it was taken on has no more use for it: the other is told
    for stream in (part for part in batch if part is not None):
        for tensor in (stream.token_pixels, stream.known):
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(side)
    for ids in (targets.images, targets.clips):
        if ids is not None:
            ids.record_stream(here)
    return targets._replace(ready=ready)
