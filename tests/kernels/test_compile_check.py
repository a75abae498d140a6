"""compile_check finds what it looks for: kernels with one known flaw each, and the machine-code reader on its own."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bevt_kernels import compile_check, machine_code
from bevt_kernels.machine_code import CHIPS, Instruction

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

# every file has one small case and one launch; what differs is the kernel's body and how it is launched
KERNEL_FILE = """
from dataclasses import dataclass

import torch
from bevt_kernels import runtime
from bevt_kernels.runtime import tl, triton


@dataclass(frozen=True, kw_only=True)
class Case:
    rows: int
    small: bool = False

    def __str__(self):
        return f"{{self.rows}} rows"


CASES = [Case(rows=64, small=True), Case(rows=128)]


@triton.jit
def kernel(x_ptr, y_ptr, scale, count, BLOCK: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(count):
        x = tl.load(x_ptr + step * BLOCK * BLOCK + rows * BLOCK + columns)
        {body}
    tl.store(y_ptr + rows * BLOCK + columns, total * scale)


def rehearse(case, dtype):
    x = torch.empty(case.rows, 64, dtype=dtype, device="meta")
    {before}
    inner = runtime.Inner(scores=4096, flops=128.0, waste=1.25)
    runtime.launch(kernel, (1,), x, x, 2.0, case.rows * 100, inner=inner, {options})
"""
PRODUCT = "total = tl.dot(x, tl.trans(x), total)"
IEEE = "total = tl.dot(x.to(tl.float32), tl.trans(x.to(tl.float32)), total, input_precision='ieee')"
FILES = {
    "fine": (PRODUCT, "", "BLOCK=64"),
    "elementwise": ("total += tl.exp2(x.to(tl.float32))", "", "BLOCK=64"),
    "spills": (PRODUCT, "", "BLOCK=128, maxnreg=96"),
    "too_wide": (PRODUCT, "", "BLOCK=256, num_warps=8, num_stages=4"),
    "no_tensor": (IEEE, "", "BLOCK=64"),
    "broken": ("total = tl.dot(x, x[:, :7], total)", "", "BLOCK=64"),
    "unknown_option": (PRODUCT, "", "BLOCK=64, stages=3"),
    "raises": (PRODUCT, "raise ValueError('the host side is wrong')", "BLOCK=64"),
    "launches_nothing": (PRODUCT, "return", "BLOCK=64"),
}


def start(*words: object, path: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """compile_check as a user starts it: never interpreted, whatever the tests around it are."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "TRITON_CACHE_DIR")}
    # an installed Triton that the tests were pointed at stays first
    places = [*kept.get("PYTHONPATH", "").split(os.pathsep), str(ROOT / "kernels"), str(path or "")]
    kept |= {"PYTHONPATH": os.pathsep.join(filter(None, places)), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "bevt_kernels.compile_check", *map(str, words)]
    return subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=240)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def flawed(tmp_path_factory) -> Path:
    """A package with one kernel file for each kind of flaw."""
    folder = tmp_path_factory.mktemp("flawed")
    (folder / "flawed").mkdir()
    (folder / "flawed" / "__init__.py").touch()
    for name, (body, before, options) in FILES.items():
        text = KERNEL_FILE.format(body=body, before=before or "pass", options=options)
        (folder / "flawed" / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def verdicts(flawed, tmp_path_factory) -> tuple[int, str, list[dict[str, str]]]:
    """One run over all flaws: its exit code, what it printed, and the rows of its CSV."""
    file, temporary = tmp_path_factory.mktemp("table") / "table.csv", tmp_path_factory.mktemp("temporary")
    words = ("--package", "flawed", "--chip", 90, "--dtype", "bf16", "--csv", file, "--jobs", 2)
    code, output, errors = finish(start(*words, path=flawed, TMPDIR=str(temporary)))
    assert "Traceback" not in errors, errors
    # torch makes a folder of its own when it is imported
    assert not [path for path in temporary.iterdir() if "torch" not in path.name], "files were left behind"
    with file.open(newline="") as table:
        return code, output, list(csv.DictReader(table))


@pytest.mark.parametrize(
    ("file", "verdict"),
    [
        ("fine", "ok"),
        ("elementwise", "ok"),
        ("spills", "spills"),
        ("too_wide", "KiB of shared memory where the chip has 227"),
        ("no_tensor", "has a product and 16-bit data but no tensor instruction"),
        ("broken", "does not compile"),
        ("unknown_option", "stages was specified but unrecognised"),
        ("raises", "the host side fails: ValueError: the host side is wrong"),
        ("launches_nothing", "its rehearsal launches nothing"),
    ],
)
def test_every_flaw_is_named(verdicts, file, verdict):
    _, output, rows = verdicts
    (found,) = (row for row in rows if row["kernel"].split(".")[0] == file)
    assert verdict in found["verdict"]
    at_the_end = output.split(" fail:\n")[1]
    assert (f"{file}.kernel (bf16, sm_90; 64 rows; 128 rows): " in at_the_end or f"{file} (" in at_the_end) == (
        verdict != "ok"
    )


def test_a_flaw_is_exit_code_1(verdicts):
    code, output, rows = verdicts
    assert code == 1
    assert "7 of 9 fail" in output and len(rows) == len(FILES)


def test_a_row_of_the_table(verdicts):
    _, _, rows = verdicts
    fine, spills = (next(row for row in rows if row["kernel"] == f"{file}.kernel") for file in ("fine", "spills"))
    assert fine["cases"] == "64 rows; 128 rows", "the two cases share their code"
    assert (fine["dtypes"], fine["chip"], fine["configuration"]) == (
        "bf16",
        "sm_90",
        "BLOCK=64 num_warps=4 num_stages=2",
    )
    assert fine["tensor_instructions"].startswith("HGMMA:")
    assert 0 < int(fine["registers"]) < 256 and int(fine["ctas_per_sm"]) > 0
    assert int(fine["spill_bytes"]) == int(fine["stack_bytes"]) == 0 < int(spills["spill_bytes"])
    # one pass multiplies 64x64 by 64x64, of which the tensor cores do 4096 FLOP a clock
    assert float(fine["cycles_tensor"]) == pytest.approx(2 * 64**3 / 4096 / 4096, abs=1e-5)
    slowest = max((float(value), name) for name, value in fine.items() if name.startswith("cycles_"))
    assert fine["static_limit"] == slowest[1].removeprefix("cycles_")
    bound = 128 / 1.25 / slowest[0] * 132 * 1.755 / 1000
    assert float(fine["static_bound_tflops"]) == pytest.approx(bound, rel=2e-3)
    # a warp of the loop without a product does one exponential for every score
    elementwise = next(row for row in rows if row["kernel"] == "elementwise.kernel")
    assert float(elementwise["instructions_MUFU"]) == 1 and not elementwise["tensor_instructions"]


def test_float32_products_must_not_be_rounded(flawed):
    words = ("--package", "flawed", "--kernel", "fine", "--chip", 80, "--dtype", "fp16", "fp32", "--small", "--loops")
    code, output, errors = finish(start(*words, path=flawed))
    assert code == 1 and "rounds a float32 product to tf32" in output, errors
    assert "1 of 2 fail" in output, "in float16 nothing is rounded"
    assert "128 rows" not in output, "only the small case was asked for"
    assert "hot loop by opcode" in output and "HMMA.16816.F32 R" in output and "HMMA.1688.F32.TF32 R" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--chip 75", "75"),
        ("--dtype fp8", "fp8"),
        ("--jobs 0", "--jobs: expected at least 1, got 0"),
        ("--package no_such_package", "no_such_package"),
        ("--package json", "json has no kernel file"),
        ("--package flawed --csv /no/such/folder/x.csv", "cannot write /no/such/folder/x.csv: No such file"),
    ],
)
def test_senseless_questions(flawed, monkeypatch, capsys, words, sentence):
    monkeypatch.setattr(compile_check.runtime, "INTERPRETED", False)
    monkeypatch.syspath_prepend(flawed)
    with pytest.raises(SystemExit) as stopped:
        compile_check.main(words.split())
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_cannot_be_compiled_is_one_sentence(flawed):
    absent = start("--package", "flawed", "--kernel", "absent", path=flawed)
    for process, sentence in (
        (start(TRITON_INTERPRET="1"), "kernels are interpreted, not compiled; unset it"),
        (absent, "there is no 'absent'; there are broken, broken.kernel, "),
    ):
        code, output, errors = finish(process)
        assert code == 2 and sentence in errors
        assert not output and "Traceback" not in errors


def test_the_jit_compiles_the_same_code(flawed):
    """Triton's own JIT, on a stand-in for a driver, makes byte for byte the assembly that compile_check looks at."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(ROOT / "kernels")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    command = [sys.executable, str(Path(__file__).with_name("jit_stand_in.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_itself():
    code, output, errors = finish(start("--small", "--chip", 90, "--dtype", "bf16"))
    assert code == 0, output[-4000:] + errors


def lines(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """A few lines of machine code: `label:` or `[@P] OPCODE operands [-> label]`."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
            continue
        words, _, target = line.partition(" -> ")
        predicate, _, rest = words.partition(" ") if words[0] == "@" else ("", "", words)
        opcode, _, operands = rest.partition(" ")
        code.append(Instruction(predicate, opcode, operands, target))
    return code, labels


def test_the_hot_loop_is_the_innermost_with_products():
    code, labels = lines(
        """
        MOV
        outer:
        IADD3
        inner:
        HMMA.16816.F32
        FFMA
        BRA.DIV UR4 -> parted
        @!P1 BRA -> wait
        back:
        @P0 BRA -> inner
        HMMA.16816.F32
        @P2 BRA -> outer
        EXIT
        wait:
        SYNCS
        @!P1 BRA -> wait
        BRA -> back
        parted:
        WARPSYNC
        BRA -> back
        """
    )
    loop = machine_code.hot_loop(code, labels)
    names = [code[index].name for index in loop]
    # the wait for a barrier stands behind the end and is part of the loop; the path of parted warps is not taken
    assert names == ["HMMA", "FFMA", "BRA", "BRA", "BRA", "SYNCS", "BRA", "BRA"]


def test_of_two_loops_with_equal_products_the_first_is_hot():
    """What a kernel may skip comes after what it always does, and may be the shorter one."""
    code, labels = lines(
        "always:\nHMMA.16816.F32\nFADD\n@P0 BRA -> always\nsome:\nHMMA.16816.F32\n@P0 BRA -> some\nEXIT"
    )
    assert machine_code.hot_loop(code, labels) == [0, 1, 2]


def test_without_a_loop_everything_is_hot():
    code, labels = lines("MOV\nFADD\nEXIT")
    assert machine_code.hot_loop(code, labels) == [0, 1, 2]


def test_counts_per_pipe():
    code, _ = lines(
        """
        MUFU.EX2 R1, R2
        FFMA R1, R2, R3
        FFMA2 R1, R2, R3
        IMAD.WIDE R1, R2, R3
        LOP3.LUT R1, R2
        LDG.E.128 R4, desc
        LDSM.16.M88.2 R4, desc
        SHFL.BFLY R1, R2
        HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24
        HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24
        UIADD3 UR1, UR2
        UMOV UR25, 0x8100490
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR27], tmem[UR24], idesc[UR25], !UPT
        """
    )
    found = machine_code.count(code, list(range(len(code))), 256, CHIPS[90])
    assert found.classes["all"] == 13 * 256
    assert (
        found.classes["tensor"] == 3 * 256 and found.classes["FMA"] == 2 * 256 and found.classes["uniform"] == 2 * 256
    )
    assert found.cycles["MUFU"] == 256 / 16
    assert found.cycles["FMA"] == 4 * 256 / 128, "the packed one takes two turns, the integer one a turn"
    blackwell = 2 * 128 * 64 * 16
    assert found.cycles["tensor"] == (2 * 2 * 64 * 128 * 16 * 2 + blackwell) / 4096
    # per warp four wavefronts of LDG, two of LDSM, one of SHFL; operands of products in shared memory: 128 + (64 + 128)
    # columns and rows of 16 two-byte elements for each of two warp groups, 64 + 128 for Blackwell's
    assert found.cycles["L1+shared"] == 8 * 7 + ((128 + 192) * 2 + 192) * 32 / 128


def test_what_ptxas_says():
    log = """ptxas info    : Function properties for kernel
        40 bytes stack frame, 36 bytes spill stores, 44 bytes spill loads
    ptxas info    : Used 254 registers, used 1 barriers, 40 bytes cumulative stack size"""
    assert machine_code.resources(log) == (254, 36, 40)
    with pytest.raises(ValueError, match="did not say"):
        machine_code.resources("ptxas fatal")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "tmem", "ctas"),
    [
        (163, 128, 36 * 1024, 0, 3),  # 168 registers after rounding
        (32, 128, 0, 0, 16),  # 64 warps
        (32, 32, 0, 0, 32),
        (64, 128, 100 * 1024, 0, 2),
        (64, 128, 228 * 1024, 0, 0),
        (64, 128, 1024, 256, 2),
        (64, 128, 1024, 768, 0),
    ],
)
def test_ctas_per_sm(registers, threads, shared, tmem, ctas):
    assert machine_code.ctas_per_sm(CHIPS[100], registers, threads, shared, tmem) == ctas
