"""Checks of the public functions' arguments: each names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast.reference import Size

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NORMS = ("batch", "image", "pixel", "none")
REDUCTIONS = ("mean", "sum", "none")


def check_floats(**tensors: Tensor) -> None:
    """Refuse dtypes that the functions do not compute with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}: "
                f"convert with {name}.float()"
            )


def check_dimensions(count: int, layout: str, **tensors: Tensor) -> None:
    """Refuse tensors of another number of dimensions than ``count``; ``layout`` names them."""
    for name, tensor in tensors.items():
        if tensor.dim() != count:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")


def check_maps(**tensors: Tensor) -> None:
    """Refuse what is no map [B, C, h, w] of floating-point numbers with classes and pixels."""
    check_floats(**tensors)
    check_dimensions(4, "[B, C, h, w]", **tensors)
    for name, tensor in tensors.items():
        if 0 in tensor.shape[1:]:
            raise ValueError(f"{name} must have classes and pixels, got shape {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Refuse another shape than the expected one; ``meaning`` says where that comes from."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} ({meaning}), got {tuple(tensor.shape)}")


def check_same_classes(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse two maps that differ in images or classes."""
    if tensor.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name} and {other_name} must agree in images and classes, "
            f"got {tuple(tensor.shape)} and {tuple(other.shape)}"
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse what is no label map [B, H, W] of class ids for the logits."""
    if labels.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"labels must be uint8 or int64, got {labels.dtype}: convert with labels.long()")
    check_dimensions(3, "[B, H, W]", labels=labels)
    check_shape("labels", labels, (logits.shape[0], *labels.shape[1:]), "B of logits")
    check_size((labels.shape[1], labels.shape[2]), logits)


def check_mask(name: str, mask: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Refuse a mask that is not bool or has another shape than expected; None is no mask."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, True = valid, got {mask.dtype}: convert with {name}.bool()")
    check_shape(name, mask, expected, meaning)


def check_device(**tensors: Tensor | None) -> None:
    """Refuse tensors on several devices."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"all tensors must be on one device, got {found}")


def check_size(size: Size | None, logits: Tensor) -> Size:
    """Return the label size (H, W); that of the map where none is given."""
    if size is None:
        return logits.shape[2], logits.shape[3]
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"size must be (height, width), got {size!r}")
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"size must be at least 1 x 1, got {tuple(size)}")
    return size[0], size[1]


def check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_fusion(gamma: float, temperature: float, norm: str) -> None:
    """Refuse options of a fusion outside their range."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma, the share of the decoder, must be in [0, 1], got {gamma}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    check_one_of("norm", norm, NORMS)
