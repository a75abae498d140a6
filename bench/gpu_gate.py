"""On a machine with an NVIDIA GPU, in one command and under nine minutes: is everything right, and how quick is it?

    python bench/gpu_gate.py --out DIR [--budget 520] [--tune] [--parts machine,tests,...] [--rehearse]

Needs torch, triton, einops, numpy, pytest and this repository; what else is missing is named and left out. Every part
is a process of its own with a limit of its own, so one that fails or hangs hides none of the others. DIR/gate.md is
written again after every part. --rehearse runs the same parts on a CPU, with small cases and the interpreter.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

from bench.gate_checks import NEEDS, check_exactness, last_line, show_machine
from bench.gate_plan import ROOT, Part, Where, parts
from bench.measure import ready

LEFT_OUT = 77  # exit code of a part
MOST_FILES = 8
MORE = "more.zip"  # files beyond the most that a machine which is lent may send back


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
        if (where.work / name).exists():
            _keep(where.work / name, where.out)
    outcome = Outcome(part, status, time.perf_counter() - started, lines)
    print(f"[{part.name}] {status} after {outcome.seconds:.0f} s: {last_line(lines)}", flush=True)
    return outcome


def _keep(path: Path, out: Path) -> None:
    """Copy a results file; when there are as many as may come back, into an archive instead."""
    others = {other.name for other in out.iterdir()} - {path.name, "gate.md", MORE}
    if len(others) < MOST_FILES - 2:  # gate.md and the archive are the others
        shutil.copy(path, out / path.name)
        return
    with zipfile.ZipFile(out / MORE, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)


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
        said = last_line(outcome.lines).replace("|", "/")
        summary.append(f"| {outcome.part.name} ({kind}) | {outcome.status} | {outcome.seconds:.0f} | {said} |")
    checks = [outcome for outcome in outcomes if outcome.part.correctness]
    bad = [outcome.part.name for outcome in checks if not outcome.good]
    absent = [outcome.part.name for outcome in outcomes if outcome.status == "left out"]
    late = [o.part.name for o in outcomes if not o.good and not o.part.correctness]
    verdict = f"FAILED: {', '.join(bad)}" if bad else f"all {len(checks)} correctness parts passed or were left out"
    verdict += f"; without figures: {', '.join(late)}" if late else ""
    summary += ["", f"{verdict}{'; left out: ' + ', '.join(absent) if absent else ''}.", ""]
    path.write_text("\n".join([*text, *summary]))
    return "\n".join(summary)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Whatever is left of a part's process group, which is its own session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


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
    ready(where.out)
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
