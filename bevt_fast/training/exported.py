"""Writing a classifier for other programs, and reading it back: the same bits under other names, the same logits out of
other programs.
"""

import contextlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bevt_fast.errors import CheckpointError, MachineError
from bevt_fast.models import official, torchvision_names, weights
from bevt_fast.models.classifier import Classifier
from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training.restored import Restored
from bevt_kernels import implementation

Clip = tuple[int, int, int]  # frames, height, width
TOLERANCE = 1e-5  # of float32 logits, in units of 1 + their size
SEED = 0  # of the clips that are compared
MOST_CLIPS = 4096  # that an exported program takes at a time


def write_directory(restored: Restored, out: Path) -> list[str]:
    """model.safetensors and config.json, which evaluate.py, export.py and hubconf.py open without further words."""
    out.mkdir(parents=True, exist_ok=True)
    described = restored.description.model_copy(update={"class_names": restored.class_names()})
    (out / "config.json").write_text(json.dumps(described.model_dump(mode="json", exclude_none=True), indent=1) + "\n")
    ours = restored.classifier.state_dict()
    save_file(ours, out / "model.safetensors", metadata={"format": "pt"})
    _require_same_bits(load_file(out / "model.safetensors"), ours, out)
    return [f"wrote {out}: {len(ours)} tensors, the same bits when read back, and config.json"]


def write_names(restored: Restored, out: Path, target: str) -> list[str]:
    """The weights under `target`'s names: plain tensors, which torch.load opens with weights_only=True."""
    classifier, shape = _plain(restored), restored.description.shape
    ours = classifier.state_dict()
    if target == "official":
        theirs = official.to_official(ours)
        _save(theirs, out, wrap=True)
        _require_same_bits(official.from_official(weights.read(out), ema=False), ours, out)
        return [f"wrote {out}: {len(theirs)} tensors, the same bits when read back"]
    theirs = torchvision_names.to_torchvision(ours, shape)
    _save(theirs, out, wrap=False)
    read = weights.read(out)
    _require_same_bits(torchvision_names.from_torchvision(read), ours, out)
    said = f"wrote {out}: {len(theirs)} tensors, the same bits when read back"
    return [said, compared_with_torchvision(classifier, read, shape)]


def _plain(restored: Restored) -> Classifier:
    """The classifier, if it is the encoder, a mean and one layer: what others have names for."""
    classifier = restored.classifier
    if isinstance(classifier, Classifier) and classifier.pool is None:
        return classifier
    what = "an attentive pooling" if isinstance(classifier, Classifier) else "a vote of the nearest clips"
    raise CheckpointError(
        f"{restored.path} ends in {what}, which only our own names know; export it to safetensors, torch_export or onnx"
    )


def compared_with_torchvision(classifier: Classifier, theirs: dict[str, Tensor], shape: VideoSwinConfig) -> str:
    """One sentence on the logits of torchvision's swin3d with these weights; CheckpointError where they differ."""
    try:
        from torchvision.models.video.swin_transformer import SwinTransformer3d
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch fails with the second
        return f"logits are not compared with torchvision's: it cannot be imported ({error})".splitlines()[0]
    classes = classifier.class_head.out_features
    model = SwinTransformer3d(
        list(shape.patch), shape.embed_dim, list(shape.depths), list(shape.heads), list(shape.window),
        mlp_ratio=shape.mlp_ratio, num_classes=classes,
    )  # fmt: skip
    try:
        model.load_state_dict(theirs)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"this torchvision's swin3d has other names or shapes than ours: {reason}") from None
    # two windows in time and one in space at the last stage: none is clipped, where bias indices would differ (SPEC X2)
    t, h, w = shape.window
    pixels = _clips(1, (2 * shape.patch[0] * t, 32 * h, 32 * w))
    with torch.no_grad(), implementation("reference"):
        far = _distance(model.eval()(pixels), classifier(pixels))
    if not far <= TOLERANCE:  # also where one of the two is not finite
        raise CheckpointError(
            f"torchvision's logits differ by {far:.1e}, more than {TOLERANCE:g}; its swin3d has another layout"
        )
    return f"torchvision's swin3d has the same logits: they differ by {far:.1e} at most"


def write_program(classifier: nn.Module, out: Path, clip: Clip) -> list[str]:
    """The classifier as a torch.export program for clips (N, 3, T, H, W), compared after it is read back."""
    with _traceable():
        torch.export.save(torch.export.export(classifier, (_clips(2, clip),), dynamic_shapes=_any_number()), out)
    program = torch.export.load(out).module()
    return [_agreed(classifier, program, out, clip)]


def write_onnx(classifier: nn.Module, out: Path, clip: Clip) -> list[str]:
    """The classifier as an ONNX graph for clips (N, 3, T, H, W), compared by ONNX Runtime or the reference of onnx."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(f"exporting to ONNX needs {' and '.join(missing)}; pip install onnx onnxscript onnxruntime")
    names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_shapes": _any_number()}
    with _traceable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        torch.onnx.export(classifier, (_clips(2, clip),), str(out), dynamo=True, verbose=False, **names)
    session = _open_onnx(out)

    def logits(pixels: Tensor) -> Tensor:
        return torch.from_numpy(session(None, {"pixels": pixels.numpy()})[0])

    return [_agreed(classifier, logits, out, clip)]


def _open_onnx(path: Path) -> Callable[..., Any]:
    if importlib.util.find_spec("onnxruntime") is not None:
        runtime = importlib.import_module("onnxruntime")
        return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run
    return importlib.import_module("onnx.reference").ReferenceEvaluator(str(path)).run


def _any_number() -> dict[str, Any]:
    """Of clips."""
    return {"pixels": {0: torch.export.Dim("clips", min=1, max=MOST_CLIPS)}}


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Plain PyTorch operators, which every exporter knows."""
    with torch.no_grad(), implementation("reference"):
        yield


def _logits(classifier: nn.Module, pixels: Tensor) -> Tensor:
    with _traceable():
        return classifier(pixels)


def _clips(count: int, clip: Clip) -> Tensor:
    return torch.randn(count, 3, *clip, generator=torch.Generator().manual_seed(SEED))


def _distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of 1 + the value's size."""
    return float(((found - expected).abs() / (1 + expected.abs())).max())


def _agreed(classifier: nn.Module, written: Callable[[Tensor], Tensor], out: Path, clip: Clip) -> str:
    """One sentence on the logits of what was written, for one clip and for three."""
    far = max(_distance(written(pixels), _logits(classifier, pixels)) for pixels in (_clips(1, clip), _clips(3, clip)))
    if not far <= TOLERANCE:
        raise CheckpointError(f"{out} does not compute what the classifier does: logits differ by {far:.1e}")
    return (
        f"wrote {out} for clips (N, 3, {', '.join(map(str, clip))}): its logits differ from ours by {far:.1e} at most"
    )


def _save(tensors: dict[str, Tensor], out: Path, wrap: bool) -> None:
    """A .safetensors file, or one that torch.load opens; official ones stand under `state_dict`."""
    tensors = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    if out.suffix == ".safetensors":
        save_file(tensors, out, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors} if wrap else tensors, out)


def _require_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor], out: Path) -> None:
    if found.keys() != expected.keys() or not all(torch.equal(found[key], expected[key]) for key in expected):
        raise CheckpointError(f"{out} does not read back as it was written; check the disk and export again")
