"""Orientation and depth: every kind of file gives the picture that its numbers mean, or is refused."""

import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from pseudoseg_fast.data import decode
from pseudoseg_fast.data.decode import UnreadableImage, describe_file, image_size, read_image
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import Blob, DataError
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.deploy.pictures import open_picture, to_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
DEEP = PIXELS.astype(np.uint16) * 16  # 12 bits
WHITE = 4080  # scales them back
ORIENTATION = 274


def turned(pixels, orientation):
    """Rows and columns of the upright picture, as the table of TIFF's tag Orientation names them."""
    rows_first = orientation < 5
    upright = pixels if rows_first else pixels.swapaxes(0, 1)
    down, right = {
        1: (1, 1),
        2: (1, -1),
        3: (-1, -1),
        4: (-1, 1),
        5: (1, 1),
        6: (1, -1),
        7: (-1, -1),
        8: (-1, 1),
    }[orientation]
    return upright[::down, ::right]


def write_png(path, values):
    """Write colour of 16 bits, which Pillow does not."""
    height, width, channels = values.shape

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tif", "channels"])
def test_pictures_and_masks_are_turned_upright_once(tmp_path, kind, orientation):
    expected = turned(PIXELS, orientation)
    path, mask = tmp_path / f"a.{kind}", tmp_path / f"mask.{kind}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    ids = PIXELS[..., 0] % 3
    if kind == "channels":
        path, mask = tmp_path / "a.tif", tmp_path / "mask.tif"
        stacked = np.concatenate([PIXELS, PIXELS], 2)
        tag = (ORIENTATION, 3, 1, orientation, True)
        tifffile.imwrite(path, stacked, photometric="minisblack", planarconfig="contig", extratags=[tag])
        for source in (path, Blob(path.name, path.read_bytes())):
            assert np.array_equal(read_image(source, 6), turned(stacked, orientation))
            assert image_size(source) == expected.shape[:2]
    else:
        Image.fromarray(PIXELS).save(path, exif=exif)
        for source in (path, Blob(path.name, path.read_bytes())):
            assert np.array_equal(read_image(source), expected)
        assert np.array_equal(to_pixels(open_picture(path, 3, None, 1000), 3), expected.transpose(2, 0, 1))
    Image.fromarray(ids).save(mask, exif=exif)
    assert image_size(path) == expected.shape[:2]
    assert describe_file(path).turned == (orientation > 1)
    for stored in (False, True):  # a mask with an orientation of its own is turned by that
        assert np.array_equal(read_mask(mask, Labels(3, stored=stored), path), turned(ids, orientation))
    Image.fromarray(ids).save(mask)
    assert np.array_equal(read_mask(mask, Labels(3, stored=True), path), turned(ids, orientation))
    assert np.array_equal(read_mask(mask, Labels(3), path), ids)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"compression": "zlib"}], ids=str)
def test_tiff_colour_of_16_bits(tmp_path, separate, layout):
    path = tmp_path / "a.tif"
    values = np.moveaxis(DEEP, 2, 0) if separate else DEEP
    tifffile.imwrite(
        path, values, photometric="rgb", planarconfig="separate" if separate else "contig", **layout
    )
    assert np.array_equal(read_image(path), DEEP >> 8)
    assert np.array_equal(read_image(path, white=WHITE), PIXELS)
    assert np.array_equal(to_pixels(open_picture(path, 3, None, 1000), 3), np.moveaxis(DEEP >> 8, 2, 0))
    mode, _, _, peak = describe_file(path)
    assert "16" in mode
    assert DEEP.max() <= peak < DEEP.max() + 256


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_png_colour_and_alpha_of_16_bits(tmp_path, channels):
    path = tmp_path / "a.png"
    values = np.concatenate([DEEP, np.full((5, 7, 1), 0xFFFF, np.uint16)], 2)
    write_png(path, values[..., {2: [0, 3], 3: [0, 1, 2], 4: [0, 1, 2, 3]}[channels]])
    color = values[..., [0, 0, 0] if channels == 2 else [0, 1, 2]]
    assert np.array_equal(read_image(path), color >> 8)
    mode, _, _, peak = describe_file(path)
    assert mode.endswith("of 16 bits")
    assert color.max() <= peak < color.max() + 256
    for wanted in (3, 4):  # of four channels alpha is one
        with pytest.raises(DataError, match=r"colour or alpha of 16 bits.*save it as TIFF"):
            read_image(path, wanted, white=WHITE)


@pytest.mark.parametrize("shape", [(30, 40, 5), (5, 30, 40)], ids=str)
def test_an_array_written_as_it_is_has_its_channels_on_the_shortest_axis(tmp_path, shape):
    values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, values)
    assert image_size(path) == (30, 40)
    expected = values if shape[2] == 5 else np.moveaxis(values, 0, 2)
    assert np.array_equal(read_image(path, 5), expected)


def test_pages_of_grey_are_channels_for_prediction_too(tmp_path):
    path = tmp_path / "a.tif"
    pages = [Image.fromarray(PIXELS[..., k]) for k in range(3)]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert np.array_equal(read_image(path), PIXELS)
    assert np.array_equal(to_pixels(open_picture(path, 3, None, 1000), 3), PIXELS.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.float32])
def test_one_band_is_grey_whatever_its_planes_are_called(tmp_path, kind):
    path = tmp_path / "a.tif"
    ids = (PIXELS[..., 0] % 3).astype(kind)
    Image.fromarray(ids).save(path, tiffinfo={284: 2})
    grey = ids * (1 if kind == np.uint8 else 127.5)
    assert np.array_equal(read_image(path, white=2), np.floor(grey + 0.5)[..., None].repeat(3, 2))
    if kind != np.float32:
        assert np.array_equal(read_mask(path, Labels(3)), ids)


@pytest.mark.parametrize("separate", [False, True])
def test_inks_are_not_taken_for_colour(tmp_path, separate):
    path = tmp_path / "a.tif"
    inks = np.concatenate([DEEP, DEEP[..., :1]], 2)
    tifffile.imwrite(
        path,
        np.moveaxis(inks, 2, 0) if separate else inks,
        photometric="separated",
        planarconfig="separate" if separate else "contig",
    )
    assert describe_file(path).channels == 3
    with pytest.raises(DataError, match=r"a.tif (holds inks|has colour or alpha of 16 bits)"):
        read_image(path, white=WHITE)
    assert np.array_equal(read_image(path, 4), inks >> 8)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("extra", "alpha"), [("unspecified", False), ("assocalpha", True), ("unassalpha", True)]
)
def test_a_fourth_channel_is_alpha_where_the_file_says_so(tmp_path, separate, dtype, extra, alpha):
    path = tmp_path / "a.tif"
    values = np.concatenate([PIXELS, np.full((5, 7, 1), 255, np.uint8)], 2).astype(dtype)
    values[0, 0, 3] = 254
    tifffile.imwrite(
        path,
        np.moveaxis(values, 2, 0) if separate else values,
        photometric="rgb",
        planarconfig="separate" if separate else "contig",
        extrasamples=[extra],
    )
    scale = 8 if dtype == np.uint16 else 0
    assert np.array_equal(read_image(path, 4), values >> scale)
    assert describe_file(path).channels == (3 if alpha else 4)
    assert image_size(path) == image_size(path, decode=True) == (5, 7)
    if not alpha:
        for read in (read_image, lambda path: open_picture(path, 3, None, 1000)):
            with pytest.raises(
                DataError, match=r"a.tif has 4 channels, expected 3: train with --model.in_channels 4"
            ):
                read(path)
        with pytest.raises(DataError, match=r"a.tif has 4 channels, expected 1"):
            read_image(path, 1)
    elif extra == "unassalpha":
        assert np.array_equal(read_image(path), values[..., :3] >> scale)
        assert np.array_equal(
            to_pixels(open_picture(path, 3, None, 1000), 3), (values[..., :3] >> scale).transpose(2, 0, 1)
        )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("extra", "channels"), [("unspecified", 2), ("unassalpha", 1)])
def test_a_second_channel_is_alpha_where_the_file_says_so(tmp_path, dtype, extra, channels):
    path = tmp_path / "a.tif"
    values = PIXELS[..., :2].astype(dtype)
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", extrasamples=[extra])
    shift = 8 if dtype == np.uint16 else 0
    assert describe_file(path).channels == channels
    assert np.array_equal(read_image(path, 2), values >> shift)
    if channels == 1:
        assert np.array_equal(read_image(path, 1), values[..., 0] >> shift)
        assert np.array_equal(read_image(path), (values[..., :1] >> shift).repeat(3, 2))
        return
    for read in (read_image, lambda path: read_image(path, 1)):
        with pytest.raises(DataError, match=r"a.tif has 2 channels, expected"):
            read(path)
    with pytest.raises(DataError, match=r"a.tif cannot be read as a mask"):
        read_mask(path, Labels(256 - 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_alpha_of_usual_files_is_dropped(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).convert(mode).save(path)
    assert describe_file(path).channels in (1, 3)
    assert read_image(path).shape == (5, 7, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "b.tif"])
def test_a_size_of_what_was_decoded(tmp_path, name):
    """The header of a file that is cut off still says it; b.tif is one for tifffile."""
    path, random = tmp_path / name, np.random.default_rng(0)
    if name == "b.tif":
        pixels = random.integers(0, 256, (50, 70, 5), np.uint8)
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    else:
        Image.fromarray(random.integers(0, 256, (50, 70, 3), np.uint8)).save(path)
    for source in (path, Blob(name, path.read_bytes())):
        assert image_size(source) == image_size(source, decode=True) == (50, 70)
    size = path.stat().st_size
    if name == "a.tif":  # its header is at its end
        tifffile.imwrite(path, random.integers(0, 256, (50, 70, 3), np.uint8), photometric="rgb")
    path.write_bytes(path.read_bytes()[: size // 2])
    if name != "a.png":  # whose orientation may stand behind its pixels
        assert image_size(path) == (50, 70)
    with pytest.raises(UnreadableImage, match=rf"{name} cannot be read as a picture"):
        image_size(path, decode=True)


def test_a_tiff_stored_sideways_under_another_name(tmp_path):
    path = tmp_path / "a.png"
    grey = PIXELS[..., 0] % 3
    Image.fromarray(grey).save(path, format="tiff", tiffinfo={ORIENTATION: 6})
    assert np.array_equal(read_image(path, 1), turned(grey, 6))
    assert np.array_equal(read_mask(path, Labels(3)), turned(grey, 6))


@pytest.mark.parametrize("values", [np.zeros((5, 7, 5), np.uint8), np.zeros((3, 5, 7), np.uint16)], ids=str)
def test_sizes_are_known_before_pixels_take_memory(tmp_path, monkeypatch, values):
    path = tmp_path / "a.tif"
    separate = len(values) == 3
    tifffile.imwrite(
        path,
        values,
        photometric="rgb" if separate else "minisblack",
        planarconfig="separate" if separate else "contig",
        extratags=[(ORIENTATION, 3, 1, 6, True)],
    )
    monkeypatch.setattr(decode, "_read_channels", None)
    assert image_size(path) == (7, 5)
    with pytest.raises(UnreadableImage, match="has 5 x 7 pixels; expected at most 34 in all"):
        open_picture(path, 3, None, 34)


def test_a_text_named_like_a_tiff_needs_no_package(tmp_path, monkeypatch):
    (tmp_path / "a.tif").write_text("hello")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for read in (read_image, image_size, describe_file, lambda path: open_picture(path, 3, None, 1000)):
        with pytest.raises(UnreadableImage, match=r"a.tif cannot be read as a picture: it is no TIFF file"):
            read(tmp_path / "a.tif")


def test_a_picture_of_nothing_but_nan(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.full((5, 7), np.nan, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(describe_file(tmp_path / "a.tif").peak)
