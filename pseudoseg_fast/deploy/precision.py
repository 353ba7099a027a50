"""Static int8 quantisation of an exported core."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from pseudoseg_fast.network import Network


class _Reader(CalibrationDataReader):
    """Feeds pictures to the calibration, one by one."""

    def __init__(self, network: Network, images: Iterable[Tensor]) -> None:
        self._network = network
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the core's input for the next picture, None after the last."""
        image = next(self._images, None)
        if image is None:
            return None
        return {"pixels": self._network.pad(image[None])[0].float().numpy()}


def quantize(core: ModelProto, network: Network, images: Iterable[Tensor]) -> ModelProto:
    """Quantise a core's convolutions and what lies between them to int8.

    Weights are signed with one scale per output channel, activations unsigned with one scale per tensor: the form that
    ONNX Runtime's CPU kernels are fastest in. On a CPU without VNNI sums of pairs of products may saturate.

    Args:
        core: of :func:`pseudoseg_fast.deploy.graph.export_core`, without maps.
        network: whose padding the images get.
        images: pictures uint8 [channels, H, W] like those that the model will see; the activations' ranges come from
            them.
    """
    with tempfile.TemporaryDirectory(prefix="pseudoseg_fast-") as folder:
        plain, ready, quantized = (str(Path(folder, f"{name}.onnx")) for name in ("plain", "ready", "int8"))
        onnx.save(core, plain)
        # Folds batch norms into convolutions, so that their scale is part of the weights.
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            quantized,
            _Reader(network, images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            op_types_to_quantize=[
                "Conv",
                "Add",
                "Concat",
                "Clip",
                "Relu",
                "MaxPool",
                "Resize",
                "Mul",
                "MatMul",
            ],
        )
        return onnx.load(quantized)
