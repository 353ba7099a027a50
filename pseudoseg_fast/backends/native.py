"""Call the operators of csrc: what the C++ and the CUDA backend share, whose kernels run on different devices.

The operators compute the gradient with respect to the logits along with a reduced loss, at the low resolution;
backward scales it. A second backward through the same graph, and the backward of an unreduced loss, run the operator
again. Second derivatives are refused.
"""

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pseudoseg_fast.backends import convolution
from pseudoseg_fast.backends.derivatives import no_second_derivative
from pseudoseg_fast.build import BuildError, switched_off
from pseudoseg_fast.reference import NORM_EPS, Size, compute_dtype, dice_of_sums

logger = logging.getLogger(__name__)

_REDUCTIONS = {"mean": 0, "sum": 1, "none": 2}
_NORMS = {"batch": 0, "image": 1, "pixel": 2, "none": 3}


_registered: list[bool] = []
_registering = threading.Lock()


def load(library: Callable[[], None], kind: str) -> str:
    """Load a library of kernels, with shapes and derivatives of their operators; return why not, or an empty string.

    Args:
        library: builds the library if need be and loads it.
        kind: "CPU" or "CUDA", for the one warning where that fails and nobody asked for it.
    """
    try:
        library()
    except BuildError as error:
        if not switched_off():
            logger.warning("running without native %s kernels: %s", kind, error)
        return str(error)
    with _registering:
        if not _registered:  # they hold for every device
            _register()
            _registered.append(True)
    return ""


def _register() -> None:
    """Give the operators shapes and derivatives, for every device."""
    for name, maps in _LOSSES.items():
        _register_loss(name, maps)
    torch.library.register_fake("pseudoseg_fast::fuse_predictions", _fake_fuse_predictions)
    torch.library.register_fake("pseudoseg_fast::predict_labels", _fake_predict_labels)
    torch.library.register_fake("pseudoseg_fast::class_sums", _fake_class_sums)
    torch.library.register_fake("pseudoseg_fast::class_sums_backward", _fake_class_sums_backward)
    torch.library.register_autograd(
        "pseudoseg_fast::class_sums", _class_sums_backward, setup_context=_save_class_sums
    )
    torch.library.register_autograd(
        "pseudoseg_fast::class_sums_backward", partial(no_second_derivative, "dice_loss")
    )
    convolution.register("pseudoseg_fast")


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """See ``functional.soft_cross_entropy``."""
    return _loss(
        torch.ops.pseudoseg_fast.soft_cross_entropy,
        logits,
        None,
        target,
        weight,
        _REDUCTIONS[reduction],
        align_corners,
        _wants_gradient(logits, reduction),
    )


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """See ``functional.cross_entropy``."""
    return _loss(
        torch.ops.pseudoseg_fast.cross_entropy,
        logits,
        None,
        labels,
        class_weight,
        ignore_index,
        _REDUCTIONS[reduction],
        align_corners,
        _wants_gradient(logits, reduction),
    )


def dice_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """See ``functional.dice_loss``."""
    sums = torch.ops.pseudoseg_fast.class_sums(logits, labels, ignore_index, align_corners)
    return dice_of_sums(*sums.unbind())


def consistency_loss(
    student_logits: Tensor,
    decoder_logits: Tensor,
    cam_logits: Tensor,
    *,
    valid: Tensor | None = None,
    size: Size | None = None,
    gamma: float = 0.5,
    temperature: float = 0.5,
    norm: str = "batch",
    threshold: float = 0.0,
    hard: bool = False,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """See ``functional.consistency_loss``."""
    height, width = decoder_logits.shape[2:] if size is None else size
    return _loss(
        torch.ops.pseudoseg_fast.consistency_loss,
        student_logits,
        None,
        decoder_logits,
        cam_logits,
        valid,
        height,
        width,
        gamma,
        temperature,
        _NORMS[norm],
        NORM_EPS,
        threshold,
        hard,
        _REDUCTIONS[reduction],
        align_corners,
        _wants_gradient(student_logits, reduction),
    )


def fuse_predictions(
    decoder_logits: Tensor,
    cam_logits: Tensor,
    *,
    size: Size | None = None,
    gamma: float = 0.5,
    temperature: float = 0.5,
    norm: str = "batch",
    align_corners: bool = False,
) -> Tensor:
    """See ``functional.fuse_predictions``."""
    height, width = decoder_logits.shape[2:] if size is None else size
    return torch.ops.pseudoseg_fast.fuse_predictions(
        decoder_logits.detach(),
        cam_logits.detach(),
        height,
        width,
        gamma,
        temperature,
        _NORMS[norm],
        NORM_EPS,
        align_corners,
    )


def predict_labels(logits: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """See ``functional.predict_labels``."""
    return torch.ops.pseudoseg_fast.predict_labels(logits.detach(), size[0], size[1], align_corners)


depthwise_conv2d = partial(convolution.depthwise_conv2d, "pseudoseg_fast")


def _wants_gradient(logits: Tensor, reduction: str) -> bool:
    """Tell whether forward should compute the gradient; that of an unreduced loss waits for its upstream one."""
    return reduction != "none" and logits.requires_grad and torch.is_grad_enabled()


# Every loss operator takes (logits, upstream gradient or None, label..., reduction, align_corners, gradient) and
# returns (loss, denominator, gradient). These are the positions of its maps, which decide the dtype of the arithmetic
# as in the reference.
_LOSSES = {"soft_cross_entropy": (0, 2), "cross_entropy": (0,), "consistency_loss": (0, 2, 3)}


def _loss(operator: Any, logits: Tensor, *others: Any) -> Tensor:
    """Return the loss, differentiable in the logits alone."""
    detached = [value.detach() if isinstance(value, Tensor) else value for value in others]
    if torch.compiler.is_compiling() or not (logits.requires_grad and torch.is_grad_enabled()):
        return operator(logits, *detached)[0]
    return _Loss.apply(operator, _writes(others), logits, *detached)


def _writes(values: Sequence[Any]) -> list[tuple[weakref.ref[Tensor], int]]:
    """Return the caller's tensors, not kept alive, and how often each was written to."""
    tensors = [value for value in values if isinstance(value, Tensor) and not value.is_inference()]
    owners = [value._base if value._base is not None else value for value in tensors]
    return [(weakref.ref(owner), owner._version) for owner in owners]


class _Once(torch.autograd.Function):
    """A gradient whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _: Tensor, function: str) -> Tensor:
        ctx.function = function
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        no_second_derivative(ctx.function, ctx)


class _Loss(torch.autograd.Function):
    """The derivative of a loss operator in eager mode: it owns the gradient and scales it in place."""

    @staticmethod
    def forward(ctx: Any, operator: Any, writes: Any, logits: Tensor, *others: Any) -> Tensor:
        loss, denominator, gradient = operator(logits, *others)
        kept = [_savable(value, guarded=not others[-1]) for value in others]
        _save(ctx, (logits, *kept), denominator, gradient)
        ctx.operator, ctx.writes = operator, writes
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None and any(
            (of := ref()) is not None and of._version != n for ref, n in ctx.writes
        ):
            raise RuntimeError(
                "a label, weight or mask of the loss was written to since forward, and its gradient is computed now: "
                "write to a copy"
            )
        with torch.no_grad():
            gradient, scale, logits = _unscaled_gradient(ctx, ctx.operator, grad)
            ctx.gradient = None  # the next backward computes it anew
            if scale is not None:
                functorch = torch._C._functorch  # whose batches cannot be written into one gradient
                batched = functorch.is_legacy_batchedtensor(scale) or functorch.is_batchedtensor(scale)
                gradient = gradient * scale if batched else gradient.mul_(scale)
        gradient = _differentiable_once(ctx.operator, gradient.to(ctx.dtype), logits)
        return None, None, gradient, *[None] * len(ctx.others)


def _savable(value: Any, *, guarded: bool) -> Any:
    """Return what autograd can save of an argument without a gradient; unguarded, it may be written to from then on."""
    if not isinstance(value, Tensor):
        return value
    if value.is_inference():  # of which autograd saves none
        return value.clone()
    return value if guarded else value.data


def _save(ctx: Any, arguments: tuple[Any, ...], denominator: Tensor, gradient: Tensor) -> None:
    """Keep what backward needs of one call of a loss operator."""
    logits, *others = arguments
    ctx.save_for_backward(denominator, logits, *(value for value in others if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in others]
    ctx.gradient = gradient if arguments[-1] else None
    ctx.dtype = logits.dtype


def _unscaled_gradient(ctx: Any, operator: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradient of the logits, the factor that it lacks, and the logits; computed now if not in forward."""
    denominator, logits, *tensors = ctx.saved_tensors
    remaining = iter(tensors)
    others = [next(remaining) if other is None else other[0] for other in ctx.others]
    unreduced = others[-3] == _REDUCTIONS["none"]
    gradient = ctx.gradient
    if gradient is None:
        others[0] = grad if unreduced else None
        others[-3], others[-1] = _REDUCTIONS["sum"], True
        _, _, gradient = operator(logits, *others)
    return gradient, None if unreduced else grad / denominator, logits


def _differentiable_once(operator: Any, gradient: Tensor, logits: Tensor) -> Tensor:
    """Return a gradient that is a part of a graph, where one is made of backward, but refuses its own derivative."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # torch.compile refuses it by itself
        return gradient
    return _Once.apply(gradient, logits, operator.__name__)


def _register_loss(name: str, maps: tuple[int, ...]) -> None:
    """Register shapes and derivative of a loss operator for torch.compile and for direct use."""
    operator = getattr(torch.ops.pseudoseg_fast, name)

    def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits = arguments[0]
        reduction, _, with_gradient = arguments[-3:]
        dtype = compute_dtype(*(arguments[i] for i in maps))
        size: tuple[int, ...] = ()
        if reduction == _REDUCTIONS["none"]:
            size = arguments[5:7] if name == "consistency_loss" else arguments[2].shape[-2:]
            size = (logits.shape[0], *size)
        return (
            logits.new_empty(size, dtype=dtype),
            logits.new_empty((), dtype=dtype),
            logits.new_empty(logits.shape if with_gradient else (0,), dtype=dtype),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, denominator, gradient = output
        ctx.mark_non_differentiable(denominator, gradient)
        _save(ctx, inputs, denominator, gradient)

    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradient, scale, logits = _unscaled_gradient(ctx, operator, grad.detach())
        if scale is not None:
            gradient = gradient * scale
        return _differentiable_once(operator, gradient.to(ctx.dtype), logits), *[None] * len(ctx.others)

    torch.library.register_fake(f"pseudoseg_fast::{name}", fake)
    torch.library.register_autograd(f"pseudoseg_fast::{name}", backward, setup_context=setup_context)


def _fake_fuse_predictions(decoder_logits: Tensor, _: Tensor, height: int, width: int, *__: Any) -> Tensor:
    return decoder_logits.new_empty((*decoder_logits.shape[:2], height, width))


def _fake_predict_labels(logits: Tensor, height: int, width: int, _: bool) -> Tensor:
    dtype = torch.uint8 if logits.shape[1] <= 256 else torch.int64
    return logits.new_empty((logits.shape[0], height, width), dtype=dtype)


def _fake_class_sums(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((3, logits.shape[1]), dtype=compute_dtype(logits))


def _fake_class_sums_backward(_: Tensor, logits: Tensor, *__: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=compute_dtype(logits))


def _save_class_sums(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, labels, *ctx.options = inputs
    # Autograd saves no tensor of inference mode.
    ctx.save_for_backward(logits, labels.clone() if labels.is_inference() else labels)


def _class_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels = ctx.saved_tensors
    gradient = torch.ops.pseudoseg_fast.class_sums_backward(grad, logits, labels, *ctx.options)
    return gradient.to(logits.dtype), None, None, None
