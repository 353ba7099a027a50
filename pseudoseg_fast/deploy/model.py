"""An exported model on ONNX Runtime (no torch)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from pseudoseg_fast.deploy.metadata import Metadata, read_metadata

DEVICES = ("auto", "cpu", "cuda")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"uint8": "tensor(uint8)", "float": "tensor(float)"}
_QUIET = 3  # errors only: a default for an input is on purpose

Pixels = NDArray[np.uint8]
Maps = NDArray[np.float32]


class Model:
    """Segment pictures with a file that ``python -m pseudoseg_fast.export`` made.

    The file is read into memory first, so a model that keeps its weights in other files, wherever they are, is refused;
    no operator library is ever loaded for it.

    Attributes:
        metadata: what the file says about itself.
        provider: the execution provider that runs it.

    Args:
        path: the file.
        device: cpu, cuda, or auto for CUDA where this ONNX Runtime has it.
        threads: of the CPU; 0 lets ONNX Runtime choose.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no model, or not one of this program; there are fewer processors than threads.
        RuntimeError: this ONNX Runtime cannot use the device.
    """

    def __init__(self, path: Path | str, device: str = "auto", threads: int = 0) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"expected an exported model such as model.onnx, found no file {path}")
        most = os.cpu_count() or 1
        if not 0 <= threads <= most:
            raise ValueError(f"--threads expects 0 to {most}, the number of processors, got {threads}")
        wanted = _provider(device)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _QUIET
        options.intra_op_num_threads = threads
        # Without it, weights in other files would be looked for in the working directory.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        providers = [wanted] if wanted == _PROVIDERS["cpu"] else [wanted, _PROVIDERS["cpu"]]
        try:
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            advice = (
                "; a checkpoint becomes one by python -m pseudoseg_fast.export --checkpoint FILE"
                if path.suffix == ".ckpt"
                else ""
            )
            raise ValueError(
                f"{path} cannot be loaded as an ONNX model, it is damaged or of another kind: "
                f"{str(error).splitlines()[0]}{advice}"
            ) from error
        self.provider = self._session.get_providers()[0]
        if self.provider != wanted and device != "auto":
            raise RuntimeError(
                f"{device} was asked for, but ONNX Runtime chose {self.provider}; "
                "see its log for what CUDA library is missing, or use --device cpu"
            )
        try:
            self.metadata: Metadata = read_metadata(self._session.get_modelmeta().custom_metadata_map)
            self._check_graph()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _check_graph(self) -> None:
        """Raise ValueError if inputs and output are not those that the metadata promises."""
        inputs = {value.name: value for value in self._session.get_inputs()}
        outputs = {value.name: value for value in self._session.get_outputs()}
        output = self.metadata.output
        kind = _TYPES["uint8" if output == "labels" else "float"]
        if (
            set(inputs) != {"images"}
            or inputs["images"].type != _TYPES["uint8"]
            or [value.name for value in self._session.get_overridable_initializers()] != ["size"]
            or output not in outputs
            or outputs[output].type != kind
        ):
            raise ValueError(
                f"expected the input images (uint8), an optional input size and the output {output}, got the inputs "
                f"{', '.join(inputs)} and the outputs {', '.join(outputs)}; export the checkpoint again"
            )

    def __call__(self, images: Pixels, size: tuple[int, int] | None = None) -> NDArray[np.generic]:
        """Run the graph and return its first output.

        Args:
            images: uint8 [B, channels, H, W].
            size: height and width of the answer; None for those of the images.

        Raises:
            ValueError: the images have another number of channels or another dtype.
            RuntimeError: ONNX Runtime failed on them, for want of memory for example.
        """
        channels = self.metadata.channels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be uint8 [B, {channels}, H, W], got {images.dtype} {list(images.shape)}"
            )
        feed = {"images": np.ascontiguousarray(images)}
        if size is not None:
            feed["size"] = np.array(size, np.int64)
        return self._run([self.metadata.output], feed)[0]

    def maps(self, names: list[str], images: Pixels) -> list[Maps]:
        """Return outputs by name, such as ``cam`` of a file exported with ``--with-cam``."""
        return self._run(names, {"images": np.ascontiguousarray(images)})

    def _run(self, names: list[str], feed: dict[str, NDArray[Any]]) -> list[Any]:
        try:
            return self._session.run(names, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common base class of their own
            shape = " x ".join(map(str, feed["images"].shape))
            raise RuntimeError(
                f"the model failed on images of {shape}; try a smaller --batch-size or --tile: "
                f"{(str(error) or type(error).__name__).splitlines()[0]}"
            ) from error

    def labels(self, images: Pixels, size: tuple[int, int] | None = None) -> Pixels:
        """Return class ids uint8 [B, H, W]."""
        result = self(images, size)
        return (result if self.metadata.output == "labels" else result.argmax(1)).astype(np.uint8, copy=False)

    def probabilities(self, images: Pixels, size: tuple[int, int] | None = None) -> Maps:
        """Return probabilities float32 [B, classes, H, W].

        Raises:
            ValueError: the file was exported to answer labels alone.
        """
        if self.metadata.output == "labels":
            raise ValueError(
                "this needs a model that answers probabilities, the file answers labels: "
                "export it with --output probabilities"
            )
        result = self(images, size).astype(np.float32, copy=False)
        if self.metadata.output == "probabilities":
            return result
        result = np.exp(result - result.max(1, keepdims=True))
        return result / result.sum(1, keepdims=True)


def _provider(device: str) -> str:
    """Return the execution provider that a device means."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    available = onnxruntime.get_available_providers()
    if device == "auto":
        return next(name for name in (_PROVIDERS["cuda"], _PROVIDERS["cpu"]) if name in available)
    if _PROVIDERS[device] not in available:
        raise RuntimeError(
            f"--device {device} needs {_PROVIDERS[device]}, this ONNX Runtime has {', '.join(available)}; "
            "pip install onnxruntime-gpu in place of onnxruntime"
        )
    return _PROVIDERS[device]
