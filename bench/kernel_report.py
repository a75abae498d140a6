"""What the rows of the kernel benchmark say, as Markdown and as one headline. Never measures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bench import roofline
from bench.contenders import OURS
from bench.measure import Machine, Row

# PERFORMANCE.md section 8, columns "must" and "goal": times faster than these, forward + backward, windows of a clip
RIVALS = {
    "official eager": (("eager",), 7.0, 10.0),
    "torch.compile": (("torch.compile", "torch.compile max-autotune"), 2.5, 4.0),
    "best SDPA": (("SDPA math", "SDPA efficient", "SDPA cuDNN"), 2.0, 3.0),
    "FlexAttention": (("FlexAttention", "FlexAttention expanded bias", "FlexAttention max-autotune"), 2.0, 3.0),
}
# the same table: useful TFLOP/s of a clip's windows on an H100; share of the memory roof and times eager for N = 49
TFLOPS = {"forward": (150.0, 240.0), "backward": (120.0, 190.0)}
IMAGE_ROOF, IMAGE_EAGER = (0.5, 0.6), (4.0, 5.0)
# the same table: 15.7k rows of 1024 into 8192 ids
OUT_OF_TIME = "the time budget ended before its turn"
CROSS_ENTROPY_MS, CROSS_ENTROPY_MIB = (1.6, 1.35), 128.0


class Sum(NamedTuple):
    """Over the four stages of Swin-B, every block counted."""

    ms: float
    ratio: float | None  # over ours, each stage beside ours in the same race
    missing: tuple[str, ...]  # cases that have no figure


def report(machine: Machine, rows: Sequence[Row], found: Mapping[str, Any], device: str) -> tuple[str, str]:
    """The whole text, and its last line: the headline."""
    parts = ["# Kernels", "", machine.line(), "", f"`{machine.command}`", ""]
    if device == "cpu":
        parts += ["Small cases on a CPU: our kernels do not run here, and no line says what a GPU would do.", ""]
    else:
        parts += [
            "GPU time by CUDA events, contenders interleaved in one process, cache overwritten before each run; "
            "the host's queueing is not counted. Medians, with the 20 and 80 % quantiles; nothing is dropped.",
            "",
        ]
    sums = streams(rows, found)
    for stream, (cases, weights) in sums.items():
        parts += _stages(stream, cases, weights, rows, found)
    parts += _cross_entropy(rows)
    for name in found:
        kernel, case = name.split(" | ", 1)
        mine = [row for row in rows if (row.kernel, row.case) == (kernel, case)]
        parts += _case(kernel, case, mine, found[name])
    told = left_out(rows)
    parts += ["## Left out, and why", "", *(f"* {line}" for line in told), ""] if told else []
    headline = _headline(machine, rows, found, sums, device)
    return "\n".join([*parts, headline, ""]), headline


def left_out(rows: Sequence[Row]) -> list[str]:
    """Who did not run, with the reason, once for all the cases it holds for."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    late: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.status == "left out" and row.reason.startswith(OUT_OF_TIME):
            late[row.kernel, row.contender] = late.get((row.kernel, row.contender), 0) + 1
        elif row.status == "left out":
            cases.setdefault((row.kernel, row.contender, row.reason), []).append(row.case)
    lines = []
    for (kernel, contender, reason), where in cases.items():
        lines.append(f"{kernel}: {contender} left out of {len(where)} cases (the first: {where[0]}): {reason}")
    if late:
        told = ", ".join(f"{contender} of {kernel} in {count} cases" for (kernel, contender), count in late.items())
        lines.append(f"{OUT_OF_TIME}: {told}")
    return lines


def streams(rows: Sequence[Row], found: Mapping[str, Any]) -> dict[str, tuple[list[str], list[float]]]:
    """The cases that make up Swin-B, by stream, with the number of blocks each stands for."""
    by_stream: dict[str, list[str]] = {}
    for name, about in found.items():
        if about.place:
            by_stream.setdefault(about.place.stream, []).append(name)
    complete = {}
    for stream, names in by_stream.items():
        places = [found[name].place for name in names]
        if {p.stage for p in places} == {1, 2, 3, 4}:
            complete[stream] = (names, roofline.weights(places))
    return complete


def total(names: Sequence[str], weights: Sequence[float], rows: Sequence[Row], contender: str, mode: str) -> Sum:
    """A contender's weighted time over the cases, and how often that is ours."""
    ms, ours, missing, withheld = 0.0, 0.0, [], False
    for name, weight in zip(names, weights):
        kernel, case = name.split(" | ", 1)
        row = find(rows, kernel, case, contender, mode)
        if row is None or row.median_ms is None:
            missing.append(case)
            continue
        ms += weight * row.median_ms
        if contender == OURS:
            continue
        if row.speedup:
            ours += weight * row.median_ms / row.speedup
        else:
            withheld = True
    ratio = ms / ours if ours and not withheld and not missing else None
    return Sum(ms, ratio, tuple(missing))


def find(rows: Iterable[Row], kernel: str, case: str, contender: str, mode: str) -> Row | None:
    wanted = (kernel, case, contender, mode)
    return next((row for row in rows if (row.kernel, row.case, row.contender, row.mode) == wanted), None)


def _stages(
    stream: str, names: Sequence[str], weights: Sequence[float], rows: Sequence[Row], found: Mapping[str, Any]
) -> list[str]:
    clips = "clips" in stream
    lines = [f"## Attention over the four stages of Swin-B, {stream}", ""]
    failed = [name.split(" | ")[1] for name in names if not found[name].exact]
    if failed:
        lines += [f"Our exactness check did not pass for {', '.join(failed)}: no ratio over the stages is printed.", ""]
    lines += [
        "| contender | forward ms | backward ms | both ms | ours is faster by | must | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    everybody = list(dict.fromkeys(row.contender for row in rows if row.kernel == "window_attention"))
    for contender in everybody:
        by_mode = [total(names, weights, rows, contender, mode) for mode in ("forward", "backward", "both")]
        lines.append(
            f"| {contender} | {' | '.join(_milliseconds(s) for s in by_mode)} | {_times(by_mode[2].ratio)} | | |"
        )
    for rival, (contenders, must, goal) in RIVALS.items():
        best = _best(contenders, names, weights, rows)
        if not clips:
            must, goal = IMAGE_EAGER if rival == "official eager" else (None, None)
        told = f"{rival}: {best[0]}" if best else f"{rival}: no complete figure"
        lines.append(
            f"| **{told}** | | | | **{_times(best[1].ratio if best else None)}** | {_times(must)} | {_times(goal)} |"
        )
    lines += ["", *_rates(stream, names, weights, rows, found), ""]
    return lines


def _rates(
    stream: str, names: Sequence[str], weights: Sequence[float], rows: Sequence[Row], found: Mapping[str, Any]
) -> list[str]:
    """Ours, absolute: TFLOP/s for clips, share of the memory roof for images."""
    lines = []
    for mode in ("forward", "backward", "both"):
        mine = total(names, weights, rows, OURS, mode)
        if mine.missing or not mine.ms:
            continue
        flop = sum(w * found[name].flop[mode] for name, w in zip(names, weights))
        moved = sum(w * found[name].bytes[mode] for name, w in zip(names, weights))
        kernel, case = names[0].split(" | ", 1)
        row = find(rows, kernel, case, OURS, mode)
        share = None  # of the memory roof, per byte and millisecond
        if row and row.hbm_share and row.median_ms:
            share = row.hbm_share * row.median_ms / found[names[0]].bytes[mode]
        text = f"ours, {mode}: {flop / mine.ms / 1e9:.0f} useful TFLOP/s"
        if "clips" in stream and mode in TFLOPS:
            text += f" (must {TFLOPS[mode][0]:.0f}, goal {TFLOPS[mode][1]:.0f})"
        if share:
            text += f"; {share * moved / mine.ms:.0%} of the memory roof"
            text += "" if "clips" in stream else f" (must {IMAGE_ROOF[0]:.0%}, goal {IMAGE_ROOF[1]:.0%})"
        lines.append(f"* {text}")
    return lines


def _cross_entropy(rows: Sequence[Row]) -> list[str]:
    mine = [
        r for r in rows if (r.kernel, r.contender, r.mode) == ("masked_cross_entropy", OURS, "both") and r.median_ms
    ]
    if not mine:
        return []
    lines = ["## Masked cross-entropy, forward + backward", ""]
    for row in mine:
        extra = "not measured" if row.peak_mib is None else f"{row.peak_mib:.0f} MiB extra"
        lines.append(f"* {row.case}: {row.median_ms:.2f} ms, {extra}")
    must, goal = CROSS_ENTROPY_MS
    return [*lines, f"* 15.7k rows: must {must} ms, goal {goal} ms and at most {CROSS_ENTROPY_MIB:.0f} MB extra", ""]


def _case(kernel: str, case: str, rows: Sequence[Row], about: Any) -> list[str]:
    lines = [f"## {kernel}, {case}", ""]
    if about.verdicts:
        told = ["| tensor | error | torch's own | bound | |", "|---|---|---|---|---|"]
        for v in about.verdicts:
            verdict = "ok" if v["ok"] else "**fails**"
            told.append(f"| {v['tensor']} | {v['error']:.1e} | {v['torchs_own']:.1e} | {v['bound']:.1e} | {verdict} |")
        lines += [*told, ""]
    if not about.exact:
        lines += [f"Our exactness check did not pass ({about.refused or 'above'}): no speed-up is printed.", ""]
    lines += ["| contender | mode | ms (20 to 80 %) | peak MiB | TFLOP/s | memory roof | ours is faster by | |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row.status == "left out":
            continue
        note = " ".join(x for x in (row.status if row.status != "ok" else "", row.reason) if x).replace("|", "/")
        time = "" if row.median_ms is None else f"{row.median_ms:.3f} ({row.low_ms:.3f} to {row.high_ms:.3f})"
        memory = "not measured" if row.median_ms and row.peak_mib is None else _number(row.peak_mib, "{:.0f}")
        cells = [
            row.contender, row.mode, time, memory, _number(row.tflops, "{:.1f}"), _number(row.hbm_share, "{:.0%}"),
            _times(row.speedup), note,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    absent = dict.fromkeys(row.contender for row in rows if row.status == "left out")
    lines += ["", f"Left out: {', '.join(absent)}."] if absent else []
    return [*lines, ""]


def _headline(
    machine: Machine, rows: Sequence[Row], found: Mapping[str, Any], sums: Mapping[str, Any], device: str
) -> str:
    if device == "cpu":
        timed = len({(row.kernel, row.case) for row in rows if row.median_ms})
        exact = sum(about.exact for about in found.values())
        return (
            f"no GPU: {timed} small cases timed on a CPU ({exact} of {len(found)} exact), where no kernel "
            "answers; no speed-up is claimed"
        )
    told = []
    for stream, (names, weights) in sums.items():
        mine = total(names, weights, rows, OURS, "both")
        failed = [name for name in names if not found[name].exact]
        if failed or mine.missing:
            told.append(f"attention of {stream}: no figure, {len(failed)} cases inexact, {len(mine.missing)} not timed")
            continue
        ratios = []
        for rival, (contenders, _, _) in RIVALS.items():
            best = _best(contenders, names, weights, rows)
            ratios.append(f"{_times(best[1].ratio)} {rival}" if best and best[1].ratio else f"no figure for {rival}")
        told.append(f"attention of {stream}, Swin-B, forward + backward: {mine.ms:.2f} ms, {', '.join(ratios)}")
    if not told:
        told = [_one_case(row) for row in rows if row.contender == "eager" and row.mode in ("both", "")][:3]
    if not told:
        told = [f"{row.kernel} {row.case}: {row.status} {row.reason}" for row in rows[:1]] or ["nothing was measured"]
    return f"{machine.hardware}: {'; '.join(told)}"


def _one_case(row: Row) -> str:
    if row.median_ms is None:
        return f"{row.kernel} {row.case}: eager {row.status} ({row.reason})"
    ours = f"ours {_times(row.speedup)} faster than" if row.speedup else "no speed-up of ours over"
    return f"{row.kernel} {row.case}: {ours} eager ({row.median_ms:.3f} ms)"


def _best(
    contenders: Sequence[str], names: Sequence[str], weights: Sequence[float], rows: Sequence[Row]
) -> tuple[str, Sum] | None:
    """The quickest of several that ran every case, forward and backward in one."""
    sums = [(c, total(names, weights, rows, c, "both")) for c in contenders]
    complete = [(c, s) for c, s in sums if not s.missing]
    return min(complete, key=lambda pair: pair[1].ratio or pair[1].ms, default=None)


def _milliseconds(found: Sum) -> str:
    if not found.missing:
        return f"{found.ms:.2f}"
    return f"incomplete: {len(found.missing)} missing" if found.ms else "none"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)
