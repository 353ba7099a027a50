"""Compile, find and load the native libraries of csrc.

spec         what a library is made from: sources, flags, instruction sets
toolchain    the compilers and the headers of torch and pybind11
compile      one build with ninja
cache        packaged library, cached library, or a build that all processes share
library      load them into this process
cmake        the same spec for CMakeLists.txt

At first use the order is: packaged in the wheel (`PSEUDOSEG_BUILD=1 pip install --no-build-isolation .` or CMake),
then the cache, then a build; CUDA kernels are built for the GPUs at hand. `python -m pseudoseg_fast.build` builds
ahead of first use; importing builds nothing.
"""

from .cache import Library, cache_folders, ensure, find
from .errors import BuildError
from .library import build_info, cuda_spec_here, devices_architectures, load_cpu, load_cuda, switched_off
from .spec import ARCHITECTURES, Spec, Unit, all_specs, build_info_spec, cpu_spec, cuda_spec, instruction_sets
from .toolchain import Toolchain, find_nvcc, find_toolchain, nvcc_version

__all__ = [
    "ARCHITECTURES",
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
    "cuda_spec",
    "cuda_spec_here",
    "devices_architectures",
    "ensure",
    "find",
    "find_nvcc",
    "find_toolchain",
    "instruction_sets",
    "load_cpu",
    "load_cuda",
    "nvcc_version",
    "switched_off",
]
