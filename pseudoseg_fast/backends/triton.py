"""Run attention, fusion, the whole pseudo label and depthwise convolutions on NVIDIA GPUs with Triton.

The kernels are those of ``kernels/``. With TRITON_INTERPRET=1 the same run on CPU tensors, slowly. Triton is imported
at the first question whether this backend can run. Launches go to the current stream and never wait for the device.
"""

import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pseudoseg_fast.backends import convolution
from pseudoseg_fast.backends.derivatives import no_second_derivative
from pseudoseg_fast.reference import Size

FUNCTIONS = ("depthwise_conv2d", "fuse_predictions", "pseudo_label", "refine_cam")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.bool)
_MAX_DEPTH = 256
_MAX_CLASSES = 1024
_SMALL_LENGTH = 2048
"""Positions up to which PyTorch's scores are no burden: 16 MiB an image in float32."""


def refusal(function: str, tensors: Sequence[Tensor]) -> str:
    """Return why the kernels cannot run a public function on these tensors, or an empty string."""
    if function not in FUNCTIONS:
        return f"it has kernels for {', '.join(FUNCTIONS)}; use another backend"
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            return f"it needs float32, float16 or bfloat16, got {tensor.dtype}; use backend='eager'"
    device = tensors[0].device
    if device.type not in ("cpu", "cuda"):
        return f"it needs CUDA tensors, got one on {device}; use backend='auto'"
    return _size_reason(function, tensors) or _device_reason(device.type, device.index)


def slowness(function: str, tensors: Sequence[Tensor]) -> str:
    """Return by what measurement another backend is faster on a GPU, or an empty string."""
    query = tensors[0]
    if function != "refine_cam" or not query.is_cuda or query.dtype != torch.float32:
        return ""
    if query.shape[1] > _SMALL_LENGTH:
        return ""
    return "PyTorch takes 0.7 ms for 1089 positions in float32 on an H200, forward and backward, these kernels 1.0"


def _size_reason(function: str, tensors: Sequence[Tensor]) -> str:
    """Tell what is larger than a tile of the kernels can be."""
    sizes = {}
    if function in ("refine_cam", "pseudo_label"):
        sizes["channels of query"] = (tensors[0].shape[2], _MAX_DEPTH)
    if function in ("fuse_predictions", "pseudo_label"):
        sizes["classes"] = (tensors[3 if function == "pseudo_label" else 0].shape[1], _MAX_CLASSES)
    for name, (size, limit) in sizes.items():
        if not 1 <= size <= limit:
            return f"it needs 1 to {limit} {name}, got {size}; use backend='eager'"
    return ""


_reasons: dict[tuple[str, int | None], str] = {}
_kernels: list[ModuleType] = []
_loading = threading.Lock()


@torch.compiler.assume_constant_result
def _device_reason(kind: str, index: int | None) -> str:
    """Load the kernels once and look at each device once; return why they cannot run there, or an empty string."""
    with _loading:
        if (kind, index) not in _reasons:  # not functools.cache: torch.compile looks through it
            _reasons[kind, index] = _ask_device(kind, index) or _load()
        return _reasons[kind, index]


def _ask_device(kind: str, index: int | None) -> str:
    """Tell why the kernels cannot run on a device, without importing Triton."""
    if kind == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "it needs CUDA tensors, got one on cpu; use backend='auto', or set TRITON_INTERPRET=1 to debug"
    if torch.version.hip:
        return "it needs an NVIDIA GPU, this torch is built for ROCm; use backend='eager'"
    if not torch.cuda.is_available():  # only fake tensors can be there
        return "it needs an NVIDIA GPU, torch sees none"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {capability}; use backend='eager'"
    return ""


def _load() -> str:
    """Import Triton and the kernels, and register the operators; return why not, or an empty string."""
    if _kernels:
        return ""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with pip install triton"
    if not hasattr(triton, "knobs"):
        return f"it needs Triton 3.4 or newer, got {triton.__version__}; upgrade it with torch"
    kernels = import_kernels()
    _register()
    _kernels.append(kernels)
    return ""


def import_kernels() -> ModuleType:
    """Import the kernels: inside the package when installed, beside it in a source tree.

    Raises:
        ImportError: Triton cannot be imported.
    """
    name = "pseudoseg_fast.kernels"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        folder = Path(__file__).resolve().parents[2] / "kernels"
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return importlib.import_module(name)


def _part(name: str) -> Any:
    return importlib.import_module(f"pseudoseg_fast.kernels.{name}")


def refine_cam(
    query: Tensor, key: Tensor, cam: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """See ``functional.refine_cam``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))  # see launch.dense_rows
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, cam))
    operator = torch.ops.pseudoseg_triton.refine_cam
    if torch.compiler.is_compiling() or not differentiable:
        return operator(query, key, cam, mask, scale, differentiable)[0]
    return _RefineCam.apply(query, key, cam, mask, scale)


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
    return torch.ops.pseudoseg_triton.fuse_predictions(
        decoder_logits.detach(), cam_logits.detach(), height, width, gamma, temperature, norm, align_corners
    )


def pseudo_label(
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    decoder_logits: Tensor,
    *,
    projection: Tensor,
    shift: Tensor,
    background: bool,
    mask: Tensor | None = None,
    size: Size | None = None,
    gamma: float = 0.5,
    temperature: float = 0.5,
    norm: str = "batch",
    align_corners: bool = False,
) -> Tensor:
    """See ``functional.pseudo_label``."""
    height, width = decoder_logits.shape[2:] if size is None else size
    return torch.ops.pseudoseg_triton.pseudo_label(
        query.detach(),
        key.detach(),
        cam.detach(),
        decoder_logits.detach(),
        projection.detach(),
        shift.detach(),
        background,
        mask,
        height,
        width,
        gamma,
        temperature,
        norm,
        align_corners,
    )


depthwise_conv2d = partial(convolution.depthwise_conv2d, "pseudoseg_triton")


class _RefineCam(torch.autograd.Function):
    """The derivative of refine_cam in eager mode, where a registered one would cost more per call."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cam: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        results = torch.ops.pseudoseg_triton.refine_cam(query, key, cam, mask, scale, True)
        _save(ctx, (query, key, cam, mask, scale), results)
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad)


def _save(ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, cam, mask, scale, *_ = inputs
    if mask is not None and mask.is_inference():  # which autograd does not save
        mask = mask.clone()
    ctx.save_for_backward(query, key, cam, mask, *results[1:])
    ctx.scale = scale


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key and cam, and None for mask and scale."""
    query, key, cam, mask, attended, log_total = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    gradients = torch.ops.pseudoseg_triton.refine_cam_backward(
        grad, query, key, cam, mask, ctx.scale, attended, log_total, wanted[0] or wanted[1], wanted[2]
    )
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


_SCHEMAS = {
    "refine_cam": (
        "(Tensor query, Tensor key, Tensor cam, Tensor? mask, float scale, bool keep) -> (Tensor, Tensor, Tensor)"
    ),
    "refine_cam_backward": (
        "(Tensor grad, Tensor query, Tensor key, Tensor cam, Tensor? mask, float scale, Tensor attended, "
        "Tensor log_total, bool with_scores, bool with_cam) -> (Tensor, Tensor, Tensor)"
    ),
    "fuse_predictions": (
        "(Tensor decoder_logits, Tensor cam_logits, SymInt height, SymInt width, float gamma, float temperature, "
        "str norm, bool align_corners) -> Tensor"
    ),
    "pseudo_label": (
        "(Tensor query, Tensor key, Tensor cam, Tensor decoder_logits, Tensor projection, Tensor shift, "
        "bool background, Tensor? mask, SymInt height, SymInt width, float gamma, float temperature, str norm, "
        "bool align_corners) -> Tensor"
    ),
}


def _register() -> None:
    """Make the operators known to torch, with shapes and derivative for torch.compile and for direct use."""
    run: dict[str, Callable[..., Any]] = {
        "refine_cam": lambda *args: _part("refine_cam_forward").plan(*args).run(),
        "refine_cam_backward": _run_refine_cam_backward,
        "fuse_predictions": _run_fuse_predictions,
        "pseudo_label": _run_pseudo_label,
        "depthwise_conv2d": lambda *args: _part("depthwise").plan(*args).run()[0],
        "depthwise_conv2d_backward": _run_depthwise_backward,
    }
    fake: dict[str, Callable[..., Any]] = {
        "refine_cam": _fake_refine_cam,
        "refine_cam_backward": _fake_refine_cam_backward,
        "fuse_predictions": lambda p, m, height, width, *_: p.new_empty((*p.shape[:2], height, width)),
        "pseudo_label": lambda *args: args[3].new_empty((*args[3].shape[:2], *args[8:10])),
    }
    for name, schema in (_SCHEMAS | convolution.SCHEMAS).items():
        qualified = f"pseudoseg_triton::{name}"
        torch.library.define(qualified, schema)
        torch.library.impl(qualified, ("cpu", "cuda"), run[name])
    for name, shapes in fake.items():
        torch.library.register_fake(f"pseudoseg_triton::{name}", shapes)
    convolution.register("pseudoseg_triton")
    torch.library.register_autograd(
        "pseudoseg_triton::refine_cam", _registered_backward, setup_context=_setup_context
    )
    torch.library.register_autograd(
        "pseudoseg_triton::refine_cam_backward", partial(no_second_derivative, "refine_cam")
    )


def _run_refine_cam_backward(*args: Any) -> tuple[Tensor, ...]:
    """Return dense gradients; those of rows that were padded are parts of larger ones."""
    return tuple(part.contiguous() for part in _part("refine_cam_backward").plan(*args).run())


def _run_fuse_predictions(decoder: Tensor, cam: Tensor, height: int, width: int, *options: Any) -> Tensor:
    return _part("fuse_predictions").plan(decoder, cam, (height, width), *options).run()[0]


def _run_pseudo_label(*args: Any) -> Tensor:
    height, width = args[8:10]
    return _part("pseudo_label").plan(*args[:8], (height, width), *args[10:]).run()[0]


def _run_depthwise_backward(
    upstream: Tensor, input: Tensor, weight: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    gradient, partial_sums = _part("depthwise").plan_backward(upstream, input, weight, *arguments).run()
    if not arguments[-1]:
        return gradient, weight.new_empty((0,))
    return gradient, partial_sums.sum(0).T.contiguous().view(weight.shape).to(weight.dtype)


def _fake_refine_cam(
    query: Tensor, key: Tensor, cam: Tensor, mask: Tensor | None, scale: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    images, length, channels = cam.shape
    return (
        cam.new_empty((images, length, channels)),
        cam.new_empty((images, length, channels) if keep else (0,), dtype=torch.float32),
        cam.new_empty((images, length) if keep else (0,), dtype=torch.float32),
    )


def _fake_refine_cam_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    with_scores, with_cam = args[-2:]
    wanted = (with_scores, with_scores, with_cam)
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip(args[:3], wanted, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _save(ctx, inputs, output)


def _registered_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return *_gradients(ctx, grad), None
