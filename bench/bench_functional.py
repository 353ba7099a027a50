"""Time forward and backward of every function: eager, torch.compile of the same, and the C++ kernels.

python -m pytest bench/bench_functional.py --threads 2 --benchmark-json bench/results/functional_cpu.json
-k voc_full chooses a size; see SIZES. A benchmark first checks its results against eager and fails if they differ.
"""

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pseudoseg_fast import functional


class Size(NamedTuple):
    """Images, classes, sides of the decoder's, the SGC's and the label map."""

    images: int
    classes: int
    decoder: int
    cam: int
    label: int


SIZES = {
    "voc_label": Size(4, 21, 129, 33, 129),  # the official label size is the decoder's
    "voc_full": Size(4, 21, 129, 33, 513),
    "coco_full": Size(2, 81, 129, 33, 513),
    "cityscapes": Size(2, 19, 192, 48, 768),
    "ade": Size(1, 150, 128, 32, 512),
    "demo": Size(8, 6, 24, 6, 96),
}
FUNCTIONS = ("consistency_loss", "cross_entropy", "soft_cross_entropy", "fuse_predictions", "predict_labels")
IMPLEMENTATIONS = ("eager", "compile", "cpp")


def call(function: str, size: Size) -> tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]:
    """Return a function with its arguments; a loss has its differentiable argument first."""
    torch.manual_seed(0)
    student, decoder = (3 * torch.randn(size.images, size.classes, size.decoder, size.decoder) for _ in "ab")
    cam = 3 * torch.randn(size.images, size.classes, size.cam, size.cam)
    label = (size.label, size.label)
    student.requires_grad_(function.endswith(("entropy", "loss")))
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}
    if function == "consistency_loss":
        arguments, options = (student, decoder, cam), {"size": label}
    elif function == "cross_entropy":
        arguments = (student, torch.randint(0, size.classes, (size.images, *label)))
    elif function == "soft_cross_entropy":
        arguments = (student, torch.randn(size.images, size.classes, *label).softmax(1))
    elif function == "fuse_predictions":
        arguments, options = (decoder, cam), {"size": label}
    else:
        arguments = (student, label)
    return getattr(functional, function), arguments, options


def step(
    run: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Run forward and, for a loss, backward."""
    result = run(*arguments, **options)
    if not result.requires_grad:
        return (result,)
    return result.detach(), *torch.autograd.grad(result, arguments[0])


def extra_bytes(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """Return the growth of this process's resident memory at its peak, without what the function returns."""
    ctypes.CDLL(None).malloc_trim(0)  # so that memory kept from earlier calls is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    results = run()
    return _resident("VmHWM") - before - sum(tensor.nbytes for tensor in results)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_function(benchmark: Any, size: str, function: str, implementation: str) -> None:
    """Check one implementation against eager, measure its memory, then time it."""
    run, arguments, options = call(function, SIZES[size])
    eager = functools.partial(run, backend="eager")
    expected = step(eager, arguments, options)
    if implementation == "compile":
        chosen = torch.compile(eager, fullgraph=True)
    else:
        chosen = functools.partial(run, backend=implementation)
    actual = step(chosen, arguments, options)
    for one, other in zip(actual, expected, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        else:
            assert (one == other).float().mean() > 0.9999  # ties within rounding
    del actual, expected
    benchmark.group = f"{size} {function}"
    benchmark.extra_info.update(
        size=size,
        shape=SIZES[size]._asdict(),
        function=function,
        implementation=implementation,
        extra_bytes=extra_bytes(lambda: step(chosen, arguments, options)),
    )
    rounds = 30 if implementation == "cpp" else 3
    benchmark.pedantic(step, (chosen, arguments, options), rounds=rounds, warmup_rounds=1)
