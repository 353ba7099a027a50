import pytest
import segmentation_models_pytorch as smp
import torch
from torch.nn.functional import interpolate

from pseudoseg_fast.network import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, Network

ENCODER = "test_efficientnet"
DPT = {"decoder_fusion_channels": 16, "decoder_intermediate_channels": (8, 8, 8, 8)}
# Stride of the decoder logits, of F5 and of the images' sides.
STRIDES = {
    "Unet": (1, 32, 32),
    "UnetPlusPlus": (1, 32, 32),
    "MAnet": (1, 32, 32),
    "Linknet": (1, 32, 32),
    "FPN": (4, 32, 32),
    "PSPNet": (8, 8, 8),
    "DeepLabV3": (8, 8, 8),
    "DeepLabV3Plus": (4, 16, 16),
    "PAN": (4, 16, 16),
    "UPerNet": (4, 32, 32),
    "Segformer": (4, 32, 32),
    "DPT": (2, 16, 32),
}


def make(arch="DeepLabV3Plus", encoder_name=ENCODER, encoder_weights=None, classes=4, **arguments):
    if arch == "DPT":
        encoder_name, arguments["decoder"] = "test_vit", DPT
    return Network(arch, encoder_name, encoder_weights, classes=classes, **arguments).eval()


def random_images(batch=2, height=64, width=96, channels=3):
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_those_of_smp_before_its_upsampling(arch):
    network = make(arch)
    decoder_stride, f5_stride, side_stride = STRIDES[arch]
    height, width = (128, 160) if arch == "PAN" else (64, 96)
    images = random_images(1, height, width)

    with torch.no_grad():
        outputs = network(images, sgc=True)

    assert network.stride == side_stride
    assert outputs.decoder_logits.shape == (1, 4, height // decoder_stride, width // decoder_stride)
    assert outputs.class_logits.shape == (1, 3)
    assert outputs.cam.shape == (1, 3, height // f5_stride, width // f5_stride)
    assert outputs.sgc_logits.shape == (1, 4, height // f5_stride, width // f5_stride)

    extra = DPT | {"dynamic_img_size": True} if arch == "DPT" else {}
    encoder_name = "tu-test_vit" if arch == "DPT" else f"tu-{ENCODER}"
    model = smp.create_model(arch, encoder_name, encoder_weights=None, classes=4, **extra).eval()
    state = network.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    with torch.no_grad():
        expected = model(network.normalize(images))
    upsampled = interpolate(outputs.decoder_logits, size=(height, width), mode="bilinear", align_corners=True)
    torch.testing.assert_close(upsampled, expected)


def test_images_are_normalised_from_bytes_and_floats_alike():
    network = make()
    images = random_images()
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    expected = (images / 255 - mean) / std
    torch.testing.assert_close(network.normalize(images), expected)
    torch.testing.assert_close(network.normalize(images.float()), expected)


@pytest.mark.parametrize("as_float", [False, True], ids=["uint8", "float"])
def test_padding_and_cropping_is_predicting_the_padded_image(as_float):
    network = make()
    images = random_images(2, 35, 50)
    images = images.float() if as_float else images
    fill = 255 * torch.tensor(IMAGENET_MEAN)
    fill = fill if as_float else fill.round()
    by_hand = torch.stack([torch.full((2, 48, 64), float(value)) for value in fill], dim=1).to(images.dtype)
    by_hand[:, :, :35, :50] = images
    real = torch.zeros(2, 48, 64, dtype=torch.bool)
    real[:, :35, :50] = True

    padded, valid = network.pad(images)

    assert torch.equal(valid, real)
    with torch.no_grad():
        logits, expected = (network(x).decoder_logits for x in (padded, by_hand))
    logits, expected = (interpolate(x, (48, 64), mode="bilinear")[..., :35, :50] for x in (logits, expected))
    assert torch.equal(logits, expected)
    assert network.pad(images[..., :32, :48])[0].shape[-2:] == (32, 48)
    cut = torch.rand(2, 35, 50) > 0.5
    assert torch.equal(network.pad(images, cut)[1][:, :35, :50], cut)


def test_sgc_logits_teach_the_head_alone_and_nothing_else_teaches_it():
    network = make().train()
    outputs = network(random_images(), sgc=True)
    outputs.sgc_logits.mul(torch.rand_like(outputs.sgc_logits)).sum().backward(retain_graph=True)
    taught = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert taught == {"sgc.query.weight", "sgc.key.weight", "sgc.projection", "sgc.shift"}

    network.zero_grad()
    (outputs.decoder_logits.sum() + outputs.class_logits.sum()).backward()
    untaught = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert untaught == {"sgc.query.weight", "sgc.key.weight", "sgc.projection", "sgc.shift"}


def test_without_image_labels_the_classifier_decides():
    network = make(background=None)
    network.classifier.bias.data = torch.tensor([9.0, -9.0, 9.0, -9.0])
    images = random_images()
    with torch.no_grad():
        chosen = network(images, sgc=True)
        given = network(images, sgc=True, image_labels=torch.tensor([[1, 0, 1, 0]] * 2))
        valid = torch.ones(2, 64, 96, dtype=torch.bool)
        valid[:, :, 48:] = False
        masked = network(images, sgc=True, valid=valid)
    assert torch.equal(chosen.cam, given.cam)
    assert chosen.cam[:, [1, 3]].count_nonzero() == 0
    assert torch.equal(chosen.cam, masked.cam)
    assert not torch.allclose(chosen.sgc_logits, masked.sgc_logits)


def test_channels_last_and_autocast_change_no_shape_or_value_by_much():
    network = make()
    images = random_images()
    with torch.no_grad():
        expected = network(images, sgc=True, image_labels=torch.ones(2, 3))
        network.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(
                images.to(memory_format=torch.channels_last), sgc=True, image_labels=torch.ones(2, 3)
            )
    assert half.decoder_logits.dtype == torch.bfloat16
    assert half.cam.dtype == half.sgc_logits.dtype == torch.float32
    torch.testing.assert_close(half.decoder_logits.float(), expected.decoder_logits, rtol=0.1, atol=0.1)
    torch.testing.assert_close(half.cam, expected.cam, rtol=0.1, atol=0.1)


def test_images_of_other_channels():
    network = make(in_channels=5)
    assert network(random_images(1, channels=5)).decoder_logits.shape == (1, 4, 16, 24)
    with pytest.raises(ValueError, match=r"images must be \[B, 5, H, W\], got \[2, 3, 64, 96\]"):
        network(random_images())
    with pytest.raises(ValueError, match="mean must hold 5 values"):
        make(in_channels=5, mean=IMAGENET_MEAN)


def test_output_stride_sets_the_size_of_f5():
    outputs = make(output_stride=8)(random_images(), sgc=True)
    assert outputs.cam.shape[-2:] == (8, 12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "DeepLab3Plus"}, "unknown arch 'DeepLab3Plus'; did you mean DeepLabV3Plus"),
        ({"encoder_name": "resnett18"}, "unknown encoder_name 'resnett18'.* did you mean resnet18"),
        ({"encoder_name": "resnet18", "encoder_weights": "imagenet21"}, "did you mean imagenet"),
        ({"arch": "Unet", "output_stride": 16}, "output_stride=16 is not for Unet"),
        ({"output_stride": 4}, "output stride 8 or 16, got 4"),
        ({"encoder_name": "test_vit"}, "cannot be built on encoder tu-test_vit: .*downsampling"),
        ({"decoder": {"upsampling": 1}}, "decoder must not hold 'upsampling'"),
        ({"arch": "PSPNet", "decoder": {"encoder_depth": 1}}, "two encoder stages"),
        ({"background": 4}, "background must be a class index"),
    ],
    ids=[
        "arch",
        "encoder",
        "weights",
        "undilated",
        "stride",
        "transformer",
        "reserved",
        "depth",
        "background",
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_dpt_refuses_patches_that_its_decoder_cannot_resample():
    with pytest.raises(ValueError, match=r'got 14 from test_vit; use decoder=\{"patch_size": 16\}'):
        Network("DPT", "test_vit", None, classes=4, decoder={**DPT, "patch_size": 14})


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 64, 65), ValueError, "multiples of 16, got 64x65; use Network.pad"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), TypeError, "uint8 or floating"),
    ],
    ids=["size", "dtype"],
)
def test_images_that_do_not_fit_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        make()(images)


def test_weights_that_cannot_be_fetched_name_the_remedy(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", unreachable)
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)  # where smp 0.5 goes next
    with pytest.raises(RuntimeError, match=r"no route.*--model.weights FILE.*--model.encoder_weights null"):
        make(encoder_name="resnet18", encoder_weights="imagenet")
