"""Print what a bug report needs: versions, compiler, native libraries, and the backend of every public function.

python -m pseudoseg_fast.env

Native libraries are looked for, built and loaded as at first use, so a build that fails is shown in full. With
PSEUDOSEG_BACKEND=eager nothing is built.
"""

import argparse
import importlib.metadata
import inspect
import os
import platform
import textwrap
from pathlib import Path

import torch

from pseudoseg_fast import __version__, backends, build, functional

_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "segmentation-models-pytorch",
    "timm",
    "lightning-fabric",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pybind11",
    "ninja",
)

_VARIABLES = (
    "CXX",
    "CUDA_HOME",
    "NVCC_CCBIN",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_VISIBLE_DEVICES",
)

_MAP = (1, 2, 4, 4)
_PROBES: dict[str, tuple[tuple[int, ...], ...]] = {
    "refine_cam": ((1, 16, 8), (1, 16, 8), (1, 16, 2)),
    "fuse_predictions": (_MAP, _MAP),
    "pseudo_label": ((1, 16, 8), (1, 16, 8), _MAP, _MAP, (2, 2), (2,)),
    "soft_cross_entropy": (_MAP, _MAP),
    "cross_entropy": (_MAP, (1, 4, 4)),
    "dice_loss": (_MAP, (1, 4, 4)),
    "consistency_loss": (_MAP, _MAP, _MAP),
    "predict_labels": (_MAP,),
    "depthwise_conv2d": (_MAP, (2, 1, 3, 3)),
}
"""Shapes of the tensors that the choice of a backend is asked about, for each public function."""


def report() -> dict[str, dict[str, str]]:
    """Collect the report: for each section its entries in order, all as text."""
    sections = {"versions": versions(), "machine": machine(), "settings": _settings(), "native": _native()}
    for device in ("cpu", "cuda"):
        sections[f"backend of {device} tensors, the first without an objection"] = _choices(device)
    return sections


def render(sections: dict[str, dict[str, str]]) -> str:
    """Lay the report out as indented text; further lines of an entry are indented under its first."""
    lines = []
    for title, entries in sections.items():
        lines.append(f"{title}:")
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            first, *rest = text.splitlines() or [""]
            lines.append(f"  {name:<{width}}  {first}")
            lines += textwrap.indent("\n".join(rest), "      ").splitlines()
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter."""
    entries = {
        "pseudoseg_fast": f"{__version__} in {Path(__file__).parent}",
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
    }
    for name in _PACKAGES:
        try:
            entries[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not name.endswith("-gpu"):
                entries[name] = "not installed"
    entries["torch"] = str(torch.__version__)
    entries["torch CUDA"] = torch.version.cuda or "built without"
    return entries


def machine() -> dict[str, str]:
    """Return the system, the processor and the GPUs."""
    entries = {
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver()) or 'unknown C library'}",
        "processor": f"{_processor()}, {os.cpu_count()} logical, torch uses {torch.get_num_threads()} threads",
        "cuda": f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no device",
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        entries[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    return entries


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({platform.machine()})" if names else platform.machine()


def _settings() -> dict[str, str]:
    names = sorted(name for name in os.environ if name.startswith("PSEUDOSEG_"))
    set_here = {name: os.environ[name] for name in [*names, *_VARIABLES] if name in os.environ}
    return set_here or {"none": ""}


def _native() -> dict[str, str]:
    """Tell where the libraries are, then build and load them as the first use would."""
    cpu = build.cpu_spec()
    found = build.find(cpu)
    entries = {
        "compiler here": _compiler(),
        "cache folders": ", ".join(map(str, build.cache_folders())),
        "cpu library": f"{found.origin}, {found.path}"
        if found
        else "absent until it is built, in a cache folder",
    }
    try:
        build.load_cpu()
        entries["loaded"] = "yes"
    except (build.BuildError, ValueError) as error:
        entries["loaded"] = f"no: {error}"
    try:
        info = build.build_info()
    except build.BuildError as error:
        return entries | {"built by": f"unknown: {error}"} | _native_cuda()
    return entries | {
        "built by": info["compiler"],
        "flags": info["flags"],
        "instruction sets": f"{', '.join(info['instruction_sets'])}; in use: {info['in_use']}",
        **_native_cuda(),
    }


def _native_cuda() -> dict[str, str]:
    try:
        entries = {"nvcc here": f"{build.nvcc_version()} ({build.find_nvcc()})"}
    except build.BuildError as error:
        entries = {"nvcc here": str(error)}
    try:
        spec = build.cuda_spec_here()
        found = build.find(spec)
        entries["cuda library"] = f"{found.origin}, {found.path}" if found else "absent until it is built"
        entries["CUDA architectures"] = ", ".join(spec.architectures)
        build.load_cuda()
        entries["cuda loaded"] = "yes"
    except build.BuildError as error:
        entries["cuda loaded"] = f"no: {error}"
    return entries


def _compiler() -> str:
    try:
        toolchain = build.find_toolchain()
    except build.BuildError as error:
        return str(error)
    return f"{toolchain.version} ({' '.join(toolchain.cxx)})"


def _choices(device: str) -> dict[str, str]:
    """Tell for each public function which backend ``"auto"`` takes, and why none that is tried before it."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"all": "no CUDA device: torch.cuda.is_available() is False"}
    return {name: _choice(name, device) for name in public_functions()}


def _choice(function: str, device: str) -> str:
    tensors = [torch.zeros(shape, device=device) for shape in _PROBES[function]]
    objections: list[str] = []
    for name in backends.BACKENDS:
        objection = backends.objection(name, function, tensors)
        if not objection:
            return "\n".join([name, *objections])
        objections.append(f"not {name}: {objection.partition(chr(10))[0]}")
    return "\n".join(["none", *objections])


def public_functions() -> list[str]:
    """Return the names of the public functions that have backends."""
    functions = inspect.getmembers(functional, inspect.isfunction)
    return [name for name, function in functions if "backend" in inspect.signature(function).parameters]


def main() -> None:
    """Print the report."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pseudoseg_fast.env", description=summary)
    parser.parse_args()
    try:
        print(render(report()))
    except ValueError as error:  # a variable that no program would run with
        parser.error(str(error))


if __name__ == "__main__":
    main()
