"""The convolution of each channel with a filter of its own, against PyTorch's in float64."""

import copy

import pytest
import tiny
import torch
from convolving import CASES, check, check_wanted, draw, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d

from pseudoseg_fast import backends, functional
from pseudoseg_fast.depthwise import DepthwiseConv2d, use_depthwise_kernels
from pseudoseg_fast.network import Network

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients(case, dtype):
    check(*CASES[case], dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_and_gradients_on_a_gpu(case, dtype):
    check(*CASES[case], dtype, backend="triton", device="cuda")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 35), st.integers(1, 30), st.integers(1, 30)),
    filter_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    dilation=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_any_geometry(shape, filter_size, stride, padding, dilation):
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    if all(shape[2 + i] + 2 * padding[i] > dilation[i] * (filter_size[i] - 1) for i in (0, 1)):
        check(shape, filter_size, options, torch.float32)
    else:
        with pytest.raises(ValueError, match="the filter reaches over"):
            check(shape, filter_size, options, torch.float32)


def all_cases():
    results = []
    torch.manual_seed(0)
    for shape, filter_size, options in CASES.values():
        results += with_gradients(
            lambda *given, options=options: functional.depthwise_conv2d(*given, **options, backend="cpp"),
            draw(shape, filter_size, torch.float32),
        )
    return results


def test_results_are_bitwise_the_same_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            runs.append(all_cases())
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_every_element_of_a_result_is_written():
    expected = all_cases()
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = all_cases()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_operators_pass_opcheck():
    functional.depthwise_conv2d(*draw((1, 2, 3, 3), (3, 3), torch.float32), backend="cpp")  # loads them
    input, weight, bias = draw((2, 5, 7, 6), (3, 5), torch.float32)
    last = input.detach().permute(0, 2, 3, 1).requires_grad_()
    geometry = ([2, 1], [1, 2], [1, 1])
    ops = torch.ops.pseudoseg_fast
    output = ops.depthwise_conv2d(last, weight, bias, *geometry).detach()
    calls = {
        ops.depthwise_conv2d.default: (last, weight, bias, *geometry),
        ops.depthwise_conv2d_backward.default: (
            output,
            last.detach(),
            weight.detach(),
            *geometry,
            True,
            True,
        ),
    }
    for operator, arguments in calls.items():
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}, operator


def test_gradients_that_nobody_wants_are_not_made():
    check_wanted("cpp")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(4, 4, 3, 3)}, ValueError, r"weight must be \[4, 1, height, width\]"),
        ({"weight": torch.ones(4, 1, 3, 3).double()}, TypeError, "one dtype, got input torch.float32"),
        ({"bias": torch.ones(3)}, ValueError, "bias must have shape"),
        ({"stride": (0, 1)}, ValueError, "stride must be two integers from 1 on, got"),
        ({"padding": (1,)}, ValueError, "padding must be two integers from 0 on, got"),
        ({"dilation": (1, 3)}, ValueError, "reaches over 3 x 7 pixels, but the padded input has 5 x 5"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(change, error, message):
    arguments = {"input": torch.ones(1, 4, 5, 5), "weight": torch.ones(4, 1, 3, 3)} | change
    with pytest.raises(error, match=message):
        functional.depthwise_conv2d(**arguments)


def test_gradients_lie_as_their_filters_do():
    """As DistributedDataParallel wants it."""
    input, weight, _ = draw((1, 4, 5, 5), (3, 3), torch.float32)
    last = weight.detach().as_strided(weight.shape, (9, 1, 3, 1)).requires_grad_()
    for one in (weight, last):
        (gradient,) = torch.autograd.grad(functional.depthwise_conv2d(input, one, backend="cpp").sum(), one)
        assert gradient.stride() == one.stride()


def test_a_second_derivative_is_refused():
    input, weight, bias = draw((1, 4, 5, 5), (3, 3), torch.float32)
    output = functional.depthwise_conv2d(input, weight, bias, backend="cpp")
    (first,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(first.sum(), weight)


def test_half_precision_is_left_to_pytorch():
    input, weight, bias = (tensor.detach().bfloat16() for tensor in draw((1, 4, 5, 5), (3, 3), torch.float32))
    expected = conv2d(input, weight, bias, groups=4)
    assert torch.equal(functional.depthwise_conv2d(input, weight, bias), expected)
    with pytest.raises(RuntimeError, match=r"float32 and float64, got torch\.bfloat16"):
        functional.depthwise_conv2d(input, weight, bias, backend="cpp")


def network():
    made = Network("DeepLabV3Plus", tiny.ENCODER, None, classes=3, attention_dim=4).double().train()
    return made.to(memory_format=torch.channels_last)


def test_a_network_computes_and_learns_the_same_with_the_kernels():
    plain = network()
    fast = copy.deepcopy(plain)
    assert (
        use_depthwise_kernels(fast, CPU)
        == sum(isinstance(module, DepthwiseConv2d) for module in fast.modules())
        > 2
    )
    assert not any(isinstance(module, DepthwiseConv2d) for module in plain.modules())
    assert list(fast.state_dict()) == list(plain.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64)).double()
    for one in (plain, fast):
        torch.manual_seed(0)  # the decoder drops out
        one(images).decoder_logits.square().mean().backward()
    for (name, parameter), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-8, atol=1e-12, msg=name)


def test_other_convolutions_stay_as_they_are():
    other = torch.nn.Sequential(
        torch.nn.Conv2d(4, 4, 3, dilation=2),
        torch.nn.Conv2d(4, 4, 3, groups=4),
        torch.nn.Conv2d(4, 8, 5, groups=4),
        torch.nn.Conv2d(4, 4, 5, groups=2),
        torch.nn.Conv2d(1, 1, 5),
        torch.nn.Conv2d(4, 4, 5, groups=4, padding="same"),
        torch.nn.Conv2d(4, 4, 5, groups=4, padding=1, padding_mode="reflect"),
    )
    assert use_depthwise_kernels(other, CPU) == 0
    assert all(type(module) is torch.nn.Conv2d for module in other)


def test_under_autocast_pytorch_convolves():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4, dilation=2))
    images = torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(images)
        assert use_depthwise_kernels(module, CPU) == 1
        assert torch.equal(module(images), expected)
    assert module(images).dtype == torch.float32


@pytest.mark.cuda
def test_under_autocast_on_a_gpu_the_kernels_convolve_in_half_precision():
    made = torch.nn.Sequential(torch.nn.Conv2d(24, 24, 3, groups=24, dilation=2, padding=2)).cuda()
    other = torch.nn.Sequential(torch.nn.Conv2d(24, 24, 5, groups=24)).cuda()
    images = torch.randn(2, 24, 16, 16, device="cuda")
    results = []
    for count in 0, 1:
        assert use_depthwise_kernels(made if count else other, images.device) == count
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = made(images)
        assert output.dtype == torch.bfloat16
        results.append([output.float(), *torch.autograd.grad(output.float().sum(), made.parameters())])
    for one, expected in zip(*results, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, expected, rtol=2e-2, atol=2e-2)


def test_what_is_no_batch_on_the_cpu_is_left_to_pytorch():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4, dilation=2))
    image = torch.randn(4, 6, 6)
    expected = module(image)
    use_depthwise_kernels(module, CPU)
    assert torch.equal(module(image), expected)
    assert module.to("meta")(torch.empty(2, 4, 6, 6, device="meta")).shape == (2, 4, 2, 2)


@pytest.mark.cuda
def test_autocast_leaves_float64_alone():
    made = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4, dilation=2)).cuda().double()
    use_depthwise_kernels(made, torch.device("cuda"))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert made(torch.ones(1, 4, 6, 6, device="cuda", dtype=torch.float64)).dtype == torch.float64


def test_on_a_gpu_what_is_not_dilated_is_left_to_pytorch(monkeypatch):
    chosen = []

    def choose(function, tensors, backend):
        chosen.append(backend)
        return backends.eager.depthwise_conv2d

    monkeypatch.setattr(backends, "choose", choose)
    with FakeTensorMode():
        maps, filters = torch.zeros(1, 4, 9, 9, device="cuda"), torch.zeros(4, 1, 3, 3, device="cuda")
        for dilation in ((1, 1), (1, 2)):
            functional.depthwise_conv2d(maps, filters, dilation=dilation)
    assert chosen == ["eager", "auto"]


def test_compiles():
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 5, groups=4, padding=2))
    use_depthwise_kernels(module, CPU)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for images in (torch.randn(2, 4, 6, 5), torch.randn(3, 4, 6, 5)):
        expected = torch.autograd.grad(module(images).square().sum(), module.parameters())
        actual = torch.autograd.grad(compiled(images).square().sum(), module.parameters())
        torch.testing.assert_close(actual, expected)
