"""What the gate runs on a GPU machine, in which order, for how long, and what of it is kept."""

import argparse
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
READS = ("av", "cv2", "nvidia.dali", "pydantic")  # what the loader cannot be measured without
TAIL = 60  # lines of a part's output in the report
FEW = ("--case", "2x3x4", "--most", "1")  # of a rehearsal


@dataclass(frozen=True)
class Part:
    """A command of the gate."""

    name: str
    title: str
    command: tuple[str, ...]
    limit: float  # seconds at most
    correctness: bool = False
    fills: bool = False  # takes whatever time the others leave
    tail: int = TAIL
    budget: str = ""  # the option that tells the command how long it may take
    keeps: tuple[str, ...] = ()  # files of its folder that belong to the results
    warm: tuple[str, ...] = ()  # a command that prepares it and may run beside the parts of correctness
    missing: str = ""  # why it cannot run at all


class Where(NamedTuple):
    """The folder of results, and one for the parts to write in."""

    out: Path
    work: Path


def _script(name: str) -> tuple[str, ...]:
    """The command of one of our benchmarks."""
    return (sys.executable, str(ROOT / "bench" / name))


def _absent(name: str) -> str:
    """Why one of our benchmarks cannot run; empty where it can be tried."""
    return "" if (ROOT / "bench" / name).exists() else f"bench/{name} does not exist"


def _correctness(where: Where, small: bool) -> list[Part]:
    """The machine, and what decides whether the gate passes."""
    to = ("--out", str(where.work))
    own = (*_script("gpu_gate.py"), *to, *(("--rehearse",) if small else ()))
    tests = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    spread = ("-n", "4") if importlib.util.find_spec("xdist") and not small else ()
    pytest = (sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "-rfEs", "-p", "no:cacheprovider", *spread)
    no_pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    curve = (*_script("curve.py"), *to, *(("--model", "tiny", "--steps", "1") if small else ()))
    return [
        Part("machine", "The machine", (*own, "--part", "machine"), 30),
        Part(
            "tests", "Tests that need a GPU", (*pytest, *tests), 100, True,
            missing=no_pytest or ("" if tests else "no test is marked gpu"),
        ),
        Part(
            "exactness", "Every case against float64", (*own, "--part", "exactness"), 120, True, tail=400,
            budget="--budget", keeps=("exactness.csv",),
        ),
        Part(
            "curve", "A small model's loss curve of 500 steps, reference and fused in bf16", curve, 70, True,
            budget="--budget", keeps=("curve.csv",),
        ),
    ]  # fmt: skip


def _benchmarks(where: Where, small: bool) -> list[Part]:
    """Figures, in the order of what matters: who comes late may run out of time."""
    to = ("--out", str(where.work))
    kernels, device = (*_script("kernels.py"), *to), "cpu" if small else "cuda"
    absent = [name for name in READS if not _is_installed(name)]
    no_loader = f"not installed: {', '.join(absent)}" if absent else ""
    quick = ("--quick",) if small else ()
    return [
        # compiling the official step takes longer than the whole part
        Part(
            "step", "The training step, Swin-B, bf16, without torch.compile",
            (*_script("throughput.py"), *to, "--device", device, "--no-compile", "--budget", "25", *quick,
             *(("--detail", "none") if small else ())), 99,
            keeps=("throughput.csv", "throughput.md", "throughput.png"), missing=_absent("throughput.py"),
        ),
        Part(
            "kernels", "The kernel benchmark", (*kernels, *(("--case", "2x3x4", "--reps", "3") if small else ())), 300,
            fills=True, budget="--budget", keeps=("kernels.csv", "kernels.md", "kernels.png"), tail=100,
            warm=() if small else (*kernels, "--warm", "--compilers", "4", "--budget", "240"),
        ),
        Part(
            "tokenizer", "The tokenizer, frames a second and agreement",
            (*_script("tokenizer.py"), *to, "--device", device, *quick), 40,
            keeps=("tokenizer.csv", "tokenizer.md", "tokenizer.png"), missing=_absent("tokenizer.py"),
        ),
        Part(
            "loader", "Clips and images a second", (*_script("loader.py"), *to, "--rounds", "3", *quick), 45,
            keeps=("loader.csv", "loader.md", "loader.png"), missing=no_loader,
        ),
        Part(
            "questions", "What the predictions rest on",
            (*_script("open_questions.py"), *to, "--device", device, *quick), 30, budget="--budget",
            keeps=("open_questions.csv",), missing=_absent("open_questions.py"),
        ),
        Part(
            "launches", "Kernel by kernel", (*_script("launches.py"), *(FEW if small else ())), 30, budget="--budget",
            tail=400,
        ),
    ]  # fmt: skip


def parts(options: argparse.Namespace, where: Where) -> list[Part]:
    """Correctness, then benchmarks, then tuning."""
    small = options.rehearse
    found = [*_correctness(where, small), *_benchmarks(where, small)]
    if options.tune:
        tuning = (*_script("launches.py"), "--tune", *(FEW if small else ()))
        found.append(Part("tune", "Other launch settings", tuning, 240, fills=True, budget="--budget", tail=400))
    wanted = options.parts.split(",") if options.parts else [part.name for part in found]
    unknown = set(wanted) - {part.name for part in found}
    if unknown:
        raise SystemExit(f"gpu_gate.py: no part is called {', '.join(sorted(unknown))}")
    return [part for part in found if part.name in wanted]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
