import os
import time

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pseudoseg_fast.data import read
from pseudoseg_fast.data.decode import short_side_size
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample
from pseudoseg_fast.data.read import UnreadableImage, check_masks, read_image, read_mask, read_sample
from pseudoseg_fast.loaders import ResizeShortSide

IDS = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def palette_mask(path, ids=IDS):
    image = Image.fromarray(ids)
    image.putpalette(list(range(256)) * 3)  # a shorter palette would be saved in fewer bits, without 255
    image.save(path)
    return path


def sample(tmp_path, ids=IDS, name="a", size=IDS.shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return Sample(
        f"{name}.png", save(tmp_path / f"{name}.png", pixels), save(tmp_path / f"{name}_mask.png", ids)
    )


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_mask_modes_give_raw_ids(tmp_path, mode):
    path = tmp_path / "mask.png"
    if mode == "P":
        palette_mask(path)
    else:
        save(path, IDS if mode == "L" else IDS.astype(np.uint16))
    mask = read_mask(path, Labels(3))
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, IDS)


def test_two_colour_mask_gives_zero_and_one(tmp_path):
    path = save(tmp_path / "mask.png", (IDS == 1) * np.uint8(255), mode="1")
    assert np.array_equal(read_mask(path, Labels(2)), IDS == 1)


def test_other_ignore_index_becomes_255(tmp_path):
    path = save(tmp_path / "mask.png", np.array([[0, 3, 65535]], np.uint16))
    assert read_mask(path, Labels(4, ignore_index=65535)).tolist() == [[0, 3, 255]]


def test_wrong_ids_are_named_with_their_file(tmp_path):
    path = save(tmp_path / "mask.png", np.array([[0, 3, 7], [254, 255, 1]], np.uint8))
    with pytest.raises(DataError, match=r"mask.png holds the ids 3, 7, 254; expected 0 to 2, or 255"):
        read_mask(path, Labels(3))
    path = save(tmp_path / "deep.png", np.array([[0, 300]], np.uint16))
    with pytest.raises(DataError, match="holds the ids 300;"):
        read_mask(path, Labels(3))


def test_colour_mask_is_refused(tmp_path):
    path = save(tmp_path / "mask.png", np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match=r"mask.png is a colour picture \(mode RGB\) of 0 0 0; expected one"):
        read_mask(path, Labels(3))
    save(path, np.zeros((2, 3), np.float32), format="tiff")
    with pytest.raises(DataError, match="holds floating-point numbers"):
        read_mask(path, Labels(3))


def test_corrupt_mask(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"mask.png cannot be read as a mask"):
        read_mask(path, Labels(3))


def test_image_is_turned_upright(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the upper left corner of the file is the upper right corner of the picture
    path = save(tmp_path / "a.png", pixels, exif=exif)
    upright = read_image(path)
    assert upright.shape == (3, 2, 3)
    assert upright[0, 1].tolist() == [255, 255, 255]
    ids = save(tmp_path / "mask.png", np.zeros((3, 2), np.uint8))
    assert check_masks([Sample("a.png", path, ids)], Labels(2)).sum(0).tolist() == [6, 0]


@pytest.mark.parametrize(
    ("array", "channels", "expected"),
    [
        pytest.param(np.full((2, 3), 7, np.uint8), 3, 7, id="grey-as-colour"),
        pytest.param(np.full((2, 3, 3), 9, np.uint8), 1, 9, id="colour-as-grey"),
        pytest.param(np.full((2, 3, 4), 5, np.uint8), 3, 5, id="alpha-dropped"),
        pytest.param(np.full((2, 3), 0x1234, np.uint16), 1, 0x12, id="16-bit"),
    ],
)
def test_image_modes(tmp_path, array, channels, expected):
    path = save(tmp_path / "a.png", array)
    image, mask = read_sample(Sample("a.png", path), Labels(2), channels=channels)
    assert mask is None
    assert image.shape == (channels, 2, 3)
    assert torch.equal(image, torch.full_like(image, expected))


def test_truncated_jpeg(tmp_path):
    path = save(tmp_path / "a.jpg", np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UnreadableImage, match=r"a.jpg cannot be read as a picture"):
        read_image(path)


def test_resize_keeps_ids_and_aspect(tmp_path):
    ids = np.zeros((20, 33), np.uint8)
    ids[:, 17:] = 2
    pixels = np.repeat(ids[:, :, None] * np.uint8(100), 3, axis=2)
    entry = Sample("a.png", save(tmp_path / "a.png", pixels), save(tmp_path / "mask.png", ids))
    image, mask = read_sample(entry, Labels(3), short_side=10)
    assert image.shape == (3, 10, 16)
    assert mask.unique().tolist() == [0, 2]
    assert torch.equal(image[0] > 100, mask == 2)


def test_training_evaluation_and_inference_see_a_picture_at_one_size(tmp_path):
    path = save(tmp_path / "a.png", np.zeros((375, 500, 3), np.uint8))
    trained, _ = read_sample(Sample("a.png", path), Labels(2), short_side=128)
    evaluated = ResizeShortSide(128)(torch.zeros(3, 375, 500, dtype=torch.uint8), None)["image"]
    assert (
        tuple(trained.shape[1:]) == tuple(evaluated.shape[1:]) == short_side_size(375, 500, 128) == (128, 171)
    )


def test_mask_of_another_size(tmp_path):
    entry = sample(tmp_path, np.zeros((2, 4), np.uint8))
    with pytest.raises(
        DataError, match=r"a_mask.png has 4 x 2 pixels, .*a.png has 3 x 2 .*expected the same size"
    ):
        read_sample(entry, Labels(3))


def test_check_masks_counts_pixels(tmp_path):
    assert check_masks([sample(tmp_path), sample(tmp_path, name="b")], Labels(4)).sum(0).tolist() == [
        2,
        4,
        4,
        0,
    ]


def test_check_masks_reports_all_problems_at_once(tmp_path):
    small = sample(tmp_path, np.zeros((2, 4), np.uint8), name="small")
    wrong = [
        sample(tmp_path, np.full(IDS.shape, 9, np.uint8), name=f"wrong{number:02d}") for number in range(11)
    ]
    with pytest.raises(DataError, match="12 of 13 pictures with masks cannot be used") as error:
        check_masks([sample(tmp_path), small, *wrong], Labels(3))
    text = str(error.value)
    assert "small_mask.png has 4 x 2 pixels" in text
    assert "wrong08_mask.png holds the ids 9" in text
    assert "wrong09" not in text
    assert "and 2 more" in text


def test_check_masks_leaves_unreadable_pictures_to_training(tmp_path):
    entry = sample(tmp_path)
    entry.image.write_bytes(b"no picture")
    assert check_masks([entry], Labels(3)).sum(0).tolist() == [1, 2, 2]
    with pytest.raises(DataError, match="cannot be read as a picture"):
        check_masks([entry], Labels(3), {entry.image})


def test_pictures_to_evaluate_on_are_decoded_once(tmp_path, monkeypatch):
    """A picture whose header alone is whole would stop training at its first evaluation."""
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(read, "KEPT", 2)
    samples = [sample(tmp_path, np.zeros((90, 80), np.uint8), name=name, size=(90, 80)) for name in "ab"]
    damaged = samples[1].image
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    long_ago = time.time() - 9
    for path in (path for one in samples for path in one[1:]):
        os.utime(path, (long_ago, long_ago))
    assert check_masks(samples, Labels(2), {samples[0].image}).sum() == 14400
    with pytest.raises(
        DataError,
        match=r"1 of 2 pictures .*; repair them, or remove them and take them off lists.*\n  .*b.png cannot be read",
    ):
        check_masks(samples, Labels(2), {damaged})
    damaged.write_bytes(whole)
    os.utime(damaged, (long_ago, long_ago))
    assert check_masks(samples, Labels(2), {damaged}).sum() == 14400
    monkeypatch.setattr(read, "image_size", lambda *_, **__: pytest.fail("looked at again"))
    assert check_masks(samples, Labels(2), {damaged}).sum() == 14400


def test_check_masks_knows_masks_drawn_in_black_and_white(tmp_path):
    entry = sample(tmp_path, np.where(IDS == 1, 255, 0).astype(np.uint8))
    with pytest.raises(DataError, match="write 1 for the foreground"):
        check_masks([entry], Labels(2))


def test_a_large_jpeg_is_decoded_smaller(tmp_path, monkeypatch):
    """The mask still covers the picture, and the picture is nearly what the whole one would be made."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    pixels = pixels.resize((303, 201), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels.save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (201, 303), 1).save(tmp_path / "a.png")
    sample = Sample("a.jpg", tmp_path / "a.jpg", tmp_path / "a.png")
    image, mask = read_sample(sample, Labels(2), short_side=40)
    assert image.shape == (3, 60, 40)
    assert mask.shape == (60, 40)

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.draft", lambda self, mode, size: None)
    whole, _ = read_sample(sample, Labels(2), short_side=40)
    assert (image.float() - whole.float()).abs().mean() < 2
