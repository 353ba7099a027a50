"""Compare methods over seeds: one training process per cell of a grid.

python -m bench.accuracy bench/grids/demo.yaml

A grid file has ``seeds`` and ``runs``, a name and the options of ``pseudoseg_fast.train`` for each row, and perhaps
``common`` options; environment variables are filled in. Every finished run adds a line of JSON to
``bench/results/accuracy-GRID.jsonl``, with its resolved configuration and the commit; called again, only runs whose
configuration is not there are made. The table at the end gives mean and standard deviation over seeds; "last" is the
figure to trust, "best" was chosen on the val pictures themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from pseudoseg_fast.config import parse_config, to_dict
from pseudoseg_fast.trainer import FREE_ON_RESUME

RESULTS = Path(__file__).parent / "results"
SUPERVISED = {"name", "align_corners", "ema"}
"""Options of the method that a supervised run has use for."""
UNSUPERVISED = {
    *("data.unlabeled", "data.tags", "data.color_jitter", "data.cutout"),
    *("optim.unlabeled_batch_size", "optim.sgc_lr"),
}
"""Other options that it has none for."""


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    grid: str
    name: str
    seed: int
    options: str

    @property
    def arguments(self) -> list[str]:
        """The options of this run, as words of a command line."""
        return [*os.path.expandvars(self.options).split(), "--run.seed", str(self.seed)]

    def config(self) -> dict[str, dict[str, Any]]:
        """Return the resolved configuration, without what changes no result."""
        config = to_dict(parse_config(self.arguments, "bench.accuracy", ""))
        unused = FREE_ON_RESUME
        if config["method"]["name"] == "supervised":
            unused = (
                FREE_ON_RESUME
                | UNSUPERVISED
                | {f"method.{name}" for name in config["method"].keys() - SUPERVISED}
            )
        return {
            group: {name: value for name, value in values.items() if f"{group}.{name}" not in unused}
            for group, values in config.items()
        }

    def run(self, runs: Path, threads: int) -> dict[str, Any]:
        """Train in a process of its own and return its result; folder and log stay in ``runs``."""
        folder = runs / "-".join([self.grid, *re.findall(r"[a-z0-9]+", self.name.lower()), str(self.seed)])
        command = [sys.executable, "-m", "pseudoseg_fast.train", *self.arguments, "--run.dir", str(folder)]
        print(f"{self.name}, seed {self.seed}: {folder}", flush=True)
        with folder.with_suffix(".log").open("w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            process = subprocess.run(
                [*command, "--run.overwrite", "true"], stdout=log, stderr=log, env=environment
            )
        if process.returncode:
            raise RuntimeError(
                f"{self.name}, seed {self.seed}, ended with {process.returncode}; see {log.name}"
            )
        return {
            **asdict(self),
            "config": self.config(),
            "commit": commit(),
            **json.loads((folder / "result.json").read_text()),
            "threads": threads,
            "torch": torch.__version__,
            "machine": f"{os.cpu_count()} x {platform.machine()}",
        }


def run_grid(path: Path, results: Path, runs: Path, jobs: int) -> list[dict[str, Any]]:
    """Run what ``results`` does not have yet, ``jobs`` at a time; return all rows of the grid."""
    grid = yaml.safe_load(path.read_text())
    common = grid.get("common", "")
    cells = [
        Cell(path.stem, name, seed, f"{common} {options}".strip())
        for name, options in grid["runs"].items()
        for seed in grid["seeds"]
    ]
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {
        cell: row
        for cell in cells
        for row in rows
        if (row["name"], row["seed"], row.get("config")) == (cell.name, cell.seed, cell.config())
    }
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(cell.run, runs, threads): cell for cell in cells if cell not in done}
        for future in as_completed(futures):
            done[futures[future]] = future.result()
            with results.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
    return [done[cell] for cell in cells]


def commit() -> str:
    """Return the commit of the code, with a + if files differ from it."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


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
    """Return "mean ± standard deviation", or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs themselves")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, which share the cores")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    results = RESULTS / f"accuracy-{options.grid.stem}.jsonl"
    print(table(run_grid(options.grid, results, options.runs, options.jobs)))


if __name__ == "__main__":
    main()
