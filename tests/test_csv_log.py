"""The CSV log: what it holds after any end, and how it goes on."""

import csv

import pytest
from disk import full_disk

from pseudoseg_fast import csv_log
from pseudoseg_fast.csv_log import CsvLog
from pseudoseg_fast.csv_rows import read_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log" / "metrics.csv"


def numbers(path):
    return [{name: float(value) for name, value in row.items()} for row in read_rows(path)]


def test_rows_are_on_file_at_once_and_columns_grow(path):
    log = CsvLog(path)
    log.log_metrics({"loss": 0.1}, 1)
    assert path.read_text() == "step,loss\n1,0.1\n"
    log.log_metrics({"mIoU": 0.5, "IoU/a, b": float("nan")}, 1)
    log.log_metrics({"loss": 1e-20}, 2)
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "IoU/a, b", "loss", "mIoU"],
            ["1", "", "0.1", ""],
            ["1", "nan", "", "0.5"],
            ["2", "", "1e-20", ""],
        ]
    assert [path.name for path in path.parent.iterdir()] == ["metrics.csv"]


def test_a_new_log_replaces_the_old_and_one_that_goes_on_keeps_what_was_before(path):
    first = CsvLog(path)
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 10}, step)
    second = CsvLog(path)
    second.go_on(2)
    second.log_metrics({"loss": 9.0}, 3)
    assert numbers(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}, {"step": 3, "loss": 9}]
    CsvLog(path).log_metrics({"other": 1.0}, 1)
    assert numbers(path) == [{"step": 1, "other": 1}]


@pytest.mark.parametrize("scored", [False, True])
def test_a_log_goes_on_without_scores_that_are_to_be_made_again(path, scored):
    log = CsvLog(path)
    for step in (1, 2, 3):
        log.log_metrics({"loss": 0.5}, step)
        log.log_metrics({"eval/mIoU": 0.25}, step)
    CsvLog(path).go_on(2, scored=scored)
    kept = [(row["step"], "eval/mIoU" in row) for row in numbers(path)]
    assert kept == [(1, False), (1, True), (2, False), (2, True)][: 4 if scored else 3]


@pytest.mark.parametrize("before", [None, "", "step,loss\n"], ids=["no file", "empty", "no rows"])
def test_a_log_goes_on_where_there_was_none(path, before):
    path.parent.mkdir()
    if before is not None:
        path.write_text(before)
    log = CsvLog(path)
    log.go_on(0)
    log.log_metrics({"loss": 0.5}, 1)
    assert numbers(path) == [{"step": 1, "loss": 0.5}]


def test_a_log_is_read_wherever_it_was_torn(path):
    log = CsvLog(path)
    for step in (1, 2):
        log.log_metrics({"loss": 0.125, "lr": 0.25}, step)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        rows = numbers(path)
        left = max(0, whole[:size].count(b"\n") - 1)
        assert rows == [{"step": step, "loss": 0.125, "lr": 0.25} for step in range(1, 1 + left)]
        again = CsvLog(path)
        again.go_on(1)
        again.log_metrics({"lr": 0.5}, 2)
        assert numbers(path) == [*rows[:1], {"step": 2, "lr": 0.5}]


@pytest.mark.parametrize(
    "rubbish", [b"\0" * 30 + b"\n", b"1,2\n", b"x,1,1\n", b"2,abc,1\n", b"\xff,\xfe,1\n", b'"2,1\n']
)
def test_lines_that_are_no_rows_are_passed_over(path, rubbish):
    CsvLog(path).log_metrics({"loss": 0.125, "lr": 0.25}, 1)
    with path.open("ab") as file:
        file.write(rubbish)
    assert numbers(path) == [{"step": 1, "loss": 0.125, "lr": 0.25}]


def test_rows_wait_while_they_cannot_be_written(path, caplog):
    log = CsvLog(path)
    log.log_metrics({"loss": 0.5}, 1)
    with full_disk(path.stat().st_size + 3):  # room for half a row
        log.log_metrics({"loss": 0.25}, 2)
        log.log_metrics({"loss": 0.125}, 3)
    assert numbers(path) == [{"step": 1, "loss": 0.5}]
    log.log_metrics({"loss": 0.75}, 4)
    assert [row["loss"] for row in numbers(path)] == [0.5, 0.25, 0.125, 0.75]
    log.finalize("success")
    (warning,) = caplog.messages
    assert warning.startswith(f"{path} cannot be written, its rows wait until it can: ")


@pytest.mark.parametrize("columns", [["loss"], ["loss", "other"]])
def test_a_row_that_was_written_before_the_error_is_there_once(path, monkeypatch, columns):
    log = CsvLog(path)
    log.log_metrics({"loss": 0.5}, 1)
    write = csv_log.to_lines

    def late(*arguments):
        with path.open("a", newline="") as file:
            file.write(write(*arguments))
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(csv_log, "to_lines", late)
        log.log_metrics({"loss": 0.25}, 2)
    for step in (3, 4):
        log.log_metrics(dict.fromkeys(columns, 0.125), step)
    assert [row["step"] for row in numbers(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("room", [False, True])
def test_the_end_of_a_run_is_the_last_chance_of_rows_that_wait(path, caplog, room):
    log = CsvLog(path)
    log.log_metrics({"loss": 0.5}, 1)
    with full_disk(path.stat().st_size + 3):
        log.log_metrics({"loss": 0.25}, 2)
        if not room:
            log.finalize("success")
    if room:
        log.finalize("success")
    assert [row["step"] for row in numbers(path)] == ([1, 2] if room else [1])
    assert any("has no rows from step 2 on" in message for message in caplog.messages) == (not room)
