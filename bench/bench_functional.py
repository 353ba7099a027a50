"""Time forward and backward of every function: eager, torch.compile of the same, and this project's kernels.

python -m pytest bench/bench_functional.py --threads 2 --benchmark-json bench/results/functional_cpu.json
-k voc_full chooses a size; see SIZES. A benchmark first checks its results against eager and fails if they differ.
With --device cuda one timing is of INPUT_SETS calls on different tensors, so that none is found in the cache.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.memory import extra_bytes
from pseudoseg_fast import functional

Run = Callable[..., Tensor]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Size(NamedTuple):
    """Images, classes, sides of the decoder's, the SGC's and the label map."""

    images: int
    classes: int
    decoder: int
    cam: int
    label: int


CPU_SIZES = {
    "voc_label": Size(4, 21, 129, 33, 129),  # the official label size is the decoder's
    "voc_full": Size(4, 21, 129, 33, 513),
    "coco_full": Size(2, 81, 129, 33, 513),
    "cityscapes": Size(2, 19, 192, 48, 768),
    "ade": Size(1, 150, 128, 32, 512),
    "demo_label": Size(8, 6, 32, 8, 32),
    "demo_full": Size(8, 6, 32, 8, 128),
}
CUDA_SIZES = {
    "gpu_voc_label": Size(8, 21, 129, 33, 129),
    "gpu_voc_full": Size(8, 21, 129, 33, 513),
    "gpu_coco_full": Size(4, 81, 130, 33, 518),
    "gpu_ade": Size(2, 150, 128, 32, 512),
    "gpu_attention_65": Size(16, 21, 257, 65, 257),
    "gpu_attention_129": Size(16, 21, 513, 129, 513),
}
SIZES = CPU_SIZES | CUDA_SIZES
LOSSES = ("consistency_loss", "cross_entropy", "soft_cross_entropy", "dice_loss")
FUNCTIONS = (*LOSSES, "fuse_predictions", "predict_labels", "refine_cam", "pseudo_label")
IMPLEMENTATIONS = ("eager", "compile", "attention", "native")
ATTENTION_DIM = 128
INPUT_SETS = 4
SECONDS = 1
"""How long one benchmark is to take: 3 rounds at least, 30 at most."""


def backend(function: str, device: str) -> str | None:
    """Return which backend has a kernel for a function on a device."""
    if device == "cpu":
        return None if function in ("refine_cam", "pseudo_label") else "cpp"
    return "triton" if function in ("fuse_predictions", "refine_cam", "pseudo_label") else "cuda"


def arguments(function: str, size: Size, device: str) -> Arguments:
    """Return arguments of a function; one that is differentiable has those that it is differentiable in first."""
    student, decoder = (
        3 * torch.randn(size.images, size.classes, size.decoder, size.decoder, device=device) for _ in "ab"
    )
    maps = torch.randn(size.images, size.classes, size.cam, size.cam, device=device)
    label = (size.label, size.label)
    if function in LOSSES:
        student.requires_grad_()
    if function == "consistency_loss":
        return (student, decoder, 3 * maps), {"size": label}
    if function in ("cross_entropy", "dice_loss"):
        return (student, torch.randint(0, size.classes, (size.images, *label), device=device)), {}
    if function == "soft_cross_entropy":
        target = torch.randn(size.images, size.classes, *label, device=device).softmax(1)
        return (student, target), {}
    if function == "fuse_predictions":
        return (decoder, 3 * maps), {"size": label}
    if function == "predict_labels":
        return (student, label), {}
    query, key = (torch.randn(size.images, size.cam**2, ATTENTION_DIM, device=device) for _ in "ab")
    if function == "refine_cam":
        cam = maps[:, 1:].sigmoid().flatten(2).mT.contiguous()
        return tuple(tensor.requires_grad_() for tensor in (query, key, cam)), {}
    head = {
        "projection": torch.eye(size.classes, device=device),
        "shift": torch.zeros(size.classes, device=device),
    }
    return (query, key, maps[:, 1:].sigmoid(), decoder), {**head, "background": True, "size": label}


def attention(query: Tensor, key: Tensor, cam: Tensor) -> Tensor:
    """Refine by PyTorch's own fused attention, which never stores the scores either."""
    return cam + scaled_dot_product_attention(query[:, None], key[:, None], cam[:, None])[:, 0]


def step(run: Run, given: Arguments) -> tuple[Tensor, ...]:
    """Run forward and, where there is one, backward."""
    result = run(*given[0], **given[1])
    if not result.requires_grad:
        return (result,)
    inputs = [value for value in given[0] if isinstance(value, Tensor) and value.requires_grad]
    return result.detach(), *torch.autograd.grad(result, inputs, torch.ones_like(result))


def steps(run: Run, sets: list[Arguments]) -> None:
    """Run on each set of arguments and wait for the last."""
    for given in sets:
        step(run, given)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_function(benchmark: Any, device: str, size: str, function: str, implementation: str) -> None:
    """Check one implementation against eager, measure its memory, then time it."""
    if (size in CUDA_SIZES) != (device == "cuda"):
        pytest.skip(f"{size} is not a size for {device}")
    chosen = implementation_of(function, implementation, device)
    sets = INPUT_SETS if device == "cuda" else 1
    torch.manual_seed(0)
    inputs = [arguments(function, SIZES[size], device) for _ in range(sets)]
    benchmark.extra_info.update(size=size, shape={**SIZES[size]._asdict(), "attention_dim": ATTENTION_DIM})
    compare(benchmark, device, function, implementation, chosen, inputs)


def implementation_of(function: str, implementation: str, device: str) -> Run:
    """Return one implementation of a function, or skip where there is none."""
    run = getattr(functional, function)
    eager = functools.partial(run, backend="eager")
    if implementation == "eager":
        return eager
    if implementation == "compile":
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
        compiled: Run = torch.compile(eager, fullgraph=True, mode=mode)
        return compiled
    if implementation == "attention":
        if function != "refine_cam":
            pytest.skip("PyTorch has a fused attention, and nothing fused for the others")
        return attention
    if (name := backend(function, device)) is None:
        pytest.skip(f"{function} has no kernel on {device}")
    return functools.partial(run, backend=name)


def compare(
    benchmark: Any, device: str, function: str, implementation: str, chosen: Run, inputs: list[Arguments]
) -> None:
    """Check an implementation against eager on the first of its inputs, measure its memory, then time it on all."""
    expected = step(functools.partial(getattr(functional, function), backend="eager"), inputs[0])
    actual = step(chosen, inputs[0])
    for one, other in zip(actual, expected, strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
        else:
            assert (one == other).float().mean() > 0.9999  # ties within rounding
    del actual, expected
    info = benchmark.extra_info
    benchmark.group = f"{info['size']} {function}"
    info.update(
        device=device,
        function=function,
        implementation=implementation,
        calls=len(inputs),
        extra_bytes=extra_bytes(lambda: step(chosen, inputs[0]), device),
    )
    start = time.perf_counter()
    steps(chosen, inputs)
    rounds = min(max(int(SECONDS / (time.perf_counter() - start)), 3), 30)
    benchmark.pedantic(steps, (chosen, inputs), rounds=rounds, warmup_rounds=1)
