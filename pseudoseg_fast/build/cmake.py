"""Tell CMakeLists.txt what to compile, in CMake's words."""

from collections.abc import Iterable

from .compile import compile_arguments
from .spec import all_specs
from .toolchain import find_nvcc, link_arguments


def cmake_variables(architectures: Iterable[str] = ()) -> str:
    """Return CMake commands that set one list for each library and unit; CMakeLists.txt says what they mean.

    Args:
        architectures: of the CUDA library; none for a build without it.
    """
    specs = all_specs(architectures)
    lines = [_set("PSF_LIBRARIES", [spec.name for spec in specs])]
    lines.append(_set("PSF_INPUTS", sorted({str(path) for spec in specs for path in spec.inputs()})))
    for spec in specs:
        lines += [
            _set(f"{spec.name}_FILENAME", [spec.filename]),
            _set(f"{spec.name}_LINK", link_arguments(spec)),
            _set(f"{spec.name}_UNITS", [unit.object for unit in spec.units]),
        ]
        lines.append(_set(f"{spec.name}_NVCC", [str(find_nvcc())] if spec.architectures else []))
        for unit in spec.units:
            flags = compile_arguments(spec, unit)
            lines += [
                _set(f"{spec.name}_{unit.object}_SOURCE", [str(spec.root / unit.source)]),
                _set(
                    f"{spec.name}_{unit.object}_FLAGS", flags if spec.architectures else _joined_pairs(flags)
                ),
            ]
    return "\n".join(lines) + "\n"


def _joined_pairs(arguments: list[str]) -> list[str]:
    """Write "-isystem folder" as one item, so that CMake does not drop the repeated "-isystem"."""
    text = "\0".join(arguments).replace("-isystem\0", "SHELL:-isystem ")
    return text.split("\0")


def _set(name: str, values: list[str]) -> str:
    return f"set({name} {' '.join(f'[==[{value}]==]' for value in values)})"
