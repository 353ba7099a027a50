"""How fast a function could be on this machine: its work by count, over rates measured in the same run.

Work is counted per element of the label, one pixel of one class: vector operations of the C++ kernels as written (see
bench/README.md), and bytes that have to come from or go to memory whatever the kernel. The longer of both is a floor.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

OPERATIONS: Mapping[str, float] = {
    "consistency_loss": 40,
    "cross_entropy": 22,
    "soft_cross_entropy": 22,
    "dice_loss": 36,
    "fuse_predictions": 19,
    "predict_labels": 7,
}
BYTES: Mapping[str, Callable[[int], float]] = {
    "consistency_loss": lambda classes: 0,
    "cross_entropy": lambda classes: 8 / classes,  # int64 labels
    "soft_cross_entropy": lambda classes: 4,  # the target
    "dice_loss": lambda classes: 16 / classes,  # int64 labels, twice
    "fuse_predictions": lambda classes: 8,  # new pages are cleared, then written
    "predict_labels": lambda classes: 1 / classes,
}


def measure_rates() -> dict[str, float]:
    """Return bytes/s of a copy and float32 multiply-adds/s of a matrix product, with the threads that are set.

    The best of several: a floor is what the machine can do, not what it does while something else runs.
    """
    source = torch.ones(2**25)  # 128 MiB, beyond any cache
    target = torch.empty_like(source)
    matrix = torch.ones(1024, 1024)
    copy = _seconds(lambda: target.copy_(source))
    product = _seconds(lambda: torch.mm(matrix, matrix))
    return {"bytes": 2 * source.nbytes / copy, "multiply_adds": 1024**3 / product}


def _seconds(run: Callable[[], Any]) -> float:
    run()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def floor_milliseconds(function: str, shape: Mapping[str, int], rates: Mapping[str, float]) -> float | None:
    """Return the least time of forward and backward on the CPU; None for a function whose work is not counted.

    Args:
        function: name of a public function.
        shape: ``images``, ``classes``, ``label``; refine_cam needs ``cam`` and ``attention_dim``, depthwise_conv2d
            ``images``, ``channels``, ``side`` and ``taps``.
        rates: of :func:`measure_rates`.
    """
    if function == "refine_cam":
        # Six matrix products: scores and means forward; gradients of means, values, keys and queries backward.
        width = shape["attention_dim"] + shape["classes"] - 1
        return 1e3 * shape["images"] * shape["cam"] ** 4 * 3 * width / rates["multiply_adds"]
    if function == "depthwise_conv2d":
        # Result, gradient of the input and of the filter; the input is read twice, so is the upstream gradient.
        elements = shape["images"] * shape["channels"] * shape["side"] ** 2
        work = 3 * shape["taps"] ** 2 / rates["multiply_adds"]
        return 1e3 * elements * max(work, 6 * 4 / rates["bytes"])
    if function not in OPERATIONS:
        return None
    elements = shape["images"] * shape["classes"] * shape["label"] ** 2
    return 1e3 * max(
        elements * OPERATIONS[function] / rates["multiply_adds"],
        elements * BYTES[function](shape["classes"]) / rates["bytes"],
    )
