"""The reference against formulas written out the long way, in float64."""

import pytest
import torch
import torch.nn.functional as F

from pseudoseg_fast import reference

SIZES = [
    pytest.param((3, 5), (3, 5), id="equal"),
    pytest.param((5, 4), (17, 31), id="odd"),
    pytest.param((1, 6), (7, 6), id="one-row"),
    pytest.param((1, 1), (5, 1), id="one-node"),
    pytest.param((4, 7), (1, 1), id="to-one-pixel"),
    pytest.param((9, 8), (4, 3), id="down"),
    pytest.param((33, 33), (65, 129), id="33"),
]


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def resize(x, size, align_corners):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("source", "size"), SIZES)
@pytest.mark.parametrize("per_image", [False, True])
def test_mean_square_is_that_of_the_upsampled_map(source, size, align_corners, per_image):
    x = double(2, 3, *source)
    expected = resize(x, size, align_corners).square().mean((1, 2, 3))
    actual = reference.mean_square(x, size, align_corners=align_corners, per_image=per_image)
    torch.testing.assert_close(actual, expected if per_image else expected.mean(), rtol=1e-12, atol=0)


def test_mean_square_in_float32_is_as_exact_as_upsampling():
    x = torch.randn(2, 21, 33, 33)
    torch.testing.assert_close(
        reference.mean_square(x, (513, 513)).double(), reference.mean_square(x.double(), (513, 513))
    )


@pytest.mark.parametrize("norm", ["batch", "image", "pixel", "none"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_fuse_predictions_follows_the_method(norm, align_corners):
    p, m, size = 3 * double(2, 4, 5, 6), double(2, 4, 3, 2), (9, 13)
    upsampled = torch.stack([resize(p, size, align_corners), resize(m, size, align_corners)])
    squares = upsampled.square()
    scale = {
        "batch": (squares.mean() + 1e-8).rsqrt(),
        "image": (squares.mean((0, 2, 3, 4)) + 1e-8).rsqrt()[:, None, None, None],
        "pixel": (squares.sum((0, 2)) + 1e-8).rsqrt()[:, None],
        "none": 1.0,
    }[norm]
    decoder, cam = (upsampled * scale).softmax(2)
    label = (0.7 * decoder + 0.3 * cam) ** (1 / 0.4)
    label = label / label.sum(1, keepdim=True)
    actual = reference.fuse_predictions(
        p, m, size=size, gamma=0.7, temperature=0.4, norm=norm, align_corners=align_corners
    )
    torch.testing.assert_close(actual, label, rtol=1e-10, atol=1e-14)


def test_fuse_predictions_survives_a_tiny_temperature():
    p, m = torch.randn(1, 150, 4, 4), torch.randn(1, 150, 2, 2)
    label = reference.fuse_predictions(p, m, temperature=0.01)
    torch.testing.assert_close(label.sum(1), torch.ones(1, 4, 4))


@pytest.mark.parametrize("background", [False, True])
def test_pseudo_label_chains_attention_background_and_norm(background):
    q, k, cam = double(2, 12, 5), double(2, 12, 5), torch.rand(2, 3, 3, 4, dtype=torch.float64)
    classes = 3 + background
    p, projection, shift = double(2, classes, 6, 8), double(classes, classes), double(classes)
    mask = torch.rand(2, 12) > 0.3

    scores = torch.einsum("bid,bjd->bij", q, k) / 5**0.5
    scores[~(mask[:, :, None] & mask[:, None, :])] = -1e9
    refined = cam + torch.einsum("bij,bkj->bki", scores.softmax(-1), cam.flatten(2)).unflatten(2, (3, 4))
    if background:
        refined = torch.cat([2 - refined.amax(1, keepdim=True), refined], 1)
    projected = F.conv2d(refined, projection[:, :, None, None])
    m = F.batch_norm(projected, None, None, bias=shift, training=True, eps=1e-5)
    expected = reference.fuse_predictions(p, m, size=(11, 9))

    actual = reference.pseudo_label(
        q, k, cam, p, projection=projection, shift=shift, background=background, mask=mask, size=(11, 9)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_refine_cam_gives_an_invalid_position_the_plain_mean():
    q, k, cam = double(1, 6, 4), double(1, 6, 4), double(1, 6, 2)
    mask = torch.tensor([[True, True, False, True, True, True]])
    actual = reference.refine_cam(q, k, cam, mask=mask)
    torch.testing.assert_close(actual[0, 2], cam[0, 2] + cam[0].mean(0))
    alone = reference.refine_cam(q[:, mask[0]], k[:, mask[0]], cam[:, mask[0]])
    torch.testing.assert_close(actual[:, mask[0]], alone)


@pytest.mark.parametrize("align_corners", [False, True])
def test_cross_entropies_are_torchs_on_the_upsampled_map(align_corners):
    x, labels = double(2, 5, 4, 3), torch.randint(5, (2, 11, 10))
    labels[0, :3] = 255
    weight = torch.rand(5, dtype=torch.float64)
    up = resize(x, (11, 10), align_corners)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(up, labels, weight=weight, ignore_index=255, reduction=reduction)
        actual = reference.cross_entropy(
            x, labels, class_weight=weight, reduction=reduction, align_corners=align_corners
        )
        torch.testing.assert_close(actual, expected)
        target = double(2, 5, 11, 10).softmax(1)
        expected = F.cross_entropy(up, target, reduction="mean" if reduction == "mean" else reduction)
        actual = reference.soft_cross_entropy(x, target, reduction=reduction, align_corners=align_corners)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("align_corners", [False, True])
def test_dice_loss_is_its_formula(align_corners):
    logits = double(2, 4, 3, 5)
    masks = torch.randint(0, 3, (2, 7, 9))  # class 3 is nowhere
    masks[:, :2] = 255
    full = resize(logits, (7, 9), align_corners).softmax(1)
    expected = []
    for index in range(3):
        chosen, inside = full[:, index][masks != 255], (masks == index)[masks != 255]
        expected.append(1 - 2 * chosen[inside].sum() / (chosen.sum() + inside.sum()))
    actual = reference.dice_loss(logits, masks, align_corners=align_corners)
    torch.testing.assert_close(actual, torch.stack(expected).mean())


def test_consistency_loss_weighs_threshold_and_valid_pixels():
    student, p, m = double(2, 4, 5, 5), 4 * double(2, 4, 6, 7), double(2, 4, 3, 3)
    valid = torch.rand(2, 13, 15) > 0.4
    label = reference.fuse_predictions(p, m, size=(13, 15))
    confident = label.amax(1) >= 0.6
    assert 0.1 < confident.double().mean() < 0.9
    hard = F.one_hot(label.argmax(1), 4).movedim(-1, 1).double()
    for is_hard, target in [(False, label), (True, hard)]:
        options = {"size": (13, 15), "threshold": 0.6, "hard": is_hard}
        pixel = -(target * resize(student, (13, 15), False).log_softmax(1)).sum(1) * valid * confident
        mean = reference.consistency_loss(student, p, m, valid=valid, **options)
        torch.testing.assert_close(mean, pixel.sum() / valid.sum())
        unreduced = reference.consistency_loss(student, p, m, valid=valid, reduction="none", **options)
        torch.testing.assert_close(unreduced, pixel)
