"""Compile, find and load the native libraries of csrc.

spec         what a library is made from: sources, flags, instruction sets
toolchain    the compiler and the headers of torch and pybind11
compile      one build with ninja
cache        packaged library, cached library, or a build that all processes share
library      load them into this process
cmake        the same spec for CMakeLists.txt

At first use the order is: packaged in the wheel (`PSEUDOSEG_BUILD=1 pip install --no-build-isolation .` or CMake),
then the cache, then a build. `python -m pseudoseg_fast.build` builds ahead of first use; importing builds nothing.
"""

from .cache import Library, cache_folders, ensure, find
from .errors import BuildError
from .library import build_info, load_cpu
from .spec import Spec, Unit, all_specs, build_info_spec, cpu_spec, instruction_sets
from .toolchain import Toolchain, find_toolchain

__all__ = [
    "BuildError",
    "Library",
    "Spec",
    "Toolchain",
    "Unit",
    "all_specs",
    "build_info",
    "build_info_spec",
    "cache_folders",
    "cpu_spec",
    "ensure",
    "find",
    "find_toolchain",
    "instruction_sets",
    "load_cpu",
]
