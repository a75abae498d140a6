"""One stream, read by number: what the i-th micro-batch holds is a function of the seed and of i alone.

Sample, frames, crop and mask of a position never depend on how many processes read, train or have died: each is drawn
from a generator keyed by (seed, stream, epoch, index). A bad file is replaced by a substitute that is also drawn by
key, and a record of it travels with the batch.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from bevt_fast.config import Config, Stream, View, accumulation
from bevt_fast.data import damage, decode, masking, pace, phases, pipeline, pipeline_reference, sampling
from bevt_fast.data.crashes import NOTHING, SEVERAL, Crashes, Reading
from bevt_fast.data.decode import Probe
from bevt_fast.data.faults import BadFile, or_bad, twice
from bevt_fast.data.pipeline import DaliViews, Job
from bevt_fast.data.sampling import Crop, Place
from bevt_fast.data.sources import Source
from bevt_fast.errors import DataError, UserError

if TYPE_CHECKING:
    from bevt_fast.data.token_cache import TokenCache

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


class Slot(NamedTuple):
    """A place in a batch, and the file read for it: the place's own, or a substitute."""

    place: Place
    file: int
    failed: int = 0  # files tried before, all of them bad


class Sample(NamedTuple):
    """One sample: uint8 pictures, channels last, and the bool mask."""

    pixels: np.ndarray  # ([T,] S, S, 3)
    mask: np.ndarray
    file: int  # what it was read from: the index of the sample itself, or of its substitute


def draw(config: Config, stream: str, source: Source, epoch: int, index: int, heldout: bool = False) -> Draw:
    """The draw of sample `index` in pass `epoch` of a stream ("clips" or "images"). Reads the file's header, no pixels.

    Raises BadFile where the loader would take a substitute.
    """
    return StreamReader(config, stream, source, heldout=heldout).draw(epoch, index, index)


class StreamReader(Dataset):
    """One stream of one process, by number of the micro-batch: `reader[i]` is the i-th since the start of the run.

    An item is a dict of pixels (B, [T,] S, S, 3) and, if `token_views`, token_pixels (B, [T,] s, s, 3) uint8, mask
    bool, `busy`, `bad`: a list of records, and `left_to_pyav`: the codecs met so far that DALI does not take. After
    `take_targets_from` it has `known` instead of token_pixels: ids, int64. An error meant for the user is returned, not
    raised: so it reaches the training process as it is.
    """

    def __init__(
        self, config: Config, stream: str, source: Source, *, rank: int = 0, world_size: int = 1, heldout: bool = False
    ):
        section: Stream = getattr(config, stream)
        self.name, self.source, self.view = stream, source, section.view
        self.key, self.seed = stream, config.seed
        if heldout:
            self.key, self.seed, self.view = f"heldout {stream}", HELDOUT_SEED, _plain(section.view)
        self.views = None if heldout else config.data.views
        self.masking = masking.build(section.mask)
        self.order = sampling.jitter_order(self.seed)
        self.accumulation = accumulation(config, world_size)
        self.split = {"world_size": world_size, "micro_batch": section.micro_batch, "accumulation": self.accumulation}
        self.rank = rank
        self.kind: pipeline.Kind = "images" if source.frames is None else "clips"
        self.dali: DaliViews | None = None
        if config.data.decoder == "dali":
            pipeline.require()
            self.dali = DaliViews(self.kind, section.micro_batch, self.order)
        self.token_views = True  # without them the training device makes them of the pixels
        self.cache: "TokenCache | None" = None
        self.on_damage = config.data.on_damage
        self.crashes = Crashes()
        self._bad: dict[int, BadFile] = {}  # files this process knows to be bad, by index
        self._repaired: list[dict[str, Any]] = []  # records of clips that `use_previous` has kept
        self._left_to_pyav: set[str] = set()  # codecs met that DALI does not take

    def take_targets_from(self, cache: "TokenCache | None") -> None:
        """Items have the ids of `cache` from now on, and no token pixels."""
        self.cache = cache

    def __getitem__(self, number: int) -> "dict[str, Any] | UserError":
        step, micro = divmod(number, self.accumulation)
        positions = sampling.micro_batch_positions(step, micro, self.rank, **self.split)
        places = [sampling.place(self.seed, self.key, position, len(self.source)) for position in positions]
        bad: list[dict[str, Any]] = []
        try:
            item, busy = pace.measured(lambda: self.item(places, bad))
        except UserError as error:
            return error
        finally:
            self.crashes.note(NOTHING)
        return item | {"bad": bad, "busy": busy, "left_to_pyav": sorted(self._left_to_pyav)}

    def item(self, places: Sequence[Place], bad: list[dict[str, Any]]) -> dict[str, Any]:
        """The samples at `places` as they travel to the training process."""
        samples = self.read(places, bad)
        pixels, masks = np.stack([s.pixels for s in samples]), np.stack([s.mask for s in samples])
        item = {"pixels": torch.from_numpy(pixels), "mask": torch.from_numpy(masks)}
        if (known := self._known(places, samples)) is not None:
            return item | {"known": known}
        if self.token_views:
            pictures = pixels.reshape(-1, *pixels.shape[-3:])
            views = np.stack([pipeline_reference.token_view(picture, self.view.size // 2) for picture in pictures])
            item["token_pixels"] = torch.from_numpy(views).reshape(*pixels.shape[:-3], *views.shape[1:])
        return item

    def read(self, places: Sequence[Place], bad: list[dict[str, Any]]) -> list[Sample]:
        """The samples at `places`, or their substitutes; adds to `bad` a record of each bad file."""
        return self.fill([Slot(place, place.index) for place in places], self._outcomes, bad)

    def fill(
        self, slots: list[Slot], read: Callable[[list[Slot]], list[Read | BadFile]], bad: list[dict[str, Any]]
    ) -> list[Read]:
        """What `read` finds in each slot, or in its next substitute that can be read; adds to `bad` a record of each
        bad file. Raises DataError after too many of them.
        """
        slots, found = list(slots), {}
        while left := [k for k in range(len(slots)) if k not in found]:
            for k, outcome in zip(left, read([slots[k] for k in left])):
                if not isinstance(outcome, BadFile):
                    found[k] = outcome
                    continue
                place, file, failed = slots[k]
                self._refuse(outcome, place.epoch, file)
                view = self._view(place.epoch)
                other = sampling.substitute(self.seed, self.key, view, place.index, failed, len(self.source))
                bad.append(self.record(outcome, place.epoch, file, other))
                slots[k] = Slot(place, other, failed + 1)
            if max(slot.failed for slot in slots) >= MAX_SUBSTITUTES:
                error = DataError(
                    f"{self.name}: {MAX_SUBSTITUTES} files in a row cannot be read, the last one {bad[-1]['path']} "
                    f"({bad[-1]['kind']}: {bad[-1]['reason']}); check the files of the source {self.source.name!r}"
                )
                error.records = bad
                raise error
        bad += self._repaired
        self._repaired = []
        return [found[k] for k in range(len(slots))]

    def draw(self, epoch: int, index: int, file: int) -> Draw:
        """The draw of slot `index` in pass `epoch`, to be read from `file`: `index` itself, or its substitute."""
        self.crashes.begin(Reading(file), self.source.file(file))
        found = self._probed(file)
        rng = sampling.random_for(self.seed, self.key, self._view(epoch), index, "view")
        frames, steps = None, None
        if self.source.frames is not None:
            frames = sampling.clip_frames(found.frames, self.source.frames, rng)
            steps = self.source.frames.count // 2
        crop = sampling.draw_crop(found.height, found.width, self.view, rng)
        if crop.height * crop.width > LARGEST_PICTURE:
            shape = f"{found.height} x {found.width} pixels, {crop.height} x {crop.width} rescaled"
            raise BadFile("unreadable", self.source.file(file), f"too long and narrow: {shape}")
        grid = (self.view.size // CELL, self.view.size // CELL)
        mask = self.masking(grid, steps, sampling.random_for(self.seed, self.key, epoch, index, "mask"))
        return Draw(epoch, index, frames, crop, mask)

    def _view(self, epoch: int) -> int:
        """What stands for the pass in the keys of all that decides the pixels of a sample: masks and order differ in
        every pass.
        """
        return epoch % self.views if self.views else epoch

    def _known(self, places: Sequence[Place], samples: Sequence[Sample]) -> torch.Tensor | None:
        """The ids the cache has, if there is a cache. Raises DataError for a damaged one."""
        if self.cache is None:
            return None
        pairs = zip(places, samples)
        return torch.from_numpy(np.stack([self.cache.ids(*place, s.file, s.pixels) for place, s in pairs]))

    def _outcomes(self, slots: Sequence[Slot]) -> list[Sample | BadFile]:
        """For each slot its sample, or what is wrong with its file."""
        outcomes: dict[int, Sample | BadFile] = {}
        for_dali: dict[int, Draw] = {}
        for k, slot in enumerate(slots):
            drawn = or_bad(self.draw, *slot.place, slot.file)
            if isinstance(drawn, BadFile):
                outcomes[k] = drawn
            elif self._dali_takes(slot.file):
                for_dali[k] = drawn
            else:  # read before the next is drawn: the file is still open
                outcomes[k] = self._sample(drawn, slot.file)
        cut = self._by_dali({k: self._job(drawn, slots[k].file) for k, drawn in for_dali.items()}, slots)
        for k, drawn in for_dali.items():
            pixels = cut[k]
            # DALI decodes from the file's beginning, so damage before the clip ends it: PyAV has the last word
            outcomes[k] = self._sample(drawn, slots[k].file, None if isinstance(pixels, BadFile) else pixels)
        return [outcomes[k] for k in range(len(slots))]

    def _sample(self, drawn: Draw, file: int, pixels: np.ndarray | None = None) -> Sample | BadFile:
        """The sample of a draw; `pixels` are read unless they are given."""
        found = or_bad(self._pixels, drawn, file) if pixels is None else pixels
        return found if isinstance(found, BadFile) else Sample(found, drawn.mask, file)

    def _by_dali(self, jobs: dict[int, Job], slots: Sequence[Slot]) -> dict[int, np.ndarray | BadFile]:
        """What DALI reads, together unless it has died of one of them."""
        if self.dali is None or not jobs:
            return {}
        if not self.crashes.singly:
            self.crashes.note(SEVERAL)
            return dict(zip(jobs, self.dali(list(jobs.values()))))
        found = {}
        for k, job in jobs.items():
            reading = self._reading(*slots[k].place, slots[k].file)
            found[k] = or_bad(self.crashes.begin, reading, job.path) or self.dali([job])[0]
        return found

    def _reading(self, epoch: int, index: int, file: int) -> Reading:
        return Reading(file) if self.source.frames is None else Reading(file, self._view(epoch), index)

    def _dali_takes(self, file: int) -> bool:
        if self.dali is None:
            return False
        found = self._probed(file)
        if not (taken := pipeline.takes(found)):
            self._left_to_pyav.add(found.codec)
        return taken

    def _job(self, drawn: Draw, file: int) -> Job:
        first = self.source.extent(file)[0]
        frames = drawn.frames
        if frames is not None:
            frames = phases.stored([first + frame for frame in frames], self._probed(file).layout)
        return Job(self.source.file(file), frames, drawn.crop)

    def pictures(self, drawn: Draw, file: int) -> np.ndarray:
        """The pictures of a draw, ([T,] H, W, 3) uint8 as they are in `file`, without DALI. Raises BadFile."""
        path, wanted = self.source.file(file), drawn.frames
        self.crashes.begin(self._reading(drawn.epoch, drawn.index, file), path)
        if wanted is None:
            return self._remembering(file, lambda: decode.read_image(path))
        # a clip that cannot be decoded says nothing about other clips of the file, so it is not remembered
        return self._clip(drawn.epoch, wanted, file)

    def _pixels(self, drawn: Draw, file: int) -> np.ndarray:
        """Pixels of a draw, read from `file` without DALI."""
        pictures = self.pictures(drawn, file)
        if drawn.frames is None:
            return pipeline_reference.image_pixels(pictures, drawn.crop, self.order)
        return pipeline_reference.clip_pixels(pictures, drawn.crop)

    def _clip(self, epoch: int, wanted: list[int], file: int) -> np.ndarray:
        """The frames `wanted` of a file; damaged ones are as `data.on_damage` says. Raises BadFile."""
        path, extent = self.source.file(file), self.source.extent(file)
        try:
            return twice(lambda: decode.read_frames(path, wanted, extent))
        except BadFile as error:
            if self.on_damage != "use_previous" or error.kind != "corrupt":
                raise
            frames = twice(lambda: damage.read_good_frames(path, wanted, extent))
            self._repaired.append(self.record(error, epoch, file, file))
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
        path = str(self.source.file(file))
        reason = error.reason if error.path == path else f"{error.path}: {error.reason}"
        fault = {"stream": self.name, "path": path, "kind": error.kind, "reason": reason}
        return fault | {"epoch": epoch, "index": file, "substitute": substitute}

    def _probed(self, file: int) -> Probe:
        path = self.source.file(file)
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
            return twice(read)
        except BadFile as error:
            if error.kind not in decode.PASSING_FAULTS:
                self._bad[file] = error
            raise


def _plain(view: View) -> View:
    """The view without augmentation: no flip, no jitter, the smallest scale; the place of the crop is still drawn."""
    return View(size=view.size, short_side=(view.short_side[0], view.short_side[0]), flip=0.0, colour_jitter=0.0)
