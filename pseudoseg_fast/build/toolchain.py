"""Where the compiler, ninja and the headers of other packages are."""

import hashlib
import importlib
import importlib.util
import os
import platform
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


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler: the command that runs it and what it says about itself."""

    cxx: tuple[str, ...]
    version: str

    def key(self, spec: Spec) -> str:
        """Return 8 hexadecimal digits of the hash of compiler, C library and versions of the packages used.

        The C library is part of it because a home folder may be shared by machines with different ones, the
        packages' versions because their headers are compiled into the library.
        """
        packages = [f"{name} {package_version(name)}" for name in spec.packages]
        text = "\n".join([self.version, *platform.libc_ver(), *packages])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def find_toolchain() -> Toolchain:
    """Find the C++ compiler: the command in $CXX if that is set, else the first of c++, g++ and clang++.

    Raises:
        BuildError: there is none, or it does not run.
    """
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
    try:
        told = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(
            f"the C++ compiler `{shlex.join(command)}` does not run: {error}; {_INSTALL}, {REMEDY}"
        ) from error
    return Toolchain(tuple(command), told.stdout.partition("\n")[0].strip())


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
    """Return the arguments that link torch's libraries.

    No run path is stored: torch is loaded first, and the system's loader then finds its libraries by name.
    """
    arguments = list(spec.link_flags)
    if sys.platform == "darwin":
        arguments.append("-Wl,-undefined,dynamic_lookup")
    if spec.libraries:
        arguments += [f"-L{_folder(_package('torch')) / 'lib'}", *(f"-l{name}" for name in spec.libraries)]
    return arguments


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
