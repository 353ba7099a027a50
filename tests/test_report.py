"""The report of runs at every age, and of folders that are none."""

import html.parser
import json
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from pseudoseg_fast import chart, report
from pseudoseg_fast.run_record import read_run

NASTY = "<script>alert(\"1\")</script> & 'co'"
CLASSES = [
    {"name": "sky", "color": [1, 2, 3], "labelled_pixels": 30, "labelled_pictures": 3, "val_pixels": 10},
    {"name": NASTY, "color": [4, 5, 6], "labelled_pixels": 10, "labelled_pictures": 1, "val_pixels": 30},
]
LOG = f"""\
eval/mIoU,"eval/{NASTY.replace('"', '""')}_IoU",eval/sky_IoU,step,train/L_s,train/L_u,train/images_per_second,train/lr
,,,10,1.5,,4.0,0.1
0.5,0.4,0.6,10,,,,
,,,20,1.0,0.25,5.0,0.05
0.45,nan,0.45,20,,,,
,,,30,0.5,0.125,6.0,0.01
"""


class Page(html.parser.HTMLParser):
    """The text of a page, its tags, and the text of its table cells, row by row; tags must be closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def folder(tmp_path):
    """A run that was killed before its log began."""
    folder = tmp_path / NASTY.replace("/", "|")
    folder.mkdir()
    config = {
        "data": {"root": NASTY},
        "model": {"arch": "Unet", "encoder_name": "resnet18"},
        "method": {"name": "pseudoseg"},
        "optim": {"steps": 40},
        "run": {"precision": "32-true"},
    }
    about = {
        "root": f"/{NASTY}",
        "pictures": {"labelled": 4, "unlabelled": 9, "tagged": 0, "val": 2},
        "classes": CLASSES,
        "device": "cpu",
        "processes": 2,
        "environment": {"machine": {"system": NASTY}, "versions": {"torch": "2.10"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def made(folder, capsys):
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    return Page((folder / "report.html").read_text())


def write_log(folder, text):
    (folder / "log").mkdir()
    (folder / "log" / "metrics.csv").write_text(text)


def test_a_run_that_has_logged_nothing(folder, capsys):
    page = made(folder, capsys)
    assert "not finished: step 0 of 40" in page.text
    assert page.text.count("nothing logged yet") == 3
    assert "Not evaluated yet." in page.text
    assert ["sky", "25.00", "75.00", "3"] in page.rows
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_goes_on(folder, capsys):
    write_log(folder, LOG + ",,,40,0.12")  # a line that is being written
    page = made(folder, capsys)
    assert "not finished: step 30 of 40, last logged" in page.text
    assert page.rows[0][:3] == ["class", "IoU %, best (step 10)", "IoU %, last (step 20)"]
    assert ["sky", "60.00", "45.00", "25.00", "75.00", "3"] in page.rows
    assert [NASTY, "40.00", "–", "75.00", "25.00", "1"] in page.rows
    assert ["mIoU", "50.00", "45.00", "", "", ""] in page.rows
    assert "L_s 0.5L_u 0.125" in page.text
    assert "6images/s" in page.text


def test_lines_of_a_log_that_are_no_rows_are_passed_over(folder, capsys):
    write_log(folder, LOG + ",,,40,many,,,\n,,,41,1,2,3,4,5\n,,,42\n")
    page = made(folder, capsys)
    assert "not finished: step 30 of 40, last logged" in page.text


def test_a_finished_run_has_its_newest_pictures(folder, capsys):
    write_log(folder, LOG)
    (folder / "result.json").write_text(json.dumps({"miou": {"best_step": 10}}))
    (folder / "pictures").mkdir()
    for step in (9, 999_999, 1_000_000):
        Image.new("RGB", (step % 7 + 1, 1)).save(folder / "pictures" / f"step_{step:06}.png")
    page = made(folder, capsys)
    assert "finished, 40 steps" in page.text
    (shown,) = page.of("img")
    assert shown["alt"] == "Val pictures as unlabelled ones, step 1000000"


def test_names_are_text_and_the_page_needs_nothing_else(folder, capsys):
    write_log(folder, LOG)
    page = made(folder, capsys)
    text = (folder / "report.html").read_text()
    assert not page.of("script")
    assert "<script" not in text
    assert page.text.count(NASTY) >= 3
    policy = page.of("meta")[2]["content"]
    for rule in ("default-src 'none'", "base-uri 'none'", "form-action 'none'"):
        assert rule in policy
    assert not re.search(r"https?:|url\(|@import", text)
    assert not [name for _, attributes in page.tags for name in attributes if name in ("href", "onload")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: folder / "none", "there is no folder"),
        (
            lambda folder: folder.parent,
            "holds no config.yaml and no run.json; expected a training's --run.dir",
        ),
        (lambda folder: (folder / "run.json").write_text("{") and folder, "run.json is damaged"),
        (lambda folder: (folder / "run.json").write_bytes(b"\xff") and folder, "run.json is damaged"),
        (lambda folder: (folder / "config.yaml").write_text("a: [") and folder, "config.yaml is damaged"),
    ],
    ids=["no folder", "another folder", "torn", "no text", "no YAML"],
)
def test_what_is_no_run_is_refused(folder, capsys, spoil, message):
    with pytest.raises(SystemExit) as end:
        report.main([str(spoil(folder))])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def set_entry(values, path, value):
    """Set an entry of nested values, or delete it if ``value`` is None."""
    *parents, last = path
    for key in parents:
        values = values[key]
    if value is None:
        del values[last]
    else:
        values[last] = value


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("run.json", ["pictures"], {}, "pictures.labelled is missing"),
        ("run.json", ["pictures", "val"], "<b>2", "pictures.val must be an integer, got '<b>2'"),
        ("run.json", ["pictures"], None, "pictures is missing"),
        ("run.json", ["root"], 3, "root must be text, got 3"),
        ("run.json", ["classes"], {}, "classes must be a list, got {}"),
        ("run.json", ["classes", 1, "name"], None, "classes[1].name is missing"),
        ("run.json", ["classes", 0, "color"], [1, 2], "classes[0].color must have 3 entries, got [1, 2]"),
        ("run.json", ["classes", 0, "color", 2], "red", "classes[0].color[2] must be an integer, got 'red'"),
        ("run.json", ["environment", "machine"], None, "environment.machine is missing"),
        ("config.yaml", ["optim", "steps"], 0.5, "optim.steps must be an integer, got 0.5"),
        ("config.yaml", ["model"], None, "model is missing"),
    ],
)
def test_a_record_that_lacks_something_is_refused_by_its_name(folder, capsys, file, path, value, message):
    values = yaml.safe_load((folder / file).read_text())  # JSON is YAML
    set_entry(values, path, value)
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(SystemExit) as end:
        report.main([str(folder)])
    assert end.value.code == 2
    expected = f"{folder / file} is damaged, or not from a training: {message}\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("value", [[], None, "text"], ids=str)
def test_a_record_of_another_kind_is_refused(folder, value):
    (folder / "run.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"run.json is damaged.*: the whole must be a mapping, got"):
        read_run(folder)


def test_a_report_needs_no_torch():
    """Which takes seconds to import, and may not be where a run is looked at."""
    program = "import sys; sys.modules['torch'] = None; import pseudoseg_fast.report"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0, [0, 1]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1.01, [0, 0.5, 1, 1.5]),
        (30_000, [0, 10_000, 20_000, 30_000]),
        (4e-5, [0, 1e-5, 2e-5, 3e-5, 4e-5]),
        (3, [0, 1, 2, 3]),
    ],
)
def test_ticks_are_round_and_reach_the_largest(largest, expected):
    assert chart.ticks(largest) == pytest.approx(expected)


def test_long_curves_become_means_of_neighbours():
    points = [(step, 2.0 * step) for step in range(10_001)]
    thinned = chart.thin(points)
    assert 200 < len(thinned) <= chart.MOST_POINTS
    assert all(value == pytest.approx(2 * step) for step, value in thinned)
    assert sum(1 for _ in chart.thin(points[:240])) == 240


def test_a_curve_is_drawn_where_its_values_are():
    nan = float("nan")
    page = Page(chart.line_chart("loss", {"a": [(0, 0.0), (50, nan), (100, 1.0)], "b": [(50, nan)], "c": []}))
    (path,) = page.of("path")
    bottom, right = chart.HEIGHT - chart.BOTTOM, chart.WIDTH - chart.RIGHT
    assert path["d"] == f"M{chart.LEFT:.1f} {bottom:.1f}L{right:.1f} {chart.TOP:.1f}"
    assert len(page.of("circle")) == 2
    assert page.text.count("nothing logged yet") == 0
