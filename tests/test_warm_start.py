"""A run may start from the network of another one: whole where the classes are the same, else by their names."""

import shutil

import pytest
import tiny
import torch

from pseudoseg_fast import evaluate, train
from pseudoseg_fast.config import ModelConfig
from pseudoseg_fast.networks import build_network, load_network
from pseudoseg_fast.warm_start import start_from

MODEL = ModelConfig(encoder_name=tiny.ENCODER, encoder_weights=None, attention_dim=8)
HEAD = "segmentation_head.0"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The last checkpoint of a run with a moving average."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert train.main(tiny.options(root, folder, {"method.ema": 0.5})) == 0
    return folder / "checkpoints" / "last.ckpt"


def start(path, classes, background):
    torch.manual_seed(1)
    network = build_network(MODEL, len(classes), background)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    report = start_from(network, MODEL, classes, path)
    return before, network.state_dict(), report


def test_all_is_taken_where_the_classes_are_the_same(trained):
    expected = load_network(trained)[0].state_dict()
    _, network, report = start(trained, tiny.CLASSES, 0)
    assert network.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(network[name], tensor), name
    assert str(report) == (
        f"the network starts from that of {trained}, step 3; classes kept: background, disc, square"
    )


def test_classes_are_matched_by_name(trained):
    """In another order, one of them new, one left out."""
    source = load_network(trained)[0].state_dict()
    before, network, report = start(trained, ("square", "cone", "background"), 2)
    independent = [name for name in source if not name.startswith((HEAD, "classifier", "sgc"))]
    assert len(independent) > 50
    for name in independent:
        assert torch.equal(network[name], source[name]), name
    for name in (f"{HEAD}.weight", f"{HEAD}.bias"):
        assert torch.equal(network[name][[0, 2]], source[name][[2, 0]])
        assert torch.equal(network[name][1], before[name][1])
    for name in (
        "classifier.weight",
        "classifier.bias",
    ):  # of foreground classes: square and cone, disc and square
        assert torch.equal(network[name][0], source[name][1])
        assert torch.equal(network[name][1], before[name][1])
    # Its columns are maps: the background's first, then those of foreground classes.
    projection, former = network["sgc.projection"], source["sgc.projection"]
    assert torch.equal(projection[[0, 2]][:, [0, 1]], former[[2, 0]][:, [0, 2]])
    assert torch.equal(projection[1], before["sgc.projection"][1])
    assert (report.kept, report.anew, report.unused) == (("square", "background"), ("cone",), ("disc",))
    assert "starting anew: cone; left out: disc" in str(report)


def test_a_class_that_was_the_background_is_taken_in_part(trained):
    source = load_network(trained)[0].state_dict()
    before, network, report = start(trained, tiny.CLASSES, None)
    assert torch.equal(network[f"{HEAD}.weight"], source[f"{HEAD}.weight"])
    assert torch.equal(network["classifier.weight"][1:], source["classifier.weight"])
    assert torch.equal(network["classifier.weight"][0], before["classifier.weight"][0])
    assert report.partly == ("background",)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (
            "attention_dim",
            16,
            "model.attention_dim 8 there, 16 here; give --model.attention_dim=8, or another",
        ),
        ("arch", "Unet", "model.arch DeepLabV3Plus there, Unet here; give --model.arch=DeepLabV3Plus"),
        ("in_channels", 4, "model.in_channels 3 there, 4 here"),
    ],
)
def test_another_network_is_refused(root, trained, tmp_path, capsys, option, value, expected):
    changes = {f"model.{option}": value, "model.init": trained}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 2
    printed = capsys.readouterr().err
    assert "model.init expected a checkpoint of a network like this run's" in printed
    assert expected in printed
    assert not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_is_refused(root, tmp_path, capsys):
    (tmp_path / "weights.pth").write_bytes(b"nothing of the kind")
    for name in ("weights.pth", "missing.ckpt"):
        options = tiny.options(root, tmp_path / "run", {"model.init": tmp_path / name})
        assert train.main(options) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_starts_from_it_and_goes_on_without_it(root, trained, tmp_path, caplog, capsys):
    path = tmp_path / "start.ckpt"
    shutil.copy(trained, path)
    # A step that moves nothing: what is scored is what was there.
    changes = {
        "model.init": path,
        "optim.steps": 1,
        "optim.lr": 1e-30,
        "optim.weight_decay": 0,
        "method.ema": 0.999999,
    }
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0
    assert f"the network starts from that of {path}, step 3" in caplog.text
    expected = load_network(trained)[0]
    state = tiny.checkpoint(tmp_path / "run")
    assert state["step"] == 1
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(state["model"][name], parameter.detach(), rtol=0, atol=1e-6)

    path.unlink()
    assert (
        train.main(tiny.options(root, tmp_path / "run", changes | {"optim.steps": 2, "run.resume": "auto"}))
        == 0
    )
    without = {name: value for name, value in changes.items() if name != "model.init"}
    assert (
        train.main(tiny.options(root, tmp_path / "run", without | {"optim.steps": 3, "run.resume": "auto"}))
        == 0
    )
    assert tiny.checkpoint(tmp_path / "run")["step"] == 3
    capsys.readouterr()
    assert evaluate.main([f"--checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}", "--data.workers=0"]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_a_run_does_not_delete_what_it_starts_from(root, trained, capsys):
    folder = trained.parent.parent
    options = tiny.options(root, folder, {"model.init": trained, "run.overwrite": "true"})
    assert train.main(options) == 2
    assert f"--run.overwrite true would delete {trained}" in capsys.readouterr().err
    assert trained.exists()
