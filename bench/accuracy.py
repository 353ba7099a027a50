"""Compare methods over seeds: one training process per cell of a grid.

python -m bench.accuracy bench/grids/demo.yaml

A grid file has ``seeds`` and ``runs``, a name and the options of ``pseudoseg_fast.train`` for each row. Every finished
run adds a line of JSON to ``bench/results/accuracy-GRID.jsonl``; called again, only the missing ones are run. The table
at the end gives mean and standard deviation over seeds; "last" is the figure to trust, "best" was chosen on the val
pictures themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

RESULTS = Path(__file__).parent / "results"


def run_grid(grid: Path, results: Path, runs: Path) -> list[dict[str, Any]]:
    """Run what ``results`` does not have yet; return all its rows that belong to the grid."""
    cells = yaml.safe_load(grid.read_text())
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for seed in cells["seeds"]:
        for name, options in cells["runs"].items():
            arguments = [*options.split(), "--run.seed", str(seed)]
            if any(row["name"] == name and row["arguments"] == arguments for row in rows):
                continue
            folder = runs / f"{grid.stem}-{'-'.join(name.lower().split())}-{seed}"
            command = [sys.executable, "-m", "pseudoseg_fast.train", *arguments, "--run.dir", str(folder)]
            print(" ".join(command), flush=True)
            with (runs / f"{folder.name}.log").open("w") as log:
                status = subprocess.run(
                    [*command, "--run.overwrite", "true"], stdout=log, stderr=log
                ).returncode
            if status:
                sys.exit(f"{name}, seed {seed}, ended with status {status}; see {log.name}")
            row = {
                "name": name,
                "seed": seed,
                "arguments": arguments,
                **json.loads((folder / "result.json").read_text()),
                "torch": torch.__version__,
                "machine": f"{os.cpu_count()} x {platform.machine()}",
            }
            rows.append(row)
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return [row for row in rows if row["name"] in cells["runs"] and row["seed"] in cells["seeds"]]


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of mIoU %, mean ± standard deviation over seeds, and mean seconds."""
    lines = ["| run | seeds | mIoU %, last | mIoU %, best | seconds |", "| --- | --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        last, best = (spread([100 * row["miou"][key] for row in mine]) for key in ("last", "best"))
        seconds = statistics.mean(row["seconds"] for row in mine)
        lines.append(f"| {name} | {len(mine)} | {last} | {best} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return "mean ± standard deviation"."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs themselves")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    print(table(run_grid(options.grid, RESULTS / f"accuracy-{options.grid.stem}.jsonl", options.runs)))


if __name__ == "__main__":
    main()
