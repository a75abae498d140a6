"""Before any speed: do all contenders take the same step?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.throughput_contenders import OFFICIAL, ROUNDED, TRUTH, Contender
from bench.throughput_work import Work
from bevt_fast.data.batch import Losses

EXACT = 1e-5  # relative, of a float32 loss: sums of thousands of terms in another order
LOSSES = ("total", "image", "clip")


def one_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


class Gate:
    """Losses and tokens of the same steps, contender by contender."""

    def __init__(self, work: Work, steps: int) -> None:
        self.work, self.steps = work, steps
        self.losses: dict[str, list[list[float]]] = {}
        self.tokens: dict[str, list[list[Tensor]]] = {}
        self.differs: dict[str, str] = {}
        self.bound, self.reason = EXACT, "bound 1e-5: float32 sums in another order"
        self.agreement: dict[str, float] = {}
        self.worst: dict[str, float] = {}

    def take(self, contender: Contender) -> None:
        """The steps, from the first weights and an optimizer that has not stepped."""
        contender.restore(True)
        losses, tokens = [], []
        for step in range(self.steps):
            batch = self.work.batches[step % len(self.work.batches)]
            torch.manual_seed(step)
            found = contender.step(contender.ready(batch))
            losses.append([float(getattr(found, name)) for name in LOSSES])
            ids = contender.seen()
            tokens.append(self.hidden(step, ids))
        self.losses[contender.name], self.tokens[contender.name] = losses, tokens

    def hidden(self, step: int, ids: Any) -> list[Tensor]:
        """The ids of the hidden cells of a step, on the CPU."""
        batch = self.work.batches[step % len(self.work.batches)]
        found = []
        if batch.images:
            found.append(ids.images.cpu()[batch.images.mask])
        if batch.clips:
            mask = batch.clips.mask.repeat_interleave(ids.clips.shape[1] // batch.clips.mask.shape[1], dim=1)
            found.append(ids.clips.cpu()[mask])
        return found

    @property
    def reference(self) -> str:
        """The official step, or the first that ran where it cannot."""
        return OFFICIAL if OFFICIAL in self.losses else next(iter(self.losses))

    def measure_bound(self, yardsticks: Sequence[Contender]) -> None:
        """In low precision: twice as far from float32 as the official step itself is, under autocast or throughout."""
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for contender in yardsticks:
                self.take(contender)
        low = [self.losses.pop(ROUNDED), self.losses[self.reference]]
        self.tokens.pop(ROUNDED)
        self.bound = 2 * max(distance(self.losses[TRUTH], losses) for losses in low)
        self.reason = f"bound {self.bound:.1e}: twice what bfloat16 does to the official step's losses"

    def judge(self) -> None:
        """Fill in `differs`: name -> what differs."""
        truth, tokens = self.losses.pop(TRUTH, None), self.tokens[self.reference]
        self.tokens.pop(TRUTH, None)
        truth = truth or self.losses[self.reference]
        for name, losses in self.losses.items():
            pairs = [(a, b) for one, two in zip(tokens, self.tokens[name]) for a, b in zip(one, two)]
            cells = sum(a.numel() for a, _ in pairs)
            self.agreement[name] = sum(int((a == b).sum()) for a, b in pairs) / max(cells, 1)
            self.worst[name] = distance(truth, losses)
            allowed = self.bound + (1 - self.agreement[name] if self.work.device.type == "cuda" else 0)
            if self.agreement[name] < 1 and self.work.device.type == "cpu":
                self.differs[name] = f"{1 - self.agreement[name]:.4%} of the tokens are others"
            elif not self.worst[name] <= allowed:
                self.differs[name] = f"a loss differs by {self.worst[name]:.1e} of itself, allowed are {allowed:.1e}"

    def check_rounds(self, rounds: dict[str, list[Losses]]) -> str:
        """What differs in the timed steps; "" where nothing does."""
        known = {name: [[float(getattr(step, n)) for n in LOSSES] for step in steps] for name, steps in rounds.items()}
        truth = known.get(self.reference, [])
        # two contenders may lie on two sides of float32, the reference at half the bound at most
        bound = self.bound if self.bound == EXACT else 1.5 * self.bound
        far = {name: distance(truth, losses) for name, losses in known.items() if losses}
        bad = {name: value for name, value in far.items() if not value <= bound + 1 - self.agreement[name]}
        return "; ".join(f"{name} by {value:.1e}" for name, value in bad.items())

    def text(self) -> str:
        """The verdict, for the report."""
        if self.differs:
            told = "; ".join(f"{name}: {why}" for name, why in self.differs.items())
            return f"not the same step, so no speed is printed: {told}"
        worst = max(self.worst.values())
        share = min(self.agreement.values())
        same = "all tokens equal" if share == 1 else f"at least {share:.4%} of the tokens equal"
        return (
            f"{self.steps} steps by {len(self.losses)} contenders from the same weights: losses differ by at most "
            f"{worst:.1e} of themselves ({self.reason}), {same}"
        )


def distance(one: Sequence[Sequence[float]], two: Sequence[Sequence[float]]) -> float:
    """The largest relative difference; NaN where one is not a number."""
    found = [abs(a - b) / max(abs(a), 1e-30) for x, y in zip(one, two) for a, b in zip(x, y) if a or b]
    return max((value if value == value else float("nan") for value in found), key=lambda v: (v != v, v), default=0.0)
