"""Processes of their own, as many at a time as there are processors, each keeping one of them busy."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def python(*arguments, **environment):
    """Run Python in a process of its own, from the root of the project."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def run(*calls: tuple[Sequence[str | Path], Mapping[str, str]]):
    """Run Python with some arguments and environment each; all have to end well.

    Returns:
        What they printed, in the order of the calls.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = [
            pool.submit(python, *arguments, **({"OMP_NUM_THREADS": "1"} | dict(environment)))
            for arguments, environment in calls
        ]
    for future, (arguments, environment) in zip(started, calls, strict=True):
        done = future.result()
        assert done.returncode == 0, (arguments, environment, done.stdout[-10000:] + done.stderr[-4000:])
    return [future.result().stdout for future in started]
