"""Compare an exported graph with the network it came from, picture by picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto
from torch import Tensor
from torch.nn.functional import interpolate

from pseudoseg_fast.deploy.graph import CAM_OUTPUTS
from pseudoseg_fast.network import Network

MIN_AGREEMENT = 0.999
MAX_LOGIT_ERROR = 1e-4
MAX_CAM_ERROR = 1e-3
"""The maps are divided by a maximum or a standard deviation of their own: where it is small, rounding grows."""
_QUIET = 3


class VerificationError(RuntimeError):
    """An exported graph does not answer what the network does; the text names the worst picture."""


@dataclass(frozen=True)
class Case:
    """Images to compare on.

    Args:
        name: for the report.
        images: uint8 [B, channels, H, W].
    """

    name: str
    images: Tensor


@dataclass(frozen=True)
class Difference:
    """What two programs made of one picture.

    Args:
        name: of the picture, with its size.
        agreement: share of pixels of the same label.
        logits: largest absolute difference of the logits, divided by the largest absolute logit of the picture:
            float32 sums of other order differ by a share of the terms, however small their sum.
        maps: the largest difference of the class activation maps and SGC logits, divided by their largest value or 1,
            which they are normalised to; 0 without them.
    """

    name: str
    agreement: float
    logits: float
    maps: float = 0.0

    def __str__(self) -> str:
        text = f"{self.name}: {self.agreement:.4%} of labels agree, logits differ by {self.logits:.1e} of their scale"
        return f"{text}, maps by {self.maps:.1e}" if self.maps else text


def odd_sizes(pictures: Sequence[Case], stride: int) -> list[Case]:
    """Return cut-outs of the first picture at sizes that a mistake in padding or rounding would show at."""
    first = pictures[0].images[:1]
    large = first.repeat(1, 1, *(-(-10 * stride // side) for side in first.shape[2:]))
    sizes = [(1, 1), (stride, 1), (stride + 1, 2 * stride - 1), (5 * stride - 3, 3 * stride), (33, 65)]
    sizes.append((9 * stride + 1, 10 * stride - 3))
    cut = [Case(f"{pictures[0].name}, cut", large[:, :, :height, :width]) for height, width in sizes]
    pair = large[:, :, : 3 * stride + 1, : 2 * stride + 5]
    return [*cut, Case(f"{pictures[0].name}, cut, twice", torch.cat([pair, pair.flip(3)]))]


@torch.inference_mode()
def reference(network: Network, images: Tensor, *, align_corners: bool, cam: bool) -> list[Tensor]:
    """Return what PyTorch makes of images: logits [B, C, H, W], and the two maps at that size."""
    height, width = images.shape[-2:]
    padded, valid = network.pad(images)
    outputs = network(padded, sgc=cam, valid=valid if cam else None)
    maps = [outputs.decoder_logits, *((outputs.cam, outputs.sgc_logits) if cam else ())]
    return [
        interpolate(values, size=padded.shape[-2:], mode="bilinear", align_corners=align_corners)[
            :, :, :height, :width
        ]
        for values in maps
    ]


def session(model: ModelProto) -> onnxruntime.InferenceSession:
    """Return a session of a model on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def compare(
    answers: ModelProto,
    logits: ModelProto,
    network: Network,
    pictures: Iterable[Case],
    *,
    align_corners: bool,
    cam: bool,
) -> list[Difference]:
    """Run the graph and the network on each picture.

    Args:
        answers: the graph that is to be deployed.
        logits: the same graph with the output logits; it may be the same object.
        network: on the CPU, in evaluation mode.
        pictures: sizes that the network itself refuses are left out.
        align_corners: how logits are resized.
        cam: the graphs have the maps as further outputs.

    Raises:
        VerificationError: ONNX Runtime cannot run the graph on a picture.
    """
    deployed = session(answers)
    raw = deployed if logits is answers else session(logits)
    differences = []
    for picture in pictures:
        try:
            expected = reference(network, picture.images, align_corners=align_corners, cam=cam)
        except (RuntimeError, ValueError):  # PAN pools 8x8 windows of F5, for example
            continue
        size = "x".join(map(str, picture.images.shape[2:]))
        feed = {"images": picture.images.numpy()}
        try:
            answer = deployed.run(None, feed)[0]
            maps = raw.run(["logits", *(CAM_OUTPUTS if cam else ())], feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            raise VerificationError(
                f"the graph fails on {picture.name} ({size}), which PyTorch takes; {network.arch} may not be "
                f"exportable for every size, use another arch: {str(error).splitlines()[0]}"
            ) from error
        labels = answer if answer.dtype == np.uint8 else answer.argmax(1)
        errors = [
            _error(one, other.numpy(), least=1.0 if index else 0.0)
            for index, (one, other) in enumerate(zip(maps, expected, strict=True))
        ]
        agreement = float(np.mean(labels == expected[0].argmax(1).numpy()))
        differences.append(
            Difference(f"{picture.name} ({size})", agreement, errors[0], max(errors[1:], default=0.0))
        )
    if not differences:
        raise VerificationError(
            "the network refuses every size that the export is checked on; use another arch"
        )
    return differences


def check(differences: Sequence[Difference]) -> Difference:
    """Return the worst difference.

    Raises:
        VerificationError: it is larger than rounding explains.
    """
    worst = max(
        differences,
        key=lambda one: max(
            (1 - one.agreement) / (1 - MIN_AGREEMENT), one.logits / MAX_LOGIT_ERROR, one.maps / MAX_CAM_ERROR
        ),
    )
    if not (
        worst.agreement >= MIN_AGREEMENT and worst.logits <= MAX_LOGIT_ERROR and worst.maps <= MAX_CAM_ERROR
    ):
        raise VerificationError(
            f"ONNX Runtime and PyTorch differ: expected {MIN_AGREEMENT:.1%} of labels to agree and logits to differ by "
            f"at most {MAX_LOGIT_ERROR:.0e} of their scale; the worst picture is {worst}"
        )
    return worst


def _error(one: np.ndarray, other: np.ndarray, least: float) -> float:
    """Return the largest difference as a share of the largest value or ``least``; infinite if one is not finite."""
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return float("inf")
    scale = max(least, float(np.abs(other).max()))
    return float(np.abs(one - other).max()) / scale if scale > 0 else float(np.abs(one).max())
