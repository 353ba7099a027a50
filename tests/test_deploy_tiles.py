"""Tiles: that they cover, that their weights add up, and that the whole is what a single pass gives."""

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.deploy.segment import Segmenter, Settings
from pseudoseg_fast.deploy.tiles import Span, check_tiles, enlarged, ramps, spans, stitch

LENGTHS = [(1, 32, 8), (32, 32, 8), (33, 32, 8), (57, 32, 8), (1000, 32, 8), (1025, 1024, 128), (999, 64, 0)]


@pytest.mark.parametrize(("length", "tile", "overlap"), LENGTHS, ids=str)
def test_spans_cover_a_side_and_two_at_most_meet(length, tile, overlap):
    parts = spans(length, tile, overlap)
    cover = np.zeros(length, int)
    weights = np.zeros(length)
    for part, ramp in zip(parts, ramps(parts), strict=True):
        assert part.stop - part.start == parts[0].stop <= tile
        cover[part.start : part.stop] += 1
        weights[part.start : part.stop] += ramp
    assert (parts[0].start, parts[-1].stop) == (0, length)
    assert 1 <= cover.min() <= cover.max() <= 2
    assert all(first.stop - second.start >= overlap for first, second in itertools.pairwise(parts))
    np.testing.assert_allclose(weights, 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(40, 33), (70, 200), (33, 300), (129, 64)], ids=str)
def test_stitched_answers_are_those_of_the_whole(size, batch, kind):
    random = np.random.default_rng(0)
    whole = random.random((5, *size), np.float32)
    whole = whole.argmax(0).astype(np.uint8) if kind == "labels" else whole
    filled = np.zeros_like(whole)
    times = np.zeros(size, int)

    def answer(places):
        assert len(places) <= batch
        return np.stack(
            [whole[..., row.start : row.stop, column.start : column.stop] for row, column in places]
        )

    rows, columns = (spans(side, 48, 12) for side in size)
    for top, left, values in stitch(rows, columns, answer, batch):
        part = np.s_[..., top : top + values.shape[-2], left : left + values.shape[-1]]
        filled[part] = values
        times[part[1:]] += 1
    assert (times == 1).all()
    np.testing.assert_allclose(filled, whole, rtol=1e-6)


def test_tiles_that_disagree_are_blended_without_a_step():
    def answer(places):
        return np.stack([np.full((1, 16, 32), column.start, np.float32) for _, column in places])

    columns = [Span(0, 32), Span(24, 56)]
    blocks = list(stitch([Span(0, 16)], columns, answer, 1))
    line = np.concatenate([block.values for block in blocks], axis=2)[0, 0]
    np.testing.assert_allclose(line[:24], 0)
    np.testing.assert_allclose(line[24:32], 24 * (np.arange(8) + 0.5) / 8, rtol=1e-5)
    np.testing.assert_allclose(line[32:], 24)


@pytest.mark.parametrize("length", [57, 33, 90, 113, 1000])
@pytest.mark.parametrize("factor", [1, 1.01, 1.5, 7.77])
def test_tiles_of_a_larger_answer_cover_it_as_they_cover_the_picture(length, factor):
    parts = spans(length, 32, 8)
    answered = enlarged(parts, round(length * factor))
    cover = np.zeros(round(length * factor), int)
    for part, other in zip(parts, answered, strict=True):
        assert abs(other.start - part.start * factor) <= 1 + factor / 2
        assert other.stop - other.start == answered[0].stop
        cover[other.start : other.stop] += 1
    assert (answered[0].start, answered[-1].stop) == (0, len(cover))
    assert 1 <= cover.min() <= cover.max() <= 2


@pytest.mark.parametrize("values", [(16, 0), (64, 17), (64, -1)], ids=str)
def test_tiles_too_small_or_overlapping_too_much_are_refused(values):
    with pytest.raises(ValueError, match=r"--(tile|overlap) expects"):
        check_tiles(*values)


def test_memory_is_bounded_by_tiles_not_by_the_picture():
    """A map of 21 classes would take 500 MB at the picture's size."""
    classes = 21

    def probabilities(images, size):
        values = np.zeros((len(images), classes, *size), np.float32)
        values[:, 7] = 1
        return values

    model = SimpleNamespace(
        metadata=SimpleNamespace(output="probabilities", channels=3, classes=[""] * classes),
        probabilities=probabilities,
    )
    segmenter = Segmenter(model, Settings(tile=256, overlap=32, batch_size=1))
    picture = Image.new("L", (3000, 2000))
    tracemalloc.start()
    labels = segmenter.large(picture).labels
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert labels.shape == (2000, 3000)
    assert (labels == 7).all()
    assert peak < 80e6
