"""Compare methods over seeds: one training process per cell of a grid.

python -m bench.accuracy bench/grids/demo.yaml [--jobs 2]

A grid file has ``seeds`` and ``runs``, a name and the options of ``pseudoseg_fast.train`` for each row, and perhaps
``common`` options; environment variables are filled in. Every finished run adds a line of JSON to
``bench/results/accuracy-GRID.jsonl``: its resolved configuration, the commit, seconds, scores and the log's curves.
Called again, only runs whose configuration is not there are made, and one that was cut off goes on from its last
checkpoint. A run that fails does not stop the others. On a GPU, ``--jobs`` puts that many short runs side by side.

At the end there is a table, mean and standard deviation over seeds ("last" is the figure to trust, "best" was chosen
on the val pictures themselves), and, where matplotlib is installed, a plot of the curves beside the JSON lines.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from bench import curves
from pseudoseg_fast.config import from_dict, parse_config, to_dict
from pseudoseg_fast.run_state import FREE_ON_RESUME

RESULTS = Path(__file__).parent / "results"
SUPERVISED = {"name", "align_corners", "ema", "class_weight", "weight_dice"}
"""Options of the method that a supervised run has use for."""
UNSUPERVISED = {
    *("data.unlabeled", "data.tags", "data.color_jitter", "data.cutout"),
    *("optim.unlabeled_batch_size", "optim.sgc_lr"),
}
"""Other options that it has none for."""
DEFAULTS = to_dict(from_dict({"data": {"root": ""}}))


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
        """Return the resolved configuration, without what changes no result.

        Not to be called beside other threads: while a file is parsed, its folder is the working directory.
        """
        return decisive(to_dict(parse_config(self.arguments, "bench.accuracy", "")))

    def run(self, config: dict[str, dict[str, Any]], runs: Path, threads: int) -> dict[str, Any]:
        """Train in a process of its own and return its result; folder and log stay in ``runs``.

        Args:
            config: of this cell.
            runs: folder for all runs.
            threads: of the process.

        Raises:
            RuntimeError: the process failed, or was stopped.
        """
        folder = runs / "-".join([self.grid, *re.findall(r"[a-z0-9]+", self.name.lower()), str(self.seed)])
        resumed = begun(folder, config)
        command = [sys.executable, "-m", "pseudoseg_fast.train", *self.arguments, "--run.dir", str(folder)]
        command += ["--run.resume", "auto"] if resumed else ["--run.overwrite", "true"]
        print(f"{self.name}, seed {self.seed}: {folder}{', going on' if resumed else ''}", flush=True)
        with folder.with_suffix(".log").open("a" if resumed else "w") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            process = subprocess.run(command, stdout=log, stderr=log, env=environment)
        if process.returncode:
            raise RuntimeError(f"ended with {process.returncode}; see {log.name}")
        return {
            **asdict(self),
            "config": config,
            "commit": commit(),
            **json.loads((folder / "result.json").read_text()),
            "curves": read_curves(folder / "log" / "metrics.csv"),
            "threads": threads,
            "torch": torch.__version__,
            "machine": machine(),
        }


def decisive(config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what of a configuration decides its result."""
    unused = FREE_ON_RESUME
    if config["method"]["name"] == "supervised":
        unused = unused | UNSUPERVISED | {f"method.{name}" for name in config["method"].keys() - SUPERVISED}
    return {
        group: {name: value for name, value in values.items() if f"{group}.{name}" not in unused}
        for group, values in config.items()
    }


def same(row: dict[str, Any], cell: Cell) -> bool:
    """Whether ``row`` is the result of ``cell``; an option younger than the row had its default in it."""
    if (row["name"], row["seed"]) != (cell.name, cell.seed) or "config" not in row:
        return False
    filled = {group: {**DEFAULTS[group], **row["config"].get(group, {})} for group in DEFAULTS}
    return decisive(filled) == cell.config()


def begun(folder: Path, config: dict[str, dict[str, Any]]) -> bool:
    """Whether ``folder`` holds a checkpoint of a run of this configuration, to go on with."""
    saved = folder / "config.yaml"
    if not (folder / "checkpoints" / "last.ckpt").exists() or not saved.exists():
        return False
    return decisive(yaml.safe_load(saved.read_text())) == config


def read_curves(path: Path) -> dict[str, list[list[float]]]:
    """Return ``[[step, value], ...]`` of mIoU and of each loss from a run's log, values to four digits."""
    found: dict[str, list[list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                name = column.split("/")[-1]
                if value and (column == "eval/mIoU" or column.startswith("train/L_")):
                    found.setdefault(name, []).append([int(row["step"]), float(f"{float(value):.4g}")])
    return found


def read_cells(path: Path) -> list[Cell]:
    """Return the runs of a grid in its order."""
    grid = yaml.safe_load(path.read_text())
    common = grid.get("common", "")
    return [
        Cell(path.stem, name, seed, f"{common} {options}".strip())
        for name, options in grid["runs"].items()
        for seed in grid["seeds"]
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the results that there are; a last line that was cut off while it was written is taken off the file."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        del lines[-1]
    return [json.loads(line) for line in lines]


def run_grid(
    path: Path, results: Path, runs: Path, jobs: int = 1, threads: int | None = None, only: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run what ``results`` does not have yet; return the rows that there are, and what failed.

    Args:
        path: of the grid.
        results: JSON lines.
        runs: folder for the runs themselves.
        jobs: how many run side by side.
        threads: of each; None shares the cores among the jobs.
        only: regular expression; rows whose name has no match of it are not run.

    Raises:
        ValueError: what is to be run names environment variables that are not set.
    """
    cells = read_cells(path)
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(results)
    done = {cell: row for cell in cells for row in rows if same(row, cell)}
    failures = []
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    missing = [cell for cell in cells if cell not in done and re.search(only, cell.name)]
    unset = {name for cell in missing for name in re.findall(r"\$\{(\w+)\}", " ".join(cell.arguments))}
    if unset:
        raise ValueError(
            f"{path} needs the environment variables {', '.join(sorted(unset))}; its head says for what"
        )
    pool = ThreadPoolExecutor(jobs)
    futures = {
        pool.submit(cell.run, config, runs, threads): cell
        for cell, config in [(cell, cell.config()) for cell in missing]
    }
    try:
        for future in as_completed(futures):
            try:
                done[futures[future]] = row = future.result()
            except (RuntimeError, OSError, ValueError) as error:  # the last two: it left no whole result
                failures.append(f"{futures[future].name}, seed {futures[future].seed}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    finally:
        # After Ctrl-C, which the running processes got, too: they save and stop, and no other begins.
        pool.shutdown(cancel_futures=True)
    return [done[cell] for cell in cells if cell in done], failures


def commit() -> str:
    """Return the commit, with a + if the package's code differs from it; "unknown" outside of a repository."""
    git = ["git", "-C", str(RESULTS.parent.parent)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "diff", "--quiet", "HEAD", "--", "pseudoseg_fast", "csrc", "kernels"]
    ).returncode
    return head + ("+" if changed else "") if head else "unknown"


def machine() -> str:
    """Return what the runs ran on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} x {platform.machine()}"


def main() -> int:
    """Run the command line; return 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the runs themselves")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument(
        "--threads", type=int, help="threads of each run; by default the jobs share the cores"
    )
    parser.add_argument("--only", default="", help="run only rows whose name matches this regular expression")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    results = RESULTS / f"accuracy-{options.grid.stem}.jsonl"
    try:
        rows, failures = run_grid(
            options.grid, results, options.runs, options.jobs, options.threads, options.only
        )
    except ValueError as error:
        parser.error(str(error))
    print(curves.table(rows))
    if written := curves.plot(rows, results.with_suffix(".png")):
        print(written)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
