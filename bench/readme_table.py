"""README's speed table, made from files in bench/results/ and from nothing else.

    python bench/readme_table.py [--check]

Files are called <what>_<hardware>_<yyyymm>.csv, what a benchmark writes under the name of the hardware its rows state;
of several the newest month counts. Every figure stands beside the hardware that gave it; what no file has is not yet
measured. --check writes nothing and exits with 1 where README says something else.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

from bevt_fast.models.video_swin import VideoSwinConfig
from bevt_fast.training import estimate
from bevt_fast.training.estimate import StreamShape

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- speed: python bench/readme_table.py -->", "<!-- /speed -->"
NOT_YET = "not yet measured"
# mean shares of the recipe's masks (SPEC 2.1, 2.3)
STREAMS = StreamShape("images", 1, 224, 0.498), StreamShape("clips", 16, 224, 0.374, tokenized=0.75)

Rows = Sequence[Mapping[str, str]]


class Found(NamedTuple):
    """One results file."""

    path: Path
    hardware: str
    date: str
    rows: Rows


class BadResults(Exception):
    """A sentence that names the file and what is wrong with it."""


def table(results: Path) -> str:
    """The block between the markers, markers included. Raises BadResults."""
    lines = [
        BEGIN,
        "| joint step of the paper, Swin-B and DALL-E's tokenizer | official or PyTorch | ours |",
        "|---|---|---|",
    ]
    lines.append(_flops())
    for what, (title, row) in WHAT.items():
        files = newest(results, what)
        measured = [_line(title, found, row(found.rows)) for found in files]
        lines += measured
        if not any(not found.hardware.startswith("CPU") for found in files):
            lines.append(f"| {title}, on a GPU | | {NOT_YET} |")
    return "\n".join([*lines, END])


def newest(results: Path, what: str) -> list[Found]:
    """For each hardware the newest file of a benchmark, GPUs first. Raises BadResults."""
    best: dict[str, tuple[str, Path]] = {}
    for path in sorted(results.glob("*.csv")):
        name = re.fullmatch(r"([a-z_]+)_([a-z0-9-]+)_(\d{4}(?:0[1-9]|1[0-2]))", path.stem)
        if name is None:
            raise BadResults(f"{path.name}: expected <what>_<hardware>_<yyyymm>.csv, e.g. kernels_h100_202611.csv")
        if name[1] == what and name[3] >= best.get(name[2], ("", path))[0]:
            best[name[2]] = (name[3], path)
    found = [read(path, hardware) for hardware, (_, path) in best.items()]
    return sorted(found, key=lambda one: (one.hardware.startswith("CPU"), one.hardware))


def read(path: Path, hardware: str) -> Found:
    """One file, whose rows must be of the hardware in its name and no rehearsal. Raises BadResults."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadResults(f"{path.name}: cannot be read: {error}") from None
    if not rows or "hardware" not in rows[0]:
        raise BadResults(f"{path.name}: has no rows with the column 'hardware'; is it what a benchmark wrote?")
    stated = {row["hardware"] or "" for row in rows}
    if len(stated) != 1:
        raise BadResults(f"{path.name}: its rows are of several machines: {', '.join(sorted(stated))}")
    device = stated.pop()
    if _plain(hardware) not in _plain(device):
        raise BadResults(f"{path.name}: its name says {hardware!r}, its rows were measured on {device!r}")
    if any("--quick" in (row.get("command") or "").split() for row in rows):
        raise BadResults(f"{path.name}: was written with --quick, which is a rehearsal; measure again without it")
    sizes = {size for row in rows for size in re.findall(r"--size[ =](\w+)", row.get("command") or "")}
    if sizes - {"base"}:
        raise BadResults(f"{path.name}: is of --size {min(sizes - {'base'})}, and the table is of Swin-B")
    return Found(path, device, (rows[0].get("date") or "")[:10], rows)


def _line(title: str, found: Found, cells: tuple[str, str]) -> str:
    where = re.sub(r"[|<>\s]+", " ", f"{found.hardware}, {found.date}").strip()
    return f"| {title}; {where} | {cells[0]} | {cells[1] or NOT_YET} |"


def _flops() -> str:
    shape = VideoSwinConfig.preset("base")
    official, ours = (
        " / ".join(f"{count(shape, stream, 'dalle', 8192).training / 1e9:.0f}" for stream in STREAMS)
        for count in (estimate.nominal_costs, estimate.costs)
    )
    return f"| training FLOPs of an image / a clip of 16 frames, mean over masks | {official} G | {ours} G |"


def _step(rows: Rows) -> tuple[str, str]:
    """Clips and images a second, MFU and peak memory."""
    cells = []
    for name in ("official", "ours"):
        row = _row(rows, contender=name)
        clips, images, mfu, peak = (_number(row, key) for key in ("clips_per_s", "images_per_s", "mfu", "peak_mib"))
        cell = f"{_rate(clips)} + {_rate(images)}" if clips and images else ""
        cell += f", MFU {mfu:.1%}" if cell and mfu else ""
        cells.append(cell + (f", {peak / 1024:.1f} GiB" if cell and peak else ""))
    faster = _number(_row(rows, contender="ours"), "times_official")
    return cells[0], cells[1] + (f", {faster:.2f} times the official rate" if cells[1] and faster else "")


def _kernels(rows: Rows) -> tuple[str, str]:
    """How many times as long as ours the others take, over all cases, forward and backward."""
    told = []
    for name in ("eager", "torch.compile"):
        times = [
            speedup
            for row in rows
            if row.get("contender") == name and row.get("mode") == "both" and row.get("kernel") == "window_attention"
            and row.get("status") == "ok" and (speedup := _number(row, "speedup"))
        ]  # fmt: skip
        told += [f"{name}: {min(times):.2f} to {max(times):.2f} times as long"] if times else []
    return "; ".join(told), "1" if told else ""


def _tokenizer(rows: Rows) -> tuple[str, str]:
    """Frames a second."""
    cells = []
    for name in ("NCHW, all at once", "ours"):
        row = _row(rows, contender=name)
        frames, median = _number(row, "frames"), _number(row, "median_ms")
        cells.append(_rate(1000 * frames / median) if frames and median else "")
    return cells[0], cells[1]


def _loader(rows: Rows) -> tuple[str, str]:
    """Clips a second, with the most workers there are."""
    cells = []
    clips = [row for row in rows if row.get("stream") == "clips" and _number(row, "median_per_s")]
    for names in (("plain PyAV DataLoader",), ("ours, DALI on the GPU", "ours, PyAV")):
        rates = [_number(row, "median_per_s") or 0.0 for row in clips if row.get("contender") in names]
        cells.append(_rate(max(rates)) if rates else "")
    return cells[0], cells[1]


# what -> title, and the cells of the official or plain contender and of ours; an empty one of ours is not measured
WHAT: dict[str, tuple[str, Callable[[Rows], tuple[str, str]]]] = {
    "throughput": ("step: clips + images a second, MFU, memory", _step),
    "kernels": ("window attention, forward + backward", _kernels),
    "tokenizer": ("tokenizer, frames a second", _tokenizer),
    "loader": ("loader, clips a second", _loader),
}


def _row(rows: Rows, **wanted: str) -> Mapping[str, str]:
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def _number(row: Mapping[str, str], key: str) -> float | None:
    """A finite number above 0; None for anything else."""
    try:
        value = float(row.get(key) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


def replaced(readme: str, block: str) -> str | None:
    """README's text with another block; None where it has not exactly one pair of markers."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        return None
    return before + block + after


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where README differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", metavar="FILE")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        text, block = options.readme.read_text(encoding="utf-8"), table(options.results)
    except (OSError, UnicodeDecodeError, BadResults) as error:
        print(f"readme_table.py: {error}")
        return 1
    new = replaced(text, block)
    if new is None:
        print(f"readme_table.py: {options.readme.name} needs the lines {BEGIN} and {END} once each, in this order")
        return 1
    if options.check and new != text:
        print(f"readme_table.py: {options.readme.name} is not what the files give; run python bench/readme_table.py")
        return 1
    if not options.check and new != text:
        options.readme.write_text(new, encoding="utf-8")
    print(f"{options.readme.name} says what the files give")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
