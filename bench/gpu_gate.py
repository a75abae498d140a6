"""On a machine with an NVIDIA GPU, in one command and under nine minutes: is everything right, and how quick is it?

    python bench/gpu_gate.py --out DIR [--budget 520] [--tune] [--parts machine,tests,...] [--rehearse]

Needs torch, triton, einops, numpy, pytest and this repository; what else is missing is named and left out. Every part
is a process of its own with a limit of its own, so one that fails or hangs hides none of the others. DIR/gate.md is
written again after every part. --rehearse runs the same parts on a CPU, with small cases and the interpreter.
"""

import argparse
import csv
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

LEFT_OUT, CONTEXT_LOST = 77, 3  # exit codes of a part, of `python -m bevt_kernels`
MOST_FILES = 8
NEEDS = ("torch", "triton", "einops", "numpy", "pytest")
READS = ("av", "cv2", "nvidia.dali", "pydantic")  # what the loader cannot be measured without
TAIL = 60  # lines of a part's output in the report


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


@dataclass
class Outcome:
    """How a part ended."""

    part: Part
    status: str  # passed, FAILED, OUT OF TIME, left out
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.status in ("passed", "left out")


class Where(NamedTuple):
    """The folder of results, and one for the parts to write in."""

    out: Path
    work: Path


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def parts(options: argparse.Namespace, where: Where) -> list[Part]:
    """Correctness, then benchmarks, then tuning."""
    python, here = sys.executable, str(Path(__file__).resolve())
    bench, small = ROOT / "bench", options.rehearse
    own = (python, here, "--out", str(where.work), *(("--rehearse",) if small else ()))
    tests = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text())
    spread = ("-n", "4") if importlib.util.find_spec("xdist") and not small else ()
    pytest = (python, "-m", "pytest", "-m", "gpu", "--tb=short", "-rfEs", "-p", "no:cacheprovider", *spread)
    no_pytest = "" if importlib.util.find_spec("pytest") else "pytest is not installed"
    no_step = "" if (bench / "throughput.py").exists() else "bench/throughput.py does not exist"
    kernels = (python, str(bench / "kernels.py"), "--out", str(where.work))
    launches = (python, str(bench / "launches.py"))
    loader = (python, str(bench / "loader.py"), "--out", str(where.work), "--rounds", "3")
    absent = [name for name in READS if not _is_installed(name)]
    no_loader = f"not installed: {', '.join(absent)}" if absent else ""
    few = ("--case", "2x3x4", "--most", "1") if small else ()
    found = [
        Part("machine", "The machine", (*own, "--part", "machine"), 40),
        Part(
            "tests", "Tests that need a GPU", (*pytest, *tests), 100, True,
            missing=no_pytest or ("" if tests else "no test is marked gpu"),
        ),
        Part(
            "exactness", "Every case against float64", (*own, "--part", "exactness"), 120, True, tail=400,
            budget="--budget", keeps=("exactness.csv",),
        ),
        Part(
            "curve", "The whole model's loss curve, reference and fused",
            (python, str(bench / "curve.py"), *(("--small", "--steps", "1") if small else ())), 70, True,
        ),
        Part(
            "kernels", "The kernel benchmark", (*kernels, *(("--case", "2x3x4", "--reps", "3") if small else ())), 300,
            fills=True, budget="--budget", keeps=("kernels.csv", "kernels.md", "kernels.png"), tail=100,
            warm=() if small else (*kernels, "--warm", "--compilers", "4", "--budget", "240"),
        ),
        Part(
            "launches", "Kernel by kernel", (*launches, *few), 45, budget="--budget", tail=400,
        ),
        Part(
            "step", "The training step", (python, str(bench / "throughput.py"), "--out", str(where.work)), 60,
            keeps=("throughput.csv", "throughput.md"), missing=no_step,
        ),
        Part(
            "loader", "Clips and images a second", (*loader, *(("--quick",) if small else ())), 70,
            keeps=("loader.csv",), missing=no_loader,
        ),
    ]  # fmt: skip
    if options.tune:
        tuning = (*launches, "--tune", *few)
        found.append(Part("tune", "Other launch settings", tuning, 240, fills=True, budget="--budget", tail=400))
    wanted = options.parts.split(",") if options.parts else [part.name for part in found]
    unknown = set(wanted) - {part.name for part in found}
    if unknown:
        raise SystemExit(f"gpu_gate.py: no part is called {', '.join(sorted(unknown))}")
    return [part for part in found if part.name in wanted]


def run_parts(
    plan: Sequence[Part], where: Where, budget: float, env: dict[str, str], written: Callable[[list[Outcome]], object],
) -> list[Outcome]:  # fmt: skip
    """Run the parts one after another; `written` is called after each.

    While the parts of correctness run, whose time is no figure, another process may fill the compilers' caches.
    """
    started, done, helper = time.perf_counter(), [], None
    for number, part in enumerate(plan):
        left = budget - (time.perf_counter() - started)
        later = [p for p in plan[number + 1 :] if not p.missing]
        # who fills the time leaves the others theirs, and those who fill share alike
        reserve = sum(p.limit for p in later if not p.fills)
        sharers = 1 + sum(p.fills for p in later)
        limit = max((left - reserve) / sharers, left / 3) if part.fills else part.limit
        if part.correctness and helper is None and any(p.warm for p in later):
            command = next(p.warm for p in later if p.warm)
            nowhere = subprocess.DEVNULL
            helper = subprocess.Popen(
                command, stdout=nowhere, stderr=nowhere, cwd=ROOT, env=env, start_new_session=True
            )
        if helper is not None and not part.correctness:
            _end(helper)  # nothing may run beside a stopwatch
            helper = None
        done.append(run_part(part, where, min(limit, left), env))
        written(done)
    if helper is not None:
        _end(helper)
    return done


def run_part(part: Part, where: Where, limit: float, env: dict[str, str]) -> Outcome:
    """One part, killed with everything it started when its time is over."""
    if part.missing:
        return Outcome(part, "left out", 0.0, [part.missing])
    if limit < 5:
        return Outcome(part, "OUT OF TIME", 0.0, ["its turn came after the time budget"])
    # a command that knows its budget ends by itself, somewhat earlier
    command = [
        *part.command,
        *((part.budget, f"{limit - min(max(0.15 * limit, 12), 40, 0.4 * limit):.0f}") if part.budget else ()),
    ]
    log, started = where.work / f"{part.name}.log", time.perf_counter()
    print(f"[{part.name}] at most {limit:.0f} s", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = log.read_text(errors="replace").splitlines()
    status = {None: "OUT OF TIME", 0: "passed", LEFT_OUT: "left out"}.get(code, f"FAILED (exit code {code})")
    if part.name == "tests" and code == 5:  # pytest: nothing was collected
        status = "left out"
    for name in part.keeps:
        others = {path.name for path in where.out.iterdir()} - {name, "gate.md"}
        if (where.work / name).exists() and len(others) < MOST_FILES - 1:
            shutil.copy(where.work / name, where.out / name)
    outcome = Outcome(part, status, time.perf_counter() - started, lines)
    print(f"[{part.name}] {status} after {outcome.seconds:.0f} s: {_last(lines)}", flush=True)
    return outcome


def write_report(path: Path, outcomes: Sequence[Outcome], rehearsal: bool, title: str) -> str:
    """gate.md: every part's own last lines, then the summary. Returns the summary."""
    text = [f"# GPU gate{', a rehearsal on a CPU' if rehearsal else ''}", "", title, ""]
    for outcome in outcomes:
        lines = outcome.lines[-outcome.part.tail :]
        cut = [f"({len(outcome.lines) - len(lines)} earlier lines left out)"] if len(lines) < len(outcome.lines) else []
        text += [f"## {outcome.part.title}: {outcome.status}", "", "```", *cut, *lines, "```", ""]
    summary = ["## Summary", "", "| part | | s | last line |", "|---|---|---|---|"]
    for outcome in outcomes:
        kind = "correctness" if outcome.part.correctness else "figures"
        said = _last(outcome.lines).replace("|", "/")
        summary.append(f"| {outcome.part.name} ({kind}) | {outcome.status} | {outcome.seconds:.0f} | {said} |")
    checks = [outcome for outcome in outcomes if outcome.part.correctness]
    bad = [outcome.part.name for outcome in checks if not outcome.good]
    absent = [outcome.part.name for outcome in outcomes if outcome.status == "left out"]
    verdict = f"FAILED: {', '.join(bad)}" if bad else f"all {len(checks)} correctness parts passed or were left out"
    summary += ["", f"{verdict}{'; left out: ' + ', '.join(absent) if absent else ''}.", ""]
    path.write_text("\n".join([*text, *summary]))
    return "\n".join(summary)


# What the parts "machine" and "exactness" do, in a process of their own.


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
            problems.append(f"slice {n} of {count}: {_last(said.splitlines())}")
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


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Whatever is left of a part's process group, which is its own session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _last(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")[:400]


def _version(name: str) -> str:
    if not importlib.util.find_spec(name):
        return "absent"
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "present"


def environment(rehearsal: bool) -> dict[str, str]:
    """What the parts run in."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    return {**env, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearsal else env


def gpu_is_there() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--budget", type=float, default=520.0, metavar="SECONDS")
    parser.add_argument("--tune", action="store_true", help="also try other launch settings")
    parser.add_argument("--parts", metavar="NAMES", help="only these, with commas")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, to find a mistake before a GPU does")
    parser.add_argument("--part", choices=("machine", "exactness"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    where = Where(Path(options.out), Path(tempfile.mkdtemp(prefix="gpu_gate_")))
    if options.part:
        where.work.rmdir()
        if options.part == "machine":
            return show_machine(options.rehearse)
        return check_exactness(where.out, options.rehearse, options.budget)
    missing = [name for name in NEEDS if not importlib.util.find_spec(name)]
    if not options.rehearse and not gpu_is_there():
        print("gpu_gate.py: torch sees no NVIDIA GPU on this machine; --rehearse runs the same parts on its CPU")
        return 1
    where.out.mkdir(parents=True, exist_ok=True)
    title = f"Budget {options.budget:.0f} s. Missing: {', '.join(missing) or 'nothing that is needed'}."
    plan = parts(options, where)

    def written(outcomes: list[Outcome]) -> str:
        return write_report(where.out / "gate.md", outcomes, options.rehearse, title)

    try:
        outcomes = run_parts(plan, where, options.budget, environment(options.rehearse), written)
    finally:
        shutil.rmtree(where.work, ignore_errors=True)
    print(written(outcomes))
    return 0 if all(outcome.good for outcome in outcomes if outcome.part.correctness) else 1


if __name__ == "__main__":
    raise SystemExit(main())
