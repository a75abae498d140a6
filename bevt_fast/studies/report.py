"""What a study has found: results.csv, report.md, a bar chart for each table. Numbers stand as measured, in the order
that the study names; whether a difference exceeds the spread is said of every pair.
"""

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bevt_fast.studies.config import SCRATCH, Study, Table
from bevt_fast.studies.jobs import Job

ORDERS = {"normal": "normal", "single_frame": "single frame", "shuffled": "random shuffling"}
STREAMS = ("images", "clips")
COLUMNS = ("arm", "evaluation", "seed", "measure", "value", "seconds", "directory")


class Cell(NamedTuple):
    """The values of one row and column, one a seed, as shares."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds (n - 1); 0 of one seed."""
        n = len(self.values)
        return math.sqrt(sum((value - self.mean) ** 2 for value in self.values) / (n - 1)) if n > 1 else 0.0

    def __str__(self) -> str:
        if not self.values:
            return "-"
        said = f"{100 * self.mean:.1f}"
        return f"{said} ± {100 * self.spread:.1f}" if len(self.values) > 1 else said


class Grid(NamedTuple):
    """A table before it is written: `cells[row][column]`."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: list[list[Cell]]


def write(study: Study, jobs: Sequence[Job], failed: dict[str, str], out: Path) -> list[str]:
    """Writes everything that is known by now under `out`; returns what could not be made. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    done = [job for job in jobs if job.is_done]
    _write_rows(out / "results.csv", done)
    grids = [_pretraining(study, done), *(_grid(table, done) for table in study.tables)]
    grids = [grid for grid in grids if any(cell.values for row in grid.cells for cell in row)]
    pictures = [f"table_{number}.png" for number in range(len(grids))]
    missing = draw(grids, [out / name for name in pictures])
    (out / "report.md").write_text(_page(study, grids, [] if missing else pictures, failed))
    return missing


def _write_rows(path: Path, done: Sequence[Job]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for job in done:
            record = job.record
            for measure, value in record["scores"].items():
                writer.writerow((job.arm, job.evaluation or "", job.seed, measure, value, record["seconds"], job.place))


def _cell(done: Sequence[Job], arm: str, evaluation: str | None, measure: str) -> Cell:
    found = [job.record["scores"] for job in done if (job.arm, job.evaluation) == (arm, evaluation)]
    return Cell(tuple(scores[measure] for scores in found if measure in scores))


def _pretraining(study: Study, done: Sequence[Job]) -> Grid:
    """How well each encoder guesses the hidden tokens of samples it was not trained on."""
    arms = list(study.pretraining)
    cells = [[_cell(done, arm, None, stream) for stream in STREAMS] for arm in arms]
    return Grid("Masked tokens named right, held-out samples (%)", arms, list(STREAMS), cells)


def _grid(table: Table, done: Sequence[Job]) -> Grid:
    orders = ORDERS if table.temporal else {"normal": ""}
    columns = [(name, order) for name in table.columns for order in orders]
    cells = [[_cell(done, arm, *column) for column in columns] for arm in table.rows]
    heads = [f"{name}, {ORDERS[order]}" if table.temporal else name for name, order in columns]
    return Grid(table.title, table.rows, heads, cells)


def _page(study: Study, grids: Sequence[Grid], pictures: Sequence[str], failed: dict[str, str]) -> str:
    """report.md."""
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        "# Report of the study",
        "",
        f"Mean ± standard deviation over the seeds ({seeds}), in per cent, as measured. A difference is said to exceed "
        "the spread if every seed of one arm is above every seed of the other.",
        f"`{SCRATCH}` starts from random weights; with a frozen encoder it is what random features give.",
    ]
    for number, grid in enumerate(grids):
        lines += ["", f"## {grid.title}", "", *markdown(grid), "", *differences(grid)]
        lines += ["", f"![{grid.title}]({pictures[number]})"] if pictures else []
    if failed:
        lines += ["", "## Not there", "", *(f"* {name}: {reason}" for name, reason in failed.items())]
    return "\n".join(lines) + "\n"


def markdown(grid: Grid) -> list[str]:
    """The table; a cell without all the seeds of its table says how many it has."""
    most = max(len(cell.values) for row in grid.cells for cell in row)
    lines = ["| arm | " + " | ".join(grid.columns) + " |", "|---|" + "---|" * len(grid.columns)]
    for name, row in zip(grid.rows, grid.cells):
        said = [f"{cell} (n = {n})" if 0 < (n := len(cell.values)) < most else str(cell) for cell in row]
        lines.append(f"| {name} | " + " | ".join(said) + " |")
    return lines


def differences(grid: Grid) -> list[str]:
    """A sentence for each column: which differences between arms exceed the spread over the seeds."""
    lines = []
    for column, head in enumerate(grid.columns):
        cells = {name: row[column] for name, row in zip(grid.rows, grid.cells) if len(row[column].values) > 1}
        if len(cells) < 2:
            continue
        found = []
        for one, other in itertools.permutations(cells, 2):
            if min(cells[one].values) > max(cells[other].values):
                found.append(f"{one} > {other} (+{100 * (cells[one].mean - cells[other].mean):.1f})")
        pairs = len(cells) * (len(cells) - 1) // 2
        said = f"{', '.join(found)}; the other {pairs - len(found)} do not" if found else f"none of {pairs}"
        lines.append(f"* {head}: differences that exceed the spread: {said}.")
    return lines


def draw(grids: Sequence[Grid], paths: Sequence[Path]) -> list[str]:
    """Bars with the spread, and a point for each seed; says so where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no pictures: matplotlib is not installed; pip install matplotlib"]
    for grid, path in zip(grids, paths):
        figure = Figure(figsize=(2.5 + 0.34 * len(grid.rows) * (len(grid.columns) + 1), 4.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(grid.columns)
        for column, head in enumerate(grid.columns):
            cells = [row[column] for row in grid.cells]
            there = [(k + (column + 0.5) * width - 0.4, cell) for k, cell in enumerate(cells) if cell.values]
            places, means = [x for x, _ in there], [100 * cell.mean for _, cell in there]
            axes.bar(places, means, width * 0.92, yerr=[100 * c.spread for _, c in there], capsize=2, label=head)
            points = [(x, 100 * value) for x, cell in there for value in cell.values]
            axes.scatter(*zip(*points), s=7, color="black", zorder=3) if points else None
        axes.set_xticks(range(len(grid.rows)), grid.rows, rotation=30, ha="right")
        axes.set(title=grid.title, ylabel="%", ylim=(0, 103))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
        figure.savefig(path, dpi=110)
    return []
