"""A classifier's scores on a source: every video once, for any number of processes, and the same bits for each.

Videos are dealt out in groups. Which videos make a group is a function of the source and the views alone, and a group
goes through the network together, so the shapes of all matrix products, and with them every bit, are those of one
process. Nothing is padded and nothing counts twice. A file that no decoder opens is counted and reported, never scored.
"""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bevt_fast.data.loader import MAX_RESTARTS, any_dead, fork
from bevt_fast.data.pipeline_reference import normalise
from bevt_fast.data.sources import Source
from bevt_fast.data.views import Temporal, ViewReader, Views
from bevt_fast.errors import DataError, MachineError, NumericalError
from bevt_fast.training import distributed, labels
from bevt_fast.training.distributed import World

Forward = Callable[[Tensor], Tensor]  # (B, 3, T, H, W) to (B, D)


class Scores(NamedTuple):
    """What was found, complete and in order of index on every process."""

    indices: Tensor  # (n,) int64: the videos that could be read
    labels: Tensor  # (n,) int64, -1: none
    probabilities: Tensor  # (n, classes) float32, averaged over views (SPEC 6.6); of `averaged`: any (n, D)
    bad: list[dict[str, Any]]  # index, path, kind and reason of every other video


def score(
    classifier: nn.Module,
    source: Source,
    views: Views,
    world: World,
    *,
    temporal: Temporal = "normal",
    seed: int = 0,
    workers: int = 2,
    micro_batch: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """The class probabilities of every video: softmax in float32, averaged over its views.

    `micro_batch` views go through the network at once, pixels as `dtype`. The classifier is put into `eval` for this
    and back. It must be whole on every process: processes score different numbers of batches, so one that gathers its
    weights together with the others (ZeRO stage 3) would wait for them without end, and is refused with MachineError.
    Raises NumericalError where a probability is not finite: such a video has no highest one.
    """
    if any(hasattr(parameter, "ds_id") for parameter in classifier.parameters()):
        raise MachineError(
            "a classifier that ZeRO stage 3 has spread over the processes cannot be scored; load its whole weights "
            "into a classifier of their own, as a checkpoint has them"
        )
    was_training = classifier.training
    classifier.eval()
    reader = ViewReader(source, views, temporal, seed)
    try:
        found = averaged(
            lambda pixels: classifier(pixels).float().softmax(-1),
            reader,
            world,
            workers=workers,
            micro_batch=micro_batch,
            dtype=dtype,
        )
    finally:
        classifier.train(was_training)
    if not found.probabilities.isfinite().all():
        row = int((~found.probabilities.isfinite()).any(-1).nonzero()[0])
        path = source.path(int(found.indices[row]))
        raise NumericalError(
            f"the classifier's answer to {path} is not finite; score in --precision fp32, or take another checkpoint"
        )
    return found


@torch.no_grad()
def averaged(
    forward: Forward,
    reader: ViewReader,
    world: World,
    *,
    workers: int = 2,
    micro_batch: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Scores:
    """What `forward` makes of every video, averaged over its views, float32, gathered on every process."""
    groups = deal(len(reader), reader.views.count, micro_batch)
    values: dict[int, Tensor] = {}
    bad: list[dict[str, Any]] = []
    for items in _read(reader, groups[world.rank :: world.size], workers):
        bad += [{"index": item["index"]} | item["bad"] for item in items if item["bad"]]
        items = [item for item in items if not item["bad"]]
        if items:
            answers = _answers(forward, items, micro_batch, world, dtype)
            values |= {item["index"]: answer for item, answer in zip(items, answers)}
    return _gathered(values, bad, reader.source, world)


def deal(videos: int, views: int, micro_batch: int) -> list[range]:
    """The groups of videos that go through the network together: as many as fill a micro-batch, at least one."""
    together = max(1, micro_batch // views)
    return [range(first, min(first + together, videos)) for first in range(0, videos, together)]


def check_labels(source: Source, classes: int) -> None:
    """Raises DataError where a classifier of so many classes cannot have learnt the labels of a source."""
    if source.labels is None or (source.labels < 0).all():
        raise DataError(f"the source {source.name!r} has no labels to score against; use `evaluate.py predict`")
    if source.classes is not None and len(source.classes) != classes:
        raise DataError(
            f"the checkpoint tells {classes} classes apart but the source {source.name!r} has {len(source.classes)}; "
            "take the data it was fine-tuned for, or name all its classes in the option 'classes'"
        )
    if len(outside := labels.outside(source, classes)):
        first = int(outside[0])
        raise DataError(
            f"the label {int(source.labels[first])} of {source.paths[first]} is outside 0 to {classes - 1}, the "
            f"classes of the checkpoint ({len(outside)} such labels); correct the list or take another checkpoint"
        )


def rank_of_truth(scores: Scores) -> Tensor:
    """How many classes stand before the true one, (n,) int64; of equal probabilities the smaller class is first."""
    true = scores.probabilities.gather(1, scores.labels[:, None])
    ahead = scores.probabilities > true
    classes = torch.arange(scores.probabilities.shape[1])
    tied = (scores.probabilities == true) & (classes < scores.labels[:, None])
    return (ahead | tied).sum(1)


def top_k(scores: Scores, k: int) -> float:
    """The share of scored videos whose class is among the `k` most probable ones; 0 where nothing was scored."""
    return float((rank_of_truth(scores) < k).double().mean()) if len(scores.indices) else 0.0


def confusion(scores: Scores) -> Tensor:
    """(classes, classes) int64: how many videos of the row's class were taken for the column's."""
    classes = scores.probabilities.shape[1]
    if not len(scores.indices):
        return torch.zeros(classes, classes, dtype=torch.int64)
    # argmax may take any of equal ones; as in `rank_of_truth` the smallest counts
    best = scores.probabilities == scores.probabilities.max(1, keepdim=True).values
    said = best.int().argmax(1)
    pairs = torch.bincount(scores.labels * classes + said, minlength=classes * classes)
    return pairs.reshape(classes, classes)


def mean_class_accuracy(scores: Scores) -> float:
    """The mean over the classes that occur of the share of their videos named right."""
    table = confusion(scores).double()
    there = table.sum(1) > 0
    return float((table.diagonal()[there] / table.sum(1)[there]).mean()) if there.any() else 0.0


def per_class(scores: Scores) -> list[dict[str, Any]]:
    """A row for each class: how many videos, how many named right, among the first five, and what else was said most
    often. Shares are None for a class without videos.
    """
    table, ranks = confusion(scores), rank_of_truth(scores)
    rows = []
    for k, counts in enumerate(table.tolist()):
        samples, right = sum(counts), counts[k]
        near = int((ranks[scores.labels == k] < 5).sum())
        wrong = [0 if other == k else count for other, count in enumerate(counts)]
        taken_for = int(np.argmax(wrong)) if any(wrong) else None
        rows.append(
            {
                "class": k,
                "samples": samples,
                "right": right,
                "top1": right / samples if samples else None,
                "top5": near / samples if samples else None,
                "taken_for": taken_for,
                "taken_for_count": wrong[taken_for] if taken_for is not None else 0,
            }
        )
    return rows


def _read(reader: ViewReader, groups: Sequence[range], workers: int) -> Iterator[list[dict[str, Any]]]:
    """The items of each group, in order, also where a file ends the process that reads it: what two have died of is
    refused. Raises DataError where they die of nothing in particular.
    """
    done = unexplained = 0
    while done < len(groups):
        items, started = _start(reader, groups[done:], workers)
        try:
            for item in items:
                done += 1
                yield item
        except (RuntimeError, OSError, EOFError):  # the last two: a dead worker's item cannot be fetched
            if not any_dead(started):
                raise
            dead = {worker.pid for worker in started if worker.exitcode not in (None, 0, -signal.SIGKILL)}
            unexplained += -1 if reader.crashes.blame(dead) else 1
            if unexplained > MAX_RESTARTS:
                raise DataError(
                    f"the processes that read {reader.source.name} die; if memory or /dev/shm ran out take fewer "
                    "--workers, else look for the file with `prepare.py verify`"
                ) from None
        finally:
            del items  # ends its workers


def _start(reader: ViewReader, groups: Sequence[range], workers: int) -> tuple[Iterator[list[dict[str, Any]]], list]:
    """The items of the groups, and the processes that read them."""
    workers = min(workers, len(groups))
    loader = DataLoader(
        _Groups(reader, groups),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_settle,
        generator=torch.Generator(),  # its own: scoring must not draw from the one that training uses
    )
    reader.crashes.watch(workers)
    return fork(loader)


class _Groups(torch.utils.data.Dataset):
    """A reader by group. Tensors travel through shared memory, one a video."""

    def __init__(self, reader: ViewReader, groups: Sequence[range]):
        self.reader, self.groups = reader, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return [self.reader[index] for index in self.groups[number]]


def _settle(worker: int) -> None:
    """In a reading process: one thread, and signals left to the program."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _answers(
    forward: Forward, items: list[dict[str, Any]], micro_batch: int, world: World, dtype: torch.dtype
) -> Tensor:
    """What `forward` says of each item, averaged over its views: (len(items), D) float32 on the CPU."""
    pixels = torch.cat([item["pixels"] for item in items])
    parts = []
    for some in pixels.split(micro_batch):
        clips = normalise(some.to(world.device), channels=-4).to(dtype)
        parts.append(forward(clips).float())
    return torch.cat(parts).unflatten(0, (len(items), -1)).mean(1).cpu()


def _gathered(values: dict[int, Tensor], bad: list[dict[str, Any]], source: Source, world: World) -> Scores:
    """Everything from everyone: each process adds its rows to zeros, so a sum puts them together bit by bit."""
    width = distributed.agree(max((len(value) for value in values.values()), default=0), world.device)
    table = torch.zeros(len(source), width)
    there = torch.zeros(len(source), dtype=torch.int64)
    for index, value in values.items():
        table[index], there[index] = value, 1
    table = distributed.total(table.to(world.device)).cpu()
    there = distributed.total(there.to(world.device)).cpu()
    if int(there.max()) > 1:
        raise RuntimeError("a video was scored twice: the processes disagree about who reads what")
    records = sorted(_all_records(bad, world), key=lambda record: record["index"])
    indices = there.nonzero()[:, 0]
    truth = torch.full((len(source),), -1) if source.labels is None else torch.from_numpy(source.labels)
    return Scores(indices, truth[indices], table[indices], records)


def _all_records(records: list[dict[str, Any]], world: World) -> list[dict[str, Any]]:
    """The records of all processes, as text: nothing that another process says is unpickled."""
    text = torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8)
    sizes = torch.zeros(world.size, dtype=torch.int64)
    sizes[world.rank] = len(text)
    ends = distributed.total(sizes.to(world.device)).cpu().cumsum(0)
    everything = torch.zeros(int(ends[-1]), dtype=torch.uint8)
    everything[int(ends[world.rank]) - len(text) : int(ends[world.rank])] = text
    everything = distributed.total(everything.to(world.device)).cpu()
    parts = np.split(everything.numpy(), ends[:-1].numpy())
    return [record for part in parts for record in json.loads(part.tobytes())]
