"""Build every native library into the cache now, or describe the build to CMake.

python -m pseudoseg_fast.build            build what is missing and print where each library is
python -m pseudoseg_fast.build --cmake    print what CMakeLists.txt includes
"""

import argparse
import sys

from . import BuildError, all_specs, ensure
from .cmake import cmake_variables


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pseudoseg_fast.build", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--cmake", action="store_true", help="print CMake variables instead of building")
    arguments = parser.parse_args()
    try:
        if arguments.cmake:
            print(cmake_variables(), end="")
        else:
            for spec in all_specs():
                print(ensure(spec).path)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
