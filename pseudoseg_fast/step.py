"""The forward passes and losses of one training step (Zou et al., ICLR 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pseudoseg_fast.method import MethodConfig, label_size, labeled_losses, unlabeled_losses
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.pseudo_labels import cut_mix, exclude_untagged, mean_of_mirrored, pseudo_masks
from pseudoseg_fast.sgc import image_labels_from_mask, resize_valid

TERMS = ("L_s", "L_dice", "L_sa", "L_x", "L_u")


class StepLosses(nn.Module):
    """Turn the batches of a step into its loss terms: one forward, however many passes of the network it takes.

    Args:
        network: learns. What the method leaves without a loss, classifier or attention head, is frozen.
        method: which losses, and how the pseudo label is made.
        labeler: makes the pseudo labels, such as a moving average of the network; None: the network itself, in
            training mode.
        class_weight: [C] on the network's device, see :func:`~pseudoseg_fast.method.class_weights`.
        tag_frequency: [K] on the network's device, see :func:`~pseudoseg_fast.pseudo_labels.exclude_untagged`.
    """

    def __init__(
        self,
        network: Network,
        method: MethodConfig,
        labeler: Network | None,
        class_weight: Tensor | None = None,
        tag_frequency: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.class_weight = class_weight
        self.tag_frequency = tag_frequency
        self._labeler = [labeler or network]  # in a list: it is no part of what learns
        self._sizes: dict[torch.Size, torch.Size] = {}
        self.joint = method.joint is True or (method.joint == "auto" and not has_batch_norm(network))
        supervised = method.name == "supervised"
        network.classifier.requires_grad_(not supervised and method.weight_x > 0)
        network.sgc.requires_grad_(not supervised and method.weight_sa > 0)

    def forward(
        self,
        labeled: dict[str, Any],
        unlabeled: dict[str, Any] | None,
        weight: float,
    ) -> dict[str, Tensor]:
        """Return the loss terms, weighted; their sum is what is minimised.

        Args:
            labeled: ``image`` [B, C', H, W], ``mask`` and ``valid`` [B, H, W], on the network's device.
            unlabeled: ``weak`` [B', C', H, W], V strong views ``strong`` [B', V, C', H, W] with ``valid`` [B', V, H, W]
                and, in image-level mode, ``tags`` [B', K]; with CutMix ``boxes`` of
                :func:`~pseudoseg_fast.pseudo_labels.draw_boxes`; None: supervised.
            weight: of L_u.
        """
        masks = labeled["mask"]
        image_labels = image_labels_from_mask(masks, self.network.classes, self.network.background)
        targets: list[tuple[Tensor, Outputs, Tensor]] = []
        strong: list[Outputs] = []
        if unlabeled is None:
            outputs = self._labeled_pass(labeled, image_labels)
        elif self.joint:
            targets = self._targets(unlabeled)
            outputs, strong = self._joint_pass(labeled, image_labels, [images for images, _, _ in targets])
        else:
            outputs = self._labeled_pass(labeled, image_labels)
            targets = self._targets(unlabeled)
            strong = [self.network(images) for images, _, _ in targets]
        with torch.autocast(masks.device.type, enabled=False):
            tagged = unlabeled is not None and self.method.image_labels
            strong = [single(view) for view in strong]
            pseudo = []
            if self.method.dice_unlabeled:
                pseudo = [
                    (view.decoder_logits, pseudo_masks(self.method, weak, valid))
                    for view, (_, weak, valid) in zip(strong, targets, strict=True)
                ]
            losses = labeled_losses(
                self.method,
                single(outputs),
                masks,
                image_labels,
                tagged=tagged,
                class_weight=self.class_weight,
                pseudo=pseudo,
            )
            if unlabeled is not None:
                tags = unlabeled["tags"] if tagged else None
                views = [
                    unlabeled_losses(self.method, weight, view, weak, valid, tags)
                    for view, (_, weak, valid) in zip(strong, targets, strict=True)
                ]
                losses |= {name: mean([view[name] for view in views]) for name in views[0]}
                if len(views) > 1:
                    losses["L_u"] = self._pooled([view["L_u"] for view in views], targets)
        return losses

    def _pooled(self, losses: list[Tensor], targets: list[tuple[Tensor, Outputs, Tensor]]) -> Tensor:
        """Return the mean over the valid pixels of all views, of the mean over those of each."""
        valid = [pixels for _, _, pixels in targets]
        size = label_size(self.method, targets[0][1].decoder_logits, valid[0])
        pixels = torch.stack([resize_valid(view, size).sum() for view in valid]).to(losses[0].dtype)
        return (torch.stack(losses) * pixels).sum() / pixels.sum().clamp(min=1)

    def _labeled_pass(self, labeled: dict[str, Any], image_labels: Tensor) -> Outputs:
        return self.network(
            labeled["image"],
            sgc=self.method.name == "pseudoseg",
            image_labels=image_labels,
            valid=labeled["valid"],
        )

    def _joint_pass(
        self, labeled: dict[str, Any], image_labels: Tensor, strong: list[Tensor]
    ) -> tuple[Outputs, list[Outputs]]:
        """Pass labelled pictures and strong views through the network as one batch."""
        network, count = self.network, len(labeled["image"])
        images = network.normalize(torch.cat([labeled["image"], *strong]))
        logits, f5, f4 = network.features(images)
        classes = network.classifier(f5.mean((2, 3)))
        localized = network.localize(f5[:count], f4[:count], classes[:count], image_labels, labeled["valid"])
        sizes = [count, *map(len, strong)]
        ours, *theirs = zip(logits.split(sizes), classes.split(sizes), strict=True)
        return Outputs(*ours, *localized), [Outputs(*maps, None, None) for maps in theirs]

    def _targets(self, unlabeled: dict[str, Any]) -> list[tuple[Tensor, Outputs, Tensor]]:
        """Return, for each strong view, its images, the weak view's outputs that label them, and valid pixels."""
        method, valid = self.method, unlabeled["valid"]
        tags = unlabeled["tags"] if method.image_labels else None
        # In a joint step this pass is the first. The half-precision copies of the weights that it makes without a graph
        # must not be kept, as torch 2.10 keeps them: the next pass would leave the weights without a gradient.
        device = valid.device.type
        autocast = torch.autocast(
            device,
            torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=not self.joint,
        )
        with torch.no_grad(), autocast:
            weak = weak_pass(self._labeler[0], method, unlabeled["weak"], valid.any(1), tags)
        if method.exclude_untagged and tags is not None:
            weak = exclude_untagged(weak, tags, self.network.background, self.tag_frequency)
        strong, pixels = unlabeled["strong"].unbind(1), valid.unbind(1)
        if not method.cutmix:
            return [(images, weak, inside) for images, inside in zip(strong, pixels, strict=True)]
        boxes = unlabeled["boxes"].unbind(1)
        return [cut_mix(images, weak, *rest) for images, *rest in zip(strong, pixels, boxes, strict=True)]

    @torch.no_grad()
    def denominators(self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None) -> Tensor:
        """Return what the mean of each of ``TERMS`` divides by, [5] float64; CutMix, which moves pixels, left out."""
        method, masks = self.method, labeled["mask"]
        known = masks.long()
        known = torch.where(known < self.network.classes, known, self.network.classes)
        weights = torch.ones(self.network.classes, device=masks.device)
        if self.class_weight is not None:
            weights = self.class_weight
        pixels = torch.cat([weights, weights.new_zeros(1)]).double()[known].sum()
        rows = torch.full((), len(masks), dtype=torch.float64, device=masks.device)
        valid = torch.zeros_like(rows)
        if unlabeled is not None:
            views = unlabeled["valid"].flatten(0, 1)
            size = views.shape[-2:] if method.label_size == "crop" else self._decoder_size(unlabeled["weak"])
            valid = resize_valid(views, (size[0], size[1])).sum(dtype=torch.float64)
            if method.image_labels:
                rows = (~unlabeled["tags"].isnan()).any(1).sum(dtype=torch.float64)
        return torch.stack([pixels, torch.ones_like(rows), pixels, rows, valid])

    def _decoder_size(self, images: Tensor) -> torch.Size:
        """Return the size of the decoder's logits for pictures of this size, which only a pass can tell."""
        if images.shape[-2:] not in self._sizes:
            training = self.network.training
            with torch.compiler.set_stance("force_eager"):
                probe = self.network.eval()(images[:1])
            self.network.train(training)
            self._sizes[images.shape[-2:]] = probe.decoder_logits.shape[-2:]
        return self._sizes[images.shape[-2:]]


def weak_pass(
    network: Network, method: MethodConfig, images: Tensor, valid: Tensor, tags: Tensor | None = None
) -> Outputs:
    """Return the outputs that the pseudo labels of images are made of, in at least single precision.

    Args:
        network: makes the labels; the caller sees to its mode and to gradients.
        method: whether mirror images have a say.
        images: [B, C', H, W], of sides that are multiples of the network's stride.
        valid: real pixels [B, H, W], bool.
        tags: [B, K], see :meth:`Network.forward`.
    """
    if method.flip_labels:
        images, valid = torch.cat([images, images.flip(3)]), torch.cat([valid, valid.flip(2)])
        tags = None if tags is None else tags.repeat(2, 1)
    outputs = single(network(images, sgc=True, image_labels=tags, valid=valid))
    return mean_of_mirrored(outputs) if method.flip_labels else outputs


def has_batch_norm(network: Network) -> bool:
    """Tell whether pictures of one batch change each other's outputs in training mode, the attention head's apart."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def mean(values: list[Tensor]) -> Tensor:
    """Return the mean of scalars, a single one as it is."""
    return values[0] if len(values) == 1 else torch.stack(values).mean()


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
