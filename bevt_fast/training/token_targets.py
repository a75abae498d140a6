"""Token caches of a run: what their ids depend on, opening them, and making them with the run's own reading.

A row's view is drawn, read and cut by `reader.StreamReader` as in training, so the tokenizer reads the same pixels; a
file that is bad is replaced as in training, and its rows are those of its substitute.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bevt_fast import tokenizers
from bevt_fast.config import Config, Stream, load
from bevt_fast.data import pipeline_reference, token_cache
from bevt_fast.data.loader import any_dead, first_line, fork
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sampling import Place
from bevt_fast.data.sources import Source
from bevt_fast.data.token_cache import CacheWriter, Parts, TokenCache
from bevt_fast.errors import ConfigError, DataError, MachineError, UserError
from bevt_fast.tokenizers import Tokenizer
from bevt_fast.training import tokenizer_fit
from bevt_fast.training.assemble import check_parts, fingerprint, open_sources, tokenizer_fingerprint
from bevt_fast.training.quarantine import Quarantine


class Making(NamedTuple):
    """How a cache is made; none of it changes a row."""

    device: str
    batch: int  # views that are read and tokenized together
    workers: int
    command: str  # that completes the cache, for whoever meets a half-finished one


class Rows(NamedTuple):
    """Some rows of a stream as a worker reads them, and whether they are the last of their chunk."""

    chunk: int
    numbers: list[int]
    last: bool
    pixels: torch.Tensor  # (n, [T,] S, S, 3) uint8
    files: list[int]
    checksums: list[int]
    bad: list[dict[str, Any]]


def parts(config: Config, stream: str, source: Source, tokenizer: Tokenizer) -> Parts:
    """All that decides the ids of a stream's views, by name."""
    section: Stream = getattr(config, stream)
    found = fingerprint(source)
    made_of = {
        "format": token_cache.FORMAT,
        "tokenizer.name": config.tokenizer.name,
        "tokenizer.weights (digest)": tokenizer_fingerprint(tokenizer),
        "tokenizer.vocab_size": tokenizer.vocab_size,
        "tokenizer.cell": tokenizer.cell,
        "seed": config.seed,
        "data.views": config.data.views,
        "data.decoder": config.data.decoder,
        "files": found["files"],
        f"{stream}.source (digest of the list)": found["sha256"],
    }
    made_of |= {f"{stream}.view.{key}": value for key, value in section.view.model_dump(mode="json").items()}
    if source.frames is not None:
        for key, value in zip(("frames", "stride", "mode"), source.frames):
            made_of[f"{stream}.source.{key}"] = value
        made_of[f"{stream}.source.min_frames"] = source.min_frames
    return made_of


def open_caches(config: Config, sources: Mapping[str, Source], tokenizer: Tokenizer) -> dict[str, TokenCache]:
    """The cache of each stream, none where the configuration names none. Raises DataError for one that is not whole, or
    was made of anything else than this run is.
    """
    if config.data.token_cache is None:
        return {}
    return {
        name: token_cache.open_cache(
            config.data.token_cache,
            name,
            parts(config, name, source, tokenizer),
            cells(config, name, source, tokenizer),
            tokenizer.vocab_size,
        )
        for name, source in sources.items()
    }


def cells(config: Config, stream: str, source: Source, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The shape of the ids of one view: (g, g), or (T, g, g) of a clip."""
    side = getattr(config, stream).view.size // 2 // tokenizer.cell
    return (side, side) if source.frames is None else (source.frames.count, side, side)


def make(config: Config, out: str, how: Making) -> None:
    """Make or complete the caches of all streams of a run under `out`, fitting the tokenizer if the run would.

    Rows that are there and whole are kept. Raises ConfigError without `data.views`, DataError where a cache of
    something else is there, too many files are bad, or the disk is full.
    """
    if config.data.views is None:
        raise ConfigError("a token cache needs a number of views of each sample: --views K, or the key data.views")
    sources = open_sources(config)
    tokenizer_fit.fit_if_missing(config, sources)
    tokenizer = tokenizers.build(config.tokenizer).to(torch.device(how.device))
    files = {name: len(source) for name, source in sources.items()}
    for name, source in sources.items():
        made_of, shape = parts(config, name, source, tokenizer), cells(config, name, source, tokenizer)
        writer = CacheWriter(out, name, made_of, shape, tokenizer.vocab_size, how.command)
        bad = Quarantine(Path(out) / "quarantine.jsonl", files, config.data.quarantine_share)
        reader = StreamReader(_read_in(config, how.batch), name, source)
        try:
            _fill(writer, reader, tokenizer, how, bad)
        except OSError as error:
            raise DataError(
                f"the token cache {out} cannot be written: {error.strerror or error}; see to it, then `{how.command}` "
                "goes on"
            ) from None
        finally:
            writer.close()


def program(options: argparse.Namespace) -> None:
    """`prepare.py tokens`: make or complete a cache, and say how to use it."""
    run = ["--config", options.config, *(word for change in options.set for word in ("--set", change))]
    views = [] if options.views is None else [f"data.views={options.views}"]
    config = load(options.config, [*options.set, "data.token_cache=null", *views])
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: PyTorch sees no GPU here; leave the option out, or give cpu")
    check_parts(config)
    again = ["python", "bevt_fast/prepare.py", "tokens", *run, "--out", options.out]
    again += [] if options.views is None else ["--views", str(options.views)]
    workers = config.data.workers if options.workers is None else options.workers
    make(config, options.out, Making(device, options.batch, workers, shlex.join(again)))
    views = config.data.views
    print(f"{options.out} holds {views} views of every sample of {' and '.join(config.streams)}, each row checked")
    use = ["--set", f"data.views={views}", "--set", f"data.token_cache={options.out}"]
    print(f"use it: {shlex.join(['python', 'bevt_fast/train.py', *run, *use])}")


def _fill(writer: CacheWriter, reader: StreamReader, tokenizer: Tokenizer, how: Making, bad: Quarantine) -> None:
    """Write the rows that are missing, until all are there."""
    device = torch.device(how.device)
    label = {"desc": reader.name, "unit": "view", "disable": not sys.stderr.isatty()}
    with tqdm(total=writer.count, **label) as bar:
        while True:
            for rows in _read(_Spans(writer, how.batch, bar), _Views(reader), how):
                token_pixels = pipeline_reference.half_token_view(rows.pixels.to(device))
                ids = tokenizer(pipeline_reference.map_pixels(token_pixels))
                writer.write(rows.numbers, ids.cpu().numpy(), rows.files, rows.checksums)
                bar.update(len(rows.numbers))
                if rows.last:
                    writer.finish(rows.chunk)
                bad.add(rows.bad)
                if verdict := bad.verdict():
                    raise DataError(verdict)
            if writer.is_complete():
                return
            time.sleep(1.0)  # another process writes the rest; what it leaves when it dies is taken over


def _read(spans: "_Spans", views: "_Views", how: Making) -> Iterator[Rows]:
    """The rows that the spans name, read by workers, in order."""
    loader = DataLoader(
        views,
        batch_size=None,
        sampler=spans,
        num_workers=how.workers,
        collate_fn=_as_it_is,
        worker_init_fn=_settle if how.workers else None,
    )
    items, workers = fork(loader)
    try:
        for rows in items:
            if isinstance(rows, UserError):
                raise rows
            yield rows
    except (RuntimeError, OSError, EOFError) as error:  # the last two: a dead worker's rows cannot be fetched
        if not any_dead(workers):
            raise
        raise DataError(f"a reading process died ({first_line(error)}); `{how.command}` goes on") from None


class _Spans:
    """What is to be read: (chunk, row numbers, whether they are the chunk's last). Claims chunks as it is asked."""

    def __init__(self, writer: CacheWriter, batch: int, bar: tqdm):
        self.writer, self.batch, self.bar = writer, batch, bar

    def __iter__(self) -> Iterator[tuple[int, list[int], bool]]:
        for chunk, there, missing in self.writer.missing():
            self.bar.update(there)
            if not missing:
                self.writer.finish(chunk)
            for first in range(0, len(missing), self.batch):
                yield chunk, missing[first : first + self.batch], first + self.batch >= len(missing)


class _Views(Dataset):
    """Views of a stream by number: index * K + view."""

    def __init__(self, reader: StreamReader):
        assert reader.views is not None
        self.reader, self.views = reader, reader.views

    def __getitem__(self, span: tuple[int, list[int], bool]) -> "Rows | UserError":
        chunk, numbers, last = span
        places = [Place(number % self.views, number // self.views) for number in numbers]
        bad: list[dict[str, Any]] = []
        try:
            samples = self.reader.read(places, bad)
        except UserError as error:
            return error
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        checksums = [token_cache.checksum(sample.pixels) for sample in samples]
        return Rows(chunk, numbers, last, pixels, [sample.file for sample in samples], checksums, bad)


def _read_in(config: Config, batch: int) -> Config:
    """The configuration with streams that are read `batch` views at a time."""
    sizes = {"batch": batch, "micro_batch": batch}
    return config.model_copy(update={name: stream.model_copy(update=sizes) for name, stream in config.streams.items()})


def _as_it_is(item: Any) -> Any:
    return item


def _settle(worker: int) -> None:
    """In a new worker: one thread, and Ctrl-C left to the program."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
