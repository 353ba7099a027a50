"""fuse_predictions and pseudo_label of the Triton kernels against the float64 reference."""

import pytest
import torch
from comparison import FLOATS, assert_as_good_as_eager

from pseudoseg_fast import functional, reference
from pseudoseg_fast.arguments import NORMS
from pseudoseg_fast.backends.triton import _part

# B, C, h, w, h2, w2, H, W
SHAPES = [
    pytest.param((2, 3, 5, 4, 3, 2, 9, 14), id="odd"),
    pytest.param((1, 2, 1, 1, 1, 1, 1, 1), id="one-pixel"),
    pytest.param((1, 2, 1, 5, 3, 1, 7, 6), id="one-row-one-column"),
    pytest.param((2, 1, 3, 4, 2, 2, 7, 5), id="one-class"),
    pytest.param((1, 21, 9, 17, 5, 9, 17, 33), id="21-classes"),
    pytest.param((1, 150, 3, 4, 2, 3, 5, 6), id="150-classes"),
    pytest.param((2, 4, 6, 7, 3, 3, 6, 7), id="size-of-input"),
    pytest.param((1, 4, 9, 8, 5, 5, 4, 3), id="down"),
    pytest.param((1, 2, 12, 70, 3, 66, 5, 33), id="several-tiles"),
    pytest.param((0, 3, 4, 4, 2, 2, 8, 8), id="empty-batch"),
]


def maps(shape, dtype=torch.float32, spread=1.5):
    images, classes, h, w, h2, w2 = shape[:6]
    return (
        (spread * torch.randn(images, classes, h, w)).to(dtype),
        (spread * torch.randn(images, classes, h2, w2)).to(dtype),
    )


def check_fusion(decoder, cam, **options):
    actual = functional.fuse_predictions(decoder, cam, **options, backend="triton")
    eager = reference.fuse_predictions(decoder, cam, **options)
    truth = reference.fuse_predictions(decoder.double(), cam.double(), **options)
    assert_as_good_as_eager(actual, eager, truth, str(options))
    return actual


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("align_corners", [False, True])
def test_fuse_predictions(shape, align_corners):
    # the interpreter takes 8 s for the sums of squares of 150 classes
    norm = "none" if shape[1] == 150 else "batch"
    check_fusion(*maps(shape), size=shape[6:], align_corners=align_corners, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
def test_fusion_options(norm):
    for temperature, gamma in ((0.5, 0.0), (1.0, 1.0), (0.7, 0.5), (0.01, 0.3)):
        options = {"norm": norm, "temperature": temperature, "gamma": gamma, "size": (9, 14)}
        check_fusion(*maps((2, 3, 5, 4, 3, 2)), **options)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_fusion_in_half_precision(dtype, norm):
    decoder, cam = maps((2, 3, 5, 4, 3, 2), dtype)
    check_fusion(decoder, cam, size=(9, 14), norm=norm)
    check_fusion(decoder, cam.float(), size=(9, 14), norm=norm)


def test_fusion_of_strided_maps():
    decoder, cam = maps((2, 5, 6, 6, 4, 4))
    for restride in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.mT.contiguous().mT,
        lambda x: x[:1].expand(2, -1, -1, -1),
    ):
        check_fusion(restride(decoder), restride(cam), size=(11, 13))


def test_fusion_at_addresses_beyond_32_bits():
    decoder, cam = maps((1, 3, 4, 4, 2, 2))
    stride = 3 * 2**29  # of the classes: the third lies beyond 2**31 elements
    far = torch.empty_strided((2 * stride + 16,), (1,), dtype=torch.float32)
    far = far.as_strided((1, 3, 4, 4), (0, stride, 4, 1)).copy_(decoder)
    actual = functional.fuse_predictions(far, cam, size=(9, 9), backend="triton")
    assert torch.equal(actual, functional.fuse_predictions(decoder, cam, size=(9, 9), backend="triton"))


def test_ruled_out_classes_stay_out():
    decoder, cam = maps((1, 4, 5, 5, 3, 3))
    decoder[:, 3] = cam[:, 3] = -torch.inf
    label = check_fusion(decoder, cam, size=(9, 9), norm="none")
    assert not label[:, 3].any()
    check_fusion(1e4 * decoder[:, :3], 1e4 * cam[:, :3], norm="none")


def test_nan_shows():
    decoder, cam = maps((1, 4, 5, 5, 3, 3))
    decoder[0, 1, 2, 2] = torch.nan
    assert functional.fuse_predictions(decoder, cam, norm="none", backend="triton")[0, :, 2, 2].isnan().all()
    assert functional.fuse_predictions(decoder, cam, backend="triton").isnan().all()


def label_arguments(classes, background, images=2, side=(5, 7), depth=12, dtype=torch.float32):
    length = side[0] * side[1]
    query, key = (torch.randn(images, depth, length).to(dtype).mT for _ in range(2))
    cam = torch.rand(images, classes - background, *side).to(dtype)
    decoder = torch.randn(images, classes, 9, 8).to(dtype)
    options = {
        "projection": torch.eye(classes) + 0.3 * torch.randn(classes, classes),
        "shift": torch.randn(classes),
        "background": background,
        "mask": torch.rand(images, length) > 0.2,
        "size": (17, 15),
    }
    return (query, key, cam, decoder), options


def check_label(tensors, options):
    actual = functional.pseudo_label(*tensors, **options, backend="triton")
    eager = reference.pseudo_label(*tensors, **options)
    double = {name: v.double() if name in ("projection", "shift") else v for name, v in options.items()}
    truth = reference.pseudo_label(*(tensor.double() for tensor in tensors), **double)
    assert_as_good_as_eager(actual, eager, truth, str(options))
    return actual


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("classes", [2, 21, 40])
def test_pseudo_label(classes, background):
    tensors, options = label_arguments(classes, background)
    check_label(tensors, options | {"norm": "batch" if classes < 40 else "none"})
    check_label(tensors, options | {"mask": None, "norm": "pixel", "align_corners": True})


def test_pseudo_label_of_150_classes():
    tensors, options = label_arguments(150, True, images=1, side=(3, 4))
    check_label(tensors, options | {"norm": "none"})


@pytest.mark.parametrize("norm", NORMS)
def test_pseudo_label_options(norm):
    tensors, options = label_arguments(4, True)
    for temperature, gamma in ((0.5, 0.0), (1.0, 1.0), (0.7, 0.5)):
        more = {"norm": norm, "temperature": temperature, "gamma": gamma}
        check_label(tensors, options | more)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_pseudo_label_in_half_precision(dtype):
    tensors, options = label_arguments(5, True, dtype=dtype)
    check_label(tensors, options)
    check_label((*tensors[:2], tensors[2].float(), tensors[3]), options)


def test_batch_statistics_far_from_zero():
    """Sums of squares would lose the variance; blocks of positions are two, and the last is not full."""
    (query, key, _, decoder), options = label_arguments(3, False, side=(9, 10))
    cam = 100 + torch.rand(2, 3, 9, 10)
    label = functional.pseudo_label(query, key, cam, decoder, **options, backend="triton")
    double = {name: v.double() if name in ("projection", "shift") else v for name, v in options.items()}
    args = (tensor.double() for tensor in (query, key, cam, decoder))
    truth = reference.pseudo_label(*args, **double)
    torch.testing.assert_close(label.double(), truth, rtol=0, atol=3e-3)


def test_labels_are_bitwise_repeatable():
    tensors, options = label_arguments(5, True, side=(9, 9))
    first, second = (functional.pseudo_label(*tensors, **options, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_launches_are_as_few_as_documented():
    (query, key, cam, decoder), options = label_arguments(21, True)
    wide, wide_options = label_arguments(40, True)
    for norm, fusion in (("batch", 2), ("image", 2), ("pixel", 1), ("none", 1)):
        more = ((17, 15), 0.5, 0.5, norm, False)
        maps_of = (decoder, decoder)
        assert len(_part("fuse_predictions").plan(*maps_of, *more).launches) == fusion
        for tensors, given, count in ((query, options, 3), (wide, wide_options, 4)):
            tensors = (query, key, cam, decoder) if count == 3 else tensors
            args = (given["projection"], given["shift"], True, given["mask"])
            assert len(_part("pseudo_label").plan(*tensors, *args, *more).launches) == count


def test_no_tensor_of_the_label_size_is_made_but_the_label():
    tensors, options = label_arguments(4, True, images=1)
    full = 4 * 201 * 203
    made = []
    allocate = torch.Tensor.new_empty, torch.empty

    def noted(tensor):
        made.append(tensor.numel())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *a, **o: noted(allocate[0](*a, **o)))
        patch.setattr(torch, "empty", lambda *a, **o: noted(allocate[1](*a, **o)))
        _part("pseudo_label").plan(
            *tensors,
            options["projection"],
            options["shift"],
            True,
            None,
            (201, 203),
            0.5,
            0.5,
            "batch",
            False,
        )
    assert sorted(made)[-1] == full
    assert sorted(made)[-2] < full // 100
