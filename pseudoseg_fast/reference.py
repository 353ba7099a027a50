"""Say in plain PyTorch what every public function computes.

The same functions as ``pseudoseg_fast.functional``, which documents shapes, units and errors, without argument
checks and without ``backend``. They may materialise full-size maps: a float64 run of them is the truth in tests,
and the ``"eager"`` backend is these functions.

Arithmetic is done in float64 when an argument is float64, otherwise in float32. Maps come back in the dtype of the
map that they are made of, losses in the dtype of the arithmetic.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

NORM_EPS = 1e-8
"""Added to the mean square of the logits before its reciprocal root is taken (calibrated fusion)."""
BATCH_NORM_EPS = 1e-5
"""Added to the variance in the batch norm of the projected class activation maps."""
MASKED_SCORE = -1e9
"""Attention score of a pair with an invalid position on either side."""
LOWEST_LOGIT = -1e30
"""Lower bound of a logit: ``-inf`` rules a class out and still interpolates to a number."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on these tensors."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast, also for devices that have none, such as ``meta``."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


@torch.compiler.assume_constant_result  # torch.compile of torch 2.10 and 2.11 does not know the question
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def _map_size(logits: Tensor) -> Size:
    return logits.shape[-2], logits.shape[-1]


def upsample(logits: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resize bilinearly, as ``interpolate`` does, with logits bounded below by ``LOWEST_LOGIT``."""
    logits = logits.clamp(min=LOWEST_LOGIT)
    if _map_size(logits) == tuple(size):
        return logits
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=align_corners)


def _interpolation_bands(
    source: int, target: int, align_corners: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the diagonal [source] and the first off-diagonal [source - 1] of W'W, both float64.

    W [target, source] is the linear interpolation matrix of one axis. A row has at most two neighbouring
    non-zeros, so W'W is tridiagonal.
    """
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    index = torch.arange(target, dtype=torch.float64, device=device)
    scale = (source - 1) / max(target - 1, 1) if align_corners else source / target
    position = index * scale if align_corners else (index + 0.5) * scale - 0.5
    position = position.clamp(0, source - 1)
    node = torch.arange(source, dtype=torch.float64, device=device)
    matrix = (1 - (position[:, None] - node).abs()).clamp(min=0)
    return matrix.square().sum(0), (matrix[:, 1:] * matrix[:, :-1]).sum(0)


def mean_square(
    logits: Tensor, size: Size | None = None, *, align_corners: bool = False, per_image: bool = False
) -> Tensor:
    """Compute ``mean(up(X)^2) = <X, (Wy'Wy) X (Wx'Wx)> / n`` by a 9-point stencil on X, without ``up(X)``."""
    logits = logits.to(compute_dtype(logits))
    height, width = _map_size(logits) if size is None else size
    bands_y = _interpolation_bands(logits.shape[-2], height, align_corners, logits.device)
    bands_x = _interpolation_bands(logits.shape[-1], width, align_corners, logits.device)
    diagonal_y, beside_y = (band.to(logits)[:, None] for band in bands_y)
    diagonal_x, beside_x = (band.to(logits) for band in bands_x)

    # The form is symmetric, so each off-diagonal is applied once and counted twice. [B, C, h]
    rows = (diagonal_x * logits.square()).sum(-1)
    rows = rows + 2 * (beside_x * logits[..., 1:] * logits[..., :-1]).sum(-1)
    upper, lower = logits[..., :-1, :], logits[..., 1:, :]
    pairs = (diagonal_x * upper * lower).sum(-1)
    pairs = pairs + (beside_x * (upper[..., 1:] * lower[..., :-1] + upper[..., :-1] * lower[..., 1:])).sum(-1)

    form = (diagonal_y[:, 0] * rows).sum((1, 2)) + 2 * (beside_y[:, 0] * pairs).sum((1, 2))
    per_map = form / (logits.shape[1] * height * width)
    return per_map if per_image else per_map.mean()


def refine_cam(
    query: Tensor, key: Tensor, cam: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute ``cam + softmax(query key' * scale) cam``."""
    dtype = compute_dtype(query, key, cam)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with autocast_off(query.device):
        scores = (query.to(dtype) * scale) @ key.to(dtype).mT  # [B, L, L]
        if mask is not None:
            scores = scores.masked_fill(~(mask[:, :, None] & mask[:, None, :]), MASKED_SCORE)
        values = cam.to(dtype)
        return (values + scores.softmax(-1) @ values).to(cam.dtype)


def _logit_scale(
    decoder_logits: Tensor, cam_logits: Tensor, size: Size, norm: str, align_corners: bool
) -> Tensor | float:
    """Return the common scale of both maps for the norms that need no full-size map."""
    if norm == "none":
        return 1.0
    squares = [
        mean_square(logits, size, align_corners=align_corners, per_image=norm == "image")
        for logits in (decoder_logits, cam_logits)
    ]
    scale = torch.rsqrt((squares[0] + squares[1]) / 2 + NORM_EPS)
    return scale[:, None, None, None] if norm == "image" else scale


def _fuse(
    decoder_logits: Tensor,
    cam_logits: Tensor,
    size: Size | None,
    gamma: float,
    temperature: float,
    norm: str,
    align_corners: bool,
) -> Tensor:
    """Return the soft pseudo label [B, C, H, W] in the dtype of the arithmetic."""
    with torch.no_grad():
        size = _map_size(decoder_logits) if size is None else size
        dtype = compute_dtype(decoder_logits, cam_logits)
        decoder_logits, cam_logits = decoder_logits.to(dtype), cam_logits.to(dtype)
        decoder, cam = (
            upsample(decoder_logits, size, align_corners),
            upsample(cam_logits, size, align_corners),
        )
        scale: Tensor | float
        if norm == "pixel":
            scale = torch.rsqrt((decoder.square() + cam.square()).sum(1, keepdim=True) + NORM_EPS)
        else:
            scale = _logit_scale(decoder_logits, cam_logits, size, norm, align_corners)
        label = gamma * (scale * decoder).softmax(1) + (1 - gamma) * (scale * cam).softmax(1)
        # y^(1/T) / sum y^(1/T), safe from underflow
        return (label.log() / temperature).softmax(1)


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
    """Compute the sharpened ``gamma softmax(s up(p)) + (1 - gamma) softmax(s up(m))``."""
    label = _fuse(decoder_logits, cam_logits, size, gamma, temperature, norm, align_corners)
    return label.to(decoder_logits.dtype)


def project_cam(refined: Tensor, projection: Tensor, shift: Tensor, *, background: bool) -> Tensor:
    """Turn refined maps [B, L, K] into logits [B, L, C]: ``BN(W_c r)``, with ``2 - max_c r`` first in r as background.

    The batch norm takes the biased statistics over B and L, scale 1 and the given shift.
    """
    with autocast_off(refined.device):
        if background:
            refined = torch.cat([2 - refined.amax(-1, keepdim=True), refined], dim=-1)
        projected = refined @ projection.to(refined.dtype).mT
        centered = projected - projected.mean((0, 1))
        # Not torch.var_mean, which torch 2.10 cannot export to ONNX.
        variance = centered.square().mean((0, 1))
        return centered * torch.rsqrt(variance + BATCH_NORM_EPS) + shift.to(refined.dtype)


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
    """Chain attention, background channel, projection with batch norm, and fusion."""
    with torch.no_grad(), autocast_off(query.device):
        dtype = compute_dtype(query, key, cam, decoder_logits)
        refined = refine_cam(query, key, cam.to(dtype).flatten(2).mT, mask=mask)  # [B, L, K]
        logits = project_cam(refined, projection, shift, background=background)
        cam_logits = logits.mT.unflatten(2, _map_size(cam))  # [B, C, h2, w2]
        return fuse_predictions(
            decoder_logits,
            cam_logits,
            size=size,
            gamma=gamma,
            temperature=temperature,
            norm=norm,
            align_corners=align_corners,
        )


def _reduce(loss: Tensor, weight: Tensor | None, count: Tensor | None, reduction: str) -> Tensor:
    """Reduce a loss map [B, H, W]: each pixel times ``weight``, and for the mean divided by ``count``.

    Without ``count`` the mean is over all pixels. Pixels of weight zero contribute zero whatever their loss, and
    a count of zero gives zero.
    """
    if weight is not None:
        loss = torch.where(weight != 0, loss * weight, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if count is None:
        return total / max(loss.numel(), 1)
    return total / torch.where(count > 0, count, 1)


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Compute ``-sum_c target_c log softmax_c(up(logits))`` per pixel, then its weighted mean."""
    dtype = compute_dtype(logits, target)
    log_probability = upsample(logits.to(dtype), _map_size(target), align_corners).log_softmax(1)
    loss = -(target.detach().to(dtype) * log_probability).sum(1)
    if weight is None:
        return _reduce(loss, None, None, reduction)
    weight = weight.detach().to(dtype)
    return _reduce(loss, weight, weight.sum(), reduction)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
) -> Tensor:
    """Compute ``-w_y log softmax_y(up(logits))`` per pixel of label y, then its mean over the sum of w_y."""
    dtype = compute_dtype(logits)
    labels = labels.long()
    counted = (labels != ignore_index) & (labels >= 0) & (labels < logits.shape[1])
    labels = torch.where(counted, labels, 0)
    log_probability = upsample(logits.to(dtype), _map_size(labels), align_corners).log_softmax(1)
    loss = -log_probability.gather(1, labels[:, None])[:, 0]
    weight = counted.to(dtype)
    if class_weight is not None:
        weight = weight * class_weight.detach().to(dtype)[labels]
    return _reduce(loss, weight, weight.sum(), reduction)


def dice_loss(
    logits: Tensor, labels: Tensor, *, ignore_index: int = 255, align_corners: bool = False
) -> Tensor:
    """Compute 1 - the mean over the classes in the labels of ``2 sum(p_c t_c) / (sum(p_c) + sum(t_c))``."""
    labels = labels.long()  # a uint8 would be compared with ignore_index modulo 256
    classes = torch.arange(logits.shape[1], device=logits.device)
    truth = (labels[:, None] == classes[:, None, None]) & (labels != ignore_index)[:, None]
    probability = upsample(logits.to(compute_dtype(logits)), _map_size(labels), align_corners).softmax(1)
    probability = torch.where(truth.any(1, keepdim=True), probability, 0)
    sums = [values.sum((0, 2, 3)) for values in (probability * truth, probability, truth)]
    return dice_of_sums(*sums)


def dice_of_sums(overlap: Tensor, probability: Tensor, pixels: Tensor) -> Tensor:
    """Compute the Dice loss from sums [C] over the labelled pixels: of p_c t_c, of p_c and of t_c."""
    present = pixels > 0
    dice = 2 * overlap / (probability + pixels).clamp(min=1)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


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
    """Compute the soft cross entropy of the student with the fused label of the other two maps."""
    dtype = compute_dtype(student_logits, decoder_logits, cam_logits)
    label = _fuse(decoder_logits.to(dtype), cam_logits, size, gamma, temperature, norm, align_corners)
    confidence, best = label.max(1)
    if hard:
        label = F.one_hot(best, label.shape[1]).movedim(-1, 1).to(dtype)
    log_probability = upsample(student_logits.to(dtype), _map_size(label), align_corners).log_softmax(1)
    loss = -(label * log_probability).sum(1)
    weight = (~(confidence < threshold)).to(dtype)  # a NaN is not hidden
    if valid is None:
        return _reduce(loss, weight, None, reduction)
    return _reduce(loss, weight * valid, valid.sum(), reduction)


def predict_labels(logits: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Compute ``argmax_c up(logits)``; of equal classes the first wins."""
    with torch.no_grad():
        best = upsample(logits.to(compute_dtype(logits)), size, align_corners).argmax(1)
        return best.to(torch.uint8) if logits.shape[1] <= 256 else best


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Convolve each channel with a filter of its own."""
    return F.conv2d(input, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups=len(weight))
