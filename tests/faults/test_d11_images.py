"""Images of every mode, and what only calls itself one: as torchvision reads them, or quarantined."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bevt_fast.data import pipeline_reference
from tests.data import media
from tests.faults import making


@pytest.fixture(params=["pyav", "dali"])
def decoder(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images, and in `bad/` others."""
    place = tmp_path_factory.mktemp("images")
    colour = media.picture(37)
    grey = colour[..., 0]
    picture, exif = Image.fromarray(colour), Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    picture.save(place / "plain.jpg", quality=90)
    picture.save(place / "exif.jpg", quality=90, exif=exif)
    picture.convert("CMYK").save(place / "cmyk.jpg", quality=95)
    picture.convert("L").save(place / "grey.jpg", quality=90)
    picture.save(place / "progressive.jpg", quality=90, progressive=True, subsampling=0)
    picture.convert("P").save(place / "palette.png")
    picture.convert("1").save(place / "two colours.png")
    Image.fromarray(np.dstack([colour, grey])).save(place / "alpha.png")
    Image.fromarray(np.dstack([grey, 255 - grey]), "LA").save(place / "grey alpha.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(place / "16 bits.png")
    picture.save(place / "png.jpg", "PNG")
    picture.save(place / "v.webp", quality=90)
    picture.save(place / "v.tiff")
    picture.resize((1, 1)).save(place / "one pixel.png")
    picture.resize((3, 2)).save(place / "small.jpg")
    bad = place / "bad"
    bad.mkdir()
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.jpg").write_text("<html>")
    making.cut(place / "plain.jpg").rename(bad / "cut.jpg")
    picture.save(place / "plain.jpg", quality=90)
    picture.save(bad / "cut.png")
    making.cut(bad / "cut.png")
    media.video(bad / "video.jpg.webm", "libvpx-vp9", frames=3).rename(bad / "video.jpg")
    Image.new("RGB", (30000, 1)).save(bad / "line.png")
    # a header that says 60000 x 60000 pixels, which would be 11 GB
    header = bytearray((place / "alpha.png").read_bytes())
    header[16:24] = (60000).to_bytes(4, "big") * 2
    (bad / "bomb.png").write_bytes(header)
    making.pipe(bad / "pipe.jpg")
    (bad / "folder.jpg").mkdir()
    return place


def good(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_d11_images_of_every_mode_are_as_torchvision_reads_them(decoder: str, folder: Path) -> None:
    files = good(folder)
    source = making.images(folder, *files)
    config = making.given("images", batch=len(files), decoder=decoder)
    batches, records = making.read(config, source, 1)
    assert not records
    for pixels, draw in zip(batches[0], making.drawn(config, source, 1)):
        name = files[draw.index]
        image = np.asarray(Image.open(folder / name).convert("RGB"))  # which is torchvision's loader of folders
        if name == "16 bits.png":  # torchvision's loader lets Pillow cut these off at 255
            image = np.repeat((np.asarray(Image.open(folder / name)) >> 8).astype(np.uint8)[..., None], 3, -1)
        expected, _ = pipeline_reference.image_views(image, draw.crop, 32)
        # DALI turns CMYK into RGB in other steps of rounding
        bound = 3 if (decoder, name) == ("dali", "cmyk.jpg") else 0
        assert np.abs(pixels.astype(int) - expected).max() <= bound, name


@pytest.mark.parametrize("workers", [0, 1])
def test_d11_what_is_no_image_is_quarantined(decoder: str, workers: int, folder: Path) -> None:
    bad = {
        "empty.jpg": "empty",
        "text.jpg": "unreadable",
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "video.jpg": "unreadable",
        "line.png": "unreadable",
        "bomb.png": "unreadable",
        "pipe.jpg": "unreadable",
        "folder.jpg": "unreadable",
    }
    source = making.images(folder, *good(folder), *(f"bad/{name}" for name in bad))
    config = making.given("images", batch=6, decoder=decoder, workers=workers)
    batches, records = making.read(config, source, 4)
    assert making.names(records) == bad
    clean, _ = making.read(making.given("images", batch=6), source, 4)
    np.testing.assert_allclose(np.array(batches).astype(int), np.array(clean), atol=3)  # as above
