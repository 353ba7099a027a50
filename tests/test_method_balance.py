"""Weights of classes and the Dice loss, for sets in which some classes are rare."""

import pytest
import torch
from outputs import BATCH, CLASSES, random_outputs

from pseudoseg_fast import reference
from pseudoseg_fast.method import (
    MethodConfig,
    class_weights,
    labeled_losses,
)
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.pseudo_labels import pseudo_label, pseudo_masks


def test_balanced_weights_make_the_classes_weigh_alike():
    pixels = [600, 300, 0, 100]
    weights = class_weights(MethodConfig(class_weight="balanced"), pixels)
    assert weights.dtype == torch.float32
    assert (weights * torch.tensor(pixels)).tolist() == pytest.approx([1000 / 3, 1000 / 3, 0, 1000 / 3])
    assert class_weights(MethodConfig(), pixels) is None
    assert class_weights(MethodConfig(class_weight=(1.0, 2.0)), [5, 5]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="a weight for each of the 4 classes, or balanced, got 2"):
        class_weights(MethodConfig(class_weight=(1.0, 2.0)), pixels)
    with pytest.raises(
        ValueError, match=r"class_weight must be finite, not negative and not all 0, got \[-1"
    ):
        MethodConfig(class_weight=(-1.0, 2.0))


def test_weights_are_those_of_both_cross_entropies():
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    outputs = Outputs(logits, torch.randn(2, 2, dtype=torch.float64), None, logits[..., :3, :2].contiguous())
    masks = torch.randint(0, 3, (2, 13, 17), dtype=torch.uint8)
    weight = torch.tensor([0.1, 1.0, 3.0])
    config = MethodConfig(weight_dice=0.5, weight_sa=2.0)
    losses = labeled_losses(config, outputs, masks, torch.zeros(2, 2), class_weight=weight)
    torch.testing.assert_close(losses["L_s"], reference.cross_entropy(logits, masks, class_weight=weight))
    attention = reference.cross_entropy(outputs.sgc_logits, masks, class_weight=weight)
    torch.testing.assert_close(losses["L_sa"], 2 * attention)
    torch.testing.assert_close(losses["L_dice"], 0.5 * reference.dice_loss(logits, masks))


def test_dice_takes_labelled_pictures_and_strong_views_as_one_batch():
    outputs, views = random_outputs(), [random_outputs().decoder_logits for _ in range(2)]
    masks, *ids = (torch.randint(0, CLASSES, (BATCH, 9, 11)) for _ in range(3))
    ids[0][0] = 255
    config = MethodConfig(weight_dice=2.0, dice_unlabeled=True)
    pseudo = [*zip(views, ids, strict=True)]
    losses = labeled_losses(config, outputs, masks.byte(), torch.zeros(BATCH, 2), pseudo=pseudo)
    expected = 2 * reference.dice_loss(torch.cat([outputs.decoder_logits, *views]), torch.cat([masks, *ids]))
    torch.testing.assert_close(losses["L_dice"], expected)


def test_pseudo_masks_are_the_likeliest_classes_of_what_is_sure_and_valid():
    weak, valid = random_outputs(), torch.rand(BATCH, 9, 11) > 0.3
    config = MethodConfig(threshold=0.5)
    confidence, ids = pseudo_label(config, weak, (9, 11)).max(1)
    counted = (confidence >= 0.5) & valid
    assert 0 < counted.sum() < valid.sum()
    assert torch.equal(pseudo_masks(config, weak, valid), torch.where(counted, ids, 255))
