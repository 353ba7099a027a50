"""Compile every Triton kernel for several GPU architectures; record registers, spills, shared memory, ptxas faults.

    python -m bench.triton_resources [--capability 80 90 100] [--out bench/results/triton_resources.json]

Needs no GPU. Every kernel is compiled in every configuration of its table, and in every dtype and option that changes
its code much. Exits with an error where a kernel spills registers, needs more shared memory than the architecture has
for one block, or reads a register that nothing has written.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from pseudoseg_fast.backends.triton import import_kernels

import_kernels()
from pseudoseg_fast.kernels import (  # noqa: E402
    compilation,
    depthwise,
    fuse_predictions,
    pseudo_label,
    refine_cam_backward,
    refine_cam_forward,
)

SHARED_KIB = {80: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory of a block by compute capability, in KiB (CUDA C++ programming guide).

8.0 has 163. It is held to the 99 of 8.6 and 8.9, for which the compiler makes the same of a kernel.
"""

SPILLS = {
    *("attend_project_kernel", "grad_query_kernel", "grad_key_cam_kernel", "refine_cam_kernel"),
    "filter_kernel",
}
SPILL_BYTES = 448
"""What these kernels may spill of a thread's registers; others nothing.

On an H200, tiles that spill a little beat those that do not by far (bench/results/gpu/attention.json). Most spill
nothing for 9.0, and more for 8.0, where none was timed.
"""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LENGTH = 33 * 33


def cases(small: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield the name of a case and a launch of it.

    Args:
        small: only what a test has time for: every kernel in the configurations of the usual sizes.
    """
    pairs = [("float32", "float32"), ("bfloat16", "bfloat16")]
    if not small:
        pairs += [("bfloat16", "float32"), ("float16", "float16")]
    for scores, values in pairs:
        widths = (20, 150) if values == "float32" else (20,)
        for depth in (128,) if small else (24, 64, 128, 256):
            for channels in widths if small else (3, 20, 150):
                yield from _attention_cases(scores, values, depth, channels, small)
    if small:  # what ptxas 12.8 makes wrong code of unless its rows are padded
        yield from _attention_cases("bfloat16", "bfloat16", 24, 3, small)
    for logits in ("float32",) if small else ("float32", "bfloat16"):
        for classes in (21, 150) if small else (21, 60, 150, 600):
            for norm, temperature in (("batch", 0.5), ("pixel", 0.7)):
                decoder, cam = _map(classes, 129, logits), _map(classes, 33, "float32")
                plan = fuse_predictions.plan(decoder, cam, (513, 513), 0.5, temperature, norm, False)
                for launch in plan.launches:
                    yield f"logits {logits}, C {classes}, norm {norm}, T {temperature}", launch
    for dtype in ("bfloat16",) if small else _DTYPES:
        for taps in (3,) if small else (3, 5):
            input, weight = _meta(8, 33, 33, 1152, dtype=dtype), _meta(1152, 1, taps, taps, dtype=dtype)
            geometry = ((1, 1), (taps - 1,) * 2, (2, 2))
            backward = depthwise.plan_backward(input, input, weight, *geometry, True, True)
            for launch in (*depthwise.plan(input, weight, None, *geometry).launches, *backward.launches):
                yield f"maps {dtype}, {taps} x {taps} taps", launch


def _attention_cases(
    scores: str, values: str, depth: int, channels: int, small: bool
) -> Iterator[tuple[str, Any]]:
    name = f"query {scores}, cam {values}, D {depth}, K {channels}"
    query = _meta(8, _LENGTH, depth, dtype=scores)
    cam = _meta(8, _LENGTH, channels, dtype=values)
    mask = torch.empty(8, _LENGTH, dtype=torch.bool, device="meta")
    attended, log_total = _meta(8, _LENGTH, channels), _meta(8, _LENGTH)
    for launch in refine_cam_forward.plan(query, query, cam, mask, 0.1, True).launches:
        yield name, launch
    gradient = (cam, query, query, cam, mask, 0.1, attended, log_total)
    for launch in refine_cam_backward.plan(*gradient, True, True).launches:
        yield name, launch
    if not small:
        yield f"{name}, cam alone", refine_cam_backward.plan(*gradient, False, True).launches[-1]
        yield f"{name}, cam detached", refine_cam_backward.plan(*gradient, True, False).launches[-1]
    query = _meta(8, depth, _LENGTH, dtype=scores).mT  # as a convolution leaves it
    classes = channels + 1
    for norm in ("batch", "none"):
        plan = pseudo_label.plan(
            query,
            query,
            _map(channels, 33, values),
            _map(classes, 129, scores),
            _meta(classes, classes),
            _meta(classes),
            True,
            None,
            (129, 129),
            0.5,
            0.5,
            norm,
            False,
        )
        for launch in plan.launches if norm == "batch" else plan.launches[-2:]:
            yield f"{name}, norm {norm}", launch


def _meta(*shape: int, dtype: str = "float32") -> torch.Tensor:
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


def _map(classes: int, side: int, dtype: str) -> torch.Tensor:
    return _meta(8, classes, side, side, dtype=dtype)


def measure(capabilities: list[int], small: bool = False) -> Iterator[dict[str, Any]]:
    """Compile all cases and yield a row of the table for each binary; equal ones once."""
    for capability in capabilities:
        seen = set()
        for case, launch in cases(small):
            key = (launch.kernel.__name__, str(compilation.specialise(launch)), launch.config)
            if key in seen:
                continue
            seen.add(key)
            used = compilation.compile_for(launch, capability)
            name = launch.kernel.__name__.strip("_")
            tile = launch.config._asdict()
            yield {"kernel": name, "case": case, "capability": capability, **tile, **used._asdict()}


def complaint(row: dict[str, Any]) -> str:
    """Return what is wrong with a row, or an empty string."""
    limit = SHARED_KIB[row["capability"]] * 1024
    name = f"{row['kernel']} ({row['case']}) on sm_{row['capability']}"
    if row["unwritten"]:
        return f"{name} reads a register that nothing has written in {row['unwritten']} places"
    if row["stack"] > (SPILL_BYTES if row["kernel"] in SPILLS else 0):
        return f"{name} spills {row['stack']} bytes"
    if row["shared"] > limit:
        return f"{name} needs {row['shared']} bytes of shared memory, there are {limit}"
    return ""


def main() -> None:
    """Write the table and report complaints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_KIB, default=[80, 90, 100])
    parser.add_argument("--out", type=Path, default=Path("bench/results/triton_resources.json"))
    parser.add_argument("--small", action="store_true", help="only the cases of the test")
    options = parser.parse_args()
    rows = list(measure(options.capability, options.small))
    head = json.dumps({"triton": triton.__version__, "capabilities": options.capability})
    lines = ",\n".join(json.dumps(row) for row in rows)
    options.out.write_text(f'{{"versions": {head},\n"rows": [\n{lines}\n]}}\n')
    complaints = [text for text in map(complaint, rows) if text]
    print(f"{len(rows)} binaries, {len(complaints)} complaints; table in {options.out}")
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
