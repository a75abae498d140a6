"""Every kernel, every case, compiled for GPUs that are not here: `python -m bevt_kernels.compile_check`.

The host side of a kernel file runs on meta tensors (`rehearse`) while `runtime.recording` writes its launches down.
Each is compiled as Triton's JIT would compile it, and the machine code is read: registers, spills, shared memory,
tensor instructions, and, where a launch says what one pass of its hot loop computes, instructions and cycles per score.
Bounds are static: what the code would reach if nothing ever waited. They rank designs; they are not measurements.

Exit code 0: no spill, no stack, shared and tensor memory within the chip's limits, a tensor instruction wherever 16-bit
data meets a product, no float32 product rounded to tf32. 1: some row fails. 2: the question makes no sense.
"""

import argparse
import csv
import importlib
import io
import itertools
import multiprocessing
import os
import pkgutil
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import runtime
from .machine_code import CHIPS, Count, count, ctas_per_sm, disassemble, hot_loop, resources, tensor_instructions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Job:
    """One piece of code to compile, and every case that runs it."""

    file: str
    chip: int
    source: Any = None  # specialisation.Source; None where the host side failed
    inner: runtime.Inner | None = None
    dtypes: list[str] = field(default_factory=list)
    cases: list[str] = field(default_factory=list)
    failure: str = ""  # found before compiling

    @property
    def name(self) -> str:
        """The kernel by the module that holds it, which need not be the file that launches it."""
        kernel = self.source.kernel if self.source else None
        return f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}" if kernel else self.file

    def answers_to(self, name: str) -> bool:
        return name in (self.file, self.name, *self.name.split("."))

    @property
    def constants(self) -> str:
        """The choices that were made for this launch: its named constants and options."""
        if not self.source:
            return ""
        names = list(self.source.signature)
        by_name = {names[index]: value for (index,), value in self.source.constants.items()}
        chosen = {parameter.name for parameter in self.source.kernel.params if parameter.is_constexpr}
        shown = {name: value for name, value in by_name.items() if name in chosen} | self.source.options
        return " ".join(f"{name}={value}" for name, value in shown.items())


@dataclass
class Finding:
    """What a compiled kernel turned out to be."""

    registers: int = 0
    spill: int = 0
    stack: int = 0
    shared: int = 0
    tmem: int = 0
    ctas: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    loop: Count | None = None
    whole: bool = False  # there is no loop, so the whole kernel was counted
    listing: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def kernel_files(package: str) -> dict[str, ModuleType]:
    """The modules of a package that say where they are meant to run and can rehearse it."""
    found = {}
    for information in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if information.name.startswith("__"):
            continue
        module = importlib.import_module(f"{package}.{information.name}")
        if hasattr(module, "CASES") and hasattr(module, "rehearse"):
            found[information.name] = module
    return found


def jobs_of(files: dict[str, ModuleType], chips: list[int], dtypes: list[str], small: bool) -> list[Job]:
    """Rehearse every case and join the launches that share their code."""
    jobs: dict[tuple, Job] = {}
    for file, module in files.items():
        for chip, dtype in itertools.product(chips, dtypes):
            cases = [case for case in module.CASES if case.small or not small]
            found = [(job, str(case)) for case in cases for job in _jobs_of_case(file, module, case, dtype, chip)]
            if cases and not found:
                found = [(Job(file, chip, failure="its rehearsal launches nothing"), "every case")]
            for job, case in found:
                key = (file, chip, job.failure, job.inner, job.source.key() if job.source else None)
                job = jobs.setdefault(key, job)
                job.dtypes += [] if dtype in job.dtypes else [dtype]
                job.cases += [] if case in job.cases else [case]
    return list(jobs.values())


def _jobs_of_case(file: str, module: ModuleType, case: Any, dtype: str, chip: int) -> Iterator[Job]:
    from triton.backends.compiler import GPUTarget

    from .specialisation import disagreement, specialise

    try:
        with runtime.recording(chip) as launches:
            module.rehearse(case, DTYPES[dtype])
    except Exception as error:
        yield Job(file, chip, failure=f"the host side fails: {_sentence(error)}")
        return
    for launch in launches:
        if 0 in launch.grid:
            continue
        job = Job(file, chip, inner=launch.inner)
        try:
            job.source = specialise(launch)
            job.failure = disagreement(launch, job.source, GPUTarget("cuda", chip, 32))
        except Exception as error:
            job.failure = f"the launch of {getattr(launch.kernel, '__name__', launch.kernel)} fails: {_sentence(error)}"
        yield job


def examine(job: Job, listing: bool) -> Finding:
    """Compile one job and read what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    chip = CHIPS[job.chip]
    log = io.StringIO()
    # the registers are those of the very run of ptxas that makes the code, which Triton calls with flags of its own
    with redirect_stdout(log):
        compiled = triton.compile(job.source.ast(), GPUTarget("cuda", job.chip, 32), job.source.options)
    found = resources(log.getvalue())
    assembly = compiled.asm["ptx"]
    threads = int(re.findall(r"\.(?:req|max)ntid (\d+)", assembly)[0])
    finding = Finding(found.registers, found.spill, found.stack, compiled.metadata.shared)
    finding.tmem = getattr(compiled.metadata, "tmem_size", 0) or 0
    finding.ctas = ctas_per_sm(chip, found.registers, threads, finding.shared, finding.tmem)
    products = re.findall(r"tt\.dot(?:_scaled)? .*", compiled.asm["ttir"])
    if products or job.inner or listing:
        code, labels = disassemble(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
        finding.tensor = dict(tensor_instructions(code))
        loop = hot_loop(code, labels)
        finding.loop, finding.whole = count(code, loop, threads, chip), len(loop) == len(code)
        if listing:
            finding.listing = [str(code[index]) for index in loop]
    finding.failures = list(_failures(job, finding, products))
    return finding


def _failures(job: Job, finding: Finding, products: list[str]) -> Iterator[str]:
    chip = CHIPS[job.chip]
    if finding.spill:
        yield f"spills {finding.spill} bytes"
    if finding.stack:
        yield f"has a stack of {finding.stack} bytes"
    if finding.shared > chip.smallest:
        yield f"asks for {finding.shared / 1024:.1f} KiB of shared memory where the chip has {chip.smallest // 1024}"
    if finding.tmem > chip.tmem:
        yield f"asks for {finding.tmem} columns of tensor memory where the chip has {chip.tmem}"
    if products and not finding.tensor and {"bf16", "fp16"} & set(job.dtypes):
        yield "has a product and 16-bit data but no tensor instruction"
    if "fp32" in job.dtypes and any(re.search(r"= tf32 .*xf32> \*", product) for product in products):
        yield "rounds a float32 product to tf32 (say input_precision='ieee')"


def examine_all(jobs: list[Job], processes: int, listing: bool) -> Iterator[tuple[Job, Finding]]:
    """Compile in child processes, a fresh one for each job: a compiler that crashes takes only its own row with it."""
    _warm_up(sorted({job.chip for job in jobs}))
    context = multiprocessing.get_context("fork")
    findings = {index: Finding(failures=[job.failure]) for index, job in enumerate(jobs) if job.failure}
    waiting = [index for index in range(len(jobs)) if index not in findings]
    running: dict[Connection, tuple[int, Any]] = {}
    shown = 0
    try:
        while shown < len(jobs):
            while waiting and len(running) < processes:
                index = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                child = context.Process(target=_child, args=(there, jobs[index], listing))
                child.start()
                there.close()
                running[here] = index, child
            for ready in wait(list(running)) if running else []:
                assert isinstance(ready, Connection)
                index, child = running.pop(ready)
                try:
                    findings[index] = ready.recv()
                except EOFError:
                    child.join()
                    cause = signal.Signals(-child.exitcode).name if child.exitcode < 0 else f"code {child.exitcode}"
                    findings[index] = Finding(failures=[f"the compiler died ({cause})"])
                child.join()
                ready.close()
            while shown in findings:
                yield jobs[shown], findings[shown]
                shown += 1
    finally:
        for _, child in running.values():
            child.kill()
            child.join()


def _warm_up(chips: list[int]) -> None:
    """Let every child inherit what takes long to find out: the hash of Triton's files and the version of its ptxas."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import cache

    for chip in chips:
        make_backend(GPUTarget("cuda", chip, 32)).hash()
    getattr(cache, "triton_key", lambda: None)()


def _child(answer: Connection, job: Job, listing: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with tempfile.TemporaryFile() as complaints:
        os.dup2(complaints.fileno(), 2)  # Triton's passes speak to the terminal, past Python
        try:
            finding = examine(job, listing)
        except Exception as error:
            complaints.seek(0)
            spoken = complaints.read().decode(errors="replace")
            reasons = re.findall(r"error: (.*)", spoken)[:1] + re.findall(r"executing \[`(\w+)`", spoken)[:1]
            finding = Finding(failures=[f"does not compile: {': '.join([_sentence(error), *reasons])}"])
        answer.send(finding)
        answer.close()


def _sentence(error: BaseException) -> str:
    """What ptxas complains of, else the last line that says something: a CompilationError shows the source first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    lines += re.findall(r"^ptxas.*(?:fatal|error).*", str(error), flags=re.MULTILINE)[:1]
    where = re.match(r"at (\d+):", str(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"line {where[1]} of the kernel" if where else f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {lines[-1] if lines else ''} ({place})"


def bound(job: Job, finding: Finding) -> tuple[str, float] | None:
    """The pipe that limits the hot loop, and useful TFLOP/s of the whole chip if that pipe never waits."""
    if not job.inner or not finding.loop:
        return None
    chip = CHIPS[job.chip]
    pipe, cycles = max(finding.loop.cycles.items(), key=lambda item: item[1])
    useful = job.inner.flops * job.inner.scores / job.inner.waste
    return pipe, useful / cycles * chip.sms * chip.clock / 1000


def row(job: Job, finding: Finding) -> dict[str, Any]:
    """One line of the CSV: a superset of what is printed."""
    import triton

    chip = CHIPS[job.chip]
    line = {
        "kernel": job.name,
        "cases": "; ".join(job.cases),
        "dtypes": " ".join(job.dtypes),
        "chip": f"sm_{job.chip}",
        "triton": triton.__version__,
        "configuration": job.constants,
        "registers": finding.registers,
        "spill_bytes": finding.spill,
        "stack_bytes": finding.stack,
        "shared_bytes": finding.shared,
        "shared_limit_bytes": chip.smallest,
        "tmem_columns": finding.tmem,
        "ctas_per_sm": finding.ctas,
        "tensor_instructions": " ".join(f"{name}:{number}" for name, number in finding.tensor.items()),
    }
    if job.inner and finding.loop:
        scores = job.inner.scores
        line |= {
            "counted": "kernel" if finding.whole else "loop",
            "scores": scores,
            "flop_per_score": job.inner.flops,
            "waste": round(job.inner.waste, 4),
        }
        line |= {f"instructions_{name}": round(n / scores, 4) for name, n in finding.loop.classes.items()}
        line |= {f"cycles_{pipe}": round(n / scores, 5) for pipe, n in finding.loop.cycles.items()}
    if limit := bound(job, finding):
        line |= {"static_limit": limit[0], "static_bound_tflops": round(limit[1], 1)}
    return line | {"verdict": "; ".join(finding.failures) or "ok"}


def show(job: Job, finding: Finding, width: int) -> None:
    """Print one row, with its loop underneath."""
    verdict = "; ".join(finding.failures) or "ok"
    tensor = " ".join(f"{name} {number}" for name, number in finding.tensor.items()) or "-"
    if not finding.registers:
        print(f"{job.name:<{width}} {','.join(job.dtypes):<14} sm_{job.chip:<4}{verdict}", flush=True)
        print(f"    cases: {_cases(job)}", flush=True)
        return
    print(
        f"{job.name:<{width}} {','.join(job.dtypes):<14} sm_{job.chip:<4}{finding.registers:>4}{finding.spill:>6}"
        f"{finding.stack:>6}{finding.shared / 1024:>7.1f}/{CHIPS[job.chip].smallest // 1024}{finding.tmem:>5}/512"
        f"{finding.ctas:>5}  {tensor:<12} {verdict}"
    )
    print(f"    cases: {_cases(job)}\n    {job.constants}")
    if job.inner and finding.loop and (limit := bound(job, finding)):
        scores = job.inner.scores
        classes = "  ".join(f"{name} {number / scores:.2f}" for name, number in finding.loop.classes.items())
        cycles = "  ".join(f"{pipe} {number / scores:.4f}" for pipe, number in finding.loop.cycles.items())
        print(f"    instructions per score{' (of the whole kernel: no loop)' if finding.whole else ''}: {classes}")
        print(f"    clk per score: {cycles}  waste {job.inner.waste:.2f}")
        chip = CHIPS[job.chip]
        print(
            f"    static bound on {chip.name}: {limit[1]:.0f} TFLOP/s useful, limited by {limit[0]} (not a measurement)"
        )
    if finding.listing:
        opcodes = Counter(line.split()[1] if line[0] == "@" else line.split()[0] for line in finding.listing)
        print("    hot loop by opcode: " + "  ".join(f"{number} {name}" for name, number in opcodes.most_common()))
        print(*(f"      {line}" for line in finding.listing), sep="\n")
    sys.stdout.flush()


def _cases(job: Job) -> str:
    return "; ".join(job.cases[:3]) + (f"; and {len(job.cases) - 3} more" if len(job.cases) > 3 else "")


def write_csv(file: io.TextIOBase, rows: list[dict[str, Any]]) -> None:
    """All rows with all columns that any of them has."""
    columns = list(dict.fromkeys(name for line in sorted(rows, key=len, reverse=True) for name in line))
    writer = csv.DictWriter(file, [name for name in columns if name != "verdict"] + ["verdict"], restval="")
    writer.writeheader()
    writer.writerows(rows)


def arguments(words: list[str] | None) -> argparse.Namespace:
    """Read the command line; what makes no sense is one sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        "bevt_kernels.compile_check",
        description="Compile every kernel for GPUs that are not here.",
        allow_abbrev=False,
    )
    parser.add_argument("--chip", nargs="+", type=int, choices=list(CHIPS), default=list(CHIPS), metavar="80|90|100")
    parser.add_argument("--kernel", metavar="NAME", help="a kernel file or one Triton kernel of it")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--small", action="store_true", help="only the small cases")
    parser.add_argument("--loops", action="store_true", help="print the instructions of each hot loop")
    parser.add_argument("--csv", metavar="FILE", type=Path)
    parser.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--package", default=__package__, help="where to look for kernel files (default: %(default)s)")
    chosen = parser.parse_args(words)
    if chosen.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {chosen.jobs}")
    if not runtime.AVAILABLE:
        parser.error("Triton is not installed, so nothing can be compiled")
    if runtime.INTERPRETED:
        parser.error("under TRITON_INTERPRET=1 kernels are interpreted, not compiled; unset it")
    try:
        chosen.files = kernel_files(chosen.package)
    except ModuleNotFoundError as error:
        parser.error(f"--package: {error}")
    if not chosen.files:
        parser.error(f"{chosen.package} has no kernel file (a module with CASES and rehearse)")
    if chosen.csv is not None:
        try:
            chosen.csv = chosen.csv.open("w", newline="")
        except OSError as error:
            parser.error(f"--csv: cannot write {chosen.csv}: {error.strerror}")
    return chosen


def check(chosen: argparse.Namespace) -> int:
    """Compile what was chosen and print it; the exit code."""
    files = {name: file for name, file in chosen.files.items() if name == chosen.kernel} or chosen.files
    jobs = jobs_of(files, list(dict.fromkeys(chosen.chip)), list(dict.fromkeys(chosen.dtype)), chosen.small)
    if chosen.kernel is not None:
        known = sorted({*files, *(job.name for job in jobs)})
        jobs = [job for job in jobs if job.answers_to(chosen.kernel)]
        if not jobs:
            print(f"--kernel: there is no {chosen.kernel!r}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    width = max((len(job.name) for job in jobs), default=0)
    print(f"triton {runtime.triton.__version__}, {len(jobs)} kernels to compile; nothing runs, bounds are static")
    print(f"{'kernel':<{width}} {'dtype':<14} chip   regs spill stack shared/KB  tmem/512 CTAs  tensor       verdict")
    rows, failed = [], []
    for job, finding in examine_all(jobs, chosen.jobs, chosen.loops):
        show(job, finding, width)
        rows.append(row(job, finding))
        if finding.failures:
            failed.append(
                f"{job.name} ({','.join(job.dtypes)}, sm_{job.chip}; {_cases(job)}): {'; '.join(finding.failures)}"
            )
    if chosen.csv is not None:
        with chosen.csv as file:
            write_csv(file, rows)
    if failed:
        print(f"\n{len(failed)} of {len(jobs)} fail:", *failed, sep="\n  ")
    else:
        print(f"\nall {len(jobs)} pass")
    return 1 if failed or not jobs else 0


def main(words: list[str] | None = None) -> int:
    chosen = arguments(words)
    torch.set_num_threads(1)  # the processes that compile are forked from this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that nothing stays behind
    with tempfile.TemporaryDirectory(prefix="compile_check_") as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", f"{folder}/cache")
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # ptxas leaves files behind when it fails
        os.environ["TRITON_ALWAYS_COMPILE"] = os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
        try:
            return check(chosen)
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
