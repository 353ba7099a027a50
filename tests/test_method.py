import dataclasses
import math

import pytest
import tiny
import torch
from outputs import BATCH, CLASSES, FOREGROUND, random_outputs
from torch.nn.functional import binary_cross_entropy, cross_entropy, interpolate

from pseudoseg_fast import reference
from pseudoseg_fast.method import (
    MethodConfig,
    classification_loss,
    labeled_losses,
    unlabeled_losses,
)
from pseudoseg_fast.network import Network
from pseudoseg_fast.pseudo_labels import pseudo_label
from pseudoseg_fast.sgc import resize_valid

CROP = (13, 17)


def random_valid():
    return torch.rand(BATCH, *CROP) > 0.3


def resize(logits, size, align_corners):
    return interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


def network(background=0):
    return Network(
        "DeepLabV3Plus", tiny.ENCODER, None, classes=CLASSES, background=background, attention_dim=4
    )


def reached(model, loss):
    """The parts of the network that a loss teaches."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    parts = {
        name.split(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    return parts


def test_defaults_are_the_papers():
    config = MethodConfig()
    assert dataclasses.asdict(config) == {
        "name": "pseudoseg",
        "gamma": 0.5,
        "temperature": 0.5,
        "norm": "batch",
        "hard": False,
        "threshold": 0.0,
        "label_size": "decoder",
        "align_corners": False,
        "cutmix": 0.0,
        "exclude_untagged": False,
        "flip_labels": False,
        "image_labels": False,
        "class_weight": None,
        "weight_dice": 0.0,
        "dice_unlabeled": False,
        "weight_sa": 1.0,
        "weight_x": 1.0,
        "weight_u": 1.0,
        "start_u": 0,
        "ramp_u": 0,
        "ema": 0.0,
        "strong_views": 1,
        "joint": "auto",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.5}, r"method.gamma must be in \[0, 1\], got 1.5"),
        ({"gamma": math.nan}, "method.gamma must be in"),
        ({"threshold": -0.1}, "method.threshold must be in"),
        ({"ema": 1.0}, "method.ema must be below 1"),
        (
            {"exclude_untagged": True},
            "expects method.image_labels true and method.norm none.*False and batch",
        ),
        ({"temperature": 0.0}, "method.temperature must be positive"),
        ({"temperature": math.nan}, "method.temperature must be positive"),
        ({"weight_u": -1.0}, "method.weight_u must not be negative"),
        ({"ramp_u": -1}, "method.ramp_u must not be negative"),
        ({"start_u": 1.5}, "method.start_u must be whole steps, or a share of the run below 1, got 1.5"),
        ({"ramp_u": math.inf}, "method.ramp_u must not be negative and must be finite"),
        ({"dice_unlabeled": True}, "dice_unlabeled extends the Dice loss, which is off"),
        (
            {"dice_unlabeled": True, "weight_dice": 1.0, "cutmix": 0.5},
            "the edges of method.cutmix, got 0.5, would blend",
        ),
        (
            {"image_labels": True, "norm": "none", "exclude_untagged": True, "cutmix": 0.5},
            "expects method.gamma 1 and method.label_size decoder.*got 0.5 and decoder",
        ),
    ],
    ids=str,
)
def test_values_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options)


@pytest.mark.parametrize("align_corners", [False, True])
def test_labeled_losses(align_corners):
    config = MethodConfig(align_corners=align_corners, weight_sa=0.5, weight_x=0.25)
    outputs = random_outputs()
    masks = torch.randint(CLASSES, (BATCH, *CROP), dtype=torch.uint8)
    masks[0, 3:9, 2:8] = 255
    image_labels = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    losses = labeled_losses(config, outputs, masks, image_labels)

    expected = {
        name: weight * cross_entropy(resize(logits, CROP, align_corners), masks.long(), ignore_index=255)
        for name, weight, logits in [
            ("L_s", 1, outputs.decoder_logits),
            ("L_sa", 0.5, outputs.sgc_logits),
        ]
    }
    probabilities = outputs.class_logits.sigmoid().float()
    expected["L_x"] = 0.25 * binary_cross_entropy(probabilities, image_labels)
    assert list(losses) == list(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], check_dtype=False)


@pytest.mark.parametrize(
    ("options", "sgc", "names"),
    [
        ({}, True, ("L_s", "L_sa", "L_x")),
        ({"name": "supervised"}, True, ("L_s",)),
        ({"weight_sa": 0.0}, True, ("L_s", "L_x")),
        ({"weight_x": 0.0}, True, ("L_s", "L_sa")),
        ({"image_labels": True}, True, ("L_s", "L_sa", "L_x")),
    ],
    ids=str,
)
def test_labeled_loss_terms(options, sgc, names):
    outputs = random_outputs() if sgc else random_outputs()._replace(sgc_logits=None)
    masks = torch.zeros(BATCH, *CROP, dtype=torch.uint8)
    losses = labeled_losses(MethodConfig(**options), outputs, masks, torch.ones(BATCH, FOREGROUND))
    assert sorted(losses) == sorted(names)


UNLABELED = {
    "defaults": {},
    "align_corners": {"align_corners": True},
    "crop size": {"label_size": "crop"},
    "decoder only": {"gamma": 1.0},
    "SGC only": {"gamma": 0.0, "norm": "none"},
    "image norm": {"norm": "image", "temperature": 1.0},
    "pixel norm": {"norm": "pixel", "temperature": 0.3},
    "hard": {"hard": True, "norm": "none"},
    "threshold": {"threshold": 0.7},
    "hard threshold at crop size": {
        "hard": True,
        "threshold": 0.8,
        "label_size": "crop",
        "align_corners": True,
    },
}


@pytest.mark.parametrize("options", UNLABELED.values(), ids=UNLABELED)
def test_consistency_loss(options):
    config = MethodConfig(**options)
    strong, weak, valid = random_outputs(), random_outputs(), random_valid()
    losses = unlabeled_losses(config, 0.3, strong, weak, valid)
    assert list(losses) == ["L_u"]

    if config.label_size == "crop":
        size = CROP
    else:
        size = (5, 7)
        rows, columns = torch.tensor([1, 3, 6, 9, 11]), torch.tensor([1, 3, 6, 8, 10, 13, 15])
        valid = valid[:, rows][:, :, columns]  # the pixels under the centres of 5 x 7 cells
    fused = reference.fuse_predictions(
        weak.decoder_logits,
        weak.sgc_logits,
        size=size,
        gamma=config.gamma,
        temperature=config.temperature,
        norm=config.norm,
        align_corners=config.align_corners,
    )
    confidence, best = fused.max(1)
    label = torch.eye(CLASSES, dtype=torch.float64)[best].movedim(-1, 1) if config.hard else fused
    probability = resize(strong.decoder_logits, size, config.align_corners).softmax(1)
    per_pixel = -(label * probability.log()).sum(1)
    counted = valid & (confidence >= config.threshold)
    assert 0 < counted.sum() <= valid.sum() < valid.numel()
    assert (counted.sum() < valid.sum()) == (config.threshold > 0)
    torch.testing.assert_close(losses["L_u"], 0.3 * per_pixel[counted].sum() / valid.sum())


def test_no_valid_pixel_gives_no_loss():
    strong = random_outputs()
    strong.decoder_logits.requires_grad_()
    valid = torch.zeros(BATCH, *CROP, dtype=torch.bool)
    loss = unlabeled_losses(MethodConfig(), 1.0, strong, random_outputs(), valid)["L_u"]
    loss.backward()
    assert loss == 0
    assert not strong.decoder_logits.grad.any()


def test_image_level_mode_learns_the_tags_of_tagged_pictures():
    config = MethodConfig(image_labels=True, weight_x=0.5)
    strong = random_outputs()
    tags = torch.tensor([[math.nan, math.nan], [1.0, 0.0]])
    losses = unlabeled_losses(config, 1.0, strong, random_outputs(), random_valid(), tags)
    probability = strong.class_logits[1].sigmoid()
    expected = -0.5 * (probability[0].log() + (1 - probability[1]).log()) / 2
    assert set(losses) == {"L_u", "L_x"}
    torch.testing.assert_close(losses["L_x"], expected, check_dtype=False)


def test_untagged_pictures_teach_the_classifier_nothing():
    logits = torch.randn(BATCH, FOREGROUND, requires_grad=True)
    loss = classification_loss(logits, torch.full((BATCH, FOREGROUND), math.nan))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_outputs_without_what_a_loss_needs_are_refused():
    weak = random_outputs()
    with pytest.raises(ValueError, match="call the network with sgc=True"):
        unlabeled_losses(MethodConfig(), 1.0, weak, weak._replace(sgc_logits=None), random_valid())
    with pytest.raises(ValueError, match="call the network with sgc=True"):
        pseudo_label(MethodConfig(), weak._replace(sgc_logits=None))
    with pytest.raises(ValueError, match=r"give --data.tags FILE"):
        unlabeled_losses(MethodConfig(image_labels=True), 1.0, weak, weak, random_valid())


def test_pseudo_label_is_the_one_that_is_learnt():
    config = MethodConfig(gamma=0.25, temperature=0.7, norm="image", align_corners=True)
    strong, weak = random_outputs(), random_outputs()
    valid = torch.ones(BATCH, *CROP, dtype=torch.bool)
    label = pseudo_label(config, weak)
    loss = -(label * strong.decoder_logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(unlabeled_losses(config, 1.0, strong, weak, valid)["L_u"], loss)
    assert pseudo_label(config, weak, CROP).shape == (BATCH, CLASSES, *CROP)


@pytest.mark.parametrize("background", [0, None])
def test_labeled_gradients_reach_only_what_they_should(background):
    model = network(background)
    masks = torch.randint(CLASSES, (BATCH, 32, 32), dtype=torch.uint8)
    foreground = FOREGROUND if background is not None else CLASSES
    image_labels = torch.ones(BATCH, foreground)
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    parts = {
        "L_s": {"encoder", "decoder", "segmentation_head"},
        "L_sa": {"sgc"},
        "L_x": {"encoder", "classifier"},
    }
    for name, expected in parts.items():
        outputs = model(images, sgc=True, image_labels=image_labels)
        losses = labeled_losses(MethodConfig(), outputs, masks, image_labels)
        assert reached(model, losses[name]) == expected, name


@pytest.mark.parametrize("label_size", ["decoder", "crop"])
def test_unlabeled_gradients_reach_only_what_they_should(label_size):
    config = MethodConfig(image_labels=True, label_size=label_size)
    student, labeler = network(), network()
    images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    valid = torch.rand(BATCH, 32, 32) > 0.2
    tags = torch.ones(BATCH, FOREGROUND)
    parts = {"L_u": {"encoder", "decoder", "segmentation_head"}, "L_x": {"encoder", "classifier"}}
    for name, expected in parts.items():
        # The weak view has a graph here, and still nothing flows through it.
        weak = labeler(images, sgc=True, image_labels=tags, valid=valid)
        strong = student(images)
        losses = unlabeled_losses(config, 1.0, strong, weak, valid, tags)
        assert reached(student, losses[name]) == expected, name
        assert all(parameter.grad is None for parameter in labeler.parameters())


def test_untagged_pictures_keep_the_classifiers_guess():
    model = network().eval()
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    guess = (model(images).class_logits >= 0).float()
    tags = torch.tensor([[math.nan, math.nan], [1.0, 0.0], [math.nan, 1.0]])
    filled = torch.stack([guess[0], tags[1], torch.stack([guess[2, 0], tags[2, 1]])])
    given = model(images, sgc=True, image_labels=tags).sgc_logits
    assert torch.equal(given, model(images, sgc=True, image_labels=filled).sgc_logits)
    assert given.isfinite().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"weight_u": 0.5}, [0.5] * 5),
        ({"start_u": 2}, [0, 0, 1, 1, 1]),
        ({"start_u": 1, "ramp_u": 2, "weight_u": 4}, [0, 2, 4, 4, 4]),
        ({"name": "supervised"}, [0] * 5),
    ],
    ids=str,
)
def test_consistency_weight_by_step(options, expected):
    config = MethodConfig(**options)
    assert [config.consistency_weight(step) for step in range(5)] == expected


def test_resize_valid_takes_the_pixel_under_each_centre():
    valid = torch.zeros(1, 9, 9, dtype=torch.bool)
    valid[0, 4, 1] = True
    small = resize_valid(valid, (3, 3))
    assert small.dtype == torch.bool
    assert small[0].tolist() == [[False] * 3, [True, False, False], [False] * 3]
    assert torch.equal(resize_valid(valid, (9, 9)), valid)
