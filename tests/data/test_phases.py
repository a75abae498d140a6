"""The phase-split layout: its arithmetic beside brute force, false claims, and its files beside ordinary ones."""

import importlib.util
import json

import av
import numpy as np
import pytest

from bevt_fast.config import Part
from bevt_fast.data import decode, phases, sampling, sources
from bevt_fast.data.coding import Recipe, Task, write
from bevt_fast.data.decode import BadFile, probe, read_frames
from bevt_fast.data.phases import Layout
from bevt_fast.data.reader import StreamReader
from bevt_fast.data.sources import Frames
from bevt_fast.data.video import Video
from tests.data import media
from tests.data.test_loader import config

N, STRIDE = 43, 5  # phases of 9, 9, 9, 8 and 8 frames


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An ordinary file of numbered frames and its transcodes, by codec."""
    folder = tmp_path_factory.mktemp("files")
    source = media.video(folder / "source.mkv", "ffv1", pixel_format="bgr0", frames=N)
    found = {"source": source}
    for codec, suffix in (("h264", "mp4"), ("vp9", "webm"), ("mjpeg", "mp4")):
        found[codec] = folder / f"{codec}.{suffix}"
        write(Task(str(source), str(found[codec])), Recipe(64, STRIDE, 4, 18, codec))
    return found


def test_positions_beside_brute_force():
    for n in range(1, 41):
        for stride in range(1, 10):
            layout = Layout(stride, n)
            order = [k for phase in range(stride) for k in range(phase, n, stride)]
            assert phases.shown(range(n), layout) == order
            assert phases.stored(order, layout) == list(range(n))
            for gop in (1, 3, 4):
                keys = [p for p, k in enumerate(order) if (k // stride) % gop == 0]
                assert phases.keyframes(layout, gop) == keys
    assert phases.stored([7, 3, 7], None) == phases.shown([7, 3, 7], None) == [7, 3, 7]
    assert phases.stored([], Layout(3, 7)) == []
    assert phases.stored([2**31 - 2], Layout(2, 2**31 - 1)) == [2**30 - 1]


def test_a_clip_is_a_run_of_neighbours():
    layout = Layout(8, 300)
    for start in range(300 - 121):
        run = phases.stored([start + 8 * k for k in range(16)], layout)
        assert run == list(range(run[0], run[0] + 16))


def test_a_comment_says_what_was_written():
    layout = Layout(8, 300)
    for name in ("comment", "COMMENT"):
        assert phases.layout_of({"title": "x", name: phases.comment(layout, {"crf": 18})}, 300) == layout
        assert phases.layout_of({name: phases.comment(None, {})}, 7) is None
    assert phases.claims({"comment": phases.comment(layout, {"crf": 18})})["made"] == {"crf": 18}  # type: ignore


@pytest.mark.parametrize("text", ["", "a film", "bevt_fast", '{"version": 9, "layout": "phases"}'])
def test_comments_of_others_mean_nothing(text):
    assert phases.layout_of({"comment": text}, 10) is None
    assert phases.layout_of({}, 10) is None


GOOD = {"version": 1, "layout": "phases", "stride": 8, "frames": 300}
LIES = {
    "version": ({"version": 2}, "of version 2, this program reads version 1"),
    "no version": ({"version": None}, "version None"),
    "layout": ({"layout": "spiral"}, "of version 1"),
    "stride 0": ({"stride": 0}, "a stride of 0"),
    "negative": ({"stride": -8}, "a stride of -8"),
    "true": ({"stride": True}, "a stride of True"),
    "float": ({"stride": 8.0}, "a stride of 8.0"),
    "huge": ({"stride": 10**300}, "a stride of 1000"),
    "no stride": ({"stride": None}, "a stride of None"),
    "count": ({"frames": 299}, "299 frames and it holds 300"),
    "text": ({"frames": "300"}, "300 frames and it holds 300"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_claim_that_is_no_layout_of_the_file_is_refused(lie):
    change, sentence = LIES[lie]
    with pytest.raises(ValueError, match=sentence) as caught:
        phases.layout_of({"comment": phases.MARK + json.dumps(GOOD | change)}, 300)
    assert len(str(caught.value)) < 250 and "transcode the original again" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"version": 1}'])
def test_a_claim_that_is_no_json_object_is_refused(text):
    with pytest.raises(ValueError, match="transcode the original again"):
        phases.layout_of({"comment": phases.MARK + text}, 300)


@pytest.mark.parametrize("codec", ["h264", "vp9", "mjpeg"])
def test_frames_have_the_numbers_they_have_in_the_video(files, codec):
    path = files[codec]
    assert probe(path)[:3] == (N, 64, 96) and probe(path).layout == Layout(STRIDE, N)
    assert [media.number(frame) for frame in read_frames(path, range(N))] == list(range(N))
    assert [media.number(frame) for frame in decode.each_frame(path)] == list(range(N))
    rng = np.random.default_rng(0)
    for stride in (1, 2, STRIDE, 8):  # looped (SPEC 6.7), at any stride
        clip = [(int(rng.integers(N)) + stride * k) % N for k in range(16)]
        assert [media.number(frame) for frame in read_frames(path, clip)] == clip
    segments = sampling.test_clip_frames(N, Frames(6, 1, "uniform"))[0]
    assert [media.number(frame) for frame in read_frames(path, segments)] == segments


def test_a_part_of_a_phase_split_file_is_a_part_of_the_video(files):
    path = files["h264"]
    assert probe(path, (10, 5)).frames == 5 and probe(path, (10, -1)).frames == N - 10
    assert [media.number(frame) for frame in read_frames(path, [4, 0, 2], (10, 5))] == [14, 10, 12]
    with pytest.raises(IndexError):
        read_frames(path, [5], (10, 5))
    with pytest.raises(BadFile, match="holds 43 frames where the list says 40"):
        probe(path, (40, 4))


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_clip_is_decoded_from_few_frames(files, codec, monkeypatch):
    """At most the clip and what stands between it and the keyframe before it, gop - 1 frames."""
    forward, decoded = Video._forward, []

    def counting(*arguments):
        for frame in forward(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(Video, "_forward", counting)
    for start in range(N - 7 * STRIDE):
        decoded.clear()
        read_frames(files[codec], [start + STRIDE * k for k in range(8)])
        assert 8 <= len(decoded) <= 8 + 3


def test_the_file_is_an_ordinary_video_in_another_order(files):
    for codec in ("h264", "vp9", "mjpeg"):
        with av.open(str(files[codec])) as container:
            assert len(container.streams) == 1
            packets = [packet for packet in container.demux(video=0) if packet.size]
        times = [packet.pts for packet in packets]
        assert times == sorted(set(times)) and times == [packet.dts for packet in packets]  # no B-frames
        keys = [k for k, packet in enumerate(packets) if packet.is_keyframe]
        assert codec == "mjpeg" or keys == phases.keyframes(Layout(STRIDE, N), 4)
        with av.open(str(files[codec])) as container:
            found = [media.number(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert found == phases.shown(range(N), Layout(STRIDE, N))


def copied(source, path, comment, packets=None):
    """The same stream under another comment, or its first `packets` packets."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        new.metadata["comment"] = comment
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size][:packets]:
            packet.stream = stream
            new.mux(packet)
    return path


def test_a_file_cut_or_marked_by_another_program_is_a_bad_file(files, tmp_path):
    with av.open(str(files["h264"])) as container:
        comment = container.metadata["comment"]
    whole = copied(files["h264"], tmp_path / "whole.mp4", comment)
    np.testing.assert_array_equal(read_frames(whole, [30, 4]), read_frames(files["h264"], [30, 4]))
    cut = copied(files["h264"], tmp_path / "cut.mp4", comment, packets=20)
    future = copied(files["h264"], tmp_path / "future.mp4", comment.replace('"version": 1', '"version": 7'))
    for path, sentence in ((cut, "43 frames and it holds 20"), (future, "version 7")):
        with pytest.raises(BadFile, match=sentence) as caught:
            probe(path)
        assert caught.value.kind == "unreadable"
    unmarked = copied(files["h264"], tmp_path / "unmarked.mp4", "a film")
    assert [media.number(frame) for frame in read_frames(unmarked, range(3))] == [0, STRIDE, 2 * STRIDE]


@pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed",
)
@pytest.mark.parametrize("listed", ["", " 7 30\n", " 12 -1\n"])
def test_both_decoders_make_the_same_batches(files, tmp_path, listed):
    """DALI gets positions in the file, PyAV numbers in the video: the same frames, with and without parts."""
    for name in ("vp9.webm", "mjpeg.mp4"):
        (tmp_path / name).write_bytes(files[name.split(".")[0]].read_bytes())
    options = {"root": str(tmp_path), "frames": 8, "stride": STRIDE}
    if listed:
        (tmp_path / "list.txt").write_text(f"vp9.webm{listed}mjpeg.mp4{listed}")
        options["list"] = "list.txt"
    source = sources.build(Part(name="file_list", options=options))
    pyav, dali = (StreamReader(config(decoder=decoder), "clips", source) for decoder in ("pyav", "dali"))
    for number in range(3):
        one, other = pyav[number], dali[number]
        assert isinstance(one, dict) and isinstance(other, dict) and not one["bad"] and not other["bad"]
        media.assert_same_but_for_chroma(other["pixels"], one["pixels"])
    assert dali.dali is not None and dali.dali._pipeline is not None  # it was DALI that read them
