"""README's speed table: made of results files, each figure beside its hardware, and nothing that nobody measured."""

import csv
from pathlib import Path

import pytest

from bench import readme_table
from bench.readme_table import BEGIN, END, NOT_YET

H100 = "NVIDIA H100 80GB HBM3"
COMMON = {"hardware": H100, "date": "2026-11-20 10:00 UTC", "command": "python bench/x.py --out DIR", "status": "ok"}
STEP = [
    {"contender": "official", "clips_per_s": "45", "images_per_s": "360", "mfu": "0.14", "peak_mib": "40960",
     "times_official": "1"},
    {"contender": "ours", "clips_per_s": "144", "images_per_s": "1152", "mfu": "0.4", "peak_mib": "13312",
     "times_official": "3.2"},
]  # fmt: skip
KERNEL = {"kernel": "window_attention", "mode": "both"}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def put(folder: Path, name: str, *rows: dict[str, str], **common: str) -> None:
    full = [COMMON | common | row for row in rows]
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in full for key in row)))
        writer.writeheader()
        writer.writerows(full)


def readme(tmp_path: Path, inside: str) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# A title\n\nwords\n\n{inside}\n\nmore words\n")
    return path


def test_without_files_every_line_is_not_yet_measured(results: Path) -> None:
    lines = readme_table.table(results).splitlines()
    assert lines[0] == BEGIN and lines[-1] == END
    assert "| 158 / 1880 G | 148 / 1512 G |" in lines[3]  # of shapes, no measurement
    assert len(lines[4:-1]) == len(readme_table.WHAT)
    assert all(line.endswith(f"on a GPU | | {NOT_YET} |") for line in lines[4:-1])
    assert readme_table.table(results / "not there") == "\n".join(lines)


def test_figures_stand_beside_the_hardware_that_gave_them(results: Path) -> None:
    put(results, "throughput_h100_202611", *STEP)
    put(results, "throughput_cpu_202611", *STEP, hardware="CPU of some kind, 1 threads")
    text = readme_table.table(results)
    assert f"; {H100}, 2026-11-20 | 45 + 360, MFU 14.0%, 40.0 GiB | 144 + 1,152, MFU 40.0%, 13.0 GiB, 3.20" in text
    assert text.index("; NVIDIA H100") < text.index("; CPU of some kind")
    assert f"step: clips + images a second, MFU, memory, on a GPU | | {NOT_YET}" not in text


def test_a_cpu_is_no_gpu(results: Path) -> None:
    put(results, "throughput_cpu_202611", *STEP, hardware="CPU of some kind, 1 threads")
    assert f"memory, on a GPU | | {NOT_YET} |" in readme_table.table(results)


def test_every_benchmark_has_its_cells(results: Path) -> None:
    rows = [
        {"contender": "eager", "speedup": "7.5"},
        {"contender": "eager", "speedup": "9"},
        {"contender": "torch.compile", "speedup": "3"},
        {"contender": "eager", "speedup": "90", "status": "differs"},
    ]
    put(results, "kernels_h100_202611", *(KERNEL | row for row in rows))
    put(results, "tokenizer_h100_202611", {"contender": "ours", "frames": "256", "median_ms": "32"},
        {"contender": "NCHW, all at once", "frames": "256", "median_ms": "64"})  # fmt: skip
    put(results, "loader_h100_202611", {"stream": "clips", "contender": "ours, PyAV", "median_per_s": "12"},
        {"stream": "clips", "contender": "plain PyAV DataLoader", "median_per_s": "10"},
        {"stream": "images", "contender": "ours, PyAV", "median_per_s": "999"})  # fmt: skip
    text = readme_table.table(results)
    for cells in (
        "| eager: 7.50 to 9.00 times as long; torch.compile: 3.00 to 3.00 times as long | 1 |",
        "| 4,000 | 8,000 |", "| 10 | 12 |",
    ):  # fmt: skip
        assert cells in text


def test_the_newest_month_counts(results: Path) -> None:
    for month, clips in (("202512", "1"), ("202611", "2"), ("202601", "3")):
        put(results, f"throughput_h100_{month}", *(row | {"clips_per_s": clips} for row in STEP))
    assert "| 2 + 360" in readme_table.table(results) and "3 + 360" not in readme_table.table(results)


@pytest.mark.parametrize("value", ["nan", "inf", "-3", "0", "", "fast", "1e999", "| 99 |"])
def test_what_is_no_figure_is_not_printed(value: str, results: Path) -> None:
    put(results, "throughput_h100_202611", STEP[0], STEP[1] | {"clips_per_s": value})
    assert readme_table.table(results).splitlines()[4].endswith(f"| {NOT_YET} |")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("throughput_h100_202613", {}, "<yyyymm>"),
        ("throughput-h100", {}, "<what>_<hardware>_<yyyymm>"),
        ("throughput_h200_202611", {}, "its name says 'h200', its rows were measured on 'NVIDIA H100"),
        ("throughput_h100_202611", {"hardware": "CPU of some kind"}, "measured on 'CPU of some kind'"),
        ("throughput_h100_202611", {"command": "python bench/throughput.py --quick"}, "rehearsal"),
        ("throughput_h100_202611", {"command": "python bench/throughput.py --size tiny"}, "--size tiny"),
    ],
)
def test_a_wrong_file_is_named(
    name: str, changes: dict[str, str], words: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(results, name, *STEP, **changes)
    path = readme(tmp_path, f"{BEGIN}\n{END}")
    before = path.read_bytes()
    assert readme_table.main(["--readme", str(path), "--results", str(results)]) == 1
    said = capsys.readouterr().out
    assert words in said and said.count("\n") == 1 and path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"\xff\xfe\x00", b"hardware\n" + H100.encode() + b"\nCPU\n"])
def test_a_file_that_no_benchmark_wrote(content: bytes, results: Path) -> None:
    (results / "loader_h100_202611.csv").write_bytes(content)
    with pytest.raises(readme_table.BadResults, match="loader_h100_202611"):
        readme_table.table(results)


def test_hardware_cannot_break_out_of_its_cell(results: Path) -> None:
    put(results, "throughput_h100_202611", *STEP, hardware=f"{H100} | 9 |\n<!-- /speed -->")
    line = readme_table.table(results).splitlines()[4]
    assert line.count("|") == 4 and "<" not in line


def test_check_sees_a_changed_figure_and_writing_mends_it(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(results, "throughput_h100_202611", *STEP)
    path = readme(tmp_path, f"{BEGIN}\nold\n{END}")
    arguments = ["--readme", str(path), "--results", str(results)]
    assert readme_table.main([*arguments, "--check"]) == 1 and "old" in path.read_text()
    assert readme_table.main(arguments) == 0 and readme_table.main([*arguments, "--check"]) == 0
    text = path.read_text()
    assert text.startswith("# A title\n\nwords\n\n<!--") and text.endswith("-->\n\nmore words\n")
    path.write_text(text.replace("3.20 times", "3.30 times"))
    assert readme_table.main([*arguments, "--check"]) == 1
    assert "python bench/readme_table.py" in capsys.readouterr().out


@pytest.mark.parametrize("inside", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_readme_needs_its_markers_once(inside: str, results: Path, tmp_path: Path, capsys) -> None:
    path = readme(tmp_path, inside)
    assert readme_table.main(["--readme", str(path), "--results", str(results)]) == 1
    assert "once each" in capsys.readouterr().out and path.read_text() == readme(tmp_path, inside).read_text()


def test_a_readme_that_is_not_there_is_one_sentence(results: Path, tmp_path: Path, capsys) -> None:
    assert readme_table.main(["--readme", str(tmp_path / "none.md"), "--results", str(results)]) == 1
    assert capsys.readouterr().out.count("\n") == 1


def test_the_readme_says_what_the_results_give() -> None:
    root = Path(readme_table.__file__).resolve().parents[1]
    assert readme_table.table(root / "bench" / "results") in (root / "README.md").read_text()
