"""What the step benchmark found, as rows, as Markdown and as one headline. Never measures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import Machine, peaks, quantiles, write_rows
from bench.throughput_contenders import COMPILED, KINDER, LADDER, OFFICIAL, OURS
from bench.throughput_work import Work

# PERFORMANCE 0, point 5; SPEC 8.2
CLIPS, IMAGES, V100_DAYS = 36.1e6, 1.025e9, 256


HEAD = (
    "contender", "ms a unit", "20 to 80 %", "units/s", "clips/s", "images/s", "times official",
    "times the rung before", "times official, best rounds", "times official in CPU time",
    "peak MiB", "TFLOP/s", "MFU", "of a matmul",
)  # fmt: skip


@dataclass
class Result:
    """One contender."""

    name: str
    reason: str = ""  # why it cannot run
    note: str = ""
    samples: list[float] = field(default_factory=list)  # ms a step
    busy: list[float] = field(default_factory=list)  # ms of all this process's threads
    gate_s: float | None = None
    peak_mib: float | None = None
    before_mib: float | None = None
    parts: dict[str, float] = field(default_factory=dict)  # ms
    waiting: float | None = None  # share of the step in which a GPU runs no kernel


@dataclass
class Row(Machine):
    """One line of throughput.csv; empty where it does not apply or was not measured."""

    benchmark: str = "throughput"
    contender: str = ""
    rung: int | None = None  # of the ladder, from 0
    status: str = "ok"  # ok, cannot run
    reason: str = ""
    precision: str = ""
    clips: int | None = None  # of a step
    images: int | None = None
    median_ms: float | None = None  # a unit
    low_ms: float | None = None
    high_ms: float | None = None
    best_ms: float | None = None
    rounds: int | None = None
    units_per_s: float | None = None
    clips_per_s: float | None = None
    images_per_s: float | None = None
    times_official: float | None = None  # median over the rounds
    times_before: float | None = None  # than the rung before
    best_times_official: float | None = None  # the best round of each: what neighbours on the machine disturb least
    cpu_ms: float | None = None  # a unit, of all threads of the host
    cpu_times_official: float | None = None
    peak_mib: float | None = None
    before_mib: float | None = None
    tflops: float | None = None  # on necessary FLOPs
    mfu: float | None = None
    of_matmul: float | None = None
    loss_difference: float | None = None
    token_agreement: float | None = None
    first_steps_s: float | None = None  # the gate's, compiling included
    parts: str = ""
    waiting: float | None = None


def task(work: Work) -> str:
    """What a step is."""
    config = work.config
    size = config.model.size if isinstance(config.model.size, str) else f"width {config.model.size.embed_dim}"
    counts = " and ".join(f"{work.count(s.name)} {s.name} of {s.frames} x {s.side}^2" for s in work.streams)
    hidden = ", ".join(f"{s.hidden:.0%} of the cells of {s.name}" for s in work.streams)
    return (
        f"a step: {counts}, Swin {size}, {config.train.precision}, drop path {config.model.drop_path:g}; hidden are "
        f"{hidden}"
    )


def ratio(slow: Result | None, quick: Result | None) -> float | None:
    """How often the one takes the other's time: the median over the rounds, in each of which both took a turn."""
    if slow is None or quick is None or not slow.samples or not quick.samples:
        return None
    return quantiles([a / b for a, b in zip(slow.samples, quick.samples)]).median


def before(name: str, results: Mapping[str, Result]) -> Result | None:
    """The rung below that could run; None for what is on no ladder."""
    if name not in LADDER:
        return None
    below = [results[rung] for rung in LADDER[: LADDER.index(name)] if results[rung].samples]
    return below[-1] if below else None


def rows(machine: Machine, work: Work, results: Mapping[str, Result], gate: Any, matmul: float | None) -> list[Row]:
    """One a contender, in the order of the ladder."""
    known, found = asdict(machine), []
    for name, result in results.items():
        row = Row(contender=name, precision=work.config.train.precision, reason=result.reason or result.note, **known)
        row.rung = LADDER.index(name) if name in LADDER else None
        row.clips, row.images = work.count("clips"), work.count("images")
        row.status = "ok" if result.samples else "cannot run"
        row.peak_mib, row.before_mib = result.peak_mib, result.before_mib
        row.loss_difference, row.token_agreement = gate.worst.get(name), gate.agreement.get(name)
        row.first_steps_s, row.waiting = result.gate_s, result.waiting
        total = sum(result.parts.values())
        row.parts = ", ".join(f"{part} {value / total:.1%}" for part, value in result.parts.items()) if total else ""
        if result.samples:
            _speeds(row, result, work, results, matmul)
        found.append(row)
    return found


def _speeds(row: Row, result: Result, work: Work, results: Mapping[str, Result], matmul: float | None) -> None:
    time, units = quantiles(result.samples), work.units
    row.median_ms, row.low_ms, row.high_ms = (value / units for value in time[:3])
    row.rounds, row.best_ms = time.rounds, min(result.samples) / units
    row.units_per_s = 1e3 * units / time.median
    row.clips_per_s, row.images_per_s = (1e3 * work.count(stream) / time.median for stream in ("clips", "images"))
    row.times_official = ratio(results[OFFICIAL], result)
    row.times_before = ratio(before(result.name, results), result)
    if results[OFFICIAL].samples:
        row.best_times_official = min(results[OFFICIAL].samples) / min(result.samples)
    row.cpu_ms = quantiles(result.busy).median / units
    if results[OFFICIAL].busy:
        row.cpu_times_official = quantiles([a / b for a, b in zip(results[OFFICIAL].busy, result.busy)]).median
    flops = work.flops()
    if flops:
        row.tflops = flops[0] / time.median / 1e9
        peak = peaks(row.hardware)
        row.mfu = row.tflops / peak[0] if peak else None
        row.of_matmul = row.tflops / matmul if matmul else None


def headline(work: Work, results: Mapping[str, Result]) -> str:
    """Ours against the three that matter."""
    mine, told = results[OURS], []
    for name, words in ((OFFICIAL, "the official step"), (KINDER, "the kinder one"), (COMPILED, "the compiled one")):
        times = ratio(results[name], mine)
        told.append(f"{times:.2f} x {words}" if times else f"{words} not timed")
    official = results[OFFICIAL].peak_mib
    share = (
        f"{mine.peak_mib / official:.2f} of its peak memory" if official and mine.peak_mib else "memory not measured"
    )
    ms = quantiles(mine.samples).median / work.units
    return f"ours: {', '.join(told)}, {share}; {ms:.4g} ms a unit ({work.config.train.precision}, {work.device.type})"


def recipe(work: Work, mine: Result, images_per_s: float, hardware: str) -> str:
    """The days both stages take at the measured rates, beside the paper's."""
    joint = CLIPS / (1e3 * work.count("clips") / quantiles(mine.samples).median) / 86400
    first = IMAGES / images_per_s / 86400
    told = f" (the paper: {V100_DAYS} V100-days)" if work.config.model.size == "base" else ""
    return (
        f"Both stages on one {hardware}: {joint:.2f} days for {CLIPS / 1e6:.1f} M clips with 8 images each, "
        f"{first:.2f} for {IMAGES / 1e9:.3f} G images alone at {images_per_s:.0f} a second, together "
        f"{joint + first:.2f}{told}; without reading data."
    )


def write(
    out: Path, machine: Machine, work: Work, results: Mapping[str, Result], gate: Any, extra: Mapping[str, Any]
) -> str:
    """throughput.csv and throughput.md; returns the headline."""
    found = rows(machine, work, results, gate, extra.get("matmul"))
    write_rows(out / "throughput.csv", found, Row)
    said = headline(work, results)
    (out / "throughput.md").write_text(text(machine, work, found, results, gate, extra) + f"\n{said}\n")
    return said


def _n(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def text(
    machine: Machine, work: Work, found: Sequence[Row], results: Mapping[str, Result], gate: Any,
    extra: Mapping[str, Any],
) -> str:  # fmt: skip
    """The report."""
    lines = ["# The training step", "", machine.line(), "", f"`{machine.command}`", "", task(work) + ".", ""]
    lines += [*(f"* {note}" for note in work.notes), "", gate.text() + ".", ""]
    lines += [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in found:
        if row.status != "ok":
            lines.append(f"| {row.contender} | cannot run: {row.reason} |{' |' * (len(HEAD) - 2)}")
            continue
        cells = [
            row.contender, _n(row.median_ms, ".1f"), f"{_n(row.low_ms, '.1f')} to {_n(row.high_ms, '.1f')}",
            _n(row.units_per_s, ".4g"), _n(row.clips_per_s, ".4g"), _n(row.images_per_s, ".4g"),
            _n(row.times_official), _n(row.times_before), _n(row.best_times_official), _n(row.cpu_times_official),
            _n(row.peak_mib, ".0f"), _n(row.tflops, ".3g"),
            _n(row.mfu, ".1%"), _n(row.of_matmul, ".1%"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    rounds, flops, matmul = next((row.rounds for row in found if row.rounds), 0), work.flops(), extra.get("matmul")
    lines += [
        "",
        f"{rounds} rounds; a unit is one clip and eight images. Ratios are medians over the rounds, in each of which "
        "every contender took one step from the same weights; nothing is dropped.",
    ]
    if flops and matmul:
        lines.append(
            f"Necessary are {flops[0] / work.units / 1e12:.3f} TFLOP a unit, nominal (official) "
            f"{flops[1] / work.units / 1e12:.3f}; TFLOP/s and MFU count the necessary ones. A large matmul reached "
            f"{matmul:.3g} TFLOP/s in this run."
        )
    lines += [f"{name}: {result.note}." for name, result in results.items() if result.note]
    return "\n".join([*lines, *_memory(results, work), *_parts(results), *extra.get("lines", []), ""])


def _memory(results: Mapping[str, Result], work: Work) -> list[str]:
    known = [result for result in results.values() if result.peak_mib]
    if not known:
        return []
    if work.device.type == "cuda":
        return [
            "",
            "Peak memory is torch's own count of a step in a fresh process: weights, optimizer and activations.",
        ]
    libraries = ", ".join(f"{r.name} {r.before_mib:.0f}" for r in known if r.before_mib)
    return [
        "",
        "Peak memory is the resident set of a fresh process at its highest in the second step: Python and the "
        f"libraries (before anything was built, MiB: {libraries}), tokenizer, batch, weights, gradients, moments and "
        "activations.",
    ]


def _parts(results: Mapping[str, Result]) -> list[str]:
    waiting = ", ".join(f"{r.name} {r.waiting:.1%}" for r in results.values() if r.waiting is not None)
    idle = ["", f"Share of the step in which the GPU runs no kernel: {waiting}."] if waiting else []
    names = list(dict.fromkeys(part for result in results.values() for part in result.parts))
    if not names:
        return []
    lines = ["", "## Where the time goes", "", "One more step each, not timed for speed.", ""]
    lines += [f"| contender | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for name, result in results.items():
        total = sum(result.parts.values())
        if total:
            lines.append(f"| {name} | {' | '.join(f'{result.parts.get(part, 0.0) / total:.1%}' for part in names)} |")
    return [*lines, *idle]
