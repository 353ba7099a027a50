"""Package the sources, and with PSEUDOSEG_BUILD=1 the compiled libraries too.

    pip install .                                            compiles nothing; the first use does
    PSEUDOSEG_BUILD=1 pip install --no-build-isolation .     compiles now, against the torch that is installed
    PSEUDOSEG_BUILD=cuda pip install --no-build-isolation .  the CUDA library too, for every architecture

torch is no build requirement: pip would download a second one into the isolated build environment.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
WANTED = os.environ.get("PSEUDOSEG_BUILD", "0")
COMPILE = WANTED not in ("", "0")


def load_build_package() -> ModuleType:
    """Import pseudoseg_fast.build on its own, without importing the package around it."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("PSEUDOSEG_BUILD=1 compiles against the installed torch: add --no-build-isolation")
    folder = HERE / "pseudoseg_fast" / "build"
    spec = importlib.util.spec_from_file_location("pseudoseg_build", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class BuildWithLibraries(build_py):
    """Copy the Python files, then put every native library into pseudoseg_fast/_native."""

    def run(self) -> None:
        """Copy, then build or take from the cache."""
        super().run()
        if COMPILE:
            native = load_build_package()
            target = self.library_folder()
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            for spec in native.all_specs(native.ARCHITECTURES if WANTED == "cuda" else ()):
                shutil.copy(native.ensure(spec).path, target / spec.filename)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return every file written, libraries included."""
        libraries = self.library_folder().glob("*") if COMPILE else ()
        return [*super().get_outputs(include_bytecode), *map(str, libraries)]

    def library_folder(self) -> Path:
        """Return where the libraries go: the source tree itself for an editable install."""
        package = HERE if self.editable_mode else Path(self.build_lib)
        return package / "pseudoseg_fast" / "_native"


class PlatformWheel(bdist_wheel):
    """Tag the wheel for this platform but for any Python: the operators use neither Python's nor torch's C++ ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags for Python, ABI and platform."""
        return ("py3", "none", super().get_tag()[2]) if COMPILE else super().get_tag()


class DistributionWithLibraries(Distribution):
    """Say whether the distribution depends on the platform."""

    def has_ext_modules(self) -> bool:
        """Return whether compiled libraries are inside."""
        return COMPILE


setup(
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel},
    distclass=DistributionWithLibraries,
)
