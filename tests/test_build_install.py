"""The real libraries: what is in them, and what pip and CMake make of the same spec."""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pseudoseg_fast import build
from pseudoseg_fast.build.compile import compile_arguments
from pseudoseg_fast.build.toolchain import find_ninja

ROOT = Path(build.__file__).resolve().parents[2]

USE_INSTALLED = """
import importlib, pkgutil, torch, pseudoseg_fast
from pseudoseg_fast import build
build.load_cpu()
info = build.build_info()
registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
assert any(name.startswith("pseudoseg_fast::") for name in registered), "no operators"
print(pseudoseg_fast.__file__, build.find(build.cpu_spec()).origin, info["cpu_library"], sep="\\n")
"""


@pytest.fixture(scope="module")
def cpu_library():
    """The CPU library of this source tree, from the user's cache or built now."""
    return build.ensure(build.cpu_spec()).path


@pytest.fixture
def source(tmp_path):
    """A copy of what pip packages, so that pip leaves nothing behind in the source tree."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pseudoseg_fast", "csrc", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "_native"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def pip(*arguments, **environment):
    command = [
        sys.executable,
        "-m",
        "pip",
        *arguments[:1],
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        [*command, *map(str, arguments[1:])], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_library_uses_only_the_stable_abi_of_torch(cpu_library):
    told = subprocess.run(
        ["nm", "-D", "--undefined-only", cpu_library], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in told.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_library") for symbol in symbols)
    assert [symbol for symbol in symbols if re.search(r"_Z.*(3c10|2at|2at5|5torch|6caffe2)", symbol)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_library_carries_no_path_of_the_builder(cpu_library):
    told = subprocess.run(["readelf", "-d", cpu_library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in told
    assert "RPATH" not in told
    assert "RUNPATH" not in told


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
def test_newer_instructions_stay_in_their_namespaces(cpu_library):
    """A function that AVX code shares with baseline code would end the process on an older processor."""
    told = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", cpu_library], capture_output=True, text=True, check=True
    )
    users = {"psf::avx2::": 0, "psf::avx512::": 0}
    strays = set()
    for block in told.stdout.split("\n\n"):
        name = re.match(r"[0-9a-f]+ <(.*)>:", block)
        if name is None or not re.search(r"\tv[a-z0-9]+ .*%[xyz]mm|%ymm|%zmm", block):
            continue
        if "[clone " in name[1]:  # the compiler's own copy, which no other object can call
            continue
        home = next((home for home in users if home in name[1]), None)
        if home is None or (home == "psf::avx2::" and "%zmm" in block):
            strays.add(name[1])
        else:
            users[home] += 1
    assert strays == set(), "keep what is not inlined out of kernel sources, or in the namespace of PSF_ISA"
    assert all(users.values())


@pytest.mark.parametrize("isa", ["baseline", ""], ids=["lowered", "automatic"])
def test_build_info_tells_the_instruction_set_in_use(isa):
    code = "from pseudoseg_fast import build; i = build.build_info(); print(i['in_use'], i['supported'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PSEUDOSEG_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    in_use, supported = done.stdout.split()
    assert in_use == (isa or supported)
    assert supported in build.instruction_sets(platform.machine())


def test_wheel_with_libraries_runs_anywhere_without_a_compiler(source, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    pip("install", "--target", site, source, PSEUDOSEG_BUILD="1")
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", USE_INSTALLED],
        cwd=empty,
        env={"PATH": str(empty), "PYTHONPATH": str(site), "HOME": str(empty), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, origin, library = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert origin == "packaged"
    assert library == build.cpu_spec().filename
    assert list(empty.iterdir()) == [], "nothing was built or cached"
    assert next(site.glob("*.dist-info/WHEEL")).read_text().count("Tag: py3-none-") == 1


def test_plain_wheel_compiles_nothing_and_carries_every_source(source, tmp_path):
    pip("wheel", "-w", tmp_path / "wheels", source, PSEUDOSEG_BUILD="", CXX="no-such-compiler")
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("pseudoseg_fast/")}
    expected = {
        str(Path("pseudoseg_fast", path.relative_to(source).as_posix().removeprefix("pseudoseg_fast/")))
        for folder in ("pseudoseg_fast", "csrc", "kernels")
        for path in (source / folder).rglob("*")
        if path.is_file()
    }
    assert packaged == expected


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_compiles_with_the_same_flags(tmp_path):
    settings = {
        "CMAKE_MAKE_PROGRAM": find_ninja(),
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
    }
    defined = [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *defined], check=True, capture_output=True
    )
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    by_cmake = {}
    for entry in entries:
        words = shlex.split(entry["command"])
        by_cmake[re.search(r"CMakeFiles/(.*)\.dir", entry["command"])[1]] = words[1 : words.index("-o")]
    assert by_cmake == {
        f"{spec.name}_{unit.object}": compile_arguments(spec, unit)
        for spec in build.all_specs()
        for unit in spec.units
    }
