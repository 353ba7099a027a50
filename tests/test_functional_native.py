"""What the native kernels promise beyond right values: repeatable, sparing with memory, known to torch."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from targets import on_native_targets
from test_functional import Case, loss_and_gradient, to_double

from pseudoseg_fast import functional, reference
from pseudoseg_fast.arguments import NORMS
from pseudoseg_fast.backends import cpp

ROOT = Path(functional.__file__).resolve().parents[1]


def everything(case, target, **options):
    """Losses, gradients, label and prediction of one case, in a fixed order."""
    results = []
    for name, logits, args, given_options in case.losses():
        for reduction in ("mean", "none"):
            function_options = given_options | options | {"backend": target.backend, "reduction": reduction}
            results += loss_and_gradient(getattr(functional, name), logits, args, function_options)
    function_options = {"backend": target.backend}
    results += loss_and_gradient(functional.dice_loss, case.student, (case.labels,), function_options)
    for norm in NORMS:
        results.append(
            functional.fuse_predictions(
                case.decoder, case.cam, size=case.size, norm=norm, backend=target.fusing
            )
        )
    results.append(functional.predict_labels(case.student, case.size, backend=target.backend))
    return results


@on_native_targets
@pytest.mark.parametrize("size", [(129, 77), (33, 20)])
def test_results_are_bitwise_the_same_for_any_number_of_threads(target, size):
    case = Case((2, 7, 33, 20, 9, 9, *size), device=target.device)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            runs.append(everything(case, target))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert torch.equal(actual, expected)


@on_native_targets
@pytest.mark.parametrize("size", [(23, 18), (9, 7)])
def test_every_element_of_a_result_is_written(target, size):
    case = Case((2, 5, 9, 7, 3, 3, *size), device=target.device)
    expected = everything(case, target)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        actual = everything(case, target)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


sides = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(
        st.integers(0, 2),
        st.integers(1, 35),
        sides,
        sides,
        sides,
        sides,
        st.integers(1, 70),
        st.integers(1, 70),
    ),
    same=st.booleans(),
    align_corners=st.booleans(),
    spread=st.sampled_from([0.1, 2.0, 80.0]),
)
def test_any_shape(shape, same, align_corners, spread):
    if same:  # the label has the size of the student's map
        shape = (*shape[:6], *shape[2:4])
    case = Case(shape, spread=spread)
    args = (case.decoder, case.cam)
    options = {"size": case.size, "valid": case.valid, "align_corners": align_corners, "reduction": "none"}
    loss, gradient = loss_and_gradient(
        functional.consistency_loss, case.student, args, options | {"backend": "cpp"}
    )
    truth, true_gradient = loss_and_gradient(
        reference.consistency_loss, case.student.double(), [to_double(arg) for arg in args], options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=2e-6, atol=1e-5 * max(spread, 1))
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=1e-5, atol=1e-5 * max(spread, 1))
    labels = functional.predict_labels(case.student, case.size, align_corners=align_corners, backend="cpp")
    logits = reference.upsample(case.student.double(), case.size, align_corners)
    chosen = logits.gather(1, labels.long()[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1), rtol=0, atol=1e-6 * spread)


def operator_calls():
    case = Case((2, 3, 4, 5, 2, 2, 9, 8))
    ops = torch.ops.pseudoseg_fast
    student = case.student.requires_grad_()
    permuted = student.detach().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1).requires_grad_()
    fusion = (9, 8, 0.5, 0.5, 0, 1e-8)
    for name, logits in [("contiguous", student), ("permuted", permuted)]:
        soft = (logits, None, case.target, case.weight, 0, False, True)
        yield f"soft-{name}", ops.soft_cross_entropy.default, soft
        hard = (logits, None, case.labels, case.class_weight, 255, 0, True, True)
        yield f"hard-{name}", ops.cross_entropy.default, hard
        consistent = (logits, None, case.decoder, case.cam, case.valid, *fusion, 0.2, False, 0, False, True)
        yield f"consistency-{name}", ops.consistency_loss.default, consistent
    unreduced = (student, None, case.labels, None, 255, 2, False, False)
    yield "hard-unreduced", ops.cross_entropy.default, unreduced
    sums = (student, case.labels, 255, True)
    yield "sums", ops.class_sums.default, sums
    upstream = torch.rand(3, 3)
    yield "sums-backward", ops.class_sums_backward.default, (upstream, student.detach(), *sums[1:])
    yield "fuse", ops.fuse_predictions.default, (case.decoder, case.cam, *fusion, False)
    yield "predict", ops.predict_labels.default, (student.detach(), 9, 8, True)


def test_operators_pass_opcheck():
    functional.predict_labels(torch.zeros(1, 1, 1, 1), (1, 1), backend="cpp")  # loads the operators
    for name, operator, arguments in operator_calls():
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (name, results)


def test_compiles_with_a_dynamic_batch():
    def loss(student, decoder, cam):
        return functional.consistency_loss(student, decoder, cam, size=(9, 9), backend="cpp")

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for images in (2, 3):
        case = Case((images, 3, 4, 4, 2, 2, 9, 9))
        actual = loss_and_gradient(compiled, case.student, (case.decoder, case.cam), {})
        expected = loss_and_gradient(loss, case.student, (case.decoder, case.cam), {})
        torch.testing.assert_close(actual, expected)


def test_second_backward_through_one_graph_is_right():
    case = Case((2, 3, 4, 4, 2, 2, 9, 9))
    student = case.student.requires_grad_()
    loss = functional.consistency_loss(student, case.decoder, case.cam, size=(9, 9), backend="cpp")
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(2 * loss, student)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, 2 * first)


def test_sums_of_dice_keep_their_digits_over_many_pixels():
    logits = torch.tensor([0.1, 0.2, 0.7]).log().reshape(1, 3, 1, 1)
    labels = torch.arange(1024 * 1024).reshape(1, 1024, 1024) % 3
    truth = reference.dice_loss(logits.double(), labels)
    actual = functional.dice_loss(logits, labels, backend="cpp")
    torch.testing.assert_close(actual.double(), truth, rtol=0, atol=2e-7)


def test_second_derivative_of_dice_is_refused():
    case = Case((2, 3, 4, 4, 2, 2, 9, 9))
    student = case.student.requires_grad_()
    loss = functional.dice_loss(student, case.labels, backend="cpp")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="kernels of dice_loss have no second derivative"):
        gradient.sum().backward()


THREADS = """
import threading
import torch
from pseudoseg_fast import functional

gradients, together = [], threading.Barrier(4)
x0, weight0 = torch.randn(1, 3, 4, 4), torch.randn(3, 1, 3, 3)
labels = torch.randint(0, 3, (1, 8, 8))

def first_use():
    x, weight = x0.clone().requires_grad_(), weight0.clone().requires_grad_()
    together.wait()
    functional.dice_loss(functional.depthwise_conv2d(x, weight, padding=(1, 1)), labels).backward()
    gradients.append(x.grad)

threads = [threading.Thread(target=first_use) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(gradients) == 4 and all(torch.equal(gradient, gradients[0]) for gradient in gradients), gradients
"""


def test_threads_may_begin_together():
    """Those that came second ran without derivatives, and had no gradient."""
    subprocess.run([sys.executable, "-c", THREADS], check=True)


def test_offsets_beyond_32_bits():
    """2.2e9 elements at the label size, which an int32 offset would not reach; the mean hardly depends on it."""
    student, decoder, cam = (torch.randn(1, 2, side, side) for side in (5, 4, 3))

    def loss(size):
        return functional.consistency_loss(
            student, decoder, cam, size=(size, size), norm="none", backend="cpp"
        )

    torch.testing.assert_close(loss(33000), loss(2000), rtol=1e-3, atol=0)


def peak_growth(run):
    """Bytes by which the resident memory of this process grows at most while ``run`` runs."""
    ctypes.CDLL(None).malloc_trim(0)  # so that memory kept from earlier calls is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_map_of_the_output_size_is_made():
    """Measured from outside: peak resident memory of forward and backward against one full-size tensor."""
    case = Case((2, 21, 65, 65, 17, 17, 1, 1))
    size = (1025, 1025)
    full = 2 * 21 * size[0] * size[1] * 4
    gradient = case.student.numel() * 4
    labels, valid = torch.randint(0, 21, (2, *size)), torch.rand(2, *size) > 0.1
    target = torch.rand(1, 21, 1, 1).softmax(1).expand(2, 21, *size)
    student = case.student.requires_grad_()
    calls = {
        "soft_cross_entropy": ((student, target), {}),
        "cross_entropy": ((student, labels), {}),
        "dice_loss": ((student, labels), {}),
        "consistency_loss": ((student, case.decoder, case.cam), {"valid": valid, "size": size}),
    }
    for name, (args, options) in calls.items():
        function = getattr(functional, name)

        def step(function=function, args=args, options=options):
            torch.autograd.grad(function(*args, **options, backend="cpp"), student)

        step()
        assert peak_growth(step) < 0.05 * full + gradient, name
    predict = functional.predict_labels
    assert peak_growth(lambda: predict(case.student, size, backend="cpp")) < 0.05 * full + labels.numel()
    eager = functional.consistency_loss
    args, options = calls["consistency_loss"]
    assert peak_growth(lambda: eager(*args, **options, backend="eager")) > full  # the measure can fail


def test_without_a_compiler_auto_warns_once_and_runs_eager(monkeypatch, caplog):
    def fail():
        raise cpp.build.BuildError("no compiler")

    monkeypatch.setattr(cpp, "_loaded", [])
    monkeypatch.setattr(cpp.build, "load_cpu", fail)
    logits = torch.randn(1, 3, 2, 2)
    for _ in range(2):
        functional.predict_labels(logits, (4, 4))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "running without native CPU kernels: no compiler"
    ]
    with pytest.raises(RuntimeError, match="'cpp' cannot run predict_labels: no compiler"):
        functional.predict_labels(logits, (4, 4), backend="cpp")
