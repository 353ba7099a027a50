"""Search the configurations of the attention kernels on a GPU: what their tables should hold is a measurement.

python -m bench.attention_configs [--dtype float32 bfloat16] [--length 1089] [--seconds 60] [--output FILE]

From the table's configuration on, one field is changed at a time, and the fastest change kept, until none is faster or
the time is up; forward first, then backward. Each configuration is first checked against eager in the same dtype.
Prints a line for each one tried, and eager's time beside the best.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pseudoseg_fast import functional, reference
from pseudoseg_fast.backends.triton import import_kernels

import_kernels()
from pseudoseg_fast.kernels import refine_cam_backward, refine_cam_forward  # noqa: E402
from pseudoseg_fast.kernels.launch import INTERPRETED, Config  # noqa: E402

CHOICES = {
    "rows": (16, 32, 64, 128),
    "columns": (16, 32, 64, 128),
    "depth": (32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3),
}
"""Values that are tried of each field."""
TABLES = {"forward": refine_cam_forward.CONFIGS, "backward": refine_cam_backward.CONFIGS}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Greatest error of results and gradients, relative to the greatest value."""


def descend(start: Config, cost: Callable[[Config], float], deadline: float) -> tuple[Config, float]:
    """Return the configuration that no change of one field betters, and its cost.

    Args:
        start: where to begin.
        cost: of a configuration; infinite where it cannot be used.
        deadline: ``time.monotonic()`` at which to stop, with the best so far.
    """
    known = {start: cost(start)}
    best = start
    while True:
        for name, values in CHOICES.items():
            for value in values:
                candidate = best._replace(**{name: value})
                if candidate not in known and time.monotonic() < deadline:
                    known[candidate] = cost(candidate)
        leader = min(known, key=known.__getitem__)
        if leader == best:
            return best, known[best]
        best = leader


def milliseconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call; in the interpreter of a single one."""
    if INTERPRETED:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


class Case:
    """refine_cam at one size: its results by the kernels and by eager, and calls to be timed."""

    def __init__(self, images: int, length: int, depth: int, channels: int, dtype: torch.dtype) -> None:
        device = "cpu" if INTERPRETED else "cuda"
        torch.manual_seed(0)
        self.inputs = [
            torch.randn(images, length, width, device=device).to(dtype).requires_grad_()
            for width in (depth, depth, channels)
        ]
        self.upstream = torch.randn(images, length, channels, device=device).to(dtype)
        self.expected = self.results(reference.refine_cam)
        self.tolerance = TOLERANCE[dtype]

    def kernels(self, *inputs: Tensor) -> Tensor:
        """Run the Triton kernels."""
        return functional.refine_cam(*inputs, backend="triton")

    def results(self, function: Callable[..., Tensor]) -> list[Tensor]:
        """Return the result and the gradients of query, key and cam."""
        refined = function(*self.inputs)
        return [refined.detach(), *torch.autograd.grad(refined, self.inputs, self.upstream)]

    def call(self, function: Callable[..., Tensor], part: str) -> Callable[[], Any]:
        """Return what is to be timed: forward alone without gradients, or backward alone."""
        if part == "forward":
            return torch.no_grad()(lambda: function(*self.inputs))
        refined = function(*self.inputs)
        return lambda: torch.autograd.grad(refined, self.inputs, self.upstream, retain_graph=True)

    def cost(self, part: str, key: tuple[int, int], config: Config) -> float:
        """Return the milliseconds of a part under a configuration, infinite where it fails or is wrong."""
        former = TABLES[part][key]
        TABLES[part][key] = config
        try:
            pairs = zip(self.results(self.kernels), self.expected, strict=True)
            error = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
            taken = milliseconds(self.call(self.kernels, part)) if error <= self.tolerance else float("inf")
            print(f"{part} {config} {taken:.3f} ms, error {error:.1e}", flush=True)
            return taken
        except Exception as problem:  # the compiler refuses some tiles in ways of its own
            print(f"{part} {config} fails: {problem!r:.90}", flush=True)
            if "illegal memory access" in str(problem):
                raise  # nothing runs in this process any more
            return float("inf")
        finally:
            TABLES[part][key] = former


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of all three maps")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--length", type=int, default=33 * 33, help="positions")
    parser.add_argument("--channels", type=int, default=20, help="of cam")
    parser.add_argument(
        "--seconds", type=float, default=60, help="for each search, of which there are two a dtype"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the best")
    options = parser.parse_args()
    rows = []
    for name in options.dtype:
        dtype = getattr(torch, name)
        case = Case(options.images, options.length, 128, options.channels, dtype)
        for part, table in TABLES.items():
            key = (dtype.itemsize, 128)
            deadline = time.monotonic() + options.seconds
            best, taken = descend(table[key], partial(case.cost, part, key), deadline)
            table[key] = best
            eager = milliseconds(case.call(reference.refine_cam, part))
            row = {"part": part, "dtype": name, "best": best._asdict(), "ms": taken, "eager ms": eager}
            print(f"best {part} {name}: {best} {taken:.3f} ms, eager {eager:.3f} ms", flush=True)
            rows.append(row)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
