"""How long does it take to start on a large pool of unlabelled pictures, and how much memory does a worker need?

python -m bench.bench_pool --output bench/results/pool.json

Makes a folder of empty files, a list of a million of its names, and tar shards; opens each pool as training does, in a
fresh process, first with an empty cache and then with what the first kept. The memory is what a forked worker has of
its own after it has touched every sample once, for our arrays and for a list of ``Sample``.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pseudoseg_fast.data.lists import Sample
from pseudoseg_fast.data.pool import read_unlabeled

PER_FOLDER = 10_000
PER_SHARD = 10_000


def make_files(root: Path, files: int, lines: int) -> None:
    """Write the folder, the list and the shards."""
    for number in range(files):
        folder = root / "pool" / f"{number // PER_FOLDER:04d}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
        (folder / f"{number:09d}.jpg").touch()
    with (root / "list.txt").open("w") as file:
        for number in range(lines):
            file.write(f"pool/{number % files // PER_FOLDER:04d}/{number % files:09d}.jpg\n")
    data = bytes(1000)
    (root / "shards").mkdir()
    for number in range(files // PER_SHARD):
        with tarfile.open(root / "shards" / f"pool-{number:06d}.tar", "w") as shard:
            for index in range(PER_SHARD):
                member = tarfile.TarInfo(f"{number * PER_SHARD + index:09d}.jpg")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function returns in a forked process."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(function(*arguments)))
    process.start()
    result = queue.get()
    process.join()
    return result


def seconds_to_open(name: str, root: Path) -> tuple[float, int]:
    """Return how long it takes to open a pool, and the number of its pictures."""
    began = time.perf_counter()
    samples = read_unlabeled(name, root)
    return time.perf_counter() - began, len(samples)


def private_mebibytes(samples: Sequence[Sample]) -> float:
    """Return what memory a forked worker has of its own after touching all samples, beyond what it has before."""

    def own() -> float:
        fields = dict(
            line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        )
        return int(fields["Private_Dirty"].split()[0]) / 1024

    def touch() -> float:
        before = own()
        for index in range(len(samples)):
            _ = samples[index]
        return own() - before

    return float(in_a_process(touch))


def main() -> None:
    """Measure all pools."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=200_000, help="in the folder and in the shards")
    parser.add_argument("--lines", type=int, default=1_000_000, help="in the list")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["PSEUDOSEG_CACHE"] = str(root / "cache")
        make_files(root, options.files, options.lines)
        time.sleep(3)  # what was changed just now is not kept
        for name in ("pool", "list.txt", "shards/pool-*.tar"):
            first, again = (in_a_process(seconds_to_open, name, root) for _ in range(2))
            rows.append({"pool": name, "pictures": first[1], "first": first[0], "again": again[0]})
            print(rows[-1])
        samples = read_unlabeled("list.txt", root)
        memory = {"arrays": private_mebibytes(samples), "list": private_mebibytes(list(samples))}
        print("private MiB of a worker:", memory)
    if options.output:
        machine = {"cores": os.cpu_count(), "files": options.files}
        options.output.write_text(
            json.dumps({"machine": machine, "rows": rows, "worker_mebibytes": memory}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
