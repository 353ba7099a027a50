"""Search the configurations of the attention kernels on a GPU: what their tables should hold is a measurement.

python -m bench.attention_configs [--dtype mixed bfloat16 float32] [--length 1089 4225] [--jobs 14] [--output FILE]

Every configuration of a list is compiled and compared with eager in processes side by side, then those that are right
are timed one after the other: the launches alone, in a CUDA graph. Prints the fastest of every kernel beside what the
table has, and what a call of the public function takes by these kernels, by eager and by PyTorch's attention. With
``--output`` the checks are kept too, and a second run only times.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pseudoseg_fast import functional, reference
from pseudoseg_fast.backends.triton import import_kernels

import_kernels()
from pseudoseg_fast.kernels import pseudo_label, refine_cam_backward, refine_cam_forward  # noqa: E402
from pseudoseg_fast.kernels.launch import INTERPRETED, Config, Plan  # noqa: E402

DEPTH = 128
DTYPES = {
    "mixed": (torch.bfloat16, torch.float32),  # what training in bf16-mixed gives
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
}
"""Of query and key, and of cam."""
TABLES = {
    "forward": refine_cam_forward.CONFIGS,
    "backward": refine_cam_backward.CONFIGS,
    "label": pseudo_label.CONFIGS,
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Greatest error of results and gradients, relative to the greatest value."""
Row = dict[str, Any]


def candidates(dtype: str) -> Iterator[Config]:
    """Yield the configurations that are tried; rows of float32 are multiplied in parts, as they fill more registers."""
    wide = dtype == "float32"
    fields = itertools.product(
        (32, 64) if wide else (32, 64, 128),
        (16, 32, 64) if wide else (32, 64, 128),
        (4, 8),
        (1, 2) if wide else (1, 2, 3),
        (32, 64) if wide else (DEPTH,),
    )
    return itertools.starmap(Config, fields)


class Case:
    """The attention of one size and dtype: inputs, eager's results, and the kernels' launches."""

    def __init__(self, images: int, length: int, channels: int, dtype: str) -> None:
        device = "cpu" if INTERPRETED else "cuda"
        rows, values = DTYPES[dtype]
        torch.manual_seed(0)
        side = int(length**0.5)
        self.scale = DEPTH**-0.5
        self.query, self.key = (torch.randn(images, length, DEPTH, device=device).to(rows) for _ in "qk")
        self.cam = torch.rand(images, length, channels, device=device).to(values)
        self.grad = torch.randn(images, length, channels, device=device).to(values)
        self.maps = self.cam.mT.contiguous().unflatten(2, (side, length // side))
        self.decoder = torch.randn(images, channels + 1, 4 * side, 4 * side, device=device).to(rows)
        self.head = {
            "projection": torch.eye(channels + 1, device=device),
            "shift": torch.zeros(channels + 1, device=device),
            "background": True,
        }
        self.tolerance = TOLERANCE[rows]
        self.key_of_tables = (rows.itemsize, values.itemsize, DEPTH)

    @property
    def inputs(self) -> list[Tensor]:
        """Query, key and cam that want gradients."""
        return [tensor.detach().requires_grad_() for tensor in (self.query, self.key, self.cam)]

    def forward(self) -> Plan:
        """Plan refine_cam, keeping what its gradient needs."""
        return refine_cam_forward.plan(self.query, self.key, self.cam, None, self.scale, True)

    @cached_property
    def kept(self) -> tuple[Tensor, ...]:
        """What forward keeps for backward."""
        return self.forward().run()[1:]

    def plan(self, part: str) -> Plan:
        """Plan the launches of a kernel as the table now says."""
        if part == "forward":
            return self.forward()
        maps = (self.query, self.key, self.cam, None)
        if part == "backward":
            return refine_cam_backward.plan(self.grad, *maps, self.scale, *self.kept, True, True)
        return pseudo_label.plan(
            self.query,
            self.key,
            self.maps,
            self.decoder,
            *self.head.values(),
            None,
            self.decoder.shape[2:],
            0.5,
            0.5,
            "batch",
            False,
        )

    @cached_property
    def expected(self) -> dict[str, tuple[Tensor, ...]]:
        """Eager's results."""
        inputs = self.inputs
        refined = reference.refine_cam(*inputs)
        return {
            "forward": (refined.detach(),),
            "backward": torch.autograd.grad(refined, inputs, self.grad),
            "label": (self.call("label", "eager")(),),
        }

    def call(self, part: str, backend: str) -> Callable[[], Any]:
        """Return a call of the public function: forward without gradients, or forward and backward."""
        if part == "label":
            given = (self.query, self.key, self.maps, self.decoder)
            size = tuple(self.decoder.shape[2:])
            return lambda: functional.pseudo_label(*given, **self.head, size=size, backend=backend)

        def run(*inputs: Tensor) -> Tensor:
            if backend != "attention":
                return functional.refine_cam(*inputs, backend=backend)
            query, key, cam = (tensor[:, None] for tensor in inputs)
            return inputs[2] + scaled_dot_product_attention(query, key, cam.to(query.dtype))[:, 0]

        if part == "forward":
            return torch.no_grad()(lambda: run(self.query, self.key, self.cam))
        inputs = self.inputs
        return lambda: torch.autograd.grad(run(*inputs), inputs, self.grad)

    def error(self, part: str) -> float:
        """Return the greatest error of the kernels, relative to the greatest value; infinite where one is no number."""
        results = self.plan(part).run()
        errors = [
            float((one - other).abs().max() / other.abs().max())
            for one, other in zip(results, self.expected[part], strict=False)
        ]
        return max(error if error == error else float("inf") for error in errors)


@cache
def case(images: int, length: int, channels: int, dtype: str) -> Case:
    """Return a case, made once in each process."""
    return Case(images, length, channels, dtype)


def milliseconds(call: Callable[[], Any], graph: bool) -> float:
    """Return the median time of a call on a GPU, of its launches alone if it can be put into a graph."""
    from triton.testing import do_bench, do_bench_cudagraph

    if graph:
        return float(do_bench_cudagraph(call, rep=4, return_mode="median"))
    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def check(tasks: list[tuple[str, str, Config]], size: tuple[int, int, int], deadline: float) -> list[Row]:
    """Compile configurations and compare them with eager; one that breaks the device ends the list.

    Args:
        tasks: kernel, dtype and configuration.
        size: images, positions and channels.
        deadline: ``time.time()`` from which on none is begun.
    """
    rows: list[Row] = []
    for part, dtype, config in tasks:
        if time.time() > deadline:
            break
        one = case(*size, dtype)
        former = TABLES[part][one.key_of_tables]
        _ = one.kept  # by the table's configuration
        TABLES[part][one.key_of_tables] = config
        row = {"part": part, "dtype": dtype, **config._asdict()}
        try:
            error = one.error(part)
            rows.append(row | {"error": error, "right": error <= one.tolerance})
        except Exception as problem:  # the compiler refuses some tiles in ways of its own
            rows.append(row | {"right": False, "problem": f"{problem!r:.200}"})
            if "CUDA error" in str(problem) or "illegal" in str(problem):
                break  # nothing runs in this process any more
        finally:
            TABLES[part][one.key_of_tables] = former
    return rows


def check_all(dtypes: list[str], size: tuple[int, int, int], jobs: int, seconds: float) -> list[Row]:
    """Check every candidate, in so many processes, as long as there is time; a process that broke does no more."""
    deadline = time.time() + seconds
    tasks = [(part, dtype, config) for dtype in dtypes for part in TABLES for config in candidates(dtype)]
    chunks = [tasks[first::jobs] for first in range(jobs)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [row for rows in pool.map(check, chunks, [size] * jobs, [deadline] * jobs) for row in rows]


def time_all(rows: list[Row], sizes: list[tuple[int, int, int]]) -> None:
    """Write the milliseconds into the rows that are right: of the first size, and of others if it is a fast one."""
    right = [row for row in rows if row["right"]]
    for row in right:
        row["ms"] = [launch_milliseconds(row, sizes[0])]
    for row in right:
        best = min(other["ms"][0] for other in right if other["part"] == row["part"])
        table = TABLES[row["part"]][case(*sizes[0], row["dtype"]).key_of_tables]
        if row["ms"][0] < 1.25 * best or is_config(row, table):
            row["ms"] += [launch_milliseconds(row, size) for size in sizes[1:]]


def launch_milliseconds(row: Row, size: tuple[int, int, int]) -> float:
    """Return how long the launches of a row take at a size."""
    one = case(*size, row["dtype"])
    _ = one.kept  # by the table's configuration
    table, key = TABLES[row["part"]], one.key_of_tables
    former = table[key]
    table[key] = Config(**{name: row[name] for name in Config._fields})
    try:
        return milliseconds(one.plan(row["part"]).run, graph=True)
    finally:
        table[key] = former


def report(rows: list[Row], sizes: list[tuple[int, int, int]], best: int) -> None:
    """Print the fastest configurations of each kernel, and the public functions beside them."""
    for dtype, part in sorted({(row["dtype"], row["part"]) for row in rows}):
        mine = [row for row in rows if (row["dtype"], row["part"]) == (dtype, part)]
        timed = [row for row in mine if "ms" in row]
        key = case(*sizes[0], dtype).key_of_tables
        table = TABLES[part][key]
        wrong = [row for row in mine if not row["right"]]
        print(f"{part} {dtype}: {len(timed)} of {len(mine)} right; the table has {tuple(table)}")
        for row in wrong[:3]:
            print("  wrong:", {name: value for name, value in row.items() if name not in ("part", "dtype")})
        chosen = sorted(timed, key=lambda row: (-len(row["ms"]), sum(row["ms"])))
        for row in [*chosen[:best], *(row for row in timed if is_config(row, table))]:
            times = " ".join(f"{ms:.4f}" for ms in row["ms"])
            print(f"  {tuple(row[name] for name in Config._fields)} {times} ms, error {row['error']:.1e}")
        for backend in ("triton", "eager", "attention"):
            if (part, backend) == ("label", "attention"):
                continue
            times = [milliseconds(case(*size, dtype).call(part, backend), graph=False) for size in sizes]
            print(
                f"  {backend}, whole calls{' and forward' * (part == 'backward')}:",
                *(f"{ms:.3f}" for ms in times),
            )


def is_config(row: Row, config: Config) -> bool:
    """Tell whether a row is of a configuration."""
    return all(row[name] == value for name, value in config._asdict().items())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--length", type=int, nargs="+", default=[33 * 33, 65 * 65], help="positions")
    parser.add_argument("--channels", type=int, default=20, help="of cam")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=300, help="for compiling, the start included")
    parser.add_argument("--best", type=int, default=4, help="how many to print")
    parser.add_argument("--check", action="store_true", help="compile and compare, and stop before timing")
    parser.add_argument("--output", type=Path, help="JSON file; checks in it are not made again")
    options = parser.parse_args()
    sizes = [(options.images, length, options.channels) for length in options.length]
    if options.output and options.output.exists():
        rows = json.loads(options.output.read_text())
    else:
        rows = check_all(options.dtype, sizes[0], options.jobs, options.seconds)
    for dtype in () if options.check else options.dtype:
        mine = [row for row in rows if row["dtype"] == dtype]
        time_all(mine, sizes)
        report(mine, sizes, options.best)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
