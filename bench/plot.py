"""Results files to figures. Never measures.

python bench/plot.py RESULTS.csv FIGURE.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: look from the repository root, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

from bench.measure import Row, read_rows

MOST = 12  # panels


def pyplot() -> Any:
    """matplotlib's, without a window; where it is not installed, why there is no figure."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as problem:
        return f"no figure: {problem}; pip install -c constraints.txt matplotlib"
    return plt


class Bar(NamedTuple):
    """A contender's figure, with the range in which most rounds lie."""

    name: str
    middle: float
    low: float | None
    high: float | None
    ours: bool


def bars(axis: Any, shown: Sequence[Bar]) -> Any:
    """One bar a contender, the first on top; ours in another colour."""
    middle = [bar.middle for bar in shown]
    spread = [
        [max(bar.middle - (bar.middle if bar.low is None else bar.low), 0.0) for bar in shown],
        [max((bar.middle if bar.high is None else bar.high) - bar.middle, 0.0) for bar in shown],
    ]
    colours = ["#c1440e" if bar.ours else "#7b8794" for bar in shown]
    drawn = axis.barh([bar.name for bar in shown], middle, xerr=spread, color=colours, height=0.7, error_kw={"lw": 0.8})
    axis.invert_yaxis()
    return drawn


def kernels(source: Path, figure: Path) -> str | None:
    """Forward + backward (forward alone where there is no backward) of every case, one bar a contender.

    Returns why there is no figure, None if there is one.
    """
    plt = pyplot()
    if isinstance(plt, str):
        return f"{plt}, then python bench/plot.py {source.name} {figure.name}"
    panels = _panels(read_rows(source))
    if not panels:
        return f"no figure: {source.name} has no times"
    shown = panels[:MOST]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    sheet, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, shown):
        _bars(axis, title, rows)
    left = f"; {len(panels) - MOST} more cases in {source.name}" if len(panels) > MOST else ""
    first = shown[0][1][0]
    sheet.suptitle(f"{first.hardware}, {first.dtype}, torch {first.torch}, {first.date}{left}", fontsize=9)
    sheet.tight_layout()
    sheet.savefig(figure, dpi=90)
    plt.close(sheet)
    return None


def _panels(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.median_ms is not None:
            found.setdefault(f"{row.kernel}\n{row.case}", {}).setdefault(row.mode, []).append(row)
    return [(f"{title}, {mode}", modes[mode]) for title, modes in found.items() for mode in (_mode(modes),)]


def _mode(modes: dict[str, list[Row]]) -> str:
    return "both" if "both" in modes else next(iter(modes))


def _bars(axis: Any, title: str, rows: list[Row]) -> None:
    axis.set_visible(True)
    rows = sorted(rows, key=lambda row: row.median_ms or 0.0)
    bars(axis, [Bar(r.contender, r.median_ms or 0.0, r.low_ms, r.high_ms, r.contender == "ours") for r in rows])
    axis.set_xlabel("ms, median and 20 to 80 %", fontsize=7)
    axis.set_title(title, fontsize=7)
    axis.tick_params(labelsize=7)


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python bench/plot.py RESULTS.csv FIGURE.png")
        return 2
    problem = kernels(Path(sys.argv[1]), Path(sys.argv[2]))
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
