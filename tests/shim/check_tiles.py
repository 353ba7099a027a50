"""What the tests of the public functions leave out: several tiles, borders between them, groups of many threads."""

import pytest
import torch
from targets import Target
from test_functional import Case, check_losses, loss_and_gradient

from pseudoseg_fast import functional

CPP = Target("cpp", "cpu")

# (student or logits, decoder, cam, label size, classes)
TILES = [
    pytest.param((1, 21, 34, 37, 9, 10, 133, 145), False, id="tiles-both-ways"),
    pytest.param((2, 7, 19, 9, 5, 5, 129, 130), True, id="two-images"),
    pytest.param((1, 2, 2, 3, 2, 2, 70, 150), False, id="cells-larger-than-a-tile"),
    pytest.param((1, 3, 150, 90, 20, 20, 40, 130), False, id="down-and-up"),
    pytest.param((1, 5, 400, 3, 7, 7, 3, 400), True, id="far-down"),
    pytest.param((1, 200, 7, 6, 3, 3, 9, 17), False, id="two-warps-a-pixel"),
    pytest.param((1, 1024, 3, 3, 2, 2, 4, 5), True, id="a-block-a-pixel"),
]


@pytest.mark.parametrize(("shape", "align_corners"), TILES)
def test_losses_and_gradients(shape, align_corners):
    check_losses(Case(shape), CPP, align_corners=align_corners)


@pytest.mark.parametrize(("shape", "align_corners"), TILES)
def test_predict_labels(shape, align_corners):
    case = Case(shape)
    options = {"align_corners": align_corners}
    labels = functional.predict_labels(case.student, case.size, **options, backend="cpp")
    expected = functional.predict_labels(case.student.double(), case.size, **options, backend="eager")
    assert (labels != expected).float().mean() < 1e-3  # ties within rounding


def test_most_classes_in_float64():
    case = Case((1, 512, 3, 3, 2, 2, 4, 5), torch.float64)
    check_losses(case, CPP)
    check_losses(case, CPP, fusion={"hard": True, "threshold": 0.003, "norm": "pixel", "temperature": 0.7})


def test_too_many_classes_are_refused():
    with pytest.raises(RuntimeError, match="up to 1024 classes, got 1025"):
        functional.predict_labels(torch.zeros(1, 1025, 2, 2), (2, 2), backend="cpp")


def test_gradient_of_an_unreduced_loss_meets_at_borders():
    """Each pixel alone, so that a sum that two tiles share cannot hide an error of one."""
    case = Case((1, 3, 20, 20, 5, 5, 80, 80))
    upstream = torch.zeros(1, 80, 80)
    upstream[0, 15::16, 15::16] = 1
    args = (case.student, (case.labels,), {"reduction": "none", "backend": "cpp"}, upstream)
    _, actual = loss_and_gradient(functional.cross_entropy, *args)
    args[2]["backend"] = "eager"
    _, expected = loss_and_gradient(functional.cross_entropy, *args)
    torch.testing.assert_close(actual, expected)
