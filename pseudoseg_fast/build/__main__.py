"""Build every native library into the cache now, or describe the build to CMake.

python -m pseudoseg_fast.build                 build what is missing and print where each library is
python -m pseudoseg_fast.build --cuda          the CUDA library too, for every architecture; no GPU is needed
python -m pseudoseg_fast.build --cuda 9.0      the same for one
python -m pseudoseg_fast.build --cmake         print what CMakeLists.txt includes; with --cuda for CUDA too

Without --cuda the CUDA library is built where there is a GPU, for that.
"""

import argparse
import sys

from . import ARCHITECTURES, BuildError, all_specs, devices_architectures, ensure
from .cmake import cmake_variables


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pseudoseg_fast.build", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cmake", action="store_true", help="print CMake variables instead of building")
    parser.add_argument(
        "--cuda",
        nargs="*",
        metavar="ARCHITECTURE",
        help=f"build for CUDA; default: {' '.join(ARCHITECTURES)}",
    )
    arguments = parser.parse_args()
    try:
        architectures = () if arguments.cuda is None else arguments.cuda or ARCHITECTURES
        if arguments.cmake:
            print(cmake_variables(architectures), end="")
        else:
            for spec in all_specs(architectures or devices_architectures()):
                print(ensure(spec).path)
    except (BuildError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
