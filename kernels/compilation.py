"""Compile a launch for a named GPU architecture, on a machine without a GPU, and tell what it takes there."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import machine_code
from .launch import Launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
}


class Resources(NamedTuple):
    """What a program takes: registers and stack bytes (spills) of a thread, shared memory in bytes.

    Beside it what makes it wrong: the number of reads of uniform registers that nothing has written.
    """

    registers: int
    stack: int
    shared: int
    unwritten: int


def compile_for(launch: Launch, capability: int) -> Resources:
    """Compile a launch as its first run would on a GPU of this compute capability (80, 90, 100, ...).

    Like a run, it turns integers equal to 1 into constants and assumes pointers and multiples of 16 to be aligned.

    Raises:
        triton.compiler.errors.CompilationError, RuntimeError: the kernel does not compile, or ptxas refuses it.
    """
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    cubin = compiled.asm["cubin"]
    usage = _resource_usage(cubin)
    return Resources(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        unwritten=len(machine_code.unwritten_reads(machine_code.disassemble(cubin))),
    )


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Return the types of a kernel's arguments, its constants and the alignment of arguments."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resource_usage(cubin: bytes) -> dict[str, str]:
    """Ask cuobjdump, which comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run(
            [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
