"""Data that changed between saving and going on: refused with the reason, or taken because the user says so."""

import logging
from pathlib import Path

import pytest

from tests.data import media
from tests.faults import making
from tests.training.command import losses


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "videos"
    place.mkdir()
    for k in range(6):
        media.video(place / f"{k}.avi", "mpeg4", frames=10 + k, size=(64, 64))
    (place / "list.txt").write_text("".join(f"{k}.avi\n" for k in range(6)))
    return place


def test_d14_changed_data_is_refused_unless_the_user_allows_it(folder: Path, clips_only, here, caplog) -> None:
    config = clips_only(folder, train__steps=2, train__save_every=2)
    output = config.with_suffix("")
    assert here(config).code == 0
    longer = clips_only(folder, train__steps=4, train__save_every=2)

    def refused(*words: str) -> None:
        done = here(longer, "--resume", "auto")
        assert done.code == 4 and "Traceback" not in done.error and len(losses(output)) == 2
        for word in ("step_00000002", "clips", "data.allow_change=true", "model.weights", *words):
            assert word in done.error.splitlines()[-1]

    before = (folder / "3.avi").read_bytes()
    making.cut(folder / "3.avi", 0.9)  # the same name, another file
    refused("sizes of the files")
    (folder / "3.avi").write_bytes(before)
    listed = (folder / "list.txt").read_text()
    (folder / "list.txt").write_text(listed.replace("0.avi\n1.avi\n", "1.avi\n0.avi\n"))
    refused("list of clips")
    (folder / "list.txt").write_text(listed.replace("5.avi\n", ""))
    refused("list of clips", "'files': 6", "'files': 5")

    with caplog.at_level(logging.WARNING, "bevt_fast"):
        assert here(longer, "--resume", "auto", "--set", "data.allow_change=true").code == 0
    assert "from here on the samples are others" in caplog.text
    assert len(losses(output)) == 4


def test_d14_the_same_data_elsewhere_is_the_same(folder: Path, clips_only, here, caplog) -> None:
    """Copied to another root, with other dates: nothing has changed."""
    assert here(clips_only(folder, train__steps=2, train__save_every=2)).code == 0
    moved = folder.rename(folder.with_name("moved"))
    for path in moved.iterdir():
        path.write_bytes(path.read_bytes())
    with caplog.at_level(logging.WARNING, "bevt_fast"):
        assert here(clips_only(moved, train__steps=3, train__save_every=2), "--resume", "auto").code == 0
    assert "not those" not in caplog.text
