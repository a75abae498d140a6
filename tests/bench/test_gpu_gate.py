"""The gate: no part hides another, and everything but the GPU can be rehearsed."""

import os
import sys
import zipfile

import pytest
import torch

from bench import gate_plan, gpu_gate
from bench.gpu_gate import Part, Where


def command(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def run(tmp_path, plan, budget=60.0):
    where = Where(tmp_path / "out", tmp_path / "work")
    for folder in where:
        folder.mkdir()

    def written(outcomes):
        return gpu_gate.write_report(where.out / "gate.md", outcomes, False, "a test")

    outcomes = gpu_gate.run_parts(plan, where, budget, dict(os.environ), written)
    return outcomes, (where.out / "gate.md").read_text()


def test_a_failing_part_does_not_hide_the_rest(tmp_path):
    grandchild = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    hangs = f"import subprocess, sys; print('began', flush=True); {grandchild}"
    plan = [
        Part("first", "First", command("print('before it broke'); raise SystemExit(3)"), 20, correctness=True),
        Part("hangs", "Hangs", command(hangs), 6),
        Part("absent", "Absent", command(""), 20, correctness=True, missing="bench/nothing.py does not exist"),
        Part("declines", "Declines", command("print('no pydantic'); raise SystemExit(77)"), 20, correctness=True),
        Part("last", "Last", command("print('all is well')"), 20, fills=True),
    ]
    outcomes, text = run(tmp_path, plan)
    assert [outcome.status for outcome in outcomes] == [
        "FAILED (exit code 3)", "OUT OF TIME", "left out", "left out", "passed"]  # fmt: skip
    assert outcomes[1].seconds < 20  # killed with what it had started
    for told in ("before it broke", "began", "bench/nothing.py does not exist", "no pydantic", "all is well"):
        assert told in text
    assert "FAILED: first; without figures: hangs; left out: absent, declines." in text
    assert text.index("## Summary") > text.index("## Last: passed")


def test_results_are_kept_and_at_most_eight_files_are_left(tmp_path):
    names = tuple(f"file_{n}" for n in range(12))
    work = tmp_path / "work"
    code = f"import pathlib\nfor name in {names}: pathlib.Path({str(work)!r}, name).write_text('x')"
    run(tmp_path, [Part("writes", "Writes", command(code), 20, keeps=names)])
    kept = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(kept) <= gpu_gate.MOST_FILES
    with zipfile.ZipFile(tmp_path / "out" / gpu_gate.MORE) as archive:  # and none is lost
        assert kept | set(archive.namelist()) == {*names, "gate.md", gpu_gate.MORE}


def test_the_time_left_goes_to_who_fills_it(tmp_path):
    plan = [
        Part("fills", "Fills", command("import sys; print(sys.argv[-1])"), 1, fills=True, budget="--budget"),
        Part("later", "Later", command("print(1)"), 30),
    ]
    outcomes, _ = run(tmp_path, plan, budget=130.0)
    assert 60 <= float(outcomes[0].lines[-1]) <= 100  # 130 less the 30 of the later part, less its own margin


WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


@WITHOUT_A_GPU
def test_the_kernels_say_in_one_sentence_that_there_is_no_gpu(program):
    path = os.pathsep.join([str(gpu_gate.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = program("-m", "bevt_kernels", env={"PYTHONPATH": path, "TRITON_INTERPRET": "0"}, check=1)
    assert len(done.stdout.strip().splitlines()) == 1 and "implementation('fused')" in done.stdout


@WITHOUT_A_GPU
def test_without_a_gpu_it_says_so_and_fails(tmp_path, capsys):
    assert gpu_gate.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and "no NVIDIA GPU" in said[0]


def test_a_rehearsal_runs_the_parts_on_a_cpu(program, tmp_path):
    arguments = ("--rehearse", "--parts", "machine,exactness,step", "--budget", "120")
    done = program("bench/gpu_gate.py", "--out", tmp_path, *arguments, check=0)
    text = (tmp_path / "gate.md").read_text()
    assert "a rehearsal on a CPU" in text and "## The machine: passed" in text
    assert (
        "## Every case against float64: passed" in text and "d bias_table" in (tmp_path / "exactness.csv").read_text()
    )
    assert "## Summary" in done.stdout
    assert len(list(tmp_path.iterdir())) <= gpu_gate.MOST_FILES


def test_every_part_is_rehearsed_with_small_cases(tmp_path):
    for rehearse in (True, False):
        for tune in (True, False):
            options = gpu_gate.argparse.Namespace(rehearse=rehearse, tune=tune, parts=None)
            plan = gpu_gate.parts(options, Where(tmp_path, tmp_path))
            names = [part.name for part in plan]
            assert names[:4] == ["machine", "tests", "exactness", "curve"] and ("tune" in names) == tune
            assert [part.name for part in plan if part.correctness] == ["tests", "exactness", "curve"]
            assert names[4:] == [
                "step", "kernels", "tokenizer", "loader", "questions", "launches", *(["tune"] if tune else [])
            ]  # fmt: skip
            # whoever comes late gets what is left; correctness and the step always have their time, and some remains
            assert sum(part.limit for part in plan if part.correctness or part.name in ("machine", "step")) < 520 - 100


def test_a_benchmark_that_is_not_there_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr(gate_plan, "ROOT", tmp_path)
    options = gpu_gate.argparse.Namespace(rehearse=True, tune=False, parts="step,tokenizer,questions")
    for part in gpu_gate.parts(options, Where(tmp_path, tmp_path)):
        assert part.missing.startswith("bench/") and part.missing.endswith("does not exist")


def test_a_part_that_does_not_exist_is_named(tmp_path):
    options = gpu_gate.argparse.Namespace(rehearse=True, tune=False, parts="kernels,nothing")
    with pytest.raises(SystemExit, match="nothing"):
        gpu_gate.parts(options, Where(tmp_path, tmp_path))
