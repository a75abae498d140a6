"""Files that are no videos, are not there, or are too many: what a run says, writes down and returns."""

import logging
from pathlib import Path

import pytest

from tests.data import media
from tests.faults import making
from tests.training.command import losses

GOOD = 8


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good videos."""
    folder = tmp_path_factory.mktemp("good")
    first = [media.video(folder / f"{k}.mp4", "mpeg4", frames=12 + k, size=(64, 64)) for k in range(2)]
    for k in range(2, GOOD):
        (folder / f"{k}.mp4").write_bytes(first[k % 2].read_bytes())
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    place = tmp_path / "videos"
    place.mkdir()
    for path in good.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def listed(folder: Path, *more: str) -> Path:
    """The good videos of a folder and `more`, in its list."""
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in [*(f"{k}.mp4" for k in range(GOOD)), *more]))
    return folder


def test_d01_a_truncated_mp4_is_replaced_counted_and_written_down(folder: Path, clips_only, here) -> None:
    making.cut(media.video(folder / "cut.mp4", "libx264", size=(64, 64)))
    listed(folder, "cut.mp4")
    runs = [clips_only(folder, f"run{k}", train__steps=5, data__workers=k) for k in (0, 1)]
    for config in runs:
        assert here(config).code == 0
        (record,) = making.quarantined(config.with_suffix(""))
        assert record["path"] == str(folder / "cut.mp4") and record["kind"] == "truncated"
        assert record["substitute"] != record["index"] == GOOD
    outputs = [config.with_suffix("") for config in runs]
    assert losses(outputs[0]) == losses(outputs[1]) and len(losses(outputs[0])) == 5
    assert making.quarantined(outputs[0]) == making.quarantined(outputs[1])  # the same substitute, whoever reads


def test_d03_what_is_no_video_is_named_by_what_it_is(folder: Path, clips_only, here) -> None:
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("<html>404 not found</html>" * 99)
    media.sound(folder / "sound.mp4")
    (folder / "image.mp4").write_bytes(b"")
    from PIL import Image

    Image.fromarray(media.picture(3)).save(folder / "image.mp4", "JPEG")
    making.pipe(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    kinds = {"empty.mp4": "empty", "text.mp4": "unreadable", "sound.mp4": "no_video", "image.mp4": "too_short"}
    kinds |= {"pipe.mp4": "unreadable", "folder.mp4": "no_video"}
    config = clips_only(listed(folder, *kinds), data__quarantine_share=0.6, train__steps=5)
    assert here(config).code == 0
    found = making.quarantined(config.with_suffix(""))
    assert making.names(found) == kinds and len(found) == len(kinds)
    assert all(record["reason"] for record in found)


def test_d04_files_that_are_not_there_end_it_before_anything_expensive(
    folder: Path, clips_only, here, monkeypatch
) -> None:
    from bevt_fast.training import distributed

    def started(*arguments):
        raise AssertionError("a device was looked for")

    monkeypatch.setattr(distributed, "start", started)
    missing = [f"gone{k}.mp4" for k in range(7)]
    config = clips_only(listed(folder, *missing))
    elsewhere = clips_only(folder, "elsewhere", clips__source__options__root=str(folder / "not there"))
    for arguments in ([], ["--dry-run"]):
        done = here(config, *arguments)
        assert done.code == 3 and "Traceback" not in done.error
        assert "7 of 15" in done.error and ", ".join(missing[:5]) + ", ..." in done.error
        assert missing[5] not in done.error and str(folder) in done.error and "'root'" in done.error
        done = here(elsewhere, *arguments)
        assert done.code == 3 and "not there does not exist" in done.error and "'root'" in done.error
    assert not config.with_suffix("").exists() and not elsewhere.with_suffix("").exists()


def test_d04_a_few_missing_files_are_quarantined(folder: Path, clips_only, here) -> None:
    config = clips_only(listed(folder, "gone.mp4"), train__steps=5)
    assert here(config).code == 0
    assert making.names(making.quarantined(config.with_suffix(""))) == {"gone.mp4": "missing"}


@pytest.mark.parametrize("workers", [0, 1])
def test_d10_too_many_bad_files_end_the_run_with_a_report(workers: int, folder: Path, clips_only, here, caplog) -> None:
    bad = [f"bad{k}.mp4" for k in range(4)]
    for name in bad:
        (folder / name).write_text("no video")
    config = clips_only(listed(folder, *bad), data__quarantine_share=0.2, data__workers=workers, train__steps=20)
    with caplog.at_level(logging.WARNING, "bevt_fast"):
        done = here(config)
    assert done.code == 3 and "Traceback" not in done.error
    sentence = done.error.splitlines()[-1]
    output = config.with_suffix("")
    assert sentence.startswith("error: ") and "of 12 files of clips are bad" in sentence
    assert "data.quarantine_share = 0.2" in sentence and str(output / "quarantine.jsonl") in sentence
    found = making.names(making.quarantined(output))
    assert 3 <= len(found) <= 4 and set(found) <= set(bad)  # 0.2 of 12 is 2.4
    assert sum("quarantined" in record.getMessage() for record in caplog.records) == len(found)
