"""GPUs by name: what their data sheets promise, so that a run can be predicted on one that is not here.

Figures are those of NVIDIA's data sheets and architecture papers, dense (not the sparse ones, which are twice as high),
with float32 accumulation, at the boost clock. Memory is the data sheet's, read in GiB; torch sees 1 to 3 % less.
"""

import re
from typing import NamedTuple

from bevt_fast.errors import ConfigError

# what a large bf16 product sustains of the data sheet's peak: 790 of 989.4 TFLOP/s on an H100 and an H200, where power
# and not the tensor cores is the limit; assumed for every other GPU
SUSTAINED = 790 / 989.4
# results of ex2, rcp and the like a clock and multiprocessor: CUDA C++ Programming Guide, arithmetic instructions,
# compute capabilities 7.0 to 12.0
SPECIAL = 16
OLDEST = (8, 0)  # compute capability of the oldest GPU with bf16 and with the fused kernels
DEFAULT = "H100"


class Gpu(NamedTuple):
    """One GPU. Rates are per second, memory is in bytes."""

    name: str
    device: str  # a regular expression for torch's name of it, without the maker
    tensor: float  # TFLOP/s of the tensor cores in bf16 and fp16
    float32: float  # TFLOP/s of the ordinary cores
    bandwidth: float  # TB/s
    gibibytes: float
    processors: int  # streaming multiprocessors
    gigahertz: float  # the clock at which the data sheet's peaks hold
    capability: tuple[int, int]

    @property
    def memory(self) -> float:
        return self.gibibytes * 2**30

    @property
    def special(self) -> float:
        """Special-function results a second."""
        return SPECIAL * self.processors * self.gigahertz * 1e9

    def peak(self, precision: str) -> float:
        """Dense FLOP/s of matrix products; torch keeps float32 off the tensor cores unless told otherwise."""
        return 1e12 * (self.float32 if precision == "fp32" else self.tensor)

    def sustained(self, precision: str) -> float:
        """FLOP/s that a large product may reach; float32 cores are not held back by power."""
        return self.peak(precision) * (1 if precision == "fp32" else SUSTAINED)

    @property
    def has_kernels(self) -> bool:
        """Whether the fused kernels run on it; what is older has no bf16 either."""
        return self.capability >= OLDEST


# A variant with its own clock or memory is a GPU of its own. The clock is the boost clock, or where the data sheet's
# peaks are of another one, theirs: peak / (multiprocessors x FLOP a clock).
KNOWN = (
    # HGX B200 data sheet, 2024
    Gpu("B200", "B200", 2250, 80, 8.0, 180, 148, 1.856, (10, 0)),
    # H100 and H200 data sheets, H100 architecture paper, 2022 to 2024
    Gpu("H200", "H200", 989.4, 66.9, 4.8, 141, 132, 1.83, (9, 0)),
    Gpu("H200-NVL", "H200 NVL", 835.5, 60.3, 4.8, 141, 132, 1.545, (9, 0)),
    Gpu("H100", "H100 80GB HBM3", 989.4, 66.9, 3.35, 80, 132, 1.83, (9, 0)),
    Gpu("H100-NVL", "H100 NVL", 835.5, 60.3, 3.9, 94, 132, 1.545, (9, 0)),
    Gpu("H100-PCIe", "H100 PCIe", 756, 51.2, 2.0, 80, 114, 1.62, (9, 0)),
    # A100 data sheet, 2021
    Gpu("A100", "A100-SXM4-80GB", 312, 19.5, 2.039, 80, 108, 1.41, (8, 0)),
    Gpu("A100-40GB", "A100-(SXM4|PCIE)-40GB", 312, 19.5, 1.555, 40, 108, 1.41, (8, 0)),
    Gpu("A100-PCIe", "A100 80GB PCIe", 312, 19.5, 1.935, 80, 108, 1.41, (8, 0)),
    # V100 data sheet, 2020: fp16 alone
    Gpu("V100", "V100-SXM2-32GB", 125, 15.7, 0.9, 32, 80, 1.53, (7, 0)),
    Gpu("V100-16GB", "V100-SXM2-16GB", 125, 15.7, 0.9, 16, 80, 1.53, (7, 0)),
    Gpu("V100-PCIe", "V100-PCIE-16GB", 112, 14.0, 0.9, 16, 80, 1.38, (7, 0)),
    # data sheets of A10, A40, L4, L40S and RTX A6000, 2021 to 2023
    Gpu("A10", "A10", 125, 31.2, 0.6, 24, 72, 1.695, (8, 6)),
    Gpu("A40", "A40", 149.7, 37.4, 0.696, 48, 84, 1.74, (8, 6)),
    Gpu("RTX-A6000", "RTX A6000", 154.8, 38.7, 0.768, 48, 84, 1.8, (8, 6)),
    Gpu("L4", "L4", 121, 30.3, 0.3, 24, 58, 2.04, (8, 9)),
    Gpu("L40S", "L40S", 362.05, 91.6, 0.864, 48, 142, 2.52, (8, 9)),
    # architecture papers of GA102, AD102 and GB202, 2020 to 2025: tensor cores of GeForce add in float32 at half rate
    Gpu("RTX-3090", "GeForce RTX 3090", 71, 35.6, 0.936, 24, 82, 1.695, (8, 6)),
    Gpu("RTX-4090", "GeForce RTX 4090", 165.2, 82.6, 1.008, 24, 128, 2.52, (8, 9)),
    Gpu("RTX-5090", "GeForce RTX 5090", 209.5, 104.8, 1.792, 32, 170, 2.407, (12, 0)),
)


def named(name: str) -> Gpu:
    """A GPU as a user writes it, or as torch does. Raises ConfigError with the known ones."""
    for gpu in KNOWN:
        if _plain(gpu.name) == _plain(name):
            return gpu
    if gpu := of_device(name):
        return gpu
    raise ConfigError(f"--gpu: no figures are known for {name!r}; known are: {', '.join(gpu.name for gpu in KNOWN)}")


def of_device(device: str) -> Gpu | None:
    """A GPU by torch's name of the device; None for one that is not known, and for a slice of one."""
    found = re.sub(r"^(NVIDIA|Tesla) ", "", device)
    return next((gpu for gpu in KNOWN if re.fullmatch(gpu.device, found)), None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
