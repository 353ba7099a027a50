"""A pytest plugin: in this process the CPU operators are the CUDA kernels, compiled for the processor.

The library is that of csrc/cuda with the headers of this folder in place of CUDA's; its implementations take the
place of those that the CPU library registers, so every test of the backend "cpp" tests the CUDA kernels.
"""

import dataclasses
from pathlib import Path

import torch

from pseudoseg_fast import build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def shim_spec():
    cuda = build.cuda_spec()
    kept = [flag for flag in cuda.flags if flag.startswith(("-DTORCH", "-DUSE", "-DPSF_ISA"))]
    shim = str(HERE.relative_to(ROOT))
    return dataclasses.replace(
        cuda,
        name="pseudoseg_cuda_shim",
        root=ROOT,
        units=(build.Unit("csrc/cuda/ops.cu", ("-x", "c++")), build.Unit(f"{shim}/cuda_shim.cpp")),
        headers=(*(f"csrc/{name}" for name in cuda.headers), f"{shim}/cuda_runtime.h"),
        flags=(
            *(
                "-std=c++20",
                "-O2",
                "-fPIC",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-unknown-pragmas",
            ),
            *(
                "-U_FORTIFY_SOURCE",
                "-DPSF_DEVICE=CPU",
                *kept,
            ),  # a fiber ends in a longjmp that fortifying refuses
            *(f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
        ),
        link_flags=("-Wl,-Bsymbolic",),  # its stand-ins for torch's CUDA functions, not torch's
        libraries=("torch_cpu",),
        architectures=(),
    )


def pytest_configure(config):
    build.load_cpu()
    torch.ops.load_library(str(build.ensure(shim_spec()).path))
    told = torch._C._dispatch_dump("pseudoseg_fast::consistency_loss")
    assert "CPU: registered at" in told
    assert "ops.cu" in told
