import csv
import json
import sys
import threading

import pytest
import yaml

from bench import accuracy, curves

OPTIONS = "--data.root photos --optim.steps 20"


@pytest.fixture
def finished(monkeypatch):
    """Replace training: seed 1 fails; returns the options that each run got."""
    calls = []

    def run(command, stdout, stderr, env):
        calls.append(command)
        folder = accuracy.Path(command[command.index("--run.dir") + 1])
        if command[command.index("--run.seed") + 1] == "1":
            return accuracy.subprocess.CompletedProcess(command, 2)
        (folder / "log").mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps({"seconds": 1.0, "miou": {"last": 0.25, "best": 0.5}}))
        with (folder / "log" / "metrics.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows(
                [
                    ["step", "train/L_s", "eval/mIoU", "train/lr"],
                    [10, "0.123456", "", 1],
                    [20, "", "0.25", ""],
                ]
            )
        return accuracy.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(accuracy.subprocess, "run", run)
    monkeypatch.setattr(accuracy, "commit", lambda: "0" * 7)
    return calls


def test_grid_keeps_what_finished_and_names_what_failed(tmp_path, finished):
    grid = tmp_path / "small.yaml"
    grid.write_text(yaml.safe_dump({"seeds": [0, 1, 2], "runs": {"a row": OPTIONS}}))
    results = tmp_path / "rows.jsonl"
    rows, failures = accuracy.run_grid(grid, results, tmp_path, jobs=2)
    assert [row["seed"] for row in rows] == [0, 2]
    assert rows[0]["curves"] == {"L_s": [[10, 0.1235]], "mIoU": [[20, 0.25]]}
    (failure,) = failures
    assert "seed 1: ended with 2" in failure
    assert len(results.read_text().splitlines()) == 2
    again, _ = accuracy.run_grid(grid, results, tmp_path, jobs=1)
    assert again == rows
    assert len(finished) == 4  # the failed one alone ran again


def test_environment_variables_that_are_not_set_are_named(tmp_path, finished, monkeypatch):
    grid = tmp_path / "small.yaml"
    runs = {"a row": f"{OPTIONS} --data.tags ${{TAGS_OF_A_TEST}}", "another": OPTIONS}
    grid.write_text(yaml.safe_dump({"seeds": [0], "runs": runs}))
    results = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match="needs the environment variables TAGS_OF_A_TEST"):
        accuracy.run_grid(grid, results, tmp_path)
    assert not finished
    assert len(accuracy.run_grid(grid, results, tmp_path, only="another")[0]) == 1
    monkeypatch.setenv("TAGS_OF_A_TEST", "tags.csv")
    assert len(accuracy.run_grid(grid, results, tmp_path)[0]) == 2


def test_row_that_was_cut_off_while_it_was_written_runs_again(tmp_path, finished):
    grid = tmp_path / "small.yaml"
    grid.write_text(yaml.safe_dump({"seeds": [0, 2], "runs": {"a row": OPTIONS}}))
    results = tmp_path / "rows.jsonl"
    rows, _ = accuracy.run_grid(grid, results, tmp_path)
    whole = results.read_text()
    results.write_text(whole[:-20])
    again, failures = accuracy.run_grid(grid, results, tmp_path)
    assert (again, failures) == (rows, [])
    assert len(finished) == 3
    assert results.read_text() == whole


def test_run_that_leaves_no_result_does_not_stop_the_others(tmp_path, finished, monkeypatch):
    def run(command, **arguments):
        if command[command.index("--run.seed") + 1] == "0":
            return accuracy.subprocess.CompletedProcess(command, 0)
        return with_result(command, **arguments)

    with_result = accuracy.subprocess.run
    monkeypatch.setattr(accuracy.subprocess, "run", run)
    grid = tmp_path / "small.yaml"
    grid.write_text(yaml.safe_dump({"seeds": [0, 2], "runs": {"a row": OPTIONS}}))
    rows, failures = accuracy.run_grid(grid, tmp_path / "rows.jsonl", tmp_path)
    assert [row["seed"] for row in rows] == [2]
    assert "a row, seed 0: " in failures[0]
    assert "result.json" in failures[0]


def test_threads_of_a_grid_do_not_parse(tmp_path, finished, monkeypatch):
    # Parsing a file changes the working directory, which runs that begin meanwhile would inherit.
    def parse(*arguments):
        assert threading.current_thread() is threading.main_thread()
        return parse_config(*arguments)

    parse_config = accuracy.parse_config
    monkeypatch.setattr(accuracy, "parse_config", parse)
    grid = tmp_path / "small.yaml"
    grid.write_text(yaml.safe_dump({"seeds": [0, 2], "runs": {"a row": f"--config small {OPTIONS}"}}))
    rows, failures = accuracy.run_grid(grid, tmp_path / "rows.jsonl", tmp_path, jobs=2)
    assert len(rows) == 2
    assert not failures


def test_run_that_was_cut_off_goes_on(tmp_path, finished):
    cell = accuracy.Cell("small", "a row", 0, OPTIONS)
    folder = tmp_path / "small-a-row-0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    config = accuracy.to_dict(accuracy.parse_config(cell.arguments, "", ""))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert accuracy.begun(folder, cell.config())
    assert not accuracy.begun(folder, accuracy.Cell("small", "a row", 1, OPTIONS).config())
    cell.run(cell.config(), tmp_path, threads=1)
    assert finished[0][-2:] == ["--run.resume", "auto"]


def test_row_stays_valid_when_an_option_is_added(tmp_path):
    cell = accuracy.Cell("small", "a row", 0, OPTIONS)
    config = cell.config()
    row = {"name": "a row", "seed": 0, "config": config}
    assert accuracy.same(row, cell)
    del config["method"]["cutmix"]  # a row of before the option
    assert accuracy.same(row, cell)
    assert not accuracy.same(row, accuracy.Cell("small", "a row", 0, OPTIONS + " --method.cutmix 1"))


def test_supervised_row_ignores_what_supervision_does_not_use():
    first, second = (
        accuracy.Cell("small", "a row", 0, f"{OPTIONS} --method.name supervised --method.gamma {gamma}")
        for gamma in (0, 1)
    )
    assert first.config() == second.config()


def test_table_and_plot(tmp_path, monkeypatch):
    rows = [
        {
            "name": "a row",
            "seconds": 2.0,
            "miou": {"last": last, "best": 0.5},
            "curves": {"mIoU": [[10, 0.1], [20, last]]},
        }
        for last in (0.2, 0.4)
    ]
    assert "| a row | 2 | 30.0 ± 14.1 | 20.0 40.0 | 50.0 ± 0.0 | 2 |" in curves.table(rows)
    steps, means, deviations = curves.band([row["curves"]["mIoU"] for row in rows])
    assert steps == [10, 20]
    assert means == pytest.approx([0.1, 0.3])
    assert deviations == pytest.approx([0, 0.02**0.5])
    path = tmp_path / "plot.png"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert curves.plot(rows, path) is None
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert curves.plot(rows, path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
