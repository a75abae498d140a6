"""Checks and times every kernel on this GPU and prints one table: `python -m bevt_kernels`.

Every case is first held to float64, outputs and gradients; one that fails gets no times. Without a GPU the small cases
are checked in Triton's interpreter, if TRITON_INTERPRET=1 asks for it.
"""

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import check, runtime

COLUMNS = ("kernel", "case", "dtype", "tensor", "error", "torchs_own", "bound", "ok", "note")
NO_GPU = (
    "bevt_kernels: no NVIDIA GPU here, so no kernel answers a call; set TRITON_INTERPRET=1 to run the kernels "
    "on the CPU under implementation('fused')"
)
CONTEXT_LOST = 3  # exit code: only a new process can check the cases after this one


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    gpu = torch.cuda.is_available() and not runtime.INTERPRETED
    if not gpu and not runtime.INTERPRETED:
        print(NO_GPU)
        return 1
    device = torch.device("cuda" if gpu else "cpu")
    print(
        f"{torch.cuda.get_device_name() if gpu else 'the interpreter on a CPU'}, torch {torch.__version__}, {_triton()}"
    )
    found = [kernel for kernel in check.kernels() if options.kernel in (None, kernel.name)]
    dtypes = {name: check.DTYPES[name] for name in options.dtypes.split(",")}
    number, of = map(int, options.slice.split("/"))
    plan = [
        (kernel, case, name)
        for name in dtypes
        for kernel in found
        for case in kernel.cases(small=not gpu or options.small)
        if options.case in str(case)
    ][number::of]
    if not plan:
        print("bevt_kernels: no case matches")
        return 1
    passed, late, started = 0, 0, time.perf_counter()
    heads = ("kernel", "case", "dtype", "worst error / bound", "forward", "both", "eager")
    print("{:<21} {:<60} {:<5} {:<32} {:>9} {:>9} {:>9}  ms".format(*heads))
    for kernel, case, name in plan[options.skip :]:
        if options.budget and time.perf_counter() - started > options.budget:
            late += 1
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdicts = check.check(kernel, case, dtypes[name], device, fused=not gpu)
            ok = all(v.ok for v in verdicts)
            timed = gpu and ok and not options.check and not case.small
            times = _times(kernel, case, dtypes[name], device) if timed else ""
        passed += ok
        print(f"{kernel.name:<21} {case!s:<60} {name:<5} {_worst(verdicts):<32} {times}", flush=True)
        if options.csv:
            _append(Path(options.csv), kernel.name, case, name, verdicts)
        if any(check.sticky(v.note) for v in verdicts):
            print("bevt_kernels: the GPU's context is lost; the remaining cases need a new process")
            return CONTEXT_LOST
    total = len(plan) - options.skip
    print(f"{passed} of {total} cases are exact{f', {late} not reached in time' if late else ''}")
    return 0 if passed == total else 1


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bevt_kernels", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--kernel", metavar="NAME")
    parser.add_argument("--case", metavar="TEXT", default="", help="cases whose name contains this only")
    parser.add_argument("--dtypes", default="bf16", help="of bf16, fp16, fp32, with commas (default: bf16)")
    parser.add_argument("--small", action="store_true", help="the small cases only")
    parser.add_argument("--check", action="store_true", help="no times")
    parser.add_argument("--csv", metavar="FILE", help="append every verdict to this file")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after this")
    parser.add_argument("--slice", default="0/1", metavar="I/N", help="every N-th case from the I-th")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N of those")
    return parser.parse_args(arguments)


def _times(kernel: check.Kernel, case: Any, dtype: torch.dtype, device: torch.device) -> str:
    """Forward, forward + backward, and the reference's forward + backward, in milliseconds."""
    try:
        given = kernel.draw(case, dtype, device)
        _, upstream = check.evaluate(kernel.reference, kernel.reference, given)

        def both(function: Callable[..., Any]) -> Callable[[], Any]:
            return lambda: check.evaluate(function, kernel.reference, given, upstream)

        runs = (lambda: kernel.function(*given), both(kernel.function), both(kernel.reference))
        return " ".join(f"{runtime.triton.testing.do_bench(run, return_mode='median'):9.3f}" for run in runs)
    except Exception as problem:  # exact but not timed: out of memory, say
        return check.one_line(problem)


def _worst(verdicts: Sequence[check.Verdict]) -> str:
    failed = next((v for v in verdicts if not v.ok), None)
    if failed is not None:
        numbers = "" if failed.error != failed.error else f" {failed.error:.1e} > {failed.bound:.1e}"
        return f"FAILS {failed.tensor}{numbers} {failed.note}"
    worst = max(verdicts, key=lambda v: v.error / v.bound if v.bound else 0.0)
    note = next((v.note for v in verdicts if v.note.startswith("not fused:")), "")
    return f"{worst.tensor} {worst.error:.1e} / {worst.bound:.1e} {note}".rstrip()


def _append(path: Path, kernel: str, case: Any, dtype: str, verdicts: Sequence[check.Verdict]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for v in verdicts:
            numbers = [f"{x:.3e}" for x in (v.error, v.torchs_own, v.bound)]
            writer.writerow([kernel, case, dtype, v.tensor, *numbers, "yes" if v.ok else "no", v.note])


def _triton() -> str:
    return f"triton {runtime.triton.__version__}" if runtime.AVAILABLE else "no triton"


if __name__ == "__main__":
    sys.exit(main())
