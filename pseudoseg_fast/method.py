"""One training step of PseudoSeg as a pure function of the network's outputs (Zou et al., ICLR 2021).

``labeled_losses`` and ``unlabeled_losses`` give the four terms; nothing here knows of models, optimisers or devices.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from pseudoseg_fast import functional
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.reference import compute_dtype
from pseudoseg_fast.sgc import resize_valid


@dataclass
class MethodConfig:
    """What is learnt from, and how the pseudo label is made.

    Args:
        name: "pseudoseg", or "supervised": the same loop, labelled batches and losses without unlabelled data.
        gamma: share of the decoder in the fused label; 1 is decoder only, 0 is SGC only.
        temperature: exponent 1/temperature sharpens the label; 1 leaves it as it is.
        norm: what the calibration averages over before the softmax: "batch", "image", "pixel", or "none".
        hard: learn the label's argmax instead of the soft label.
        threshold: leave out pixels whose label has a smaller maximum.
        label_size: make the label at the decoder's size, as the authors' code does, or at the "crop" size.
        align_corners: how maps are resized, as in torch.nn.functional.interpolate.
        cutmix: share of unlabelled batches in which each strong view gets a rectangle of another one, label included.
            Tags have had their say in the labels by then; L_x, which would learn them, must be off.
        image_labels: image-level mode: tags of unlabelled pictures, where given, replace the classifier's guess and
            are what the classifier learns from.
        exclude_untagged: in image-level mode, classes that a picture's tags do not name get no share of its pseudo
            label, neither through SGC nor through the decoder; the tagged ones have it, rare ones most; not in the
            paper. Needs norm "none".
        flip_labels: make the label from the weak view and its mirror image, whose logits are averaged: a better label
            for the price of one more pass without gradients; not in the paper.
        class_weight: weights of the classes in L_s and L_sa, one for each, or "balanced": inversely proportional to
            their pixels in the labelled set, which rare classes may need.
        weight_dice: weight of a Dice loss beside L_s, on labelled pictures alone unless ``dice_unlabeled`` is set, for
            small classes; not in the paper.
        dice_unlabeled: the Dice loss counts strong views, too, as one batch with the labelled pictures, since rare
            classes are in few of those. It learns the likeliest class of the pseudo label, made at the crop size, from
            ``start_u`` on and at its full weight: labels must be worth having by then.
        weight_sa: weight of L_sa, the attention head's loss on labelled pictures.
        weight_x: weight of L_x, the classifier's loss.
        weight_u: weight of L_u, the consistency loss.
        start_u: first step that uses unlabelled data; before it training is supervised. Below 1 it is a share of
            the run, in whose configuration it becomes a step; 1 is the second step.
        ramp_u: steps, or below 1 the share of the run, over which L_u then grows linearly to its weight.
        ema: decay of the weights' moving average, which then makes the pseudo labels in evaluation mode and is what
            is evaluated; 0 turns it off, and labels come from the model itself in training mode.
        strong_views: strong views of each weak one, which learn the same label; 2 as in later work, 1 as in the paper.
        joint: pass labelled pictures and strong views through the network together, which is faster on a GPU; batch
            norms then take their statistics over both. "auto" does so where the network has no batch norm.
    """

    name: Literal["pseudoseg", "supervised"] = "pseudoseg"
    gamma: float = 0.5
    temperature: float = 0.5
    norm: Literal["batch", "image", "pixel", "none"] = "batch"
    hard: bool = False
    threshold: float = 0.0
    label_size: Literal["decoder", "crop"] = "decoder"
    align_corners: bool = False
    cutmix: float = 0.0
    image_labels: bool = False
    exclude_untagged: bool = False
    flip_labels: bool = False
    class_weight: Literal["balanced"] | tuple[float, ...] | None = None
    weight_dice: float = 0.0
    dice_unlabeled: bool = False
    weight_sa: float = 1.0
    weight_x: float = 1.0
    weight_u: float = 1.0
    start_u: int | float = 0
    ramp_u: int | float = 0
    ema: float = 0.0
    strong_views: Literal[1, 2] = 1
    joint: Literal["auto"] | bool = "auto"

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        for name in ("gamma", "threshold", "cutmix", "ema"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"method.{name} must be in [0, 1], got {value}")
        if self.ema == 1:
            raise ValueError(
                "method.ema must be below 1, or the average never moves; 0.99 is common, 0 is off"
            )
        if self.exclude_untagged and not (self.image_labels and self.norm == "none"):
            raise ValueError(
                "method.exclude_untagged expects method.image_labels true and method.norm none, whose scale needs no "
                f"mean over logits; got {self.image_labels} and {self.norm}"
            )
        if self.dice_unlabeled and not self.weight_dice:
            raise ValueError(
                "method.dice_unlabeled extends the Dice loss, which is off; set method.weight_dice to 1"
            )
        if self.dice_unlabeled and self.cutmix:
            raise ValueError(
                "method.dice_unlabeled makes labels at the crop size, where the edges of method.cutmix, got "
                f"{self.cutmix}, would blend the labels of two pictures; turn one of the two off"
            )
        if not self.temperature > 0:
            raise ValueError(f"method.temperature must be positive, got {self.temperature}")
        if isinstance(self.class_weight, tuple) and not all(weight >= 0 for weight in self.class_weight):
            raise ValueError(f"method.class_weight must not be negative, got {list(self.class_weight)}")
        for name in ("weight_dice", "weight_sa", "weight_x", "weight_u", "start_u", "ramp_u"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"method.{name} must not be negative, got {value}")
        for name in ("start_u", "ramp_u"):
            value = getattr(self, name)
            if value >= 1 and not float(value).is_integer():
                raise ValueError(
                    f"method.{name} must be whole steps, or a share of the run below 1, got {value}"
                )

    def consistency_weight(self, step: int) -> float:
        """Return the weight of L_u at ``step``, counted from 0; 0 means that the step needs no unlabelled batch.

        ``start_u`` and ``ramp_u`` must be steps by then, which :class:`~pseudoseg_fast.config.Config` sees to.
        """
        if self.name == "supervised" or step < self.start_u:
            return 0.0
        if self.ramp_u == 0:
            return self.weight_u
        return self.weight_u * min(1.0, (step - self.start_u + 1) / self.ramp_u)


def labeled_losses(
    config: MethodConfig,
    outputs: Outputs,
    masks: Tensor,
    image_labels: Tensor,
    *,
    tagged: bool = False,
    class_weight: Tensor | None = None,
    pseudo: Sequence[tuple[Tensor, Tensor]] = (),
) -> dict[str, Tensor]:
    """Return L_s, L_dice where wanted, and, for PseudoSeg, the weighted L_sa and L_x of a labelled batch.

    A supervised run has no use for the classifier and the attention head, and their losses would only cost it accuracy.

    Args:
        config: weights and the meaning of resizing.
        outputs: of the weak view, with SGC logits unless ``weight_sa`` is 0.
        masks: [B, H, W] uint8 or int64 class ids, 255 = ignore.
        image_labels: [B, K] float, 1 for the classes in the mask.
        tagged: the step has an unlabelled batch with tags, which takes this one's place in L_x.
        class_weight: [C], see :func:`class_weights`; None weighs all alike.
        pseudo: decoder logits [B', C, h, w] of strong views and what :func:`pseudo_masks` says of them, for L_dice.
    """

    def cross_entropy(logits: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, masks, class_weight=class_weight, align_corners=config.align_corners
        )

    losses = {"L_s": cross_entropy(outputs.decoder_logits)}
    if config.weight_dice:
        logits = torch.cat([outputs.decoder_logits, *(maps for maps, _ in pseudo)])
        known = torch.cat([masks.long(), *(ids for _, ids in pseudo)])
        losses["L_dice"] = config.weight_dice * dice_loss(logits, known, align_corners=config.align_corners)
    if config.name == "supervised":
        return losses
    if outputs.sgc_logits is not None and config.weight_sa:
        losses["L_sa"] = config.weight_sa * cross_entropy(outputs.sgc_logits)
    if config.weight_x and not tagged:
        losses["L_x"] = config.weight_x * classification_loss(outputs.class_logits, image_labels)
    return losses


def class_weights(config: MethodConfig, pixels: Sequence[int]) -> Tensor | None:
    """Return the weights [C] of the classes, float32, or None where all weigh alike.

    Balanced weights are ``sum(pixels) / (C' pixels_c)`` for the C' classes that occur, so that all of them weigh the
    same in the labelled set as a whole; a class that never occurs has weight 0.

    Args:
        config: names them.
        pixels: labelled pixels of each class.

    Raises:
        ValueError: there are not as many weights as classes.
    """
    if config.class_weight is None:
        return None
    if config.class_weight == "balanced":
        counts = torch.tensor(pixels, dtype=torch.float64)
        occurs = counts > 0
        weights = counts.sum() / (occurs.sum() * counts.clamp(min=1))
        return torch.where(occurs, weights, 0.0).float()
    if len(config.class_weight) != len(pixels):
        raise ValueError(
            f"method.class_weight expects a weight for each of the {len(pixels)} classes, or balanced, "
            f"got {len(config.class_weight)}"
        )
    return torch.tensor(config.class_weight, dtype=torch.float32)


def dice_loss(logits: Tensor, masks: Tensor, *, align_corners: bool = False) -> Tensor:
    """Return 1 - the soft Dice coefficient, the mean over the classes in the masks (Milletari et al., 3DV 2016).

    ``dice_c = 2 sum(p_c t_c) / (sum(p_c) + sum(t_c))``, sums over all pixels of the batch that have a label, p the
    softmax of the upsampled logits. Unlike the other losses it holds them at the masks' size.

    Args:
        logits: [B, C, h, w], differentiable.
        masks: [B, H, W] uint8 or int64 class ids, 255 = ignore.
        align_corners: how logits are resized.

    Returns:
        A scalar in [0, 1]; 0 where no pixel has a label.
    """
    size = (masks.shape[1], masks.shape[2])
    full = interpolate(
        logits.to(compute_dtype(logits)), size, mode="bilinear", align_corners=align_corners
    ).softmax(1)
    truth = masks.long()[:, None] == torch.arange(logits.shape[1], device=masks.device)[:, None, None]
    labeled = truth.any(1, keepdim=True)
    pixels = truth.sum((0, 2, 3))
    overlap = 2 * (full * truth).sum((0, 2, 3)) / ((full * labeled).sum((0, 2, 3)) + pixels).clamp(min=1)
    present = pixels > 0
    return ((1 - overlap) * present).sum() / present.sum().clamp(min=1)


def unlabeled_losses(
    config: MethodConfig,
    weight: float,
    strong: Outputs,
    weak: Outputs,
    valid: Tensor,
    image_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the weighted L_u and, in image-level mode, L_x of an unlabelled batch.

    Args:
        config: how the pseudo label is made.
        weight: of L_u at this step, see :meth:`MethodConfig.consistency_weight`.
        strong: outputs of the strong view, which learns.
        weak: outputs of the weak view with SGC logits, which makes the label.
        valid: [B, H, W] bool at the crop size, False on padding and cut-out.
        image_labels: [B, K] float tags; rows of NaN have none.
    """
    if weak.sgc_logits is None:
        raise ValueError("the weak view's outputs need SGC logits, got None: call the network with sgc=True")
    size = label_size(config, weak.decoder_logits, valid)
    losses = {
        "L_u": weight
        * functional.consistency_loss(
            strong.decoder_logits,
            weak.decoder_logits,
            weak.sgc_logits,
            valid=resize_valid(valid, size),
            size=size,
            gamma=config.gamma,
            temperature=config.temperature,
            norm=config.norm,
            threshold=config.threshold,
            hard=config.hard,
            align_corners=config.align_corners,
        )
    }
    if config.image_labels and config.weight_x:
        if image_labels is None:
            raise ValueError(
                "method.image_labels needs tags of the unlabelled pictures: give --data.tags FILE"
            )
        losses["L_x"] = config.weight_x * classification_loss(strong.class_logits, image_labels)
    return losses


def label_size(config: MethodConfig, decoder_logits: Tensor, valid: Tensor) -> tuple[int, int]:
    """Return height and width of the pseudo label: those of the decoder's logits, or of the crop."""
    height, width = (valid if config.label_size == "crop" else decoder_logits).shape[-2:]
    return height, width


def cut_mix(strong: Tensor, weak: Outputs, valid: Tensor, stride: int) -> tuple[Tensor, Outputs, Tensor]:
    """Paste a rectangle of each picture's neighbour in the batch over it (CutMix; French et al., BMVC 2020).

    The rectangle has half of the picture's area, any shape and place, and edges on the grid of the deepest features,
    which are whole pixels of every map: so pictures, logits and validity are mixed alike, none blended.

    Args:
        strong: [B, 3, H, W] images, sides multiples of ``stride``.
        weak: outputs of the weak view, the decoder's and SGC's logits.
        valid: [B, H, W] bool.
        stride: of the network.

    Returns:
        The three of them, mixed.
    """
    rows, columns = (side // stride for side in strong.shape[-2:])
    inside = torch.zeros(len(strong), rows, columns, dtype=torch.bool)
    for box in inside:
        height = int(torch.randint(math.ceil(rows / 2), rows + 1, ()))
        width = min(columns, round(rows * columns / 2 / height))
        top = int(torch.randint(rows - height + 1, ()))
        left = int(torch.randint(columns - width + 1, ()))
        box[top : top + height, left : left + width] = True
    if strong.is_cuda:
        inside = inside.pin_memory()
    inside = inside.to(strong.device, non_blocking=True)

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
        frequency: [K], share of the tagged pictures that have each class; None: all alike.
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
    return torch.where(valid & (confidence >= config.threshold), ids, 255)


def classification_loss(class_logits: Tensor, image_labels: Tensor) -> Tensor:
    """Return the sigmoid cross-entropy of [B, K] logits, the mean over classes and the pictures that have labels.

    Rows of NaN in ``image_labels`` have none; with no labelled row the loss and its gradient are 0.
    """
    known = ~image_labels.isnan()
    labels = torch.where(known, image_labels, 0.0)
    losses = binary_cross_entropy_with_logits(class_logits.float(), labels, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


class Teacher:
    """Moving average of a network's weights (Tarvainen and Valpola, 2017), in evaluation mode and without gradient.

    Parameters and floating-point buffers are averaged; integer buffers are copied, since the mean of an index is none.

    Args:
        model: the network to follow; its present weights are the start.
        decay: of the average; young averages use ``min(decay, (1 + updates) / (10 + updates))``.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Network, updates: int) -> None:
        """Move towards ``model`` after its ``updates``-th step, counted from 0."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        copied: list[Tensor] = []
        sources: list[Tensor] = []
        theirs = model.state_dict()
        for name, ours in self.model.state_dict().items():
            if ours.is_floating_point():
                averaged.append(ours)
                current.append(theirs[name].to(ours.dtype))
            else:
                copied.append(ours)
                sources.append(theirs[name])
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if copied:
            torch._foreach_copy_(copied, sources)
