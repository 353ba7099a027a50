"""Search the tiles of the Triton kernels for depthwise convolutions on a GPU, and compare with PyTorch.

python -m bench.depthwise_configs [--jobs 12] [--dtype bfloat16 float32] [--output FILE]

Every tile is compiled and compared with PyTorch in processes side by side, then those that are right are timed one
after the other in CUDA graphs. Prints, for every layer and part, PyTorch's time on channels-last maps and on others,
that of the tile that the kernels have, and the fastest.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.bench_depthwise import Layer
from pseudoseg_fast.backends.triton import import_kernels

import_kernels()
from pseudoseg_fast.kernels import depthwise  # noqa: E402
from pseudoseg_fast.kernels.launch import INTERPRETED, Config, Plan  # noqa: E402

LAYERS = {
    "ResNet ASPP, dilation 12": Layer(8, 2048, 33, 3, 12),
    "lite0 5x5, dilation 2": Layer(8, 1152, 22, 5, 2),
    "lite0 3x3, dilation 2": Layer(8, 1152, 22, 3, 2),
    "lite0 5x5": Layer(8, 672, 22, 5, 1),
    "decoder 3x3": Layer(8, 304, 129, 3, 1),
}
PARTS = ("forward", "input", "filter")
"""The convolution, and the gradients of its input and of its filter."""
TILES = [Config(rows, columns, warps, 1) for rows, columns, warps in (
    (8, 64, 4), (16, 64, 4), (32, 64, 4), (64, 64, 4), (64, 64, 8), (16, 128, 4), (32, 128, 8), (32, 32, 4)
)]  # fmt: skip
RUNS = (64, 128, 256, 512)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Greatest error relative to the greatest value."""
Row = dict[str, Any]


class Case:
    """A layer with its tensors."""

    def __init__(self, layer: Layer, dtype: torch.dtype) -> None:
        device = "cpu" if INTERPRETED else "cuda"
        torch.manual_seed(0)
        shape = (layer.images, layer.side, layer.side, layer.channels)
        self.input, self.upstream = (torch.randn(shape, device=device).to(dtype) for _ in "iu")
        self.weight = torch.randn(layer.channels, 1, layer.taps, layer.taps, device=device).to(dtype)
        reach = layer.dilation * (layer.taps - 1) // 2
        self.geometry = ((1, 1), (reach, reach), (layer.dilation, layer.dilation))
        self.groups = layer.channels

    def plan(self, part: str) -> Plan:
        """Return the launches of a part with the present tiles."""
        if part == "forward":
            return depthwise.plan(self.input, self.weight, None, *self.geometry)
        wanted = (part == "input", part == "filter")
        return depthwise.plan_backward(self.upstream, self.input, self.weight, *self.geometry, *wanted)

    def ours(self, part: str) -> Tensor:
        """Return what a part computes, in PyTorch's shape."""
        results = self.plan(part).run()
        if part == "filter":
            return results[1].sum(0).T.reshape(self.weight.shape)
        return results[0].permute(0, 3, 1, 2)

    def pytorch(self, part: str, last: bool = True) -> Callable[[], Tensor]:
        """Return what computes a part by PyTorch, on channels-last maps or on others."""
        input, upstream = (maps.permute(0, 3, 1, 2) for maps in (self.input, self.upstream))
        if not last:
            input, upstream = input.contiguous(), upstream.contiguous()
        stride, padding, dilation = self.geometry
        if part == "forward":
            options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}
            return partial(torch.nn.functional.conv2d, input, self.weight, None, **options)  # type: ignore[arg-type]
        mask = [part == "input", part == "filter", False]

        def gradient() -> Tensor:
            return torch.ops.aten.convolution_backward(
                upstream,
                input,
                self.weight,
                None,
                stride,
                padding,
                dilation,
                False,
                (0, 0),
                self.groups,
                mask,
            )[part == "filter"]

        return gradient


def candidates(part: str) -> Iterator[tuple[Config, int]]:
    """Yield tiles and lengths of runs that are tried for a part."""
    yield from itertools.product(TILES, RUNS if part == "filter" else RUNS[:1])


def use(tile: Config, run: int) -> None:
    """Make the kernels use a tile and a length of runs."""
    depthwise.CONVOLVE = depthwise.FILTER = tile
    depthwise.RUN = run


def check(name: str, dtype: torch.dtype, part: str, tile: Config) -> list[Row]:
    """Compile a tile for a part of a layer and compare it with PyTorch, for every length of runs."""
    case = Case(LAYERS[name], dtype)
    expected = case.pytorch(part)().float()
    rows = []
    for run in [run for other, run in candidates(part) if other == tile]:
        use(tile, run)
        error = (case.ours(part).float() - expected).abs().max() / expected.abs().max()
        right = bool(error < TOLERANCE[dtype])
        rows.append(
            {"layer": name, "dtype": str(dtype).removeprefix("torch."), "part": part, "right": right}
            | {"rows": tile.rows, "columns": tile.columns, "warps": tile.warps, "run": run}
        )
    return rows


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of what a call launches, in a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return round(float(do_bench_cudagraph(call, rep=20, return_mode="median")), 4)


def time_all(rows: list[Row], dtype: torch.dtype) -> Iterator[Row]:
    """Time what is right, and PyTorch; yield a row for each layer and part."""
    own = depthwise.CONVOLVE, depthwise.FILTER, depthwise.RUN
    for name, layer in LAYERS.items():
        case = Case(layer, dtype)
        for part in PARTS:
            mine = [row for row in rows if row["layer"] == name and row["part"] == part and row["right"]]
            for row in mine:
                use(Config(row["rows"], row["columns"], row["warps"], 1), row["run"])
                row["ms"] = milliseconds(case.plan(part).run)
            depthwise.CONVOLVE, depthwise.FILTER, depthwise.RUN = own
            yield {
                **{"layer": name, "part": part, "dtype": str(dtype).removeprefix("torch.")},
                "channels-last": milliseconds(case.pytorch(part)),
                "others": milliseconds(case.pytorch(part, last=False)),
                "kernels": milliseconds(case.plan(part).run),
                "fastest": min(mine, key=lambda row: row["ms"], default=None),
            }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=4, help="processes that compile")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"])
    parser.add_argument("--output", type=Path, help="JSON of all rows")
    options = parser.parse_args()
    kept: dict[str, Any] = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    for dtype in [getattr(torch, name) for name in options.dtype]:
        work = itertools.product(LAYERS, [dtype], PARTS, TILES)
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(check, *zip(*work, strict=True)))
        rows = [row for some in found for row in some]
        print(f"{dtype}: {sum(row['right'] for row in rows)} of {len(rows)} right", flush=True)
        kept.setdefault("rows", []).extend(rows)
        for summary in time_all(rows, dtype):
            print(summary, flush=True)
            kept.setdefault("parts", []).append(summary)
            if options.output:  # each time: whoever stops it keeps what there is
                options.output.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
