"""throughput.csv to a figure: the ladder, a bar a rung. Never measures.

python bench/throughput_plot.py RESULTS.csv FIGURE.png
"""

import csv
import sys
from pathlib import Path

if not __package__:  # run as a script: look from the repository root, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

from bench.measure import peaks
from bench.plot import Bar, bars, pyplot


def ladder(source: Path, figure: Path) -> str | None:
    """Milliseconds a unit, and where the GPU is known the time its peak would need. Returns why there is no figure."""
    plt = pyplot()
    if isinstance(plt, str):
        return f"{plt}, then python bench/throughput_plot.py {source.name} {figure.name}"
    with source.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["median_ms"]]
    if not rows:
        return f"no figure: {source.name} has no times"
    sheet, axis = plt.subplots(figsize=(8, 0.45 * len(rows) + 1.8))
    shown = [
        Bar(r["contender"], float(r["median_ms"]), float(r["low_ms"]), float(r["high_ms"]), r["contender"] == "ours")
        for r in rows
    ]
    drawn = bars(axis, shown)
    labels = [f"{float(row['times_official']):.2f} x" if row["times_official"] else "" for row in rows]
    axis.bar_label(drawn, labels=labels, padding=4, fontsize=8)
    axis.set_xlabel("ms a unit (1 clip and 8 images), median and 20 to 80 %")
    first, known = rows[-1], peaks(rows[-1]["hardware"])
    if known and first["tflops"]:
        ceiling = float(first["tflops"]) * float(first["median_ms"]) / known[0]
        axis.axvline(ceiling, color="black", lw=0.8, ls="--")
        told = f"dashed: {ceiling:.2f} ms, the necessary FLOPs at {known[0]:g} TFLOP/s"
    else:
        told = "no ceiling is drawn: none is known for this machine"
    clips, images = first["clips"], first["images"]
    head = f"{first['hardware']}, {first['precision']}, {clips} clips + {images} images a step"
    axis.set_title(f"{head}, torch {first['torch']}, {first['date']}\n{told}", fontsize=8)
    sheet.tight_layout()
    sheet.savefig(figure, dpi=110)
    plt.close(sheet)
    return None


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python bench/throughput_plot.py RESULTS.csv FIGURE.png")
        return 2
    problem = ladder(Path(sys.argv[1]), Path(sys.argv[2]))
    if problem:
        print(problem)
    return 1 if problem else 0


if __name__ == "__main__":
    raise SystemExit(main())
