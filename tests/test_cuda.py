"""What the CUDA kernels promise beyond right values: no synchronisation, any stream and device, little memory."""

import pytest
import torch
from targets import Target
from test_functional import Case, loss_and_gradient
from test_functional_native import everything

from pseudoseg_fast import functional

pytestmark = pytest.mark.cuda
CUDA = Target("cuda", "cuda")
SHAPE = (2, 21, 33, 35, 9, 9, 129, 137)


def loss_step(case):
    """Every loss and its gradient."""
    results = []
    for name, logits, args, options in case.losses():
        function = getattr(functional, name)
        results += loss_and_gradient(function, logits, args, options | {"backend": "cuda"})
    return results


def test_auto_takes_the_cuda_kernels():
    case = Case((1, 3, 4, 4, 2, 2, 8, 8), device="cuda")
    for name, logits, args, options in case.losses():
        actual = getattr(functional, name)(logits, *args, **options)
        assert torch.equal(actual, getattr(functional, name)(logits, *args, **options, backend="cuda")), name


def test_a_graph_records_a_loss_step():
    case = Case(SHAPE, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_step(case)  # loads the library and warms the allocator
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = loss_step(case)
    other = Case(SHAPE, device="cuda")  # drawn anew
    for name in ("student", "decoder", "cam", "target", "labels", "valid", "weight", "class_weight"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    for actual, expected in zip(recorded, loss_step(other), strict=True):
        assert torch.equal(actual, expected)


def test_nothing_waits_for_the_device():
    case = Case(SHAPE, device="cuda")
    loss_step(case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_step(case)
        functional.predict_labels(case.student, case.size, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    """Behind a long wait on another stream, a kernel on the default one would read what is not yet there."""
    case = Case(SHAPE, device="cuda")
    expected = loss_step(case)
    late = Case(SHAPE, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name in ("student", "decoder", "cam", "target", "labels", "valid", "weight", "class_weight"):
            getattr(late, name).copy_(getattr(case, name))
        actual = loss_step(late)
    stream.synchronize()
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_a_device_that_is_not_the_current_one():
    on_first = loss_step(Case(SHAPE, device="cuda:0"))
    torch.manual_seed(0)
    case = Case(SHAPE, device="cuda:1")
    with torch.cuda.device(0):
        on_second = loss_step(case)
    for one, other in zip(on_first, on_second, strict=True):
        assert other.device == torch.device("cuda:1")
        torch.testing.assert_close(one.cpu(), other.cpu())


def test_results_are_bitwise_repeatable():
    case = Case((4, 21, 65, 65, 17, 17, 257, 257), device="cuda")
    first = everything(case, CUDA)
    for _ in range(10):
        for actual, expected in zip(everything(case, CUDA), first, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((8, 21, 129, 129, 33, 33, 513, 513), id="voc"),
        pytest.param((2, 150, 128, 128, 32, 32, 512, 512), id="ade"),
    ],
)
def test_a_consistency_step_needs_two_percent_of_a_full_map(shape):
    images, classes, *_, height, width = shape
    student, decoder = (torch.randn(*shape[:4], device="cuda") for _ in "ab")
    cam = torch.randn(images, classes, *shape[4:6], device="cuda")
    student.requires_grad_()

    def step():
        loss = functional.consistency_loss(student, decoder, cam, size=(height, width), backend="cuda")
        return torch.autograd.grad(loss, student)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (gradient,) = step()
    extra = torch.cuda.max_memory_allocated() - before - gradient.nbytes
    assert extra < 0.02 * images * classes * height * width * 4


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 40 << 30, reason="needs 40 GiB on the GPU"
)
def test_offsets_beyond_32_bits():
    """2.2e9 elements at the label size, and as many in the target; the mean hardly depends on the size."""
    student, decoder, cam = (torch.randn(1, 2, side, side, device="cuda") for side in (64, 32, 16))

    def loss(size):
        options = {"size": (size, size), "norm": "none", "backend": "cuda"}
        return functional.consistency_loss(student, decoder, cam, **options)

    torch.testing.assert_close(loss(33000), loss(2048), rtol=1e-2, atol=0)
    labels = functional.predict_labels(student, (33000, 33000), backend="cuda")
    assert torch.equal(labels[0, -1, -1].long(), student[0, :, -1, -1].argmax())
    target = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float16, device="cuda").repeat(1, 1, 33000, 33000)
    target[:, 0, -1] = 7
    loss = functional.soft_cross_entropy(student, target, reduction="none", backend="cuda")
    log_probability = functional.cross_entropy(
        student,
        torch.zeros(1, 33000, 33000, dtype=torch.uint8, device="cuda"),
        reduction="none",
        backend="cuda",
    )[:, -1]
    other = functional.cross_entropy(
        student,
        torch.ones(1, 33000, 33000, dtype=torch.uint8, device="cuda"),
        reduction="none",
        backend="cuda",
    )[:, -1]
    torch.testing.assert_close(loss[:, -1], 7 * log_probability + 0.5 * other)
