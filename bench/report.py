"""Write every table and plot of the documents from the files in ``bench/results``, so that no figure is typed by hand.

python -m bench.report [--check]

A document marks the place of a table with ``<!-- table: NAME -->`` and ``<!-- end -->``; what is between is replaced.
Plots are PNGs beside the results; they need matplotlib, of the extra ``bench``. ``--check`` writes nothing and ends
with status 1 where a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from bench import curves

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = sorted(
    str(path.relative_to(ROOT)) for folder in ("docs", "bench") for path in (ROOT / folder).glob("*.md")
)
DOCUMENTS = ("README.md", *PAGES)
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Table = Callable[[], list[list[str]]]


def markdown(rows: list[list[str]]) -> str:
    """Return rows, the first of them titles, as a Markdown table."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def results(name: str) -> dict[str, Any]:
    """Return a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def grid_rows(grid: str) -> list[dict[str, Any]]:
    """Return a grid's rows in its order; of rows of one name and seed the last counts."""
    latest = {(row["name"], row["seed"]): row for row in rows_of(f"accuracy-{grid}")}
    path = ROOT / "bench" / "grids" / f"{grid}.yaml"
    if not path.exists():  # a study by hand has none
        return [*latest.values()]
    order = [*yaml.safe_load(path.read_text())["runs"]]
    known = [row for row in latest.values() if row["name"] in order]
    return sorted(known, key=lambda row: (order.index(row["name"]), row["seed"]))


def accuracy(grid: str) -> list[list[str]]:
    """Return mean and spread of each row of a grid."""
    rows = [["run", "mIoU %, last step", "each seed", "mIoU %, best step"]]
    for name, mine in curves.by_name(grid_rows(grid)).items():
        last, best = ([100 * row["miou"][key] for row in mine] for key in ("last", "best"))
        each = " ".join(f"{value:.1f}" for value in last)
        rows.append([name, curves.spread(last), each, curves.spread(best)])
    return rows


OVERVIEW = {
    "satellite tiles, 16 masks": (
        "demo",
        "supervised, 16 masks",
        "PseudoSeg, 16 masks + 332 pictures",
        "PseudoSeg, 16 masks + 332 tagged pictures",
        "supervised, 332 masks",
    ),
    **{
        f"photographs of people, {masks} masks": (
            "ccp",
            f"supervised, {masks} masks",
            f"preset untagged, {masks} masks + 1094 pictures",
            f"preset tagged, {masks} masks + 1094 tagged pictures",
            "supervised, 604 masks",
        )
        for masks in (25, 50, 100)
    },
    "photographs of people, 50 masks, 1000 steps": (
        "ccp",
        "supervised, 50 masks, 1000 steps",
        "preset untagged, 50 masks + 1094 pictures, 1000 steps",
        "preset tagged, 50 masks + 1094 tagged pictures, 1000 steps",
        "supervised, 604 masks, 1000 steps",
    ),
    **{
        f"streets, {masks} masks": (
            "camvid-small",
            f"supervised, {masks} masks",
            f"preset camvid, {masks} masks",
            None,
            "supervised, 367 masks",
        )
        for masks in (23, 46, 92)
    },
}
"""The rows of the overview: title, grid, and for each column the name of the grid's row, None where there is none."""


def overview() -> list[list[str]]:
    """Return what unlabelled pictures bring without and with tags, a row for each set and number of masks."""
    rows = [["set", "masks alone", "and pictures", "and tagged pictures", "masks of all"]]
    for title, (grid, *names) in OVERVIEW.items():
        runs = curves.by_name(grid_rows(grid))
        scores = [[100 * row["miou"]["last"] for row in runs[name]] if name else None for name in names]
        rows.append([title, *(curves.spread(each) if each else "-" for each in scores)])
    return rows


def labels(name: str) -> list[list[str]]:
    """Return the quality of pseudo labels, by the part that makes them and by what it is told."""
    told = {"": "predicted", ", tags": "true", ", excluded": "true, all others ruled out"}
    rows = [["run, step", "image-level labels", "decoder", "SGC", "fused", "fused above 0.7: share, right"]]
    for row in rows_of(f"labels-{name}"):
        for suffix, meaning in told.items():
            mious = [f"{100 * row[part + suffix]['miou']:.1f}" for part in ("decoder", "sgc", "fused")]
            share, right = (f"{100 * value:.0f} %" for value in row["fused" + suffix]["above"]["0.7"])
            rows.append([f"{row['run']}, {row['step']}", meaning, *mious, f"{share}, {right}"])
    return rows


def kernels(size: str) -> list[list[str]]:
    """Return the kernels against PyTorch at one of the benchmark's sizes on the CPU."""
    rows = [
        [
            "function",
            "eager ms",
            "compile ms",
            "C++ ms",
            "times faster than the better",
            "extra MiB, eager / C++",
        ]
    ]
    for row in results("functional_cpu")["comparison"]:
        times, memory = row["milliseconds"], row["extra_mebibytes"]
        if row["size"] == size and "native" in times:
            figures = [f"{times[name]:.1f}" for name in ("eager", "compile", "native")]
            extra = f"{memory['eager']:.0f} / {memory['native']:.1f}"
            rows.append([row["function"], *figures, f"{row['ratio']:.1f}", extra])
    return rows


def floors() -> list[list[str]]:
    """Return how far the kernels are from what bounds them."""
    rows = [["function", "floor ms", "kernel ms", "times the floor"]]
    for row in results("functional_cpu")["comparison"]:
        if row["size"] == "voc_full" and "native" in row["milliseconds"]:
            kernel, floor = row["milliseconds"]["native"], row["floor_milliseconds"]
            rows.append([row["function"], f"{floor:.2f}", f"{kernel:.1f}", f"{kernel / floor:.1f}"])
    return rows


def depthwise_gpu() -> list[list[str]]:
    """Return parts of depthwise convolutions against PyTorch on a GPU."""
    rows = [["layer", "part", "channels-last ms", "others ms", "Triton ms", "times faster than the better"]]
    for row in results("gpu/depthwise")["parts"]:
        times = [row[name] for name in ("channels-last", "others", "kernels")]
        ratio = min(times[:2]) / times[2]
        rows.append([row["layer"], row["part"], *(f"{ms:.3f}" for ms in times), f"{ratio:.1f}"])
    return rows


def depthwise() -> list[list[str]]:
    """Return depthwise convolutions against PyTorch on the CPU."""
    rows = [["layer", "eager ms", "compile ms", "C++ ms", "times faster than the better", "times the floor"]]
    for row in results("depthwise_cpu")["comparison"]:
        times = row["milliseconds"]
        figures = [f"{times[name]:.1f}" for name in ("eager", "compile", "native")]
        rows.append(
            [
                row["size"],
                *figures,
                f"{row['ratio']:.1f}",
                f"{times['native'] / row['floor_milliseconds']:.1f}",
            ]
        )
    return rows


def steps() -> list[list[str]]:
    """Return what training steps are made of, in every loop."""
    rows = [
        ["step", "loop", "ms", "losses ms", "update ms", "both", "images/s", "times research", "peak MiB"]
    ]
    for row in results("train_step_cpu")["steps"]:
        times = row["times research"]
        rows.append(
            [
                row["run"],
                row["loop"],
                f"{row['step ms']:.0f}",
                f"{row['losses ms']:.1f}",
                f"{row['update ms']:.1f}",
                f"{row['outside %']:.1f} %",
                f"{row['images/s']:.1f}",
                "-" if times is None else f"{times:.2f}",
                f"{row['peak MiB']:.0f}",
            ]
        )
    return rows


def onnx() -> list[list[str]]:
    """Return what it takes from pictures to labels."""
    titles = ("eager", "compile", "ONNX Runtime fp32", "of it without Resize and ArgMax", "int8")
    rows = [["encoder, pictures", *titles]]
    for name in ("onnx_cpu", "onnx_cpu_batch8", "onnx_cpu_1024x2048"):
        for row in results(name)["inference"]:
            size, batch = row["size"].split(" x ")
            rows.append(
                [
                    f"{row['encoder'].removeprefix('tf_')}, {batch} of {size}",
                    f"{row['eager']:.0f}",
                    f"{row['compile']:.0f}",
                    f"{row['ort']:.0f} ({row['ort ratio']:.1f}x of eager)",
                    f"{row['ort_core']:.0f}",
                    f"{row['ort_int8']:.0f} ({row['ort_int8 ratio']:.1f}x)",
                ]
            )
    return rows


def protocols() -> list[list[str]]:
    """Return what the published protocols would take."""
    rows = [
        [
            "preset",
            "crop",
            "parameters, M",
            "TFLOP a step",
            "pictures a step",
            "in passes of",
            "fit 80 GB",
            "steps",
            "GPU-hours",
        ]
    ]
    for row in results("protocols")["rows"]:
        rows.append(
            [
                row["preset"],
                str(row["crop"]),
                f"{row['parameters, millions']:.0f}",
                f"{row['TFLOP a step']:.0f}",
                *(f"{row[key]} + {row[key]}" for key in ("pictures a step", "pictures a pass")),
                f"{row['batch that fits']} + {row['batch that fits']}",
                f"{row['steps']:,}",
                f"{row['GPU-hours']:.1f}",
            ]
        )
    return rows


def reading() -> list[list[str]]:
    """Return what a worker's time goes to, and how many pictures it gives."""
    stages = ("decode picture", "decode mask", "scale", "jitter")
    rows = [
        ["set, crop", "pictures/s", *(f"{stage}, ms" for stage in stages), "rest, ms", "pictures/s before"]
    ]
    before = results("data_cpu_before")["rows"]
    for row, old in zip(results("data_cpu")["rows"], before, strict=True):
        taken = row["milliseconds"]
        cells = [f"{taken[stage]:.1f}" if stage in taken else "-" for stage in stages]
        rest = sum(value for stage, value in taken.items() if stage not in stages)
        rates = [f"{each['pictures_per_second']:.0f}" for each in (row, old)]
        rows.append([f"{row['set']} {row['crop']}, {row['kind']}", rates[0], *cells, f"{rest:.1f}", rates[1]])
    return rows


def pools() -> list[list[str]]:
    """Return how long it takes to open a large pool."""
    rows = [["pool", "pictures", "first, s", "again, s"]]
    for row in results("pool")["rows"]:
        rows.append(
            [f"`{row['pool']}`", f"{row['pictures']:,}", f"{row['first']:.1f}", f"{row['again']:.2f}"]
        )
    return rows


TABLES: dict[str, Table] = {
    **{
        path.stem: partial(accuracy, path.stem.removeprefix("accuracy-"))
        for path in RESULTS.glob("accuracy-*.jsonl")
    },
    "overview": overview,
    "labels-ccp": lambda: labels("ccp"),
    "kernels": partial(kernels, "voc_full"),
    "kernels-label": partial(kernels, "voc_label"),
    "floors": floors,
    "depthwise": depthwise,
    "depthwise-gpu": depthwise_gpu,
    "steps": steps,
    "onnx": onnx,
    "protocols": protocols,
    "reading": reading,
    "pools": pools,
}


NOT_DRAWN = r"\b(25|100) masks|1000 steps|Dice twice"
"""Rows of the grid ccp for which its plot has no room."""
PLOTS: dict[str, Callable[[Path], Path | None]] = {
    "accuracy-demo": lambda path: curves.plot(grid_rows("demo"), path),
    "accuracy-ccp": lambda path: curves.plot(
        [row for row in grid_rows("ccp") if not re.search(NOT_DRAWN, row["name"])], path
    ),
    "labels-demo": lambda path: curves.plot_labels(rows_of("labels-demo"), path),
}


def fill(text: str) -> str:
    """Return a document with the tables that its marks name.

    Raises:
        ValueError: a mark names no table.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"a mark names the table {match[2]!r}; there are {', '.join(TABLES)}")
        return match[1] + markdown(TABLES[match[2]]()) + match[3]

    return MARKED.sub(table, text)


def main() -> int:
    """Run the command line; return 1 if ``--check`` finds a table that is not what the results say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check = parser.parse_args().check
    wrong = []
    for path in (ROOT / name for name in DOCUMENTS):
        text = path.read_text()
        filled = fill(text)
        if filled != text:
            wrong.append(path.name)
            if not check:
                path.write_text(filled)
    if not check:
        for name, draw in PLOTS.items():
            print(
                draw(RESULTS / f"{name}.png")
                or f"{name}.png not drawn: needs rows with curves, and matplotlib (extra bench)"
            )
    if check and wrong:
        print(
            f"{', '.join(wrong)}: tables differ from bench/results; run python -m bench.report",
            file=sys.stderr,
        )
    return int(check and bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
