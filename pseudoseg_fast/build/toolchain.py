"""Where the compilers, ninja and the headers and libraries of other packages are."""

import hashlib
import importlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .errors import REMEDY, BuildError
from .spec import Spec

_INSTALL = "install a C++20 compiler (Debian, Ubuntu: apt-get install g++), or install a wheel built where there is one"


_INSTALL_NVCC = "install the CUDA toolkit, set CUDA_HOME to it, or `pip install nvidia-cuda-nvcc`"


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler, and nvcc for CUDA: the commands that run them and what they say about themselves."""

    cxx: tuple[str, ...]
    version: str
    nvcc: tuple[str, ...] = ()

    @property
    def compiler(self) -> tuple[str, ...]:
        """The command that compiles; the C++ compiler links."""
        return self.nvcc or self.cxx

    def key(self, spec: Spec) -> str:
        """Return 8 hexadecimal digits of the hash of compiler, C library and versions of the packages used.

        The C library is part of it because a home folder may be shared by machines with different ones, the
        packages' versions because their headers are compiled into the library.
        """
        packages = [f"{name} {package_version(name)}" for name in spec.packages]
        text = "\n".join([self.version, *platform.libc_ver(), *packages])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def find_toolchain(spec: Spec | None = None) -> Toolchain:
    """Find the compilers for a library: the command in $CXX if that is set, else the first of c++, g++ and clang++.

    A CUDA library needs nvcc too, see `find_nvcc`; nvcc runs the C++ compiler of $NVCC_CCBIN, or gcc.

    Raises:
        BuildError: there is none, or it does not run.
    """
    cxx = _find_cxx()
    if spec is None or not spec.architectures:
        return cxx
    nvcc = (str(find_nvcc()),)
    return Toolchain(cxx.cxx, f"{nvcc_version()} and {cxx.version}", nvcc)


def _find_cxx() -> Toolchain:
    if sys.platform not in ("linux", "darwin"):
        raise BuildError(f"native kernels are built on Linux and macOS, not on {sys.platform}; {REMEDY}")
    wanted = shlex.split(os.environ.get("CXX", ""))
    if wanted:
        command = wanted if shutil.which(wanted[0]) else None
    else:
        command = next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if command is None:
        looked = f"$CXX = {shlex.join(wanted)}" if wanted else "c++, g++, clang++"
        raise BuildError(f"no C++ compiler on PATH (looked for {looked}); {_INSTALL}, {REMEDY}")
    told = _run("C++ compiler", [*command, "--version"], _INSTALL)
    return Toolchain(tuple(command), told.partition("\n")[0].strip())


def find_nvcc() -> Path:
    """Find CUDA's compiler: in $CUDA_HOME/bin, on PATH, or in the Python package nvidia-cuda-nvcc.

    Raises:
        BuildError: it is in none of these places.
    """
    home = os.environ.get("CUDA_HOME", "")
    on_path = shutil.which("nvcc")
    places = [Path(home, "bin", "nvcc")] if home else []
    places += [Path(on_path)] if on_path else []
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia.submodule_search_locations or []) if nvidia else []:
        places += sorted(Path(folder).glob("*/bin/nvcc"))
    found = next((place for place in places if os.access(place, os.X_OK)), None)
    if found is None:
        raise BuildError(
            f"no nvcc in $CUDA_HOME = {home!r}, on PATH or in the Python package nvidia-cuda-nvcc; "
            f"{_INSTALL_NVCC}, {REMEDY}"
        )
    return found


def nvcc_version() -> str:
    """Return what nvcc says of its version.

    Raises:
        BuildError: there is no nvcc, or it does not run.
    """
    told = _run("CUDA compiler", [str(find_nvcc()), "--version"], _INSTALL_NVCC)
    return f"nvcc {told.rpartition('release ')[2].partition(chr(10))[0].strip()}"


def _run(what: str, command: list[str], install: str) -> str:
    """Return what a command prints."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"the {what} `{shlex.join(command)}` does not run: {error}; {install}, {REMEDY}"
        ) from error
    return done.stdout


def find_ninja() -> str:
    """Return the path of the ninja program, from PATH or from the Python package of that name.

    Raises:
        BuildError: it is in neither place.
    """
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        found = shutil.which("ninja", path=importlib.import_module("ninja").BIN_DIR)
    if found is None:
        raise BuildError(
            f"no ninja on PATH and no Python package of that name; `pip install ninja`, {REMEDY}"
        )
    return found


def include_folders(spec: Spec) -> list[Path]:
    """Return the folders of foreign headers that the spec's sources include.

    Raises:
        BuildError: a package is not installed.
    """
    folders = []
    for name in spec.packages:
        package = _package(name)
        if name == "pybind11":
            folders += [Path(package.get_include()), Path(sysconfig.get_path("include"))]
        else:
            folders.append(_folder(package) / "include")
    return folders


def link_arguments(spec: Spec) -> list[str]:
    """Return the arguments that link torch's libraries, and CUDA's runtime into a CUDA library.

    No run path is stored: torch is loaded first, and the system's loader then finds its libraries by name. CUDA's
    runtime is linked statically, since torch may come with that of another CUDA version.

    Raises:
        BuildError: a CUDA library is asked for, and torch has no CUDA or the CUDA runtime is not found.
    """
    arguments = list(spec.link_flags)
    if spec.architectures:
        arguments += [f"-L{_cuda_runtime_folder()}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    if sys.platform == "darwin":
        arguments.append("-Wl,-undefined,dynamic_lookup")
    if spec.libraries:
        arguments += [f"-L{_folder(_package('torch')) / 'lib'}", *(f"-l{name}" for name in spec.libraries)]
    return arguments


def _cuda_runtime_folder() -> Path:
    """Return the folder of CUDA's static runtime, which nvcc tells: the nvcc found may be a script elsewhere."""
    nvcc = str(find_nvcc())
    told = _run("CUDA compiler", [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], _INSTALL_NVCC)
    folders = [Path(name) for name in re.findall(r'"-L([^"]+)"', told)]
    folders += [Path(top, name) for top in re.findall(r"TOP=(.+)", told) for name in ("lib64", "lib")]
    for folder in folders:
        if (folder / "libcudart_static.a").is_file():
            return folder.resolve()
    raise BuildError(f"no libcudart_static.a where {nvcc} has its libraries; {_INSTALL_NVCC}, {REMEDY}")


def package_version(name: str) -> str:
    """Return the version of an installed Python package.

    Raises:
        BuildError: it is not installed.
    """
    return str(_package(name).__version__)


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise BuildError(
            f"the native build needs the Python package {name}, which cannot be imported ({error}); "
            f"`pip install {name}` (ahead of time with `pip install --no-build-isolation`), {REMEDY}"
        ) from error


def _folder(package: ModuleType) -> Path:
    return Path(str(package.__file__)).resolve().parent
