"""refine_cam of the Triton kernels against the float64 reference, forward and backward."""

import pytest
import torch
from comparison import FLOATS, assert_as_good_as_eager

from pseudoseg_fast import functional, reference

# B, L, D, K
SHAPES = [
    pytest.param((2, 37, 24, 3), id="odd"),
    pytest.param((1, 1, 1, 1), id="one"),
    pytest.param((1, 65, 128, 21), id="block-and-one"),
    pytest.param((1, 64, 16, 33), id="two-groups-of-channels"),
    pytest.param((1, 40, 200, 2), id="wide"),
    pytest.param((1, 35, 32, 150), id="150-channels"),
    pytest.param((1, 130, 8, 2), id="two-blocks"),
]


def arguments(shape, dtype=torch.float32, spread=1.0):
    images, length, depth, channels = shape
    query, key = (spread * torch.randn(images, length, depth).to(dtype) for _ in range(2))
    return query, key, torch.rand(images, length, channels).to(dtype)


def masks(images, length):
    """No mask, all valid, some invalid, and one image without a valid position."""
    some = torch.rand(images, length) > 0.3
    none = some.clone()
    none[0] = False
    return {"absent": None, "all": torch.ones_like(some), "some": some, "none-in-one": none}


def run(function, tensors, upstream=None, **options):
    """Return the result and the gradients of query, key and cam."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    result = function(*leaves, **options)
    return result.detach(), *torch.autograd.grad(result, leaves, upstream)


def check(tensors, **options):
    upstream = torch.randn(tensors[2].shape).to(tensors[2].dtype)
    double = [tensor.double() for tensor in tensors]
    actual = run(functional.refine_cam, tensors, upstream, backend="triton", **options)
    eager = run(reference.refine_cam, tensors, upstream, **options)
    truth = run(reference.refine_cam, double, upstream.double(), **options)
    for name, *values in zip(("result", "query", "key", "cam"), actual, eager, truth, strict=True):
        assert_as_good_as_eager(*values, name)
    return actual


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape):
    kinds = masks(*shape[:2])
    for kind in kinds if shape[1] < 40 else ("absent", "some"):
        check(arguments(shape), mask=kinds[kind])


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_half_precision(dtype):
    for shape in ((2, 37, 24, 3), (1, 65, 128, 21)):
        check(arguments(shape, dtype), mask=masks(*shape[:2])["some"])


def test_parts_of_one_tensor_in_half_precision():
    """Their rows begin anywhere, and are copied to where they can be read 16 bytes at a time."""
    tensors = arguments((2, 19, 32, 3), torch.float16)
    check(torch.cat([torch.ones(2, 19, 1).half(), *tensors], -1).split([1, 32, 32, 3], -1)[1:])


def test_mixed_dtypes_and_a_scale():
    query, key, cam = arguments((1, 37, 24, 5))
    check((query.bfloat16(), key.bfloat16(), cam), scale=-0.3)
    check((query.half(), key, cam.half()), scale=0.0)


def test_invalid_positions_have_no_say():
    query, key, cam = arguments((1, 20, 8, 4))
    mask = torch.arange(20)[None] < 15
    full = check((query, key, cam), mask=mask)
    alone = check((query[:, :15], key[:, :15], cam[:, :15]))[0]
    torch.testing.assert_close(full[0][:, :15], alone)
    torch.testing.assert_close(full[0][0, 15:], cam[0, 15:] + cam[0].mean(0))
    assert not full[1][:, 15:].any()
    assert not full[2][:, 15:].any()


def test_large_scores_do_not_overflow():
    tensors = arguments((1, 37, 24, 3), spread=30.0)
    actual = functional.refine_cam(*tensors, backend="triton")
    errors = [
        (values - reference.refine_cam(*(tensor.double() for tensor in tensors))).abs().max()
        for values in (actual, reference.refine_cam(*tensors))
    ]
    assert errors[0] <= 2 * errors[1]


def test_strided_arguments():
    query, key, cam = arguments((2, 36, 20, 6))
    transposed = [tensor.mT.contiguous().mT for tensor in (query, key, cam)]
    sliced = [torch.stack([tensor, tensor], -1)[..., 1] for tensor in (query, key, cam)]
    flipped = (query.transpose(0, 1).contiguous().transpose(0, 1), key, cam)
    mask = (torch.rand(36, 2) > 0.3).T
    for tensors in (transposed, sliced, flipped, (query[:1].expand(2, -1, -1), key, cam)):
        check(tensors, mask=mask)


def test_expanded_upstream_gradient():
    tensors = [tensor.requires_grad_() for tensor in arguments((1, 20, 8, 3))]
    functional.refine_cam(*tensors, backend="triton").sum().backward()
    gradients = run(reference.refine_cam, tensors, torch.ones(1, 20, 3))[1:]
    for tensor, expected in zip(tensors, gradients, strict=True):
        torch.testing.assert_close(tensor.grad, expected)


def test_gradients_that_nobody_wants_are_not_made():
    query, key, cam = arguments((1, 20, 8, 3))
    whole = run(functional.refine_cam, (query, key, cam), torch.ones(1, 20, 3), backend="triton")[1:]
    for wanted in ((0, 1), (2,), (1,)):
        tensors = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((query, key, cam))]
        functional.refine_cam(*tensors, backend="triton").sum().backward()
        for i, tensor in enumerate(tensors):
            assert (tensor.grad is not None) == (i in wanted)
            if i in wanted:
                assert torch.equal(tensor.grad, whole[i])


def test_addresses_beyond_32_bits():
    """A row stride of 2**27 elements puts rows from the 16th on where int32 offsets wrap around."""
    stride = 2**27
    storage = torch.empty_strided((19 * stride,), (1,), dtype=torch.float16)
    query = storage.as_strided((1, 18, 4), (0, stride, 1))
    values = torch.randn(1, 18, 4).half()
    for i in range(18):
        query[0, i] = values[0, i]
    _, key, cam = arguments((1, 18, 4, 2))
    actual = functional.refine_cam(query, key, cam, backend="triton")
    torch.testing.assert_close(actual, functional.refine_cam(values, key, cam, backend="triton"))


def test_results_are_bitwise_repeatable():
    tensors = arguments((1, 70, 24, 40))
    upstream = torch.randn(1, 70, 40)
    first, second = (run(functional.refine_cam, tensors, upstream, backend="triton") for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_empty_batch():
    result = run(functional.refine_cam, arguments((0, 9, 4, 3)), torch.zeros(0, 9, 3), backend="triton")
    assert [tuple(tensor.shape) for tensor in result] == [(0, 9, 3), (0, 9, 4), (0, 9, 4), (0, 9, 3)]
