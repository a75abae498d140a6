"""torch.hub entry points: models built from the files here, with the weights of a checkpoint of yours; no downloads.

torch.hub.load("PATH/OF/THIS/CLONE", "bevt_classifier", source="local", checkpoint="exported")
"""

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "kernels"))  # torch.hub puts the clone itself on the path

dependencies = ["torch", "jaxtyping", "pydantic", "safetensors"]


def bevt_classifier(checkpoint: str | None = None, **model: Any):
    """A classifier of clips (B, 3, T, H, W) to logits (B, classes), in `eval`.

    `checkpoint` is a run, a directory of export.py, or a file; without one the weights are random. A file needs `size`
    and `window`; `classes` defaults to 400. `bevt_fast.data.pipeline_reference.normalise` makes pixels of bytes.
    """
    if checkpoint is None:
        from bevt_fast.models.classifier import Classifier
        from bevt_fast.models.video_swin import VideoSwinConfig

        classes = model.pop("classes", 400)
        return Classifier(VideoSwinConfig.preset(model.pop("size", "base"), **model), classes).eval()
    from bevt_fast.training.described import Given
    from bevt_fast.training.restored import restore

    return restore(Given(checkpoint, **model)).classifier


def bevt_encoder(checkpoint: str | None = None, **model: Any):
    """The encoder alone: clips (B, 3, T, H, W) to (B, t, h, w, C), from a pretrained or a fine-tuned checkpoint."""
    if checkpoint is None:
        return bevt_classifier(None, **model).encoder
    from bevt_fast.training.described import Given
    from bevt_fast.training.restored import restore

    return restore(Given(checkpoint, **model), needs_classes=False).classifier.encoder
