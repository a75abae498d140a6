"""Bad files are replaced, named once each, counted, and too many of them end the run."""

import json
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from bevt_fast.training.quarantine import Quarantine
from tests.training.command import losses

GOOD = 12
KINDS = {  # what decode.BadFile calls each
    "truncated.mp4": "truncated",
    "empty.webm": "empty",
    "text.mp4": "unreadable",
    "sound.mp4": "no_video",
    "missing.webm": "missing",
    "one_frame.mp4": "too_short",
}


def encode(path: Path, frames: int, sound: bool = False) -> None:
    """A video of noise, or half a second of silence."""
    with av.open(str(path), "w") as file:
        if sound:
            stream: Any = file.add_stream("aac", rate=16000)
            for start in range(0, 8192, 1024):
                frame: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                frame.sample_rate, frame.pts = 16000, start
                file.mux(stream.encode(frame))
        else:
            stream = file.add_stream("mpeg4", rate=25)
            stream.width = stream.height = 64
            for picture in np.random.default_rng(0).integers(0, 255, (frames, 64, 64, 3), np.uint8):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve good videos and six bad ones, in `list.txt`."""
    place = tmp_path_factory.mktemp("videos")
    shapes = Path(tiny["clips"]["source"]["options"]["root"]) / "clips" / "train"
    names = []
    for path in sorted(shapes.iterdir())[:GOOD]:
        (place / path.name).write_bytes(path.read_bytes())
        names.append(path.name)
    encode(place / "whole.mp4", 12)
    blob = (place / "whole.mp4").read_bytes()
    (place / "truncated.mp4").write_bytes(blob[: len(blob) * 2 // 3])
    (place / "empty.webm").write_bytes(b"")
    (place / "text.mp4").write_text("<html>404 not found</html>" * 100)
    encode(place / "sound.mp4", 0, sound=True)
    encode(place / "one_frame.mp4", 1)
    (place / "list.txt").write_text("".join(f"{name} 0\n" for name in [*names, *KINDS]))
    return place


@pytest.fixture
def clips_only(settings, folder: Path):
    """The tiny run on these videos alone; 12 steps of 4 are two passes and more over 18 files."""

    def write(output: str, **changes) -> Path:
        source = {"name": "file_list", "options": {"root": str(folder), "list": "list.txt", "frames": 4, "stride": 2}}
        alone = {"images": None, "clips.source": source, "clips.heldout": None, "data.quarantine_share": 0.5}
        return settings(alone | changes, output=output)

    return write


def records(config: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.with_suffix("") / "quarantine.jsonl").read_text().splitlines()]


def test_a_run_trains_through_bad_files_and_names_each_once(clips_only, here) -> None:
    config = clips_only("first")
    done = here(config)
    assert done.code == 0, done.error
    named = records(config)
    assert sorted(Path(record["path"]).name for record in named) == sorted(KINDS)
    assert {Path(record["path"]).name: record["kind"] for record in named} == KINDS
    assert all(record["stream"] == "clips" and record["reason"] for record in named)
    log = (config.with_suffix("") / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["data/quarantined"] == len(KINDS)
    assert len(losses(config.with_suffix(""))) == 12

    # the same samples and substitutes again, whoever reads them
    again = clips_only("again", **{"data.workers": 2})
    assert here(again).code == 0
    assert losses(again.with_suffix("")) == losses(config.with_suffix(""))
    assert sorted(record["path"] for record in records(again)) == sorted(record["path"] for record in named)


def test_a_run_that_goes_on_names_no_file_twice(clips_only, here) -> None:
    whole, halves = clips_only("whole"), clips_only("halves")
    assert here(whole).code == 0 and here(halves).code == 0
    output = halves.with_suffix("")
    for path in (output / "checkpoints").glob("step_*"):
        if path.name != "step_00000004":
            (path / "MANIFEST.json").unlink()
    assert here(halves, "--resume", "auto").code == 0
    assert losses(output) == losses(whole.with_suffix(""))
    assert len(records(halves)) == len({record["path"] for record in records(halves)}) == len(KINDS)


def test_too_many_bad_files_end_the_run(clips_only, here) -> None:
    config = clips_only("refused", **{"data.quarantine_share": 0.15})
    done = here(config)
    assert done.code == 3
    assert "Traceback" not in done.error
    last = done.error.splitlines()[-1]  # the lines before are steps
    assert last.startswith("error: ") and "18 files" in last and "quarantine_share" in last
    # 0.15 of 18 is 2.7: the third is one too many, and all that were met are in the file
    assert 3 <= len(records(config)) <= len(KINDS)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_nothing_but_bad_files_is_named_file_by_file(workers: int, settings, here, tmp_path: Path) -> None:
    place = tmp_path / "videos"
    place.mkdir()
    for number in range(4):
        (place / f"{number}.mp4").write_text("<html>404 not found</html>")
    options = {"root": str(place), "kind": "clips", "frames": 4, "stride": 1}
    source = {"name": "file_list", "options": options}
    config = settings({"clips.source": source, "clips.heldout": None, "images": None, "data.workers": workers})
    done = here(config)
    assert done.code == 3 and "in a row cannot be read" in done.error and "Traceback" not in done.error
    assert sorted(Path(record["path"]).name for record in records(config)) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


# -- the file itself ---------------------------------------------------------------------------------------------------


def bad(number: int, stream: str = "clips") -> dict[str, str]:
    return {"stream": stream, "path": f"{number}.mp4", "kind": "truncated", "reason": "why"}


@pytest.mark.parametrize("share", [Fraction(1, 4), Fraction(1, 3), Fraction(0)])
def test_the_share_may_be_reached_but_not_passed(tmp_path: Path, share: Fraction) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", {"clips": 12, "images": 1000}, float(share))
    for number in range(int(share * 12)):
        quarantine.add([bad(number), bad(number)])
        assert quarantine.verdict() is None
    quarantine.add([bad(99)])
    verdict = quarantine.verdict()
    assert verdict is not None and f"{int(share * 12) + 1} of 12 files of clips" in verdict
    assert "images" not in verdict


def test_streams_are_counted_apart(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", {"clips": 4, "images": 4}, 0.25)
    quarantine.add([bad(0), bad(0, "images")])
    assert quarantine.verdict() is None and len(quarantine) == 2


def test_what_another_process_found_counts_too(tmp_path: Path) -> None:
    one, other = (Quarantine(tmp_path / "q.jsonl", {"clips": 4}, 0.25) for _ in range(2))
    one.add([bad(0)])
    other.add([bad(0), bad(1)])
    assert one.verdict() is not None and other.verdict() is not None
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 2


def test_processes_that_find_the_same_file_at_once_name_it_once(tmp_path: Path) -> None:
    share = [Quarantine(tmp_path / "q.jsonl", {"clips": 10**6}, 1.0) for _ in range(4)]
    start = threading.Barrier(len(share))

    def find(quarantine: Quarantine) -> None:
        start.wait()
        for number in range(100):
            quarantine.add([bad(number)])

    threads = [threading.Thread(target=find, args=(quarantine,)) for quarantine in share]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["path"] for line in lines) == sorted(f"{number}.mp4" for number in range(100))


def test_a_half_written_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    line = json.dumps(bad(7)) + "\n"
    path.write_text(line + line[:10])
    quarantine = Quarantine(path, {"clips": 4}, 1.0)
    assert len(quarantine) == 1
    path.write_text(line + json.dumps(bad(8)) + "\n")
    quarantine.add([])
    assert len(quarantine) == 2
