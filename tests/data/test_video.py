"""A file stays open between its index and a clip: once, for one process, and never for longer than it is the same."""

import multiprocessing
import os
import threading

import av
import numpy as np
import pytest

from bevt_fast.data import decode, phases, video
from bevt_fast.data.coding import Recipe, Task, write
from bevt_fast.data.decode import BadFile, read_frames
from tests.data import media
from tests.data.test_decode import VIDEOS, in_order

N = 40


@pytest.fixture
def opens(monkeypatch):
    """The files that are opened, one entry each time; nothing is known of any file before."""
    video.let_go()
    decode._indexed.cache_clear()
    opened, real = [], av.open

    def counting(path, *arguments, **keywords):
        opened.append(os.path.basename(path))
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(av, "open", counting)
    return opened


def descriptors(folder):
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [link for link in links if os.path.exists(link) and os.readlink(link).startswith(str(folder))]


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.webm", "mpeg4.avi"])
def test_a_file_is_opened_once_for_its_index_and_its_clips(name, tmp_path, opens):
    path = media.video(tmp_path / name, **VIDEOS[name])
    opens.clear()
    assert decode.probe(path).frames == N
    for clip in ([3, 30], [0, 39, 1], [25, 26]):
        assert [media.number(frame) for frame in read_frames(path, clip)] == clip
    assert opens == [name] and len(descriptors(tmp_path)) == 1


def test_another_file_closes_the_one_before(tmp_path, opens):
    paths = [media.video(tmp_path / f"{k}.mp4", "libx264", frames=12) for k in range(4)]
    for path in paths:
        assert media.number(read_frames(path, [7])[0]) == 7
        assert descriptors(tmp_path) and all(os.readlink(link) == str(path) for link in descriptors(tmp_path))
    video.let_go()
    assert not descriptors(tmp_path)


def test_a_file_that_changed_is_opened_anew(tmp_path):
    path = media.video(tmp_path / "a.mp4", "libx264", frames=20)
    assert media.number(read_frames(path, [3])[0]) == 3
    other = media.video(tmp_path / "b.mp4", "libx264", frames=20, times=[40 * k for k in range(20)], size=(96, 64))
    status = path.stat()
    other.replace(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert read_frames(path, [3]).shape == (1, 96, 64, 3)


def test_nothing_is_kept_of_a_file_that_could_not_be_read(tmp_path):
    path = media.video(tmp_path / "a.mp4", **VIDEOS["h264.mp4"])
    good, content = in_order(path), bytearray(path.read_bytes())
    position, size, _ = media.packets(path)[24]
    content[position : position + size] = bytes(size)
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(BadFile):
            read_frames(path, [24])
        assert not descriptors(tmp_path)
        np.testing.assert_array_equal(read_frames(path, [39, 3, 20]), good[[39, 3, 20]])


@pytest.mark.parametrize("name", VIDEOS)
def test_packets_that_are_not_held_are_read_again(name, tmp_path, monkeypatch):
    path = media.video(tmp_path / name, **VIDEOS[name])
    expected = in_order(path)
    monkeypatch.setattr(video, "IN_MEMORY", 1000)
    for clip in ([30, 3, 39], [0, 1, 13, 25], [12], [0]):
        np.testing.assert_array_equal(read_frames(path, clip), expected[clip])


def read_in_child(path, clip, answers):
    answers.put([media.number(frame) for frame in read_frames(path, clip)])


def test_a_process_that_forks_shares_no_file_with_its_child(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "IN_MEMORY", 1000)
    path = write_phases(tmp_path, "h264")
    assert media.number(read_frames(path, [17])[0]) == 17 and descriptors(tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    children = [context.Process(target=read_in_child, args=(path, [5 * k, 39], answers)) for k in range(3)]
    for child in children:
        child.start()
        assert [media.number(frame) for frame in read_frames(path, range(0, N, 7))] == list(range(0, N, 7))
    assert sorted(answers.get(timeout=60) for _ in children) == [[0, 39], [5, 39], [10, 39]]
    for child in children:
        child.join()


def test_two_threads_never_have_the_same_file_open(tmp_path):
    path, wrong = media.video(tmp_path / "a.mp4", "libx264"), []

    def read(start):
        for k in range(10):
            clip = [(start + 7 * k) % N, (start + 11 * k) % N]
            if [media.number(frame) for frame in read_frames(path, clip)] != clip:
                wrong.append(clip)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(video._kept) == 1


def write_phases(folder, codec):
    source = media.video(folder / "source.mkv", "ffv1", pixel_format="bgr0")
    path = folder / f"{codec}.{'webm' if codec == 'vp9' else 'mp4'}"
    write(Task(str(source), str(path)), Recipe(64, 5, 4, 18, codec))
    return path


@pytest.mark.parametrize("codec", ["h264", "mjpeg", "hevc"])
def test_the_table_of_our_files_says_what_their_packets_do(codec, tmp_path, monkeypatch):
    path = write_phases(tmp_path, codec)
    decode._indexed.cache_clear()
    short = decode.index(path)
    decode._indexed.cache_clear()
    monkeypatch.setattr(video.Video, "_listed", lambda self: None)
    long = decode.index(path)
    assert short.in_order and not long.in_order
    assert short._replace(times=None, keys=None, key_packets=None, in_order=False) == long._replace(
        times=None, keys=None, key_packets=None
    )
    for name in ("times", "keys", "key_packets"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name))


@pytest.mark.parametrize("name", ["h264.mp4", "h264-irregular.mp4", "h264-refresh.mp4"])
def test_the_table_is_not_believed_where_frames_are_reordered(name, tmp_path):
    """A file of ours that another program coded anew: the comment is still there."""
    path = media.video(tmp_path / name, **VIDEOS[name])
    expected, copy = in_order(path), tmp_path / "copy.mp4"
    with av.open(str(path)) as old, av.open(str(copy), "w") as new:
        new.metadata["comment"] = phases.comment(None, {})
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in [packet for packet in old.demux(video=0) if packet.size]:
            packet.stream = stream
            new.mux(packet)
    assert not decode.index(copy).in_order
    np.testing.assert_array_equal(read_frames(copy, [30, 3, 39]), expected[[30, 3, 39]])


def test_frames_that_turn_out_to_be_reordered_are_a_bad_file(tmp_path, monkeypatch):
    path = media.video(tmp_path / "a.mp4", **VIDEOS["h264.mp4"])
    index = decode.index(path)._replace(in_order=True)
    monkeypatch.setattr(decode, "index", lambda path: index)
    with pytest.raises(BadFile, match="transcode the original again"):
        read_frames(path, [13])
