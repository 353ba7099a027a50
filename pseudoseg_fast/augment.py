"""Weak and strong views of a picture (Zou et al., ICLR 2021, section 3.4).

The weak view is a random scale, crop and flip. The strong view is the *same* crop with its colours jittered and one
square cut out, so that a label made from the weak view fits it pixel for pixel.
Everything draws from torch's global generator: seed it and the views repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from pseudoseg_fast.data.labels import IGNORE_INDEX

SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
COLOR_JITTER = (0.5, 0.5, 0.5, 0.25)
CUTOUT = 100 / 513
_HUE = 3  # the number of the hue among torchvision's changes


class RandomScale(v2.Transform):
    """Resize image and masks by a factor drawn from ``scales``: bilinear with antialiasing, masks nearest."""

    def __init__(self, scales: Sequence[float]) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be positive factors, got {list(scales)}")
        self.scales = tuple(scales)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw one factor for all inputs of a call."""
        height, width = v2.query_size(flat_inputs)
        scale = self.scales[int(torch.randint(len(self.scales), ()))]
        return {"size": [max(1, round(height * scale)), max(1, round(width * scale))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one input to the drawn size; a mask's pixels keep their centres, as the picture's do."""
        if isinstance(inpt, tv_tensors.Mask):
            exact = v2.InterpolationMode.NEAREST_EXACT
            return tv_tensors.wrap(tvf.resize(inpt.as_subclass(Tensor), params["size"], exact), like=inpt)
        return tvf.resize(inpt, params["size"], antialias=True)


class ColorJitter(v2.ColorJitter):
    """torchvision's jitter, but for the hue, which took more time than all else that is done to a picture."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply the drawn changes to one picture, in the drawn order."""
        order, turns = params["fn_idx"].tolist(), params["hue_factor"]
        before, after = order[: order.index(_HUE)], order[order.index(_HUE) + 1 :]
        inpt = super().transform(inpt, {**params, "fn_idx": before})
        if turns is not None and inpt.shape[0] == 3:
            inpt = turn_hue(inpt, turns)
        return super().transform(inpt, {**params, "fn_idx": after})


def turn_hue(image: Tensor, turns: float) -> Tensor:
    """Turn the hue of a picture uint8 [3, H, W] by a share of the full circle, as HSV has it, rounded to the nearest.

    With h in [0, 6), value v, chroma c and m = v - c, red is m + c clamp(|h - 3| - 1, 0, 1), and green and blue are
    m + c clamp(2 - |h - 2|, 0, 1) and m + c clamp(2 - |h - 4|, 0, 1).
    """
    pixels = image.float()
    red, green, blue = pixels
    value, low = pixels.amax(0), pixels.amin(0)
    chroma = value - low
    # h c of the sector whose channel is the largest
    by_green = (blue - red).add_(chroma, alpha=2)
    by_blue = (red - green).add_(chroma, alpha=4)
    hue = torch.where(value == red, green - blue, torch.where(value == green, by_green, by_blue))
    hue.div_(chroma.clamp(min=1)).add_(6 * turns)
    hue.sub_(torch.floor(hue / 6), alpha=6)
    shares = torch.stack([(hue - 3).abs_().sub_(1), 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()])
    return torch.addcmul(low, chroma, shares.clamp_(0, 1)).round_().to(torch.uint8)


class ChannelJitter(v2.Transform):
    """Jitter brightness and contrast of pictures that are neither grey nor colour: uint8 [C, H, W], any C.

    Each channel's contrast changes about its own mean; saturation and hue are of colours alone.

    Args:
        brightness: the factor is drawn from [max(0, 1 - brightness), 1 + brightness].
        contrast: likewise.
    """

    def __init__(self, brightness: float, contrast: float) -> None:
        super().__init__()
        self.strengths = (brightness, contrast)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw both factors."""
        brightness, contrast = (
            max(0.0, 1 - strength) + float(torch.rand(())) * (1 + strength - max(0.0, 1 - strength))
            for strength in self.strengths
        )
        return {"brightness": brightness, "contrast": contrast}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Apply both factors to one picture."""
        pixels = inpt.float() * params["brightness"]
        mean = pixels.mean((-2, -1), keepdim=True)
        return (mean + (pixels - mean) * params["contrast"]).round().clamp(0, 255).to(inpt.dtype)


class WeakView:
    """Draw one geometry: random scale, padding to the crop, random crop, horizontal flip.

    Called with an image uint8 [C, H, W] and its mask uint8 [H, W], or None; returns ``image`` uint8 [C, S, S] and
    ``valid`` bool [S, S], False on padding, and, with a mask, ``mask`` uint8 [S, S], 255 on padding. S is ``crop_size``
    rounded up to a multiple of ``stride``; what the rounding adds is padding like any other, so that a network which
    needs divisible sides meets no special case.

    Args:
        crop_size: side of the random crop in pixels; smaller pictures are padded to it.
        stride: the network's stride.
        scales: factors of the random scale, drawn uniformly.
        mean: mean pixel in [0, 1] per channel: the colour of padding.
    """

    def __init__(
        self,
        crop_size: int,
        stride: int = 1,
        scales: Sequence[float] = SCALES,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
    ) -> None:
        if crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 pixel, got {crop_size}")
        self.crop_size = crop_size
        self.mean_pixel = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8)
        fill: dict[Any, Any] = {tv_tensors.Image: self.mean_pixel.tolist(), tv_tensors.Mask: IGNORE_INDEX}
        extra = -crop_size % stride
        self.geometry = v2.Compose(
            [
                RandomScale(scales),
                v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(0.5),
                v2.Pad([0, 0, extra, extra], fill=fill) if extra else v2.Identity(),
            ]
        )

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``image``, ``valid`` and, with a mask, ``mask`` of one random view."""
        # The zero map becomes 255 on padding alone; the mask's own ignored pixels stay valid.
        inside = torch.zeros(image.shape[-2:], dtype=torch.uint8)
        masks = inside[None] if mask is None else torch.stack([inside, mask])
        view, masks = self.geometry(tv_tensors.Image(image), tv_tensors.Mask(masks))
        masks = masks.as_subclass(Tensor)
        views = {"image": view.as_subclass(Tensor).contiguous(), "valid": masks[0] == 0}
        if mask is not None:
            views["mask"] = masks[1]
        return views


class WeakStrongViews:
    """Draw a weak view and V strong ones: same geometry, jittered colours, one square cut out.

    Called with an image uint8 [C, H, W]; a mask is ignored, so that a hidden label cannot leak into training. Returns
    ``weak`` uint8 [C, S, S], ``strong`` uint8 [V, C, S, S] and ``valid`` bool [V, S, S], False on padding and on the
    square: what the consistency loss and the attention may use.

    Args:
        weak: draws the shared geometry.
        color_jitter: strengths of brightness, contrast, saturation and hue, always applied, in random order;
            pictures that are neither grey nor colour know the first two alone.
        cutout: side of the square as a fraction of the crop; 0 cuts nothing.
        views: V, strong views of a weak one.
    """

    def __init__(
        self,
        weak: WeakView,
        color_jitter: Sequence[float] = COLOR_JITTER,
        cutout: float = CUTOUT,
        views: int = 1,
    ) -> None:
        if not 0 <= cutout <= 1:
            raise ValueError(f"cutout is a fraction of the crop's side in [0, 1], got {cutout}")
        if len(color_jitter) != 4:
            raise ValueError(
                f"color_jitter takes brightness, contrast, saturation and hue, got {list(color_jitter)}"
            )
        self.weak = weak
        self.jitter = ColorJitter(*color_jitter)
        self.channel_jitter = ChannelJitter(*color_jitter[:2])
        self.cutout = cutout
        self.views = views

    def __call__(self, image: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return ``weak``, ``strong`` and ``valid`` of one random geometry."""
        view = self.weak(image)
        strong, valid = zip(*(self._strong(view) for _ in range(self.views)), strict=True)
        return {"weak": view["image"], "strong": torch.stack(strong), "valid": torch.stack(valid)}

    def _strong(self, view: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return a strong view of a weak one, and its valid pixels."""
        image, valid = view["image"], view["valid"].clone()
        crop = valid[: self.weak.crop_size, : self.weak.crop_size]
        crop &= ~random_square(crop.shape, self.cutout)
        jitter = self.jitter if image.shape[0] in (1, 3) else self.channel_jitter
        planes = zip(jitter(image), self.weak.mean_pixel.tolist(), strict=True)
        return torch.stack([plane.masked_fill(~valid, value) for plane, value in planes]), valid


def random_square(size: Sequence[int], fraction: float) -> Tensor:
    """Return a bool map [H, W], True on a square of side ``fraction`` x the shorter side, placed uniformly inside."""
    height, width = size
    side = round(fraction * min(height, width))
    top = int(torch.randint(height - side + 1, ()))
    left = int(torch.randint(width - side + 1, ()))
    square = torch.zeros(height, width, dtype=torch.bool)
    square[top : top + side, left : left + side] = True
    return square
