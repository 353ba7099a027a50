"""The forward passes and losses of one training step (Zou et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pseudoseg_fast.method import (
    MethodConfig,
    cut_mix,
    exclude_untagged,
    labeled_losses,
    unlabeled_losses,
)
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.sgc import image_labels_from_mask


class StepLosses(nn.Module):
    """Turn the batches of a step into its loss terms: one forward, however many passes of the network it takes.

    Args:
        network: learns.
        method: which losses, and how the pseudo label is made.
        labeler: makes the pseudo labels, such as a moving average of the network; None: the network itself, in
            training mode.
        class_weight: [C] on the network's device, see :func:`~pseudoseg_fast.method.class_weights`.
    """

    def __init__(
        self, network: Network, method: MethodConfig, labeler: Network | None, class_weight: Tensor | None
    ) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.class_weight = class_weight
        self._labeler = [labeler or network]  # in a list: it is no part of what learns

    def forward(
        self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None, weight: float
    ) -> dict[str, Tensor]:
        """Return the loss terms, weighted; their sum is what is minimised.

        Args:
            labeled: ``image``, ``mask`` and ``valid`` of B pictures, on the network's device.
            unlabeled: ``weak``, ``strong``, ``valid`` and, in image-level mode, ``tags``; None: supervised.
            weight: of L_u.
        """
        method = self.method
        masks = labeled["mask"]
        image_labels = image_labels_from_mask(masks, self.network.classes, self.network.background)
        outputs = self.network(
            labeled["image"],
            sgc=method.name == "pseudoseg",
            image_labels=image_labels,
            valid=labeled["valid"],
        )
        tagged = unlabeled is not None and method.image_labels
        with torch.autocast(masks.device.type, enabled=False):
            losses = labeled_losses(
                method, single(outputs), masks, image_labels, tagged=tagged, class_weight=self.class_weight
            )
        if unlabeled is not None:
            losses |= self._unlabeled(unlabeled, weight)
        return losses

    def _unlabeled(self, unlabeled: dict[str, Any], weight: float) -> dict[str, Tensor]:
        method, valid, images = self.method, unlabeled["valid"], unlabeled["strong"]
        tags = unlabeled["tags"] if method.image_labels else None
        with torch.no_grad():
            weak = single(self._labeler[0](unlabeled["weak"], sgc=True, image_labels=tags, valid=valid))
        if method.exclude_untagged and tags is not None:
            weak = exclude_untagged(weak, tags, self.network.background)
        if float(torch.rand(())) < method.cutmix:
            images, weak, valid = cut_mix(images, weak, valid, self.network.stride)
        strong = single(self.network(images))
        with torch.autocast(valid.device.type, enabled=False):
            return unlabeled_losses(method, weight, strong, weak, valid, tags)


def single(outputs: Outputs) -> Outputs:
    """Return outputs in at least single precision: losses are not computed in half."""

    def convert(maps: Tensor) -> Tensor:
        return maps.to(torch.promote_types(maps.dtype, torch.float32))

    return Outputs(
        convert(outputs.decoder_logits),
        convert(outputs.class_logits),
        outputs.cam,
        None if outputs.sgc_logits is None else convert(outputs.sgc_logits),
    )
