"""What each kernel launch of a fused call costs, alone; with --tune, whether other launch settings would be quicker.

    python bench/launches.py [--kernel NAME] [--case TEXT] [--tune] [--budget SECONDS] [--small]

The events stand around every launch inside one forward and backward pass, with the queue filled beforehand. Between the
sum of the launches and the whole call stand allocations, small torch operations and the gaps between kernels.
"""

import argparse
import contextlib
import importlib
import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a script: look from the repository root and kernels/, not from bench/
    root = Path(__file__).resolve().parents[1]
    sys.path[:1] = [str(root), str(root / "kernels")]

import torch

from bench import roofline
from bench.measure import Trial, quantiles, race
from bevt_kernels import check, runtime

ROUNDS = 20
# module constants that change the order or the number of programs and nothing else; a kernel module's own OFFERS,
# name -> values, goes before these
OFFERS: dict[str, tuple[int, ...]] = {"GROUP": (132, 264, 396, 528, 792), "PROGRAMS": (264, 528, 800, 1600, 3200)}
SETTINGS = [(warps, stages) for warps in (4, 8) for stages in (1, 2, 3)]


class Start(NamedTuple):
    """One launch: its kernel, the milliseconds of each round, and FLOP per useful score where the kernel says so."""

    name: str
    samples: list[float]
    flops: float | None
    settings: tuple[int, int]  # warps, stages


@contextlib.contextmanager
def replaced(launch: Callable[..., None]) -> Iterator[None]:
    """`runtime.launch` replaced in every module of bevt_kernels that holds it."""
    original = runtime.launch
    holders = [m for name, m in sys.modules.items() if name.startswith("bevt_kernels") and _holds(m, original)]
    for module in holders:
        vars(module)["launch"] = launch
    try:
        yield
    finally:
        for module in holders:
            vars(module)["launch"] = original


def starts(
    call: Callable[[], object], device: torch.device, rounds: int, settings: dict[str, tuple[int, int]] | None = None
) -> list[Start]:
    """Time every launch of a call; `settings` gives other warps and stages to some kernels, by name."""
    original, found = runtime.launch, []
    order: list[tuple[str, Any, tuple[int, int]]] = []
    clocks: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        name = getattr(kernel, "__name__", str(kernel)).lstrip("_")
        warps, stages = (settings or {}).get(name, (options.pop("num_warps", 4), options.pop("num_stages", 2)))
        options |= {"num_warps": warps, "num_stages": stages}
        order.append((name, options.get("inner"), (warps, stages)))
        clocks.append(_mark(device))
        original(kernel, grid, *arguments, **options)
        clocks.append(_mark(device))

    with replaced(launch):
        for number in range(rounds + 2):  # two to compile and to warm up
            order.clear()
            clocks.clear()
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda._sleep(int(2e9 * 5e-3))  # the host queues the whole call meanwhile
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number <= 2 and number <= rounds:  # the first call may also build what the others find in a cache
                found = [Start(name, [], getattr(inner, "flops", None), used) for name, inner, used in order]
            if (number >= 2 or rounds == 1) and len(order) == len(found):
                for n, start in enumerate(found):
                    start.samples.append(_between(clocks[2 * n], clocks[2 * n + 1], device))
    return found


def table(kernel: check.Kernel, case: Any, dtype: torch.dtype, device: torch.device, rounds: int) -> Iterator[str]:
    """The launches of one case as lines of text."""
    arguments = kernel.draw(case, dtype, device)
    call = _call(kernel, arguments)
    scores = _scores(kernel, arguments)
    yield f"{kernel.name} {case}"
    total = 0.0
    for start in starts(call, device, rounds):
        ms = quantiles(start.samples).median
        total += ms
        rate = f"{start.flops * scores / ms / 1e9:8.1f} TFLOP/s" if start.flops and scores and ms else ""
        warps, stages = start.settings
        yield f"  {start.name:<20} {ms * 1e3:10.1f} us  {rate:<18} {warps} warps, {stages} stages"
    yield f"  {'all launches':<20} {total * 1e3:10.1f} us"
    if device.type == "cuda":
        held, free = (_whole(call, device, rounds, hold) for hold in (True, False))
        yield f"  {'the whole call':<20} {held * 1e3:10.1f} us on the GPU, {free * 1e3:.1f} us with its host's gaps"


def tune(
    kernel: check.Kernel, case: Any, dtype: torch.dtype, device: torch.device, rounds: int, left: Callable[[], float]
) -> Iterator[str]:
    """The quickest launch settings and module constants of one case, beside the shipped ones."""
    call = _call(kernel, kernel.draw(case, dtype, device))
    shipped = {start.name: start for start in starts(call, device, rounds)}
    yield f"{kernel.name} {case}"
    for name, start in shipped.items():
        if start.flops is None:
            continue
        best, told = quantiles(start.samples).median, "shipped"
        yield f"  {name}: {start.settings[0]} warps, {start.settings[1]} stages (shipped) {best * 1e3:.1f} us"
        for warps, stages in SETTINGS:
            if (warps, stages) == start.settings or left() < 0:
                continue
            try:
                tried = starts(call, device, rounds, {name: (warps, stages)})
                ms = quantiles(next(s for s in tried if s.name == name).samples).median
            except Exception as problem:
                yield f"    {warps} warps, {stages} stages: {check.one_line(problem)[:120]}"
                if check.sticky(str(problem)):
                    raise
                continue
            if ms < best:
                best, told = ms, f"{warps} warps, {stages} stages"
            yield f"    {warps} warps, {stages} stages: {ms * 1e3:.1f} us"
        yield f"    quickest: {told}, {best * 1e3:.1f} us"
    for module, constant, values in _constants():
        if left() < 0:
            return
        yield f"  {_with_constants(module, constant, values, call, device, rounds, left)}"


def _with_constants(
    module: Any, constant: str, values: Sequence[int], call: Callable[[], object], device: torch.device, rounds: int,
    left: Callable[[], float],
) -> str:  # fmt: skip
    """All launches of a call under other values of one module constant."""
    before, found = getattr(module, constant), {}
    try:
        for value in dict.fromkeys((before, *values)):
            if left() < 0:
                break
            setattr(module, constant, value)
            _forget(module)
            found[value] = sum(quantiles(start.samples).median for start in starts(call, device, rounds))
    finally:
        setattr(module, constant, before)
        _forget(module)
    times = ", ".join(f"{value}: {ms * 1e3:.1f}" for value, ms in found.items())
    return f"{module.__name__.split('.')[-1]}.{constant} (shipped {before}), us of all launches: {times}"


def _constants() -> list[tuple[Any, str, tuple[int, ...]]]:
    found = []
    for name, module in sorted(sys.modules.items()):
        if name.startswith("bevt_kernels.window"):
            offers = {**OFFERS, **getattr(module, "OFFERS", {})}
            defined = inspect.getsource(module)
            # only where it is defined, not where it is imported
            own = {constant: v for constant, v in offers.items() if f"\n{constant} =" in defined}
            found += [(module, constant, tuple(values)) for constant, values in own.items()]
    return found


def _forget(module: Any) -> None:
    """Empty the caches that may hold what followed from a constant."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _call(kernel: check.Kernel, arguments: Sequence[Any]) -> Callable[[], object]:
    _, upstream = check.evaluate(kernel.reference, kernel.reference, arguments)
    function = check.ours(kernel, fused=True)
    return lambda: check.evaluate(function, kernel.reference, arguments, upstream)


def _scores(kernel: check.Kernel, arguments: Sequence[Any]) -> float:
    """Useful elements of the score matrices; 0 for a kernel that has none."""
    if kernel.name != "window_attention":
        return 0.0
    return roofline.work(kernel.name, arguments)["forward"].flop / (4 * arguments[0].shape[-1])


def _whole(call: Callable[[], object], device: torch.device, rounds: int, hold: bool) -> float:
    return quantiles(race({"call": Trial(lambda _: call())}, device, rounds, hold=hold).samples["call"]).median


def _holds(module: Any, launch: Any) -> bool:
    return getattr(module, "launch", None) is launch


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begin: Any, end: Any, device: torch.device) -> float:
    return (end - begin) * 1e3 if device.type == "cpu" else begin.elapsed_time(end)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kernel", metavar="NAME", default="")
    parser.add_argument("--case", metavar="TEXT", default="")
    parser.add_argument("--dtype", choices=tuple(check.DTYPES), default="bf16")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--most", type=int, metavar="N", help="at most so many cases of a kernel")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS")
    options = parser.parse_args(arguments)
    gpu = torch.cuda.is_available() and not runtime.INTERPRETED
    if not gpu and not runtime.INTERPRETED:
        print("launches.py: needs an NVIDIA GPU, or TRITON_INTERPRET=1 for a rehearsal")
        return 1
    device = torch.device("cuda" if gpu else "cpu")
    started = time.perf_counter()
    importlib.import_module("bevt_kernels")

    def left() -> float:
        return options.budget - (time.perf_counter() - started)

    failed = 0
    for kernel in check.kernels():
        cases = kernel.cases(small=True) if not gpu or options.small else kernel.real()
        cases = [case for case in cases if options.case in str(case) and options.kernel in ("", kernel.name)]
        if options.tune and kernel.name != "window_attention":
            continue
        for number, case in enumerate(cases[: options.most]):
            if left() < 0:
                print(f"{kernel.name}: {len(cases[: options.most]) - number} cases left out, the time budget is spent")
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    rounds = ROUNDS if gpu else 1
                    given = (kernel, case, check.DTYPES[options.dtype], device, rounds)
                    for line in tune(*given, left) if options.tune else table(*given):
                        print(line, flush=True)
                except Exception as problem:
                    failed += 1
                    print(f"{kernel.name} {case}: {check.one_line(problem)}", flush=True)
                    if check.sticky(str(problem)):
                        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
