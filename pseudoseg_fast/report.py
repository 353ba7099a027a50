"""Write a run's report.html: curves, classes, pictures, configuration and environment in one file that needs no other.

python -m pseudoseg_fast.report RUN

The run may be finished, stopped, killed or still going: the report shows what it has written so far.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

import yaml

from pseudoseg_fast import chart
from pseudoseg_fast.run_record import Row, Run, read_run
from pseudoseg_fast.whole_file import replace_text

REPORT = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

STYLE = """
:root {
  color-scheme: light dark; --back: #fbfbf9; --text: #1d1f21; --dim: #63676b; --line: #dcdcd6; --panel: #fff;
  --c0: #2668b8; --c1: #d2601a; --c2: #188448; --c3: #8854b0; --c4: #b0303a; --c5: #7a6a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --text: #e6e6e3; --dim: #9a9ea3; --line: #33373c; --panel: #1d2024;
    --c0: #6ea8ee; --c1: #f09a5c; --c2: #5cc48c; --c3: #c49ae8; --c4: #f0808a; --c5: #d6c450;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; font: 16px/1.45 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; }
.dim { color: var(--dim); }
.figures { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0; }
.figures div { min-width: 7rem; }
.figures b { display: block; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.charts > *, .scroll, pre {
  background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .75rem;
}
.scroll { overflow-x: auto; }
.scroll img { display: block; min-width: 44rem; max-width: 100%; border-radius: 3px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .75rem .2rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child, .facts td { text-align: left; }
th:first-child, td:first-child { min-width: 8rem; max-width: 16rem; overflow-wrap: break-word; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--panel); }
.facts td + td { overflow-wrap: anywhere; }
thead th { color: var(--dim); font-weight: 400; font-size: .875rem; vertical-align: bottom; }
tbody td { border-top: 1px solid var(--line); }
tfoot td { border-top: 2px solid var(--line); font-weight: 600; }
.swatch { display: inline-block; width: .9rem; height: .9rem; margin-right: .5rem; vertical-align: -.1rem;
  border: 1px solid var(--dim); border-radius: 2px; }
pre { overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run; return its path.

    Raises:
        ValueError, OSError: see :func:`read_run`; or the file cannot be written, and the former one is intact.
    """
    path = folder / REPORT
    replace_text(path, render(read_run(folder)))
    return path


def render(run: Run) -> str:
    """Return the report: an HTML page that loads nothing and runs no script."""
    name = escape(run.folder.resolve().name)
    sections = [
        heading(run),
        f"<h2>Curves</h2>\n{curves(run)}",
        f"<h2>Classes</h2>\n{class_table(run)}",
        *pictures(run),
        "<h2>Configuration</h2>\n<details><summary>config.yaml</summary>"
        f"<pre>{escape(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))}</pre></details>",
        f"<h2>Environment</h2>\n{environment(run)}",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{name}: pseudoseg_fast</title>\n<style>{STYLE}{chart.STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def heading(run: Run) -> str:
    """Return the run's name, what it learns from, how far it is, and its main figures."""
    config, counts = run.config, run.about["pictures"]
    tagged = f" ({counts['tagged']} tagged)" if counts["tagged"] else ""
    total = config["optim"]["steps"]
    if run.finished:
        state = f"finished, {total} steps"
    else:
        written = f", last logged {time.ctime(run.log.stat().st_mtime)}" if run.rows else ""
        state = f"not finished: step {run.steps} of {total}{written}"
    figures = [
        (f"mIoU %, {name}, step {row['step']:.0f}", f"{100 * row['eval/mIoU']:.2f}")
        for name, row in scored(run)
    ]
    if (seconds := run.last("train/seconds")) is not None:
        figures.append(("of training", duration(seconds)))
    if (rate := run.last("train/images_per_second")) is not None:
        figures.append(("images/s", f"{rate:.3g}"))
    if (memory := run.last("train/memory_MiB")) is not None:
        figures.append(("MiB at the peak", f"{memory:.0f}"))
    if skipped := run.last("train/skipped_steps"):
        figures.append(("steps left out", f"{skipped:.0f}"))
    boxes = "".join(f'<div><b>{value}</b><span class="dim">{label}</span></div>' for label, value in figures)
    return (
        f"<h1>{escape(run.folder.resolve().name)}</h1>\n"
        f"<p>{escape(config['method']['name'])}: {escape(config['model']['arch'])} with "
        f"{escape(config['model']['encoder_name'])} on {counts['labelled']} labelled and {counts['unlabelled']} "
        f"unlabelled pictures{tagged}, {counts['val']} for validation, from {escape(run.about['root'])}</p>\n"
        f'<p class="dim">{escape(state)}</p>\n<div class="figures">{boxes}</div>'
    )


def scored(run: Run) -> list[tuple[str, Row]]:
    """Return the evaluations that count: "best" and "last"; none before the first.

    The best is what the run says at its end, for it may have been chosen anew since the highest mIoU, on other val
    pictures; until then, that of the highest.
    """
    rows = [row for row in run.evaluations if not math.isnan(row["eval/mIoU"])]
    if not rows:
        return []
    result = run.folder / "result.json"
    step = json.loads(result.read_text())["miou"]["best_step"] if result.is_file() else None
    best = max(rows, key=lambda row: (row["step"] == step, row["eval/mIoU"]))
    return [("best", best), ("last", rows[-1])]


def curves(run: Run) -> str:
    """Return the charts: losses, mIoU, learning rate."""
    losses = list(dict.fromkeys(name for row in run.rows for name in row if name.startswith("train/L_")))
    charts = [
        chart.line_chart("losses", {name.removeprefix("train/"): run.curve(name) for name in losses}),
        chart.line_chart("mIoU %", {"mIoU %": run.curve("eval/mIoU", 100)}),
        chart.line_chart("learning rate", {"lr": run.curve("train/lr")}),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def class_table(run: Run) -> str:
    """Return the table of classes: IoU, pixels and labelled pictures."""
    evaluations = scored(run)
    heads = [
        "class",
        *(f"IoU %, {name} (step {row['step']:.0f})" for name, row in evaluations),
        "% of val pixels",
        "% of labelled pixels",
        "labelled pictures",
    ]
    classes = run.about["classes"]
    totals = {key: max(1, sum(entry[key] for entry in classes)) for key in ("val_pixels", "labelled_pixels")}
    lines = []
    for entry in classes:
        color = "rgb({}, {}, {})".format(*entry["color"])
        cells = [
            f'<span class="swatch" style="background: {color}"></span>{escape(entry["name"])}',
            *(percent(row.get(f"eval/{entry['name']}_IoU", math.nan)) for _, row in evaluations),
            *(percent(entry[key] / total) for key, total in totals.items()),
            str(entry["labelled_pictures"]),
        ]
        lines.append(table_row(cells))
    mean = table_row(["mIoU", *(percent(row["eval/mIoU"]) for _, row in evaluations), "", "", ""])
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>\n'
        f"<tbody>{''.join(lines)}</tbody>\n"
        + (f"<tfoot>{mean}</tfoot>" if evaluations else "")
        + "</table></div>\n"
        + (
            '<p class="dim">The best step was chosen on these same val pictures. – is a class that no val picture '
            "shows: it counts in no mean.</p>"
            if evaluations
            else '<p class="dim">Not evaluated yet.</p>'
        )
    )


def table_row(cells: Iterable[str]) -> str:
    """Return a row of cells that are HTML already."""
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def percent(share: float) -> str:
    """Return a share in percent, a dash for none."""
    return "–" if math.isnan(share) else f"{100 * share:.2f}"


def duration(seconds: float) -> str:
    """Return a duration in words, such as 3 min 43 s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minute} min"
    return f"{minute} min {second} s" if minute else f"{second} s"


def pictures(run: Run) -> list[str]:
    """Return the sections of the newest drawing of val pictures and of the demo's map, where there are any."""
    sections = []
    drawn = {
        int(found.group(1)): path
        for path in run.folder.glob("pictures/*")
        if (found := re.fullmatch(r"step_(\d+)\.png", path.name))
    }
    if drawn:
        newest = max(drawn)
        note = (
            "The decoder's prediction and SGC of the weak view make the fused label, which the strong view learns; its "
            "white pixels teach nothing. Earlier drawings are in the folder pictures."
        )
        sections.append(picture(f"Val pictures as unlabelled ones, step {newest}", drawn[newest], note))
    if (path := run.folder / "map.png").is_file():
        sections.append(picture("Map", path, ""))
    return sections


def picture(title: str, path: Path, note: str) -> str:
    """Return a section with a picture in it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<h2>{escape(title)}</h2>\n<div class="scroll"><img alt="{escape(title)}" '
        f'src="data:image/png;base64,{data}"></div>\n<p class="dim">{escape(note)}</p>'
    )


def environment(run: Run) -> str:
    """Return the table of device, machine and versions."""
    machine, versions = (run.about["environment"][name] for name in ("machine", "versions"))
    entries = {
        "device": run.about["device"],
        "processes": run.about["processes"],
        "precision": run.config["run"]["precision"],
        **machine,
        **versions,
    }
    return f'<div class="scroll"><table class="facts"><tbody>{facts(entries)}</tbody></table></div>'


def facts(entries: Mapping[str, object]) -> str:
    """Return rows of names and values."""
    return "".join(table_row([escape(name), escape(str(value))]) for name, value in entries.items())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; what is no run ends with a message and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m pseudoseg_fast.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="folder of the run, its --run.dir")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.run))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
