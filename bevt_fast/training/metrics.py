"""What a run says while it trains: log.jsonl (exact), TensorBoard (comfortable), a progress bar or plain lines.

log.jsonl is the truth: one JSON object a logged step, floats with every digit, cut back on resume so that no step is in
it twice. The other two may fail; training goes on without them.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch

from bevt_fast.errors import MachineError

# dense bf16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets (V100: fp16, it has no bf16); the first name that
# occurs in the device's name counts, a variant with its own clock or memory before its family
PEAKS = (
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("V100-PCIE", 112e12),
    ("V100", 125e12),
)
WAIT_LIMIT = 0.10  # share of the wall time the training may wait for data before we say so
REMEDY = "reading and decoding are slower than the model; raise data.workers"

logger = logging.getLogger(__name__)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of an accelerator by its name; None where we do not know it (also for a slice of one)."""
    if " MIG " in device:
        return None
    return next((peak for name, peak in PEAKS if name in device), None)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a log.jsonl, in order; a value that was not finite is nan. A half-written line is left out."""
    rows = (row for _, row in _whole_lines(Path(path)))
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


class Metrics:
    """Writes on the main process, is quiet on the others. Images, clips and necessary FLOPs (`estimate`) a
    step are those of all processes.
    """

    def __init__(
        self,
        output: Path,
        total_steps: int,
        first_step: int,
        images_per_step: int,
        clips_per_step: int,
        flops_per_step: float,
        is_main: bool,
    ) -> None:
        """Raises MachineError where `output` cannot be written."""
        self.total_steps = total_steps
        self.per_step = {"clips": clips_per_step, "images": images_per_step}
        self.flops_per_step = flops_per_step
        self.is_main = is_main
        self.file: TextIO | None = None
        self.board: Any = None
        self.bar: Any = None
        self.warned = False
        if is_main:
            self.file = _open_log(Path(output) / "log.jsonl", first_step)
            self.board = _open_board(Path(output) / "tensorboard", first_step)
            self.bar = _open_bar(total_steps, first_step)
        self.windows = 0  # logged so far with rates
        self.last_step = first_step - 1
        self.last_time = self.anchor_time = time.perf_counter()
        self.anchor_step = first_step - 1

    def log(self, step: int, values: Mapping[str, float], waited: float | None = None, remedy: str = REMEDY) -> None:
        """Records one step. With `waited`, the seconds spent waiting for data since the last such call, perf/* is
        added: rates over the wall time since then. Leave it out for values that are no step of training (val/*).
        `remedy` says why it waited and what to change.
        """
        if not self.is_main:
            return
        row = {name: float(value) for name, value in values.items()}
        if waited is not None:
            row |= self._rates(step, waited)
        self._write(step, row)
        self._show(step, row)
        if waited is not None:
            self._judge_wait(row.get("perf/data_wait_frac", 0.0), remedy)

    def close(self) -> None:
        """Flushes and closes everything; a second call does nothing."""
        for part in (self.bar, self.board, self.file):
            try:
                if part is not None:
                    part.close()
            except OSError as error:
                logger.warning("the end of the log was not written: %s", error)
        self.bar = self.board = self.file = None
        self.is_main = False

    def _rates(self, step: int, waited: float) -> dict[str, float]:
        now = time.perf_counter()
        seconds, steps = now - self.last_time, step - self.last_step
        self.last_time, self.last_step = now, step
        self.windows += 1
        if self.windows == 1:  # compilation and first reads are no forecast
            self.anchor_time, self.anchor_step = now, step
        if seconds <= 0 or steps <= 0:
            return {}
        rates = {f"perf/{name}_per_s": count * steps / seconds for name, count in self.per_step.items() if count}
        rates["perf/data_wait_frac"] = min(waited / seconds, 1.0)
        if torch.cuda.is_available():
            rates["perf/gpu_mem_gib"] = torch.cuda.max_memory_allocated() / 2**30
            peak = peak_flops(torch.cuda.get_device_name())
            if peak and self.flops_per_step:
                rates["perf/mfu"] = self.flops_per_step * steps / seconds / (peak * _world_size())
        return rates

    def _write(self, step: int, row: dict[str, float]) -> None:
        if self.file is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            try:
                # repr of a float is its shortest exact form, so a resumed run can be compared bit by bit
                self.file.write(json.dumps({"step": step, **finite}) + "\n")
                self.file.flush()
            except OSError as error:
                logger.warning("log.jsonl is no longer written: %s; training goes on", error)
                self.file = None
        if self.board is not None:
            try:
                for name, value in row.items():
                    self.board.add_scalar(name, value, step)
            except OSError as error:
                logger.warning("TensorBoard is no longer written: %s; log.jsonl has every value", error)
                self.board = None

    def _show(self, step: int, row: dict[str, float]) -> None:
        words = _words(row, self.per_step)
        if self.bar is not None:
            self.bar.set_postfix_str(words, refresh=False)
            self.bar.update(max(min(step + 1, self.total_steps) - self.bar.n, 0))
            self.bar.refresh()
        else:
            position = f"step {min(step + 1, self.total_steps)}/{self.total_steps}"
            print(f"{position}  {words}{self._eta(step)}", file=sys.stderr, flush=True)

    def _eta(self, step: int) -> str:
        done, left = step - self.anchor_step, self.total_steps - step - 1
        if done <= 0 or left <= 0:
            return ""
        return f"  ETA {timedelta(seconds=round((self.last_time - self.anchor_time) / done * left))}"

    def _judge_wait(self, share: float, remedy: str) -> None:
        # the first window holds the workers' start, which is no fault of theirs
        if self.warned or self.windows < 2 or share <= WAIT_LIMIT:
            return
        self.warned = True
        logger.warning("training waits for data %.0f %% of the time: %s", 100 * share, remedy)


def _open_log(path: Path, first_step: int) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [text for text, row in _whole_lines(path) if row["step"] < first_step] if path.exists() else []
        shorter = path.with_suffix(".tmp")
        shorter.write_text("".join(text + "\n" for text in kept), encoding="utf-8")
        os.replace(shorter, path)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror}; set output to a folder that can be written"
        ) from None


def _whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines as they stand, so that what is kept stays byte for byte, and what they say."""
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            continue  # a process killed while writing leaves half a line
        if isinstance(row, dict) and "step" in row:
            yield text, row


def _open_board(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        # steps from first_step on, written before a kill, are hidden by the viewer
        return SummaryWriter(str(folder), purge_step=first_step, flush_secs=30)
    except (ImportError, OSError) as error:
        logger.warning("no TensorBoard files: %s; log.jsonl has every value", error)
        return None


def _open_bar(total_steps: int, first_step: int) -> Any:
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR"):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)


def _words(row: dict[str, float], per_step: Mapping[str, int]) -> str:
    """One row in one line, e.g. 'loss 9.01  image 4.50 (3.5% right)  clip 4.51 (10.0% right)  31.2 clips/s'."""
    words = [f"loss {row['train/loss']:.4f}"] if "train/loss" in row else []
    for name, kind, accuracy, count in (("image", "image", "2d", "images"), ("clip", "video", "3d", "clips")):
        if f"train/loss_{kind}" in row and per_step[count]:
            right = row.get(f"train/mask_acc_{accuracy}")
            words.append(
                f"{name} {row[f'train/loss_{kind}']:.4f}" + (f" ({right:.1%} right)" if right is not None else "")
            )
    if "train/top1" in row:
        words.append(f"{row['train/top1']:.1%} right")
    for count in per_step:
        if f"perf/{count}_per_s" in row:
            words.append(f"{row[f'perf/{count}_per_s']:.3g} {count}/s")
    if "perf/data_wait_frac" in row:
        words.append(f"data wait {row['perf/data_wait_frac']:.0%}")
    if "perf/mfu" in row:
        words.append(f"MFU {row['perf/mfu']:.1%}")
    words += [f"{name} {value:.4g}" for name, value in row.items() if name.startswith("val/")]
    if row.get("train/skipped_steps"):
        words.append(f"skipped {row['train/skipped_steps']:.0f}")
    return "  ".join(words)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
