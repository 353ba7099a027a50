"""The CUDA library without a GPU: compiled for every architecture, loaded, and refused where it cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pseudoseg_fast import build, functional
from pseudoseg_fast.backends import cuda
from pseudoseg_fast.build import library, toolchain

ROOT = Path(build.__file__).resolve().parents[2]

LOAD = """
import sys, torch
from pseudoseg_fast import build
build.load_cpu()
torch.ops.load_library(sys.argv[1])
for name in sys.argv[2:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pseudoseg_fast::{name}", "CUDA"), name
"""


def can_compile():
    try:
        build.find_toolchain(build.cuda_spec())
    except build.BuildError:
        return False
    return torch.version.cuda is not None


needs_nvcc = pytest.mark.skipif(not can_compile(), reason="needs nvcc and a torch with CUDA")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The library for every architecture, and what ptxas said of its kernels."""
    folder = tmp_path_factory.mktemp("cuda")
    told = folder / "resources.json"
    command = [sys.executable, "-m", "bench.cuda_resources", "--output", told, "--folder", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.exists(), done.stdout + done.stderr
    return folder / "pseudoseg_cuda.so", json.loads(told.read_text())["kernels"]


@needs_nvcc
def test_no_kernel_spills_on_any_architecture(compiled):
    _, kernels = compiled
    architectures = {row["architecture"] for row in kernels}
    assert architectures == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100"}
    for architecture in architectures:
        assert sum(row["architecture"] == architecture for row in kernels) == 22
    assert [row for row in kernels if row["spill_bytes"]] == []


@needs_nvcc
def test_library_loads_without_a_gpu(compiled):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    operators = {*cuda.FUNCTIONS, "class_sums", "class_sums_backward"} - {
        "dice_loss"
    }  # which is made of these
    command = [sys.executable, "-c", LOAD, str(compiled[0]), *operators]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_nvcc
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_library_uses_only_the_stable_abi_of_torch(compiled):
    command = ["nm", "-D", "--undefined-only", compiled[0]]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in told.splitlines()]
    assert "aoti_torch_get_current_cuda_stream" in symbols
    assert [symbol for symbol in symbols if symbol.startswith(("_ZN3c10", "_ZN2at", "_ZN5torch"))] == []
    assert not any(symbol.startswith("cuda") for symbol in symbols), "CUDA's runtime is inside"


def test_architectures_become_flags():
    flags = build.cuda_spec(["8.6", "10.0+PTX"]).flags
    assert [flag for flag in flags if "gencode" in flag] == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(ValueError, match=r"spelt like 9\.0 .* got 'sm_90'"):
        build.cuda_spec(["sm_90"])
    assert build.cuda_spec(["8.6"]).filename != build.cuda_spec(["9.0"]).filename


def test_jit_builds_for_the_cards_at_hand(monkeypatch):
    capabilities = [(9, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(library, "find", lambda spec: None)
    assert build.cuda_spec_here().architectures == ("8.6", "9.0")
    monkeypatch.setattr(library, "find", lambda spec: spec)
    assert build.cuda_spec_here().architectures == build.ARCHITECTURES
    capabilities[0] = (7, 5)
    assert build.cuda_spec_here().architectures == ("7.5", "8.6", "9.0")


def test_nvcc_is_looked_for_in_three_places(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        build.BuildError, match=r"no nvcc in \$CUDA_HOME .*toolkit'.*`pip install nvidia-cuda-nvcc`"
    ):
        build.find_nvcc()

    class Package:
        submodule_search_locations = (str(tmp_path / "nvidia"),)

    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: Package)
    for place in ("nvidia/cu13/bin/nvcc", "nvcc", "toolkit/bin/nvcc"):  # each is preferred to those before
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        assert build.find_nvcc() == path


def test_forced_backend_says_why_it_cannot_run():
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run predict_labels: it needs CUDA tensors"):
        functional.predict_labels(torch.zeros(1, 1, 1, 1), (1, 1), backend="cuda")
    with pytest.raises(RuntimeError, match=r"'cuda' cannot run refine_cam: it has kernels for consistency"):
        functional.refine_cam(*torch.zeros(3, 1, 2, 2), backend="cuda")


def test_without_nvcc_auto_warns_once(monkeypatch, caplog):
    def fail():
        raise build.BuildError("no nvcc")

    monkeypatch.setattr(cuda, "_loaded", [])
    monkeypatch.setattr(cuda.build, "load_cuda", fail)
    for _ in range(2):
        assert cuda._load() == "no nvcc"
    assert [record.message for record in caplog.records] == ["running without native CUDA kernels: no nvcc"]
