"""Two parts of the gate that are no program of their own: the machine, and every case against float64."""

import csv
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.gate_plan import ROOT

NEEDS = ("torch", "triton", "einops", "numpy", "pytest")
CONTEXT_LOST = 3  # exit code of `python -m bevt_kernels`


def show_machine(rehearsal: bool) -> int:
    """GPU, driver, versions, what is missing, and the two ceilings: a copy and a matrix product."""
    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], timeout=20)
    print(f"Python {platform.python_version()}, {platform.platform()}")
    for name in (*NEEDS, "pydantic", "jaxtyping", "matplotlib", "xformers", "flash_attn", "natten", "deepspeed"):
        print(f"{name}: {_version(name)}")
    import torch

    from bench.measure import Trial, machine, quantiles, race

    device = torch.device("cpu" if rehearsal else "cuda")
    print(machine(device).line())
    if rehearsal:
        print("no GPU: no ceiling is measured")
        return 0
    large = torch.randn(2**28, device=device)
    target = torch.empty_like(large)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    found = race({"copy": Trial(lambda _: target.copy_(large)), "product": Trial(lambda _: a @ b)}, device, 20)
    copy, product = (quantiles(found.samples[name]).median for name in ("copy", "product"))
    print(f"a copy moves {2 * large.nbytes / copy / 1e9:.2f} TB/s, read and written, ", end="")
    print(f"a bf16 product of 8192 runs at {2 * 8192**3 / product / 1e9:.0f} TFLOP/s")
    return 0


def check_exactness(out: Path, rehearsal: bool, budget: float) -> int:
    """Every case of every kernel in bf16, fp16, fp32, over several processes.

    One that loses its GPU context goes on in a new one, behind the case that lost it.
    """
    count = 1 if rehearsal else min(5, max(1, (os.cpu_count() or 2) // 2))
    deadline = time.perf_counter() + budget
    dtypes = ("--dtypes", "fp32", "--case", "2x3x4") if rehearsal else ("--dtypes", "bf16,fp16,fp32")
    tables = [out / f"exactness_{n}.csv" for n in range(count)]
    running: dict[int, subprocess.Popen[str]] = {}
    skips, problems, restarts = [0] * count, [], 0

    def start(n: int) -> None:
        command = [sys.executable, "-m", "bevt_kernels", "--check", *dtypes, "--csv", str(tables[n])]
        command += ["--slice", f"{n}/{count}", "--skip", str(skips[n])]
        command += ["--budget", f"{max(deadline - time.perf_counter(), 1):.0f}"]
        running[n] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    for n in range(count):
        start(n)
    while running:
        n = next(iter(running))
        process = running.pop(n)
        try:
            said, _ = process.communicate(timeout=max(deadline + 5 - time.perf_counter(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            problems.append(f"slice {n} of {count} was stopped in the middle of a case")
        checked = len(_groups(tables[n]))
        if process.returncode == CONTEXT_LOST and checked > skips[n] and restarts < 12:
            skips[n], restarts = checked, restarts + 1
            start(n)
        elif process.returncode not in (0, 1):
            problems.append(f"slice {n} of {count} ended with exit code {process.returncode}: {said[-600:]}")
        elif process.returncode == 1:
            problems.append(f"slice {n} of {count}: {last_line(said.splitlines())}")
    return _print_exactness(out, tables, problems)


def _print_exactness(out: Path, tables: Sequence[Path], problems: Sequence[str]) -> int:
    """The merged table: the worst tensor of every case, all tensors of one that fails."""
    groups = {key: rows for path in tables for key, rows in _groups(path).items()}
    rows = [row for key in sorted(groups) for row in groups[key]]
    if rows:
        with (out / "exactness.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    failed = 0
    print(f"{'kernel, case, dtype':<100} {'tensor':<16} {'error':>10} {'torch':>10} {'bound':>10}  ok")
    for key in sorted(groups):
        bad = [row for row in groups[key] if row["ok"] != "yes"]
        failed += bool(bad)
        for row in bad or [max(groups[key], key=_ratio)]:
            numbers = f"{row['error']:>10} {row['torchs_own']:>10} {row['bound']:>10}"
            print(f"{', '.join(key):<100} {row['tensor']:<16} {numbers}  {row['ok']} {row['note']}".rstrip())
    for problem in problems:
        print(problem)
    ended = f"; {len(problems)} slices ended early or failed" if problems else ""
    print(f"{len(groups) - failed} of {len(groups)} cases are exact{ended}")
    return 1 if failed or problems or not groups else 0


def _groups(path: Path) -> dict[tuple[str, str, str], list[dict[str, str]]]:
    """Verdicts by (kernel, case, dtype)."""
    groups: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                groups.setdefault((row["kernel"], row["case"], row["dtype"]), []).append(row)
    return groups


def _ratio(row: dict[str, str]) -> float:
    bound = float(row["bound"])
    return float(row["error"]) / bound if bound else 0.0


def _version(name: str) -> str:
    if not importlib.util.find_spec(name):
        return "absent"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "present"


def last_line(lines: Sequence[str]) -> str:
    """The last that says something."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:400]
