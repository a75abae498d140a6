"""Where the time of a step goes: one step with marks on its parts, and a profiler's trace of another.

Marks are exclusive: while a part within a part runs, the outer one's clock stands still. On a GPU they are CUDA events,
so a part includes the waiting within it; how long the GPU waits in all is the profiler's to say. Whatever the backward
pass computes again belongs to the backward pass.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile, record_function

from bench import official_step
from bench.throughput_contenders import COMPILED, Contender, Joint, Mixed
from bevt_fast.data.batch import JointBatch
from bevt_fast.models.video_swin import PatchMerging, Stage, Stem, WindowAttention
from bevt_fast.objectives.in_turn import Settled

TOKENIZER, GEMM, ATTENTION, ENCODER = "tokenizer", "encoder GEMM", "attention", "encoder, the rest"
LOSS, BACKWARD, OPTIMIZER, REST = "decoder + loss", "backward", "optimizer", "the rest"
PARTS = (TOKENIZER, GEMM, ATTENTION, ENCODER, LOSS, BACKWARD, OPTIMIZER, REST)
SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrices that tell what a product can reach here
TRIES = 5
PRODUCTS: tuple[Any, ...] = (F.linear, torch.mm, torch.addmm, getattr(torch.ops.mkldnn, "_linear_pointwise", None))
TOP = 25  # kernels in the profile's table


class Marks:
    """A stack of open parts, and the slices of time each was on top."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.open: list[str] = []
        self.slices: list[tuple[str, Any, Any]] = []
        self.since: Any = None

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def turn(self) -> None:
        """Closes the slice of the part on top."""
        now = self.now()
        if self.open and self.since is not None:
            self.slices.append((self.open[-1], self.since, now))
        self.since = now

    def enter(self, part: str) -> bool:
        """Opens a part; within the backward pass nothing else is opened."""
        if BACKWARD in self.open:
            return False
        self.turn()
        self.open.append(part)
        return True

    def leave(self) -> None:
        self.turn()
        self.open.pop()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        opened = self.enter(name)
        try:
            with record_function(f"part: {name}"):
                yield
        finally:
            if opened:
                self.leave()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return marked

    def sums(self) -> dict[str, float]:
        """Milliseconds by part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {part: 0.0 for part in PARTS}
        for part, start, end in self.slices:
            found[part] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
        return found


class Linears(TorchFunctionMode):
    """Marks every linear layer of the encoder, whoever calls it."""

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and self.marks.open and self.marks.open[-1] in (ENCODER, ATTENTION):
            with self.marks.part(GEMM):
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class MarkedEngine:
    """An engine whose three calls are marked."""

    def __init__(self, engine: Any, marks: Marks) -> None:
        self.engine, self.call = engine, marks.around(LOSS, engine.__call__)
        self.backward, self.step = marks.around(BACKWARD, engine.backward), marks.around(OPTIMIZER, engine.step)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class MarkedTokenizer:
    """A tokenizer whose calls are marked."""

    def __init__(self, tokenizer: Any, marks: Marks) -> None:
        self.tokenizer, self.call = tokenizer, marks.around(TOKENIZER, tokenizer.__call__)

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@contextlib.contextmanager
def marked(contender: Contender, marks: Marks) -> Iterator[None]:
    """The contender with marks; afterwards as it was."""
    owner = contender.owner
    with contextlib.ExitStack() as stack:
        if contender.name != COMPILED:
            stack.enter_context(Linears(marks))
        # streams in turn: the backward pass of the first is within the forward pass of both
        stack.enter_context(patch.object(Settled, "__init__", marks.around(BACKWARD, Settled.__init__)))
        if isinstance(owner, Joint):
            engine, tokenizer = owner.engine, owner.tokenizer
            stack.callback(lambda: (setattr(owner, "engine", engine), setattr(owner, "tokenizer", tokenizer)))
            owner.engine, owner.tokenizer = MarkedEngine(engine, marks), MarkedTokenizer(tokenizer, marks)
            _hook(owner.objective, marks, stack)
        elif isinstance(owner, Mixed):
            _mark_mixed(owner, contender.name, marks, stack)
        stack.enter_context(marks.part(REST))
        yield


def _mark_mixed(owner: Mixed, name: str, marks: Marks, stack: contextlib.ExitStack) -> None:
    def replace(target: Any, attribute: str, value: Any) -> None:
        had = attribute in vars(target)
        before = getattr(target, attribute)
        stack.callback(lambda: setattr(target, attribute, before) if had else delattr(target, attribute))
        setattr(target, attribute, value)

    replace(owner, "tokens", marks.around(TOKENIZER, owner.tokens))
    replace(owner, "backward", marks.around(BACKWARD, owner.backward))
    replace(owner.state, "update", marks.around(OPTIMIZER, owner.state.update))
    replace(owner.model, "step_losses", marks.around(LOSS, owner.model.step_losses))
    replace(owner.model, "stages", marks.around(ENCODER, owner.model.stages))
    if name != COMPILED:  # a graph has no parts
        attend = marks.around(ATTENTION, official_step.attention)
        replace(owner.model, "block", functools.partial(official_step.block, attend=attend))
    _hook(owner.state.objective, marks, stack)


def _hook(objective: nn.Module, marks: Marks, stack: contextlib.ExitStack) -> None:
    """Marks on the modules of an encoder."""
    for module in objective.modules():
        part = ATTENTION if isinstance(module, WindowAttention) else ENCODER
        if not isinstance(module, (WindowAttention, Stem, Stage, PatchMerging)):
            continue
        opened: list[bool] = []

        def enter(_module: nn.Module, _inputs: Any, part: str = part, opened: list[bool] = opened) -> None:
            opened.append(marks.enter(part))

        def leave(_module: nn.Module, _inputs: Any, _output: Any, opened: list[bool] = opened) -> None:
            if opened.pop():
                marks.leave()

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave).remove)


def shares(contender: Contender, batch: JointBatch, device: torch.device) -> dict[str, float]:
    """Milliseconds by part of one step."""
    contender.restore(False)
    torch.manual_seed(0)
    ready, marks = contender.ready(batch), Marks(device)
    with marked(contender, marks):
        contender.step(ready)
    return marks.sums()


class Trace(NamedTuple):
    """What the profiler saw of one step."""

    busy_ms: float | None  # of a GPU, by its kernels
    wall_ms: float
    table: str


def trace(contender: Contender, batch: JointBatch, device: torch.device, path: Path | None) -> Trace:
    """One step under torch.profiler; with `path`, a chrome trace."""
    contender.restore(False)
    torch.manual_seed(0)
    ready, cuda = contender.ready(batch), device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=activities) as seen:
        start = time.perf_counter()
        contender.step(ready)
        if cuda:
            torch.cuda.synchronize(device)
        wall = (time.perf_counter() - start) * 1e3
    averages = seen.key_averages()
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    busy = sum(getattr(event, "self_device_time_total", 0.0) for event in averages) / 1e3 if cuda else None
    if path is not None:
        seen.export_chrome_trace(str(path))
    return Trace(busy, wall, averages.table(sort_by=order, row_limit=TOP, max_name_column_width=60))


def matmul_rate(device: torch.device, precision: str) -> float:
    """TFLOP/s of the best of a few large square products here and now."""
    dtype, side = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision], SIDE[device.type]
    a = torch.randn(side, side, device=device).to(dtype)
    marks, best = Marks(device), 0.0
    for _ in range(TRIES + 1):  # the first one warms up
        marks.slices.clear()
        with marks.part(REST):
            torch.mm(a, a)
        best = max(best, 2 * side**3 / marks.sums()[REST] / 1e9)
    return best
