"""The passes of a step: how many, of what, and what they may share."""

import copy
import math

import pytest
import torch

from pseudoseg_fast import reference
from pseudoseg_fast.method import MethodConfig, unlabeled_losses
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.pseudo_labels import draw_boxes, pseudo_label
from pseudoseg_fast.sgc import resize_valid
from pseudoseg_fast.step import TERMS, StepLosses, has_batch_norm
from pseudoseg_fast.stepper import weigh

CLASSES, SIDE = 3, 32


def make(encoder, **options):
    torch.manual_seed(0)
    network = Network(
        "FPN", encoder, None, classes=CLASSES, attention_dim=8, decoder={"decoder_dropout": 0.0}
    )
    return StepLosses(network.train(), MethodConfig(**options), None)


def batches(views=1):
    torch.manual_seed(1)
    labeled = {
        "image": torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8),
        "mask": torch.randint(0, CLASSES, (2, SIDE, SIDE), dtype=torch.uint8),
        "valid": torch.ones(2, SIDE, SIDE, dtype=torch.bool),
    }
    valid = torch.ones(3, views, SIDE, SIDE, dtype=torch.bool)
    for view in range(views):
        valid[:, view, 8 * view : 16 + 16 * view, :16] = False  # the squares overlap
    unlabeled = {
        "weak": torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8),
        "strong": torch.randint(0, 256, (3, views, 3, SIDE, SIDE), dtype=torch.uint8),
        "valid": valid,
    }
    return labeled, unlabeled


def test_strong_views_learn_one_label_and_the_mean_is_over_the_valid_pixels_of_all():
    step = make("test_convnext", strong_views=2)
    labeled, unlabeled = batches(views=2)
    losses = step(labeled, unlabeled, 0.5)
    with torch.no_grad():
        # A position takes part in the attention where at least one view shows it.
        weak = step.network(unlabeled["weak"], sgc=True, valid=unlabeled["valid"].any(1))
        views = [
            unlabeled_losses(
                step.method,
                0.5,
                step.network(unlabeled["strong"][:, view]),
                weak,
                unlabeled["valid"][:, view],
            )["L_u"]
            for view in range(2)
        ]
        pixels = resize_valid(unlabeled["valid"].flatten(0, 1), (8, 8)).unflatten(0, (3, 2)).sum((0, 2, 3))
    assert pixels[0] != pixels[1]
    expected = (views[0] * pixels[0] + views[1] * pixels[1]) / pixels.sum()
    torch.testing.assert_close(losses["L_u"], expected)
    assert views[0] != views[1]


@pytest.mark.parametrize("tagged", [False, True])
def test_mirror_images_have_half_a_say_in_the_label(tagged):
    step = make("test_convnext", flip_labels=True, image_labels=tagged, weight_x=0.0)
    labeler = copy.deepcopy(step.network).eval()
    step = StepLosses(step.network, step.method, labeler)
    labeled, unlabeled = batches()
    tags = torch.tensor([[1.0, 0.0], [0.0, 1.0], [math.nan, math.nan]]) if tagged else None
    losses = step(labeled, {**unlabeled, "tags": tags}, 0.5)
    images, valid = unlabeled["weak"], unlabeled["valid"][:, 0]
    with torch.no_grad():  # as one batch, over which the attention head's norm takes its statistics
        both = labeler(
            torch.cat([images, images.flip(3)]),
            sgc=True,
            image_labels=torch.cat([tags, tags]) if tagged else None,
            valid=torch.cat([valid, valid.flip(2)]),
        )
        seen, mirrored = (Outputs(*(maps[half] for maps in both)) for half in (slice(3), slice(3, 6)))
        strong = step.network(unlabeled["strong"][:, 0])
    labels = seen._replace(
        decoder_logits=(seen.decoder_logits + mirrored.decoder_logits.flip(3)) / 2,
        sgc_logits=(seen.sgc_logits + mirrored.sgc_logits.flip(3)) / 2,
    )
    expected, unlike = (
        unlabeled_losses(step.method, 0.5, strong, weak, valid, tags) for weak in (labels, seen)
    )
    torch.testing.assert_close(losses["L_u"], expected["L_u"])
    assert (losses["L_u"] - unlike["L_u"]).abs() > 1e-4


@pytest.mark.parametrize("joint", [False, True])
def test_dice_counts_strong_views_where_they_are_valid(joint):
    step = make("test_convnext", strong_views=2, weight_dice=1.0, dice_unlabeled=True, joint=joint)
    labeled, unlabeled = batches(views=2)
    losses = step(labeled, unlabeled, 0.5)
    with torch.no_grad():
        weak = step.network(unlabeled["weak"], sgc=True, valid=unlabeled["valid"].any(1))
        images = torch.cat([labeled["image"], *unlabeled["strong"].unbind(1)])
        label = pseudo_label(step.method, weak, (SIDE, SIDE)).argmax(1)
        ids = [torch.where(valid, label, 255) for valid in unlabeled["valid"].unbind(1)]
    expected = reference.dice_loss(step.network(images).decoder_logits, torch.cat([labeled["mask"], *ids]))
    torch.testing.assert_close(losses["L_dice"], expected)
    weights = [
        weight for name, weight in step.network.named_parameters() if name.startswith(("encoder", "decoder"))
    ]
    for ours, theirs in zip(
        torch.autograd.grad(losses["L_dice"], weights, allow_unused=True),
        torch.autograd.grad(expected, weights, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    alone = make("test_convnext", weight_dice=1.0)(labeled, unlabeled, 0.5)["L_dice"]
    assert abs(alone - expected) > 1e-3


def test_mixed_pictures_keep_what_their_tags_ruled_out():
    tagged = {"image_labels": True, "exclude_untagged": True, "norm": "none", "weight_x": 0.0}
    step = make("test_convnext", cutmix=1.0, gamma=1.0, **tagged)
    side = 3 * step.network.stride
    numbers = torch.arange(3, dtype=torch.uint8)[:, None, None, None]
    unlabeled = {
        "weak": torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8),
        "strong": numbers[:, None].expand(3, 1, 3, side, side),
        "valid": torch.ones(3, 1, side, side, dtype=torch.bool),
        "tags": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
    }
    unlabeled["boxes"] = draw_boxes(unlabeled["strong"], step.network.stride, 1.0)
    (images, weak, _), *others = step._targets(unlabeled)
    assert not others
    source = images[:, 0, ::4, ::4].long()  # whose pixel it is, at the decoder's stride
    assert all(len(picture.unique()) == 2 for picture in source)
    absent = torch.tensor([[False, False, True], [False, True, False], [False, False, False]])
    assert torch.equal(weak.decoder_logits.movedim(1, -1) == -torch.inf, absent[source])


def run(joint, encoder):
    step = make(encoder, joint=joint)
    losses = step(*batches(), 1.0)
    sum(losses.values()).backward()
    gradients = {
        name: parameter.grad for name, parameter in step.network.named_parameters() if parameter.requires_grad
    }
    return losses, gradients


def test_a_joint_pass_is_the_same_where_no_norm_looks_at_the_batch():
    assert not has_batch_norm(make("test_convnext").network)
    assert make("test_convnext").joint
    (apart, ours), (joint, theirs) = run(False, "test_convnext"), run(True, "test_convnext")
    assert apart.keys() == joint.keys() == {"L_s", "L_sa", "L_x", "L_u"}
    for name, loss in apart.items():
        torch.testing.assert_close(joint[name], loss)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("joint", [False, True])
def test_all_weights_get_gradients_in_half_precision(joint):
    """Autocast may keep copies of weights; those made without a graph would cut it."""
    step = make("test_convnext", joint=joint)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(*batches(), 1.0)
    sum(losses.values()).backward()
    weights = [weight for weight in step.network.parameters() if weight.requires_grad]
    assert all(weight.grad is not None for weight in weights)


def test_a_joint_pass_shares_the_statistics_of_batch_norms_and_is_not_taken_unasked():
    assert has_batch_norm(make("test_resnet").network)
    assert not make("test_resnet").joint
    (apart, _), (joint, _) = run(False, "test_resnet"), run(True, "test_resnet")
    assert joint["L_s"] != apart["L_s"]


def test_terms_are_multiplied_by_their_shares():
    losses = {"L_u": torch.tensor(2.0), "L_s": torch.tensor(3.0)}
    share = torch.arange(1.0, 1 + len(TERMS))
    assert weigh(losses, None) == losses
    assert weigh(losses, share) == {"L_u": 2.0 * (1 + TERMS.index("L_u")), "L_s": 3.0}


def test_denominators_are_what_the_means_divide_by():
    step = make("test_convnext")
    labeled, unlabeled = batches()
    labeled["mask"][0, :8] = 255
    pixels, one, same, rows, valid = step.denominators(labeled, unlabeled).tolist()
    assert pixels == same == 2 * SIDE * SIDE - 8 * SIDE
    assert (one, rows) == (1, 2)
    assert valid == 3 * (8 * 8 - 4 * 4)  # at the decoder's stride of 4
    step.class_weight = torch.tensor([1.0, 0.0, 0.0])
    assert step.denominators(labeled, None).tolist()[0] == int((labeled["mask"] == 0).sum())
    assert step.denominators(labeled, None).tolist()[TERMS.index("L_u")] == 0
    assert step.network.training


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, set()),
        ({"name": "supervised"}, {"classifier", "sgc"}),
        ({"weight_x": 0.0}, {"classifier"}),
        ({"weight_sa": 0.0}, {"sgc"}),
    ],
)
def test_what_has_no_loss_is_frozen(options, frozen):
    network = make("test_convnext", **options).network
    assert frozen == {
        name.split(".")[0] for name, parameter in network.named_parameters() if not parameter.requires_grad
    }
