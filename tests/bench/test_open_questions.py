"""The micro-benchmarks: rehearsed on a CPU, where they say that their numbers are worth nothing."""

import csv
import os
import sys

import pytest
import torch

from bench import open_questions
from bench.gate_plan import ROOT

WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@WITHOUT_A_GPU
def test_a_rehearsal_answers_everything_and_says_what_it_is_worth(tmp_path, capsys):
    assert open_questions.main(["--out", str(tmp_path), "--quick"]) == 0
    with (tmp_path / "open_questions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["question"] for row in rows} == {"ex2", "product", "convolution", "decoder"}
    assert [row["case"].split(":")[0] for row in rows if row["question"] == "product"] == [
        f"K = {width}" for width in (128, 256, 512, 1024)
    ]
    for row in rows:
        assert row["status"] == "left out" or (float(row["rate"]) > 0 and open_questions.WORTHLESS in row["reason"])
        assert row["hardware"].startswith("CPU") and not row["roof"]
    assert "worth nothing" in (tmp_path / "open_questions.md").read_text()
    assert "worth nothing" in capsys.readouterr().out.strip().splitlines()[-1]


def test_a_question_that_breaks_hides_no_other_and_fails_the_run(tmp_path, capsys, monkeypatch):
    def breaks(_):
        raise RuntimeError("no\nsuch unit")

    monkeypatch.setattr(open_questions.Bench, "products", breaks)
    code = open_questions.main(["--out", str(tmp_path), "--device", "cpu"])
    said = capsys.readouterr().out
    assert code == 1 and "failed: RuntimeError: no such unit" in said and "convolution" in said
    assert said.strip().splitlines()[-1].startswith("7") is False and "FAILED: product" in said


def test_a_spent_budget_is_said(tmp_path, capsys):
    assert open_questions.main(["--out", str(tmp_path), "--device", "cpu", "--budget", "-1"]) == 0
    assert capsys.readouterr().out.count("the time budget was spent before its turn") == 4


# the number of instructions of each kind in the loop, for the eight elements a thread has
COMPILES = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.exponentials import chain
jobs = (80, "f32", "fp32"), (80, "f16x2", "fp16"), (90, "bf16x2", "bf16"), (100, "f16x2", "fp16")
for capability, kind, dtype in jobs:
    data = dict.fromkeys(("source", "target"), f"*{dtype}")
    signature = data | {"rounds": "i32", "KIND": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(chain, signature, constexprs={(3,): kind, (4,): 1024})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    print(capability, kind, made.asm["ptx"].count("ex2.approx"))
"""


def test_the_kernels_compile_for_gpus_that_are_not_here(program):
    pytest.importorskip("triton")
    env = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "TRITON_INTERPRET": "0"}
    done = program("-c", COMPILES, env=env, check=0)
    # eight elements a thread; two at a time in the packed forms
    assert done.stdout.split() == "80 f32 8 80 f16x2 4 90 bf16x2 4 100 f16x2 4".split(), (done.stdout, sys.version)
