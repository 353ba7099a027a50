"""Whatever a file holds, reading it ends in pixels of the right kind or in a DataError that names it."""

import io

import numpy as np
import PIL
import pytest
from PIL import Image

from pseudoseg_fast.data.decode import describe_file, image_size, read_image
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample
from pseudoseg_fast.data.read import read_mask, read_sample

FORMATS = {"png": {}, "jpg": {"quality": 90}, "tif": {"compression": "tiff_deflate"}, "bmp": {}, "webp": {}}


def encoded(suffix, mode="RGB", size=(23, 17)):
    random = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(random.integers(0, 3, shape, np.uint8))
    buffer = io.BytesIO()
    options = {"exif": exif} if suffix in ("jpg", "png", "webp") else {}
    image.save(buffer, Image.registered_extensions()[f".{suffix}"], **FORMATS[suffix], **options)
    return buffer.getvalue()


def attempt(path):
    """Read a file in every way; what is not refused must have the right form."""
    for read, form in (
        (lambda: read_image(path), lambda pixels: pixels.dtype == np.uint8 and pixels.ndim == 3),
        (lambda: read_image(path, 1), lambda pixels: pixels.dtype == np.uint8 and pixels.ndim == 2),
        (lambda: read_image(path, 5), lambda pixels: pixels.shape[2] == 5),
        (
            lambda: read_mask(path, Labels(3)),
            lambda ids: ids.dtype == np.uint8 and set(ids.flat) <= {0, 1, 2, 255},
        ),
        (lambda: image_size(path), lambda size: min(size) > 0),
        (lambda: describe_file(path), lambda found: isinstance(found.mode, str)),
    ):
        try:
            found = read()
        except DataError as error:
            if str(path) not in str(error):
                raise
        else:
            assert form(found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files(tmp_path, suffix, mode):
    whole = encoded(suffix, mode)
    random = np.random.default_rng(1)
    path = tmp_path / f"a ü.{suffix}"
    for cut in [0, 1, *random.integers(2, len(whole), 12).tolist()]:
        path.write_bytes(whole[:cut])
        attempt(path)
    for _ in range(25):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = random.integers(0, min(len(whole), random.choice([60, len(whole)])), 3)
        damaged[places] = random.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        attempt(path)


@pytest.mark.parametrize("size", [(1, 1), (20000, 10), (10, 20000)], ids=str)
def test_odd_sizes(tmp_path, size):
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "a.png")
    Image.new("L", size, 1).save(tmp_path / "m.png")
    image, mask = read_sample(Sample("a", tmp_path / "a.png", tmp_path / "m.png"), Labels(2))
    assert image.shape == (3, size[1], size[0])
    assert mask.shape == (size[1], size[0])
    image, mask = read_sample(Sample("a", tmp_path / "a.png", tmp_path / "m.png"), Labels(2), short_side=1)
    assert min(image.shape[1:]) == 1


@pytest.mark.parametrize("mode", ["LA", "CMYK", "YCbCr"])
def test_masks_of_a_wrong_mode(tmp_path, mode):
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 12:
        pytest.skip("Pillow before 12 takes such a file for one that is cut off")
    Image.new(mode, (3, 2)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=rf"m.tif is a colour picture \(mode {mode}\)"):
        read_mask(tmp_path / "m.tif", Labels(2))


def test_folder_and_text_named_like_pictures(tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "b.tif").write_text("hello")
    for name in ("a.png", "b.tif", "none.png"):
        attempt(tmp_path / name)
        with pytest.raises(DataError):
            read_image(tmp_path / name)


def test_postscript_named_like_a_picture_is_never_run(tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (3, 2)).save(path, "EPS")
    for read in (read_image, lambda path: read_image(path, 5), image_size, describe_file):
        with pytest.raises(DataError, match=r"a.png is PostScript, a program"):
            read(path)
    with pytest.raises(DataError, match=r"a.png is PostScript, a program"):
        read_mask(path, Labels(2))


def corners(height, width):
    """A mask with a mark in its upper left corner, and a picture of the same."""
    ids = np.zeros((height, width), np.uint8)
    ids[0, 0] = 1
    return ids, np.repeat(ids[:, :, None] * np.uint8(255), 3, 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_stay_on_turned_pictures(tmp_path, orientation):
    ids, pixels = corners(4, 6)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")[..., 0] == 255
    Image.fromarray(ids).save(tmp_path / "stored.png")
    Image.fromarray(ids).save(tmp_path / "own.png", exif=exif)
    Image.fromarray(upright.astype(np.uint8)).save(tmp_path / "upright.png")
    for name, stored in (("stored", True), ("own", False), ("own", True), ("upright", False)):
        entry = Sample("a", tmp_path / "a.png", tmp_path / f"{name}.png")
        image, mask = read_sample(entry, Labels(2, stored=stored))
        assert np.array_equal(mask.numpy() == 1, upright), name
        assert np.array_equal(image[0].numpy() == 255, upright)
    if orientation > 4:
        with pytest.raises(DataError, match=r"need --data.mask_orientation stored"):
            read_sample(Sample("a", tmp_path / "a.png", tmp_path / "stored.png"), Labels(2))


def test_white_scales_deep_pictures(tmp_path):
    Image.fromarray(np.array([[0, 2048, 4095, 9999]], np.uint16)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 1, white=4095).tolist() == [[0, 128, 255, 255]]
    Image.fromarray(np.array([[0, 0.5, 1, np.nan]], np.float32)).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif", 1, white=1).tolist() == [[0, 128, 255, 0]]
    with pytest.raises(DataError, match=r"f.tif holds floating-point numbers; .*--data.white"):
        read_image(tmp_path / "f.tif", 1)
    Image.fromarray(np.full((1, 2, 4), 7, np.uint8)).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png", 4, white=3).shape == (1, 2, 4)


def test_many_channels(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.arange(5 * 4 * 3, dtype=np.uint16).reshape(5, 4, 3) * 1000
    tifffile.imwrite(tmp_path / "planes.tif", pixels, photometric="minisblack", metadata={"axes": "CYX"})
    tifffile.imwrite(
        tmp_path / "pixels.tif", np.moveaxis(pixels, 0, 2), photometric="minisblack", planarconfig="contig"
    )
    for name in ("planes", "pixels"):
        image, _ = read_sample(Sample(name, tmp_path / f"{name}.tif"), Labels(2), channels=5)
        assert np.array_equal(image.numpy(), pixels >> 8), name
        assert image_size(tmp_path / f"{name}.tif") == (4, 3)
        assert describe_file(tmp_path / f"{name}.tif") == ("5 channels of uint16", 5, False, 59000)
        small, _ = read_sample(Sample(name, tmp_path / f"{name}.tif"), Labels(2), channels=5, short_side=6)
        assert small.shape == (5, 8, 6)
        with pytest.raises(DataError, match=r"has 5 channels, expected 3: train with --model.in_channels 5"):
            read_image(tmp_path / f"{name}.tif")
    (tmp_path / "planes.tif").write_bytes((tmp_path / "planes.tif").read_bytes()[:150])
    attempt(tmp_path / "planes.tif")
