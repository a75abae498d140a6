"""Frame k is the k-th shown frame in any container and codec; an unusable file is a BadFile of the right kind."""

import pickle

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from bevt_fast.data import decode
from bevt_fast.data.decode import BadFile, probe, read_frames, read_image
from tests.data import media

IRREGULAR = np.cumsum(np.random.RandomState(0).randint(10, 90, 40))
VIDEOS = {
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp9-irregular.webm": {"codec": "libvpx-vp9", "times": IRREGULAR},
    "vp9-odd.webm": {"codec": "libvpx-vp9", "size": (129, 171)},
    "vp9-444.webm": {"codec": "libvpx-vp9", "pixel_format": "yuv444p"},
    "vp8.webm": {"codec": "libvpx"},
    "h264.mp4": {"codec": "libx264", "options": {"bf": "3", "x264-params": "b-pyramid=normal"}},
    "h264-open.mp4": {"codec": "libx264", "options": {"x264-params": "open-gop=1:bframes=3"}},
    "h264-refresh.mp4": {"codec": "libx264", "options": {"x264-params": "intra-refresh=1"}},
    "h264-irregular.mp4": {"codec": "libx264", "options": {"bf": "2"}, "times": IRREGULAR},
    "h264-faststart.mp4": {"codec": "libx264", "container": {"movflags": "faststart"}},
    "h264.avi": {"codec": "libx264", "options": {"bf": "2"}},  # no presentation times
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4-b.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pixel_format": "yuvj422p"},
    "hevc-10bit.mp4": {"codec": "libx265", "pixel_format": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "ffv1-10bit.mkv": {"codec": "ffv1", "pixel_format": "yuv422p10le"},
    "ffv1-alpha.mkv": {"codec": "ffv1", "pixel_format": "bgra"},
}


def in_order(path):
    """Every frame as PyAV's plain decoder gives them, one after the other."""
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@pytest.mark.parametrize("name", VIDEOS)
def test_any_frames_are_those_of_a_decoding_from_the_start(name, tmp_path):
    path = media.video(tmp_path / name, **VIDEOS[name])
    expected = in_order(path)
    assert [media.number(frame) for frame in expected] == list(range(40))
    found = probe(path)
    assert (found.frames, found.height, found.width) == expected.shape[:3]
    rng = np.random.RandomState(1)
    for count in (1, 1, 2, 5, 16):
        indices = rng.randint(0, 40, count).tolist()
        np.testing.assert_array_equal(read_frames(path, indices), expected[indices])
    looped = [(30 + 3 * k) % 40 for k in range(8)]
    np.testing.assert_array_equal(read_frames(path, looped), expected[looped])


def test_frames_outside_the_edit_list_do_not_count(tmp_path):
    times = [40 * (k - 7) for k in range(40)]
    container = {"avoid_negative_ts": "disabled"}
    path = media.video(tmp_path / "edit.mp4", "libx264", options={"bf": "2"}, times=times, container=container)
    assert probe(path).frames == 33
    assert [media.number(frame) for frame in read_frames(path, range(33))] == list(range(7, 40))


def test_hidden_frames_of_vp8_do_not_count(tmp_path):
    source, path = media.video(tmp_path / "all.webm", "libvpx"), tmp_path / "hidden.webm"
    with av.open(str(source)) as whole, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(whole.streams.video[0])
        for k, packet in enumerate(whole.demux(video=0)):
            if packet.size:
                content = bytearray(bytes(packet))
                content[0] &= ~16 if k in (5, 17) else 255  # show_frame (RFC 6386, 9.1)
                copy = av.Packet(bytes(content))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.stream, copy.is_keyframe = stream, packet.is_keyframe
                output.mux(copy)
    shown = [k for k in range(40) if k not in (5, 17)]
    assert probe(path).frames == 38
    assert [media.number(frame) for frame in read_frames(path, range(38))] == shown
    assert [media.number(frame) for frame in read_frames(path, [20, 5])] == [22, 6]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_rotated_video_is_turned_anticlockwise(rotation, tmp_path):
    path = media.video(tmp_path / "turned.mp4", "libx264", frames=3, rotation=rotation)
    upright = in_order(path)
    found = probe(path)
    frames = read_frames(path, [2, 0])
    assert found.rotation == rotation
    assert (found.height, found.width) == frames.shape[1:3] == ((64, 96) if rotation == 180 else (96, 64))
    for frame, stored in zip(frames, upright[[2, 0]]):
        if rotation == 90:  # the top row becomes the left column, read upwards
            np.testing.assert_array_equal(frame[:, 0], stored[0][::-1])
        elif rotation == 180:
            np.testing.assert_array_equal(frame, stored[::-1, ::-1])
        else:  # the top row becomes the right column, read downwards
            np.testing.assert_array_equal(frame[:, -1], stored[0])


def test_colours_survive(tmp_path):
    """RGB in, RGB out: a lossless file gives back its pictures exactly."""
    path = media.video(tmp_path / "lossless.mkv", "ffv1", pixel_format="bgr0", frames=3)
    np.testing.assert_array_equal(read_frames(path, [2])[0], media.picture(2))


def test_a_part_of_a_video_is_counted_from_its_first_frame(tmp_path):
    path = media.video(tmp_path / "v.webm", "libvpx-vp9")
    assert probe(path, (10, -1)).frames == 30
    assert probe(path, (10, 5)).frames == 5
    assert [media.number(frame) for frame in read_frames(path, [0, 4, 2], (10, 5))] == [10, 14, 12]
    with pytest.raises(IndexError):
        read_frames(path, [5], (10, 5))
    with pytest.raises(BadFile, match=r"holds 40 frames where the list says 30 \+ 11") as caught:
        probe(path, (30, 11))
    assert caught.value.kind == "truncated"


def test_a_folder_of_images_is_a_video_in_the_order_of_its_numbers(tmp_path):
    for k in (1, 2, 10, 11, 3):
        Image.fromarray(media.picture(k)).save(tmp_path / f"img_{k}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert probe(tmp_path)[:3] == (5, 64, 96)
    frames = read_frames(tmp_path, [4, 0, 1, 3])
    np.testing.assert_array_equal(frames, [media.picture(k) for k in (11, 1, 2, 10)])
    assert [media.number(f) for f in read_frames(tmp_path, [0, 1], (2, 2))] == [3, 10]


def test_a_folder_without_images_is_no_video(tmp_path):
    with pytest.raises(BadFile) as caught:
        probe(tmp_path)
    assert caught.value.kind == "no_video"


def shortened(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


UNUSABLE = {
    "missing": lambda folder: folder / "nowhere.mp4",
    "empty": lambda folder: written(folder / "empty.mp4", b""),
    "unreadable": lambda folder: written(folder / "text.mp4", b"this is a text\n" * 99),
    "unreadable random": lambda folder: written(folder / "r.webm", np.random.RandomState(0).bytes(5000)),
    "no_video": lambda folder: media.sound(folder / "sound.mp4"),
    "too_short": lambda folder: media.video(folder / "one.webm", "libvpx-vp9", frames=1),
    "too_short image": lambda folder: saved(folder / "image.mp4"),
    "truncated mp4, no index": lambda folder: shortened(media.video(folder / "v.mp4", "libx264"), 0.6),
    "truncated mp4, index first": lambda folder: shortened(
        media.video(folder / "v.mp4", "libx264", container={"movflags": "faststart"}), 0.6
    ),
    "truncated webm": lambda folder: shortened(media.video(folder / "v.webm", "libvpx-vp9"), 0.6),
    "truncated avi": lambda folder: shortened(media.video(folder / "v.avi", "mjpeg", pixel_format="yuvj420p"), 0.6),
}


def written(path, content):
    path.write_bytes(content)
    return path


def saved(path):
    Image.fromarray(media.picture(3)).save(path, "JPEG")
    return path


@pytest.mark.parametrize("fault", UNUSABLE)
def test_an_unusable_video_is_a_bad_file_of_its_kind(fault, tmp_path):
    path = UNUSABLE[fault](tmp_path)
    with pytest.raises(BadFile) as caught:
        probe(path, min_frames=2)
    assert caught.value.kind == fault.split()[0].rstrip(",")
    assert caught.value.kind in decode.KINDS and caught.value.path == str(path)
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 our own bytes
    assert (copy.kind, copy.path, copy.reason) == (caught.value.kind, str(path), caught.value.reason)


DAMAGES = [  # file, the packet that is damaged, frames that need it
    ("h264.mp4", 24, [24]),
    ("h264.mp4", 24, [3, 30, 9]),  # the keyframe of a group of 12
    ("h264.mp4", 25, [35]),  # the frame after it, which the later ones refer to
    ("h264.avi", 24, [26]),
    ("mpeg4.avi", 25, [25]),
    ("vp9.webm", 25, [35]),
    ("mjpeg.avi", 24, [24]),
]


@pytest.mark.parametrize("name, packet, wanted", DAMAGES)
def test_a_damaged_frame_is_corrupt_and_the_others_are_not(name, packet, wanted, tmp_path):
    path = media.video(tmp_path / name, **VIDEOS[name])
    good = in_order(path)
    content = bytearray(path.read_bytes())
    position, size, _ = media.packets(path)[packet]
    if name.endswith("webm"):
        position, size = content.index(vp9_packet(path, packet)), size // 2
    content[position : position + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(BadFile) as caught:
        read_frames(path, wanted)
    assert caught.value.kind == "corrupt" and caught.value.path == str(path)
    if name != "h264.avi":  # without times, frames can only be counted from the start, over the damage
        np.testing.assert_array_equal(read_frames(path, [39, 3]), good[[39, 3]])


def test_flipped_bits_of_h264_are_noticed(tmp_path):
    """Left to itself FFmpeg conceals most of them. Some leave a valid stream, so not all can be noticed."""
    path = media.video(tmp_path / "h264.mp4", **VIDEOS["h264.mp4"])
    content, good, rng = path.read_bytes(), in_order(path), np.random.RandomState(0)
    noticed = unnoticed = 0
    for position, size, _ in media.packets(path):
        damaged = bytearray(content)
        for place in position + rng.randint(size // 4, size, 2):  # past the headers
            damaged[place] ^= 1 << rng.randint(8)
        path.write_bytes(damaged)
        for k in range(0, 40, 3):
            try:
                unnoticed += not np.array_equal(read_frames(path, [k])[0], good[k])
            except BadFile as fault:
                noticed += 1
                assert fault.kind == "corrupt"
    assert noticed > unnoticed


def vp9_packet(path, k):
    with av.open(str(path)) as container:
        return bytes([packet for packet in container.demux(video=0) if packet.size][k])


def test_the_file_behind_a_path_may_change(tmp_path):
    path = media.video(tmp_path / "v.webm", "libvpx-vp9", frames=10)
    assert probe(path).frames == 10
    media.video(path, "libvpx-vp9", frames=20)
    assert probe(path).frames == 20


def images(folder):
    """Pictures of many modes; each with what they are in RGB."""
    colour = media.picture(37)
    grey = colour[..., 0]
    repeated = np.repeat(grey[..., None], 3, axis=2)
    alpha = Image.fromarray(np.dstack([colour, grey]))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.fromarray(colour).save(folder / "exif.png", exif=exif)
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(folder / "grey16.png")
    Image.fromarray(np.dstack([grey, 255 - grey]), "LA").save(folder / "grey-alpha.png")
    alpha.save(folder / "alpha.png")
    Image.fromarray(colour).save(folder / "png-named.jpg", "PNG")
    Image.fromarray(colour[:1, :1]).save(folder / "one-pixel.png")
    cv2.imwrite(str(folder / "colour16.png"), colour[..., ::-1].astype(np.uint16) * 257)
    expected = {"grey": repeated, "grey16": repeated, "grey-alpha": repeated, "one-pixel": colour[:1, :1]}
    return {path: expected.get(path.stem, colour) for path in folder.iterdir()}


def test_images_of_any_mode_become_rgb(tmp_path):
    for path, expected in images(tmp_path).items():
        np.testing.assert_array_equal(read_image(path), expected, err_msg=path.name)
        found = decode.probe_image(path)
        assert (found.height, found.width) == expected.shape[:2]


def test_a_jpeg_is_what_opencv_reads_with_its_orientation_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "v.jpg"
    Image.fromarray(media.picture(37)).save(path, quality=80, exif=exif)
    bgr = np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION))
    np.testing.assert_array_equal(read_image(path), bgr[..., ::-1])


def test_a_cmyk_jpeg_keeps_its_colours(tmp_path):
    path = tmp_path / "v.jpg"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)  # no cyan, all magenta and yellow: red
    np.testing.assert_allclose(read_image(path)[8, 8].astype(int), (255, 0, 0), atol=2)  # JPEG at quality 100


BAD_IMAGES = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "corrupt": lambda path: path.write_text("no image"),
    "truncated": lambda path: shortened(saved(path), 0.9),
    "truncated png": lambda path: (Image.fromarray(media.picture(1)).save(path, "PNG"), shortened(path, 0.5)),
}


@pytest.mark.parametrize("fault", BAD_IMAGES)
def test_an_unusable_image_is_a_bad_file_of_its_kind(fault, tmp_path):
    path = tmp_path / "image.jpg"
    BAD_IMAGES[fault](path)
    with pytest.raises(BadFile) as caught:
        read_image(path)
    assert caught.value.kind == fault.split()[0]


def test_a_passing_fault_of_the_storage_is_told_apart(tmp_path, monkeypatch):
    path = media.video(tmp_path / "v.webm", "libvpx-vp9", frames=4)

    def failing(*arguments, **keywords):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(av, "open", failing)
    with pytest.raises(BadFile) as caught:
        probe(path)
    assert caught.value.kind in decode.PASSING_FAULTS
