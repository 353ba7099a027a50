"""Compile the CUDA library for every architecture and record registers, spills and shared memory of each kernel.

python -m bench.cuda_resources --output bench/results/cuda_resources.json

No GPU is needed. The command fails if a kernel spills registers.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pseudoseg_fast import build
from pseudoseg_fast.build.compile import LOG, compile_library

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n"
    r"(?:.*Function properties.*\n)?"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?P<more>.*)"
)


def compile_and_read(folder: Path) -> tuple[Path, list[dict[str, Any]], float]:
    """Compile into an empty folder; return the library, one row for each kernel and architecture, and the seconds."""
    spec = build.cuda_spec()
    told = dataclasses.replace(spec, flags=(*spec.flags, "-Xptxas=-v"))
    begin = time.perf_counter()
    library = compile_library(told, build.find_toolchain(told), folder)
    return library, rows((folder / LOG).read_text()), time.perf_counter() - begin


def rows(log: str) -> list[dict[str, Any]]:
    """Return what ptxas says of each kernel, by architecture and name."""
    found = []
    for match in _ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["more"])
        found.append(
            {
                "architecture": match["architecture"],
                "kernel": _readable(match["name"]),
                "registers": int(match["registers"]),
                "spill_bytes": int(match["stores"]) + int(match["loads"]),
                "stack_bytes": int(match["stack"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
        )
    return sorted(found, key=lambda row: (row["architecture"], row["kernel"]))


def _readable(name: str) -> str:
    """Return the kernel's name and template arguments, such as loss_kernel<float, fused>."""
    match = re.match(r"_ZN3psf4cuda\d+(\w+?_kernel)I([fd])(?:LNS_5LabelE(\d)E)?", name)
    if match is None:
        return name
    label = f", {('target', 'classes', 'fused', 'sums')[int(match[3])]}" if match[3] else ""
    return f"{match[1]}<{'float' if match[2] == 'f' else 'double'}{label}>"


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cuda_resources", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--folder", type=Path, required=False, help="keep the library in this empty folder")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("build/cuda_resources")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        library, kernels, seconds = compile_and_read(folder)
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    record = {
        "compiler": build.nvcc_version(),
        "architectures": list(build.ARCHITECTURES),
        "seconds": round(seconds, 1),
        "dynamic_shared_bytes_at_most": 48 << 10,  # csrc/cuda/plan.h
        "library_bytes": library.stat().st_size,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "kernels": kernels,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    for row in kernels:
        print(
            "{architecture:<8}{kernel:<32}{registers:>5} registers {spill_bytes:>4} bytes spilled".format(
                **row
            )
        )
    print(f"{len(kernels)} kernels in {seconds:.1f} s: {library}")
    return int(any(row["spill_bytes"] for row in kernels) or not kernels)


if __name__ == "__main__":
    sys.exit(main())
