"""The export command, on a network trained for three steps."""

import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import tiny
import torch
from deployed import make_model
from PIL import Image

from pseudoseg_fast import evaluate, export, predict, scoring, train
from pseudoseg_fast.deploy import graph, precision, verify
from pseudoseg_fast.deploy.metadata import Metadata, check_metadata
from pseudoseg_fast.deploy.model import Model
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import load_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set and a run of three steps, of a teacher, at another size than the pictures'."""
    folder = tmp_path_factory.mktemp("run")
    root = tiny.make_set(folder / "set")
    options = tiny.options(root, folder / "run", {"method.ema": 0.9, "data.short_side": 35})
    assert train.main(options) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder):
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def core(checkpoint):
    """What torch makes of the network: seconds, so that it is done once."""
    network = load_network(checkpoint)[0]
    return {cam: graph.export_core(graph.Core(network, cam=cam)) for cam in (False, True)}


@pytest.fixture
def cores(core, monkeypatch):
    """Let the command take the exported network as it is."""

    def given(wanted):
        assert wanted.dtype == torch.float32
        return core[wanted.cam]

    monkeypatch.setattr(graph, "export_core", given)


def run(*arguments):
    return tiny.status(export.main, list(map(str, arguments)))


@pytest.fixture(params=["labels", "probabilities", "logits"])
def model(request, cores, checkpoint, tmp_path):
    path = tmp_path / "model.onnx"
    assert run("--checkpoint", checkpoint, "--out", path, "--output", request.param) == 0
    return path


def test_an_export_answers_as_the_network_and_says_what_it_is(model, checkpoint, folder, capsys):
    metadata = Model(model).metadata
    assert metadata.classes == tiny.CLASSES
    assert metadata.background == 0
    assert (metadata.short_side, metadata.stride, metadata.channels) == (35, 16, 3)
    assert metadata.run["folder"] == "run"
    assert metadata.run["weights"] == "teacher"
    assert str(folder) not in str(metadata)
    assert {entry.domain: entry.version for entry in onnx.load(model).opset_import} == {"": 18}
    assert [path.name for path in model.parent.iterdir()] == ["model.onnx"]

    capsys.readouterr()
    assert tiny.status(evaluate.main, ["--checkpoint", str(checkpoint)]) == 0
    expected = capsys.readouterr().out.splitlines()[1:]
    assert tiny.status(evaluate.main, ["--checkpoint", str(checkpoint), "--onnx", str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == expected
    root = folder / "set"
    data = [f"--data.{name}={root / name}.txt" for name in ("val", "classes")]
    command = ["--onnx", str(model), f"--data.root={root}", *data]
    assert tiny.status(evaluate.main, command) == 0
    assert capsys.readouterr().out.splitlines()[1:] == expected
    assert tiny.status(evaluate.main, [*command, "--data.short_side=36"]) == 2
    assert "the model was trained with 35" in capsys.readouterr().err


def test_a_model_is_scored_on_pictures_read_as_in_its_training(tmp_path, capsys):
    model = make_model(tmp_path / "model.onnx", channels=1, white=4095.0, stride=4)
    for name in ("images/train", "images/val", "masks/train", "masks/val"):
        (tmp_path / "set" / name).mkdir(parents=True)
    tiny.write(tmp_path / "set" / "classes.txt", tiny.CLASSES)
    ids = np.zeros((40, 60), np.uint8)
    ids[:, 20:40], ids[20:, 40:] = 1, 2
    values = np.array([40, 100, 180])[ids] / 255 * 4095
    for part in ("train", "val"):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"set/images/{part}/0.png")
        Image.fromarray(ids).save(tmp_path / f"set/masks/{part}/0.png")
    command = ["--onnx", str(model), f"--data.root={tmp_path / 'set'}"]
    assert tiny.status(evaluate.main, command) == 0
    assert float(capsys.readouterr().out.split()[-1]) > 99
    assert tiny.status(evaluate.main, [*command, "--data.white=255"]) == 2
    assert "data.white is 255.0, the model was trained with 4095.0" in capsys.readouterr().err


def test_predictions_of_the_command_are_those_of_evaluation(cores, checkpoint, folder, tmp_path):
    path = tmp_path / "model.onnx"
    assert run("--checkpoint", checkpoint, "--out", path) == 0
    images = folder / "set" / "images"
    assert tiny.status(predict.main, [str(path), str(images), "--out", str(tmp_path / "out")]) == 0
    network = load_network(checkpoint)[0]
    image = Image.open(images / "0.png")
    small = torch.from_numpy(np.array(image.resize((42, 35), Image.Resampling.BILINEAR)))
    with torch.no_grad():
        expected = scoring.predict(network, small.permute(2, 0, 1)[None], (40, 48))[0][0]
    assert (np.array(Image.open(tmp_path / "out" / "0.png")) == expected.numpy()).mean() > 0.999


def test_heads_of_training_are_not_in_the_graph_unless_asked_for(core):
    names = {cam: [value.name for value in model.graph.initializer] for cam, model in core.items()}
    assert not [name for name in names[False] if "sgc" in name or "classifier" in name]
    assert [name for name in names[True] if "sgc.key" in name]
    assert len(core[False].graph.node) < len(core[True].graph.node)
    for model in core.values():
        assert {node.domain for node in model.graph.node} == {""}


def test_maps_answer_as_the_network(cores, checkpoint, tmp_path):
    path = tmp_path / "model.onnx"
    assert run("--checkpoint", checkpoint, "--out", path, "--with-cam") == 0
    images = torch.randint(256, (2, 3, 37, 50), dtype=torch.uint8)
    cam, logits = Model(path).maps(["cam", "sgc_logits"], images.numpy())
    network = load_network(checkpoint)[0]
    expected = verify.reference(network, images, align_corners=False, cam=True)
    np.testing.assert_allclose(cam, expected[1], atol=1e-3)
    np.testing.assert_allclose(logits, expected[2], atol=1e-3)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_lower_precision_reports_what_it_costs(core, checkpoint, tmp_path, monkeypatch, capsys, kind):
    real = graph.export_core
    monkeypatch.setattr(
        graph, "export_core", lambda wanted: real(wanted) if wanted.dtype == torch.float16 else core[False]
    )
    command = ["--checkpoint", checkpoint, "--out", tmp_path / "model.onnx", "--precision", kind]
    assert run(*command, "--max-loss", 100) == 0
    printed = capsys.readouterr().out
    assert "mIoU on 3 val pictures" in printed
    assert f"in {kind};" in printed
    kinds = {value.data_type for value in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert (onnx.TensorProto.FLOAT16 if kind == "fp16" else onnx.TensorProto.INT8) in kinds
    assert Model(tmp_path / "model.onnx").metadata.precision == kind

    (tmp_path / "model.onnx").unlink()
    assert run(*command, "--max-loss", -200) == 1
    assert "points of mIoU, expected at most -200" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_ranges_are_those_of_pictures_that_can_be_read(
    core, checkpoint, folder, tmp_path, monkeypatch, capsys
):
    """Unreadable pictures are left out, as in training; of streamed ones none has a place, so labelled ones do."""
    monkeypatch.setattr(graph, "export_core", lambda wanted: core[False])
    ranges = []
    real = precision.quantize
    monkeypatch.setattr(
        precision,
        "quantize",
        lambda core, network, images: real(core, network, ranges.append([*images]) or ranges[-1]),
    )
    root = tmp_path / "set"
    shutil.copytree(folder / "set", root)
    (root / "images/1.png").write_bytes((root / "images/1.png").read_bytes()[:60])
    command = [
        "--checkpoint",
        checkpoint,
        "--out",
        tmp_path / "model.onnx",
        "--precision",
        "int8",
        "--max-loss",
        100,
    ]
    assert run(*command, f"--data.root={root}") == 0, capsys.readouterr().err
    assert len(ranges[-1]) == 3
    streamed = [f"--data.root={root}", "--data.unlabeled=http://127.0.0.1:9/0.tar", "--data.unlabeled_size=3"]
    assert run(*command, *streamed) == 0, capsys.readouterr().err
    assert len(ranges[-1]) == 2


def test_names_of_classes_may_hold_all_but_control_characters():
    known = {
        "classes": ("0\tground", "\u6b69\u9053\u3000\u6a4b", "\u0646\u06cc\u0645\u200c\u0641"),
        "output": "labels",
    }
    check_metadata(Metadata(**known, palette=((0, 0, 0),) * 3))
    with pytest.raises(ValueError, match="names without control characters"):
        check_metadata(Metadata(("sky\x1b[2J",), ((0, 0, 0),), "labels"))


def test_a_graph_that_answers_otherwise_is_not_written(core, checkpoint, tmp_path, monkeypatch, capsys):
    wrong = onnx.ModelProto()
    wrong.CopyFrom(core[False])
    weight = max(wrong.graph.initializer, key=lambda value: len(value.raw_data))
    weight.raw_data = bytes(len(weight.raw_data))
    monkeypatch.setattr(graph, "export_core", lambda wanted: wrong)
    (tmp_path / "model.onnx").write_text("the former one")
    assert run("--checkpoint", checkpoint, "--out", tmp_path / "model.onnx") == 1
    printed = capsys.readouterr().err
    assert "ONNX Runtime and PyTorch differ" in printed
    assert "the worst picture is images/" in printed
    assert (tmp_path / "model.onnx").read_text() == "the former one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_graph_that_fails_at_some_size_is_not_written(core, checkpoint, tmp_path, monkeypatch, capsys):
    fixed = onnx.ModelProto()
    fixed.CopyFrom(core[False])
    shape = onnx.helper.make_tensor("fixed_shape", onnx.TensorProto.INT64, [4], [1, 3, 48, 48])
    fixed.graph.initializer.append(shape)
    for node in fixed.graph.node:
        node.input[:] = ["fixed" if name == "pixels" else name for name in node.input]
    fixed.graph.node.insert(0, onnx.helper.make_node("Reshape", ["pixels", "fixed_shape"], ["fixed"]))
    monkeypatch.setattr(graph, "export_core", lambda wanted: fixed)
    assert run("--checkpoint", checkpoint, "--out", tmp_path / "model.onnx") == 1
    assert "which PyTorch takes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_the_runs_pictures_drawn_ones_are_checked(cores, checkpoint, folder, tmp_path, capsys):
    shutil.move(folder / "set", folder / "away")
    try:
        assert run("--checkpoint", checkpoint, "--out", tmp_path / "model.onnx") == 0
        printed = capsys.readouterr()
        assert "drawn ones are checked" in printed.err
        assert "worst: drawn" in printed.out
        command = ["--checkpoint", checkpoint, "--out", tmp_path / "int8.onnx", "--precision", "int8"]
        assert run(*command) == 2
    finally:
        shutil.move(folder / "away", folder / "set")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.onnx"], "expected --checkpoint FILE"),
        (["--checkpoint", "none.ckpt", "--out", "x.onnx"], "found no file none.ckpt"),
        (["--checkpoint", "CHECKPOINT", "--out", "no/x.onnx"], "--out expects a file in an existing folder"),
        (
            ["--checkpoint", "CHECKPOINT", "--out", "CHECKPOINT"],
            "--out expects a name that is not a checkpoint's",
        ),
        (
            ["--checkpoint", "CHECKPOINT", "--out", "other.ckpt"],
            "--out expects a name that is not a checkpoint's",
        ),
        (
            ["--checkpoint", "CHECKPOINT", "--out", "/proc/x.onnx"],
            "--out expects a",
        ),
        (["--checkpoint", "CHECKPOINT", "--out", "x", "--output", "masks"], "masks"),
        (
            ["--checkpoint", "CHECKPOINT", "--out", "x", "--precision=int8", "--with-cam"],
            "--with-cam is not for",
        ),
    ],
    ids=[
        "no checkpoint",
        "no such file",
        "no folder",
        "its own checkpoint",
        "a checkpoint's name",
        "unwritable folder",
        "no output",
        "maps in int8",
    ],
)
def test_a_command_line_that_cannot_work_is_refused(
    checkpoint, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert run(*[str(checkpoint) if word == "CHECKPOINT" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_graph_pads_with_the_pixel_of_the_network(tmp_path):
    """255 times 0.3 lies on a half in float32, and not in float64."""
    model = onnx.load(make_model(tmp_path / "model.onnx", mean=0.3))
    fill = next(node.attribute[0].t for node in model.graph.node if node.output[0] == "head_fill")
    network = SimpleNamespace(mean=torch.full((3,), 0.3), stride=16)
    padded, _ = Network.pad(network, torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(fill).ravel(), padded[0, :, 0, 1])


@pytest.mark.parametrize("encoder", ["tf_efficientnet_lite0", "efficientnet-b0"])
def test_fixed_paddings_change_no_logit(encoder):
    network = Network("DeepLabV3Plus", encoder, None, classes=2, attention_dim=4).eval()
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        torch.testing.assert_close(graph.Core(network)(images), network(images).decoder_logits)
