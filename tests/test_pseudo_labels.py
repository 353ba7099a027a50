"""What is done to the weak view's outputs before they become a label: CutMix, and tags that rule classes out."""

import math

import pytest
import torch
from outputs import BATCH, CLASSES, FOREGROUND, random_outputs

from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.pseudo_labels import cut_mix, draw_boxes, exclude_untagged, pseudo_label


@pytest.mark.parametrize("size", [(48, 80), (16, 16), (64, 16)], ids=str)
def test_cut_mix_moves_pictures_labels_and_validity_together(size):
    """Every map holds one number per picture and cell, so that what was pasted from where can be read off."""
    height, width = size
    owner = torch.arange(3.0)[:, None, None, None] * 1000
    cells = torch.arange(height // 16 * (width // 16)).reshape(1, 1, height // 16, width // 16)
    deep = owner + cells
    full = deep.repeat_interleave(16, 2).repeat_interleave(16, 3)
    decoder = deep.repeat_interleave(4, 2).repeat_interleave(4, 3)
    weak = Outputs(decoder, torch.zeros(3, 2), None, deep)
    for seed in range(10):
        torch.manual_seed(seed)
        boxes = draw_boxes(full[:, None], 16, 1.0)[:, 0]
        strong, mixed, valid = cut_mix(full, weak, full[:, 0] >= 1000, boxes)
        assert torch.equal(strong[:, :, ::4, ::4], mixed.decoder_logits)
        assert torch.equal(strong[:, :, ::16, ::16], mixed.sgc_logits)
        assert torch.equal(strong[:, 0] >= 1000, valid)
        assert torch.equal(strong % 1000, full % 1000), "what is pasted keeps its place"
        pasted = strong // 1000 != full // 1000
        assert torch.equal(strong[pasted] // 1000, (full[pasted] // 1000 - 1) % 3)
        if min(size) > 16:
            assert 0.3 < pasted.float().mean() < 0.7


def test_cut_mix_changes_no_argument():
    weak, strong = random_outputs(), torch.rand(BATCH, 3, 32, 48)
    weak = weak._replace(decoder_logits=torch.rand(BATCH, 3, 8, 12))
    valid = torch.ones(BATCH, 32, 48, dtype=torch.bool)
    copies = [tensor.clone() for tensor in (strong, weak.decoder_logits, weak.sgc_logits, valid)]
    cut_mix(strong, weak, valid, draw_boxes(strong[:, None], 16, 1.0)[:, 0])
    for tensor, before in zip((strong, weak.decoder_logits, weak.sgc_logits, valid), copies, strict=True):
        assert torch.equal(tensor, before)


def test_some_views_are_mixed_and_some_are_not():
    boxes = draw_boxes(torch.zeros(2, 200, 3, 32, 32), 16, 0.25)
    mixed = boxes.flatten(2).any(2)
    assert torch.equal(mixed[0], mixed[1]), "all pictures of a view or none"
    assert 0.1 < mixed.float().mean() < 0.4
    assert not draw_boxes(torch.zeros(2, 5, 3, 32, 32), 16, 0.0).any()


@pytest.mark.parametrize(("background", "absent"), [(None, [1]), (0, [2]), (1, [2])])
def test_classes_that_the_tags_do_not_name_get_no_label(background, absent):
    weak = random_outputs()
    tags = torch.full((BATCH, CLASSES if background is None else FOREGROUND), math.nan)
    tags[1] = 1.0
    tags[1, 1] = 0.0
    config = MethodConfig(norm="none", temperature=1.0, image_labels=True, exclude_untagged=True)
    label = pseudo_label(config, exclude_untagged(weak, tags, background), (9, 11))
    assert torch.equal(label[0], pseudo_label(config, weak, (9, 11))[0])
    assert [c for c in range(CLASSES) if label[1, c].max() < 1e-300] == absent
    torch.testing.assert_close(label.sum(1), torch.ones(BATCH, 9, 11, dtype=torch.float64))
    assert weak.decoder_logits.isfinite().all()


@pytest.mark.parametrize("background", [0, 1, 2])
def test_what_untagged_classes_had_goes_to_the_tagged_ones_and_the_background_stays(background):
    weak = random_outputs()
    first, second = (c for c in range(CLASSES) if c != background)
    tags = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    told = exclude_untagged(weak, tags, background)
    for before, after in [(weak.decoder_logits, told.decoder_logits), (weak.sgc_logits, told.sgc_logits)]:
        before, after = before.softmax(1), after.softmax(1)
        torch.testing.assert_close(after[0, background], before[0, background])
        torch.testing.assert_close(after[0, first], before[0, first] + before[0, second])
        assert torch.equal(after[1, background], torch.ones_like(after[1, background])), "nothing is tagged"


@pytest.mark.parametrize("background", [None, 1])
def test_rare_tags_say_more_as_bayes_rule_has_it(background):
    weak = random_outputs()
    foreground = [c for c in range(CLASSES) if c != background]
    tags = torch.ones(BATCH, len(foreground))
    tags[0] = math.nan
    tags[1, -1] = 0
    frequency = torch.tensor([0.5, 0.1, 0.0])[: len(foreground)]
    frequency[-1] = 0.0  # of a class that no picture is tagged with
    told = exclude_untagged(weak, tags, background, frequency)
    before, after = weak.decoder_logits.softmax(1), told.decoder_logits.softmax(1)
    torch.testing.assert_close(after[0], before[0])
    expected = before[1, foreground[:-1]] / frequency[:-1, None, None]
    rest = 1 if background is None else 1 - before[1, background]
    torch.testing.assert_close(after[1, foreground[:-1]], rest * expected / expected.sum(0))
    assert not after[1, foreground[-1]].any()
