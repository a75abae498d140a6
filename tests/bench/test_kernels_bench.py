"""The kernel benchmark: what it prints where a contender, or our own exactness, fails; and that contenders compute the
same function.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import contenders, kernel_report, kernels, measure, roofline
from bench.contenders import CannotRun, Contender
from bevt_kernels import check

window_attention = importlib.import_module("bevt_kernels.window_attention")


def doubling(ours):
    """A kernel file of one line, with `ours` as the public function."""
    module = ModuleType("doubling")

    def reference(x, y):
        return 2 * x * y

    def inputs(case, dtype, device, generator):
        return tuple(torch.randn(64, generator=generator, device=device).to(dtype).requires_grad_() for _ in "xy")

    vars(module).update(reference=reference, doubling=ours, inputs=inputs, CASES=[SimpleNamespace(small=True)])
    return check.Kernel("doubling", module)


def run(monkeypatch, tmp_path, capsys, ours, others=()):
    """One run over `doubling` as if our kernel answered here. Returns (rows, Markdown, what was printed)."""
    kernel = doubling(ours)
    eager = Contender("eager", lambda _: kernel.reference)
    everybody = [Contender("ours", lambda _: check.ours(kernel)), eager, *others]
    monkeypatch.setattr(check, "kernels", lambda: [kernel])
    monkeypatch.setattr(check, "refusal", lambda *_: None)
    monkeypatch.setattr(contenders, "contenders", lambda *_: everybody)
    assert kernels.main(["--out", str(tmp_path), "--device", "cpu", "--reps", "5"]) == 0
    rows = measure.read_rows(tmp_path / "kernels.csv")
    return rows, (tmp_path / "kernels.md").read_text(), capsys.readouterr().out


def test_an_exact_kernel_gets_its_ratio(monkeypatch, tmp_path, capsys):
    rows, _, _ = run(monkeypatch, tmp_path, capsys, lambda x, y: 2 * (x * y))
    eager = {row.mode: row for row in rows if row.contender == "eager"}
    assert set(eager) == {"forward", "backward", "both"}
    assert all(row.speedup and row.rounds == 5 and row.low_ms and row.high_ms for row in eager.values())


def test_a_failed_exactness_check_withholds_the_speed_up(monkeypatch, tmp_path, capsys):
    rows, text, _ = run(monkeypatch, tmp_path, capsys, lambda x, y: 2.2 * x * y)
    assert [row.status for row in rows if row.contender == "ours"] == ["inexact"] * 3
    assert all(row.speedup is None for row in rows)
    assert "no speed-up is printed" in text and "**fails**" in text


def test_contenders_that_fail_are_printed_with_their_reason(monkeypatch, tmp_path, capsys):
    def refuses(_):
        raise CannotRun("has no bias")

    def half(x, y):
        return 2 * x * y.detach()

    others = [
        Contender("broken", lambda _: lambda x, y: x @ y[:3]),
        Contender("refusing", refuses),
        Contender("without a gradient", lambda _: half),
        Contender("rounding", lambda _: lambda x, y: (2 * x * y) * 1.1),
    ]
    rows, text, printed = run(monkeypatch, tmp_path, capsys, lambda x, y: 2 * x * y, others)
    by_name = {row.contender: row for row in rows}
    assert by_name["broken"].status == "left out" and "RuntimeError" in by_name["broken"].reason
    assert by_name["refusing"].reason == "has no bias"
    assert by_name["without a gradient"].reason == "gives no gradient for y"
    assert by_name["rounding"].status == "differs" and by_name["rounding"].median_ms
    for told in ("has no bias", "gives no gradient for y", "RuntimeError"):
        assert told in text and told in printed


def test_the_program_writes_its_files_and_ends_with_the_headline(program, tmp_path):
    arguments = ("--kernel", "window_attention", "--case", "2x3x4", "--reps", "3", "--budget", "100", "--device", "cpu")
    done = program("bench/kernels.py", "--out", tmp_path, *arguments, check=0)
    headline = done.stdout.strip().splitlines()[-1]
    assert headline.startswith("no GPU: 1 small cases timed on a CPU (1 of 1 exact)")
    text = (tmp_path / "kernels.md").read_text()
    assert text.rstrip().endswith(headline)
    rows = measure.read_rows(tmp_path / "kernels.csv")
    everybody = {row.contender for row in rows}
    assert {"ours", "eager", "SDPA math", "SDPA efficient", "SDPA cuDNN", "SDPA flash", "torch.compile"} < everybody
    assert {"FlexAttention", "xformers", "flash-attn score_mod", "NATTEN", "flash-window-attention"} < everybody
    assert all(row.reason for row in rows if row.status == "left out")
    assert all(row.median_ms for row in rows if row.contender in ("eager", "SDPA math"))
    assert all(row.median_ms is None and row.speedup is None for row in rows if row.contender == "ours")
    assert "does not support backward" in next(row.reason for row in rows if row.contender == "FlexAttention")
    figure = tmp_path / "kernels.png"
    assert figure.exists() or "no figure" in done.stdout


GEOMETRIES = [
    ((8, 14, 14), (8, 7, 7), (0, 3, 3), None, "true"),
    ((1, 7, 7), (8, 7, 7), (0, 3, 3), None, "official"),
    ((4, 7, 7), (2, 7, 7), (1, 0, 0), (0, 3, 0), "true"),
    ((2, 4, 4), (2, 2, 2), (1, 1, 1), None, "true"),
    ((2, 4, 4), (2, 2, 2), (0, 0, 0), None, "true"),
]


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_contenders_compute_the_reference(case):
    grid, window, *rest = case
    qkv = torch.randn(2, *grid, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
    table = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    arguments = (qkv, table, window, *rest)
    expected = window_attention.reference(*arguments)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (qkv, table), upstream)
    tokens = len(contenders.geometry(*arguments).rows)
    for function in (
        contenders.eager_attention,
        contenders._sdpa_padded(SDPBackend.MATH, tokens),
        contenders._sdpa_padded(SDPBackend.MATH, 64 * -(-tokens // 64)),
    ):
        out = function(*arguments)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out, (qkv, table), upstream), gradients)


def test_flex_attention_reads_the_same_bias(monkeypatch):
    # its forward runs on a CPU, uncompiled and without a gradient
    monkeypatch.setattr(contenders, "_compiled", lambda function, mode=None: function)
    arguments = (torch.randn(2, 4, 14, 14, 3, 2, 16), torch.randn(7 * 13 * 13, 2), (4, 7, 7), (0, 3, 3), None, "true")
    with torch.no_grad():
        expected = window_attention.reference(*arguments)
        for read_table in (True, False):
            found = contenders._flex(arguments, torch.device("cuda"), read_table)(*arguments)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_cross_entropy_contenders_compute_the_reference():
    module = importlib.import_module("bevt_kernels.masked_cross_entropy")
    head = torch.nn.Linear(8, 11)
    features, targets = torch.randn(3, 5, 8), torch.randint(11, (3, 5))
    everything = torch.ones(3, 5, dtype=torch.bool)
    for mask in (torch.rand(3, 5) < 0.5, None):
        expected = module.reference(features, head, targets, everything if mask is None else mask)
        for function in (contenders.all_tokens, contenders.all_tokens_static):
            torch.testing.assert_close(function(features, head, targets, mask), expected)


def test_flop_and_bytes_of_one_clip_are_those_of_the_design_study():
    qkv = torch.empty(1, 8, 56, 56, 3, 4, 32, dtype=torch.bfloat16, device="meta")
    table = torch.empty(15 * 13 * 13, 4, device="meta")
    found = roofline.work("window_attention", (qkv, table, (8, 7, 7), (0, 0, 0), None, "true"))
    assert found["forward"].flop == pytest.approx(5.04e9, rel=1e-2)
    assert found["backward"].flop == pytest.approx(12.6e9, rel=1e-2)
    assert found["forward"].bytes == pytest.approx(26.1e6, rel=0.03)
    assert found["backward"].bytes == pytest.approx(51.8e6, rel=0.03)
    assert roofline.place("window_attention", (qkv, table, (8, 7, 7), (0, 3, 3))) == (
        "1 clips of 16 frames",
        1,
        2,
        True,
    )


def test_the_stages_are_weighted_by_depth_and_one_inexact_case_withholds_the_sum():
    def found(exact=True, **place):
        work = {"forward": 1e9, "backward": 1e9, "both": 2e9}
        return kernels.Found(exact=exact, place=roofline.Place("8 clips of 16 frames", **place), flop=work, bytes=work)

    cases = {
        f"window_attention | {stage} {shifted}": found(stage=stage, blocks=blocks, shifted=shifted)
        for stage, blocks in ((1, 2), (2, 2), (3, 18), (4, 2))
        for shifted in (False, True)
        if stage < 4 or not shifted
    }

    def rows(withheld=""):
        made = []
        for name in cases:
            case = name.split(" | ")[1]
            for contender, ms in (("ours", 1.0), ("eager", 8.0), ("SDPA math", 4.0), ("SDPA efficient", 3.0)):
                ratio = None if contender == "ours" or case == withheld else ms
                row = measure.Row(kernel="window_attention", case=case, contender=contender, mode="both")
                row.median_ms, row.speedup, row.low_ms, row.high_ms = ms, ratio, ms, ms
                made.append(row)
        return made

    machine = measure.Machine("a GPU", *[""] * 9)
    text, headline = kernel_report.report(machine, rows(), cases, "cuda")
    assert "24.00 ms" in headline and "8.00x official eager" in headline and "3.00x best SDPA" in headline
    assert "no figure for torch.compile" in headline
    assert "| **official eager: eager** | | | | **8.00x** | 7.00x | 10.00x |" in text
    cases["window_attention | 3 True"].exact = False
    text, headline = kernel_report.report(machine, rows("3 True"), cases, "cuda")
    assert "1 cases inexact" in headline and "8.00x" not in headline and "no ratio over the stages" in text


def test_a_process_that_dies_is_followed_by_one_without_the_contender(tmp_path, capfd):
    program = """
import json, os, pathlib, signal, sys
path = pathlib.Path(sys.argv[1].removeprefix("--state="))
if path.exists():
    print(json.loads(path.read_text())["crashed"])
    raise SystemExit(0)
pathlib.Path(f"{path}.now").write_text("kernel | case | culprit")
os.kill(os.getpid(), signal.SIGSEGV)
"""
    assert kernels.supervise([sys.executable, "-c", program]) == 0
    assert "{'kernel | case | culprit': 'the process died of signal 11'}" in capfd.readouterr().out


def test_a_state_survives_its_file(tmp_path):
    state = kernels.State(rows=[measure.Row(kernel="k", median_ms=1.0)], done=["0 | k | c"], crashed={"a": "b"})
    state.found["k | c"] = kernels.Found(place=roofline.Place("8 clips of 16 frames", 1, 2, False))
    state.save(tmp_path / "state.json")
    assert kernels.State.load(tmp_path / "state.json") == state
