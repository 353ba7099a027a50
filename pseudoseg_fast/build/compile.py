"""Run one native build: write a ninja file, run ninja, and report the compiler's own words when it fails.

`torch.utils.cpp_extension.load` is not used. It compiles all sources with the same flags, and the CPU kernels need
different ones per instruction set; it waits for ever on the lock file of a process that was killed; and its cache
knows neither flags nor compiler. The ninja file below is a dozen lines, and the stable ABI needs nothing else.
"""

import os
import shlex
import subprocess
from pathlib import Path

from .errors import REMEDY, BuildError
from .spec import Spec, Unit
from .toolchain import Toolchain, find_ninja, include_folders, link_arguments

LOG = "build.log"
"""What the compilers said, in the folder of the build."""

_LINES_SHOWN = 30


def compile_arguments(spec: Spec, unit: Unit) -> list[str]:
    """Return the compiler's arguments for one unit, without the compiler, the source and the object."""
    folders = [word for folder in include_folders(spec) for word in ("-isystem", str(folder))]
    return [*spec.flags, *unit.flags, f"-I{spec.root}", *folders]


def ninja_file(spec: Spec, toolchain: Toolchain) -> str:
    """Return the text of the ninja file that builds the library `spec.name + spec.suffix` in its own folder."""
    lines = [
        "rule compile",
        f"  command = {_words(toolchain.compiler)} $arguments -c $in -o $out",
        "  description = compile $out",
        "rule link",
        f"  command = {_words(toolchain.cxx)} -shared $in $arguments -o $out",
        "  description = link $out",
    ]
    for unit in spec.units:
        lines += [
            f"build {unit.object}: compile {_path(spec.root / unit.source)}",
            f"  arguments = {_words(compile_arguments(spec, unit))}",
        ]
    lines += [
        f"build {spec.name}{spec.suffix}: link {' '.join(unit.object for unit in spec.units)}",
        f"  arguments = {_words(link_arguments(spec))}",
    ]
    return "\n".join(lines) + "\n"


def compile_library(spec: Spec, toolchain: Toolchain, folder: Path) -> Path:
    """Build the library in `folder`, which should be empty, and return its path.

    At most $MAX_JOBS compilers run at once; default: one per processor this process may use.

    Raises:
        BuildError: with the command that failed and the last lines it printed.
    """
    (folder / "build.ninja").write_text(ninja_file(spec, toolchain))
    command = [find_ninja(), "-C", str(folder), "-j", str(_jobs())]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    (folder / LOG).write_text(done.stdout)
    if done.returncode != 0:
        shown = "\n".join(done.stdout.strip().splitlines()[-_LINES_SHOWN:])
        raise BuildError(
            f"building {spec.name} with {toolchain.version} failed; the last lines of the build were\n{shown}\n"
            "Report this with the output of `python -m pseudoseg_fast.env`, try another compiler with CXX=..., "
            f"that of nvcc with NVCC_CCBIN=..., {REMEDY}"
        )
    return folder / f"{spec.name}{spec.suffix}"


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(words: list[str] | tuple[str, ...]) -> str:
    """Quote words for the shell that ninja starts, and then for ninja."""
    return shlex.join(words).replace("$", "$$")


def _path(path: Path) -> str:
    """Quote a path for a ninja build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
