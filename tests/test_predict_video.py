"""Videos: a folder of frames each, and an overlay."""

import shutil
import struct
import sys

import numpy as np
import pytest
import tiny
from deployed import make_model
from PIL import Image
from predicting import files, read, run


@pytest.fixture
def video(tmp_path):
    av = pytest.importorskip("av", reason="videos need PyAV")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 40, "yuv420p", 4_000_000
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(tiny.picture(index)[0], format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_picture_is_not_written_among_the_frames_of_a_video(labels_model, video, tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    Image.fromarray(tiny.picture(0)[0]).save(tmp_path / "clip" / "000000.jpg")
    assert run(labels_model, tmp_path / "cl*", tmp_path / "cl*" / "*", "--out", tmp_path / "out") == 2
    assert "would be written among the frames of" in capsys.readouterr().err


def test_a_video_too_thin_for_an_overlay_is_listed(labels_model, pictures, tmp_path, capsys):
    av = pytest.importorskip("av", reason="videos need PyAV")
    with av.open(str(pictures / "thin.mov"), "w") as container:
        stream = container.add_stream("png", rate=5)
        stream.width, stream.height, stream.pix_fmt = 1, 9, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((9, 1, 3), np.uint8), "rgb24")))
        container.mux(stream.encode())
    assert run(labels_model, pictures, "--out", tmp_path / "out", "--overlay") == 1
    assert "an overlay video needs sides of at least 2 pixels" in capsys.readouterr().err
    assert {"a.png", "b.png", "more/a.png"} <= set(files(tmp_path / "out"))


@pytest.mark.parametrize("tile", [32, 64], ids=["tiles", "whole"])
def test_a_video_becomes_a_folder_of_frames_and_an_overlay(labels_model, video, tmp_path, tile):
    out = tmp_path / "out"
    assert run(labels_model, video, "--out", out, "--overlay", "--tile", tile, "--overlap", 8) == 0
    assert files(out) == ["clip/000000.png", "clip/000001.png", "clip/000002.png", "clip/overlay.mp4"]
    assert (read(out / "clip/000002.png") == tiny.picture(2)[1]).mean() > 0.9
    assert run(labels_model, out / "clip/overlay.mp4", "--out", tmp_path / "again") == 0
    assert len(files(tmp_path / "again")) == 3


def test_frames_of_an_earlier_longer_video_are_named(labels_model, video, tmp_path, capsys):
    assert run(labels_model, video, "--out", tmp_path / "out") == 0
    assert run(labels_model, video, "--out", tmp_path / "out") == 0
    shutil.copy(tmp_path / "out/clip/000000.png", tmp_path / "out/clip/000003.png")
    assert run(labels_model, video, "--out", tmp_path / "out") == 1
    assert "holds 1 of an earlier, longer video, from 000003.png on" in capsys.readouterr().err


@pytest.mark.parametrize("tile", [32, 64], ids=["tiles", "whole"])
def test_probabilities_of_frames(video, tmp_path, tile):
    model = make_model(tmp_path / "model.onnx", "probabilities")
    assert (
        run(model, video, "--out", tmp_path / "out", "--probabilities", "--tile", tile, "--overlap", 8) == 0
    )
    assert [name for name in files(tmp_path / "out") if name.endswith(".npy")] == [
        f"clip/00000{index}.npy" for index in range(3)
    ]
    values = np.load(tmp_path / "out/clip/000002.npy")
    assert (values.argmax(0) == read(tmp_path / "out/clip/000002.png")).all()


def test_frames_are_turned_upright(labels_model, video, tmp_path):
    """A telephone that is held upright films pictures that lie on their side, and says so in the file."""
    data = bytearray(video.read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track's head; a quarter turn clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 40 << 16, 0, 1 << 30)
    video.write_bytes(data)
    assert run(labels_model, video, "--out", tmp_path / "out", "--overlay") == 0
    labels = np.rot90(tiny.picture(2)[1], -1)
    assert (read(tmp_path / "out/clip/000002.png") == labels).mean() > 0.9
    assert run(labels_model, tmp_path / "out/clip/overlay.mp4", "--out", tmp_path / "again") == 0
    assert read(tmp_path / "again/overlay/000000.png").shape == labels.shape


def test_a_damaged_video_is_listed_and_the_rest_go_on(labels_model, pictures, tmp_path, capsys):
    pytest.importorskip("av", reason="videos need PyAV")
    (pictures / "bad.mp4").write_bytes(b"no video")
    assert run(labels_model, pictures, "--out", tmp_path / "out", "--overlay") == 1
    assert "bad.mp4 cannot be read as a video" in capsys.readouterr().err
    assert len(files(tmp_path / "out")) == 6


def test_a_video_without_pyav_is_refused_at_once(labels_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    assert run(labels_model, tmp_path / "clip.mp4", "--out", tmp_path / "out") == 2
    assert "pip install av" in capsys.readouterr().err
