"""Load the native libraries into this process, each at most once."""

import importlib.util
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cache import ensure, find
from .errors import REMEDY, BuildError
from .spec import ARCHITECTURES, Spec, build_info_spec, cpu_spec, cuda_spec, instruction_sets

_guard = threading.Lock()
_loaded: dict[str, Any] = {}
_failed: dict[str, str] = {}


def switched_off() -> bool:
    """Return whether PSEUDOSEG_BACKEND says that no native kernels are to be used.

    Raises:
        ValueError: it says something else.
    """
    wanted = os.environ.get("PSEUDOSEG_BACKEND", "")
    if wanted not in ("", "eager"):
        raise ValueError(f"PSEUDOSEG_BACKEND must be eager or unset, got {wanted!r}; correct or unset it")
    return wanted == "eager"


def load_cpu() -> None:
    """Make ``torch.ops.pseudoseg_fast`` available with its CPU kernels, compiling them if that is needed.

    The first call in a process finds or builds the library, seconds at worst; later calls return at once. So does
    a failure: it is remembered, and the process does not try again.

    Raises:
        BuildError: the library is not there and cannot be built, with the compiler's last lines; or building is
            switched off with PSEUDOSEG_BACKEND=eager.
        ValueError: PSEUDOSEG_ISA is set and names no instruction set of this build, or PSEUDOSEG_BACKEND is not eager.
    """
    if "pseudoseg_cpu" in _loaded:
        return
    spec = cpu_spec()
    wanted = os.environ.get("PSEUDOSEG_ISA", "")
    known = list(instruction_sets(spec.machine))
    if wanted and wanted not in known:
        raise ValueError(
            f"PSEUDOSEG_ISA must be one of {', '.join(known)}, got {wanted!r}; correct or unset it"
        )
    _load_once(spec, _load_operators)


def load_cuda() -> None:
    """Give ``torch.ops.pseudoseg_fast`` its CUDA kernels too, compiling them for the GPUs at hand if that is needed.

    A failure is remembered, as by `load_cpu`.

    Raises:
        BuildError: there is no GPU, or as for `load_cpu`.
    """
    if "pseudoseg_cuda" not in _loaded:
        load_cpu()
        _load_once(cuda_spec_here(), _load_operators)


def cuda_spec_here() -> Spec:
    """Return the spec of the CUDA library to use here: of an ahead-of-time build if there is one, else of these GPUs.

    Raises:
        BuildError: torch sees no GPU.
    """
    wanted = devices_architectures()
    if not wanted:
        import torch

        if torch.version.cuda is None:
            raise BuildError("this torch is built without CUDA; install one with it, or use CPU tensors")
        raise BuildError("no CUDA device: torch.cuda.is_available() is False; use CPU tensors")
    every = cuda_spec(ARCHITECTURES)
    oldest = float(ARCHITECTURES[0])
    if all(float(name) >= oldest for name in wanted) and find(every):
        return every
    return cuda_spec(wanted)


def devices_architectures() -> tuple[str, ...]:
    """Return the architectures of the GPUs that torch sees, each once, in ascending order."""
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return tuple(f"{major}.{minor}" for major, minor in sorted(found))


def build_info() -> dict[str, Any]:
    """Return how the CPU library is compiled and what this processor runs of it.

    The keys are ``compiler``, ``flags``, ``cpu_library`` (its file name), ``supported`` and ``in_use`` (instruction
    sets), all str; ``cplusplus``, int; ``instruction_sets`` compiled in, a list of str.

    Raises:
        BuildError: the module that tells it is not there and cannot be built, or building is switched off.
    """
    module = _load_once(build_info_spec(), _load_module)
    return dict(module.build_info())


def _load_once(spec: Spec, load: Callable[[Spec, Path], Any]) -> Any:
    """Return what `load` makes of the library, from the first success or failure of this process."""
    if switched_off():
        raise BuildError("native kernels are switched off by PSEUDOSEG_BACKEND=eager; unset it to use them")
    with _guard:
        if spec.name in _failed:
            raise BuildError(_failed[spec.name])
        if spec.name not in _loaded:
            try:
                _loaded[spec.name] = load(spec, ensure(spec).path)
            except BuildError as error:
                _failed[spec.name] = str(error)
                raise
        return _loaded[spec.name]


def _load_operators(spec: Spec, path: Path) -> Path:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise _cannot_load(path, error) from error
    return path


def _load_module(spec: Spec, path: Path) -> Any:
    found = importlib.util.spec_from_file_location(spec.name, path)
    if found is None or found.loader is None:
        raise BuildError(f"{path} is not a Python module")
    try:
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except ImportError as error:
        raise _cannot_load(path, error) from error
    return module


def _cannot_load(path: Path, error: Exception) -> BuildError:
    return BuildError(
        f"{path} cannot be loaded: {error}\nIf it comes from another system, delete it and it is built here; if its "
        f"folder is mounted noexec, set PSEUDOSEG_CACHE to one that is not; {REMEDY}"
    )
