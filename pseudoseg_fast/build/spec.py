"""What is compiled: one `Spec` per native library, read by the JIT build, by setup.py and by CMake.

The CPU kernels are compiled once per instruction set, with ``PSF_ISA`` naming the set, into one library that
chooses among them when it is loaded (csrc/isa.h), so a library carried to another machine runs there. The CUDA
kernels are a library of their own, since a torch without CUDA could not load it; the schemas are in the CPU library.
"""

import hashlib
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

TORCH_TARGET = 0x020A000000000000
"""The oldest torch whose stable ABI the libraries use: 2.10."""

ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX")
"""CUDA architectures of an ahead-of-time build, spelt as in TORCH_CUDA_ARCH_LIST; the PTX serves later ones."""

_COMMON = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
)

_NVCC = (
    "-std=c++20",
    "-O3",
    "--threads=4",  # architectures at once
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra",
    "-DUSE_CUDA",
    "-DPSF_ISA=cuda",
    "-DPSF_DEVICE=CUDA",
)

_X86_64 = {
    "baseline": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
}


_LINK = ("-Wl,-z,defs",) if sys.platform == "linux" else ()


@dataclass(frozen=True)
class Unit:
    """One compilation: a source file, relative to the spec's root, and the flags only it gets."""

    source: str
    flags: tuple[str, ...] = ()
    variant: str = ""

    @property
    def object(self) -> str:
        """Name of the object file, different for each variant of one source."""
        stem = Path(self.source).stem
        return f"{stem}.{self.variant}.o" if self.variant else f"{stem}.o"


@dataclass(frozen=True)
class Spec:
    """All that decides what a native library contains, apart from the compiler.

    `units` are linked in the order given. Order matters: of an inline function that several objects carry the
    linker keeps the first copy, so units for newer instruction sets stand after those for older ones.
    `packages` are the Python packages whose headers are compiled in ("torch", "pybind11"); `libraries` are
    libraries of torch to link. With `architectures` the units are CUDA sources, and nvcc compiles them for these.
    """

    name: str
    root: Path
    units: tuple[Unit, ...]
    headers: tuple[str, ...] = ()
    flags: tuple[str, ...] = _COMMON
    link_flags: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    suffix: str = ".so"
    machine: str = field(default_factory=platform.machine)

    def inputs(self) -> list[Path]:
        """Return every file of ours that the library is made from, each once."""
        return [
            self.root / name for name in dict.fromkeys([unit.source for unit in self.units] + [*self.headers])
        ]

    def digest(self) -> str:
        """Return 16 hexadecimal digits of the hash of sources, headers, flags and platform."""
        recipe = [
            [(unit.source, unit.flags, unit.variant) for unit in self.units],
            [self.name, self.flags, self.link_flags, self.packages, self.libraries, self.suffix],
            [sys.platform, self.machine],
        ]
        hasher = hashlib.sha256(json.dumps(recipe).encode())
        for path in self.inputs():
            content = path.read_bytes()
            hasher.update(f"\0{path.relative_to(self.root)}\0{len(content)}\0".encode())
            hasher.update(content)
        return hasher.hexdigest()[:16]

    @property
    def filename(self) -> str:
        """File name of the library. It carries the digest, so an outdated library is never found."""
        return f"{self.name}-{self.digest()}{self.suffix}"


def source_folder() -> Path:
    """Return the folder csrc: inside the package when installed, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def instruction_sets(machine: str) -> dict[str, tuple[str, ...]]:
    """Return the instruction sets that the CPU kernels are compiled for, oldest first, each with its flags."""
    return _X86_64 if machine in ("x86_64", "AMD64") else {"baseline": ()}


def cpu_spec(machine: str | None = None) -> Spec:
    """Return the spec of the library with the operators' schemas and their CPU kernels.

    Args:
        machine: processor architecture to compile for, as `platform.machine()` spells it; default: this one.
    """
    machine = machine or platform.machine()
    root = source_folder()
    kernels = tuple(
        Unit("kernels_cpu.cpp", (f"-DPSF_ISA={name}", *flags), name)
        for name, flags in instruction_sets(machine).items()
    )
    return Spec(
        name="pseudoseg_cpu",
        root=root,
        units=(Unit("ops.cpp"), Unit("ops_depthwise.cpp"), *kernels),
        headers=_headers(root, "*.h"),
        flags=(*_COMMON, *_stable_abi()),
        link_flags=_LINK,
        packages=("torch",),
        libraries=("torch_cpu",),
        machine=machine,
    )


def cuda_spec(architectures: Iterable[str] = ARCHITECTURES) -> Spec:
    """Return the spec of the library with the CUDA kernels; the CPU library, which has the schemas, is loaded first.

    Args:
        architectures: as in TORCH_CUDA_ARCH_LIST, such as "9.0", or "9.0+PTX" to serve later ones too.

    Raises:
        ValueError: an architecture is not spelt so.
    """
    root = source_folder()
    architectures = tuple(architectures)
    return Spec(
        name="pseudoseg_cuda",
        root=root,
        units=(Unit("cuda/ops.cu"),),
        headers=_headers(root, "*.h", "cuda/*.h", "cuda/*.cuh"),
        flags=(*_NVCC, *_stable_abi(), *(flag for name in architectures for flag in _gencode(name))),
        link_flags=_LINK,
        packages=("torch",),
        libraries=("torch_cuda", "torch_cpu"),
        architectures=architectures,
    )


def _gencode(architecture: str) -> list[str]:
    """Return nvcc's flags for one architecture: machine code, and PTX where it is asked for."""
    match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", architecture)
    if match is None:
        raise ValueError(f"a CUDA architecture is spelt like 9.0 or 9.0+PTX, got {architecture!r}")
    number = match[1] + match[2]
    kinds = ("sm", "compute") if match[3] else ("sm",)
    return [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]


def build_info_spec() -> Spec:
    """Return the spec of the small Python module, without tensors, that tells how the CPU library is compiled."""
    cpu = cpu_spec()
    facts = {
        "PSF_FLAGS": " ".join(cpu.flags),
        "PSF_INSTRUCTION_SETS": " ".join(instruction_sets(cpu.machine)),
        "PSF_CPU_LIBRARY": cpu.filename,
    }
    return Spec(
        name="pseudoseg_build_info",
        root=cpu.root,
        units=(Unit("build_info.cpp"),),
        headers=("isa.h",),
        flags=(*_COMMON, *(f'-D{name}="{text}"' for name, text in facts.items())),
        packages=("pybind11",),
        suffix=str(sysconfig.get_config_var("EXT_SUFFIX")),
    )


def all_specs(architectures: Iterable[str] = ()) -> tuple[Spec, ...]:
    """Return the specs of every library that an ahead-of-time build puts into a wheel.

    Args:
        architectures: of the CUDA library; none for a build without it.
    """
    architectures = tuple(architectures)
    cuda = (cuda_spec(architectures),) if architectures else ()
    return cpu_spec(), build_info_spec(), *cuda


def _stable_abi() -> tuple[str, ...]:
    return "-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET:016x}"


def _headers(root: Path, *patterns: str) -> tuple[str, ...]:
    """Return the headers of csrc that match: any of them may be included by any source."""
    return tuple(
        sorted(path.relative_to(root).as_posix() for pattern in patterns for path in root.glob(pattern))
    )
