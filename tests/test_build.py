"""The build machinery, on a library of one line so that a build takes a tenth of a second."""

import ctypes
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pseudoseg_fast import build
from pseudoseg_fast.build import cache, library, toolchain
from pseudoseg_fast.build import spec as spec_module
from pseudoseg_fast.build.compile import compile_arguments

ROOT = Path(build.__file__).resolve().parents[2]

ENSURE_TINY = """
import sys
from pathlib import Path
from pseudoseg_fast.build import Spec, Unit, ensure
print(ensure(Spec(name="tiny", root=Path(sys.argv[1]), units=(Unit("answer.cpp"),), flags=("-fPIC",))).path)
"""


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("PSEUDOSEG_BACKEND", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def fresh_process(monkeypatch):
    """Make this process forget what it loaded and what failed."""
    monkeypatch.setattr(library, "_loaded", {})
    monkeypatch.setattr(library, "_failed", {})


@pytest.fixture
def tiny(tmp_path, cache_folder):
    root = tmp_path / "a folder"
    root.mkdir()
    (root / "answer.cpp").write_text(
        '#ifndef ANSWER\n#define ANSWER 1\n#endif\nextern "C" int answer() { return ANSWER; }\n'
    )
    return build.Spec(name="tiny", root=root, units=(build.Unit("answer.cpp"),), flags=("-fPIC",))


def answer(spec):
    return ctypes.CDLL(str(build.ensure(spec).path)).answer()


def key_folder(cache_folder, spec):
    return cache_folder / f"{spec.digest()}-{build.find_toolchain().key(spec)}"


def slow_compiler(folder, seconds):
    """Write a compiler that logs each compilation and takes its time; return its command and its log."""
    script, log = folder / "slow-c++", folder / "compilations"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo x >> {log}; sleep {seconds};; esac\nexec c++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script), log


def start_tiny(tiny, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", ENSURE_TINY, str(tiny.root)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_builds_once_and_says_so_once(tiny, caplog):
    caplog.set_level(logging.INFO, "pseudoseg_fast")
    assert build.find(tiny) is None
    assert answer(tiny) == 1
    assert [record.getMessage().count("building tiny") for record in caplog.records] == [1]
    assert build.ensure(tiny) == build.find(tiny)
    assert len(caplog.records) == 1


def test_eight_processes_compile_once(tiny, tmp_path):
    compiler, log = slow_compiler(tmp_path, 1)
    processes = [start_tiny(tiny, CXX=compiler) for _ in range(8)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, outputs
    assert len({out for out, _ in outputs}) == 1
    assert log.read_text().count("x") == 1
    assert sum(err.count("building tiny") for _, err in outputs) == 1


def test_killed_builder_blocks_nobody(tiny, cache_folder, tmp_path):
    compiler, log = slow_compiler(tmp_path, 30)
    process = start_tiny(tiny, CXX=compiler)
    try:
        deadline = time.monotonic() + 30
        while not log.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
        (leftover,) = key_folder(cache_folder, tiny).glob("build-*")
        an_hour_and_more_ago = time.time() - 4000
        os.utime(leftover, (an_hour_and_more_ago, an_hour_and_more_ago))
        begin = time.monotonic()
        assert answer(tiny) == 1
        assert time.monotonic() - begin < 15
        assert not leftover.exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_stale_lock_file_is_no_lock(tiny, cache_folder):
    home = key_folder(cache_folder, tiny)
    home.mkdir(parents=True)
    (home / "lock").write_text("12345")
    assert answer(tiny) == 1


def test_hanging_holder_of_the_lock_is_not_waited_for(tiny, cache_folder, monkeypatch):
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.2)
    home = key_folder(cache_folder, tiny)
    home.mkdir(parents=True)
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert answer(tiny) == 1


def test_changed_input_rebuilds(tiny):
    other = dataclasses.replace(tiny, flags=(*tiny.flags, "-DANSWER=2"))
    variant = dataclasses.replace(tiny, units=(build.Unit("answer.cpp", ("-DANSWER=3",)),))
    assert [answer(tiny), answer(other), answer(variant), answer(tiny)] == [1, 2, 3, 1]
    (tiny.root / "answer.cpp").write_text('extern "C" int answer() { return 4; }\n')
    assert answer(tiny) == 4


def test_changed_torch_target_header_or_machine_renames_the_library(monkeypatch):
    before = build.cpu_spec("x86_64")
    assert build.cpu_spec("x86_64").filename == before.filename
    assert build.cpu_spec("aarch64").filename != before.filename
    assert dataclasses.replace(before, headers=before.headers[1:]).filename != before.filename
    monkeypatch.setattr(spec_module, "TORCH_TARGET", 0x020B000000000000)
    assert build.cpu_spec("x86_64").filename != before.filename


def test_changed_torch_or_compiler_changes_the_key(monkeypatch):
    spec, here = build.cpu_spec(), build.find_toolchain()
    other = dataclasses.replace(here, version="another compiler")
    keys = {here.key(spec), other.key(spec)}
    monkeypatch.setattr(toolchain, "package_version", lambda name: "2.99")
    keys.add(here.key(spec))
    assert len(keys) == 3


def test_packaged_library_comes_first(tiny, cache_folder, tmp_path):
    (tmp_path / "packaged").mkdir()
    shutil.copy(build.ensure(tiny).path, tmp_path / "packaged")
    assert build.find(tiny).origin == "packaged"
    (tiny.root / "answer.cpp").write_text('extern "C" int answer() { return 5; }\n')
    assert answer(tiny) == 5, "a packaged library of other sources is not used"


def test_linker_keeps_the_oldest_copy_of_an_inline_function(tiny):
    (tiny.root / "which.cpp").write_text(
        "__attribute__((noinline)) inline int which() { return SET; }\n"
        'extern "C" int NAME() { return which(); }\n'
    )
    units = tuple(
        build.Unit("which.cpp", (f"-DSET={index}", f"-DNAME={name}"), name)
        for index, name in enumerate(["older", "newer"])
    )
    loaded = ctypes.CDLL(str(build.ensure(dataclasses.replace(tiny, units=units)).path))
    assert (loaded.older(), loaded.newer()) == (0, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc as a file system nobody can write")
@pytest.mark.parametrize("variable", ["HOME", "PSEUDOSEG_CACHE"])
def test_unwritable_cache_falls_back_to_a_private_folder(tiny, variable, tmp_path, monkeypatch):
    monkeypatch.delenv("PSEUDOSEG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, "/proc/nobody")
    monkeypatch.setenv("HOME", "/proc/nobody")
    private = tmp_path / f"pseudoseg_fast-{os.getuid()}"
    assert build.ensure(tiny).path.is_relative_to(private)
    assert private.stat().st_mode & 0o777 == 0o700
    private.chmod(0o777)
    assert build.find(tiny) is None, "others may have put a library there"
    with pytest.raises(build.BuildError, match=r"can be written by others\nSet PSEUDOSEG_CACHE"):
        build.ensure(tiny)


def test_failed_compilation_shows_the_compilers_last_lines(tiny, cache_folder):
    (tiny.root / "answer.cpp").write_text(
        "".join(f"#warning line {i}\n" for i in range(40)) + "#error the last\n"
    )
    with pytest.raises(build.BuildError, match="building tiny with") as caught:
        build.ensure(tiny)
    text = str(caught.value)
    assert "#error the last" in text
    assert "line 0" not in text
    assert "PSEUDOSEG_BACKEND=eager" in text
    assert not list(key_folder(cache_folder, tiny).glob("build-*"))


def test_without_compiler_only_cached_libraries(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    built = build.ensure(tiny)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.ensure(tiny) == built
    (tiny.root / "answer.cpp").write_text("// changed\n")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler on PATH .* apt-get install"):
        build.ensure(tiny)


@pytest.mark.usefixtures("cache_folder", "fresh_process")
def test_load_cpu_fails_once_per_process(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.load_cpu()
    monkeypatch.delenv("CXX")
    with pytest.raises(build.BuildError, match="no-such-compiler"):
        build.load_cpu()


@pytest.mark.usefixtures("fresh_process")
def test_eager_setting_avoids_building(cache_folder, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_BACKEND", "eager")
    with pytest.raises(build.BuildError, match="PSEUDOSEG_BACKEND=eager"):
        build.load_cpu()
    assert not cache_folder.exists()


@pytest.mark.usefixtures("fresh_process")
def test_another_setting_is_refused(cache_folder, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_BACKEND", "Eager")
    with pytest.raises(ValueError, match="PSEUDOSEG_BACKEND must be eager or unset, got 'Eager'"):
        build.load_cpu()
    assert not cache_folder.exists()


@pytest.mark.usefixtures("cache_folder", "fresh_process")
def test_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_ISA", "sse9")
    with pytest.raises(ValueError, match=r"PSEUDOSEG_ISA must be one of baseline.*'sse9'"):
        build.load_cpu()


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="needs a cross compiler for arm64")
def test_arm64_compiles(tmp_path):
    spec = build.cpu_spec("aarch64")
    assert [unit.variant for unit in spec.units] == ["", "", "baseline"]
    for unit in spec.units:
        command = ["aarch64-linux-gnu-g++", "-fsyntax-only", *compile_arguments(spec, unit)]
        subprocess.run([*command, str(spec.root / unit.source)], check=True)


def test_importing_builds_nothing_and_needs_no_torch(cache_folder):
    code = "import sys, pseudoseg_fast.build; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert not cache_folder.exists()
