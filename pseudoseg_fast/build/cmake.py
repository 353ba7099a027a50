"""Tell CMakeLists.txt what to compile, in CMake's words."""

from .compile import compile_arguments
from .spec import all_specs
from .toolchain import link_arguments


def cmake_variables() -> str:
    """Return CMake commands that set one list for each library and unit; CMakeLists.txt says what they mean."""
    specs = all_specs()
    lines = [_set("PSF_LIBRARIES", [spec.name for spec in specs])]
    lines.append(_set("PSF_INPUTS", sorted({str(path) for spec in specs for path in spec.inputs()})))
    for spec in specs:
        lines += [
            _set(f"{spec.name}_FILENAME", [spec.filename]),
            _set(f"{spec.name}_LINK", link_arguments(spec)),
            _set(f"{spec.name}_UNITS", [unit.object for unit in spec.units]),
        ]
        for unit in spec.units:
            lines += [
                _set(f"{spec.name}_{unit.object}_SOURCE", [str(spec.root / unit.source)]),
                _set(f"{spec.name}_{unit.object}_FLAGS", _joined_pairs(compile_arguments(spec, unit))),
            ]
    return "\n".join(lines) + "\n"


def _joined_pairs(arguments: list[str]) -> list[str]:
    """Write "-isystem folder" as one item, so that CMake does not drop the repeated "-isystem"."""
    text = "\0".join(arguments).replace("-isystem\0", "SHELL:-isystem ")
    return text.split("\0")


def _set(name: str, values: list[str]) -> str:
    return f"set({name} {' '.join(f'[==[{value}]==]' for value in values)})"
