"""Put a classifier and self-attention Grad-CAM on any segmentation-models-pytorch network."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.base import SegmentationModel
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pseudoseg_fast.sgc import SGC, Attention, class_activation_map, foreground_classes

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ARCHITECTURES = tuple(
    name for name, item in vars(smp).items() if isinstance(item, type) and issubclass(item, SegmentationModel)
)
"""Names of the architectures of the installed segmentation-models-pytorch."""

_DILATED = ("DeepLabV3", "DeepLabV3Plus", "PAN")
_RESERVED = ("encoder_output_stride", "upsampling", "activation", "aux_params")


class Outputs(NamedTuple):
    """What a network says about B images of C classes, K of them foreground.

    Attributes:
        decoder_logits: [B, C, h, w], before any upsampling to the images' size.
        class_logits: [B, K], of the image-level classifier.
        cam: class activation maps [B, K, h5, w5] in 0..1, without gradient; None unless asked for.
        sgc_logits: [B, C, h5, w5], which teach the SGC head alone; None unless asked for.
    """

    decoder_logits: Tensor
    class_logits: Tensor
    cam: Tensor | None
    sgc_logits: Tensor | None


class Network(nn.Module):
    """Segment images and classify them as a whole (METHOD: Zou et al., ICLR 2021).

    Encoder, decoder and head are those of ``smp.create_model`` under their names there (``encoder``, ``decoder``,
    ``segmentation_head``), so a checkpoint of either loads into the other. The logits are taken before the head's
    upsampling. Their stride, and those of the last two encoder feature maps F5 and F4, with smp's defaults:

    =========================================  ======  ===  ===
    architecture                               logits   F5   F4
    =========================================  ======  ===  ===
    Unet, UnetPlusPlus, MAnet, Linknet              1   32   16
    FPN, UPerNet, Segformer                         4   32   16
    PSPNet (three encoder stages)                   8    8    4
    DeepLabV3 (output stride 8)                     8    8    8
    DeepLabV3Plus, PAN (output stride 16)           4   16   16
    DPT (a ViT with patches of 16)                  2   16   16
    =========================================  ======  ===  ===

    Unet, UnetPlusPlus, MAnet, Linknet and DPT upsample inside the decoder, so their logits are that fine. PAN needs
    an F5 of at least 8x8. DPT's feature maps come from four depths of one resolution; its prefix tokens (class
    token, registers) go to the decoder alone. Encoders with a fixed image size want it as
    ``decoder={"img_size": [H, W]}``.
    The classifier is a global average pool of F5 and a linear layer with bias. The SGC head sees F5 beside F4
    resized to F5's size.

    Args:
        arch: name of an smp architecture, in any case; ``ARCHITECTURES`` lists them.
        encoder_name: name of an smp encoder, or of a timm model with or without smp's prefix ``tu-``. DPT takes
            timm's vision transformers only.
        encoder_weights: name of pretrained weights to download, or None to start at random.
        in_channels: channels of the images.
        classes: C, the number of classes with the background.
        background: index of the background class, or None if every pixel belongs to a named class.
        output_stride: stride of F5, for DeepLabV3, DeepLabV3Plus and PAN only; None for smp's default.
        attention_dim: channels of queries and keys in the SGC head.
        attention: what the SGC head adds up, see ``SGC``.
        mean, std: of the images' channels in 0..1; None for ImageNet's (for images that are not RGB: their average).
        decoder: further keyword arguments of the smp architecture, and through it of the timm encoder.

    Attributes:
        stride: images' sides must be multiples of it; ``pad`` makes them so.

    Raises:
        ValueError: an unknown name, or options that do not go together.
        RuntimeError: the pretrained weights cannot be fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str = "DeepLabV3Plus",
        encoder_name: str = "resnet50",
        encoder_weights: str | None = "imagenet",
        in_channels: int = 3,
        classes: int = 21,
        *,
        background: int | None = 0,
        output_stride: int | None = None,
        attention_dim: int = 128,
        attention: Attention = "residual",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        foreground = foreground_classes(classes, background)
        arch = _architecture(arch)
        model = _create_model(
            arch,
            encoder_name,
            encoder_weights,
            in_channels=in_channels,
            classes=classes,
            **_decoder_arguments(arch, output_stride, decoder),
        )
        self.arch = arch
        self.in_channels = in_channels
        self.classes = classes
        self.background = background
        self.encoder = model.encoder
        self.decoder = model.decoder
        self.segmentation_head = model.segmentation_head
        self.stride = _stride(arch, model)
        f4_channels, f5_channels = self._feature_channels()
        self.classifier = nn.Linear(f5_channels, len(foreground))
        self.sgc = SGC(
            f5_channels + f4_channels,
            classes,
            background=background,
            attention_dim=attention_dim,
            attention=attention,
        )
        self.register_buffer("mean", _channel_values("mean", mean, IMAGENET_MEAN, in_channels))
        self.register_buffer("std", _channel_values("std", std, IMAGENET_STD, in_channels))

    def _feature_channels(self) -> tuple[int, int]:
        channels = list(self.encoder.out_channels)
        # All encoders but DPT's list the image itself first.
        stages = channels if self.arch == "DPT" else channels[1:]
        if len(stages) < 2 or 0 in stages[-2:]:
            raise ValueError(
                f"SGC needs two encoder stages, got feature maps of {stages} channels; raise encoder_depth"
            )
        return stages[-2], stages[-1]

    def normalize(self, images: Tensor) -> Tensor:
        """Return ``(images / 255 - mean) / std``; images [B, in_channels, H, W], uint8 or floating, in 0..255."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be [B, {self.in_channels}, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating in 0..255, got {images.dtype}")
        return (images - 255 * self.mean[:, None, None]) / (255 * self.std[:, None, None])

    def pad(self, images: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pad the right and the bottom with the mean pixel until the sides are multiples of ``stride``.

        Upsample the logits to the padded size and crop [..., :H, :W] to come back to the pixels of the images.

        Args:
            images: [B, in_channels, H, W], uint8 (the mean pixel is rounded) or floating, in 0..255.
            valid: real pixels [B, H, W], bool; None: all are.

        Returns:
            Images [B, in_channels, H', W'], and real pixels [B, H', W'], False in the padding.
        """
        batch, _, height, width = images.shape
        stride = self.stride
        padded_height, padded_width = ((side + stride - 1) // stride * stride for side in (height, width))
        if valid is None:
            valid = images.new_ones((batch, height, width), dtype=torch.bool)
        if (padded_height, padded_width) == (height, width):
            return images, valid
        fill = 255 * self.mean
        if not images.is_floating_point():
            fill = fill.round()
        padded = fill.to(images.dtype)[:, None, None].repeat(batch, 1, padded_height, padded_width)
        padded[:, :, :height, :width] = images
        padded_valid = valid.new_zeros((batch, padded_height, padded_width))
        padded_valid[:, :height, :width] = valid
        return padded, padded_valid

    def features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return decoder logits [B, C, h, w], F5 and F4 of normalised images."""
        if self.arch == "DPT":
            maps, prefix_tokens = self.encoder(images)
            return self.segmentation_head.head(self.decoder(maps, prefix_tokens)), maps[-1], maps[-2]
        maps = self.encoder(images)
        # The head is convolution, upsampling, activation.
        return self.segmentation_head[0](self.decoder(maps)), maps[-1], maps[-2]

    def forward(
        self,
        images: Tensor,
        *,
        sgc: bool = False,
        image_labels: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Outputs:
        """Segment and classify images.

        Args:
            images: [B, in_channels, H, W], uint8 or floating, in 0..255; sides are multiples of ``stride``.
            sgc: also compute the class activation maps and the SGC logits.
            image_labels: classes of each image [B, K], 0 or 1, for the activation maps; None, or NaN for a class:
                those to which the classifier gives a probability of at least 0.5.
            valid: real pixels [B, H, W], bool, for SGC's attention; None: all are.

        Raises:
            ValueError: shapes do not fit.
            TypeError: images are neither uint8 nor floating, or ``valid`` is not bool.
        """
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image sides must be multiples of {self.stride}, got {height}x{width}; use Network.pad"
            )
        if valid is not None and valid.shape != (len(images), height, width):
            raise ValueError(f"valid must be {[len(images), height, width]}, got {list(valid.shape)}")
        decoder_logits, f5, f4 = self.features(self.normalize(images))
        class_logits = self.classifier(f5.mean((2, 3)))
        if not sgc:
            return Outputs(decoder_logits, class_logits, None, None)
        return Outputs(
            decoder_logits, class_logits, *self.localize(f5, f4, class_logits, image_labels, valid)
        )

    def localize(
        self,
        f5: Tensor,
        f4: Tensor,
        class_logits: Tensor,
        image_labels: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the class activation maps and the SGC logits of what ``features`` and the classifier say."""
        guess = class_logits.detach() >= 0
        if image_labels is None:
            image_labels = guess
        elif image_labels.shape == guess.shape:
            image_labels = torch.where(image_labels.isnan(), guess, image_labels)
        cam = class_activation_map(f5, self.classifier.weight, image_labels)
        if f4.shape[-2:] != f5.shape[-2:]:
            f4 = interpolate(f4, size=f5.shape[-2:], mode="bilinear", align_corners=False)
        return cam, self.sgc(torch.cat([f5, f4], dim=1), cam, valid)


def _architecture(name: str) -> str:
    """Return an architecture's name as smp spells it."""
    spelled = {known.lower(): known for known in ARCHITECTURES}
    if name.lower() not in spelled:
        raise ValueError(f"unknown arch {name!r}; {_nearest(name, ARCHITECTURES)}")
    return spelled[name.lower()]


def _encoder(name: str, arch: str) -> str:
    """Return an encoder's name as smp wants it: its own, or ``tu-`` and a timm name."""
    native = smp.encoders.get_encoder_names()
    if name in native and arch != "DPT":
        return name
    # smp keeps deprecated timm- names of a few encoders for timm's own.
    bare = name.removeprefix("tu-").removeprefix("timm-")
    for candidate in (bare, f"tf_{bare}"):
        if timm.is_model(candidate):
            return f"tu-{candidate}"
    known = timm.list_models() if arch == "DPT" else [*native, *timm.list_models()]
    raise ValueError(f"unknown encoder_name {name!r} for {arch}; {_nearest(bare, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=5)
    return f"did you mean {', '.join(near)}?" if near else f"known are for example {', '.join(known[:12])}"


def _decoder_arguments(
    arch: str, output_stride: int | None, decoder: Mapping[str, Any] | None
) -> dict[str, Any]:
    arguments = dict(decoder or {})
    for name in _RESERVED:
        if name in arguments:
            raise ValueError(f"decoder must not hold {name!r}: the network decides it")
    if output_stride is not None:
        if arch not in _DILATED:
            raise ValueError(
                f"output_stride={output_stride} is not for {arch}, whose encoder is never dilated; "
                f"leave it None, or use {', '.join(_DILATED)}"
            )
        arguments["encoder_output_stride"] = output_stride
    if arch == "DPT" and "img_size" not in arguments:
        arguments.setdefault("dynamic_img_size", True)
    return arguments


def _create_model(
    arch: str, encoder_name: str, encoder_weights: str | None, **arguments: Any
) -> SegmentationModel:
    name = _encoder(encoder_name, arch)
    weights: str | bool | None = encoder_weights
    if encoder_weights is not None:
        if name.startswith("tu-"):
            # timm's weights have no name of their own: a tag in the model's name chooses them.
            if encoder_weights != "imagenet":
                name = f"{name.split('.')[0]}.{encoder_weights}"
            weights = True
        else:
            known = list(smp.encoders.encoders[name]["pretrained_settings"])
            if encoder_weights not in known:
                raise ValueError(
                    f"unknown encoder_weights {encoder_weights!r} for {name}; {_nearest(encoder_weights, known)}"
                )
    if weights is None:
        return _call_smp(arch, name, None, arguments)
    try:
        return _call_smp(arch, name, weights, arguments)
    except Exception as error:  # hubs fail with exceptions of several HTTP libraries
        # What fails without weights too was not the download's fault: that error is raised instead.
        _call_smp(arch, name, None, arguments)
        raise RuntimeError(
            f"pretrained weights {encoder_weights!r} of {name} cannot be fetched ({error}); "
            "use --model.weights FILE for a local file or --model.encoder_weights null to start at random"
        ) from error


def _call_smp(
    arch: str, name: str, weights: str | bool | None, arguments: Mapping[str, Any]
) -> SegmentationModel:
    try:
        return smp.create_model(arch, encoder_name=name, encoder_weights=weights, **arguments)
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
        hint = '; an encoder of fixed image size wants decoder={"img_size": [H, W]}' if arch == "DPT" else ""
        raise ValueError(f"{arch} cannot be built on encoder {name}: {error}{hint}") from error


def _stride(arch: str, model: SegmentationModel) -> int:
    """Return what image sides must be multiples of."""
    stride = int(model.encoder.output_stride)
    if arch != "DPT":
        return stride
    # The decoder brings stage i to stride 2^(i + 2) by whole factors, then doubles from stage to stage.
    if stride & (stride - 1):
        raise ValueError(
            f"DPT needs patches of a power of two, got {stride} from {model.encoder.name}; "
            'use decoder={"patch_size": 16}, to which pretrained weights are resampled'
        )
    return max(stride, 2 ** (len(model.encoder.out_channels) + 1))


def _channel_values(
    name: str, values: Sequence[float] | None, imagenet: Sequence[float], channels: int
) -> Tensor:
    if values is None:
        values = imagenet if channels == len(imagenet) else [sum(imagenet) / len(imagenet)] * channels
    if len(values) != channels:
        raise ValueError(f"{name} must hold {channels} values, one per input channel, got {list(values)}")
    if name == "mean" and not all(0 <= value <= 1 for value in values):
        raise ValueError(
            f"mean must be from 0 to 1, of pixels divided by 255, for every input channel, got {list(values)}"
        )
    if name == "std" and not all(value > 0 for value in values):
        raise ValueError(f"std must be positive for every input channel, got {list(values)}")
    return torch.tensor(values, dtype=torch.float32)
