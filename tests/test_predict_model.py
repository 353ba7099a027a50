"""The model that predict is given: what its graph answers, and files that are no model of ours."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from deployed import make_model
from predicting import run
from torch.nn.functional import avg_pool2d, interpolate, pad

from pseudoseg_fast.deploy.model import Model


def no_metadata(path):
    model = onnx.load(make_model(path))
    del model.metadata_props[:]
    onnx.save(model, path)


def damaged_metadata(path):
    model = onnx.load(make_model(path))
    next(prop for prop in model.metadata_props if prop.key == "palette").value = "[[1, 2, 300]]"
    onnx.save(model, path)


def too_many_classes(path):
    model = onnx.load(make_model(path))
    for prop in model.metadata_props:
        if prop.key in ("classes", "palette"):
            prop.value = f"[{', '.join(257 * [chr(34) * 2 if prop.key == 'classes' else '[0, 0, 0]'])}]"
    onnx.save(model, path)


def other_graph(path):
    model = onnx.load(make_model(path))
    next(prop for prop in model.metadata_props if prop.key == "output").value = "logits"
    onnx.save(model, path)


def weights_elsewhere(path):
    """Weights in a file of the working directory, which reading them would leak into the answer."""
    Path("secret").write_bytes(b"x" * 36)
    model = onnx.load(make_model(path))
    weight = next(value for value in model.graph.initializer if value.name == "weight")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "found no file"),
        (lambda path: path.write_bytes(b""), "cannot be loaded as an ONNX model"),
        (lambda path: path.write_text("hello"), "cannot be loaded as an ONNX model"),
        (no_metadata, "expected a model made by python -m pseudoseg_fast.export"),
        (damaged_metadata, "the model's metadata is damaged"),
        (too_many_classes, "at most 256 classes"),
        (other_graph, "expected the input images (uint8), an optional input size and the output logits"),
        (weights_elsewhere, "cannot be loaded as an ONNX model"),
    ],
    ids=[
        "none",
        "empty",
        "text",
        "no metadata",
        "damaged",
        "many classes",
        "other graph",
        "weights elsewhere",
    ],
)
def test_a_model_that_is_not_ours_is_refused(pictures, tmp_path, monkeypatch, capsys, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "model.onnx")
    assert run(tmp_path / "model.onnx", pictures, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(33, 41), (1, 1), (16, 70)], ids=str)
def test_the_graph_resizes_as_torch_does(tmp_path, size, align_corners):
    model = Model(make_model(tmp_path / "m.onnx", "logits", pool=4, align_corners=align_corners))
    images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    height, width = (-(-side // 16) * 16 for side in size)
    shifted = pad(images.float() - 128, (0, width - size[1], 0, height - size[0]))
    colors = torch.tensor(tiny.COLORS, dtype=torch.float32)
    logits = torch.einsum("kc,bchw->bkhw", colors / 500, avg_pool2d(shifted + 128, 4))
    logits = logits - (colors**2).sum(1)[:, None, None] / 1000
    for wanted in (size, (2 * size[0], 2 * size[1])):
        full = (height * wanted[0] // size[0], width * wanted[1] // size[1])
        expected = interpolate(logits, size=full, mode="bilinear", align_corners=align_corners)
        actual = model(images.numpy(), wanted)
        np.testing.assert_allclose(actual, expected[..., : wanted[0], : wanted[1]], rtol=1e-4, atol=1e-3)
