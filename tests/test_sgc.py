import pytest
import torch

from pseudoseg_fast import functional
from pseudoseg_fast.reference import project_cam
from pseudoseg_fast.sgc import SGC, class_activation_map, image_labels_from_mask, resize_valid

BACKGROUNDS = [pytest.param(b, id=f"background-{b}") for b in (0, 2, None)]


@pytest.mark.parametrize(
    ("background", "expected"),
    [
        (0, [[0, 1, 0], [0, 0, 1], [0, 0, 0]]),
        (2, [[1, 0, 0], [0, 0, 1], [0, 0, 0]]),
        (None, [[1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]),
    ],
)
@pytest.mark.parametrize(("dtype", "ignored"), [(torch.uint8, 255), (torch.int64, -1)], ids=str)
def test_image_labels_are_the_foreground_classes_of_the_mask(background, expected, dtype, ignored):
    mask = torch.tensor([[[0, 2, 2]], [[3, ignored, ignored]], [[255, 9, 4]]], dtype=dtype)
    assert image_labels_from_mask(mask, 4, background).tolist() == expected


def test_cam_is_grad_cam_of_a_pooled_linear_classifier():
    features = torch.randn(2, 6, 5, 3, dtype=torch.float64, requires_grad=True)
    linear = torch.nn.Linear(6, 4).double()
    logits = linear(features.mean((2, 3)))
    grad_cams = []
    for logit in logits.sum(0):
        (gradient,) = torch.autograd.grad(logit, features, retain_graph=True)
        grad_cams.append((gradient.mean((2, 3), keepdim=True) * features).sum(1).relu())
    grad_cam = torch.stack(grad_cams, dim=1)
    grad_cam = grad_cam / grad_cam.amax((2, 3), keepdim=True)

    cam = class_activation_map(features, linear.weight, torch.ones(2, 4))

    torch.testing.assert_close(cam, grad_cam)
    assert not cam.requires_grad


def test_cam_of_an_absent_or_nowhere_active_class_is_zero():
    features = torch.rand(1, 2, 3, 3) + 0.1
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    cam = class_activation_map(features, weight, torch.tensor([[1, 0, 1]]))
    assert cam[0, 0].max() == 1
    assert cam[0, 1:].count_nonzero() == 0


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_logits_fuse_to_what_pseudo_label_makes(background):
    batch, classes, size = 2, 4, (3, 5)
    head = SGC(7, classes, background=background, attention_dim=6).double()
    with torch.no_grad():
        head.projection += torch.randn(classes, classes) / 4
        head.shift += torch.randn(classes)
    hypercolumn = torch.randn(batch, 7, *size, dtype=torch.float64)
    cam = torch.rand(batch, classes - (background is not None), *size, dtype=torch.float64)
    decoder_logits = torch.randn(batch, classes, 6, 10, dtype=torch.float64)
    valid = torch.rand(batch, 12, 20) > 0.3

    fused = functional.fuse_predictions(decoder_logits, head(hypercolumn, cam, valid))

    query, key = head.tokens(hypercolumn)
    expected = functional.pseudo_label(
        query,
        key,
        cam,
        decoder_logits,
        projection=head.projection,
        shift=head.shift,
        background=background is not None,
        mask=resize_valid(valid, size).flatten(1),
    )
    torch.testing.assert_close(fused, expected)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_new_head_keeps_each_class_in_its_channel(background):
    head = SGC(3, 3, background=background, attention_dim=2)
    channels = 3 - (background is not None)
    cam = torch.rand(2, channels, 4, 4)
    # Equal keys attend everywhere alike, so r = cam + its mean.
    logits = head(torch.zeros(2, 3, 4, 4), cam)

    refined = cam + cam.mean((2, 3), keepdim=True)
    rest = 2 - refined.amax(1)
    maps = list(refined.unbind(1))
    if background is not None:
        maps.insert(background, rest)
    for index, expected in enumerate(maps):
        expected = (expected - expected.mean()) / (expected.var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(logits[:, index], expected)


def test_attention_may_be_plain_or_none():
    hypercolumn = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    cam = torch.rand(2, 2, 3, 5, dtype=torch.float64)
    valid = torch.rand(2, 6, 10) > 0.3
    heads = {name: SGC(4, 3, background=0, attention=name).double() for name in ("residual", "plain", "none")}
    heads["plain"].load_state_dict(heads["residual"].state_dict())
    query, key = heads["plain"].tokens(hypercolumn)
    scores = query @ key.mT / 128**0.5
    inside = resize_valid(valid, (3, 5)).flatten(1)
    scores = scores.masked_fill(~(inside[:, :, None] & inside[:, None, :]), -1e9)
    maps = cam.flatten(2).mT
    attended = scores.softmax(-1) @ maps

    for name, refined in {"residual": maps + attended, "plain": attended, "none": maps}.items():
        expected = project_cam(refined, heads[name].projection, heads[name].shift, background=True)
        torch.testing.assert_close(heads[name](hypercolumn, cam, valid), expected.mT.unflatten(2, (3, 5)))
    assert [name for name, _ in heads["none"].named_parameters()] == ["projection", "shift"]


def test_batch_norm_uses_the_batch_in_evaluation_too():
    head = SGC(4, 3, background=0)
    torch.nn.init.normal_(head.shift)
    hypercolumn, cam = torch.randn(3, 4, 5, 5), torch.rand(3, 2, 5, 5)
    training = head.train()(hypercolumn, cam)
    evaluation = head.eval()(hypercolumn, cam)
    assert torch.equal(training, evaluation)
    torch.testing.assert_close(evaluation.mean((0, 2, 3)), head.shift)


def test_inputs_of_the_head_get_no_gradient_and_its_weights_do():
    head = SGC(4, 3, background=0)
    hypercolumn = torch.randn(2, 4, 5, 5, requires_grad=True)
    cam = torch.rand(2, 2, 5, 5, requires_grad=True)
    head(hypercolumn, cam).square().mul(torch.rand(2, 3, 5, 5)).sum().backward()
    assert hypercolumn.grad is None
    assert cam.grad is None
    for name, parameter in head.named_parameters():
        assert parameter.grad.count_nonzero() > 0, name


def test_a_position_is_valid_if_the_pixel_at_its_centre_is():
    valid = torch.zeros(1, 6, 9, dtype=torch.bool)
    valid[0, 4, 1] = valid[0, 1, 7] = True
    assert resize_valid(valid, (2, 3)).tolist() == [[[False, False, True], [True, False, False]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 3, "background": 3}, "class index from 0 to 2, got 3"),
        ({"classes": 1, "background": 0}, "besides the background"),
        ({"classes": 3, "background": 0, "attention_dim": 0}, "attention_dim"),
        ({"classes": 3, "background": 0, "attention": "self"}, "residual, plain, none, got 'self'"),
    ],
    ids=["background", "classes", "attention_dim", "attention"],
)
def test_impossible_heads_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SGC(4, **arguments)


def test_maps_that_do_not_fit_are_refused():
    head = SGC(4, 3, background=0)
    hypercolumn, cam = torch.randn(2, 4, 5, 5), torch.rand(2, 2, 5, 5)
    with pytest.raises(ValueError, match=r"cam must be \[2, 2, 5, 5\], got \[2, 3, 5, 5\]"):
        head(hypercolumn, torch.rand(2, 3, 5, 5))
    with pytest.raises(TypeError, match="valid must be bool"):
        head(hypercolumn, cam, torch.ones(2, 9, 9))
    with pytest.raises(ValueError, match=r"image_labels must be \[2, 3\]"):
        class_activation_map(hypercolumn, torch.randn(3, 4), torch.ones(2, 4))
    with pytest.raises(TypeError, match="integer"):
        image_labels_from_mask(torch.zeros(1, 2, 2), 3, 0)
