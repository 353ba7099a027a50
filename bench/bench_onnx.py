"""Time a network from uint8 pictures to labels: PyTorch eager, torch.compile, and ONNX Runtime in fp32 and int8.

python -m pytest bench/bench_onnx.py --threads 2 --benchmark-json bench/results/onnx_cpu.json
-k "513 and resnet50" chooses a size and an encoder; ENCODERS, SIZES. The weights are random, which changes no time. The
row logits shows what the labels' ArgMax and the smaller answer are worth, core what all of Resize, ArgMax and cut cost.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from pseudoseg_fast.deploy import graph
from pseudoseg_fast.deploy.metadata import Metadata
from pseudoseg_fast.deploy.precision import quantize
from pseudoseg_fast.network import Network
from pseudoseg_fast.scoring import predict

CLASSES = 21
ENCODERS = ("tf_efficientnet_lite0", "resnet50")
SIZES = {"513": (513, 513), "1024x2048": (1024, 2048)}
IMPLEMENTATIONS = ("eager", "compile", "ort", "ort_logits", "ort_core", "ort_int8")


@functools.cache
def network(encoder: str) -> Network:
    """Return an untrained network."""
    torch.manual_seed(0)
    return Network("DeepLabV3Plus", encoder, None, classes=CLASSES).eval()


@functools.cache
def core(encoder: str, precision: str) -> onnx.ModelProto:
    """Return the exported network between padded pixels and logits."""
    if precision == "fp32":
        return graph.export_core(graph.Core(network(encoder)))
    images = torch.randint(256, (4, 3, 256, 256), dtype=torch.uint8)
    return quantize(core(encoder, "fp32"), network(encoder), images)


def session(encoder: str, implementation: str, threads: int) -> onnxruntime.InferenceSession:
    """Return what runs an exported graph."""
    precision = "int8" if implementation == "ort_int8" else "fp32"
    model = core(encoder, precision)
    if implementation != "ort_core":
        output = "logits" if implementation == "ort_logits" else "labels"
        names = tuple(str(index) for index in range(CLASSES))
        metadata = Metadata(names, ((0, 0, 0),) * CLASSES, output, precision)
        model = graph.assemble(model, network(encoder), metadata, align_corners=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def call(
    encoder: str, implementation: str, images: torch.Tensor, threads: int
) -> Callable[[], NDArray[np.generic]]:
    """Return what turns the images into labels."""
    size = (images.shape[2], images.shape[3])
    if implementation.startswith("ort"):
        runner = session(encoder, implementation, threads)
        feed = {"images": images.numpy()}
        if implementation == "ort_core":
            feed = {"pixels": network(encoder).pad(images)[0].float().numpy()}
        return lambda: runner.run(None, feed)[0]
    model = network(encoder)
    if implementation == "compile":
        model = torch.compile(model)
    wrapped = functools.partial(predict, model, images, size)
    return lambda: wrapped()[0].numpy()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("encoder", ENCODERS)
@torch.inference_mode()
def test_inference(
    benchmark: Any, pytestconfig: Any, encoder: str, size: str, batch: int, implementation: str
) -> None:
    """Check the labels against eager, then time them."""
    threads = pytestconfig.getoption("--threads")
    torch.manual_seed(0)
    images = torch.randint(256, (batch, 3, *SIZES[size]), dtype=torch.uint8)
    run = call(encoder, implementation, images, threads)
    answer = run()
    if implementation in ("compile", "ort"):
        agreement = float(np.mean(answer == call(encoder, "eager", images, threads)()))
        assert agreement > 0.999
    benchmark.group = f"{encoder} {size} batch {batch}"
    benchmark.extra_info.update(encoder=encoder, size=size, batch=batch, implementation=implementation)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
