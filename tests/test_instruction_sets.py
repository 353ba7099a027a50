"""The CPU kernels for older processors, which this one would not choose."""

import platform

import pytest
import side_by_side

from pseudoseg_fast.build.spec import instruction_sets

VALUES = "cpp and (losses_and or dice or fuse or predict or options or other_dtypes) or depthwise and (values or any_)"


def test_older_instruction_sets_agree_with_the_reference():
    *older, _ = instruction_sets(platform.machine())
    if not older:
        pytest.skip("this machine has one instruction set")
    files = ("tests/test_functional.py", "tests/test_depthwise.py")
    side_by_side.run(
        *(
            ((*side_by_side.PYTEST, *files, "-k", VALUES), {"PSEUDOSEG_ISA": isa, "OMP_NUM_THREADS": "2"})
            for isa in older
        )
    )
