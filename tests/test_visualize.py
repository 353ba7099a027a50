import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast import visualize
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import Sample

RED, GREEN = (255, 0, 0), (0, 255, 0)


def flat(height, width, color):
    return np.full((height, width, 3), color, np.uint8)


@pytest.mark.parametrize(("classes", "background"), [(3, None), (21, 0), (6, 4), (60, None), (255, 254)])
def test_palette_tells_the_classes_apart(classes, background):
    colors = visualize.palette(classes, background)
    assert colors.shape == (classes, 3)
    assert colors.dtype == np.uint8
    assert len({tuple(color) for color in [*colors.tolist(), visualize.IGNORED]}) == classes + 1
    assert np.array_equal(colors, visualize.palette(classes, background))
    if background is not None:
        assert colors[background].tolist() == [0, 0, 0]


def test_a_masks_own_palette_is_used_if_it_tells_the_classes_apart(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8))
    image.putpalette([9, 9, 9, *RED] + [7] * 762)
    image.save(tmp_path / "p.png")
    assert visualize.mask_palette(tmp_path / "p.png", Labels(3)).tolist() == [[9, 9, 9], [*RED], [7, 7, 7]]
    assert np.array_equal(visualize.mask_palette(tmp_path / "p.png", Labels(4), 0), visualize.palette(4, 0))

    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "l.png")
    assert np.array_equal(visualize.mask_palette(tmp_path / "l.png", Labels(3)), visualize.palette(3))
    assert np.array_equal(visualize.mask_palette(None, Labels(3)), visualize.palette(3))


def test_the_colour_of_a_class_is_that_of_the_ids_which_mean_it(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([9, 9, 9, *RED, *GREEN] + [7] * 759)
    image.save(tmp_path / "p.png")

    def colors(**meaning):
        return visualize.mask_palette(tmp_path / "p.png", Labels(2, **meaning)).tolist()

    assert colors(reduce_zero_label=True) == [[*RED], [*GREEN]]
    assert colors(label_map={0: 255, 1: 1, 2: 0}) == [[*GREEN], [*RED]]
    assert colors(color_map={GREEN: 0, (1, 2, 3): 1, RED: 1}) == [[*GREEN], [1, 2, 3]]
    assert colors(color_map={GREEN: 0, RED: 255}) == visualize.palette(2).tolist()


def test_colorize_leaves_ignored_pixels_white():
    colors = np.array([RED, GREEN], np.uint8)
    labels = np.array([[1, 0], [255, 2]], np.uint8)
    assert visualize.colorize(labels, colors).tolist() == [[[*GREEN], [*RED]], [[255] * 3, [255] * 3]]


@pytest.mark.parametrize(("opacity", "expected"), [(0, 100), (0.5, 150), (1, 200)])
def test_blend(opacity, expected):
    assert (visualize.blend(flat(2, 3, 100), flat(2, 3, 200), opacity) == expected).all()


def test_grid_places_pictures_under_their_titles():
    rows = [[flat(40, 80, RED), flat(40, 80, GREEN)], [flat(40, 80, GREEN), flat(20, 10, RED)]]
    colors = np.array([RED, GREEN], np.uint8)
    sheet = visualize.grid(rows, ["input", "truth"], ["a", "b"], colors, cell=60)

    margin, top = visualize.MARGIN, visualize.TEXT + 2 * visualize.MARGIN
    # The longer side of every picture is 60 pixels, so rows are 60 high for the upright one.
    assert sheet.width == 2 * (60 + margin) + margin
    legend = visualize.legend(["a", "b"], colors, sheet.width)
    assert sheet.height == top + margin + 2 * (60 + margin) + legend.height
    assert sheet.getpixel((margin, top)) == RED
    assert sheet.getpixel((margin + 59, top + 29)) == RED
    assert sheet.getpixel((margin, top + 30)) == visualize.IGNORED
    assert sheet.getpixel((margin + 60 + margin, top)) == GREEN
    assert sheet.getpixel((margin, top + 60 + margin)) == GREEN
    assert sheet.getpixel((margin + 60 + margin + 29, top + 60 + margin + 59)) == RED


def test_legend_breaks_lines_and_shows_every_colour():
    names = [f"a class of a long name {index}" for index in range(5)]
    colors = visualize.palette(5)
    wide, narrow = visualize.legend(names, colors, 2000), visualize.legend(names, colors, 100)
    line = visualize.TEXT + visualize.MARGIN
    assert wide.size == (2000, line + visualize.MARGIN)
    assert narrow.size == (100, 5 * line + visualize.MARGIN)
    for key in (wide, narrow):
        shown = {color for _, color in key.getcolors(1 << 20)}
        assert shown.issuperset(tuple(color) for color in colors.tolist())


def test_tile_map_puts_tiles_back_where_they_were(tmp_path):
    side = visualize.TILE
    samples = {}
    for name, color, ids in [("r0150_c0096", 100, 0), ("r0246_c0192", 200, 1), ("r0150_c0288", 50, 0)]:
        Image.fromarray(flat(side, side, color)).save(tmp_path / f"{name}.png")
        Image.fromarray(np.full((side, side), ids, np.uint8)).save(tmp_path / f"{name}_mask.png")
        samples[name] = Sample(f"{name}.png", tmp_path / f"{name}.png", tmp_path / f"{name}_mask.png")
    first, second, other = samples.values()
    predictions = {sample.name: np.ones((side, side), np.uint8) for sample in (first, second)}
    colors = np.array([RED, GREEN], np.uint8)
    picture = visualize.tile_map([first, second], predictions, [other], ["a", "b"], colors)

    # Two panels of 3 x 2 tiles, each tile a quarter of its side.
    cell = side // 4
    left, top = visualize.MARGIN, visualize.TEXT + 2 * visualize.MARGIN
    below = top + 2 * cell + visualize.MARGIN

    def at(column, row, panel):
        return picture.getpixel((left + column * cell + cell // 2, panel + row * cell + cell // 2))

    def shown(pixel, color):
        return tuple(int(value) for value in visualize.blend(flat(1, 1, pixel), flat(1, 1, color), 0.7)[0, 0])

    assert at(0, 0, top) == shown(100, RED)
    assert at(1, 1, top) == shown(200, GREEN)
    assert at(0, 0, below) == shown(100, GREEN)
    assert at(1, 1, below) == shown(200, GREEN)
    assert at(2, 0, top) == at(2, 0, below) == (20, 20, 20)
    assert at(2, 1, top) == (12, 22, 44)


def test_a_tile_of_another_name_is_refused():
    assert visualize.tile_position("images/r0150_c0864.jpg") == (150, 864)
    with pytest.raises(ValueError, match=r"named r0150_c0864.*got images/cat.jpg"):
        visualize.tile_position("images/cat.jpg")
