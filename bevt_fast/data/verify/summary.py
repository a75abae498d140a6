"""What a report says of a source, in a few lines, and what to do about it."""

from collections import Counter
from typing import NamedTuple

from bevt_fast.data.sources import Frames, Source

REMEDIES = {
    "missing": "check the root, or leave them out",
    "empty": "fetch them again",
    "unreadable": "fetch them again; a file that takes too long may need a larger --timeout",
    "no_video": "they hold no pictures; leave them out",
    "truncated": "fetch them again, or correct the list",
    "too_short": "fewer frames than min_frames; leave them out",
    "corrupt": "fetch them again",
    "io": "the storage failed; run this again",
}
CLOSE = 16  # frames between keyframes where a clip costs little more than its span


class _Keys(NamedTuple):
    """The file whose keyframes are furthest apart."""

    longest: int = 0
    path: str = ""


class Tally:
    """Counts the rows of one source; nothing in it grows with their number."""

    def __init__(self, source: Source) -> None:
        self.frames = source.frames
        self._faults: Counter[str] = Counter()
        self._codecs: Counter[str] = Counter()
        self._other: Counter[str] = Counter()
        self._keys = _Keys()
        self._decoded, self._close, self._worst, self._indexed = 0.0, 0.0, 0, 0

    def add(self, row: dict[str, str]) -> None:
        """Count a row of the report."""
        self._other["files"] += 1
        if row["status"] != "ok":
            self._faults[row["status"]] += 1
            return
        self._codecs[f"{row['codec']} {row['pixel_format']}"] += 1
        self._other["variable"] += row["frame_rate"] == "variable"
        self._other["unknown"] += row["frame_rate"] == "unknown"
        self._other["turned"] += row["rotation"] not in ("", "0")
        self._other["tagged"] += row["exif_orientation"] not in ("", "0", "1")
        self._other["dali"] += row["decoder"] == "dali"
        self._other["pyav"] += row["decoder"] == "pyav"
        self._other["nvdec"] += row["nvdec"].startswith("yes")
        if self.frames is not None and row["frames"].isdecimal():
            n = int(row["frames"])
            self._other["short"] += n < span(self.frames)
            if row["keyframe_longest"].isdecimal():
                # in a phase-split file of its stride the frames of a clip are neighbours
                neighbours = self.frames.mode == "interval" and row["phases"] == str(self.frames.stride)
                self._add_keys(row, n, self.frames._replace(stride=1) if neighbours else self.frames)

    def _add_keys(self, row: dict[str, str], n: int, frames: Frames) -> None:
        longest = int(row["keyframe_longest"])
        self._keys = max(self._keys, _Keys(longest, row["path"]))
        self._indexed += 1
        self._decoded += decoded(frames, n, float(row["keyframe_mean"]))
        self._close += decoded(frames, n, CLOSE)
        self._worst = max(self._worst, min(n, longest - 1 + (n if frames.mode == "uniform" else span(frames))))

    def lines(self) -> list[str]:
        """The summary, indented."""
        files, bad = self._other["files"], sum(self._faults.values())
        found = [f"{files:,} files, {bad:,} bad"]
        found += [f"{count:,} {kind}: {REMEDIES.get(kind, '')}" for kind, count in self._faults.most_common()]
        if self._codecs:
            found.append("codecs: " + ", ".join(f"{count:,} {codec}" for codec, count in self._codecs.most_common(12)))
            found.append(
                f'with data.decoder "dali" {self._other["dali"]:,} go through DALI here and {self._other["pyav"]:,} '
                + "through PyAV"
                + (f"; a GPU's NVDEC takes {self._other['nvdec']:,} (by table)" if self.frames else "")
            )
        if self._other["variable"]:
            found.append(
                f"{self._other['variable']:,} have a variable frame rate: frames are counted, so they are read "
                "exactly, but a clip of them spans a varying time; transcode to a constant rate if that matters"
            )
        if self._other["unknown"]:
            found.append(f"{self._other['unknown']:,} have no trustworthy times: every read starts at the first frame")
        if self._other["turned"]:
            found.append(f"{self._other['turned']:,} are stored turned, and are turned back by PyAV")
        if self._other["tagged"]:
            found.append(f"{self._other['tagged']:,} have an EXIF orientation, which is not applied (SPEC 5.3)")
        return [f"  {printable(line)}" for line in (*found, *self._of_clips())]

    def _of_clips(self) -> list[str]:
        if self.frames is None:
            return []
        found = []
        if self._other["short"]:
            found.append(
                f"{self._other['short']:,} have fewer frames than the {span(self.frames)} a clip spans, and are looped"
            )
        if not self._indexed:
            return found
        mean, close = self._decoded / self._indexed, self._close / self._indexed
        said = (
            f"keyframes are up to {self._keys.longest} frames apart ({self._keys.path}): a clip of {self.frames.count} "
            f"frames costs about {mean:.0f} decoded ones, {self._worst} at worst"
        )
        if mean > 1.2 * close:
            said += (
                f"; with a keyframe every {CLOSE} frames {close:.0f}, so transcode where decoding is the bottleneck: "
                f"ffmpeg -i IN -c:v libx264 -g {CLOSE} -bf 0 -crf 18 -an OUT.mp4"
            )
        return [*found, said]


def span(frames: Frames) -> int:
    """The frames a clip needs of a video so that none comes twice (SPEC 6.7)."""
    return frames.count if frames.mode == "uniform" else (frames.count - 1) * frames.stride + 1


def decoded(frames: Frames, n: int, apart: float) -> float:
    """About how many frames are decoded for a clip of a video of `n` frames, with a keyframe every `apart` of them.

    From a keyframe on there are on average half a group to the first frame of the clip, then all of its span; or half a
    group to each of its frames, where each has a keyframe of its own.
    """
    spanned = n if frames.mode == "uniform" else span(frames)
    return min(n, spanned + (apart - 1) / 2, frames.count * (apart + 1) / 2)


def printable(text: str) -> str:
    """`text` for any terminal: a name that is not UTF-8 is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()
