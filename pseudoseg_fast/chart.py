"""Curves as SVG inside HTML: no script, and colours from the page's style, so that it may be light or dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24
"""Margins of the axes, in units of the drawing."""
MOST_POINTS = 240
MARKED = 40
"""A curve of at most so many points has a mark on each, which tells its values."""
STYLE = """
.chart { margin: 0; }
.chart figcaption { font-weight: 600; }
.chart svg { display: block; width: 100%; height: auto; }
.chart text { fill: var(--dim); font-size: 13px; }
.chart .grid { stroke: var(--line); }
.chart path { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.chart .keys {
  display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; padding: 0; list-style: none; font-size: .875rem;
}
.chart .keys li::before {
  content: ""; display: inline-block; width: 1rem; height: .2rem; margin-right: .35rem; vertical-align: middle;
  background: var(--curve);
}
.c0 { --curve: var(--c0); } .c1 { --curve: var(--c1); } .c2 { --curve: var(--c2); } .c3 { --curve: var(--c3); }
.c4 { --curve: var(--c4); } .c5 { --curve: var(--c5); }
.chart path, .chart circle { stroke: var(--curve); }
.chart circle { fill: var(--curve); }
"""
"""Wants --dim, --line and --c0 to --c5 of the page."""


def line_chart(title: str, curves: Mapping[str, Points]) -> str:
    """Draw curves over the step; both axes begin at 0.

    Values that are not finite are left out, and of long curves means of neighbours are drawn.

    Args:
        title: of the whole.
        curves: (step, value) in the order of steps, by name; values are not negative.

    Returns:
        An HTML ``figure``.
    """
    kept = {
        name: thin([point for point in points if math.isfinite(point[1])]) for name, points in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>nothing logged yet</figure>'
    right = max(points[-1][0] for points in kept.values())
    columns = ticks(right)
    rows = ticks(max(value for points in kept.values() for _, value in points))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(right, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / rows[-1]

    parts = []
    for value in rows:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for step in columns:
        if step <= right:
            anchor = "end" if x(step) > WIDTH - 24 else "middle"
            parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{step:.6g}</text>')
    parts.append(f'<text x="{LEFT - 12}" y="{HEIGHT - 7}" text-anchor="end">step</text>')
    keys = []
    for index, (name, points) in enumerate(kept.items()):
        color = f"c{index % 6}"
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        parts.append(f'<path class="{color}" d="M{path}"/>')
        if len(points) <= MARKED:
            parts += [
                f'<circle class="{color}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="2">'
                f"<title>{escape(name)} {value:.4g}, step {step:.6g}</title></circle>"
                for step, value in points
            ]
        keys.append(f'<li class="{color}">{escape(name)} {points[-1][1]:.4g}</li>')
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>\n<ul class="keys">{"".join(keys)}</ul>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over the step">\n'
        + "\n".join(parts)
        + "\n</svg></figure>"
    )


def ticks(largest: float) -> list[float]:
    """Return three to six round numbers from 0 to at least ``largest``, which is not negative, at equal distances."""
    if largest <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(largest / 5))
    step = next(power * factor for factor in (1, 2, 5, 10) if largest <= 5 * power * factor * (1 + 1e-9))
    return [step * index for index in range(math.ceil(largest / step - 1e-9) + 1)]


def thin(points: Points) -> Points:
    """Return at most ``MOST_POINTS`` points: means of as many runs of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(step for step, _ in group) / len(group), sum(value for _, value in group) / len(group))
        for group in groups
    ]
