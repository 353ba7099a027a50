"""The predict command: what it answers, and what it does with input that is not as it should be."""

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from deployed import make_model
from PIL import Image
from predicting import files, read, run

from pseudoseg_fast import predict
from pseudoseg_fast.deploy import segment
from pseudoseg_fast.deploy.model import Model
from pseudoseg_fast.deploy.segment import Segmenter, Settings

ALONE = """
import sys
import numpy, onnxruntime, PIL.Image, PIL.ImageFont, PIL.PngImagePlugin
there = {*sys.stdlib_module_names, *(name.split(".")[0] for name in sys.modules), "pseudoseg_fast"}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in there:
            raise ImportError(name + " is not among what docs/deployment.md says to install")
sys.meta_path.insert(0, Block())
from pseudoseg_fast.predict import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def maps_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "probabilities.onnx", "probabilities")


def test_it_runs_with_numpy_onnxruntime_and_pillow_alone(labels_model, pictures, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", ALONE, labels_model, pictures, "--out", out, "--overlay"]
    environment = {**os.environ, "PYTHONPATH": str(Path(predict.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "3 classes, fp32, answers labels; runs on CPUExecutionProvider" in done.stdout
    assert "3 pictures in" in done.stdout
    assert files(out) == [f"{name}{end}" for name in ("a", "b", "more/a") for end in (".overlay.png", ".png")]
    for index, name in enumerate(("a", "b", "more/a")):
        ids = tiny.picture(index)[1][:, : 48 - index // 2]
        assert (read(out / f"{name}.png") == ids).mean() > 0.97
    overlay = np.array(Image.open(out / "a.overlay.png"))
    pixels, ids = tiny.picture(0)
    assert np.abs(overlay - (pixels / 2 + tiny.COLORS[ids] / 2)).mean() < 2


def test_linked_folders_are_searched_but_not_in_circles(labels_model, pictures, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(pictures / "more")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert run(labels_model, tmp_path / "in", "--out", tmp_path / "in" / "out") == 0
    assert files(tmp_path / "in" / "out") == ["link/a.png"]


def test_files_and_globs_are_named_after_what_was_given(labels_model, pictures, tmp_path):
    assert run(labels_model, pictures / "b.jpg", pictures / "**" / "a.png", "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == ["a.png", "b.png", "more/a.png"]


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        ([], True),
        (["--tile", "32", "--overlap", "8"], True),
        (["--tile", "32", "--overlap", "8", "--flip"], True),
        (["--flip", "--scales", "1.0", "1.5"], False),
    ],
    ids=["whole", "tiles", "tiles, flip", "flip, scales"],
)
def test_tiles_and_averages_answer_as_a_single_pass(
    maps_model, labels_model, pictures, tmp_path, options, exact
):
    run(labels_model, pictures, "--out", tmp_path / "plain")
    assert run(maps_model, pictures, "--out", tmp_path / "out", "--probabilities", *options) == 0
    for name in ("a", "b", "more/a"):
        expected, labels = read(tmp_path / f"plain/{name}.png"), read(tmp_path / f"out/{name}.png")
        assert (expected == labels).mean() > (0.999 if exact else 0.9)
        values = np.load(tmp_path / f"out/{name}.npy")
        assert (values.dtype, values.shape) == (np.float16, (3, *labels.shape))
        np.testing.assert_allclose(values.astype(float).sum(0), 1, atol=2e-3)
        assert (values.argmax(0) == labels).mean() > 0.99


def test_a_labels_model_cuts_its_tiles_in_the_middle(labels_model, pictures, tmp_path):
    run(labels_model, pictures, "--out", tmp_path / "plain")
    assert run(labels_model, pictures, "--out", tmp_path / "out", "--tile", 32, "--overlap", 8) == 0
    for name in ("a", "b", "more/a"):
        np.testing.assert_array_equal(
            read(tmp_path / f"plain/{name}.png"), read(tmp_path / f"out/{name}.png")
        )


@pytest.mark.parametrize("options", [["--flip"], ["--scales", "0.5"], ["--probabilities"]], ids=" ".join)
def test_a_labels_model_cannot_average(labels_model, pictures, tmp_path, capsys, options):
    assert run(labels_model, pictures, "--out", tmp_path / "out", *options) == 2
    assert "export it with --output probabilities" in capsys.readouterr().err


def sixteen_bit(pixels):
    return Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("grey.png", lambda pixels: Image.fromarray(pixels).convert("L")),
        ("rgba.png", lambda pixels: Image.fromarray(pixels).convert("RGBA")),
        ("palette.png", lambda pixels: Image.fromarray(pixels).convert("P")),
        ("bits.png", lambda pixels: Image.fromarray(pixels).convert("1")),
        ("cmyk.jpg", lambda pixels: Image.fromarray(pixels).convert("CMYK")),
        ("sixteen.png", sixteen_bit),
        ("sixteen.tif", sixteen_bit),
        ("pixel.png", lambda pixels: Image.fromarray(pixels[:1, :1])),
        ("thin.png", lambda pixels: Image.fromarray(pixels[:1])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("tile", [32, 1024])
def test_pictures_of_any_mode_and_size(labels_model, tmp_path, name, make, tile):
    image = make(tiny.picture(0)[0])
    image.save(tmp_path / name)
    out = tmp_path / "out"
    assert run(labels_model, tmp_path / name, "--out", out, "--overlay", "--tile", tile, "--overlap", 8) == 0
    labels = read(out / f"{Path(name).stem}.png")
    assert labels.shape == (image.height, image.width)
    assert Image.open(out / f"{Path(name).stem}.overlay.png").size == image.size


def test_pictures_are_turned_upright(labels_model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the file is to be turned by a quarter
    pixels, ids = tiny.picture(0)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert run(labels_model, tmp_path / "turned.jpg", "--out", tmp_path / "out") == 0
    assert (read(tmp_path / "out/turned.png") == np.rot90(ids, -1)).mean() > 0.97


def test_grey_models_get_grey_pictures(tmp_path):
    model = make_model(tmp_path / "grey.onnx", channels=1)
    Image.fromarray(np.full((20, 30), 180, np.uint8)).save(tmp_path / "x.png")
    assert run(model, tmp_path / "x.png", "--out", tmp_path / "out") == 0
    assert (read(tmp_path / "out/x.png") == 2).all()


@pytest.mark.parametrize("tile", [32, 64], ids=["tiles", "whole"])
def test_pictures_are_resized_as_in_training_and_labels_come_at_their_size(tmp_path, tile):
    model = make_model(tmp_path / "small.onnx", "probabilities", short_side=40)
    pixels, ids = tiny.picture(0)
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(tmp_path / "x.png")
    assert run(model, tmp_path / "x.png", "--out", tmp_path / "out", "--tile", tile, "--overlap", 8) == 0
    assert (read(tmp_path / "out/x.png") == ids.repeat(2, 0).repeat(2, 1)).mean() > 0.95


def test_a_resized_picture_is_answered_at_its_own_size(tmp_path):
    """However large it is: labels of the size at which it is seen would be blown up to squares."""
    model = Model(make_model(tmp_path / "small.onnx", stride=4, pool=4))
    picture = Image.fromarray(tiny.picture(0)[0]).resize((240, 200), Image.Resampling.BILINEAR)
    segmenter = Segmenter(model, Settings(tile=32, short_side=20))
    seen = np.asarray(picture.resize((24, 20), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    (result,) = segmenter.small([picture])
    assert np.array_equal(result.labels, model.labels(seen[None], (200, 240))[0])


def test_tiles_of_a_resized_picture_are_answered_at_its_own_size(tmp_path):
    path = make_model(tmp_path / "small.onnx", "probabilities", short_side=100, stride=4, pool=4)
    picture = Image.fromarray(tiny.picture(0)[0]).resize((360, 300), Image.Resampling.BILINEAR)
    whole, tiled = (
        Segmenter(Model(path), Settings(short_side=100, probabilities=True, tile=tile, overlap=8))
        for tile in (512, 64)
    )
    values = np.zeros((3, *tiled.answer_size(picture)), np.float32)
    result = tiled.large(picture, values)
    (expected,) = whole.small([picture])
    assert values.shape == expected.probabilities.shape == (3, 300, 360)
    assert (result.labels == expected.labels).mean() > 0.99
    assert np.abs(values - expected.probabilities).mean() < 0.01


@pytest.mark.parametrize("tile", [64, 512], ids=["tiles", "whole"])
def test_an_answer_too_large_for_memory_is_made_smaller_and_enlarged(tmp_path, monkeypatch, tile):
    monkeypatch.setattr(segment, "MOST_VALUES", 3 * 100 * 120 if tile == 512 else 3 * 64 * 64)
    model = Model(make_model(tmp_path / "small.onnx", "probabilities", stride=4))
    picture = Image.fromarray(tiny.picture(0)[0]).resize((240, 200), Image.Resampling.NEAREST)
    segmenter = Segmenter(model, Settings(short_side=80, probabilities=True, tile=tile, overlap=8))
    height, width = segmenter.answer_size(picture)
    assert 80 < height <= 110
    assert 96 < width <= 132
    if tile == 512:
        (result,) = segmenter.small([picture])
        assert result.probabilities.shape == (3, height, width)
    else:
        result = segmenter.large(picture)
    expected = np.asarray(Image.fromarray(tiny.picture(0)[1]).resize((240, 200), Image.Resampling.NEAREST))
    assert result.labels.shape == (200, 240)
    assert (result.labels == expected).mean() > 0.95


def test_masks_of_a_data_set_and_strange_files_are_left_out_and_named(
    labels_model, pictures, tmp_path, capsys
):
    root = tmp_path / "photos"
    for name in ("images", "masks"):
        shutil.copytree(pictures, root / name / "val")
    for name in ("IMG_1.HEIC", "IMG_2.HEIC", "notes"):
        (root / "images" / name).touch()
    assert run(labels_model, root, "--out", tmp_path / "out") == 0
    assert files(tmp_path / "out") == [f"images/val/{name}.png" for name in ("a", "b", "more/a")]
    printed = capsys.readouterr().out
    assert f"{root / 'masks'} is left out" in printed
    assert "3 files are left out" in printed
    assert "1 without a suffix, 2 .HEIC" in printed
    assert run(labels_model, root / "masks", "--out", tmp_path / "masks") == 0
    assert files(tmp_path / "masks") == [f"val/{name}.png" for name in ("a", "b", "more/a")]


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 40\n%%EndComments\n(x) print\n"


def damaged(tmp_path):
    """Files that are no pictures, by name, with what is said of them."""
    content, turned = io.BytesIO(), io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    image.save(content, "JPEG")
    exif = Image.Exif()
    exif.update({0x0112: 6, 0x011A: 72.0})
    resolution = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")  # no number
    image.save(turned, "JPEG", exif=resolution)
    texts = {
        "empty.png": (b"", "cannot be read as a picture"),
        "text.jpg": (b"not a picture\n", "cannot be read as a picture"),
        "truncated.jpg": (content.getvalue()[:900], "cannot be read as a picture"),
        "turned.jpg": (turned.getvalue(), "cannot be read as a picture"),
        "program.png": (POSTSCRIPT, "is PostScript, a program"),
    }
    for name, (data, _) in texts.items():
        (tmp_path / name).write_bytes(data)
    Image.new("1", (3000, 2000)).save(tmp_path / "huge.png")
    Image.new("F", (3, 2)).save(tmp_path / "floats.tif")
    texts["huge.png"] = (b"", "3000 x 2000 pixels; expected at most 5000000 in all")
    texts["floats.tif"] = (b"", "holds floating-point numbers")
    return {name: message for name, (_, message) in texts.items()}


def test_bad_pictures_are_listed_at_the_end_and_the_rest_go_on(labels_model, pictures, tmp_path, capsys):
    messages = damaged(pictures)
    assert run(labels_model, pictures, "--out", tmp_path / "out", "--max-pixels", 5_000_000) == 1
    assert files(tmp_path / "out") == ["a.png", "b.png", "more/a.png"]
    printed = capsys.readouterr()
    assert "3 pictures in" in printed.out
    assert "7 of 10 inputs failed:" in printed.err
    for name, message in messages.items():
        assert any(name in line and message in line for line in printed.err.splitlines()), name


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(labels_model, pictures, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (pictures / "pipe.png").symlink_to(tmp_path / "pipe")
    assert run(labels_model, pictures, "--out", tmp_path / "out") == 1
    assert "pipe.png is a folder, a pipe or a device" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["a.png", "b.png", "more/a.png"]


@pytest.mark.parametrize("options", [(), ("--tile", 32, "--overlap", 8)], ids=["whole", "tiles"])
@pytest.mark.parametrize("short_side", [None, 20])
def test_many_channels_and_white_are_those_of_training(tmp_path, options, short_side):
    tifffile = pytest.importorskip("tifffile")
    model = make_model(tmp_path / "five.onnx", channels=5, white=4095.0, short_side=short_side, stride=4)
    ids = np.zeros((40, 60), np.uint8)
    ids[:, 20:40], ids[20:, 40:] = 1, 2
    values = np.array([40, 100, 180])[ids] / 255 * 4095
    pixels = values[..., None].repeat(5, 2).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack", planarconfig="contig")
    assert run(model, tmp_path / "x.tif", "--out", tmp_path / "out", "--overlay", *options) == 0
    assert (read(tmp_path / "out/x.png") == ids).mean() > (0.99 if short_side is None else 0.9)
    with Image.open(tmp_path / "out/x.overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (60, 40))


def test_a_model_of_many_channels_refuses_colour(pictures, tmp_path, capsys):
    model = make_model(tmp_path / "five.onnx", channels=5)
    assert run(model, pictures / "a.png", "--out", tmp_path / "out") == 1
    assert "a.png has 3 channels, expected 5" in capsys.readouterr().err


def test_a_bad_picture_does_not_spoil_its_batch(tmp_path, capsys):
    model = make_model(tmp_path / "grey.onnx", channels=1)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.new("L", (30, 20)).save(folder / name)
    Image.new("LAB", (30, 20)).save(folder / "b.tif")  # Pillow has no way from LAB to grey
    assert run(model, folder, "--out", tmp_path / "out", "--batch-size", 3) == 1
    assert files(tmp_path / "out") == ["a.png", "c.png"]
    assert "1 of 3 inputs failed:" in capsys.readouterr().err


def test_a_thin_picture_is_not_blown_up_beyond_the_limit(pictures, tmp_path, capsys):
    model = make_model(tmp_path / "small.onnx", short_side=512)
    Image.new("RGB", (1, 60000)).save(pictures / "thin.png")
    assert run(model, pictures, "--out", tmp_path / "out") == 1
    assert "1 x 60000, would be resized to 512 x 30720000 pixels" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["a.png", "b.png", "more/a.png"]


def test_a_picture_beyond_pillows_own_limit_is_read(labels_model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (64, 64)).save(tmp_path / "x.png")
    assert run(labels_model, tmp_path / "x.png", "--out", tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "found nothing at nothing.png"),
        (["*.nothing"], "holds none"),
        ([".", "--tile", "8"], "--tile expects tiles of at least 32 pixels"),
        ([".", "--tile", "64", "--overlap", "17"], "--overlap expects 0 to a quarter of --tile 64"),
        ([".", "--threads", "-1"], "--threads expects 0 to"),
        ([".", "--scales", "0"], "--scales expects factors from 0.1 to 4"),
        ([".", "--opacity", "2"], "--opacity expects a number from 0 to 1"),
        ([".", "--batch-size", "0"], "--batch-size expects at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_cannot_work_is_refused(
    maps_model, pictures, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(pictures)
    assert tiny.status(predict.main, [str(maps_model), *arguments, "--out", "out"]) == 2
    assert message in capsys.readouterr().err


def test_results_never_replace_each_other_or_an_input(labels_model, pictures, tmp_path, capsys):
    assert run(labels_model, pictures, pictures / "more" / "*.png", "--out", tmp_path / "same") == 0
    assert files(tmp_path / "same") == ["a.png", "b.png", "more/a.png"]  # a picture named twice is read once
    both = (pictures / "a.png", pictures / "more" / "a.png")
    assert run(labels_model, *both, "--out", tmp_path / "out") == 2
    assert "would both be written to" in capsys.readouterr().err
    assert run(labels_model, pictures / "a.png", "--out", pictures) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_second_run_does_not_read_the_results_of_the_first(labels_model, pictures):
    for given in 2 * [pictures, pictures / "**" / "*.*"]:
        assert run(labels_model, given, "--out", pictures / "out") == 0
    assert files(pictures / "out") == ["a.png", "b.png", "more/a.png"]


def test_nothing_is_written_outside_the_output_folder(labels_model, pictures, tmp_path, capsys):
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / "more").symlink_to(outside)
    (outside / "kept").write_text("kept")
    (out / "a.png").symlink_to(outside / "kept")
    assert run(labels_model, pictures, "--out", out) == 1
    assert "lies outside" in capsys.readouterr().err
    assert files(outside) == ["kept"]
    assert (outside / "kept").read_text() == "kept"
    assert read(out / "a.png").shape == (40, 48)


def test_an_output_folder_that_cannot_be_written_is_refused(labels_model, pictures, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(labels_model, pictures, "--out", tmp_path / "file" / "out") == 2
    assert "--out expects a folder that can be written" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_leaves_no_partial_file(labels_model, pictures, tmp_path, capsys):
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert run(labels_model, pictures, "--out", tmp_path / "out") == 1
    assert "1 of 3 inputs failed" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["b.png", "more/a.png"]
