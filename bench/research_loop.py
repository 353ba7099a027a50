"""A training step as research repositories write it, to compare with: every map at the full size of the crop.

Logits are upsampled before anything else is done with them, so that softmaxes, fusion and losses hold several maps
[B, C, H, W]; each view is a pass of its own; weights of the moving average are walked one by one; and the losses are
read at every step, which waits for the device. Network and optimiser are the trainer's, channels_last and fused, so
that what differs is the loop.
"""

from __future__ import annotations

from typing import Any

import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.trainer import Trainer


def research_step(
    trainer: Trainer, labeled: dict[str, Any], unlabeled: dict[str, Any], amp: torch.dtype | None = None
) -> float:
    """Take one step of PseudoSeg with PyTorch's own operations; return the loss.

    Args:
        trainer: lends network, teacher and optimiser.
        labeled: a labelled batch on the device.
        unlabeled: an unlabelled batch on the device, one strong view.
        amp: type of autocast; None: none.
    """
    network, masks, valid = trainer.network.train(), labeled["mask"], unlabeled["valid"][:, 0]
    with torch.autocast(masks.device.type, dtype=amp, enabled=amp is not None):
        present = image_labels_from_mask(masks, network.classes, network.background)
        ours = network(labeled["image"], sgc=True, image_labels=present, valid=labeled["valid"])
        with torch.no_grad():
            labeler = trainer.teacher.model if trainer.teacher else network
            weak = labeler(unlabeled["weak"], sgc=True, valid=valid)
        strong = network(unlabeled["strong"][:, 0])
        loss = research_loss(trainer.config.method, ours, strong, weak, masks, present, valid)
    trainer.optimizer.zero_grad()
    loss.backward()
    research_update(trainer)
    return loss.item()


def research_loss(
    method: MethodConfig,
    ours: Outputs,
    strong: Outputs,
    weak: Outputs,
    masks: Tensor,
    present: Tensor,
    valid: Tensor,
) -> Tensor:
    """Return the loss of a step, from the outputs of the network; every map at the size of the masks."""
    masks = masks.long()
    assert ours.sgc_logits is not None
    assert weak.sgc_logits is not None

    def upsample(maps: Tensor) -> Tensor:
        return interpolate(maps, size=masks.shape[-2:], mode="bilinear", align_corners=method.align_corners)

    loss = cross_entropy(upsample(ours.decoder_logits), masks, ignore_index=255)
    if method.weight_dice:
        dice = DiceLoss("multiclass", ignore_index=255)
        loss = loss + method.weight_dice * dice(upsample(ours.decoder_logits), masks)
    loss = loss + method.weight_sa * cross_entropy(upsample(ours.sgc_logits), masks, ignore_index=255)
    loss = loss + method.weight_x * binary_cross_entropy_with_logits(ours.class_logits, present)
    with torch.no_grad():
        decoder, sgc = upsample(weak.decoder_logits).float(), upsample(weak.sgc_logits).float()
        scale = torch.rsqrt(torch.cat([decoder, sgc]).square().mean() + 1e-8)
        label = method.gamma * (scale * decoder).softmax(1) + (1 - method.gamma) * (scale * sgc).softmax(1)
        label = label ** (1 / method.temperature)
        label = label / label.sum(1, keepdim=True)
    consistency = -(label * upsample(strong.decoder_logits).float().log_softmax(1)).sum(1)
    return loss + (consistency * valid).sum() / valid.sum()


def research_update(trainer: Trainer) -> None:
    """Move the weights and their average."""
    trainer.optimizer.step()
    if trainer.teacher:
        decay = trainer.teacher.decay
        with torch.no_grad():
            pairs = zip(trainer.teacher.model.parameters(), trainer.network.parameters(), strict=True)
            for average, weights in pairs:
                average.copy_(decay * average + (1 - decay) * weights)
