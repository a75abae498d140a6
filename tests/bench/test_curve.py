"""The loss-curve check: its law can fail, and four short runs go through it."""

import csv

import pytest

from bench import curve

FLAT = {name: [9.0, 8.0, 7.0] for name in ("float32", "reference", "fused", "another seed")}


def law(**changes: list[float]) -> tuple[bool, str]:
    names = {"seed": "another seed"}
    shifted = {"reference": [9.01, 8.01, 7.01], "another seed": [9.5, 8.5, 7.5]}
    return curve.judge(FLAT | shifted | {names.get(name, name): values for name, values in changes.items()}, 3)


def test_the_law() -> None:
    assert law(fused=[9.01, 8.02, 7.02])[0]  # less than twice as far from float32
    for bad in ([9.03, 8.03, 7.03], [9.0, 8.0, float("nan")], [9.0, 8.0, float("inf")], [8.9, 7.9, 6.9]):
        ok, sentence = law(fused=bad)
        assert not ok and sentence.endswith("FAILS")
    assert not law(fused=[9.02, 8.02, 7.02], seed=[9.01, 8.01, 7.01])[0]  # farther than another seed


def test_fewer_steps_than_asked_are_said() -> None:
    assert "3 steps (of 500: the budget was spent)" in curve.judge(FLAT, 500)[1]


def test_four_runs_on_a_cpu_where_references_answer_for_all(tmp_path, capsys, monkeypatch) -> None:
    # two models are enough to show that the roles differ where they should
    monkeypatch.setattr(curve.runtime, "INTERPRETED", True)
    roles = [role._replace(implementation="reference") for role in curve.ROLES]
    monkeypatch.setattr(curve, "ROLES", roles)
    assert curve.main(["--model", "tiny", "--steps", "2", "--out", str(tmp_path)]) == 0
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(row["reference"] == row["fused"] for row in rows)
    assert rows[0]["float32"] != rows[0]["reference"] != rows[0]["another seed"]
    assert capsys.readouterr().out.strip().endswith(": ok")


@pytest.mark.parametrize("options", [["--steps", "0"], ["--model", "huge"], ["--steps", "many"]])
def test_bad_options_are_refused(options: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        curve.main(options)
    assert ended.value.code == 2 and options[0] in capsys.readouterr().err
