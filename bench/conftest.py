"""Compare the implementations of each benchmark: ratios and memory, printed and stored with the timings."""

import functools
from typing import Any

import pytest
import torch

from bench import floors


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let device and number of threads be chosen."""
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where functions run")


def pytest_configure(config: pytest.Config) -> None:
    """Set the number of threads."""
    torch.set_num_threads(config.getoption("--threads"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Return the device that --device names."""
    return str(request.config.getoption("--device"))


@functools.cache
def rates() -> dict[str, float]:
    """Return the machine's rates, measured once, when the benchmarks are done."""
    return floors.measure_rates()


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
    output_json["steps"] = step_shares(output_json["benchmarks"])
    output_json["inference"] = inference(output_json["benchmarks"])
    output_json["machine_info"]["rates"] = rates()
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the comparisons."""
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    done = [bench.as_dict(include_data=False) for bench in session.benchmarks if not bench.has_error]
    if rows := comparison(done):
        terminalreporter.section("median ms; ratio to the faster of eager and compile; peak extra MiB")
        lines = []
        for row in rows:
            times, memory = row["milliseconds"], row["extra_mebibytes"]
            cells = {name: times.get(name) for name in ("eager", "compile", "attention", "native")}
            cells |= {"ratio": row["ratio"], "floor": row["floor_milliseconds"]}
            cells |= {f"{name} MiB": memory.get(name) for name in ("eager", "compile", "native")}
            lines.append({"size": row["size"], "function": row["function"], **cells})
        write_table(terminalreporter, lines)
    if rows := step_shares(done):
        terminalreporter.section("training steps: median ms, share outside the network, peak of memory")
        write_table(terminalreporter, rows)
    if rows := inference(done):
        terminalreporter.section("median ms from pictures to labels; ratios of ONNX Runtime to eager")
        write_table(terminalreporter, rows)


def write_table(terminalreporter: Any, rows: list[dict[str, Any]]) -> None:
    """Print rows of one kind: strings to the left, numbers to the right."""
    for row in [{name: name for name in rows[0]}, *rows]:
        cells = (
            f"{row[name]:<24}" if isinstance(rows[0][name], str) else f"{_number(row[name]):>15}"
            for name in row
        )
        terminalreporter.write_line("".join(cells))


def step_shares(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each kind of training step and loop: milliseconds, shares, pictures/s, memory."""
    rows = []
    research: dict[str, float] = {}
    for benchmark in benchmarks:
        info, median = benchmark["extra_info"], benchmark["stats"]["median"]
        if "update_seconds" in info:
            if info["loop"] == "research":
                research[info["run"]] = median
            outside = info["loss_path_seconds"] + info["update_seconds"]
            rows.append(
                {
                    "run": info["run"],
                    "loop": info["loop"],
                    "step ms": 1e3 * median,
                    "losses ms": 1e3 * info["loss_path_seconds"],
                    "update ms": 1e3 * info["update_seconds"],
                    "outside %": 100 * outside / median,
                    "images/s": info["images"] / median,
                    "times research": research[info["run"]] / median if info["run"] in research else None,
                    "peak MiB": info["peak_bytes"] / 2**20,
                }
            )
    return rows


def inference(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each encoder, size and batch: the milliseconds of every implementation, and two ratios."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "encoder" in info:
            row = times.setdefault((info["encoder"], f"{info['size']} x {info['batch']}"), {})
            row[info["implementation"]] = 1e3 * benchmark["stats"]["median"]
    names = ("eager", "compile", "ort", "ort_logits", "ort_core", "ort_int8")
    rows = []
    for (encoder, size), row in times.items():
        ratios = {
            f"{name} ratio": row["eager"] / row[name] if {"eager", name} <= row.keys() else None
            for name in ("ort", "ort_int8")
        }
        rows.append({"encoder": encoder, "size": size, **{name: row.get(name) for name in names}, **ratios})
    return rows


def comparison(benchmarks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each size and function, with the figures of every implementation side by side."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        if "calls" not in info:
            continue
        row = rows.setdefault(
            (info["size"], info["function"]),
            {
                "size": info["size"],
                "function": info["function"],
                "milliseconds": {},
                "extra_mebibytes": {},
                "floor_milliseconds": None,
            },
        )
        if info["device"] == "cpu":
            row["floor_milliseconds"] = floors.floor_milliseconds(info["function"], info["shape"], rates())
        row["milliseconds"][info["implementation"]] = 1e3 * benchmark["stats"]["median"] / info["calls"]
        row["extra_mebibytes"][info["implementation"]] = info["extra_bytes"] / 2**20
    for row in rows.values():
        times = row["milliseconds"]
        others = [times[name] for name in ("eager", "compile") if name in times]
        row["ratio"] = min(others) / times["native"] if others and "native" in times else None
    return list(rows.values())


def _number(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.2f}"
