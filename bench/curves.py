"""The table and the plot of a grid's rows, mean and standard deviation over seeds; the plot of labels over training."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any


def by_name(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Group rows by the name of the run, in the order of the grid."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of mIoU %, mean ± standard deviation over seeds, and mean seconds."""
    lines = [
        "| run | seeds | mIoU %, last | each seed | mIoU %, best | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, mine in by_name(rows).items():
        last, best = ([100 * row["miou"][key] for row in mine] for key in ("last", "best"))
        seconds = statistics.mean(row["seconds"] for row in mine)
        each = " ".join(f"{value:.1f}" for value in last)
        lines.append(f"| {name} | {len(mine)} | {spread(last)} | {each} | {spread(best)} | {seconds:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return "mean ± standard deviation", or the value alone where there is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def band(curves: list[list[list[float]]]) -> tuple[list[float], list[float], list[float]]:
    """Return the steps that all curves ``[[step, value], ...]`` have, and mean and standard deviation there."""
    values = [dict(map(tuple, curve)) for curve in curves]
    steps = sorted(set.intersection(*map(set, values)))
    columns = [[curve[step] for curve in values] for step in steps]
    means = [statistics.mean(column) for column in columns]
    return steps, means, [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]


def plot(rows: list[dict[str, Any]], path: Path) -> Path | None:
    """Draw mIoU over steps, a line and a band of one standard deviation for each run, to ``path``.

    Returns None where matplotlib, of the extra ``bench``, is not installed, or where no row has curves.
    """
    groups = by_name([row for row in rows if row.get("curves", {}).get("mIoU")])
    axes = new_axes("mean over seeds and one standard deviation") if groups else None
    if axes is None:
        return None
    for index, (name, mine) in enumerate(groups.items()):
        steps, means, deviations = band([row["curves"]["mIoU"] for row in mine])
        style = "-" if index < 10 else "--"  # there are ten colours
        (line,) = axes.plot(steps, [100 * mean for mean in means], style, label=f"{name} ({len(mine)})")
        low, high = (
            [100 * (mean + sign * width) for mean, width in zip(means, deviations, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return save(axes, path)


def plot_labels(rows: list[dict[str, Any]], path: Path) -> Path | None:
    """Draw mIoU of the labels that each part would make over the steps of a run, to ``path``.

    Args:
        rows: lines of ``bench.label_quality`` of one run.
        path: of the picture.

    Returns None where matplotlib is not installed.
    """
    axes = new_axes("pseudo labels against hidden masks")
    if axes is None:
        return None
    steps = [row["step"] for row in rows]
    told = {"": ("predicted classes", ":"), ", excluded": ("true classes, all others ruled out", "-")}
    for index, part in enumerate(("decoder", "sgc", "fused")):
        for suffix, (meaning, style) in told.items():
            values = [100 * row[part + suffix]["miou"] for row in rows]
            name = f"{'SGC' if part == 'sgc' else part}, {meaning}"
            axes.plot(steps, values, style, color=f"C{index}", label=name)
    return save(axes, path)


def new_axes(title: str) -> Any:
    """Return axes of mIoU over steps, or None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    axes = Figure(figsize=(8, 5), layout="constrained").subplots()
    axes.set(xlabel="step", ylabel="mIoU %", title=title)
    axes.grid(alpha=0.3)
    return axes


def save(axes: Any, path: Path) -> Path:
    """Write the figure of ``axes`` as a PNG and return its path."""
    axes.figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")
    axes.figure.savefig(path, dpi=120, metadata={"Software": None})
    return path
