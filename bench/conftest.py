"""Compare the implementations of each benchmark: ratios and memory, printed and stored with the timings."""

from typing import Any

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the number of threads be chosen."""
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")


def pytest_configure(config: pytest.Config) -> None:
    """Set the number of threads."""
    torch.set_num_threads(config.getoption("--threads"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Keep what explains a figure, not what names a machine."""
    cpu = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "count")}
    machine_info.clear()
    machine_info.update(cpu=cpu, torch=torch.__version__, threads=torch.get_num_threads())


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """Keep the commit alone."""
    for key in set(commit_info) - {"id", "dirty"}:
        del commit_info[key]


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add the comparison and drop the single timings."""
    output_json["comparison"] = comparison(output_json["benchmarks"])
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the comparison."""
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    rows = comparison(
        [bench.as_dict(include_data=False) for bench in session.benchmarks if not bench.has_error]
    )
    rows = [row for row in rows if "cpp" in row["milliseconds"]]
    if not rows:
        return
    terminalreporter.section("native against the faster of eager and torch.compile, minimum times")
    head = [
        "size",
        "function",
        "eager ms",
        "compile ms",
        "cpp ms",
        "ratio",
        "eager MiB",
        "compile MiB",
        "cpp MiB",
    ]
    terminalreporter.write_line(("{:<18}{:<20}" + "{:>12}" * 7).format(*head))
    for row in rows:
        cells = [row["size"], row["function"]]
        cells += [_number(row["milliseconds"].get(name)) for name in ("eager", "compile", "cpp")]
        cells.append(_number(row["ratio"]))
        cells += [_number(row["extra_mebibytes"].get(name)) for name in ("eager", "compile", "cpp")]
        terminalreporter.write_line(("{:<18}{:<20}" + "{:>12}" * 7).format(*cells))


def comparison(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each size and function, with the figures of every implementation side by side."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        key = info["size"], info["function"]
        row = rows.setdefault(
            key, {"size": key[0], "function": key[1], "milliseconds": {}, "extra_mebibytes": {}}
        )
        row["milliseconds"][info["implementation"]] = 1e3 * benchmark["stats"]["min"]
        row["extra_mebibytes"][info["implementation"]] = info["extra_bytes"] / 2**20
    for row in rows.values():
        times = row["milliseconds"]
        others = [times[name] for name in ("eager", "compile") if name in times]
        row["ratio"] = min(others) / times["cpp"] if others and "cpp" in times else None
    return list(rows.values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
