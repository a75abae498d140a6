"""One stream, read by number: what the i-th micro-batch holds is a function of the seed and of i alone.

Sample, frames, crop and mask of a position never depend on how many processes read, train or have died: each is drawn
from a generator keyed by (seed, stream, epoch, index). A bad file is replaced by a substitute that is also drawn by
key, and a record of it travels with the batch.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from bevt_fast.config import Config, Stream, View, accumulation
from bevt_fast.data import damage, decode, masking, pipeline, pipeline_reference, sampling
from bevt_fast.data.decode import BadFile, Probe
from bevt_fast.data.pipeline import DaliViews, Job
from bevt_fast.data.sampling import Crop, Place
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError, UserError

CELL = 16  # pixels on the side of a mask cell (SPEC 2.1: 14 cells of 224 pixels)
MAX_SUBSTITUTES = 50  # bad files in a row before the data is called unusable
LARGEST_PICTURE = 2**24  # pixels after rescaling, 16 times what is usual; of 1 x 30000 it would be 2**31
HELDOUT_SEED = 0  # the same held-out views in every run, so that runs can be compared

Read = TypeVar("Read")


class Draw(NamedTuple):
    """All that is random about one sample. `frames` is None for an image."""

    epoch: int
    index: int
    frames: list[int] | None
    crop: Crop
    mask: np.ndarray  # bool, (g, g) for an image, (t, g, g) for a clip; True = hidden


class Sample(NamedTuple):
    """One sample as the training process gets it: uint8 pictures, channels last, and the bool mask."""

    pixels: np.ndarray  # ([T,] S, S, 3)
    token_pixels: np.ndarray  # ([T,] S/2, S/2, 3)
    mask: np.ndarray


def draw(config: Config, stream: str, source: Source, epoch: int, index: int, heldout: bool = False) -> Draw:
    """The draw of sample `index` in pass `epoch` of a stream ("clips" or "images"). Reads the file's header, no pixels.

    Raises BadFile where the loader would take a substitute.
    """
    return StreamReader(config, stream, source, heldout=heldout).draw(epoch, index, index)


class StreamReader(Dataset):
    """One stream of one process, by number of the micro-batch: `reader[i]` is the i-th since the start of the run.

    An item is a dict of pixels (B, [T,] S, S, 3) and token_pixels (B, [T,] s, s, 3) uint8, mask bool, `bad`: a list of
    records, and `left_to_pyav`: the codecs met so far that DALI does not take. An error meant for the user is returned,
    not raised: so it reaches the training process as it is.
    """

    def __init__(
        self, config: Config, stream: str, source: Source, *, rank: int = 0, world_size: int = 1, heldout: bool = False
    ):
        section: Stream = getattr(config, stream)
        self.name, self.source, self.view = stream, source, section.view
        self.key, self.seed = stream, config.seed
        if heldout:
            self.key, self.seed, self.view = f"heldout {stream}", HELDOUT_SEED, _plain(section.view)
        self.masking = masking.build(section.mask)
        self.order = sampling.jitter_order(self.seed)
        self.accumulation = accumulation(config, world_size)
        self.split = {"world_size": world_size, "micro_batch": section.micro_batch, "accumulation": self.accumulation}
        self.rank = rank
        self.dali: DaliViews | None = None
        if config.data.decoder == "dali":
            pipeline.require()
            kind = "images" if source.frames is None else "clips"
            self.dali = DaliViews(kind, self.view.size, section.micro_batch, self.order)
        self.on_damage = config.data.on_damage
        self._bad: dict[int, BadFile] = {}  # files this process knows to be bad, by index
        self._repaired: list[dict[str, Any]] = []  # records of clips that `use_previous` has kept
        self._left_to_pyav: set[str] = set()  # codecs met that DALI does not take

    def __getitem__(self, number: int) -> "dict[str, Any] | UserError":
        step, micro = divmod(number, self.accumulation)
        positions = sampling.micro_batch_positions(step, micro, self.rank, **self.split)
        places = [sampling.place(self.seed, self.key, position, len(self.source)) for position in positions]
        bad: list[dict[str, Any]] = []
        try:
            samples = self.read(places, bad)
        except UserError as error:
            return error
        pixels, token_pixels, masks = (torch.from_numpy(np.stack(column)) for column in zip(*samples))
        said = {"bad": bad, "left_to_pyav": sorted(self._left_to_pyav)}
        return {"pixels": pixels, "token_pixels": token_pixels, "mask": masks} | said

    def read(self, places: Sequence[Place], bad: list[dict[str, Any]]) -> list[Sample]:
        """The samples at `places`, or their substitutes; adds to `bad` a record of each bad file."""
        n = len(self.source)
        files = [place.index for place in places]
        samples: dict[int, Sample] = {}
        for attempt in range(MAX_SUBSTITUTES):
            left = [k for k in range(len(places)) if k not in samples]
            if not left:
                bad += self._repaired
                self._repaired = []
                return [samples[k] for k in range(len(places))]
            for k, outcome in zip(left, self._outcomes([(places[k], files[k]) for k in left])):
                if not isinstance(outcome, BadFile):
                    samples[k] = outcome
                    continue
                epoch, index = places[k]
                self._refuse(outcome, epoch, files[k])
                other = sampling.substitute(self.seed, self.key, epoch, index, attempt, n)
                bad.append(self.record(outcome, epoch, files[k], other))
                files[k] = other
        error = DataError(
            f"{self.name}: {MAX_SUBSTITUTES} files in a row cannot be read, the last one {bad[-1]['path']} "
            f"({bad[-1]['kind']}: {bad[-1]['reason']}); check the files of the source {self.source.name!r}"
        )
        error.records = bad
        raise error

    def draw(self, epoch: int, index: int, file: int) -> Draw:
        """The draw of slot `index` in pass `epoch`, to be read from `file`: `index` itself, or its substitute."""
        found = self._probed(file)
        rng = sampling.random_for(self.seed, self.key, epoch, index, "view")
        frames, steps = None, None
        if self.source.frames is not None:
            frames = sampling.clip_frames(found.frames, self.source.frames, rng)
            steps = self.source.frames.count // 2
        crop = sampling.draw_crop(found.height, found.width, self.view, rng)
        if crop.height * crop.width > LARGEST_PICTURE:
            shape = f"{found.height} x {found.width} pixels, {crop.height} x {crop.width} rescaled"
            raise BadFile("unreadable", self.source.path(file), f"too long and narrow: {shape}")
        grid = (self.view.size // CELL, self.view.size // CELL)
        mask = self.masking(grid, steps, sampling.random_for(self.seed, self.key, epoch, index, "mask"))
        return Draw(epoch, index, frames, crop, mask)

    def _outcomes(self, slots: Sequence[tuple[Place, int]]) -> list[Sample | BadFile]:
        """For each slot, to be read from a file: its sample, or what is wrong with the file."""
        draws = [_or_bad(self.draw, *place, file) for place, file in slots]
        jobs: dict[int, Job] = {}  # what DALI reads, all at once
        for k, (drawn, (_, file)) in enumerate(zip(draws, slots)):
            if isinstance(drawn, Draw) and self._dali_takes(file):
                jobs[k] = self._job(drawn, file)
        views = dict(zip(jobs, self.dali(list(jobs.values())))) if self.dali is not None and jobs else {}
        outcomes: list[Sample | BadFile] = []
        for k, (drawn, (_, file)) in enumerate(zip(draws, slots)):
            if isinstance(drawn, BadFile):
                outcomes.append(drawn)
                continue
            view = views.get(k)
            if view is None or isinstance(view, BadFile):
                # DALI decodes from the file's beginning, so damage before the clip ends it: PyAV has the last word
                view = _or_bad(self._views, drawn, file)
            outcomes.append(view if isinstance(view, BadFile) else Sample(*view, drawn.mask))
        return outcomes

    def _dali_takes(self, file: int) -> bool:
        if self.dali is None:
            return False
        found = self._probed(file)
        if not (taken := pipeline.takes(found)):
            self._left_to_pyav.add(found.codec)
        return taken

    def _job(self, drawn: Draw, file: int) -> Job:
        first = self.source.extent(file)[0]
        frames = None if drawn.frames is None else [first + frame for frame in drawn.frames]
        return Job(self.source.path(file), frames, drawn.crop)

    def _views(self, drawn: Draw, file: int) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and token pixels of a draw, read from `file` without DALI."""
        path, token_size, wanted = self.source.path(file), self.view.size // 2, drawn.frames
        if wanted is None:
            image = self._remembering(file, lambda: decode.read_image(path))
            return pipeline_reference.image_views(image, drawn.crop, token_size, self.order)
        # a clip that cannot be decoded says nothing about other clips of the file, so it is not remembered
        return pipeline_reference.clip_views(self._clip(drawn, wanted, file), drawn.crop, token_size)

    def _clip(self, drawn: Draw, wanted: list[int], file: int) -> np.ndarray:
        """The frames `wanted` of a file; damaged ones are as `data.on_damage` says. Raises BadFile."""
        path, extent = self.source.path(file), self.source.extent(file)
        try:
            return _twice(lambda: decode.read_frames(path, wanted, extent))
        except BadFile as error:
            if self.on_damage != "use_previous" or error.kind != "corrupt":
                raise
            frames = _twice(lambda: damage.read_good_frames(path, wanted, extent))
            self._repaired.append(self.record(error, drawn.epoch, file, file))
            return frames

    def _refuse(self, error: BadFile, epoch: int, file: int) -> None:
        """Raises DataError for a damaged clip where `data.on_damage` says so."""
        if self.on_damage == "fail" and error.kind == "corrupt" and self.source.frames is not None:
            failure = DataError(
                f"{self.name}: {error}; repair or remove the file, or set data.on_damage to quarantine or use_previous"
            )
            failure.records = [self.record(error, epoch, file, file)]
            raise failure

    def record(self, error: BadFile, epoch: int, file: int, substitute: int) -> dict[str, Any]:
        """One line of quarantine.jsonl. The path is the sample's, also where a file inside it is at fault."""
        path = str(self.source.path(file))
        reason = error.reason if error.path == path else f"{error.path}: {error.reason}"
        fault = {"stream": self.name, "path": path, "kind": error.kind, "reason": reason}
        return fault | {"epoch": epoch, "index": file, "substitute": substitute}

    def _probed(self, file: int) -> Probe:
        path = self.source.path(file)
        if self.source.frames is None:
            return self._remembering(file, lambda: decode.probe_image(path))
        return self._remembering(file, lambda: decode.probe(path, self.source.extent(file), self.source.min_frames))

    def _remembering(self, file: int, read: Callable[[], Read]) -> Read:
        """`read()`, or the BadFile it raised last time.

        Only for what concerns the whole file: else the order of reading, and with it the number of workers, would
        decide which samples are replaced.
        """
        if file in self._bad:
            raise self._bad[file]
        try:
            return _twice(read)
        except BadFile as error:
            if error.kind not in decode.PASSING_FAULTS:
                self._bad[file] = error
            raise


def _plain(view: View) -> View:
    """The view without augmentation: no flip, no jitter, the smallest scale; the place of the crop is still drawn."""
    return View(size=view.size, short_side=(view.short_side[0], view.short_side[0]), flip=0.0, colour_jitter=0.0)


def _or_bad(read: Callable[..., Read], *arguments: Any) -> Read | BadFile:
    try:
        return read(*arguments)
    except BadFile as error:
        return error


def _twice(read: Callable[[], Read]) -> Read:
    """`read()`, once more after a second where the fault may pass (NEEDS D15)."""
    try:
        return read()
    except BadFile as error:
        if error.kind not in decode.PASSING_FAULTS:
            raise
        time.sleep(1.0)
        return read()
