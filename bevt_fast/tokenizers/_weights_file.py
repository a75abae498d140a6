"""Writing a tokenizer's weights, and telling one file from another."""

import hashlib
import os
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from bevt_fast.errors import DataError


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors; the file is there whole or not at all. Raises DataError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write the tokenizer {path}: {error.strerror}; choose another place") from None


def digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
