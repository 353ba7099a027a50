"""Public functions: they check their arguments and choose a backend. ``pseudoseg_fast.reference`` has the formulas.

Shapes: B images, C classes, K foreground classes, L positions, low-resolution maps [B, C, h, w], label size [H, W].
Maps are bilinearly resized inside, with the meaning of ``align_corners`` in ``torch.nn.functional.interpolate``.

Dtypes: float32, float16, bfloat16 or float64, mixed as you like. Arithmetic is done in float64 when an argument is
float64, otherwise in float32; losses come back in that dtype, maps in the dtype of the map that they are made of.
A logit of ``-inf`` rules its class out of losses and predictions, as long as a pixel has another class; the norms of a
fusion need finite logits, but for ``"none"``. NaN logits have no defined result.

The kernels have first derivatives, and refuse a second one. Where ``torch.func`` or forward mode transforms a call,
``"auto"`` is ``"eager"``.

``backend`` is ``"auto"`` or the name of one; a forced backend that cannot run raises a RuntimeError that says why.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast import backends
from pseudoseg_fast.arguments import (
    REDUCTIONS,
    check_device,
    check_dimensions,
    check_floats,
    check_fusion,
    check_labels,
    check_maps,
    check_mask,
    check_one_of,
    check_same_classes,
    check_shape,
    check_size,
)
from pseudoseg_fast.reference import Size


def refine_cam(
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Refine class activation maps by self-attention: ``cam + softmax(query key' * scale) cam``.

    Args:
        query, key: [B, L, D].
        cam: [B, L, K].
        mask: [B, L] bool, True = valid. A pair with an invalid position on either side scores -1e9 before the
            softmax, so an invalid position receives the plain mean of ``cam``.
        scale: factor of the scores; None for ``1 / sqrt(D)``.

    Returns:
        [B, L, K]. Differentiable in query, key and cam.

    Source: the self-attention Grad-CAM of PseudoSeg (arXiv 2010.09713), with its release's residual.
    """
    check_floats(query=query, key=key, cam=cam)
    check_dimensions(3, "[B, L, channels]", query=query, key=key, cam=cam)
    check_shape("key", key, tuple(query.shape), "the shape of query")
    check_shape("cam", cam, (query.shape[0], query.shape[1], cam.shape[2]), "[B, L] of query")
    check_mask("mask", mask, tuple(query.shape[:2]), "[B, L] of query")
    check_device(query=query, key=key, cam=cam, mask=mask)
    run = backends.choose("refine_cam", (query, key, cam, mask), backend)
    return run(query, key, cam, mask=mask, scale=scale)


def fuse_predictions(
    decoder_logits: Tensor,
    cam_logits: Tensor,
    *,
    size: Size | None = None,
    gamma: float = 0.5,
    temperature: float = 0.5,
    norm: str = "batch",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Fuse decoder and SGC logits into a soft pseudo label.

    ``y = gamma softmax(s up(p)) + (1 - gamma) softmax(s up(m))``, then ``y^(1/T) / sum y^(1/T)``.

    Args:
        decoder_logits: p, [B, C, h, w].
        cam_logits: m, [B, C, h2, w2].
        size: label size (H, W); None for (h, w).
        gamma: share of the decoder in [0, 1]; 1 is the decoder alone, 0 SGC alone.
        temperature: T > 0. Where it is neither 1 nor 0.5, C++ takes probabilities of 2^-125 and less for
            zero, and CUDA those below 2^-126.
        norm: the scale s of both maps is ``rsqrt(mean(up(p)^2, up(m)^2) + 1e-8)``, the mean being over the
            ``"batch"`` or each ``"image"``; ``"pixel"`` takes the sum over the 2C logits of each pixel in place of
            the mean; ``"none"`` is s = 1.

    Returns:
        [B, C, H, W] in the dtype of decoder_logits. Not differentiable.

    Source: equations 3 and 4 of PseudoSeg (arXiv 2010.09713); norm="batch" is its release's.
    """
    check_maps(decoder_logits=decoder_logits, cam_logits=cam_logits)
    check_same_classes("cam_logits", cam_logits, "decoder_logits", decoder_logits)
    check_device(decoder_logits=decoder_logits, cam_logits=cam_logits)
    size = check_size(size, decoder_logits)
    check_fusion(gamma, temperature, norm)
    run = backends.choose("fuse_predictions", (decoder_logits, cam_logits), backend)
    return run(
        decoder_logits,
        cam_logits,
        size=size,
        gamma=gamma,
        temperature=temperature,
        norm=norm,
        align_corners=align_corners,
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
    backend: str = "auto",
) -> Tensor:
    """Make the soft pseudo label from features, class activation maps and decoder logits.

    ``r = refine_cam(query, key, cam)``; with a background class ``2 - max_c r`` is prepended as its channel;
    ``m = BN(projection r)`` with the biased batch statistics over B, h2 and w2, epsilon 1e-5, scale 1 and the given
    shift; then ``fuse_predictions(decoder_logits, m)``.

    Args:
        query, key: [B, h2 * w2, D].
        cam: [B, K, h2, w2].
        decoder_logits: [B, C, h, w], C = K + 1 with a background class and K without.
        projection: [C, C], output class by input channel.
        shift: [C].
        background: whether there is a background class.
        mask: [B, h2 * w2] bool, see ``refine_cam``.
        size, gamma, temperature, norm: see ``fuse_predictions``.

    Returns:
        [B, C, H, W] in the dtype of decoder_logits. Not differentiable.
    """
    check_maps(cam=cam, decoder_logits=decoder_logits)
    check_floats(query=query, key=key, projection=projection, shift=shift)
    check_dimensions(3, "[B, L, D]", query=query, key=key)
    positions = cam.shape[2] * cam.shape[3]
    check_shape("query", query, (cam.shape[0], positions, query.shape[2]), "[B, h2 * w2] of cam")
    check_shape("key", key, tuple(query.shape), "the shape of query")
    check_mask("mask", mask, tuple(query.shape[:2]), "[B, h2 * w2] of cam")
    classes = cam.shape[1] + int(background)
    expected = (cam.shape[0], classes, *decoder_logits.shape[2:])
    check_shape("decoder_logits", decoder_logits, expected, f"B and K of cam with background={background}")
    check_shape("projection", projection, (classes, classes), "[C, C]")
    check_shape("shift", shift, (classes,), "[C]")
    check_device(
        query=query,
        key=key,
        cam=cam,
        decoder_logits=decoder_logits,
        projection=projection,
        shift=shift,
        mask=mask,
    )
    size = check_size(size, decoder_logits)
    check_fusion(gamma, temperature, norm)
    tensors = (query, key, cam, decoder_logits, projection, shift, mask)
    run = backends.choose("pseudo_label", tensors, backend)
    return run(
        query,
        key,
        cam,
        decoder_logits,
        projection=projection,
        shift=shift,
        background=background,
        mask=mask,
        size=size,
        gamma=gamma,
        temperature=temperature,
        norm=norm,
        align_corners=align_corners,
    )


def soft_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute the cross entropy of upsampled logits with a soft label: ``-sum_c target_c log softmax_c(up(logits))``.

    Args:
        logits: [B, C, h, w].
        target: [B, C, H, W]; need not sum to 1.
        weight: [B, H, W], a mask (bool) or non-negative weights. Pixels of weight zero contribute zero.
        reduction: ``"mean"`` = sum / sum(weight), 0 when no pixel has weight; ``"sum"``; ``"none"``.

    Returns:
        A scalar, or [B, H, W] for ``"none"``. Differentiable in logits.
    """
    check_maps(logits=logits, target=target)
    check_same_classes("target", target, "logits", logits)
    if weight is not None:
        if weight.dtype != torch.bool:
            check_floats(weight=weight)
        check_shape("weight", weight, (target.shape[0], *target.shape[2:]), "[B, H, W] of target")
    check_device(logits=logits, target=target, weight=weight)
    check_one_of("reduction", reduction, REDUCTIONS)
    run = backends.choose("soft_cross_entropy", (logits, target, weight), backend)
    return run(logits, target, weight=weight, reduction=reduction, align_corners=align_corners)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute the cross entropy of upsampled logits with a mask: ``-w_y log softmax_y(up(logits))`` for label y.

    Args:
        logits: [B, C, h, w].
        labels: [B, H, W], uint8 or int64. Pixels of ``ignore_index``, and of any label outside [0, C), contribute
            zero: a device cannot raise without a synchronisation, so check masks where they are read.
        class_weight: w, [C], non-negative; None for all ones.
        reduction: ``"mean"`` = sum / sum of w_y, 0 when no pixel counts; ``"sum"``; ``"none"``.

    Returns:
        A scalar, or [B, H, W] for ``"none"``. Differentiable in logits.
    """
    check_maps(logits=logits)
    check_labels(labels, logits)
    if class_weight is not None:
        check_floats(class_weight=class_weight)
        check_shape("class_weight", class_weight, (logits.shape[1],), "[C] of logits")
    check_device(logits=logits, labels=labels, class_weight=class_weight)
    check_one_of("reduction", reduction, REDUCTIONS)
    run = backends.choose("cross_entropy", (logits, labels, class_weight), backend)
    return run(
        logits,
        labels,
        ignore_index=ignore_index,
        class_weight=class_weight,
        reduction=reduction,
        align_corners=align_corners,
    )


def dice_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Compute 1 - the soft Dice coefficient of upsampled logits with a mask, the mean over the classes in the mask.

    ``dice_c = 2 sum(p_c t_c) / (sum(p_c) + sum(t_c))``: p the softmax of the upsampled logits, t the mask as one-hot,
    sums over all pixels of the batch that have a label.

    Args:
        logits: [B, C, h, w].
        labels: [B, H, W], uint8 or int64. Pixels of ``ignore_index``, and of any label outside [0, C), have none.

    Returns:
        A scalar in [0, 1]; 0 where no pixel has a label. Differentiable in logits, by the kernels once.

    Source: Milletari et al., V-Net, 3DV 2016, with the softmax's probabilities in place of their squares.
    """
    check_maps(logits=logits)
    check_labels(labels, logits)
    check_device(logits=logits, labels=labels)
    run = backends.choose("dice_loss", (logits, labels), backend)
    return run(logits, labels, ignore_index=ignore_index, align_corners=align_corners)


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
    backend: str = "auto",
) -> Tensor:
    """Compute the cross entropy of the student with the fused pseudo label of the other two maps, in one step.

    ``soft_cross_entropy(student_logits, fuse_predictions(decoder_logits, cam_logits))`` at the label size.

    Args:
        student_logits: logits of the strong view, [B, C, h3, w3].
        decoder_logits, cam_logits: logits of the weak view, [B, C, h, w] and [B, C, h2, w2].
        valid: [B, H, W] bool, True = real pixel; None for all.
        size: label size (H, W); None for (h, w).
        gamma, temperature, norm: see ``fuse_predictions``.
        threshold: pixels whose largest label is smaller contribute zero; they still count in the mean, as in
            FixMatch.
        hard: use the one-hot argmax of the label; of equal classes the first wins.
        reduction: ``"mean"`` = sum / number of valid pixels, 0 when there is none; ``"sum"``; ``"none"``.

    Returns:
        A scalar, or [B, H, W] for ``"none"``. Differentiable in student_logits.
    """
    check_maps(student_logits=student_logits, decoder_logits=decoder_logits, cam_logits=cam_logits)
    check_same_classes("student_logits", student_logits, "decoder_logits", decoder_logits)
    check_same_classes("cam_logits", cam_logits, "decoder_logits", decoder_logits)
    size = check_size(size, decoder_logits)
    check_mask("valid", valid, (decoder_logits.shape[0], *size), "[B, H, W] at the label size")
    check_device(
        student_logits=student_logits, decoder_logits=decoder_logits, cam_logits=cam_logits, valid=valid
    )
    check_fusion(gamma, temperature, norm)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability in [0, 1], got {threshold}")
    check_one_of("reduction", reduction, REDUCTIONS)
    tensors = (student_logits, decoder_logits, cam_logits, valid)
    run = backends.choose("consistency_loss", tensors, backend)
    return run(
        student_logits,
        decoder_logits,
        cam_logits,
        valid=valid,
        size=size,
        gamma=gamma,
        temperature=temperature,
        norm=norm,
        threshold=threshold,
        hard=hard,
        reduction=reduction,
        align_corners=align_corners,
    )


def predict_labels(
    logits: Tensor, size: Size, *, align_corners: bool = False, backend: str = "auto"
) -> Tensor:
    """Upsample logits and take the class of the largest; of equal classes the first wins.

    Args:
        logits: [B, C, h, w].
        size: (H, W) of the label map.

    Returns:
        [B, H, W], uint8, or int64 when C > 256. Not differentiable.
    """
    check_maps(logits=logits)
    size = check_size(size, logits)
    run = backends.choose("predict_labels", (logits,), backend)
    return run(logits, size, align_corners=align_corners)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    backend: str = "auto",
) -> Tensor:
    """Convolve each channel with a filter of its own: ``torch.nn.functional.conv2d`` with as many groups as channels.

    Fastest in the memory format ``channels_last``, which the result of the kernels has. On a GPU PyTorch is faster
    where nothing is dilated, and ``"auto"`` leaves that to it (bench/results/gpu).

    Args:
        input: [B, C, H, W].
        weight: [C, 1, height, width], of the dtype of input.
        bias: [C], of the same dtype, or None.
        stride, padding, dilation: of rows and of columns; the padding is zero.

    Returns:
        [B, C, H', W'] with ``H' = (H + 2 padding - dilation (height - 1) - 1) // stride + 1``. Differentiable in input,
        weight and bias; by the kernels once.
    """
    check_maps(input=input)
    check_floats(weight=weight)
    channels = input.shape[1]
    if weight.dim() != 4 or weight.shape[:2] != (channels, 1) or 0 in weight.shape:
        raise ValueError(f"weight must be [{channels}, 1, height, width], got shape {tuple(weight.shape)}")
    given = {"input": input, "weight": weight}
    if bias is not None:
        check_shape("bias", bias, (channels,), "the channels of input")
        given["bias"] = bias
    if len({tensor.dtype for tensor in given.values()}) > 1:
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in given.items())
        raise TypeError(f"all tensors must have one dtype, got {found}")
    check_device(**given)
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"{name} must be two integers from {least} on, got {values!r}")
    reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    if any(input.shape[2 + i] + 2 * padding[i] < reach[i] for i in (0, 1)):
        raise ValueError(
            f"the filter reaches over {reach[0]} x {reach[1]} pixels, but the padded input has "
            f"{input.shape[2] + 2 * padding[0]} x {input.shape[3] + 2 * padding[1]}"
        )
    if backend == "auto" and input.is_cuda and max(dilation) == 1:
        backend = "eager"
    run = backends.choose("depthwise_conv2d", tuple(given.values()), backend)
    return run(input, weight, bias, stride=stride, padding=padding, dilation=dilation)
