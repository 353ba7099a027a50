"""Turn a classifier's class activation maps into segmentation logits by self-attention ("SGC", Zou et al., ICLR 2021).

Channels: a network has C classes, of which K can be told from image-level labels: all but the background class, or
all C where there is none. K-channel tensors keep the order of the classes with the background left out.
"""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pseudoseg_fast import functional
from pseudoseg_fast.reference import autocast_off, project_cam

CAM_EPS = 1e-5
"""Lower bound of the maximum that a class activation map is divided by."""

Attention: TypeAlias = Literal["residual", "plain", "none"]
"""What SGC adds up: the maps and their attention, the attention alone, or the maps alone."""


def foreground_classes(classes: int, background: int | None) -> list[int]:
    """Return the K class indices that image-level labels speak of, in order.

    Raises:
        ValueError: ``background`` is no class index, or there is no class besides it.
    """
    if background is not None and not 0 <= background < classes:
        raise ValueError(
            f"background must be a class index from 0 to {classes - 1}, got {background}; "
            "use None if no class is a background"
        )
    foreground = [index for index in range(classes) if index != background]
    if not foreground:
        raise ValueError(
            f"at least one class besides the background is needed, got classes={classes}; use background=None"
        )
    return foreground


def image_labels_from_mask(mask: Tensor, classes: int, background: int | None) -> Tensor:
    """Tell which foreground classes a mask holds.

    Args:
        mask: class indices [B, H, W], any integer dtype; values outside 0..C-1 (255, ...) are ignored.
        classes: C, the number of classes with the background.
        background: index of the background class, or None if there is none.

    Returns:
        Image-level labels [B, K] of 0 and 1, float32.
    """
    if mask.dim() != 3:
        raise ValueError(f"mask must be [B, H, W], got {list(mask.shape)}")
    if mask.is_floating_point():
        raise TypeError(f"mask must hold integer class indices, got {mask.dtype}")
    index = mask.flatten(1).long()
    index = torch.where((index >= 0) & (index < classes), index, classes)
    present = torch.zeros(len(mask), classes + 1, device=mask.device).scatter_(1, index, 1.0)
    # Sliced, not indexed by a list: that would be copied to the device, and waited for.
    foreground_classes(classes, background)  # refuses a background that is no class
    present = present[:, :classes]
    if background is None:
        return present
    return torch.cat([present[:, :background], present[:, background + 1 :]], dim=1)


@torch.no_grad()
def class_activation_map(features: Tensor, weight: Tensor, image_labels: Tensor) -> Tensor:
    """Compute normalised class activation maps of a "global average pool, then linear" classifier, without gradient.

    ``cam_c = y_c relu(sum_k w[c, k] F[k])``, divided by its own spatial maximum. For this classifier Grad-CAM is
    this map up to a constant factor, which the division removes.

    Args:
        features: last encoder features F [B, D, h, w], a floating dtype.
        weight: weight of the classifier's linear layer [K, D].
        image_labels: y [B, K], 0 or 1 for each class.

    Returns:
        Maps [B, K, h, w] in 0..1, float32 (float64 for float64 features). A class that is not labelled, or that is
        activated nowhere, is zero everywhere.

    Raises:
        ValueError: the shapes do not fit.
    """
    batch, channels, height, width = features.shape
    if weight.shape[1:] != (channels,):
        raise ValueError(f"weight must be [K, {channels}], got {list(weight.shape)}")
    if image_labels.shape != (batch, len(weight)):
        raise ValueError(f"image_labels must be [{batch}, {len(weight)}], got {list(image_labels.shape)}")
    dtype = torch.promote_types(features.dtype, torch.float32)
    with autocast_off(features.device):
        cam = (weight.to(dtype) @ features.flatten(2).to(dtype)).relu()  # [B, K, L]
        cam = cam * image_labels.to(dtype)[:, :, None]
        cam = cam / cam.amax(-1, keepdim=True).clamp(min=CAM_EPS)
    return cam.unflatten(2, (height, width))


class SGC(nn.Module):
    """Refine class activation maps by self-attention and project them to segmentation logits.

    With ``q = W_q h`` and ``k = W_k h``: ``r = cam + softmax(q k' / sqrt(d)) cam``, the background channel
    ``2 - max_c r`` is put before r, and the logits are ``BN(W_c r)``. The batch norm uses the statistics of the
    batch in training and in evaluation, its scale is fixed at 1 and its shift is learned. Under distributed
    training the statistics are those of the local batch. For ablations, r may be one of the two terms alone.

    The inputs get no gradient, so nothing but this module learns from its logits.

    Attributes:
        query, key: the 1x1 convolutions W_q and W_k; without attention there are none.
        projection: W_c [C, C]; rows in class order, columns in the order of r (the background, if any, first).
            Starts as the map that keeps every class.
        shift: of the batch norm [C].

    Args:
        features: channels of the hypercolumn h.
        classes: C, the number of classes with the background.
        background: index of the background class, or None if there is none.
        attention_dim: d, channels of queries and keys.
        attention: "residual" for both terms of r, "plain" for the second, "none" for the first.

    Raises:
        ValueError: a size below 1, a background that is no class index, or no such attention.
    """

    def __init__(
        self,
        features: int,
        classes: int,
        *,
        background: int | None,
        attention_dim: int = 128,
        attention: Attention = "residual",
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("classes", classes), ("attention_dim", attention_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if attention not in get_args(Attention):
            raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {attention!r}")
        order = foreground_classes(classes, background)
        if background is not None:
            order = [background, *order]
        self.background = background
        self.attention = attention
        if attention != "none":
            self.query = nn.Conv2d(features, attention_dim, 1, bias=False)
            self.key = nn.Conv2d(features, attention_dim, 1, bias=False)
        self.projection = nn.Parameter(torch.eye(classes)[:, order])
        self.shift = nn.Parameter(torch.zeros(classes))

    def tokens(self, hypercolumn: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys [B, L, d] of a hypercolumn [B, features, h, w], positions in row order."""
        hypercolumn = hypercolumn.detach()
        query, key = self.query(hypercolumn), self.key(hypercolumn)
        return query.flatten(2).mT, key.flatten(2).mT

    def forward(self, hypercolumn: Tensor, cam: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the logits [B, C, h, w].

        Args:
            hypercolumn: concatenated encoder features [B, features, h, w].
            cam: class activation maps [B, K, h, w].
            valid: real pixels [B, H, W], bool, at any size: a position of the map is valid if the pixel nearest
                to its centre is. None: all are.

        Raises:
            ValueError: the shapes do not fit.
            TypeError: ``valid`` is not bool.
        """
        channels = self.projection.shape[0] - (self.background is not None)
        expected = (hypercolumn.shape[0], channels, *hypercolumn.shape[2:])
        if cam.shape != expected:
            raise ValueError(f"cam must be {list(expected)}, got {list(cam.shape)}")
        maps = refined = cam.detach().flatten(2).mT  # [B, L, K]
        if self.attention != "none":
            query, key = self.tokens(hypercolumn)
            mask = None if valid is None else resize_valid(valid, cam.shape[-2:]).flatten(1)
            refined = functional.refine_cam(query, key, maps, mask=mask)
        if self.attention == "plain":
            refined = refined - maps
        logits = project_cam(refined, self.projection, self.shift, background=self.background is not None)
        return logits.mT.unflatten(2, cam.shape[-2:])


def resize_valid(valid: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Resize a bool map [B, H, W] by the pixel nearest to each centre."""
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, got {valid.dtype}")
    if valid.dim() != 3:
        raise ValueError(f"valid must be [B, H, W], got {list(valid.shape)}")
    return interpolate(valid[:, None].float(), size=tuple(size), mode="nearest-exact")[:, 0] > 0.5
