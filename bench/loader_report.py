"""loader.csv as a page and as a picture, for people. Never measures."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.plot import Bar, bars, pyplot

if TYPE_CHECKING:
    from bench.loader import Row


def page(rows: "Sequence[Row]", remarks: Sequence[str], path: Path) -> None:
    """Writes `path`: where it was measured, one table a stream and number of workers, and the remarks below."""
    first = rows[0]
    lines = [
        "# The loader, beside what people write by hand",
        "",
        f"{first.hardware}; Python {first.python}, torch {first.torch}, {first.libraries}; {first.date}, "
        f"commit {first.commit or 'unknown'}",
        "",
        f"`{first.command}`",
    ]
    for stream, workers in dict.fromkeys((row.stream, row.workers) for row in rows):
        lines += ["", f"## {stream}, {workers} workers", ""]
        lines += [
            "| contender | a second, median and 20 to 80 % | a core's second | to the plain one | remark |",
            "|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows if (row.stream, row.workers) == (stream, workers)]
    path.write_text("\n".join([*lines, "", *(f"* {remark}" for remark in remarks)]) + "\n")


def _line(row: "Row") -> str:
    if row.median_per_s is None:
        return f"| {row.contender} | | | | {row.status}: {row.reason} |"
    speed = f"{row.median_per_s:.2f} ({row.low_per_s:.2f} to {row.high_per_s:.2f})"
    against = f"{row.against_plain:.2f}" if row.against_plain else ""
    differs = f"{row.status}: " if row.status != "ok" else ""
    return f"| {row.contender} | {speed} | {row.per_core:.2f} | {against} | {differs}{row.reason} |"


def picture(rows: "Sequence[Row]", path: Path) -> str | None:
    """Samples a second, a panel for every stream and number of workers. Returns why there is no picture."""
    plt = pyplot()
    if isinstance(plt, str):
        return plt
    timed = [row for row in rows if row.median_per_s is not None]
    panels = list(dict.fromkeys((row.stream, row.workers) for row in timed))
    if not panels:
        return "no figure: nothing was timed"
    sheet, axes = plt.subplots(len(panels), 1, figsize=(8, 2.8 * len(panels)), squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        shown = [row for row in timed if (row.stream, row.workers) == panel]
        names = ((row, row.contender.startswith("ours")) for row in shown)
        bars(axis, [Bar(r.contender, r.median_per_s or 0.0, r.low_per_s, r.high_per_s, ours) for r, ours in names])
        axis.set_xlabel(f"{panel[0]} a second, {panel[1]} workers; median and 20 to 80 %", fontsize=8)
        axis.tick_params(labelsize=8)
    sheet.suptitle(f"{rows[0].hardware}, torch {rows[0].torch}, {rows[0].date}", fontsize=8)
    sheet.tight_layout()
    sheet.savefig(path, dpi=90)
    plt.close(sheet)
    return None
