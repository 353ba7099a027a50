"""What becomes of the weak view's outputs before the strong view learns them, and the label that they stand for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pseudoseg_fast import functional
from pseudoseg_fast.data.labels import IGNORE_INDEX
from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.sgc import resize_valid


def draw_boxes(strong: Tensor, stride: int, probability: float) -> Tensor:
    """Draw what :func:`cut_mix` pastes: for each picture a rectangle of half of its area, of any shape and place.

    Args:
        strong: V views [B, V, C', H, W], sides multiples of ``stride``; only the shape counts.
        stride: of the network. Edges lie on the grid of its deepest features, which are whole pixels of every map.
        probability: that a view has rectangles at all.

    Returns:
        [B, V, H / stride, W / stride] bool on the CPU, True inside.
    """
    rows, columns = (side // stride for side in strong.shape[-2:])
    boxes = torch.zeros(*strong.shape[:2], rows, columns, dtype=torch.bool)
    for view in boxes.unbind(1):
        if float(torch.rand(())) >= probability:
            continue
        for box in view:
            height = int(torch.randint(math.ceil(rows / 2), rows + 1, ()))
            width = min(columns, round(rows * columns / 2 / height))
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            box[top : top + height, left : left + width] = True
    return boxes


def cut_mix(strong: Tensor, weak: Outputs, valid: Tensor, inside: Tensor) -> tuple[Tensor, Outputs, Tensor]:
    """Paste a rectangle of each picture's neighbour in the batch over it (CutMix; French et al., BMVC 2020).

    Pictures, logits and validity are mixed alike, none blended.

    Args:
        strong: [B, C', H, W] images.
        weak: outputs of the weak view, the decoder's and SGC's logits.
        valid: [B, H, W] bool.
        inside: [B, h, w] bool, True where the neighbour is to be seen, see :func:`draw_boxes`.

    Returns:
        The first three, mixed.
    """

    def mix(maps: Tensor) -> Tensor:
        box = resize_valid(inside, (maps.shape[-2], maps.shape[-1]))
        return torch.where(box if maps.ndim == 3 else box[:, None], maps.roll(1, 0), maps)

    if weak.sgc_logits is None:
        raise ValueError("the weak view's outputs need SGC logits, got None: call the network with sgc=True")
    mixed = weak._replace(decoder_logits=mix(weak.decoder_logits), sgc_logits=mix(weak.sgc_logits))
    return mix(strong), mixed, mix(valid)


def mean_of_mirrored(outputs: Outputs) -> Outputs:
    """Return the means of the outputs for B pictures and, mirrored back, those for their mirror images.

    Args:
        outputs: for a batch of 2B, the second half of which shows the first one mirrored left to right.
    """

    def mean(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        seen, mirrored = values.chunk(2)
        return (seen + (mirrored.flip(3) if values.ndim == 4 else mirrored)) / 2

    return Outputs(*map(mean, outputs))  # type: ignore[arg-type]


def exclude_untagged(
    weak: Outputs, image_labels: Tensor, background: int | None, frequency: Tensor | None = None
) -> Outputs:
    """Give the classes of a picture's tags what the others had: their logits become ``-inf`` in both maps.

    By Bayes' rule, with tags that depend on a pixel through its class alone, ``p(c | x, tags)`` is proportional to
    ``p(c | x) / frequency_c`` for the tagged classes: a scarf that is there says more than hair that is. Tags
    say what is in a picture, not where: the background keeps its probability at every pixel, or a dress taken for a
    skirt would become half background.

    Args:
        weak: outputs of the weak view with SGC logits, C classes.
        image_labels: [B, K] float tags; rows of NaN have none, and nothing changes there.
        background: id of the background class, which is never ruled out, or None.
        frequency: [K], share of the tagged pictures that have each class, above 0 where it is tagged; None: all alike.
    """
    if weak.sgc_logits is None:
        raise ValueError("the weak view's outputs need SGC logits, got None: call the network with sgc=True")
    told = torch.zeros_like(image_labels)
    if frequency is not None:
        told = torch.where(image_labels == 1, -frequency.log(), told)
    told = told.masked_fill(image_labels == 0, -math.inf)[:, :, None, None]

    def exclude(logits: Tensor) -> Tensor:
        if background is None:
            return logits + told
        before, kept, after = logits[:, :background], logits[:, background, None], logits[:, background + 1 :]
        classes = torch.cat([before, after], 1)
        tagged = classes + told
        gain = classes.logsumexp(1, keepdim=True) - tagged.logsumexp(1, keepdim=True)
        tagged = tagged + gain.masked_fill(gain.isinf(), 0.0)  # infinite where no class is tagged
        return torch.cat([tagged[:, :background], kept, tagged[:, background:]], 1)

    return weak._replace(decoder_logits=exclude(weak.decoder_logits), sgc_logits=exclude(weak.sgc_logits))


def pseudo_label(config: MethodConfig, weak: Outputs, size: tuple[int, int] | None = None) -> Tensor:
    """Return the soft pseudo label [B, C, H, W] that ``weak``, outputs with SGC logits, stands for; to be looked at."""
    if weak.sgc_logits is None:
        raise ValueError("a pseudo label needs SGC logits, got None: call the network with sgc=True")
    return functional.fuse_predictions(
        weak.decoder_logits,
        weak.sgc_logits,
        size=size,
        gamma=config.gamma,
        temperature=config.temperature,
        norm=config.norm,
        align_corners=config.align_corners,
    )


def pseudo_masks(config: MethodConfig, weak: Outputs, valid: Tensor) -> Tensor:
    """Return the likeliest class of each pixel's pseudo label.

    Args:
        config: how the label is made, at the crop size whatever its ``label_size``.
        weak: outputs of the weak view with SGC logits, not mixed.
        valid: [B, H, W] bool at the crop size.

    Returns:
        [B, H, W] int64 class ids, 255 where a pixel is not valid or its label below the threshold.
    """
    confidence, ids = pseudo_label(config, weak, (valid.shape[1], valid.shape[2])).max(1)
    return torch.where(valid & (confidence >= config.threshold), ids, IGNORE_INDEX)
