"""A few val pictures as the method sees unlabelled ones: their views, what becomes of them, and the truth beside it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from pseudoseg_fast import functional, visualize
from pseudoseg_fast.augment import WeakStrongViews
from pseudoseg_fast.config import Config
from pseudoseg_fast.data.dataset import SegmentationDataset
from pseudoseg_fast.data.labels import IGNORE_INDEX
from pseudoseg_fast.data.samples import spread
from pseudoseg_fast.data.sets import Data
from pseudoseg_fast.event_log import EventLog
from pseudoseg_fast.loaders import tag_frequency, weak_strong_views
from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Network
from pseudoseg_fast.progress import say
from pseudoseg_fast.pseudo_labels import exclude_untagged, pseudo_label
from pseudoseg_fast.sgc import foreground_classes, image_labels_from_mask
from pseudoseg_fast.step import weak_pass
from pseudoseg_fast.visualize import Pixels
from pseudoseg_fast.whole_file import replacing

EXAMPLES = 4
BATCH = 8
"""Pictures whose logits are normalised and calibrated together, be they drawn or not: about those of a step."""
TITLES = ("weak view", "strong view", "CAM", "SGC", "fused label", "confidence", "decoder", "truth")
SUPERVISED_TITLES = ("weak view", "decoder", "confidence", "truth")


class Examples:
    """Val pictures, spread over the list, taken as if they were unlabelled: the same views at each drawing.

    They are read when they are first drawn. Nothing is learnt from them. Of their masks the truth is drawn, and with
    ``method.image_labels`` the tags are taken, as those of unlabelled pictures are given.

    Args:
        config: the run's.
        data: the run's.
        network: whose stride and mean pixel the views need.
        indices: of the val pictures to draw; None spreads ``EXAMPLES`` of them.
    """

    def __init__(
        self, config: Config, data: Data, network: Network, indices: list[int] | None = None
    ) -> None:
        self.method = config.method
        self.run = config.run
        self.steps = config.optim.steps
        self.classes = data.classes
        self.background = data.background
        self.colors = visualize.mask_palette(data.val[0].mask, data.labels, data.background)
        self.frequency = tag_frequency(data) if data.tags else None
        self.titles = titles_of(config.method)
        drawn = spread(len(data.val), EXAMPLES) if indices is None else indices
        others = [index for index in spread(len(data.val), BATCH) if index not in drawn]
        self.count = len(drawn)
        self.dataset = SegmentationDataset(
            [data.val[index] for index in [*drawn, *others][: max(BATCH, len(drawn))]],
            data.labels,
            ViewsAndTruth(weak_strong_views(config, network)),
            short_side=config.data.short_side,
            in_channels=config.model.in_channels,
            white=config.data.white,
        )
        self.batch: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Say whether the evaluation after ``step`` wants a drawing."""
        every, evaluation = self.run.draw_every, step // self.run.eval_every
        return every > 0 and (evaluation % every == 0 or step == self.steps)

    def publish(self, network: Network, folder: Path, step: int, log: EventLog) -> None:
        """Draw into ``folder/pictures`` and for TensorBoard."""
        began = time.monotonic()
        picture = self.draw(network)
        path = folder / "pictures" / f"step_{step:06}.png"
        with replacing(path) as partial:
            picture.save(partial, "png")
        log.log_image("eval/pictures", np.asarray(picture), step)
        say(f"step {step}/{self.steps}: {path} drawn in {time.monotonic() - began:.1f} s")

    def draw(self, network: Network, titles: tuple[str, ...] | None = None, cell: int = 160) -> Image.Image:
        """Draw a row for each picture: how far ``network`` is.

        ==============  =============================================================================================
        weak, strong    the views, the first strong one of several; what the strong one lacks is cut out
        CAM             the strongest activation map of the classes that the classifier finds or tags name, by opacity
        SGC             the most likely class after self-attention
        fused label     the most likely class of the pseudo label, at its size; white pixels teach nothing
        confidence      the label's maximum, from black to white; of a supervised run the decoder's
        decoder         the prediction; with ``flip_labels`` it is averaged like the label, and so are CAM and SGC
        truth           the mask; white pixels have no label
        ==============  =============================================================================================

        Args:
            network: on its device; its mode is restored.
            titles: of the columns, in their order; None: all that the method teaches.
            cell: the longer side of a picture, in pixels.
        """
        titles = titles or self.titles
        panels = self.panels(network)
        rows = [[panels[title][index] for title in titles] for index in range(self.count)]
        return visualize.grid(rows, titles, self.classes, self.colors, cell)

    @torch.inference_mode()
    def panels(self, network: Network) -> dict[str, list[Pixels]]:
        """Return the drawn pictures, uint8 [S, S, 3], of each title."""
        if not self.batch:
            self.batch = self._read()
        views, device = self.batch, next(network.parameters()).device
        size = (views["valid"].shape[-2], views["valid"].shape[-1])
        method = self.method
        if method.name == "supervised":
            method = dataclasses.replace(method, gamma=1.0)
        training = network.training
        network.eval()
        tags = self._tags(views["mask"]).to(device) if method.image_labels else None
        outputs = weak_pass(network, method, views["weak"].to(device), views["valid"].to(device), tags)
        network.train(training)
        assert outputs.sgc_logits is not None
        assert outputs.cam is not None
        told = outputs
        if method.exclude_untagged and tags is not None:
            frequency = None if self.frequency is None else self.frequency.to(device)
            told = exclude_untagged(outputs, tags, self.background, frequency)
        drawn = slice(self.count)
        with torch.autocast(device.type, enabled=False):
            label = pseudo_label(method, told, size if method.label_size == "crop" else None)[drawn]
            confidence, ids = (resize_nearest(values, size) for values in label.max(1))
            decoder, sgc = (
                functional.predict_labels(logits[drawn], size, align_corners=method.align_corners)
                for logits in (outputs.decoder_logits, outputs.sgc_logits)
            )
            cam = [self._strongest(maps, size) for maps in outputs.cam[drawn]]
        teaches = views["valid"][drawn] & (confidence >= method.threshold)
        weak, strong = (
            [visualize.as_color(image.permute(1, 2, 0).numpy()) for image in views[name][drawn]]
            for name in ("weak", "strong")
        )
        return {
            "weak view": weak,
            "strong view": strong,
            "CAM": [
                visualize.activation(image, strength, labels, self.colors)
                for image, (strength, labels) in zip(weak, cam, strict=True)
            ],
            "SGC": self._colorize(sgc),
            "fused label": self._colorize(ids.where(teaches, torch.tensor(IGNORE_INDEX))),
            "confidence": [visualize.grey(values.numpy()) for values in confidence],
            "decoder": self._colorize(decoder),
            "truth": self._colorize(views["mask"][drawn]),
        }

    def _read(self) -> dict[str, Tensor]:
        items = [self.dataset[index, self.run.seed + index] for index in range(len(self.dataset))]
        return {
            name: torch.stack([item[name] for item in items]) for name in ("weak", "strong", "valid", "mask")
        }

    def _tags(self, masks: Tensor) -> Tensor:
        """Return the classes that masks [B, H, W] show, [B, K]."""
        return image_labels_from_mask(masks, len(self.classes), self.background)

    def _strongest(self, maps: Tensor, size: tuple[int, int]) -> tuple[NDArray[np.float32], Pixels]:
        """Return how strong the strongest of activation maps [K, h, w] is at each pixel, and the ids of its class."""
        resized = interpolate(
            maps[None].float(), size, mode="bilinear", align_corners=self.method.align_corners
        )
        strength, index = resized[0].cpu().max(0)
        ids = torch.tensor(foreground_classes(len(self.classes), self.background), dtype=torch.uint8)[index]
        return strength.numpy(), ids.numpy()

    def _colorize(self, ids: Tensor) -> list[Pixels]:
        return [visualize.colorize(labels, self.colors) for labels in ids.to(torch.uint8).cpu().numpy()]


class ViewsAndTruth:
    """Both views of a labelled picture, drawn as those of an unlabelled one, and its mask in their geometry."""

    def __init__(self, views: WeakStrongViews) -> None:
        self.views = views

    def __call__(self, image: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """Return ``weak``, the first ``strong`` view with its ``valid`` pixels, and ``mask``."""
        state = torch.get_rng_state()
        views = self.views(image)
        torch.set_rng_state(state)  # the geometry is drawn first, so the weak view alone draws the same
        first = {name: views[name][0] for name in ("strong", "valid")}
        return {"weak": views["weak"], **first, "mask": self.views.weak(image, mask)["mask"]}


def titles_of(method: MethodConfig) -> tuple[str, ...]:
    """Return the columns of a method: what it leaves without a loss, classifier or attention head, would draw noise."""
    if method.name == "supervised":
        return SUPERVISED_TITLES
    untaught = {"CAM": method.weight_x == 0, "SGC": method.weight_sa == 0}
    return tuple(title for title in TITLES if not untaught.get(title))


def resize_nearest(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [B, h, w] at another size, on the CPU: each pixel has the value of the nearest."""
    return interpolate(maps[:, None].float(), size, mode="nearest-exact")[:, 0].cpu()
