"""The CUDA kernels on a processor: the same source, a block's threads as fibers, against the float64 reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pseudoseg_fast import functional

ROOT = Path(functional.__file__).resolve().parents[1]
SHIM = ROOT / "tests" / "shim"


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_shim", "-p", "no:cacheprovider", *arguments]
    path = os.pathsep.join(map(str, (SHIM, ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


@pytest.mark.skipif(sys.platform != "linux", reason="fibers by Linux's contexts")
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(
            ["tests/test_functional.py", "-k", "cpp and not fuse and not compiles"], id="public-functions"
        ),
        pytest.param(["tests/test_functional_native.py", "-k", "every_element or opcheck"], id="promises"),
        pytest.param(["tests/shim/check_tiles.py"], id="tiles"),
    ],
)
def test_kernels_on_a_processor(arguments):
    run(*arguments)
