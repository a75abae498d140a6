"""Files that end the process which reads them, as a decoder's fault does: found out, and refused from then on.

A worker notes in shared memory what it is about to read. When one has died its note is a suspect; what is suspected
twice is at fault, and is a bad file from then on. What is refused is one reading: a header or an image, or one clip of
a video. So neither the number of workers nor the order of their deaths nor a restart decides what is replaced. A worker
that was killed accuses nothing: that is how a machine gets its memory back.
"""

import multiprocessing
import os
from typing import Any, NamedTuple

import torch.utils.data

from bevt_fast.data.faults import BadFile
from bevt_fast.data.packed import File

FIELDS = 4  # of a note: the worker's pid, and a Reading


class Reading(NamedTuple):
    """A file that is read: its header or all of it, or the clip for the sample `index` in a view."""

    file: int
    view: int = -1
    index: int = -1


NOTHING, SEVERAL = Reading(-1), Reading(-2)  # between items; files that DALI decodes together


class Crashes:
    """What the workers of a stream are reading, and what they have died of."""

    def __init__(self) -> None:
        self.singly = False  # whether DALI is to be given one file at a time, so that it is known which
        self._notes: Any = None
        self._suspects: set[Reading] = set()
        self._refused: set[Reading] = set()

    def watch(self, workers: int) -> None:
        """Before workers are forked: nothing is noted yet."""
        self._notes = multiprocessing.RawArray("q", FIELDS * workers)

    def note(self, reading: Reading) -> None:
        """In a worker: this is read next."""
        worker = torch.utils.data.get_worker_info()
        if worker is not None and self._notes is not None:
            self._notes[FIELDS * worker.id : FIELDS * (worker.id + 1)] = [os.getpid(), *reading]

    def begin(self, reading: Reading, path: File) -> None:
        """As `note`. Raises BadFile for what is known to end the process."""
        if reading in self._refused:
            raise BadFile("crash", path, "the process that read it died, twice")
        self.note(reading)

    def blame(self, dead: set[int]) -> bool:
        """Take up the notes of the dead, by pid; whether one of them has died of what another died of before."""
        notes = [self._notes[k : k + FIELDS] for k in range(0, len(self._notes or ()), FIELDS)]
        readings = {Reading(*reading) for process, *reading in notes if process in dead} - {NOTHING}
        self.singly |= SEVERAL in readings
        guilty = (readings & self._suspects) - {SEVERAL}
        self._suspects = (self._suspects | readings) - guilty
        self._refused |= guilty
        return bool(guilty)
