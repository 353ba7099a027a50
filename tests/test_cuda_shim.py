"""The CUDA kernels on a processor: the same source, a block's threads as fibers, against the float64 reference."""

import os
import sys

import pytest
import side_by_side

SHIM = side_by_side.ROOT / "tests" / "shim"
SESSIONS = (
    ("tests/test_functional.py", "-k", "cpp and not fuse and not compiles"),
    ("tests/test_derivatives.py", "-k", "cpp and not transforms"),
    ("tests/test_functional_native.py", "-k", "every_element or opcheck"),
    ("tests/shim/check_tiles.py",),
)


@pytest.mark.skipif(sys.platform != "linux", reason="fibers by Linux's contexts")
def test_kernels_on_a_processor():
    path = os.pathsep.join(map(str, (SHIM, side_by_side.ROOT, side_by_side.ROOT / "tests")))
    calls = [
        ((*side_by_side.PYTEST, "-p", "cuda_shim", *session), {"PYTHONPATH": path}) for session in SESSIONS
    ]
    side_by_side.run(*calls)
