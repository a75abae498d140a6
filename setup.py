"""Two packages: bevt_fast, and bevt_kernels, which is usable alone (torch + triton)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "bevt_fast/__init__.py").read_text())[1]

train = [
    "av>=18", "deepspeed>=0.19.8", "einops", "jaxtyping", "matplotlib", "numpy", "opencv-python-headless",
    "pillow", "psutil", "pydantic>=2.7", "safetensors", "tensorboard", "tqdm",
]  # fmt: skip
dali = ["nvidia-dali-cuda130>=2.4"]
parquet = ["pyarrow>=21"]
onnx = ["onnx", "onnxruntime", "onnxscript"]
gpu = [*dali, "xformers>=0.0.35"]
test = [
    *onnx, "attrs", "dall-e==0.1", "monai", "pytest", "pytest-timeout", "pytest-xdist", "timm",
    "torchvision>=0.26", "transformers",
]  # fmt: skip
dev = ["pre-commit", "pyright", "ruff"]

setup(
    name="bevt_fast",
    version=version,
    description="BEVT: masked visual token pretraining of Video Swin on images and videos, exact and fast",
    long_description=(here / "README.md").read_text() if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["bevt_fast", "bevt_fast.*"]), "bevt_kernels"],
    package_data={"bevt_fast": ["py.typed"], "bevt_kernels": ["py.typed"]},
    package_dir={"bevt_kernels": "kernels/bevt_kernels"},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "train": train,
        "dali": dali,
        "parquet": parquet,
        "onnx": onnx,
        "gpu": gpu,
        "test": test,
        "dev": dev,
        "all": [*train, *dali, *parquet, *test],
    },
)
