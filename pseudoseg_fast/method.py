"""One training step of PseudoSeg as a pure function of the network's outputs (Zou et al., ICLR 2021).

``labeled_losses`` and ``unlabeled_losses`` give the loss terms; nothing here knows of models, optimisers or devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pseudoseg_fast import functional
from pseudoseg_fast.network import Outputs
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
        if self.exclude_untagged and self.cutmix and (self.gamma < 1 or self.label_size != "decoder"):
            raise ValueError(
                "method.exclude_untagged with method.cutmix expects method.gamma 1 and method.label_size decoder: "
                "where maps are enlarged, edges of CutMix between pictures that rule out each other's classes would be "
                f"taught to be background; got {self.gamma} and {self.label_size}"
            )
        if not self.temperature > 0:
            raise ValueError(f"method.temperature must be positive, got {self.temperature}")
        if isinstance(self.class_weight, tuple):
            fine = all(0 <= weight < math.inf for weight in self.class_weight)
            if not (fine and any(self.class_weight)):
                raise ValueError(
                    "method.class_weight must be finite, not negative and not all 0, got "
                    f"{list(self.class_weight)}"
                )
        for name in ("weight_dice", "weight_sa", "weight_x", "weight_u", "start_u", "ramp_u"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"method.{name} must not be negative and must be finite, got {value}")
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
        pseudo: decoder logits [B', C, h, w] of strong views and what
            :func:`~pseudoseg_fast.pseudo_labels.pseudo_masks` says of them, for L_dice.
    """

    def cross_entropy(logits: Tensor) -> Tensor:
        return functional.cross_entropy(
            logits, masks, class_weight=class_weight, align_corners=config.align_corners
        )

    losses = {"L_s": cross_entropy(outputs.decoder_logits)}
    if config.weight_dice:
        logits = torch.cat([outputs.decoder_logits, *(maps for maps, _ in pseudo)])
        known = torch.cat([masks, *(ids for _, ids in pseudo)])
        dice = functional.dice_loss(logits, known, align_corners=config.align_corners)
        losses["L_dice"] = config.weight_dice * dice
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


def classification_loss(class_logits: Tensor, image_labels: Tensor) -> Tensor:
    """Return the sigmoid cross-entropy of [B, K] logits, the mean over classes and the pictures that have labels.

    Rows of NaN in ``image_labels`` have none; with no labelled row the loss and its gradient are 0.
    """
    known = ~image_labels.isnan()
    labels = torch.where(known, image_labels, 0.0)
    losses = binary_cross_entropy_with_logits(class_logits.float(), labels, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)
